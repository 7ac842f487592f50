"""Full-batch gradient descent on 16 networks: `descent.train` beside what a user would write instead.

    F = relu(relu(X W_1) W_2) W_3,   loss 0.5 ||F - Y||_F^2

Every variant starts from the same weights, takes the same steps and returns the last weights and ``||R_k||_F`` for
k = 0, ..., steps; the numbers are compared before any time is taken.

    python benchmarks/width_bounds.py            # writes results/width_bounds.json, about five minutes
    python benchmarks/width_bounds.py --quick    # a smoke run: few rounds, nothing written
    python benchmarks/width_bounds.py --device cuda
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import _harness as harness
import torch
from torch import Tensor

from companion import data, descent, networks

SEEDS = 16
SIZES = {
    "big": {"N": 200, "widths": (64, 2048, 128, 10), "steps": 4, "eta": 1e-3},
    "small": {"N": 32, "widths": (8, 128, 32, 1), "steps": 200, "eta": 1e-2},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Problem = tuple[list[Tensor], Tensor, Tensor, float, int]
Result = tuple[list[Tensor], Tensor]


def problem(size: str, dtype: str, device: str = "cpu") -> Problem:
    """The weights, data, step and number of steps of one workload."""
    s = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    X, Y = data.sphere(s["N"], s["widths"][0], generator), data.signs(s["N"], generator, s["widths"][-1])
    weights = networks.init_mlp(s["widths"], generator=range(SEEDS), beta=2.0)
    move = partial(torch.Tensor.to, dtype=DTYPES[dtype], device=device)
    return [move(W) for W in weights], move(X), move(Y), s["eta"], s["steps"]


def ours(weights: list[Tensor], X: Tensor, Y: Tensor, eta: float, steps: int) -> Result:
    """The public call, with its checks, copies and records."""
    run = descent.train(weights, X, Y, eta, steps)
    return run.weights, run.residual


def floor_mm(weights: list[Tensor], X: Tensor, Y: Tensor, eta: float, steps: int) -> None:
    """Only the products, one network at a time, into buffers that exist; no activation, no update, no result."""
    N, (n1, n2) = len(X), (W.shape[2] for W in weights[:-1])
    F1, F2, R = X.new_zeros(N, n1), X.new_zeros(N, n2), X.new_zeros(N, Y.shape[1])
    G = [torch.empty_like(W[0]) for W in weights]
    for k in range(steps + 1):
        for W1, W2, W3 in zip(*weights, strict=True):
            torch.mm(X, W1, out=F1)
            torch.mm(F1, W2, out=F2)
            torch.mm(F2, W3, out=R)
            if k < steps:
                torch.mm(F2.T, R, out=G[2])
                torch.mm(R, W3.T, out=F2)
                torch.mm(F1.T, F2, out=G[1])
                torch.mm(F2, W2.T, out=F1)
                torch.mm(X.T, F1, out=G[0])


def floor_bmm(weights: list[Tensor], X: Tensor, Y: Tensor, eta: float, steps: int) -> None:
    """The same products, all networks in one call."""
    S, N, (W1, W2, W3) = len(weights[0]), len(X), weights
    F1, F2, R = (X.new_zeros(S, N, W.shape[2]) for W in weights)
    G, XS = [torch.empty_like(W) for W in weights], X.expand(S, *X.shape)
    for k in range(steps + 1):
        torch.bmm(XS, W1, out=F1)
        torch.bmm(F1, W2, out=F2)
        torch.bmm(F2, W3, out=R)
        if k < steps:
            torch.bmm(F2.mT, R, out=G[2])
            torch.bmm(R, W3.mT, out=F2)
            torch.bmm(F1.mT, F2, out=G[1])
            torch.bmm(F2, W2.mT, out=F1)
            torch.bmm(XS.mT, F1, out=G[0])


def module_loop(weights: list[Tensor], X: Tensor, Y: Tensor, eta: float, steps: int) -> Result:
    """What most people write: an nn.Module, autograd and an optimizer, network after network."""
    ends, residuals = [], torch.zeros(steps + 1, len(weights[0]), dtype=X.dtype, device=X.device)
    for s in range(len(weights[0])):
        layers = []
        for W in weights:
            linear = torch.nn.Linear(*W.shape[1:], bias=False, dtype=X.dtype, device=X.device)
            linear.weight.data.copy_(W[s].T)
            layers += [linear, torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers[:-1])
        optimizer = torch.optim.SGD(model.parameters(), lr=eta)
        for k in range(steps + 1):
            optimizer.zero_grad()
            R = model(X) - Y
            residuals[k, s] = R.detach().norm()
            if k < steps:
                (0.5 * R.square().sum()).backward()
                optimizer.step()
        ends.append([p.detach().T for p in model.parameters()])
    return [torch.stack(layer) for layer in zip(*ends, strict=True)], residuals


def batched_autograd(weights: list[Tensor], X: Tensor, Y: Tensor, eta: float, steps: int) -> Result:
    """Stacked weights and autograd."""
    leaves = [W.clone().requires_grad_() for W in weights]
    residuals = []
    for k in range(steps + 1):
        R = networks.forward(leaves, X) - Y
        residuals.append(torch.linalg.vector_norm(R.detach(), dim=(1, 2)))
        if k < steps:
            grads = torch.autograd.grad(0.5 * R.square().sum(), leaves)
            with torch.no_grad():
                for W, g in zip(leaves, grads, strict=True):
                    W.sub_(g, alpha=eta)
    return [W.detach() for W in leaves], torch.stack(residuals)


def vmap_grad(weights: list[Tensor], X: Tensor, Y: Tensor, eta: float, steps: int) -> Result:
    """torch.func: vmap over the networks of the gradient of one."""

    def loss(W: list[Tensor]) -> tuple[Tensor, Tensor]:
        R = torch.relu(torch.relu(X @ W[0]) @ W[1]) @ W[2] - Y
        return 0.5 * R.square().sum(), R.square().sum().sqrt()

    step = torch.func.vmap(torch.func.grad(loss, has_aux=True))
    weights, residuals = [W.clone() for W in weights], []
    for _ in range(steps):
        grads, norms = step(weights)
        residuals.append(norms)
        for W, g in zip(weights, grads, strict=True):
            W.sub_(g, alpha=eta)
    residuals.append(torch.func.vmap(lambda *W: loss(W)[1])(*weights))
    return weights, torch.stack(residuals)


def jax_scan(weights: list[Tensor], X: Tensor, Y: Tensor, eta: float, steps: int) -> Callable[[], Result] | None:
    """JAX: jit of a scan over the steps of a vmap over the networks, compiled here; None without JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    jax.config.update("jax_enable_x64", True)
    x, y = jnp.asarray(X.numpy()), jnp.asarray(Y.numpy())

    def loss(W: list[Any]) -> tuple[Any, Any]:
        R = jax.nn.relu(jax.nn.relu(x @ W[0]) @ W[1]) @ W[2] - y
        return 0.5 * (R**2).sum(), jnp.sqrt((R**2).sum())

    def step(W: list[Any], _: None) -> tuple[list[Any], Any]:
        grads, norms = jax.vmap(jax.grad(loss, has_aux=True))(W)
        return [w - eta * g for w, g in zip(W, grads, strict=True)], norms

    def run(W: list[Any]) -> tuple[list[Any], Any]:
        W, norms = jax.lax.scan(step, W, None, length=steps)
        return W, jnp.concatenate([norms, jax.vmap(lambda w: loss(w)[1])(W)[None]])

    start = [jnp.asarray(W.numpy()) for W in weights]
    compiled = jax.jit(run).lower(start).compile()

    def call() -> Result:
        W, norms = jax.block_until_ready(compiled(start))
        return [torch.from_dlpack(w) for w in W], torch.from_dlpack(norms)

    return call


PEERS = {
    "ours": ours,
    "floor: torch.mm": floor_mm,
    "floor: torch.bmm": floor_bmm,
    "nn.Module loop": module_loop,
    "batched autograd": batched_autograd,
    "vmap(grad)": vmap_grad,
}


def compare_numbers(name: str, result: Result, reference: Result, dtype: str) -> None:
    """Refuse to time a variant that computes something else (in norm: ReLU's sign flips move single entries)."""
    tolerance = 1e-10 if dtype == "float64" else 2e-3
    for a, b in zip([*result[0], result[1]], [*reference[0], reference[1]], strict=True):
        error = float((a.double().cpu() - b).norm() / b.norm())
        if not error <= tolerance:
            raise SystemExit(f"{name} differs from the reference by {error:.1e} ({dtype})")


def measure(size: str, dtype: str, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Check and time all variants of one workload."""
    given = problem(size, dtype, device)
    variants: dict[str, Callable[[], Any]] = {name: partial(f, *given) for name, f in PEERS.items()}
    if device == "cpu" and (compiled := jax_scan(*given)):
        variants["JAX vmap+jit+scan"] = compiled
    reference = module_loop(*problem(size, "float64"))
    for name, call in variants.items():
        if not name.startswith("floor"):
            compare_numbers(name, call(), reference, dtype)
    times = harness.alternate(variants, rounds, device)
    rows = []
    for name in variants:
        memory = None
        if device == "cpu" and size == "big" and name in PEERS and not name.startswith("floor"):
            memory = harness.peak_memory(__file__, [size, dtype, name])
        rows.append(
            {
                "size": size,
                "dtype": dtype,
                "variant": name,
                "seconds": statistics.median(times[name]),
                "of_torch.mm": harness.ratio(times, name, "floor: torch.mm"),
                "of_ours": harness.ratio(times, name, "ours"),
                "peak_mb": memory,
            }
        )
    return rows, times


def targets(times: dict[tuple[str, str], dict[str, list[float]]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at on a CPU, and what was reached."""
    goals = [("big", "float32", 1.12, 1.3), ("big", "float64", 1.15, 1.3), ("small", "float32", 1.15, 7.0)]
    found = []
    for size, dtype, over_floor, over_loop in goals:
        t, name = times[size, dtype], f"{size} {dtype}"
        over = harness.ratio(t, "ours", "floor: torch.mm")
        found.append(harness.target(f"{name}: ours / torch.mm", over, "<=", over_floor))
        gain = harness.ratio(t, "nn.Module loop", "ours")
        found.append(harness.target(f"{name}: nn.Module loop / ours", gain, ">=", over_loop))
    for row in rows:
        if (row["size"], row["dtype"], row["variant"]) == ("big", "float32", "ours") and row["peak_mb"] is not None:
            found.append(harness.target("big float32: peak memory of ours in MB", row["peak_mb"], "<=", 80))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", nargs=3, metavar=("SIZE", "DTYPE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        size, dtype, variant = options.memory
        PEERS[variant](*problem("small", dtype))  # libraries load their code and buffers first
        given = problem(size, dtype)
        print(harness.growth(lambda: PEERS[variant](*given)))
        return
    rows, times = [], {}
    for size in SIZES:
        for dtype in DTYPES:
            found, times[size, dtype] = measure(size, dtype, options.device, 2 if options.quick else 11)
            rows += found
            print(harness.table(found), flush=True)
    result = {
        "what": "full-batch gradient descent on 16 deep ReLU networks, CPU seconds (GPU: wall), medians of the rounds",
        "machine": harness.machine(1, options.device, ["jax"]),
        "workloads": {name: {**s, "networks": SEEDS} for name, s in SIZES.items()},
        "rows": rows,
    }
    if options.device == "cpu":
        result["targets"] = targets(times, rows)
        print(harness.table(result["targets"]))
    if not options.quick:
        name = "width_bounds" if options.device == "cpu" else f"width_bounds_{options.device}"
        print(harness.write(name, result).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
