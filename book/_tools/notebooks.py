"""From the lessons' texts to their notebooks.

    python book/_tools/notebooks.py run [NAME]       run a lesson (or all), rehearse it, and write its notebook
    python book/_tools/notebooks.py rehearse [NAME]  only rehearse: does it print the same when rounding is moved?
    python book/_tools/notebooks.py text [NAME]      write the notebook anew with the outputs that it has
    python book/_tools/notebooks.py check [NAME]     say whether text and notebook belong together

`lessons/NAME.md` is the source.  The notebook holds the same code cells, one install cell before them, the outputs of
one run, and the text as plain Markdown with the site's own numbers.  `check` ignores the outputs' contents (nbval
compares those) but not that there are none, an error among them, or anything on stderr.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_ext"))

import rehearsal
from course import address, lessons
from execution import Broken, run_cells

BUILD = address.ROOT / "_build"


# --- running


def execute(name: str) -> list:
    """Run a lesson's code cells, after the install cell, in an empty folder; return them with their outputs."""
    cells = run_cells(sources(name), f"lessons/{name}.md")
    for cell in cells:
        _refuse_noise(name, cell)
        cell.metadata = nbformat.NotebookNode()
    return cells


def sources(name: str) -> list[str]:
    """What a lesson's notebook runs: the install cell and the text's code cells."""
    return [lessons.install_cell(), *(cell.source for cell in lessons.code(lessons.read_text(name)))]


def _refuse_noise(name: str, cell) -> None:
    for output in cell.outputs:
        if output.output_type == "error":
            raise Broken(f"lessons/{name}: a cell's stored output is an error: {output.ename}: {output.evalue}")
        if output.output_type == "stream" and output.name == "stderr":
            raise Broken(f"lessons/{name}: a cell writes to stderr ({output.text.strip()[:200]!r}); silence it")


# --- writing


def markdown(names: list[str], outputs: dict[str, list]) -> dict[str, list]:
    """The cells of the lessons as the site's own builder writes them.

    The outputs are needed too: a figure has a number only when it is there.
    """
    from jupyter_book.sphinx import build_sphinx

    folder = BUILD / "cells"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = {
        "external_toc_path": str(address.ROOT / "book" / "_toc.yml"),
        "latex_individualpages": False,
        "course_executed": outputs,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        status = build_sphinx(
            str(address.ROOT),
            str(folder / "out"),
            path_config=str(address.ROOT / "_config.yml"),
            confoverrides=overrides,
            doctreedir=str(folder / "doctrees"),
            builder="cells",
            warningiserror=True,
            keep_going=True,
            noconfig=True,
            freshenv=True,
        )
    if status:
        raise Broken(f"the lessons' text could not be converted: {status}")
    read = {name: folder / "out" / "lessons" / f"{name}.json" for name in names}
    for name, path in read.items():
        if not path.exists():
            raise Broken(f"lessons/{name}.md is not in book/_toc.yml")
    return {name: json.loads(path.read_text(encoding="utf8")) for name, path in read.items()}


def heading(name: str, title: str) -> str:
    """The first cell of a notebook: its title, where it can be run, and where it is read best."""
    page = f"{address.site()}lessons/{name}.html"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return (
        f"{title}\n\n[![Open in Colab]({image})]({address.colab(name)})\n\n"
        f"A lesson of the course *Wide Enough*; [the same page on the website]({page})."
    )


def assemble(name: str, written: list, executed: list) -> nbformat.NotebookNode:
    """Put the notebook together: title and badge, install cell, then the lesson's cells in its own order."""
    source = lessons.read_text(name)
    code_indices = [i for i, cell in enumerate(source.cells) if cell.cell_type == "code"]
    outputs = dict(zip(code_indices, executed[1:], strict=True))
    title, _, introduction = written[0][1].partition("\n")
    written = [["markdown", introduction.strip()], *written[1:]] if introduction.strip() else written[1:]
    cells = [nbformat.v4.new_markdown_cell(heading(name, title)), executed[0]]
    waiting, solutions = list(code_indices), []
    for kind, content, *rest in written:
        if kind == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(content))
            if rest and "solution" in rest[0]:
                cells[-1].metadata["jp-MarkdownHeadingCollapsed"] = True
                solutions.append(cells[-1])
            continue
        while waiting and waiting[0] <= content:  # cells that the site does not show keep their place
            cells.append(_code_cell(source.cells[waiting[0]], outputs[waiting[0]]))
            waiting.pop(0)
    cells += [_code_cell(source.cells[i], outputs[i]) for i in waiting]
    _name_cells(name, cells)
    metadata = nbformat.from_dict(lessons.METADATA)
    if solutions:
        metadata["colab"]["collapsed_sections"] = [cell["id"] for cell in solutions]
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def _code_cell(source, executed):
    cell = nbformat.v4.new_code_cell(source.source, outputs=executed.outputs, execution_count=executed.execution_count)
    tags = [str(tag) for tag in source.metadata.get("tags", [])]
    if tags:
        cell.metadata["tags"] = tags
    if any(tag in tags for tag in ("hide-input", "hide-cell", "remove-input", "remove-cell")):
        cell.metadata["jupyter"] = {"source_hidden": True}
    return cell


def _name_cells(name: str, cells: list) -> None:
    """Give every cell a name that depends on its text only, so that a run changes no names."""
    seen: dict[str, int] = {}
    for cell in cells:
        seen[cell.source] = seen.get(cell.source, 0) + 1
        parts = name, cell.source, str(seen[cell.source])
        cell["id"] = hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:12]


def write(name: str, notebook: nbformat.NotebookNode) -> None:
    """Write the notebook all at once, so that an interrupted run leaves the old one."""
    nbformat.validate(notebook)
    path = lessons.notebook_path(name)
    temporary = path.with_suffix(".ipynb.new")
    temporary.write_text(nbformat.writes(notebook, version=4).rstrip("\n") + "\n", encoding="utf8")
    os.replace(temporary, path)


# --- commands


def keep(name: str, cells: list) -> None:
    """Put a finished run aside before anything else can fail: minutes of work are not thrown away."""
    path = BUILD / "runs" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=lessons.METADATA)), encoding="utf8")


def kept(name: str) -> list | None:
    """The last run put aside, if it is newer than the notebook and of the text's code."""
    path, notebook = BUILD / "runs" / f"{name}.ipynb", lessons.notebook_path(name)
    if not path.exists() or (notebook.exists() and notebook.stat().st_mtime > path.stat().st_mtime):
        return None
    cells = lessons.code(nbformat.read(path, as_version=4))
    return cells if [cell.source for cell in cells] == sources(name) else None


def stored(name: str) -> list:
    """The stored code cells of a lesson, install cell first; refuse those of another text."""
    if (cells := kept(name)) is not None:
        return cells
    reason = lessons.stale(name)
    if reason:
        raise Broken(f"{reason}: run `make lessons ONLY={name}`")
    return lessons.code(nbformat.read(lessons.notebook_path(name), as_version=4))


def build(names: list[str], fresh: dict[str, list]) -> dict[str, nbformat.NotebookNode]:
    """The notebooks as they should be, from the texts and the outputs (fresh ones, else stored ones)."""
    executed = {}
    for name in lessons.names():
        try:
            executed[name] = fresh[name] if name in fresh else stored(name)
        except Broken:
            if name in names:
                raise
            # a neighbour that was never run lends its text only: the numbering does not need its outputs
            count = len(lessons.code(lessons.read_text(name))) + 1
            executed[name] = [nbformat.v4.new_code_cell("", execution_count=i + 1) for i in range(count)]
    written = markdown(names, {name: cells[1:] for name, cells in executed.items()})
    return {name: assemble(name, written[name], executed[name]) for name in names}


def run(names: list[str], rehearse: bool = True) -> None:
    """Run lessons and write their notebooks, but for those of which the rehearsal finds that rounding moves a digit."""
    fresh, refused = {}, []
    for name in names:
        print(f"running {name}", flush=True)
        cells = execute(name)
        try:
            if rehearse:
                rehearsal.rehearse({name: cells})
        except Broken as broken:
            refused.append(f"{broken}\nlessons/{name}.ipynb was left as it is.")
            continue
        fresh[name] = cells
        keep(name, cells)
    if fresh:
        text(list(fresh), fresh)
    if refused:
        raise Broken("\n\n".join(refused))


def text(names: list[str], fresh: dict[str, list] | None = None) -> None:
    for name, notebook in build(names, fresh or {}).items():
        write(name, notebook)
        print(f"wrote lessons/{name}.ipynb", flush=True)


def without_outputs(notebook: nbformat.NotebookNode) -> str:
    """A notebook as text, for comparison: everything but what the run printed."""
    notebook = nbformat.from_dict(json.loads(nbformat.writes(notebook, version=4)))
    for cell in lessons.code(notebook):
        cell.outputs = []
    return nbformat.writes(notebook, version=4)


def difference(name: str, wanted: nbformat.NotebookNode) -> str:
    """Where the stored notebook departs from the text; empty when it does not."""
    found = nbformat.read(lessons.notebook_path(name), as_version=4)
    for cell in lessons.code(found):
        _refuse_noise(name, cell)
    counts = [cell.execution_count for cell in lessons.code(found)]
    if counts != list(range(1, len(counts) + 1)):
        return f"lessons/{name}.ipynb was not run from top to bottom (execution counts {counts})"
    if len(counts) > 1 and not any(cell.outputs for cell in lessons.code(found)):
        return f"lessons/{name}.ipynb has no outputs"
    lines = difflib.unified_diff(
        without_outputs(found).splitlines(),
        without_outputs(wanted).splitlines(),
        f"lessons/{name}.ipynb",
        f"lessons/{name}.md",
        lineterm="",
        n=1,
    )
    return "\n".join(re.sub(r"^(.{300}).*", r"\1…", line) for line in lines)


def check(names: list[str]) -> None:
    problems = [d for name, notebook in build(names, {}).items() if (d := difference(name, notebook))]
    if problems:
        raise Broken("\n\n".join(problems) + "\n\nRun `make lessons`, or `make text` if only the text has changed.")
    print(f"{len(names)} notebooks belong to their texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "rehearse", "text", "check"))
    parser.add_argument("--no-rehearsal", action="store_true", help="store a run although rounding was not rehearsed")
    parser.add_argument("name", nargs="?", default="", help="one lesson, e.g. 01-width-bounds")
    arguments = parser.parse_args()
    names = lessons.names(arguments.name)
    if not names:
        print("there are no lessons")
        return
    try:
        if arguments.command == "run":
            run(names, rehearse=not arguments.no_rehearsal)
        elif arguments.command == "rehearse":
            rehearsal.rehearse({name: stored(name) for name in names})
        else:
            {"text": text, "check": check}[arguments.command](names)
    except Broken as broken:
        sys.exit(str(broken))


if __name__ == "__main__":
    main()
