"""The rounding rehearsal: does a lesson print the same on a processor that rounds otherwise?

Each lesson's code runs as `notebooks.py run` runs it, once for each seed, with the last bits of PyTorch's results moved
(`rounding.py`). What it prints is compared, character by character, with the stored outputs: streams, text, Markdown,
HTML and JSON, not pictures. A cell that prints something else holds a digit of rounding noise; it is named, and the
run is refused. Say less there, or measure better. This does not replace nbval, which compares on the real processor.
"""

import configparser
import difflib
import itertools
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_ext"))

from course import address
from execution import Broken, run_at_once

SEEDS = (1, 2)
LINES, WIDTH = 24, 160  # of a difference that is shown
_START = "__import__('rounding').install({})"
_END = "__import__('rounding').report()"


def printed(cell) -> list[str]:
    """The lines that a cell puts out, pictures left out and what `make test` does not compare replaced."""
    lines, stream = [], ""
    for output in [*cell.outputs, None]:
        if output is not None and output.output_type == "stream":
            stream += output.text  # how a stream is cut into pieces is chance
            continue
        lines += stream.splitlines()
        stream = ""
        if output is None:
            break
        if output.output_type == "error":
            lines.append(f"{output.ename}: {output.evalue}")
            continue
        for kind in sorted(output.data):
            content = output.data[kind]
            if kind.startswith("image/"):
                continue
            if not isinstance(content, str):
                content = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
            lines += content.splitlines()
    return sanitized("\n".join(lines)).splitlines()


def sanitized(text: str) -> str:
    """`text` with the replacements that nbval makes."""
    rules = configparser.RawConfigParser()
    rules.read(address.ROOT / "tests" / "nbval_sanitize.cfg", encoding="utf8")
    for name in rules.sections():
        text = re.sub(rules[name]["regex"], rules[name]["replace"], text)
    return text


def difference(before: list[str], after: list[str]) -> list[str]:
    """The lines that differ, `before` marked with - and `after` with +, long ones around the first difference."""
    lines = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for one, two in itertools.zip_longest(before[i:j], after[k:m]) if tag != "equal" else ():
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one or "", two or "", strict=False))
            start = max(0, sum(1 for _ in same) - WIDTH // 2)
            lines += [
                f"    {mark} {line[start : start + WIDTH]}"
                for mark, line in (("-", one), ("+", two))
                if line is not None
            ]
    return lines if len(lines) <= LINES else [*lines[:LINES], f"    ... and {len(lines) - LINES} lines more"]


def moved(name: str, stored: list, again: list, seed: int) -> list[str]:
    """One message for each cell of `again` that printed something else than in `stored`."""
    messages = []
    for number, (before, after) in enumerate(zip(stored, again, strict=True)):
        if lines := difference(printed(before), printed(after)):
            first = before.source.strip().splitlines()[0]
            messages.append("\n".join([f"{name}, code cell {number}, {first!r}, seed {seed}:", *lines]))
    return messages


def run_moved(name: str, sources: list[str], seeds: tuple[int, ...]) -> list[list]:
    """Run the cells with the noise of every seed; going on after an error shows all cells that rounding can move."""
    notebooks = [[_START.format(seed), *sources, _END] for seed in seeds]
    runs = []
    for first, *cells, last in run_at_once(notebooks, name, Path(__file__).parent):
        if first.outputs or not last.outputs or not int(last.outputs[0].text):
            raise Broken(f"{name}: the noise moved nothing: {first.outputs} {last.outputs}")
        runs.append(cells)
    return runs


def rehearse(outputs: dict[str, list], seeds: tuple[int, ...] = SEEDS) -> None:
    """Run the lessons again, all seeds at once; refuse what prints otherwise than the cells in `outputs`."""
    messages = []
    for name, stored in outputs.items():
        started, path = time.monotonic(), f"lessons/{name}.md"
        runs = run_moved(path, [cell.source for cell in stored], seeds)
        found = [m for seed, again in zip(seeds, runs, strict=True) for m in moved(path, stored, again, seed)]
        took = time.monotonic() - started
        print(f"rehearsed {name}: {len(seeds)} seeds, {took:.0f} s, {len(found)} outputs moved", flush=True)
        messages += found
    if messages:
        raise Broken("\n\n".join(messages) + "\n\nThese outputs hold digits that rounding can move.")
