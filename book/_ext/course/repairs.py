"""Defects of the tools below us, each repaired in one place."""

import re
import sys

from docutils import nodes
from myst_nb.sphinx_ import SphinxNbRenderer
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as TocCollector

from .address import ROOT

_SHARED_IDS = {"proof-content", "exercise-content", "solution-content", "proof"}


def _forget_thebe(app):
    """Jupyter Book 1 loads thebe's script twice on every page, an error in the browser; we need none of it."""
    for listeners in app.events.listeners.values():
        for listener in [one for one in listeners if one.handler.__module__ == "sphinx_thebe"]:
            listeners.remove(listener)
    app.registry.css_files = [given for given in app.registry.css_files if given[0] != "sphinx-thebe.css"]


def _unique_ids(app, document):
    """sphinx-proof and sphinx-exercise give every box's content the same id; number them."""
    boxes = [node for node in document.findall(nodes.Element) if _SHARED_IDS & set(node.get("ids", []))]
    for number, node in enumerate(boxes, start=1):
        node["ids"] = [f"{i}-{number}" if i in _SHARED_IDS else i for i in node["ids"]]


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
        for output in outputs:
            token.meta["metadata"] = metadata if output is framed else plain
            render(self, token, [output])
        token.meta["metadata"] = metadata

    one_by_one.repaired = True
    SphinxNbRenderer._render_nb_cell_code_outputs = one_by_one


def _number_lessons_by_name(app):
    """Sphinx counts the lessons that are there; ours have their files' numbers, so that lesson 4 is chapter 4."""
    assign = TocCollector.assign_section_numbers
    if getattr(assign, "repaired", False):
        return

    def by_name(self, env):
        rewritten = assign(self, env)
        for doc, numbers in env.toc_secnumbers.items():
            lesson = re.match(r"lessons/(\d\d)-", doc)
            if not lesson:
                continue
            own = int(lesson[1])
            for anchor, number in numbers.items():
                numbers[anchor] = number and type(number)((own, *number[1:]))
            for node in [env.titles[doc], *env.tocs[doc].findall(nodes.reference)]:
                if node.get("secnumber"):
                    node["secnumber"] = type(node["secnumber"])((own, *node["secnumber"][1:]))
        return rewritten

    by_name.repaired = True
    TocCollector.assign_section_numbers = by_name


def setup(app):
    sys.path.insert(0, str(ROOT))  # the pages on `companion` describe this copy, whatever is installed
    app.connect("config-inited", lambda app, config: _forget_thebe(app), priority=900)
    app.connect("builder-inited", _number_lessons_by_name)
    app.connect("builder-inited", _figure_around_the_picture_only)
    app.connect("doctree-read", _unique_ids, priority=900)
