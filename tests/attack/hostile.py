"""Numbers that do not want to be computed with, and exact arithmetic on them in python-flint."""

from __future__ import annotations

import math
from typing import Any

import flint
import numpy as np
import torch
from flint import arb, fmpq, fmpq_mat
from torch import Tensor

FINE = fmpq(1, 10**40)  # a bound may be equal to what it bounds


def _near(rng: np.random.Generator, A: np.ndarray) -> np.ndarray:
    """Two rows that are equal, or parallel, or a few last bits from that."""
    A[-1] = A[0] * (1.0 if rng.random() < 0.5 else 2.5)
    return A if rng.random() < 0.5 else np.nextafter(A, A + rng.integers(-1, 2, size=A.shape))


KINDS = {
    "normal": lambda rng, A: A,
    "scaled": lambda rng, A: A * 10.0 ** rng.integers(-300, 150),
    "subnormal": lambda rng, A: np.ldexp(A, int(rng.integers(-1074, -1000))),
    "large": lambda rng, A: np.ldexp(A, int(rng.integers(900, 1020))),
    "mixed": lambda rng, A: A * 10.0 ** rng.integers(-160, 150, size=A.shape),
    "small integers": lambda rng, A: rng.integers(-3, 4, size=A.shape).astype(float),
    "large integers": lambda rng, A: rng.integers(-(2**53), 2**53, size=A.shape).astype(float),
    "hilbert": lambda rng, A: 1 / (1.0 + sum(np.indices(A.shape))) * 2.0 ** rng.integers(-500, 500),
    "near": _near,
    "float32": lambda rng, A: A.astype(np.float32).astype(float),
    "identity": lambda rng, A: np.eye(len(A), A[0].size).reshape(A.shape) + 10.0 ** rng.integers(-17, -1) * A,
    "rows": lambda rng, A: A * 10.0 ** rng.integers(-320, 300, size=(len(A), *[1] * (A.ndim - 1))),
    "least": lambda rng, A: rng.integers(0, 5, size=A.shape) * 5e-324,
    "rank one": lambda rng, A: A[:, :1] * A[:1] + A * 10.0 ** rng.integers(-18, -6) if A.ndim == 2 else A,
}


def numbers(rng: np.random.Generator, *shape: int, kind: str = "") -> Tensor:
    """Finite float64 numbers of one of the `KINDS`."""
    kind = kind or str(rng.choice(list(KINDS)))
    with np.errstate(all="ignore"):
        A = KINDS[kind](rng, rng.standard_normal(shape))
    return torch.from_numpy(np.where(np.isfinite(A), A, 1.5e308).astype(float)).reshape(shape)


def tame(A: Tensor, largest: float = 1e140) -> Tensor:
    """The same with entries no larger than `largest`, for what is documented to overflow."""
    return A.clamp(-largest, largest)


# --- Exact values -----------------------------------------------------------------------------------------------------


def rational(x: float) -> fmpq:
    """The rational number that a float is."""
    return fmpq(*x.as_integer_ratio())


def exactly(A: Tensor) -> np.ndarray:
    """An array of rational numbers, on which numpy's operations work."""
    out = np.empty(tuple(A.shape), dtype=object)
    out.ravel()[:] = [rational(x) for x in A.double().flatten().tolist()]
    return out


def rational_matrix(A: Tensor) -> fmpq_mat:
    return fmpq_mat(*A.shape, [rational(x) for x in A.double().flatten().tolist()])


def balls(A: np.ndarray | Tensor) -> np.ndarray:
    """The same array as balls of the present precision."""
    A = exactly(A) if isinstance(A, Tensor) else A
    return np.vectorize(arb, otypes=[object])(A)


def surely_above(x: Any, y: Any) -> bool:
    """Whether ``x > y`` for certain, for rational numbers, balls and floats, infinite ones too."""
    if isinstance(x, float) or isinstance(y, float):
        if x == -math.inf or y == math.inf:
            return False
        if x == math.inf or y == -math.inf:
            return True
        x, y = (rational(t) if isinstance(t, float) else t for t in (x, y))
    return bool(x > y)


def positive_definite(M: Any) -> bool | None:
    """Whether a symmetric matrix (rational or of balls) is positive definite; None where balls cannot say."""
    n = len(M)
    M = [list(row) for row in M]
    for k in range(n):
        if not M[k][k] > 0:
            return False if M[k][k] <= 0 else None
        for i in range(k + 1, n):
            q = M[i][k] / M[k][k]
            for j in range(k + 1, n):
                M[i][j] = M[i][j] - q * M[k][j]
    return True


def gram_rows(A: np.ndarray) -> np.ndarray:
    """``A A^T`` of an array of exact numbers."""
    return A.dot(A.T)


def sigma_min_at_least(A: np.ndarray, s: float) -> bool | None:
    """Whether ``sigma_min(A) >= s``, up to one part in 10^40, for the rows of an exact array."""
    square = rational(s) ** 2 * (1 - FINE)
    return positive_definite(gram_rows(A) - _diagonal(square, len(A)))


def norm_at_most(A: np.ndarray, s: float) -> bool | None:
    """Whether ``||A||_2 <= s``, up to one part in 10^40."""
    A = A if A.shape[0] <= A.shape[1] else A.T
    square = rational(s) ** 2 * (1 + FINE)
    return positive_definite(_diagonal(square, len(A)) - gram_rows(A))


def _diagonal(value: fmpq, n: int) -> np.ndarray:
    out = np.full((n, n), fmpq(0), dtype=object)
    np.fill_diagonal(out, value)
    return out


def precision(bits: int) -> None:
    """Set the precision of all balls."""
    flint.ctx.prec = bits
