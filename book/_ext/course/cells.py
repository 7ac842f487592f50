"""The builder `cells`: a lesson as plain Markdown cells, for readers who open its notebook on Colab or GitHub.

Sphinx has resolved every reference when this writer sees the page, so that the notebook carries the site's own
numbers: theorems, equations, exercises and figures.  Output: for each page a JSON list of cells, either
``["markdown", text, tags]`` or ``["code", index]`` where `index` counts the cells of the lesson's text.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.builders import Builder
from sphinx.errors import ExtensionError

from . import address

_ADMONITIONS = ("note", "warning", "tip", "important", "caution", "attention", "danger", "error", "hint", "seealso")
_NAMES = {"strong": "**", "emphasis": "*", "literal_strong": "**", "literal_emphasis": "*", "title_reference": "*"}


class CellsBuilder(Builder):
    name = "cells"
    format = "cells"
    epilog = "The lessons' cells are in %(outdir)s."
    allow_parallel = False

    def get_outdated_docs(self):
        return sorted(doc for doc in self.env.found_docs if doc.startswith("lessons/"))

    def get_target_uri(self, docname, typ=None):
        return f"{docname}.html"

    def get_relative_uri(self, from_, to, typ=None):
        return self.get_target_uri(to)

    def prepare_writing(self, docnames):
        pass

    def write_doc(self, docname, doctree):
        if docname.startswith("lessons/"):
            cells = Writer(self, docname).cells(doctree)
            path = Path(self.outdir, f"{docname}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(cells, ensure_ascii=False, indent=1), encoding="utf8")


class Writer:
    """Turns a resolved page into cells: `block` for what stands alone, `inline` for what stands in a line."""

    def __init__(self, builder, docname):
        self.builder, self.docname = builder, docname
        self.numbers = builder.env.toc_fignumbers.get(docname, {})
        self.level = 0
        self.done: list[list] = []
        self.pending: list[str] = []

    # --- cells

    def cells(self, document):
        self.blocks(document)
        self.flush()
        return self.done

    def flush(self, *tags):
        """Close the Markdown cell that is being written."""
        text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(t for t in self.pending if t.strip())).strip()
        if text:
            self.done.append(["markdown", text, list(tags)])
        self.pending = []

    def blocks(self, node):
        """Write the children of `node`, cutting cells at headings, boxes and code."""
        for child in node.children:
            self.top(child)

    def top(self, node):
        """Write one node that may contain code cells or ask for a cell of its own."""
        name = type(node).__name__
        if isinstance(node, nodes.section):
            self.level += 1
            self.blocks(node)
            self.level -= 1
        elif isinstance(node, nodes.title):
            self.flush()
            self.pending.append(f"{'#' * max(1, self.level)} {self.number(node)}{self.inline(node)}")
        elif isinstance(node, nodes.container) and node.get("nb_element") == "cell_code":
            self.code_cell(node)
        elif name in ("exercise_enumerable_node", "exercise_node", "solution_node"):
            self.exercise(node, name == "solution_node")
        elif name == "proof_node" or (isinstance(node, nodes.Element) and "proof" in node.get("classes", [])):
            self.flush()
            self.pending.append(self.block(node))
            self.flush()
        else:
            self.pending.append(self.block(node))

    def code_cell(self, node):
        self.flush()
        self.done.append(["code", node["cell_index"]])
        for figure in node.findall(nodes.figure):
            for caption in figure.findall(nodes.caption):
                self.pending.append(self.block(caption))
                self.flush()

    def exercise(self, node, solution):
        """An exercise is a heading of level 3; its solution one of level 4, folded where the reader's page can."""
        self.flush()
        title, *content = node.children
        text = self.inline(title)
        if not solution:
            number = self.counted("exercise", node)
            text = f"Exercise {number} {text}" if number else f"Exercise {text}"
        self.pending.append(f"{'####' if solution else '###'} {' '.join(text.split())}")
        if solution:
            self.flush("solution")
        for part in content:
            self.blocks(part)
        self.flush()

    # --- numbers

    def counted(self, kind, node):
        for identifier in node.get("ids", []):
            if identifier in self.numbers.get(kind, {}):
                return ".".join(map(str, self.numbers[kind][identifier]))
        return ""

    def caption(self, kind, node):
        """What stands before the caption of a figure or table."""
        number = self.counted(kind, node)
        return f"**{self.builder.config.numfig_format[kind] % number}.** " if number else ""

    def number(self, title):
        """The section's number before its title."""
        numbers = self.builder.env.toc_secnumbers.get(self.docname, {})
        anchors = [f"#{identifier}" for identifier in title.parent.get("ids", [])] if self.level > 1 else [""]
        found = next((numbers[anchor] for anchor in anchors if numbers.get(anchor)), ())
        return f"{'.'.join(map(str, found))}. " if found else ""

    # --- blocks

    def block(self, node):
        """One block as Markdown, without code cells."""
        name = type(node).__name__
        if isinstance(node, nodes.admonition) and "proof" in node.get("classes", []):
            return self.proof(node)
        if name in _ADMONITIONS or isinstance(node, nodes.admonition):
            return self.admonition(node)
        if isinstance(node, nodes.Admonition) and node.get("realtype"):
            return self.theorem(node)
        writer = getattr(self, f"block_{name}", None)
        if writer:
            return writer(node)
        if isinstance(node, nodes.Element):
            return self.joined(node)
        raise ExtensionError(f"{self.docname}: there is no rule that writes {name!r} as Markdown")

    def joined(self, node):
        """The children of `node`: blocks apart from each other, what stands in a line together."""
        parts, line = [], ""
        for child in node.children:
            if isinstance(child, nodes.Inline | nodes.Text):
                line += self.inline_one(child)
                continue
            parts += [line, self.block(child)]
            line = ""
        return "\n\n".join(part for part in (*parts, line) if part.strip())

    def nothing(self, node):
        return ""

    block_comment = block_substitution_definition = block_raw = block_target = block_index = nothing
    block_meta = block_system_message = nothing

    def block_paragraph(self, node):
        return self.inline(node)

    def block_transition(self, node):
        return "---"

    def block_rubric(self, node):
        return f"**{self.inline(node)}**"

    def block_math_block(self, node):
        number = self.counted("displaymath", node)
        tag = f" \\tag{{{number}}}" if number else ""
        body = node.astext().strip()
        if re.search(r"&|\\\\", re.sub(r"(?s)\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", body)):
            body = f"\\begin{{split}}\n{body}\n\\end{{split}}"  # as Sphinx does on the page
        return f"$$\n{body}{tag}\n$$"

    def block_literal_block(self, node):
        language = node.get("language", "")
        text = node.astext().rstrip("\n")
        return f"```{'' if language in ('none', 'default') else language}\n{text}\n```"

    def block_block_quote(self, node):
        return _quote(self.joined(node))

    def _items(self, node, mark):
        lines = []
        for number, item in enumerate(node.children, start=1):
            head = mark(number)
            text = self.joined(item).replace("\n", "\n" + " " * len(head))
            lines.append(head + re.sub(r"(?m)^ +$", "", text))
        return ("\n" if all("\n\n" not in line for line in lines) else "\n\n").join(lines)

    def block_bullet_list(self, node):
        return self._items(node, lambda number: "- ")

    def block_enumerated_list(self, node):
        start = node.get("start", 1)
        return self._items(node, lambda number: f"{start + number - 1}. ")

    def block_definition_list(self, node):
        parts = []
        for item in node.children:
            term = ", ".join(self.inline(child) for child in item.children if isinstance(child, nodes.term))
            body = "\n\n".join(self.joined(child) for child in item.children if isinstance(child, nodes.definition))
            parts.append(f"**{term}**\n\n{body}")
        return "\n\n".join(parts)

    def block_table(self, node):
        rows = [[self.cell(entry) for entry in row.children] for row in node.findall(nodes.row)]
        titles = [title for title in node.children if isinstance(title, nodes.title)]
        caption = [f"{self.caption('table', node)}{self.inline(title)}\n\n" for title in titles]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(rows[0]))
        return "".join(caption) + "\n".join(lines)

    def cell(self, entry):
        return " ".join(self.joined(entry).split()).replace("|", "\\|")

    def block_caption(self, node):
        return f"{self.caption('figure', node.parent)}{self.inline(node)}"

    def block_image(self, node):
        return f"![{node.get('alt', '')}]({address.repository()}/raw/{address.BRANCH}/{node['uri']})"

    def block_citation(self, node):
        _label, *content = node.children
        return f"- {' '.join(self.joined(part) for part in content)}"

    def block_footnote(self, node):
        label, *content = node.children
        return f"[{label.astext()}] {' '.join(self.joined(part) for part in content)}"

    def admonition(self, node):
        title, *content = node.children
        if not isinstance(title, nodes.title):
            content, heading = node.children, type(node).__name__.capitalize()
        else:
            heading = self.inline(title)
        body = "\n\n".join(self.block(child) for child in content)
        if "dropdown" in node.get("classes", []):
            return _fold(heading, body)
        return _quote(f"**{heading}**\n\n{body}")

    def theorem(self, node):
        """A numbered box of sphinx-proof."""
        title, *content = node.children
        number = self.counted(node["countertype"], node)
        heading = f"**{node['realtype'].capitalize()} {number}".rstrip() + "**"
        given = self.inline(title).strip()
        body = "\n\n".join(self.joined(part) for part in content)
        return _quote(f"{heading} {given}".rstrip() + f"\n\n{body}")

    def proof(self, node):
        """A proof, folded where it is folded on the site."""
        body = re.sub(r"\AProof\.\s*", "", self.joined(node)) + "\u2003∎"
        if "dropdown" in node.get("classes", []):
            return _fold("Proof", body)
        return f"**Proof.** {body}"

    # --- lines

    def inline(self, node):
        return "".join(self.inline_one(child) for child in node.children)

    def inline_one(self, node):
        name = type(node).__name__
        if isinstance(node, nodes.Text):
            # a star, an underscore or a bracket of the text is not Markdown's or HTML's
            return re.sub(r"([*_$`\\]|<(?=[a-zA-Z/!]))", r"\\\1", node.astext())
        if isinstance(node, nodes.math):
            formula = node.astext()
            if _inside(node, nodes.entry):  # a bar would end the table's cell
                formula = formula.replace("\\|", "\\Vert ").replace("|", "\\vert ")
            return f"${formula.strip()}$"
        if isinstance(node, nodes.literal):
            return f"`{node.astext()}`"
        if isinstance(node, nodes.reference):
            return self.reference(node)
        if isinstance(node, nodes.footnote_reference):
            return f"[{node.astext()}]"
        if isinstance(node, nodes.image):
            return self.block_image(node)
        if isinstance(node, nodes.raw | nodes.target | nodes.problematic | addnodes.index):
            return "" if isinstance(node, nodes.raw) else self.inline(node)
        mark = _NAMES.get(name, "")
        return f"{mark}{self.inline(node)}{mark}"

    def reference(self, node):
        """Links on the same page become their text; links to other pages lead to the published site."""
        text = self.inline(node)
        uri = node.get("refuri", "")
        page, _, anchor = uri.partition("#")
        if not uri or page == f"{self.docname}.html" or (not page and anchor):
            return text
        return f"[{text}]({uri if '://' in uri or uri.startswith('mailto:') else address.site() + uri})"


def _inside(node, kind):
    return node is not None and (isinstance(node, kind) or _inside(node.parent, kind))


def _fold(heading, body):
    """Fold what is folded on the site."""
    return f"<details><summary><b>{heading}</b> (open to read)</summary>\n\n{body}\n\n</details>"


def _quote(text):
    """Set a box apart.  A formula on several lines would show the marks, so it is put on one line first."""
    text = re.sub(r"\$\$\n(.*?)\n\$\$", lambda m: "$$ " + " ".join(m[1].split()) + " $$", text, flags=re.DOTALL)
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


_MIMES = ("image/png", "text/html", "text/markdown", "text/latex", "text/plain")


def _configure(app, config):
    """Tell myst-nb which form of an output this builder would take (it shows none, but counts the figures)."""
    chosen = [("cells", mime, rank) for rank, mime in enumerate(_MIMES)]
    config.nb_mime_priority_overrides = [*config.nb_mime_priority_overrides, *chosen]


def setup(app):
    app.add_builder(CellsBuilder)
    app.connect("config-inited", _configure)
