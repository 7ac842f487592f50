"""Defects of the tools below us, each repaired in one place.

A build counts how often it made each repair, and the tests ask that a whole build made each: one that the tools no
longer need is then found.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from docutils import nodes
from myst_nb.sphinx_ import SphinxNbRenderer

from .address import ROOT

NAMES = ("thebe's listeners", "thebe's style sheet", "shared ids", "figures on every output")
made: Counter[str] = Counter()
_SHARED_IDS = {"proof-content", "exercise-content", "solution-content", "proof"}


def _forget_thebe(app):
    """Jupyter Book 1 loads thebe's script twice on every page, an error in the browser; we need none of it."""
    for listeners in app.events.listeners.values():
        for listener in [one for one in listeners if one.handler.__module__ == "sphinx_thebe"]:
            listeners.remove(listener)
            made["thebe's listeners"] += 1
    kept = [given for given in app.registry.css_files if given[0] != "sphinx-thebe.css"]
    made["thebe's style sheet"] += len(app.registry.css_files) - len(kept)
    app.registry.css_files = kept


def _unique_ids(app, document):
    """sphinx-proof and sphinx-exercise give every box's content the same id; number them."""
    boxes = [node for node in document.findall(nodes.Element) if _SHARED_IDS & set(node.get("ids", []))]
    for number, node in enumerate(boxes, start=1):
        node["ids"] = [f"{i}-{number}" if i in _SHARED_IDS else i for i in node["ids"]]
    made["shared ids"] += len(boxes)


def _figure_around_the_picture_only(app):
    """myst-nb puts the caption and the name of a figure on every output of its cell; we want them on the picture."""
    render = SphinxNbRenderer._render_nb_cell_code_outputs
    if getattr(render, "repaired", False):
        return

    def one_by_one(self, token, outputs):
        metadata = token.meta["metadata"]
        shown = [o for o in outputs if o.output_type in ("display_data", "execute_result")]
        pictures = [o for o in shown if any(mime.startswith("image/") for mime in o["data"])]
        framed = (pictures or shown or [None])[0]
        plain = {k: v for k, v in metadata.items() if k != "mystnb"}
        plain["mystnb"] = {k: v for k, v in metadata.get("mystnb", {}).items() if k != "figure"}
        made["figures on every output"] += (len(outputs) - 1) * ("figure" in metadata.get("mystnb", {}))
        for output in outputs:
            token.meta["metadata"] = metadata if output is framed else plain
            render(self, token, [output])
        token.meta["metadata"] = metadata

    one_by_one.repaired = True
    SphinxNbRenderer._render_nb_cell_code_outputs = one_by_one


def _report(app, exception):
    Path(app.doctreedir, "repairs.json").write_text(json.dumps(made, indent=1), encoding="utf8")


def setup(app):
    made.clear()
    made.update(dict.fromkeys(NAMES, 0))
    sys.path.insert(0, str(ROOT))  # the pages on `companion` describe this copy, whatever is installed
    app.connect("config-inited", lambda app, config: _forget_thebe(app), priority=900)
    app.connect("builder-inited", _figure_around_the_picture_only)
    app.connect("doctree-read", _unique_ids, priority=900)
    app.connect("build-finished", _report, priority=900)
