"""Thousands of tiny networks trained to a critical point: `train_lm_newton` beside what a user would write instead.

    f(x) = sum_j v_j tanh(w_j . x + b_j),   0.5 sum (f - y)^2,   N = 10, two inputs and a bias, float64

With 10 neurons (40 parameters) every network reaches ``||grad|| < 1e-10``; with 2 neurons (8 parameters) most do not,
and what counts is that every end point gets an honest class.  A step of plain gradient descent is timed as well.

    python benchmarks/basins.py            # writes results/basins.json, a few minutes
    python benchmarks/basins.py --quick    # a smoke run: fewer networks and rounds, nothing written
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import _harness as harness
import numpy as np
import torch
from torch import Tensor

from companion import basins, descent

GOAL = 1e-10
CHUNK = 512
SCIPY_NETS, MODULE_NETS, GD_STEPS = 48, 8, 100
Problem = tuple[list[Tensor], Tensor, Tensor]


def problem(networks: int, m: int) -> Problem:
    """Weights drawn N(0, 1), shared inputs with a bias column, random signs as each network's own labels."""
    g = torch.Generator().manual_seed(0)
    X = torch.cat([torch.randn(10, 2, generator=g, dtype=torch.float64), torch.ones(10, 1, dtype=torch.float64)], 1)
    Y = torch.randn(networks, 10, 1, generator=g, dtype=torch.float64).sign()
    W = torch.randn(networks, 3, m, generator=g, dtype=torch.float64)
    return [W, torch.randn(networks, m, 1, generator=g, dtype=torch.float64)], X, Y


def ours(weights: list[Tensor], X: Tensor, Y: Tensor) -> Tensor:
    """The public call; returns the norms of the gradients."""
    return basins.train_lm_newton(weights, X, Y, "tanh", tolerance=GOAL, chunk=CHUNK).gradient


def scipy_loop(weights: list[Tensor], X: Tensor, Y: Tensor) -> Tensor | None:
    """scipy's least_squares (trf) with the analytic Jacobian, one network after the other; None without scipy."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        return None
    x, m, norms = X.numpy(), weights[0].shape[2], []
    for W, V, y in zip(weights[0].numpy(), weights[1].numpy(), Y[..., 0].numpy(), strict=True):

        def residual(theta: np.ndarray, y: np.ndarray = y) -> np.ndarray:
            return np.tanh(x @ theta[m:].reshape(3, m)) @ theta[:m] - y

        def jacobian(theta: np.ndarray, y: np.ndarray = y) -> np.ndarray:
            h = np.tanh(x @ theta[m:].reshape(3, m))
            slope = (1 - h**2) * theta[:m]
            return np.concatenate([h, (x[:, :, None] * slope[:, None]).reshape(len(x), -1)], 1)

        start = np.concatenate([V[:, 0], W.reshape(-1)])
        end = least_squares(residual, start, jacobian, xtol=1e-15, ftol=1e-15, gtol=GOAL, max_nfev=600).x
        norms.append(float(np.linalg.norm(jacobian(end).T @ residual(end))))
    return torch.tensor(norms)


def jax_lm(weights: list[Tensor], X: Tensor, Y: Tensor) -> Callable[[], Tensor] | None:
    """The same damped iteration in JAX: while_loop for one network, vmap over a chunk; None without JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    jax.config.update("jax_enable_x64", True)
    x, m = jnp.asarray(X.numpy()), weights[0].shape[2]

    def parts(theta: Any, y: Any) -> tuple[Any, Any]:
        h = jnp.tanh(x @ theta[m:].reshape(3, m))
        slope = (1 - h**2) * theta[:m]
        return h @ theta[:m] - y, jnp.concatenate([h, (x[:, :, None] * slope[:, None]).reshape(len(x), -1)], 1)

    def train(theta: Any, y: Any) -> Any:
        def go_on(state: Any) -> Any:
            _, r, J, _, k = state
            return (jnp.linalg.norm(J.T @ r) >= GOAL) & (k < 250)

        def step(state: Any) -> Any:
            theta, r, J, damping, k = state
            mu = damping * jnp.minimum(jnp.linalg.norm(J.T @ r), 1.0)
            factor = jax.scipy.linalg.cho_factor(J @ J.T + mu * jnp.eye(len(x)))
            new = theta - J.T @ jax.scipy.linalg.cho_solve(factor, r)
            r_new, J_new = parts(new, y)
            better = r_new @ r_new < r @ r
            keep = lambda a, b: jnp.where(better, a, b)  # noqa: E731
            return keep(new, theta), keep(r_new, r), keep(J_new, J), damping * keep(0.25, 4.0), k + 1

        r, J = parts(theta, y)
        _, r, J, _, _ = jax.lax.while_loop(go_on, step, (theta, r, J, 1e-2, 0))
        return jnp.linalg.norm(J.T @ r)

    theta = jnp.asarray(torch.cat([weights[1][..., 0], weights[0].flatten(1)], 1).numpy())
    labels = jnp.asarray(Y[..., 0].numpy())
    chunks = [(theta[a : a + CHUNK], labels[a : a + CHUNK]) for a in range(0, len(theta), CHUNK)]
    compiled = {len(c[0]): jax.jit(jax.vmap(train)).lower(*c).compile() for c in chunks}

    def call() -> Tensor:
        return torch.cat([torch.from_dlpack(jax.block_until_ready(compiled[len(t)](t, y))) for t, y in chunks])

    return call


def module_steps(weights: list[Tensor], X: Tensor, Y: Tensor) -> list[Tensor]:
    """Plain gradient descent as most people write it: an nn.Module, autograd, SGD, network after network."""
    ends = []
    for W, V, y in zip(*weights, Y, strict=True):
        first = torch.nn.Linear(*W.shape, bias=False, dtype=X.dtype)
        last = torch.nn.Linear(*V.shape, bias=False, dtype=X.dtype)
        first.weight.data.copy_(W.T)
        last.weight.data.copy_(V.T)
        model = torch.nn.Sequential(first, torch.nn.Tanh(), last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(GD_STEPS):
            optimizer.zero_grad()
            (0.5 * (model(X) - y).square().sum()).backward()
            optimizer.step()
        ends.append(first.weight.detach().T)
    return ends


def our_steps(weights: list[Tensor], X: Tensor, Y: Tensor) -> Tensor:
    """`descent.train` on the whole ensemble; it trains on shared targets, here those of the first network."""
    return descent.train(weights, X, Y[0], 0.02, GD_STEPS, activation="tanh", every=GD_STEPS).weights[0]


def check_steps(networks: int) -> None:
    """Both ways of descending end at the same weights."""
    weights, X, Y = problem(networks, 10)
    few, labels = [W[:MODULE_NETS] for W in weights], Y[:1].expand(MODULE_NETS, -1, -1)
    error = float((torch.stack(module_steps(few, X, labels)) - our_steps(weights, X, Y)[:MODULE_NETS]).abs().max())
    if error > 1e-10:
        raise SystemExit(f"the two descents differ by {error:.1e}")


def measure(networks: int, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check and time everything; rows and targets."""
    weights, X, Y = problem(networks, 10)
    few = [W[:SCIPY_NETS] for W in weights]
    tiny = [W[:MODULE_NETS] for W in weights]
    check_steps(networks)
    variants: dict[str, Callable[[], Any]] = {"ours": lambda: ours(weights, X, Y)}
    per_net = {"ours": networks}
    if (compiled := jax_lm(weights, X, Y)) is not None:
        variants["JAX vmap+while_loop, chunks"], per_net["JAX vmap+while_loop, chunks"] = compiled, networks
    if scipy_loop([W[:1] for W in weights], X, Y[:1]) is not None:
        variants["scipy least_squares loop"] = lambda: scipy_loop(few, X, Y[:SCIPY_NETS])
        per_net["scipy least_squares loop"] = SCIPY_NETS
    reached = {name: float((call() < 1e-8).double().mean()) for name, call in variants.items()}
    reached["ours"] = float((ours(weights, X, Y) < GOAL).double().mean())
    variants["GD, descent.train"] = lambda: our_steps(weights, X, Y)
    variants["GD, nn.Module loop"] = lambda: module_steps(tiny, X, Y[:MODULE_NETS])
    per_net |= {
        "GD, descent.train": networks * GD_STEPS,
        "GD, nn.Module loop": MODULE_NETS * GD_STEPS,
    }
    times = harness.alternate(variants, rounds)
    scaled = {name: [t / per_net[name] for t in ts] for name, ts in times.items()}
    rows = [
        {
            "variant": name,
            "microseconds for a network (GD: and step)": 1e6 * statistics.median(ts),
            f"seconds for {networks}": None if name.startswith("GD") else networks * statistics.median(ts),
            "reached the goal": reached.get(name),
        }
        for name, ts in scaled.items()
    ]
    goals = [harness.target("ours, 10 neurons: fraction at ||grad|| < 1e-10", reached["ours"], ">=", 1.0)]
    if "JAX vmap+while_loop, chunks" in scaled:
        goals.append(
            harness.target("ours / JAX", harness.ratio(scaled, "ours", "JAX vmap+while_loop, chunks"), "<=", 1.1)
        )
    if "scipy least_squares loop" in scaled:
        goals.append(
            harness.target("scipy loop / ours", harness.ratio(scaled, "scipy least_squares loop", "ours"), ">=", 40)
        )
    gain = harness.ratio(scaled, "GD, nn.Module loop", "GD, descent.train")
    goals.append(harness.target("GD step: nn.Module loop / descent.train", gain, ">=", 50))
    return rows, goals


def narrow(networks: int) -> dict[str, float]:
    """Where networks of 2 neurons end, in fractions of all; the classes are never merged."""
    weights, X, Y = problem(networks, 2)
    trained = basins.train_lm_newton(weights, X, Y, "tanh", tolerance=GOAL)
    ends = basins.classify_endpoints(trained, X, Y, "tanh", starts=1)
    return {name: round(ends.fraction(name), 4) for name in basins.CLASSES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer networks and rounds, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks, rounds = (512, 2) if options.quick else (4096, 7)
    rows, goals = measure(networks, rounds)
    print(harness.table(rows))
    ends = narrow(networks)
    print(ends)
    goals.append(harness.target("2 neurons: fraction classified", sum(ends.values()), ">=", 0.999))
    print(harness.table(goals))
    if not options.quick:
        result = {
            "what": "4096 tiny tanh networks to a critical point, CPU seconds, medians of the rounds",
            "machine": harness.machine(1, "cpu", ["jax", "scipy"]),
            "rows": rows,
            "two neurons, end points": ends,
            "targets": goals,
        }
        print(harness.write("basins", result).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
