"""A hostile search for a false certificate: make attack, or python -m attack with . and tests on the path.

- `arithmetic`: all bounds of `companion.rigor`, against exact rationals and balls of any precision;
- `certificates`: whole certificates that hold, each against an independent computation of what it promises;
- `calls`: every public function, one argument at a time replaced by something that does not belong there.

A *trial* is one comparison of a companion number with the truth, *told* counts those that said something (a bound that
is positive and finite, a certificate that holds), and *false* those that were false.  Such a case is written to
_build/attack as a JSON file that ``python -m attack --replay FILE`` runs again: its floats are hexadecimal, so that
nothing is rounded.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parents[2] / "_build" / "attack"
Arguments = dict[str, Any]


class Check(NamedTuple):
    """One kind of trial: `draw` makes arguments that JSON can hold, `run` compares what companion says of them."""

    draw: Callable[[np.random.Generator], Arguments | None]
    run: Callable[..., None]


@dataclass
class Tally:
    """What was looked at, by name, and what was false; `wrong` collects the violations of the case that is running."""

    trials: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    false: Counter[str] = field(default_factory=Counter)
    violations: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def see(self, name: str, right: bool, told: bool = True, what: str = "", trials: int = 1) -> None:
        """Count trials of one name; `told` says whether companion claimed anything, `right` whether it was true."""
        self.trials[name] += trials
        self.told[name] += told * trials
        if not right:
            self.false[name] += 1
            self.wrong.append(f"{name} {what}".strip())


def attempt(tally: Tally, part: str, name: str, check: Check, arguments: Arguments) -> list[str]:
    """Run one case; an exception is a violation too, as every case is a valid one. Return what was wrong."""
    tally.wrong = []
    try:
        check.run(tally, **arguments)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
        tally.see(f"{name}: no error", False, what=found)
    if tally.wrong:
        least, wrong = smaller(check, arguments, tally.wrong)
        tally.violations.append({"part": part, "check": name, "wrong": wrong, "arguments": encode(least)})
    return tally.wrong


def smaller(check: Check, arguments: Arguments, wrong: list[str]) -> tuple[Arguments, list[str]]:
    """The case cut down to one entry, where all tensors are vectors of one length and one entry is wrong by itself."""
    lengths = {len(a) if a.ndim == 1 else -1 for a in arguments.values() if isinstance(a, torch.Tensor)}
    if len(lengths) != 1 or lengths == {-1}:
        return arguments, wrong
    for i in range(lengths.pop()):
        one = {k: a[i : i + 1] if isinstance(a, torch.Tensor) else a for k, a in arguments.items()}
        tally = Tally()
        with contextlib.suppress(Exception):
            check.run(tally, **one)
            if tally.wrong:
                return one, tally.wrong
    return arguments, wrong


def search(part: str, checks: dict[str, Check], rng: np.random.Generator, more: Iterator[Any]) -> Tally:
    """Draw and run cases, one check after the other, as long as `more` goes on."""
    tally, names = Tally(), list(checks)
    for i, _ in enumerate(more):
        name = names[i % len(names)]
        arguments = checks[name].draw(rng)
        if arguments is not None:
            attempt(tally, part, name, checks[name], arguments)
    return tally


# --- Cases as JSON ----------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Turn arguments into JSON, floats by their bits."""
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": kind, "shape": list(value.shape), "numbers": encode(value.flatten().tolist())}
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    return {"float": value.hex()} if isinstance(value, float) else value


def decode(value: Any) -> Any:
    """The inverse of `encode` (tuples come back as lists)."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float.fromhex(value["float"])
    if "tensor" in value:
        return torch.tensor(decode(value["numbers"]), dtype=getattr(torch, value["tensor"])).reshape(value["shape"])
    return {k: decode(v) for k, v in value.items()}


def write(violations: list[dict[str, Any]], label: str) -> list[Path]:
    """Write each violation to a file of its own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, case in enumerate(violations):
        paths.append(FOLDER / f"{case['part']}-{case['check']}-{label}-{i}.json")
        paths[-1].write_text(json.dumps(case, indent=1) + "\n", encoding="utf-8")
    return paths


# --- Settings that must not matter ------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(flush: bool = False, dtype: str = "float32") -> Iterator[None]:
    """Take subnormal numbers for zero, and change the default dtype, as a reader's program might have done."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_default_dtype(before)
