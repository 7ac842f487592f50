"""Show the stored outputs on the site: a lesson is its text's cells with its notebook's outputs; no kernel runs.

A notebook whose code differs from the text has outputs of another lesson, and the build refuses it.
"""

import copy
from pathlib import Path

import nbformat
from jupytext.myst import myst_to_notebook
from sphinx.errors import ExtensionError

from . import lessons
from .claims import kind

_executed: dict[str, list] = {}


def read(text: str, name: str) -> nbformat.NotebookNode:
    """Read a lesson's text; myst-nb calls this as the reader of the lesson's file."""
    notebook = myst_to_notebook(text, add_source_map=True)
    for count, (cell, executed) in enumerate(zip(lessons.code(notebook), _executed[name], strict=True), start=1):
        cell.outputs, cell.execution_count = copy.deepcopy(executed.outputs), count
        for output in cell.outputs:
            output.get("data", {}).pop(kind().MIME, None)  # for the claims page; myst-nb would warn of it
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def _choose_readers(app, config):
    reader = f"{__name__}.{read.__name__}"
    config.nb_custom_formats = {f"/lessons/{name}.md": (reader, {"name": name}, False) for name in lessons.names()}


def _gather(app):
    """The executed code cells of all lessons: those given to this build, else the stored ones."""
    _executed.clear()
    if app.config.course_executed is not None:
        _executed.update(app.config.course_executed)
        return
    names = lessons.names()
    reasons = [reason for name in names if (reason := lessons.stale(name))]
    if reasons:
        raise ExtensionError("; ".join(reasons) + ". Run `make lessons`, or `make lessons ONLY=name` for one of them.")
    _executed.update((name, lessons.stored_code(name)) for name in names)


def _depend_on_notebook(app, docname, source):
    if docname.startswith("lessons/"):
        app.env.note_dependency(str(Path(app.srcdir, f"{docname}.ipynb")))


def _offer_notebooks(app, exception):
    """The download button gives the stored notebook, not myst-nb's own."""
    if exception is None and app.builder.format == "html":
        for name in lessons.names():
            target = Path(app.outdir, "_sources", "lessons", f"{name}.ipynb")
            if target.exists():
                target.write_bytes(lessons.notebook_path(name).read_bytes())


def setup(app):
    app.add_config_value("course_executed", None, "", (dict, type(None)))
    # after myst-nb's own listener, which would take the files' names for suffixes of sources
    app.connect("config-inited", _choose_readers, priority=900)
    app.connect("builder-inited", _gather)
    app.connect("source-read", _depend_on_notebook)
    app.connect("build-finished", _offer_notebooks)
