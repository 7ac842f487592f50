"""What the project says about itself: one address, loose requirements, complete pins, two commands."""

import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
from course import address, lessons
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import companion

ROOT = address.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
MAY_REPEAT_THE_ADDRESS = ("README.md", "CITATION.cff", "CONTRIBUTING.md")


def _files() -> list[str]:
    """The project's own files: what git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def addresses(text: str, owner: str) -> list[str]:
    """Every address of a repository or site of `owner` in `text`."""
    found = re.findall(rf"https?://(?:github\.com/{owner}|{owner}\.github\.io)[^\s)\"'>\]]*", text)
    found += re.findall(rf"(?<!/)(?:github\.com[/:]{owner}|{owner}\.github\.io)[^\s)\"'>\]]*", text)
    return found


def strangers(name: str, text: str) -> list[str]:
    """The addresses in a file that do not follow from pyproject's."""
    found = addresses(text, "wide-enough") + addresses(text, re.escape(address.repository().split("/")[-2]))
    if name in MAY_REPEAT_THE_ADDRESS:
        bases = address.repository(), address.site().rstrip("/")
        return [a for a in found if not any(_follows(a, base) for base in bases)]
    return found


def _follows(found: str, base: str) -> bool:
    return found == base or found.startswith((f"{base}/", f"{base}.git"))


def test_the_address_is_in_one_place():
    wrong = {}
    for name in _files():
        if name == "pyproject.toml" or name.endswith(".ipynb"):
            continue
        try:
            text = (ROOT / name).read_text(encoding="utf8")
        except UnicodeDecodeError:
            continue
        if found := strangers(name, text):
            wrong[name] = found
    assert not wrong


def test_a_second_address_is_found():
    placeholder = "https://github.com/" + "wide-enough/"
    assert strangers("book/intro.md", f"see {placeholder}wide-enough")
    assert strangers("README.md", f"see [it]({placeholder}elsewhere)")
    assert strangers("README.md", "git@github.com:" + "wide-enough/elsewhere")
    assert not strangers("README.md", f"see [it]({address.repository()}) and {address.site()}lessons/")


def test_every_link_follows_from_the_address(monkeypatch):
    monkeypatch.setattr(address, "_urls", lambda: {"Repository": "https://github.com/someone/else/"})
    assert address.repository() == "https://github.com/someone/else"
    assert address.site() == "https://someone.github.io/else/"
    assert address.install_source() == "git+https://github.com/someone/else"
    assert "git+https://github.com/someone/else" in lessons.install_cell()
    assert address.colab("01-a") == (
        "https://colab.research.google.com/github/someone/else/blob/main/lessons/01-a.ipynb"
    )


@pytest.mark.parametrize("name", lessons.names())
def test_notebooks_install_from_the_address(name):
    notebook = nbformat.read(lessons.notebook_path(name), as_version=4)
    assert lessons.code(notebook)[0].source == lessons.install_cell()
    assert f'"git+{PROJECT["urls"]["Repository"]}"' in lessons.code(notebook)[0].source
    assert address.colab(name) in notebook.cells[0].source
    for cell in notebook.cells:
        for found in addresses(cell.source, re.escape(address.repository().split("/")[-2])):
            assert _follows(found, address.repository()) or _follows(found, address.site().rstrip("/"))


def test_requirements_at_run_time_have_lower_bounds_only():
    for line in PROJECT["dependencies"]:
        operators = [specifier.operator for specifier in Requirement(line).specifier]
        assert operators == [">="], line


def _pins() -> dict[str, str]:
    lines = (ROOT / "book" / "constraints.txt").read_text(encoding="utf8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:  # no path, no address, no local build such as +cpu
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_pins_cover_every_requirement():
    pins = _pins()
    extras = [line for group in PROJECT["optional-dependencies"].values() for line in group]
    for line in [*PROJECT["dependencies"], *extras]:
        requirement = Requirement(line)
        if requirement.name == "torch":  # chosen by the Makefile
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in book/constraints.txt"
        assert requirement.specifier.contains(pin, prereleases=True), f"{line} refuses its pin {pin}"
    assert "torch" not in pins


def test_torch_pin_of_the_makefile_is_allowed():
    version = re.search(r"^TORCH +\?= torch==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)[1]
    torch = next(r for line in PROJECT["dependencies"] if (r := Requirement(line)).name == "torch")
    assert torch.specifier.contains(version)


def test_machines_run_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text(encoding="utf8").splitlines() if line and not line.startswith("#")]
    assert lines == ['cd "$(dirname "$0")/.." && exec make test']
    assert script.stat().st_mode & 0o111


def test_versions_and_licence_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == PROJECT["version"]
    assert re.search(r"^license: (.*)$", citation, re.MULTILINE)[1] == PROJECT["license"]
    assert re.search(r'^repository-code: "?(.*?)"?$', citation, re.MULTILINE)[1] == address.repository()


def test_every_door_opens_when_it_is_named():
    script = "import companion as c; print(all(getattr(c, name) for name in c._DOORS), sorted(c._DOORS))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    folder = ROOT / "companion"
    doors = sorted(p.stem for p in folder.iterdir() if p.stem[0] not in "_." and (p.suffix == ".py" or p.is_dir()))
    assert done.stdout.strip() == f"True {doors}"
    with pytest.raises(AttributeError, match="module 'companion' has no attribute 'wide'"):
        _ = companion.wide
