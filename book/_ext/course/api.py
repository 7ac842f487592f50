"""The reference of `companion`, made from the faces: what a package exports first, then what else its modules hold."""

import importlib
import pkgutil

from docutils.utils import new_document
from myst_parser.mocking import MockRSTParser
from sphinx.util.docutils import SphinxDirective


def modules(name: str) -> list[str]:
    """The modules of a package, in their own order, each package before its parts; a module alone is its own list."""
    module = importlib.import_module(name)
    parts = [part.name for part in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return [name, *(inner for part in parts for inner in modules(f"{name}.{part}"))]


def reference(name: str) -> str:
    """The autodoc directives of one package or module; no name is described twice."""
    face = getattr(importlib.import_module(name), "__all__", None)
    if face is None:
        return f".. automodule:: {name}\n"
    lines = [f".. automodule:: {name}", f"   :members: {', '.join(face)}", "   :imported-members:", ""]
    for inner in modules(name)[1:]:
        is_package = hasattr(importlib.import_module(inner), "__path__")
        shown = "   :no-members:" if is_package else f"   :exclude-members: {', '.join(face)}"
        lines += [f".. rubric:: Inside: ``{inner}``", "", f".. automodule:: {inner}", shown, ""]
    return "\n".join(lines)


class Reference(SphinxDirective):
    """All of a package of `companion`."""

    required_arguments = 1

    def run(self):
        """Parse the autodoc directives as reStructuredText."""
        document = new_document(self.state.document["source"], self.state.document.settings)
        document.reporter = self.state.document.reporter
        MockRSTParser().parse(reference(f"companion.{self.arguments[0]}"), document)
        return document.children


def setup(app):
    app.add_directive("reference", Reference)
