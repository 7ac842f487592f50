"""Does a test notice when a term of a bound is dropped?  make mutants, or python tests/mutants.py [MODULE ...].

cosmic-ray changes one operator, comparison, number or condition of a module that proves something, and the module's own
test file must fail.  A random sample of each module is tried (the seed is printed), in a copy of the project; results
are kept in _build/mutants, so that a stopped run goes on.  The survivors are listed: each is a missing test, or
equivalent to the original for a reason that tests/equivalent_mutants.json states (module, changed line, reason).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "_build" / "mutants"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
PROVING = (
    "rigor/rounding", "rigor/linear_algebra", "rigor/balls", "rigor/rationals", "rigor/intervals", "rigor/elementary",
    "rigor/formulas", "rigor/modules", "width_bounds/fixed_points", "width_bounds/certificates", "mean_field/coupling",
    "mean_field/jacobian", "mean_field/enclosures", "mean_field/certificates", "beyond_ntk/expressivity",
    "beyond_ntk/certificates", "beyond_ntk/bounds", "minimum_norm/gates", "minimum_norm/certificates",
    "minimum_norm/kernel_limit", "basins/certificates", "basins/critical_points", "basins/exact", "basins/roads",
)  # fmt: skip
# an exception's class, a decorator and a variable's value are no terms of a bound
_LEFT_OUT = ("Exception", "Variable", "RemoveDecorator")


class Mutant(NamedTuple):
    """One change: an operator of cosmic-ray, the how-manieth place in the file, and the line for a reader."""

    operator: str
    occurrence: int
    line: int
    column: int


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a module, but for those in annotations, which are not computed with."""
    tree = get_ast(source)
    skipped = list(_annotations(ast.parse(source)))
    for name in cosmic_ray.plugins.operator_names():
        operator = cosmic_ray.plugins.get_operator(name)
        if operator.arguments() or name.split("/")[1].startswith(_LEFT_OUT):
            continue
        places = [start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node)]
        for occurrence, (line, column) in enumerate(places):
            if not any(begin <= (line, column) < end for begin, end in skipped):
                yield Mutant(name, occurrence, line, column)


def _annotations(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def sample(source: str, count: int | None, seed: int) -> list[Mutant]:
    """One mutant at each of `count` random places; all mutants for None."""
    found = list(mutants(source))
    if count is None:
        return found
    chance = random.Random(seed)
    places: dict[tuple[int, int], list[Mutant]] = {}
    for mutant in found:
        places.setdefault((mutant.line, mutant.column), []).append(mutant)
    chosen = chance.sample(sorted(places), min(count, len(places)))
    return [chance.choice(places[place]) for place in chosen]


def changed_line(source: str, mutated: str, line: int) -> str:
    """The line as it was and as it is."""
    before, after = source.split("\n"), mutated.split("\n")
    place = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), line - 1)
    return f"{before[place].strip()}  ->  {after[place].strip()}"


class Trial:
    """A copy of the project in which one module after the other is changed and tested."""

    def __init__(self) -> None:
        self.copy = FOLDER / "tree"
        shutil.rmtree(self.copy, ignore_errors=True)
        for part in ("companion", "tests", "book", "pyproject.toml"):
            source, target = ROOT / part, self.copy / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "_static", "*.ipynb"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)

    def dies(self, module: str, text: str, limit: float) -> tuple[bool, float]:
        """Whether the module's own tests fail with this text in its place, and the seconds they took."""
        path = self.copy / "companion" / f"{module}.py"
        original = path.read_text(encoding="utf8")
        environment = os.environ | {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(self.copy),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(tests_of(module))]
        begin = time.monotonic()
        try:
            path.write_text(text, encoding="utf8")
            done = subprocess.run(command, cwd=self.copy, env=environment, capture_output=True, timeout=limit)
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            failed = True
        finally:
            path.write_text(original, encoding="utf8")
        return failed, time.monotonic() - begin


def tests_of(module: str) -> Path:
    """The module's own test file, below the project."""
    wing, name = module.split("/")
    return Path("tests") / wing / f"test_{name}.py"


def try_module(trial: Trial, module: str, count: int | None, seed: int) -> dict[str, Any]:
    """Try a module's sample, going on from what is stored; return its record."""
    source = (ROOT / "companion" / f"{module}.py").read_text(encoding="utf8")
    tests = (ROOT / tests_of(module)).read_text(encoding="utf8")
    known = json.loads(EQUIVALENT.read_text(encoding="utf8")).get(module, {}) if EQUIVALENT.exists() else {}
    digest = hashlib.sha256(f"{source}\0{tests}".encode()).hexdigest()[:12]
    store = FOLDER / f"{module.replace('/', '.')}-{digest}.json"
    record = json.loads(store.read_text(encoding="utf8")) if store.exists() else {"tried": {}}
    clean, seconds = trial.dies(module, source, 1800)
    if clean:
        raise SystemExit(f"{tests_of(module)} fails without any change; nothing can be learnt from it")
    for mutant in sample(source, count, seed):
        key = f"{mutant.operator.split('/')[1]}:{mutant.line}:{mutant.column}:{mutant.occurrence}"
        if key in record["tried"]:
            continue
        mutated = mutate_code(source, cosmic_ray.plugins.get_operator(mutant.operator)(), mutant.occurrence)
        dead, _ = trial.dies(module, mutated, 3 * seconds + 20)
        record["tried"][key] = "" if dead else changed_line(source, mutated, mutant.line)
        store.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf8")
        print("." if dead else "S", end="", flush=True)
    alive = {key: line for key, line in record["tried"].items() if line}
    equivalent = {key: known[line] for key, line in alive.items() if line in known}
    return {"tried": len(record["tried"]), "alive": alive, "equivalent": equivalent, "seconds": seconds}


def main() -> int:
    """Try the modules; 1 if fewer than nine of ten mutants of one die or are known to be equivalent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(PROVING)}; all by default")
    parser.add_argument("--count", type=int, default=40, help="mutants a module")
    parser.add_argument("--all", action="store_true", help="every mutant: a long night")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    unknown = set(options.modules) - set(PROVING)
    if unknown:
        parser.error(f"MODULE is {', '.join(sorted(unknown))}; of {', '.join(PROVING)} is needed")
    seed = random.randrange(10**6) if options.seed is None else options.seed
    FOLDER.mkdir(parents=True, exist_ok=True)
    trial, weak = Trial(), []
    print(f"seed {seed}")
    for module in options.modules or PROVING:
        print(f"{module:28}", end=" ", flush=True)
        found = try_module(trial, module, None if options.all else options.count, seed)
        unexplained = len(found["alive"]) - len(found["equivalent"])
        print(
            f"  {found['tried'] - len(found['alive'])} of {found['tried']} die, {len(found['equivalent'])} equivalent"
        )
        for key, line in found["alive"].items():
            print(f"    {'=' if key in found['equivalent'] else 'S'} {key}: {line}")
        if unexplained > 0.1 * found["tried"]:
            weak.append(module)
    print(f"too weak: {', '.join(weak)}" if weak else "at least nine of ten die in every module")
    return 1 if weak else 0


if __name__ == "__main__":
    raise SystemExit(main())
