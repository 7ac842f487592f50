"""Take the records of ``companion/lab/stored`` anew: python book/_tools/take_records.py [NAME ...].

Each takes minutes; they are what a lesson shows and does not wait for.  On a GPU: --device cuda.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from companion import minimum_norm
from companion.lab import records

STORED = Path(__file__).resolve().parents[2] / "companion" / "lab" / "stored"


def digits(values: torch.Tensor, n: int = 5) -> list:
    """Numbers with `n` significant digits: what a curve needs."""
    return [digits(v, n) if v.ndim else float(f"{float(v):.{n}g}") for v in values]


def minimum_norm_figure_1(device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figure of lesson 4's paper at its own widths, with the prediction of its constant.

    ``predicted`` holds ``C^2`` for each of the five first residuals of the widest network: ``V_perp ~ C^2 / sqrt(m)``.
    """
    widths, steps, every = [1000, 2000, 5000, 10_000], 10_000, 100
    settings = {"seed": 11, "widths": widths, "S": 5, "kappa": 1.0, "steps": steps, "every": every, "draws": 1000}
    runs, predicted = [], []
    for bias, step in itertools.product((False, True), (0.02, 2e-4)):
        X, y = (t.to(device) for t in minimum_norm.figure_1_data(settings["seed"], bias=bias))
        for m in widths:
            generator = torch.Generator().manual_seed(m)
            W, signs = minimum_norm.initialize(X.shape[1], m, S=5, antisymmetric=False, generator=generator)
            W, signs = W.to(device), signs.to(device)
            run = minimum_norm.train(X, y, W, signs, step, steps, every=every)
            found = {"bias": bias, "step": step, "m": m, "steps": run.steps.tolist()}
            found |= {name: digits(run.observed[name]) for name in ("V_perp", "V_parallel")}
            runs.append(found | {"residual": digits(run.residual)})
        first = y - minimum_norm.forward(X, W, signs)
        found = [minimum_norm.perp_constant(X, e, step, steps=steps, draws=settings["draws"]) for e in first]
        predicted.append(
            {"bias": bias, "step": step, "C2": [c.value for c in found], "error": [c.error for c in found]}
        )
    return {"runs": runs, "predicted": predicted}, settings


RECORDS: dict[str, Callable[[str], tuple[dict[str, Any], dict[str, Any]]]] = {
    "minimum-norm-figure-1": minimum_norm_figure_1
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(RECORDS)}; all if none is given")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: threads would wait for each other
    for name in arguments.names or RECORDS:
        if name not in RECORDS:
            parser.error(f"{name} is no record; there are {', '.join(RECORDS)}")
        results, settings = RECORDS[name](arguments.device)
        print(records.write(STORED / f"{name}.json", results, settings=settings, device=arguments.device))


if __name__ == "__main__":
    main()
