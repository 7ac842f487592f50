"""Text and notebook of each lesson belong together, and the check that says so can fail."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
import notebooks
import pytest
from course import address, lessons
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NAME = "01-toy"


def _toy() -> nbformat.NotebookNode:
    cells = [
        new_markdown_cell("# Toy", id="a"),
        new_code_cell(lessons.install_cell(), id="b", execution_count=1),
        new_code_cell("print(6 * 7)", id="c", execution_count=2, outputs=[new_output("stream", text="42\n")]),
    ]
    return new_notebook(cells=cells, metadata=lessons.METADATA)


@pytest.fixture
def difference(tmp_path, monkeypatch):
    """The check's answer for a stored copy of the toy lesson's notebook, tampered with by `change`."""
    monkeypatch.setattr(lessons, "LESSONS", tmp_path)

    def answer(change=lambda notebook: None):
        stored = _toy()
        change(stored)
        notebooks.write(NAME, stored)
        return notebooks.difference(NAME, _toy())

    return answer


@pytest.mark.pipeline
@pytest.mark.xdist_group("notebooks")
def test_every_notebook_belongs_to_its_text():
    command = [sys.executable, str(notebooks.__file__), "check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(lessons.names())} notebooks belong" in done.stdout


def test_an_untouched_notebook_passes(difference):
    assert difference() == ""


def test_other_numbers_in_the_outputs_are_left_to_nbval(difference):
    def change(notebook):
        notebook.cells[2].outputs[0].text = "43\n"

    assert difference(change) == ""


@pytest.mark.parametrize(("cell", "text"), [(0, "# Another title"), (1, "import companion"), (2, "print(42)")])
def test_drift_is_caught(difference, cell, text):
    def change(notebook):
        notebook.cells[cell].source = text

    assert text in difference(change)


def test_a_missing_cell_is_caught(difference):
    assert "# Toy" in difference(lambda notebook: notebook.cells.pop(0))


@pytest.mark.parametrize("counts", [(None, None), (1, None), (2, 1), (1, 3)])
def test_a_notebook_not_run_in_order_is_caught(difference, counts):
    def change(notebook):
        for cell, count in zip(notebook.cells[1:], counts, strict=True):
            cell.execution_count = count

    assert "was not run from top to bottom" in difference(change)


def test_a_notebook_without_outputs_is_caught(difference):
    assert "has no outputs" in difference(lambda notebook: notebook.cells[2].outputs.clear())


def test_stderr_in_an_output_is_caught(difference):
    def change(notebook):
        notebook.cells[2].outputs.append(new_output("stream", name="stderr", text="UserWarning: careful"))

    with pytest.raises(notebooks.Broken, match="writes to stderr"):
        difference(change)


def test_an_error_in_an_output_is_caught(difference):
    def change(notebook):
        notebook.cells[2].outputs = [new_output("error", ename="ValueError", evalue="bad", traceback=[])]

    with pytest.raises(notebooks.Broken, match="ValueError: bad"):
        difference(change)


TEXT = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Toy

```{code-cell} ipython3
print(6 * 7)
```
"""


def test_outputs_of_another_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "LESSONS", tmp_path)
    monkeypatch.setattr(notebooks, "BUILD", tmp_path / "build")
    (tmp_path / f"{NAME}.md").write_text(TEXT)
    assert "does not exist" in lessons.stale(NAME)
    notebooks.write(NAME, _toy())
    assert lessons.stale(NAME) == ""
    assert len(notebooks.stored(NAME)) == 2
    (tmp_path / f"{NAME}.md").write_text(TEXT.replace("6 * 7", "7 * 7"))
    assert "has changed since" in lessons.stale(NAME)
    with pytest.raises(notebooks.Broken, match="make lessons ONLY=01-toy"):
        notebooks.stored(NAME)


def test_a_finished_run_is_kept_only_for_its_own_code(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "LESSONS", tmp_path)
    monkeypatch.setattr(notebooks, "BUILD", tmp_path / "build")
    (tmp_path / f"{NAME}.md").write_text(TEXT)
    notebooks.keep(NAME, lessons.code(_toy()))
    assert [cell.execution_count for cell in notebooks.kept(NAME)] == [1, 2]
    (tmp_path / f"{NAME}.md").write_text(TEXT.replace("6 * 7", "7 * 7"))
    assert notebooks.kept(NAME) is None


# --- jupytext


@pytest.mark.parametrize("name", lessons.names())
def test_a_text_is_read_as_the_site_reads_it(name):
    def cells(notebook):
        return [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]

    text = lessons.text_path(name).read_text(encoding="utf8")
    assert cells(lessons.read_text(name)) == cells(read_myst_markdown_notebook(text))


def test_only_working_notebooks_are_paired():
    settings = tomllib.loads((address.ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["jupytext"]
    assert settings["formats"] == {"lessons/": "md:myst", "_build/notebooks/": "ipynb"}


@pytest.mark.parametrize("name", lessons.names())
def test_work_in_a_notebook_comes_back_and_leaves_the_published_one(tmp_path, name):
    text, published = tmp_path / "lessons" / f"{name}.md", tmp_path / "lessons" / f"{name}.ipynb"
    text.parent.mkdir()
    shutil.copy(address.ROOT / "pyproject.toml", tmp_path)
    shutil.copy(lessons.text_path(name), text)
    shutil.copy(lessons.notebook_path(name), published)
    working = tmp_path / "_build" / "notebooks" / f"{name}.ipynb"

    def sync():
        command = [Path(sys.executable).with_name("jupytext"), "--sync", text]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    sync()
    before = text.read_text(encoding="utf8")
    notebook = jupytext.read(working)
    old, sentence = notebook.cells[0].source, "\n\nA sentence from the notebook."
    notebook.cells[0].source += sentence
    jupytext.write(notebook, working)
    later = text.stat().st_mtime + 10
    os.utime(working, (later, later))
    sync()
    assert text.read_text(encoding="utf8") == before.replace(old, old + sentence, 1)
    assert published.read_bytes() == lessons.notebook_path(name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "lessons").iterdir()) == [published.name, text.name]
