"""The reference of `companion`, made from the faces: what a package exports first, then what else its modules hold."""

import importlib
import pkgutil
import re
from pathlib import Path

from docutils.utils import new_document
from myst_parser.mocking import MockRSTParser
from sphinx.util.docutils import SphinxDirective

from .repairs import made


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
    # what is asked first comes first: certificates, other functions, classes
    shown = sorted(face, key=lambda name: (not name.startswith("certify"), name[0].isupper(), name))
    lines = [f".. automodule:: {name}", f"   :members: {', '.join(shown)}", "   :imported-members:", ""]
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


# --- from the source back to the reference

_BACK = re.compile(r'(<div class="viewcode-block" id="([^"]+)">\s*<a class="viewcode-back" href="[^"#]+#)[^"]+')


def anchor(module: str, name: str) -> str:
    """Where a name of a module is described: at the face of its wing if that exports it, else in its own module."""
    wing = ".".join(module.split(".")[:2])
    exported = name.partition(".")[0] in getattr(importlib.import_module(wing), "__all__", ())
    return f"{wing if exported else module}.{name}"


def _skip_fields(app, what, name, member, skip, options):
    """The fields of a named tuple are described in its docstring."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def _source_links(app, exception):
    """viewcode takes one name of a module for all of it, that of its face; some names are not on the face."""
    if exception is None and app.builder.format == "html":
        for path in Path(app.outdir).glob("_modules/companion/**/*.html"):
            module = ".".join(path.relative_to(Path(app.outdir, "_modules")).with_suffix("").parts)
            text = path.read_text(encoding="utf8")
            text, count = _BACK.subn(lambda found, m=module: found[1] + anchor(m, found[2]), text)
            made["links from the source"] += count
            path.write_text(text, encoding="utf8")


def setup(app):
    made["links from the source"] = 0
    app.add_directive("reference", Reference)
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("build-finished", _source_links)
