"""The trainer and the certificate of lesson 1 on a GPU: agreement with the CPU, times, and all 1,797 digits.

    python benchmarks/width_bounds_gpu.py            # writes benchmarks/results/width_bounds_gpu.json
    python benchmarks/width_bounds_gpu.py --quick    # small sizes; runs without a GPU too, to try the script

Three parts.  *Agreement*: the same networks trained on both devices in float64 and float32; the largest relative
difference of the residuals must stay below the stated tolerance.  *Certificate*: the measured level on both devices
(the certified level always runs on the CPU, because the rounding of a GPU library's products is not documented).
*Full size*: Theorem C on all digits at n = 2^17, beta = 8, then the first 100,000 steps under its envelope.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from companion import data, descent, networks
from companion import width_bounds as wb

RESULTS = Path(__file__).parent / "results" / "width_bounds_gpu.json"
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}


def seconds(device: str, work):
    """Run `work` and return its result and its wall time, the device's queue included."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def agreement(device: str, quick: bool) -> list[dict]:
    """Train 16 networks of lesson 1's first setting on the CPU and on the device, from the same numbers."""
    N, n, steps = (20, 200, 50) if quick else (50, 1600, 500)
    generator = torch.Generator().manual_seed(0)
    X, Y = data.sphere(N, N, generator), data.signs(N, generator)
    start = networks.init_mlp((N, n, 1), scheme="gaussian", zero_last=True, generator=range(16))
    step = wb.certify(X, Y, [W[0] for W in start]).quantities.get("max_step", 1e-5)
    rows = []
    for dtype in (torch.float64, torch.float32):
        residual, clock = {}, {}
        for where in ("cpu", device):
            moved = [W.to(where, dtype) for W in start]
            inputs = X.to(where, dtype), Y.to(where, dtype)
            descent.train(moved, *inputs, step, 10, every=10)  # warm up
            run, clock[where] = seconds(
                where, lambda moved=moved, inputs=inputs: descent.train(moved, *inputs, step, steps, every=steps // 10)
            )
            residual[where] = run.residual.double().cpu()
        name = str(dtype).removeprefix("torch.")
        difference = float((residual[device] / residual["cpu"] - 1).abs().max())
        rows.append(
            {
                "dtype": name,
                "networks": 16,
                "widths": [N, n, 1],
                "steps": steps,
                "largest_relative_difference": difference,
                "tolerance": TOLERANCE[name],
                "agrees": difference < TOLERANCE[name],
                "seconds": clock,
            }
        )
    return rows


def full_size(device: str, quick: bool) -> dict:
    """Certify all digits at full width and run the first steps; the residual must stay below the envelope."""
    digits = data.digits(n=100) if quick else data.digits()
    n, beta, steps = (8192, 3.0, 200) if quick else (2**17, 8.0, 100_000)
    X, Y = digits.X.to(device), digits.Y.to(device)
    weights = networks.init_mlp(
        (64, n, 10),
        scheme="gaussian",
        beta=beta,
        zero_last=True,
        generator=torch.Generator().manual_seed(8),
        device=device,
    )
    cert, certify_seconds = seconds(device, lambda: wb.certify(X, Y, weights, epsilon=0.4))
    result = {"N": len(X), "n": n, "beta": beta, "certificate": cert.to_dict(), "certify_seconds": certify_seconds}
    if not cert.holds:
        return result
    step = cert.quantities["max_step"]
    checkpoint = None if quick else RESULTS.with_suffix(".checkpoint")
    run, train_seconds = seconds(
        device,
        lambda: descent.train(weights, X, Y, step, steps, every=steps // 100, progress=True, checkpoint=checkpoint),
    )
    envelope = wb.envelope(cert, step, run.steps.cpu())
    residual = run.residual[:, 0].double().cpu()
    return result | {
        "steps": run.steps.tolist(),
        "residual": residual.tolist(),
        "envelope": envelope.tolist(),
        "below_envelope": bool((residual <= envelope * (1 + 1e-9)).all()),
        "train_seconds": train_seconds,
    }


def main() -> None:
    """Run the three parts and store what was found with the device and the versions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, CPU allowed, nothing stored")
    quick = parser.parse_args().quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not quick:
        raise SystemExit("no GPU is visible to torch; use --quick to try the script on a CPU")
    torch.set_float32_matmul_precision("highest")
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "agreement": agreement(device, quick),
        "full_size": full_size(device, quick),
    }
    shown = report | {"full_size": {k: v for k, v in report["full_size"].items() if not isinstance(v, list)}}
    print(json.dumps(shown, indent=1, ensure_ascii=False))
    if not quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
