"""Show the stored outputs on the site: fill myst-nb's cache from the notebooks, so that no kernel runs.

The cache knows a lesson by its code cells.  A notebook whose code differs from the text has outputs of another
lesson, and the build refuses it.
"""

import copy
import warnings
from pathlib import Path

from sphinx.errors import ExtensionError

from . import lessons
from .claims import MIME

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn


def fill(folder: Path, executed: dict[str, list]) -> None:
    """Put the outputs of executed code cells into the cache `folder`, under the code of the lessons' texts."""
    cache = get_cache(str(folder))
    cache.change_cache_limit(1000)
    for name, cells in executed.items():
        notebook = lessons.read_text(name)
        for count, (cell, stored) in enumerate(zip(lessons.code(notebook), cells, strict=True), start=1):
            cell.outputs = copy.deepcopy(stored.outputs)
            for output in cell.outputs:
                output.get("data", {}).pop(MIME, None)  # for the claims page; myst-nb would warn of it
            cell.execution_count = count
        notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        cache.cache_notebook_bundle(CacheBundleIn(notebook, str(lessons.text_path(name))), overwrite=True)


def _fill(app):
    if app.config.course_outputs_given:
        return
    names = lessons.names()
    reasons = [reason for name in names if (reason := lessons.stale(name))]
    if reasons:
        raise ExtensionError("; ".join(reasons) + ". Run `make lessons`, or `make lessons ONLY=name` for one of them.")
    fill(
        Path(app.config.nb_execution_cache_path or Path(app.outdir).parent / ".jupyter_cache"),
        {name: lessons.stored_code(name) for name in names},
    )


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
    app.add_config_value("course_outputs_given", False, "env")
    app.connect("builder-inited", _fill)
    app.connect("source-read", _depend_on_notebook)
    app.connect("build-finished", _offer_notebooks)
