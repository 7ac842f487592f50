"""The certificates of lesson 3: a proof that sigma_min > 0 beside what a user would compute, and N = 60,000 samples.

W6: the rows of F, 2000 x 2100 float64 ReLU features, are independent. `verified.sigma_min_lower` proves it; Cholesky,
eigenvalues, singular values and `matrix_rank` compute without proof; python-flint's rank modulo a prime proves it too.

Expressivity: `certify_expressivity` for a BN-ResNet and a perceptron at their initial values on 60,000 images of 14 x
14 pixels: synthetic ones (scikit-learn's digits, enlarged, moved and with noise), or a user's IDX folder, pooled.

    python benchmarks/beyond_ntk.py                # writes results/beyond_ntk.json, about twenty minutes
    python benchmarks/beyond_ntk.py --quick        # a smoke run: few rounds, 2,000 images, nothing written
    python benchmarks/beyond_ntk.py --idx FOLDER   # the 60,000 images of this folder instead
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import _harness as harness
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import beyond_ntk as by
from companion import data, networks, rigor

N, M = 2000, 2100
PRIME = 8388593
SIDE, IMAGES, WIDE = 14, 60_000, 61_440


def softplus() -> nn.Module:
    return networks.Softplus(10.0)


# --- W6: a proof of full rank -----------------------------------------------------------------------------------------


def features(n: int = N, m: int = M) -> Tensor:
    """ReLU features of random inputs with a bias, condition number about 10^4."""
    g = torch.Generator().manual_seed(0)
    X = data.sphere(n, 64, g)
    W, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((64, m), (m,)))
    return torch.relu(X @ W + b)


def product(A: Tensor, out: Tensor) -> Tensor:
    """The floor: one product of F with its transpose, into a buffer that exists."""
    return torch.mm(A, A.T, out=out)


def ours(A: Tensor, method: str = "auto") -> float:
    """The public call: a lower bound on sigma_min that is a theorem about the floats of A."""
    return rigor.sigma_min_lower(A, method=method)


def cholesky(A: Tensor) -> float:
    """``A A^T`` has a floating-point Cholesky factor: no proof, and with a duplicated row it often has one too."""
    L, info = torch.linalg.cholesky_ex(A @ A.T)
    return float(L.diagonal().min()) if int(info) == 0 else 0.0


def eigvalsh(A: Tensor) -> float:
    """The square root of the least eigenvalue of ``A A^T``, in floating point."""
    return max(0.0, float(torch.linalg.eigvalsh(A @ A.T)[0])) ** 0.5


def svdvals(A: Tensor) -> float:
    """The least singular value, in floating point."""
    return float(torch.linalg.svdvals(A)[-1])


def matrix_rank(A: Tensor) -> int:
    """NumPy's numerical rank."""
    return int(np.linalg.matrix_rank(A.numpy()))


def flint_rank(A: Tensor) -> int | None:
    """The exact rank modulo a prime of the floats times a power of two (python-flint), conversion included."""
    try:
        import flint
    except ImportError:
        return None
    mantissa, exponent = np.frexp(A.numpy())
    integers = (mantissa * 2.0**53).astype(np.int64) % PRIME  # exact: below 2^23, so that no product overflows
    powers = np.array([pow(2, int(e), PRIME) for e in range(int(exponent.max() - exponent.min()) + 1)])
    residues = integers * powers[exponent - exponent.min()] % PRIME
    return flint.nmod_mat(*A.shape, residues.ravel().tolist(), PRIME).rank()


def compare_numbers(A: Tensor) -> dict[str, Any]:
    """Refuse to time anything that disagrees: bounds below sigma_min, ranks equal to the number of rows."""
    sigma, n = svdvals(A), len(A)
    found: dict[str, Any] = {"sigma_min": sigma, "condition": float(torch.linalg.matrix_norm(A, 2)) / sigma}
    for method in ("auto", "shift", "inverse"):
        bound = found[f"bound_{method}"] = ours(A, method)
        if not 0.5 * sigma < bound <= sigma * (1 + 1e-9):
            raise SystemExit(f"the bound {bound} by {method} does not fit sigma_min = {sigma}")
    if abs(eigvalsh(A) / sigma - 1) > 1e-3 or matrix_rank(A) != n or flint_rank(A) not in (n, None):
        raise SystemExit("the peers disagree about the rank")
    return found


def full_rank(rounds: int, n: int, m: int) -> dict[str, Any]:
    """Time the proof and its peers in turn."""
    A = features(n, m)
    found, buffer = compare_numbers(A), torch.empty(n, n, dtype=torch.float64)
    variants: dict[str, Callable[[], Any]] = {
        "floor: one torch.mm": partial(product, A, buffer),
        "ours (proof)": partial(ours, A),
        "ours, inverse (proof)": partial(ours, A, "inverse"),
        "Cholesky": partial(cholesky, A),
        "eigvalsh": partial(eigvalsh, A),
        "numpy matrix_rank": partial(matrix_rank, A),
        "svdvals": partial(svdvals, A),
    }
    if flint_rank(A[:4, :4]) is not None:
        variants["flint, rank mod p (proof)"] = partial(flint_rank, A)
    times = harness.alternate(variants, rounds)
    rows = [
        {
            "variant": name,
            "seconds": statistics.median(times[name]),
            "of_one_product": harness.ratio(times, name, "floor: one torch.mm"),
            "of_ours": harness.ratio(times, name, "ours (proof)"),
        }
        for name in variants
    ]
    print(harness.table(rows), flush=True)
    over = harness.ratio(times, "ours (proof)", "floor: one torch.mm")
    gain = harness.ratio(times, "svdvals", "ours (proof)")
    targets = [
        harness.target("W6: ours / one torch.mm", over, "<=", 3.2),
        harness.target("W6: svdvals / ours", gain, ">=", 2.0),
    ]
    return {"shape": [n, m], "numbers": found, "rows": rows, "targets": targets}


# --- Expressivity of 60,000 images ------------------------------------------------------------------------------------


def images(n: int, folder: str | None) -> tuple[Tensor, str]:
    """n images ``(n, 196)``: of an IDX folder, 28 x 28 pooled to 14 x 14, or synthetic ones."""
    if folder:
        X = data.load_idx(folder).X[:n]
        side = int(X.shape[1] ** 0.5)
        pooled = F.avg_pool2d(X.reshape(len(X), 1, side, side), side // SIDE)
        return pooled.flatten(1), Path(folder).name
    g = torch.Generator().manual_seed(0)
    small = data.digits(centre=False, normalize=False).X.reshape(-1, 1, 8, 8)
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear")
    chosen = torch.randint(0, len(large), (n,), generator=g)
    moves = torch.randint(-2, 3, (n, 2), generator=g)
    X = torch.stack([large[i, 0].roll(tuple(move), (0, 1)) for i, move in zip(chosen, moves.tolist(), strict=True)])
    X = X + 0.05 * torch.randn(X.shape, generator=g, dtype=X.dtype)
    return (X.clamp(0, 1) * 255).round().flatten(1) / 255, "synthetic"


def both_networks(wide: int) -> dict[str, nn.Module]:
    """The two networks, at their initial values."""
    g = torch.Generator().manual_seed(0)
    return {
        "BN-ResNet 16-16-32": by.conv_resnet((1, SIDE, SIDE), (16, 16, 32), wide, 10, activation=softplus, generator=g),
        "perceptron 64-32": by.mlp((SIDE * SIDE, 64, 32, wide, 10), activation=softplus, generator=g),
    }


def expressive(n: int, wide: int, folder: str | None) -> dict[str, Any]:
    """The certificate and its parts, once each: CPU seconds, pairs inspected, radius."""
    X, source = images(n, folder)
    rows = []
    for name, model in both_networks(wide).items():
        made: list[Any] = []
        total = harness.seconds(lambda model=model, made=made: made.append(by.certify_expressivity(model, X)))
        (certificate,) = made
        ball: list[Any] = []
        passes = harness.seconds(lambda m=model, b=ball: b.append(rigor.enclose(m, X, before=m.wide)))
        apart: list[Any] = []
        sort = harness.seconds(lambda b=ball[0], a=apart: a.append(by.separation(*b)))
        rows.append(
            {
                "network": name,
                "images": source,
                "N": len(X),
                "m": wide,
                "holds": certificate.holds,
                "reason": certificate.reason,
                "seconds": total,
                "of_which_enclosure": passes,
                "of_which_separation": sort,
                "pairs_inspected": apart[0].inspected,
                "unresolved": apart[0].unresolved,
                "largest_radius": float(ball[0][1].max()),
                "largest_error": float(apart[0].error.max()),
            }
        )
        print(harness.table(rows[-1:]), flush=True)
    if folder:
        return {"rows": rows, "targets": []}
    slowest = max(row["seconds"] for row in rows) / 60
    found = [harness.target(f"expressivity of {n} images: minutes on one core", slowest, "<=", 6.0)]
    return {"rows": rows, "targets": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes, nothing written")
    parser.add_argument("--idx", metavar="FOLDER", help="a folder of IDX files instead of synthetic images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank = full_rank(2, 400, 420) if options.quick else full_rank(9, N, M)
    sizes = (2000, 2048) if options.quick else (IMAGES, WIDE)
    separate = expressive(*sizes, options.idx)
    result = {
        "what": "proofs of lesson 3, CPU seconds, medians of the rounds (expressivity: one run)",
        "machine": harness.machine(1, packages=["python-flint", "scipy"]),
        "W6": rank,
        "expressivity": separate,
        "targets": rank["targets"] + separate["targets"],
    }
    print(harness.table(result["targets"]))
    if not options.quick:
        name = "beyond_ntk" if not options.idx else f"beyond_ntk_{Path(options.idx).name}"
        print(harness.write(name, result).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
