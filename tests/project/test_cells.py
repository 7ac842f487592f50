"""The builder `cells` writes each construct of a lesson as plain Markdown, with the site's own numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from course import address
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("cells")]
SETTINGS = f"""\
import sys, yaml
sys.path.insert(0, {str(address.ROOT / "book" / "_ext")!r})
with open({str(address.ROOT / "_config.yml")!r}, encoding="utf8") as file:
    book = yaml.safe_load(file)
globals().update(book["sphinx"]["config"])
extensions = ["myst_nb", "sphinx_proof", "sphinx_exercise", "sphinx_togglebutton", "sphinxcontrib.bibtex",
              "sphinx_external_toc", "course.cells", "course.repairs"]
external_toc_path = "_toc.yml"
myst_enable_extensions = book["parse"]["myst_enable_extensions"]
bibtex_bibfiles = ["references.bib"]
nb_execution_mode = "off"
html_static_path = html_css_files = html_js_files = []
"""
CONTENTS = """\
root: index
subtrees:
  - numbered: 1
    entries:
      - file: lessons/01-constructs
        subtrees: [{entries: [{file: lessons/01a-appendix}]}]
      - file: lessons/02-outputs
"""
REFERENCES = "@article{gauss, author = {Gauss, Carl}, title = {On Squares}, journal = {Annals}, year = {1809}}"
HEADER = """\
---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""

# what stands in the lesson, and the cells that become of it; numbers are those of the whole page
CONSTRUCTS: dict[str, tuple[str, list]] = {
    "inline": (
        r"Plain, *thin*, **fat**, *thin and **fat***, `code * x`, $a_1 < b$, 3 \* 4, a_b, x \<y, \$5, <b>bare</b>.",
        [r"Plain, *thin*, **fat**, *thin and **fat***, `code * x`, $a_1 < b$, 3 \* 4, a\_b, x \<y, \$5, bare."],
    ),
    "links": (
        "(here)=\n[Out](https://example.org/a), <mailto:a@example.org>, [this page](#here), {doc}`02-outputs`.",
        [
            "[Out](https://example.org/a), [mailto:a@example.org](mailto:a@example.org), this page, "
            f"[Outputs]({address.site()}lessons/02-outputs.html)."
        ],
    ),
    "equations": (
        "```{math}\n:label: lines\na &= b \\\\\nc &= d\n```\n\nSee {eq}`lines`.\n\n"
        "$$\\begin{cases} a & b \\\\ c & d \\end{cases}$$",
        [
            "$$\n\\begin{split}\na &= b \\\\\nc &= d\n\\end{split} \\tag{1.1}\n$$\n\nSee (1.1).\n\n"
            "$$\n\\begin{cases} a & b \\\\ c & d \\end{cases}\n$$"
        ],
    ),
    "lists": (
        "- first\n- second\n  - inner\n\nBetween.\n\n3. three\n\n   $$\n   x\n   $$\n4. four\n\nTerm\n: its *meaning*",
        [
            "- first\n\n- second\n\n  - inner\n\nBetween.\n\n3. three\n\n   $$\n   x\n   $$\n\n4. four\n\n"
            "**Term**\n\nits *meaning*"
        ],
    ),
    "quotation": ("> Two\n> lines", ["> Two\n> lines"]),
    "code that does not run": (
        "```python\nx = 1\n\ny = 2\n```\n\n```\nbare\n```",
        ["```python\nx = 1\n\ny = 2\n```\n\n```\nbare\n```"],
    ),
    "table": (
        "```{table} A caption\n:name: tab\n\n| *a **b*** | c |\n|---|---|\n"
        "| **x *y*** | `p\\|q`, $\\|z\\| = 2\\|w\\|$ |\n```\n\nSee {numref}`tab`.",
        [
            "**Table 1.1.** A caption\n\n| *a **b*** | c |\n| --- | --- |\n"
            "| **x *y*** | `p\\|q`, $\\vert z\\vert = 2\\vert w\\vert$ |\n\nSee Table 1.1."
        ],
    ),
    "figure": (
        "```{figure} plot.png\n:alt: A line rises.\n:name: fig-line\n\nA **line**.\n```\n\nSee {numref}`fig-line`.",
        [
            f"![A line rises.]({address.repository()}/raw/main/lessons/plot.png)\n\n"
            "**Fig. 1.1.** A **line**.\n\nSee Fig. 1.1."
        ],
    ),
    "theorem": (
        "Before.\n\n```{prf:theorem} Of Gauss\n:label: squares\n\nFor all $n$:\n\n$$\nn^2 \\ge 0\n$$\n```\n\n"
        "```{prf:lemma}\n:label: small\n\nText.\n```\n\nBy {prf:ref}`squares`.",
        [
            "Before.",
            "> **Theorem 1.1** (Of Gauss)\n>\n> For all $n$:\n>\n> $$ n^2 \\ge 0 $$",
            "> **Lemma 1.1**\n>\n> Text.",
            "By Theorem 1.1.",
        ],
    ),
    "proof": (
        "````{prf:proof}\n:class: dropdown\n\nClear, since\n\n```{math}\n:label: square\nn^2 = n n\n```\n````\n\n"
        "```{prf:proof}\nShort.\n```\n\nAfter {eq}`square`.",
        [
            "<details><summary><b>Proof</b> (open to read)</summary>\n\nClear, since\n\n"
            "$$\nn^2 = n n \\tag{1.2}\n$$\u2003∎\n\n</details>",
            "**Proof.** Short.\u2003∎",
            "After (1.2).",
        ],
    ),
    "exercise": (
        "```{exercise} Try\n:label: try\n\nDo it.\n```\n\n````{solution-start} try\n:class: dropdown\n````\n\n"
        "Done:\n\n```{code-cell} ipython3\n6 * 7\n```\n\n````{solution-end}\n````\n\nAfter {ref}`try`.",
        [
            "### Exercise 1.1 (Try)\n\nDo it.",
            ["#### Solution to Exercise 1.1 (Try)", ["solution"]],
            "Done:",
            ["code"],
            "After Exercise 1.1.",
        ],
    ),
    "admonition": (
        "```{note}\nCareful.\n```\n\n```{admonition} Folded\n:class: dropdown\n\n*Inside*.\n```\n\n"
        "```{admonition} Seen\nOpen.\n```",
        [
            "> **Note**\n>\n> Careful.\n\n<details><summary><b>Folded</b> (open to read)</summary>\n\n*Inside*."
            "\n\n</details>\n\n> **Seen**\n>\n> Open."
        ],
    ),
    "aside": ("% a comment\n\n```{rubric} Aside\n```\n\n***\n\nShown.", ["**Aside**\n\n---\n\nShown."]),
    "citation": (
        "As {cite}`gauss` and {cite:t}`gauss` say[^foot].\n\n[^foot]: At the foot.\n\n"
        "```{bibliography}\n:filter: docname in docnames\n```",
        [
            "As [Gauss, 1809] and Gauss [1809] say[1].\n\n- Carl Gauss. On squares. *Annals*, 1809.\n\n---\n\n"
            "[1] At the foot."
        ],
    ),
}
APPENDIX = """\
# Appendix

```{prf:lemma}
:label: next-lemma

Text.
```

```{math}
:label: next-equation
z
```

{prf:ref}`next-lemma`, {eq}`next-equation`, {eq}`lines`
"""


def _notebook() -> nbformat.NotebookNode:
    picture = (address.ROOT / "book" / "_static" / "home.png").read_bytes()
    figure = {"figure": {"caption": "A *line*.", "name": "fig-cell"}, "image": {"alt": "A line."}}
    outputs = [
        new_output("stream", text="42\n"),
        new_output("display_data", {"image/png": picture.hex(), "text/plain": "<Figure>"}),
    ]
    cells = [
        new_markdown_cell("# Outputs"),
        new_code_cell("6 * 7", outputs=outputs, execution_count=1, metadata={"mystnb": figure}),
        new_markdown_cell("After {numref}`fig-cell`."),
    ]
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return new_notebook(cells=cells, metadata=metadata)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What the builder makes of a page with each construct, an appendix and a page with outputs."""
    source = tmp_path_factory.mktemp("constructs")
    lessons = source / "lessons"
    lessons.mkdir()
    text = "\n\n".join(f"## {name}\n\n{written}" for name, (written, _) in CONSTRUCTS.items())
    (lessons / "01-constructs.md").write_text(f"{HEADER}# Constructs\n\n{text}\n", encoding="utf8")
    (lessons / "01a-appendix.md").write_text(HEADER + APPENDIX, encoding="utf8")
    nbformat.write(_notebook(), lessons / "02-outputs.ipynb")
    shutil.copy(address.ROOT / "book" / "_static" / "home.png", lessons / "plot.png")
    for name, content in (("conf.py", SETTINGS), ("_toc.yml", CONTENTS), ("references.bib", REFERENCES)):
        (source / name).write_text(content, encoding="utf8")
    (source / "index.md").write_text("# Index\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "cells", source, source / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "out"


def _cells(built: Path, page: str) -> list[list]:
    return json.loads((built / "lessons" / f"{page}.json").read_text(encoding="utf8"))


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_a_construct_becomes_plain_markdown(built, construct):
    """The cells between a construct's heading and the next."""
    title, *cells = _cells(built, "01-constructs")
    assert title == ["markdown", "# 1. Constructs", []]
    found: list[tuple[str, list]] = []
    for kind, content, *tags in cells:
        if kind == "markdown" and content.startswith("## "):
            heading, _, content = content.removeprefix("## ").partition("\n\n")
            found.append((heading, []))
        shown = content if kind == "markdown" else [kind]
        if shown:
            found[-1][1].append([shown, *tags] if tags not in ([], [[]]) else shown)
    assert [name for name, _ in found] == list(CONSTRUCTS)
    assert dict(found)[construct] == CONSTRUCTS[construct][1]


def test_an_appendix_goes_on_with_the_numbers_of_its_lesson(built):
    cells = [text for _, text, _ in _cells(built, "01a-appendix")]
    elsewhere = f"[(1.1)]({address.site()}lessons/01-constructs.html#equation-lines)"
    assert cells[1:] == ["> **Lemma 1.2**\n>\n> Text.", f"$$\nz \\tag{{1.3}}\n$$\n\nLemma 1.2, (1.3), {elsewhere}"]


def test_only_the_picture_of_a_cell_is_its_figure(built):
    """myst-nb would frame the printed line, too, and the caption would come twice."""
    assert _cells(built, "02-outputs") == [
        ["markdown", "# 2. Outputs", []],
        ["code", 1],
        ["markdown", "**Fig. 2.1.** A *line*.", []],
        ["markdown", "After Fig. 2.1.", []],
    ]
    assert json.loads((built / ".doctrees" / "repairs.json").read_text())["figures on every output"] == 1
