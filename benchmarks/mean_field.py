"""Value and gradient of a mean-field ResNet (lesson 2) beside what a user would pick instead.

W3: ``z_{l+1} = z_l + (1/LM) sum_m v_m relu(a_m . z_l + b_m)``, L = 256 layers, M = 512 particles, d = 16, n = 64
samples, 8 networks, float32: 12.9 GFLOP, 15 with the recomputation that bounded memory costs.  The gradient alone takes
138 MB; memory is counted with it, and without the parameters.

    python benchmarks/mean_field.py                # writes results/mean_field.json
    python benchmarks/mean_field.py --quick        # a smoke run, nothing written
    python benchmarks/mean_field.py --device cuda  # writes results/mean_field_gpu.json
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
import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from companion import mean_field as mf

SIZES = {"S": 8, "L": 256, "M": 512, "d": 16, "n": 64}
QUICK = {"S": 2, "L": 8, "M": 64, "d": 16, "n": 64}
OURS, FRESH = "ours", "ours, gradient in new memory"
FLOOR, AUTOGRAD = "floor: 6 bmm per layer", "autograd, Python loop"
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(sizes: dict[str, int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """Particles ``(S, L, M, 2 d + 1)``, inputs, targets and the output functional."""
    S, L, M, d, n = sizes.values()
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(S, L, M, 2 * d + 1, generator=g)
    theta[..., d : 2 * d] /= d**0.5
    X, y = torch.randn(n, d, generator=g), torch.randn(n, generator=g)
    return tuple(t.to(device=device, dtype=dtype) for t in (theta, X, y, torch.ones(d) / d**0.5))


def ours(p: Problem, fresh: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    theta, X, y, v = p
    block = mf.ReluMLP(X.shape[1])
    out = None if fresh else torch.zeros_like(theta)
    return lambda: mf.rescaled_gradient(block, theta, X, y, v, out=out)


def floor(p: Problem) -> Callable[[], None]:
    """Only the products, on contiguous operands, into buffers that exist."""
    theta, X, _, _ = p
    S, L, M, _ = theta.shape
    n, d = X.shape
    z, p_, out = (X.expand(S, n, d).contiguous() for _ in range(3))
    W, V = (theta.new_ones(S, M, d) for _ in range(2))
    gradients = [(theta.new_empty(S, M, d), theta.new_empty(S, M, d)) for _ in range(L)]
    H, Q = theta.new_zeros(S, n, M), theta.new_zeros(S, n, M)

    def run() -> None:
        for _ in range(L):
            torch.bmm(z, W.mT, out=H)
            torch.bmm(H, V, out=out)
        for g_v, g_w in gradients:
            torch.bmm(H.mT, p_, out=g_v)
            torch.bmm(p_, V.mT, out=Q)
            torch.bmm(Q.mT, z, out=g_w)
            torch.bmm(Q, W, out=out)

    return run


def layer(z: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return z + scale * torch.bmm(torch.relu(torch.baddbmm(b[:, None], z, a.mT)), v)


def autograd(p: Problem, every: int = 0) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Autograd through a loop over layers, parameters stored layer by layer; checkpoints `every` so many layers."""
    theta, X, y, v = p
    S, L = theta.shape[:2]
    d, n, scale = X.shape[1], len(X), 1 / (L * theta.shape[2])
    leaves = [
        theta[..., part].transpose(0, 1).contiguous().requires_grad_()
        for part in (slice(d), slice(d, 2 * d), 2 * d)
    ]  # fmt: skip

    def piece(z: Tensor, *params: Tensor) -> Tensor:
        for i in range(0, len(params), 3):
            z = layer(z, *params[i : i + 3], scale)
        return z

    def run() -> tuple[Tensor, list[Tensor]]:
        z = X.expand(S, n, d)
        layers = [t for per_layer in zip(*(leaf.unbind(0) for leaf in leaves), strict=True) for t in per_layer]
        if every:
            for i in range(0, L, every):
                z = checkpoint(piece, z, *layers[3 * i : 3 * (i + every)], use_reentrant=False)
        else:
            z = piece(z, *layers)
        E = 0.5 * (z @ v - y).square().mean(1)
        return E.detach(), list(torch.autograd.grad(E.sum(), leaves))

    return run


def packed(gradients: list[Any], L: int, M: int) -> np.ndarray:
    """Gradients of the leaves ``(L, S, M, .)`` as our rescaled gradient ``(S, L, M, k)``."""
    parts = [np.asarray(g.cpu() if isinstance(g, Tensor) else g, dtype=np.float64) for g in gradients]
    parts[2] = parts[2][..., None]
    return L * M * np.concatenate(parts, -1).transpose(1, 0, 2, 3)


def have_jax() -> bool:
    try:
        import jax  # noqa: F401
    except ImportError:
        return False
    return True


def jax_scan(p: Problem, remat: bool) -> Callable[[], tuple[Any, list[Any]]]:
    import jax
    import jax.numpy as jnp

    theta, X, y, v = (t.cpu().numpy() for t in p)
    S, L, M, _ = theta.shape
    d, scale = X.shape[1], 1 / (L * M)
    params = tuple(
        jnp.asarray(np.ascontiguousarray(theta[..., part].swapaxes(0, 1)))
        for part in (slice(d), slice(d, 2 * d), 2 * d)
    )
    X, y, v = (jnp.asarray(t) for t in (X, y, v))

    def push(z: Any, w: Any) -> Any:
        h = jnp.maximum(jnp.einsum("snd,smd->snm", z, w[1]) + w[2][:, None], 0)
        return z + scale * jnp.einsum("snm,smd->snd", h, w[0]), None

    def loss(w: Any) -> Any:
        z, _ = jax.lax.scan(jax.checkpoint(push) if remat else push, jnp.broadcast_to(X, (S, *X.shape)), w)
        E = 0.5 * ((z @ v - y) ** 2).mean(1)
        return E.sum(), E

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run() -> tuple[Any, list[Any]]:
        (_, E), gradients = both(params)
        return E.block_until_ready(), list(gradients)

    return run


def builders(device: str) -> dict[str, Callable[[Problem], Callable[[], Any]]]:
    found = {
        OURS: partial(ours, fresh=False),
        FRESH: partial(ours, fresh=True),
        FLOOR: floor,
        AUTOGRAD: autograd,
        "autograd, checkpoint every 16 layers": partial(autograd, every=16),
    }
    if device == "cpu" and have_jax():
        found |= {"JAX scan": partial(jax_scan, remat=False), "JAX scan, remat": partial(jax_scan, remat=True)}
    return found


def variants(p: Problem, device: str) -> dict[str, Callable[[], Any]]:
    return {name: build(p) for name, build in builders(device).items()}


def agree(sizes: dict[str, int], device: str) -> list[dict[str, Any]]:
    """All variants compute the same gradient: in float64 entry by entry, in float32 by its norm (ReLU signs flip)."""
    checks = []
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-3)):
        p = problem(sizes, device, dtype)
        G = ours(p, fresh=True)()[1].double().cpu().numpy()
        for name, function in variants(p, device).items():
            if name in (OURS, FRESH, FLOOR) or (dtype == torch.float64 and name.startswith("JAX")):
                continue
            distance = float(np.linalg.norm(packed(function()[1], sizes["L"], sizes["M"]) - G) / np.linalg.norm(G))
            if not distance <= tolerance:
                raise SystemExit(f"{name}: relative distance {distance:.2e} exceeds {tolerance:.0e}")
            checks.append({"compared": name, "dtype": str(dtype), "relative_distance": distance})
    return checks


def measure_memory(variant: str) -> float:
    """Growth of this fresh process during one call; libraries load their code on a small problem first."""
    build = builders("cpu")[variant]
    build(problem(QUICK))()
    function = build(problem(SIZES))
    return harness.growth(function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes, nothing written")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(measure_memory(options.memory))
        return
    sizes, device = (QUICK if options.quick else SIZES), options.device
    checks = agree(QUICK, device)
    work = variants(problem(sizes, device), device)
    times = harness.alternate(work, 1 if options.quick else 7, device)
    names = list(work)
    del work
    peaks: dict[str, float | None] = dict.fromkeys(names)
    if device == "cpu" and not options.quick:
        # JAX keeps and reuses what it once had: the growth of its process says little
        peaks |= {n: harness.peak_memory(__file__, [n]) for n in names if not n.startswith("JAX")}
    rows = [
        {
            "workload": "W3",
            "variant": name,
            "seconds": statistics.median(times[name]),
            "of_floor": harness.ratio(times, name, FLOOR),
            "of_ours": harness.ratio(times, name, OURS),
            "peak_mb": peaks[name],
        }
        for name in names
    ]
    targets = [
        harness.target("W3 ours / floor", harness.ratio(times, OURS, FLOOR), "<=", 1.5),
        harness.target("W3 autograd / ours in new memory", harness.ratio(times, AUTOGRAD, FRESH), ">=", 1.0),
    ]
    if peaks[FRESH] is not None:
        targets.append(harness.target("W3 peak MB, gradient included", peaks[FRESH], "<=", 160))
        targets.append(harness.target("W3 peak MB of autograd / ours", peaks[AUTOGRAD] / peaks[FRESH], ">=", 3))
    print(harness.table(rows), "\n")
    print(harness.table(targets))
    if not options.quick:
        result = {
            "what": "Value and gradient of a mean-field ResNet (W3), float32; CPU seconds (GPU: wall), medians of the "
            "rounds; memory is what a fresh process grows by during one call",
            "sizes": sizes,
            "machine": harness.machine(1, device, ["jax"]),
            "rows": rows,
            "targets": targets,
            "checks": checks,
        }
        name = "mean_field" if device == "cpu" else "mean_field_gpu"
        print(harness.write(name, result).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
