"""Each lesson as Colab would run it.  This is the nbval run of the lessons: their stored outputs are compared here.

A fresh environment holds what Colab brings, the small packages that the wheel asks for and Colab has or pip would
fetch, and nbval; the folder holds one notebook.  The package index is switched off and the notebook's own install
cell installs the wheel, so that a requirement that would replace anything of Colab's fails.  Everything happens
outside the repository: neither its folder nor its pytest settings can help.  (`make check-lessons` compares the stored
outputs in the development environment, without these precautions.)
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from course import address, lessons
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook, new_output
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.pipeline

COLAB = ("torch", "numpy", "matplotlib", "scikit-learn", "tqdm", "ipykernel")
FETCHED = ("jaxtyping", "wadler-lindig", "safetensors")
JUDGE = ("pytest", "nbval")
SANITIZE = Path(__file__).parents[1] / "nbval_sanitize.cfg"


def closure(*names: str) -> dict[str, metadata.Distribution]:
    """The installed distributions `names` and everything they need."""
    found, waiting = {}, [(name, "") for name in names]
    seen = set()
    while waiting:
        name, extra = waiting.pop()
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # pip in the new environment says so where it matters
        found[canonicalize_name(name)] = distribution
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, e) for e in ("", *requirement.extras)]
    return found


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Machine:
    """A hosted machine: an environment with Colab's packages and a folder for notebooks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder / "content", folder / "env"
        self.folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(self.prefix)], check=True, timeout=120)
        self.python = self.prefix / ("Scripts" if os.name == "nt" else "bin") / "python"
        paths = {"base": str(self.prefix), "platbase": str(self.prefix)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        for distribution in closure(*COLAB, *FETCHED, *JUDGE).values():
            for file in distribution.files or ():
                source = Path(distribution.locate_file(file))
                # no programs (they name another interpreter), no start-up hooks
                if ".." in file.parts or file.suffix == ".pth" or not source.is_file():
                    continue
                target = self.packages / file
                if not target.exists():
                    _link(source, target)
        kernel = ["ipykernel", "install", "--sys-prefix", "--name", "python3"]
        self.run("-m", *kernel, check=True)

    def run(self, *arguments: str, check: bool = False, **environment: str) -> subprocess.CompletedProcess:
        """Run the machine's Python in its folder, without the index and without what this process was given."""
        dropped = (
            "PYTHON",
            "PYTEST",
            "COV_",
            "COVERAGE",
            "MPLBACKEND",
            "VIRTUAL_ENV",
            "JUPYTER",
            "PIP_",
            "WIDE_ENOUGH",
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        kept = {"OMP_NUM_THREADS": threads, **kept, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        kept["IPYTHONDIR"] = str(self.prefix / "ipython")  # a reader's start-up files must not count
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            env=kept | environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=900,
        )

    def installed(self) -> dict[str, str]:
        """Name and version of every distribution there."""
        listing = "{d.name: d.version for d in importlib.metadata.distributions()}"
        code = f"import importlib.metadata, json; print(json.dumps({listing}))"
        return json.loads(self.run("-c", code, check=True).stdout)

    def compare(self, notebook: Path, wheel: Path) -> subprocess.CompletedProcess:
        """Run a notebook there, alone, and compare its outputs with the stored ones."""
        for old in self.folder.iterdir():
            old.unlink()
        shutil.copy(notebook, self.folder)
        options = ["--nbval", "--nbval-current-env", f"--nbval-sanitize-with={SANITIZE}", "--nbval-cell-timeout=300"]
        quiet = ["-q", "--tb=short", "-p", "no:cacheprovider", "--color=no", "-x"]
        return self.run("-m", "pytest", *options, *quiet, notebook.name, WIDE_ENOUGH_SOURCE=str(wheel))


def _wheel(folder: Path, change=lambda text: text) -> Path:
    """Build the wheel from a copy of the sources, so that the repository stays clean."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("README.md", "LICENSE"):
        shutil.copy(address.ROOT / name, source)
    shutil.copytree(address.ROOT / "companion", source / "companion", ignore=shutil.ignore_patterns("__pycache__"))
    text = (address.ROOT / "pyproject.toml").read_text(encoding="utf8")
    (source / "pyproject.toml").write_text(change(text), encoding="utf8")
    command = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), "."]
    subprocess.run([sys.executable, "-m", *command], cwd=source, check=True, timeout=300)
    (wheel,) = folder.glob("wide_enough-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return _wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    return Machine(tmp_path_factory.mktemp("colab"))


@pytest.mark.xdist_group("colab-controls")
def test_the_wheel_holds_the_whole_package(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("companion/")}
    files = (path for path in (address.ROOT / "companion").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert held == {path.relative_to(address.ROOT).as_posix() for path in files}
    assert any(name.startswith("companion/lab/stored/") for name in held)


def _lessons():
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"colab-{name}")) for name in lessons.names()]


@pytest.mark.parametrize("name", _lessons())
def test_lesson_as_colab_would_run_it(name, tmp_path, wheel):
    machine = Machine(tmp_path)
    before = machine.installed()
    assert "wide-enough" not in before
    assert not {"jupyter-book", "hypothesis", "beartype", "pytest-xdist"} & set(before)
    done = machine.compare(lessons.notebook_path(name), wheel)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    after = machine.installed()
    version = after.pop("wide-enough")
    assert version == metadata.version("wide-enough")
    assert after == before  # torch, numpy and everything else are what they were
    assert {key: after[key] for key in ("torch", "numpy")} == {k: metadata.version(k) for k in ("torch", "numpy")}
    origin = json.loads((machine.packages / f"wide_enough-{version}.dist-info" / "direct_url.json").read_text())
    assert origin["url"] == wheel.as_uri()
    where = machine.run("-c", "import companion; print(companion.__file__)", check=True).stdout.strip()
    assert Path(where).is_relative_to(machine.packages)


@pytest.mark.xdist_group("colab-controls")
class TestControls:
    """The run above can fail: each of these must not pass on the same kind of machine."""

    @pytest.fixture
    def compare(self, machine, wheel, tmp_path):
        def answer(*cells, wheel=wheel):
            made = []
            for number, (source, *texts) in enumerate([(lessons.install_cell(),), *cells], start=1):
                outputs = [new_output("stream", text=text) for text in texts]
                made.append(new_code_cell(source, execution_count=number, outputs=outputs))
            write(new_notebook(cells=made, metadata=lessons.METADATA), tmp_path / "toy.ipynb")
            return machine.compare(tmp_path / "toy.ipynb", wheel)

        return answer

    def test_a_tight_requirement_cannot_replace_what_is_there(self, compare, machine, tmp_path):
        before = machine.installed()
        tight = _wheel(tmp_path / "tight", lambda text: text.replace('"numpy>=1.26"', '"numpy==1.26.0"'))
        refused = machine.run("-m", "pip", "install", str(tight))
        assert "numpy==1.26.0" in refused.stderr
        done = compare(wheel=tight)
        assert done.returncode == 1
        assert "CalledProcessError" in done.stdout
        assert machine.installed() == before

    def test_a_right_number_passes_and_a_wrong_one_fails(self, compare):
        right = compare(("import companion\nprint(6 * 7)", "42\n"))
        assert right.returncode == 0, right.stdout
        wrong = compare(("import companion\nprint(6 * 7)", "43\n"))
        assert wrong.returncode == 1
        assert "43" in wrong.stdout

    def test_an_error_fails(self, compare):
        assert compare(("1 / 0",)).returncode == 1

    def test_the_repository_is_out_of_reach(self, compare):
        done = compare(("import course",))
        assert done.returncode == 1
        assert "No module named 'course'" in done.stdout

    def test_only_the_frames_of_a_player_are_left_out(self, machine, wheel, tmp_path):
        def output(frame, words):
            html = f'<div>{words}<script>frames[0] = "data:image/png;base64,{frame}\\\n/Ab="</script></div>'
            return f"from IPython.display import HTML, display\ndisplay(HTML({html!r}))", html

        def compare(stored, shown):
            source, _ = output(*shown)
            data = {"text/html": output(*stored)[1], "text/plain": "<IPython.core.display.HTML object>"}
            cell = new_code_cell(source, execution_count=1, outputs=[new_output("display_data", data=data)])
            write(new_notebook(cells=[cell], metadata=lessons.METADATA), tmp_path / "toy.ipynb")
            return machine.compare(tmp_path / "toy.ipynb", wheel).returncode

        assert compare(("iVBOR", "film"), ("iVBXX", "film")) == 0
        assert compare(("iVBOR", "film"), ("iVBOR", "movie")) == 1
