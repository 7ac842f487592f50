"""The two heavy pieces of lesson 4 beside what a user would pick instead.

W4: the Gram matrix ``(X X^T) o counts / m`` of a layer with m = 100,000 neurons, N = 500, d = 64, float32.
W5: one step of gradient descent on such a layer, m = 100,000 and 1,000,000.

Every variant's numbers are compared before any time is taken.  neural-tangents 0.6.5 needs an old JAX (jax==0.4.25,
numpy<2, scipy<1.13), so it runs in an environment of its own, on m = 4,096, scaled by m (its time is linear in m).

    python benchmarks/minimum_norm.py                              # writes results/minimum_norm.json, about ten minutes
    python benchmarks/minimum_norm.py --quick                      # a smoke run, nothing written
    python benchmarks/minimum_norm.py --nt PYTHON                  # with the interpreter that has neural-tangents
    python benchmarks/minimum_norm.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import _harness as harness
import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from companion import data, kernels, minimum_norm

N, D, NARROW = 500, 64, 4096  # NARROW: the width of the peers that cannot do more
ETA = 0.01

NT = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np
import neural_tangents as nt
from neural_tangents import stax
X, W, a = (np.load(sys.argv[1])[k] for k in ("X", "W", "a"))
X, W, a = jnp.asarray(X), jnp.asarray(W), jnp.asarray(a)
def f(w, x):
    return jnp.maximum(x @ w, 0) @ a[:, None] / np.sqrt(w.shape[1])
out = {"jax": jax.__version__, "neural_tangents": nt.__version__, "seconds": {}}
for implementation in (1, 2, 3):
    kernel = nt.empirical_ntk_fn(f, trace_axes=(-1,), vmap_axes=0, implementation=implementation)
    gram = jax.jit(lambda x, w, kernel=kernel: kernel(x, None, w))
    G = gram(X, W).block_until_ready()
    times = []
    for _ in range(int(sys.argv[3])):
        begin = time.process_time()
        gram(X, W).block_until_ready()
        times.append(time.process_time() - begin)
    out["seconds"][str(implementation)] = sorted(times)[len(times) // 2]
jax.config.update("jax_enable_x64", True)
X64 = jnp.asarray(np.load(sys.argv[1])["X64"])
_, _, kernel_fn = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))
both = kernel_fn(X64, None, ("ntk", "nngp"))
np.savez(sys.argv[2], G=np.asarray(G), H=X64.shape[1] * np.asarray(both.ntk - both.nngp))
print(json.dumps(out))
"""


def problem(m: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, weights ``(1, d, m)``, signs ``(1, m)`` and targets ``(1, N)``, float32."""
    g = torch.Generator().manual_seed(0)
    X = data.sphere(N, D, g)
    W = torch.randn(1, D, m, generator=g)
    signs = torch.randint(0, 2, (1, m), generator=g).float() * 2 - 1
    return tuple(t.to(device=device, dtype=torch.float32) for t in (X, W, signs, data.signs(N, g).T))


# --- W4: the Gram matrix ----------------------------------------------------------------------------------------------


def gram_ours(X: Tensor, W: Tensor, signs: Tensor) -> Tensor:
    return minimum_norm.empirical_gram(X, W)[0]


def gram_floor(X: Tensor, W: Tensor, signs: Tensor) -> Callable[[], Any]:
    """Only the products: pre-activations in float32 and counts in int8, chunk by chunk, into buffers that exist."""
    c, m = 2048, W.shape[2]
    Z, A = X.new_empty(N, c), torch.ones(N, c, dtype=torch.int8, device=X.device)

    def run() -> None:
        for a in range(0, m - c + 1, c):
            torch.mm(X, W[0, :, a : a + c], out=Z)
            torch._int_mm(A, A.T)  # noqa: SLF001

    return run


def gram_float(X: Tensor, W: Tensor, signs: Tensor) -> Tensor:
    """Float32 masks in chunks, what one would write without int8."""
    counts, m = X.new_zeros(N, N), W.shape[2]
    for a in range(0, m, 2048):
        A = (X @ W[0, :, a : a + 2048] > 0).float()
        counts += A @ A.T
    return X @ X.T * counts / m


def gram_jacobian(X: Tensor, W: Tensor, signs: Tensor) -> Tensor:
    """``torch.func``: one gradient for each sample, J formed."""

    def f(w: Tensor, x: Tensor) -> Tensor:
        return torch.relu(x @ w) @ signs[0] / math.sqrt(w.shape[1])

    J = torch.func.vmap(torch.func.grad(f), (None, 0))(W[0], X).reshape(N, -1)
    return J @ J.T


def jax_gram() -> dict[str, Callable[..., Any]]:
    import jax
    import jax.numpy as jnp

    def gram(kind: Any) -> Callable[..., Any]:
        @jax.jit
        def run(X: Any, W: Any) -> Any:
            A = (X @ W > 0).astype(kind)
            counts = jax.lax.dot_general(A, A, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            return X @ X.T * counts / W.shape[1]

        return run

    return {"JAX masks float32": gram(jnp.float32), "JAX masks bfloat16": gram(jnp.bfloat16)}


# --- W5: one step -----------------------------------------------------------------------------------------------------


class Step:
    """Our step with the gates kept or found again; the weights go on from call to call."""

    def __init__(self, X: Tensor, W: Tensor, signs: Tensor, y: Tensor, gate_bytes: int) -> None:
        eta = torch.full((1,), ETA, device=X.device)
        self.step, self.params = minimum_norm.WideStep(X, y, signs, eta, gate_bytes=gate_bytes), [W]

    def __call__(self) -> Tensor:
        self.step(self.params, 0, True)
        return self.params[0]


def step_floor(X: Tensor, W: Tensor, signs: Tensor, y: Tensor) -> Callable[[], Any]:
    """Two products for each chunk, into buffers that exist."""
    c, m = 2048, W.shape[2]  # our panels
    Z, U, XT = X.new_zeros(N, c), X.new_empty(D, c), X.T.contiguous()

    def run() -> None:
        for a in range(0, m - c + 1, c):
            torch.mm(X, W[0, :, a : a + c], out=Z)
        for _ in range(0, m - c + 1, c):
            torch.mm(XT, Z, out=U)

    return run


def step_autograd(X: Tensor, W: Tensor, signs: Tensor, y: Tensor, chunk: int = 4096) -> Tensor:
    """Autograd with checkpointed chunks, which bounds its memory."""
    m = W.shape[2]
    live = W[0].detach().requires_grad_()

    def part(w: Tensor, a: Tensor) -> Tensor:
        return torch.relu(X @ w) @ a / math.sqrt(m)

    pieces = zip(live.split(chunk, 1), signs[0].split(chunk), strict=True)
    f = sum(checkpoint(part, w, a, use_reentrant=False) for w, a in pieces)
    (gradient,) = torch.autograd.grad(0.5 * (f - y[0]).square().sum(), live)
    with torch.no_grad():
        return W.sub_(ETA * gradient[None])


def jax_step(X: Tensor, W: Tensor, signs: Tensor, y: Tensor, block: int = 1000) -> Callable[[], Any]:
    """JAX: a scan over blocks of 1,000 neurons, rematerialized."""
    import jax
    import jax.numpy as jnp

    m = W.shape[2]
    X_, y_ = jnp.asarray(X.numpy()), jnp.asarray(y[0].numpy())
    blocks = jnp.asarray(W[0].numpy().reshape(D, m // block, block).transpose(1, 0, 2).copy())
    a_ = jnp.asarray(signs[0].numpy().reshape(m // block, block))

    def loss(w: Any) -> Any:
        @jax.checkpoint
        def add(f: Any, wa: Any) -> Any:
            return f + jnp.maximum(X_ @ wa[0], 0) @ wa[1], None

        f, _ = jax.lax.scan(add, jnp.zeros(len(y_)), (w, a_))
        return 0.5 * ((f / math.sqrt(m) - y_) ** 2).sum()

    move = jax.jit(lambda w: w - ETA * jax.grad(loss)(w), donate_argnums=0)
    state = [blocks]

    def run() -> Any:
        state[0] = move(state[0]).block_until_ready()
        return state[0]

    return run


# --- runs -------------------------------------------------------------------------------------------------------------


def have_jax() -> bool:
    try:
        import jax  # noqa: F401
    except ImportError:
        return False
    return True


def agree(name: str, found: Any, expected: Any, tolerance: float) -> dict[str, Any]:
    """Relative Frobenius distance; a variant that computes something else is not timed."""
    a, b = (np.asarray(t.cpu() if isinstance(t, Tensor) else t, dtype=np.float64) for t in (found, expected))
    distance = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not distance <= tolerance:
        raise SystemExit(f"{name}: relative distance {distance:.2e} exceeds {tolerance:.0e}")
    return {"compared": name, "relative_distance": distance}


def w4(m: int, rounds: int, device: str, nt: str | None) -> tuple[list, list, dict]:
    X, W, signs, _ = problem(m, device)
    narrow = W[:, :, :NARROW].contiguous(), signs[:, :NARROW].contiguous()
    checks = [agree("float32 masks", gram_float(X, W, signs), gram_ours(X, W, signs), 1e-6)]
    exact = minimum_norm.empirical_gram(X.double(), narrow[0].double())[0]
    checks.append(agree("torch.func Jacobian, float64, m = 4,096",
                        gram_jacobian(X.double(), *(t.double() for t in narrow)), exact, 1e-12))  # fmt: skip
    floor = gram_floor(X, W, signs)
    variants = {"ours": lambda: gram_ours(X, W, signs), "floor: int8 products": floor}
    variants["float32 masks"] = lambda: gram_float(X, W, signs)
    if device == "cpu" and have_jax():
        arrays = [np.asarray(t.numpy()) for t in (X, W[0])]
        for name, function in jax_gram().items():
            checks.append(agree(name, function(*arrays), gram_ours(X, W, signs), 1e-3))
            variants[name] = lambda f=function: f(*arrays).block_until_ready()
    times = harness.alternate(variants, rounds, device)
    slow = harness.alternate({"torch.func Jacobian": lambda: gram_jacobian(X, *narrow)}, max(1, rounds // 3), device)
    rows = [{"workload": "W4", "variant": n, "seconds": statistics.median(t)} for n, t in times.items()]
    rows.append({"workload": "W4", "variant": "torch.func Jacobian (m = 4,096, scaled)",
                 "seconds": statistics.median(slow["torch.func Jacobian"]) * m / NARROW})  # fmt: skip
    versions = {}
    if nt:
        versions, found, more = neural_tangents(nt, X, *narrow, rounds=3 if rounds > 3 else 1)
        checks += more
        name = "neural-tangents, implementation {} (m = 4,096, scaled)"
        rows += [{"workload": "W4", "variant": name.format(i), "seconds": t * m / NARROW} for i, t in found.items()]
    for row in rows:
        row["of_ours"] = row["seconds"] / rows[0]["seconds"]
    return rows, checks, {"times": times, "neural_tangents": versions}


def neural_tangents(python: str, X: Tensor, W: Tensor, signs: Tensor, rounds: int) -> tuple[dict, dict, list]:
    """Run the other environment's interpreter; compare its empirical and its analytic kernel with ours."""
    g = torch.Generator().manual_seed(1)
    X64 = data.sphere(200, D, g)
    X64[1] = X64[0] + 1e-5 * X64[2]  # near-duplicates
    X64[1] /= torch.linalg.vector_norm(X64[1])
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "given.npz", Path(folder) / "result.npz"
        np.savez(given, X=X.cpu().numpy(), W=W[0].cpu().numpy(), a=signs[0].cpu().numpy(), X64=X64.numpy())
        command = [python, "-c", NT, str(given), str(result), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        out, arrays = json.loads(done.stdout.strip().splitlines()[-1]), np.load(result)
        checks = [agree("neural-tangents empirical, float32", arrays["G"], minimum_norm.empirical_gram(X, W)[0], 1e-3)]
        largest = float(np.abs(arrays["H"] - kernels.relu_ntk(X64).numpy()).max())
    if largest > 1e-6:
        raise SystemExit(f"neural-tangents analytic kernel: largest difference {largest:.1e} exceeds 1e-6")
    checks.append({"compared": "neural-tangents analytic kernel", "largest_difference": largest})
    return {k: out[k] for k in ("jax", "neural_tangents")}, out["seconds"], checks


def step_variants(m: int, device: str) -> dict[str, Callable[[], Any]]:
    X, W, signs, y = problem(m, device)
    variants = {
        "ours, gates kept": Step(X, W.clone(), signs, y, 2**62),
        "ours, recompute": Step(X, W.clone(), signs, y, 0),
        "floor: two torch.mm": step_floor(X, W, signs, y),
        "autograd, checkpointed chunks": partial(step_autograd, X, W.clone(), signs, y),
    }
    if device == "cpu" and have_jax():
        variants["JAX scan, remat"] = jax_step(X, W, signs, y)
    return variants


def w5(m: int, rounds: int, device: str) -> tuple[list, list, dict]:
    variants = step_variants(m, device)
    W = problem(m, device)[1][0]
    reference = variants["autograd, checkpointed chunks"]()[0] - W
    checks = []
    for name, function in variants.items():
        if name.startswith("ours"):
            checks.append(agree(f"{name}, the update of one step, m = {m}", function()[0] - W, reference, 2e-2))
        if name.startswith("JAX"):
            moved = np.asarray(function()).transpose(1, 0, 2).reshape(D, m) - W.numpy()
            checks.append(agree(f"{name}, the update of one step, m = {m}", moved, reference, 2e-2))
    times = harness.alternate(variants, rounds, device)
    rows = []
    for name, t in times.items():
        row = {"workload": f"W5, m = {m}", "variant": name, "seconds": statistics.median(t)}
        row["of_floor"] = harness.ratio(times, name, "floor: two torch.mm")
        row["of_ours"] = harness.ratio(times, name, "ours, gates kept")
        rows.append(row)
    return rows, checks, times


def memory(workload: str, m: str, variant: str) -> float | None:
    return harness.peak_memory(__file__, [workload, m, variant])


def measure_memory(workload: str, m: int, variant: str) -> float:
    """Growth of this fresh process during one call; libraries load their code on a small problem first."""
    if workload == "W4":
        X, W, signs, _ = problem(m)
        gram_ours(X, W[:, :, :4096], signs)
        return harness.growth(lambda: gram_ours(X, W, signs))
    gate_bytes = 2**62 if variant == "kept" else 0
    X, W, signs, y = problem(8192)
    Step(X, W, signs, y, gate_bytes)()
    X, W, signs, y = problem(m)
    return harness.growth(lambda: Step(X, W, signs, y, gate_bytes)())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes, nothing written")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--nt", metavar="PYTHON", help="an interpreter that has neural-tangents")
    parser.add_argument("--memory", nargs=3, metavar=("WORKLOAD", "M", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        workload, m, variant = options.memory
        print(measure_memory(workload, int(m), variant))
        return
    rounds, device = (1 if options.quick else 7), options.device
    rows, checks, extra = w4(20_480 if options.quick else 100_000, rounds, device, options.nt)
    targets = [
        harness.target(
            "W4 ours / int8 products", harness.ratio(extra["times"], "ours", "floor: int8 products"), "<=", 1.15
        )
    ]
    if "JAX masks bfloat16" in extra["times"]:
        faster = min(harness.ratio(extra["times"], f"JAX masks {k}", "ours") for k in ("float32", "bfloat16"))
        targets.append(harness.target("W4 fastest JAX masks / ours", faster, ">=", 2.0))
    tangents = [r["of_ours"] for r in rows if r["variant"].startswith("neural-tangents")]
    if tangents:
        targets.append(harness.target("W4 fastest neural-tangents / ours", min(tangents), ">=", 150))
    for m in (20_000,) if options.quick else (100_000, 1_000_000):
        more, compared, times = w5(m, max(1, rounds // (1 if m <= 100_000 else 2)), device)
        rows, checks = rows + more, checks + compared
        floor, peer = "floor: two torch.mm", "autograd, checkpointed chunks"
        targets.append(
            harness.target(f"W5 m={m} kept / floor", harness.ratio(times, "ours, gates kept", floor), "<=", 1.35)
        )
        targets.append(
            harness.target(f"W5 m={m} autograd / ours", harness.ratio(times, peer, "ours, gates kept"), ">=", 1.7)
        )
    peaks = {}
    if device == "cpu" and not options.quick:
        peaks = {"W4": memory("W4", "100000", "-")}
        peaks |= {f"W5 m=1e6, {v}": memory("W5", "1000000", v) for v in ("kept", "recompute")}
        for name, goal in (("W4", 40), ("W5 m=1e6, recompute", 300)):
            if peaks[name] is not None:
                targets.append(harness.target(f"{name} peak MB", peaks[name], "<=", goal))
    for workload in dict.fromkeys(r["workload"] for r in rows):
        print(harness.table([r for r in rows if r["workload"] == workload]), "\n")
    print(harness.table([t | {"missed_by_factor": t["missed_by_factor"]} for t in targets]))
    if not options.quick:
        result = {
            "what": "Gram matrix (W4) and one descent step (W5) of a wide layer, N = 500, d = 64, float32; "
            "CPU seconds (GPU: wall), medians of the rounds",
            "machine": harness.machine(1, device, ["jax"]) | {"neural_tangents": extra["neural_tangents"]},
            "rows": rows, "peak_mb": peaks, "targets": targets, "checks": checks,
        }  # fmt: skip
        name = "minimum_norm" if device == "cpu" else "minimum_norm_gpu"
        print(harness.write(name, result).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
