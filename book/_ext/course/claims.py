"""Two directives: `claims` gathers the claims of all lessons, `used-in` lists the lessons that use a module."""

import re

import nbformat
from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

from . import lessons


def kind() -> type:
    """The package's table of claims; torch comes with it, and must not be loaded before the extensions are set up."""
    from companion.lab import Claims

    return Claims


def of_lesson(name: str) -> list[dict[str, str]]:
    """The rows of a lesson's claims table, as its stored notebook has them."""
    if not lessons.notebook_path(name).exists():
        return []
    notebook = nbformat.read(lessons.notebook_path(name), as_version=4)
    outputs = [output for cell in lessons.code(notebook) for output in cell.outputs]
    tables = [o.data[kind().MIME] for o in outputs if kind().MIME in o.get("data", {})]
    return tables[-1]["rows"] if tables else []


def _table(rows: list[dict[str, str]]) -> nodes.table:
    columns = kind().COLUMNS
    table = nodes.table(classes=["claims"])
    group = nodes.tgroup(cols=len(columns))
    table += group
    group += [nodes.colspec(colwidth=50 if column == "claim" else 12) for column in columns]
    head, body = nodes.thead(), nodes.tbody()
    group += [head, body]
    for part, row in [(head, {c: c for c in columns}), *((body, row) for row in rows)]:
        line = nodes.row()
        line += [nodes.entry("", nodes.paragraph(text=row[column])) for column in columns]
        part += line
    return table


def _link(directive: SphinxDirective, name: str) -> addnodes.pending_xref:
    """A reference to a lesson that shows its title."""
    options = {"refdomain": "std", "reftype": "doc", "refexplicit": False, "refwarn": True}
    link = addnodes.pending_xref("", reftarget=f"/lessons/{name}", refdoc=directive.env.docname, **options)
    link += nodes.inline(text=name)
    return link


class ClaimsDirective(SphinxDirective):
    """All claims of all lessons, a section for each lesson."""

    def run(self):
        parsed = []
        for name in lessons.names():
            self.env.note_dependency(str(lessons.notebook_path(name)))
            rows = of_lesson(name)
            if not rows:
                continue
            identifier = nodes.make_id(f"claims-{name}")
            section = nodes.section(ids=[identifier], names=[identifier])
            section += [nodes.title("", "", _link(self, name)), _table(rows)]
            self.state.document.note_explicit_target(section)
            parsed.append(section)
        return parsed or [nodes.paragraph(text="There is no lesson with a claims table yet.")]


class UsedInDirective(SphinxDirective):
    """The lessons that use a module of `companion`."""

    required_arguments = 1

    def run(self):
        module = self.arguments[0]
        users = []
        for name in lessons.names():
            self.env.note_dependency(str(lessons.text_path(name)))
            if _uses(lessons.text_path(name).read_text(encoding="utf8"), module):
                users += [nodes.Text(", " if users else "Used in: "), _link(self, name)]
        return [nodes.paragraph("", "", *users, nodes.Text("."), classes=["used-in"])] if users else []


def _uses(text: str, module: str) -> bool:
    imports = ",".join(re.findall(r"^ *from companion import (.*)$", text, re.MULTILINE))
    imported = {part.split()[0] for part in re.split(r"[,()]", imports) if part.split()}
    return module in imported or f"from companion.{module}" in text


def setup(app):
    app.add_directive("claims", ClaimsDirective)
    app.add_directive("used-in", UsedInDirective)
