"""A lesson's text, its notebook, and how the two belong together."""

from pathlib import Path

import jupytext
import nbformat

from .address import ROOT, install_source

LESSONS = ROOT / "lessons"
INSTALL = """\
# On Colab, Kaggle or Binder: install the course's package (a clone of the repository has it already).
try:
    import companion
except ModuleNotFoundError:
    import os
    import subprocess
    import sys

    source = os.environ.get("WIDE_ENOUGH_SOURCE", "{source}")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)
    import companion"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "colab": {"provenance": [], "toc_visible": True},
}


def install_cell() -> str:
    """The first code cell of every notebook."""
    return INSTALL.format(source=install_source())


def names(only: str = "") -> list[str]:
    """The lessons' names in order, or the one asked for."""
    found = sorted(p.stem for p in LESSONS.glob("*.md"))
    if only and only not in found:
        raise SystemExit(f"no lesson is called {only!r}; there are: {', '.join(found) or 'none'}")
    return [only] if only else found


def text_path(name: str) -> Path:
    return LESSONS / f"{name}.md"


def notebook_path(name: str) -> Path:
    return LESSONS / f"{name}.ipynb"


def read_text(name: str) -> nbformat.NotebookNode:
    """The lesson's text as a notebook: Markdown and code cells, no outputs."""
    return jupytext.read(text_path(name))


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stored_code(name: str) -> list[nbformat.NotebookNode]:
    """The code cells of the stored notebook, without its install cell."""
    path = notebook_path(name)
    cells = code(nbformat.read(path, as_version=4)) if path.exists() else []
    return cells[1:] if cells and cells[0].source == install_cell() else cells


def stale(name: str) -> str:
    """Why the stored outputs cannot be shown with the lesson's text; empty when they can."""
    if not notebook_path(name).exists():
        return f"lessons/{name}.ipynb does not exist"
    text, stored = code(read_text(name)), stored_code(name)
    if [cell.source for cell in text] != [cell.source for cell in stored]:
        return f"the code of lessons/{name}.md has changed since lessons/{name}.ipynb was run"
    if any(cell.execution_count is None for cell in stored):
        return f"lessons/{name}.ipynb was never run"
    return ""
