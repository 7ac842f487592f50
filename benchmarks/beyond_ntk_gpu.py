"""Lesson 3 at full size: 60,000 images, a BN-ResNet with a layer wider than that, the base and the two-phase algorithm.

    python benchmarks/beyond_ntk_gpu.py --idx FOLDER           # MNIST or its kin; an hour on one large GPU
    python benchmarks/beyond_ntk_gpu.py --idx FOLDER --quick   # 300 of its images; without --idx scikit-learn's digits

The base algorithm trains all layers with momentum SGD for 16 epochs. The two-phase algorithm does the same for 10, adds
a little noise, and takes as many further steps on the last layer alone. Both start from the same initial values and
take equally many steps, as in the paper; but a step of Nesterov's method uses all data, one of the base a mini-batch,
so with it the two-phase algorithm goes over the data far more often (at full size 2,814 passes in place of 6). Its step
is ``1 / L_H``; momentum SGD as phase 2 goes on with the base's step and batches for 6 passes. Noise and phase 2 are
chosen with the first seed on 10,000 training images held out for it; then all 60,000 train, with every seed, and the
test images are touched once. Recorded:

- expressivity: certified in float64 on the CPU, at the initial values and after phase 1;
- the loss that each algorithm ends with, enclosed in exact real arithmetic, and so the gap to the global minimum;
- test errors, and how long everything took.

Phase 2 runs in float64: the features ``M``, 60,000 x 61,441 numbers, take 29.5 GB. The certificates run on the CPU,
minutes each. The record is written to ``companion/lab/stored``, from where lesson 3 reads it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness as harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import beyond_ntk as by
from companion import data, networks

FULL = {"side": 14, "channels": [16, 16, 32], "wide": 61_440, "train": 60_000, "validation": 10_000, "epochs": 16,
        "tau": 10, "batch": 128, "seeds": 3, "momentum": 0.9, "beta": 10.0}  # fmt: skip
QUICK = FULL | {"side": 8, "channels": [4, 4, 8], "wide": 320, "train": 300, "validation": 60, "epochs": 4, "tau": 2,
                "batch": 32, "seeds": 2}  # fmt: skip
NOISE = [None, 1e-4, 1e-3, 1e-2]
PHASE2 = ["nesterov", "momentum_sgd"]
Split = tuple[Tensor, Tensor, Tensor, Tensor]


# --- Data and network -------------------------------------------------------------------------------------------------


def images(folder: str | None, s: dict[str, Any], device: str) -> tuple[Split, str]:
    """Training and test images as rows of float32 pixels, pooled to `side`, and the name of the data."""
    if folder is None:
        found = data.digits(n=s["train"], test=200, centre=False, normalize=False,
                            generator=torch.Generator().manual_seed(0))  # fmt: skip
        parts, name = (found.X, found.labels, found.X_test, found.labels_test), "digits"
    else:
        parts, name = data.load_idx(folder), Path(folder).name
    X, y, X_test, y_test = parts
    if len(X) < s["train"]:
        raise SystemExit(f"{name} has {len(X)} training images; {s['train']} are needed")
    side = int(X.shape[1] ** 0.5)

    def pool(rows: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(rows.reshape(-1, 1, side, side), s["side"])
        return small.flatten(1).float().to(device)

    split = pool(X[: s["train"]]), y[: s["train"]].to(device), pool(X_test), y_test.to(device)
    return split, name


def network(s: dict[str, Any], seed: int, device: str) -> nn.Sequential:
    """The ResNet at its initial values, float32."""
    return by.conv_resnet(
        (1, s["side"], s["side"]),
        s["channels"],
        s["wide"],
        10,
        activation=lambda: networks.Softplus(s["beta"]),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float32,
        device=device,
    )


def step_size(model: nn.Sequential, X: Tensor) -> float:
    """``1 / L_H`` of the last layer at the initial values, the step of both algorithms: a rule, not tuned."""
    h = by.last_layer_features(model, model.last, X[:2000])
    return 1 / float(by.curvature(by.with_constant(h), "cross_entropy"))


def error(model: nn.Module, X: Tensor, y: Tensor) -> float:
    """The share of wrong answers in eval mode."""
    model.eval()
    X = X.to(next(model.parameters()).dtype)
    with torch.no_grad():
        wrong = sum(int((model(a).argmax(dim=1) != b).sum()) for a, b in zip(X.split(1000), y.split(1000), strict=True))
    return wrong / len(y)


def clocked(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result of `work` and its wall time, the device's queue included."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


# --- The two algorithms -----------------------------------------------------------------------------------------------


class Runs:
    """Trains one network with one seed, with a checkpoint of its own for each run.

    Args:
        s: the settings.
        device: where.
        step: the step of momentum SGD.
        folder: of the checkpoints, or None.
    """

    def __init__(self, s: dict[str, Any], device: str, step: float, folder: Path | None) -> None:
        self.s, self.device, self.step, self.folder = s, device, step, folder

    def train(
        self, name: str, seed: int, X: Tensor, y: Tensor, tau: int, chosen: dict[str, Any] | None = None,
        start: nn.Sequential | None = None,
    ) -> tuple[nn.Sequential, by.TwoPhaseRun]:  # fmt: skip
        """Run the recipe: tau epochs of all layers, then, if something was chosen, noise and the last layer alone."""
        s, chosen = self.s, chosen or {"noise": None, "where": "all", "phase2": None}
        model = network(s, seed, self.device) if start is None else copy.deepcopy(start)
        passes = s["epochs"] - s["tau"]
        steps = passes * -(-len(X) // s["batch"])  # as many steps as the base takes
        options = {"nesterov": {"steps": steps, "every": max(1, steps // 100)}, "momentum_sgd": {"epochs": passes}}
        run = by.two_phase(
            model, model.last, X, y,
            lambda p: torch.optim.SGD(p, lr=self.step, momentum=s["momentum"]),
            tau, batch=s["batch"], noise=chosen["noise"], where=chosen["where"], wide=model.wide,
            phase2=chosen["phase2"], options=options.get(chosen["phase2"]),
            generator=torch.Generator().manual_seed(seed), snapshots=[tau],
            checkpoint=self.folder / f"{name}-{seed}" if self.folder and start is None else None,
        )  # fmt: skip
        return model, run


def losses(run: by.TwoPhaseRun) -> dict[str, Any]:
    """What a run recorded, without its features."""
    return {
        "epochs": run.phase1.tolist(),
        "after_phase1": run.before,
        "after_noise": run.noisy,
        "phase2": None if run.phase2 is None else run.phase2.losses.tolist(),
        "phase2_steps": None if run.phase2 is None else run.phase2.steps.tolist(),
    }


def choose(runs: Runs, X: Tensor, y: Tensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Noise and phase 2 by the error on held-out training images, first seed only; ties go to the first."""
    keep = len(X) - runs.s["validation"]
    trained, _ = runs.train("choice", 0, X[:keep], y[:keep], runs.s["tau"])
    tried = []
    for kind in PHASE2:
        for noise in NOISE:
            for where in ("all", "wide") if noise else ("all",):
                row = {"phase2": kind, "noise": noise, "where": where}
                name = f"choice-{kind}-{noise}-{where}"
                model, run = runs.train(name, 0, X[:keep], y[:keep], 0, chosen=row, start=trained)
                tried.append(row | {"loss": run.loss, "validation_error": error(model, X[keep:], y[keep:])})
                print(harness.table(tried[-1:]), flush=True)
                del model, run
    # without noise nothing is guaranteed: such rows are an ablation, not a candidate
    best = min((t for t in tried if t["noise"]), key=lambda t: t["validation_error"])
    return {k: best[k] for k in ("phase2", "noise", "where")}, tried


def compare(runs: Runs, split: Split, seed: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """Both algorithms with one seed, what they end with, and what is proved about it."""
    (X, y, X_test, y_test), s, found = split, runs.s, {"seed": seed}
    plans = {"base": (s["epochs"], None), "two_phase": (s["tau"], chosen)}
    for name, (tau, choice) in plans.items():
        (model, run), seconds = clocked(
            lambda name=name, tau=tau, choice=choice: runs.train(name, seed, X, y, tau, choice), runs.device
        )
        state, recorded = run.snapshots[tau], losses(run)
        del run  # and with it the features
        found[name] = {"losses": recorded, "seconds": seconds, "test_error": error(model, X_test, y_test)}
        gap, seconds = clocked(lambda model=model: by.certify_gap(model, X, y), runs.device)
        found[name]["gap"] = gap.to_dict() | {"seconds": seconds}
        if choice:
            middle = network(s, seed, "cpu")
            middle.load_state_dict(state)
            for when, part in (("after_phase1", middle), ("after_noise", model)):
                proof, seconds = clocked(lambda part=part: by.certify_expressivity(part, X), runs.device)
                found[name][f"expressivity_{when}"] = proof.to_dict() | {"seconds": seconds}
        print(f"seed {seed}, {name}: test error {found[name]['test_error']}, {gap.verdict()}", flush=True)
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each seed."""
    return [
        {
            "seed": r["seed"],
            "base: test error": r["base"]["test_error"],
            "two-phase: test error": r["two_phase"]["test_error"],
            "base: gap": r["base"]["gap"]["quantities"].get("gap"),
            "two-phase: gap": r["two_phase"]["gap"]["quantities"].get("gap"),
            "expressive": r["two_phase"]["expressivity_after_phase1"]["holds"],
        }
        for r in rows
    ]


def main() -> None:
    """Choose, compare with every seed, and store everything with the device and the versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", metavar="FOLDER", help="a folder of IDX files (MNIST, Fashion-MNIST or their kin)")
    parser.add_argument("--quick", action="store_true", help="small sizes, CPU allowed, nothing stored")
    parser.add_argument("--checkpoints", metavar="FOLDER", type=Path, help="resume from here when interrupted")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.quick and (device == "cpu" or options.idx is None):
        raise SystemExit("a GPU and --idx FOLDER are needed; use --quick to try the script on a CPU")
    torch.set_float32_matmul_precision("highest")
    s = QUICK if options.quick else FULL
    split, name = images(options.idx, s, device)
    start = network(s, 0, device)
    initial, e_seconds = clocked(lambda: by.certify_expressivity(start, split[0]), device)
    print(initial, flush=True)
    runs = Runs(s, device, step_size(start, split[0]), options.checkpoints)
    chosen, tried = choose(runs, *split[:2])
    rows = [compare(runs, split, seed, chosen) for seed in range(s["seeds"])]
    results = {
        "expressivity_at_start": initial.to_dict() | {"seconds": e_seconds},
        "choice": chosen,
        "tried": tried,
        "runs": rows,
        "summary": summary(rows),
    }
    print(harness.table(results["summary"]))
    if not options.quick:
        from companion.lab import records

        settings = s | {"data": name, "step": runs.step, "noise": NOISE, "phase2": PHASE2}
        path = harness.ROOT / "companion" / "lab" / "stored" / f"beyond-ntk-{name}.json"
        print(records.write(path, results, settings=settings, device=device))


if __name__ == "__main__":
    main()
