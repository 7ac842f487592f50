"""What the tests of several modules share: slow twins in exact fractions, matrices of known kind, flushed numbers."""

import contextlib
import math
from fractions import Fraction

import pytest
import torch


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def gaussian(n, m, seed):
    return torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conditioned(n, m, kappa, seed):
    """A matrix whose singular values run from 1 to 1/kappa, up to the rounding of its making."""
    U, V = torch.linalg.qr(gaussian(n, n, seed))[0], torch.linalg.qr(gaussian(m, n, seed + 1))[0]
    return (U * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64)) @ V.T


def hilbert(n, m=None):
    i, j = torch.arange(n, dtype=torch.float64), torch.arange(m or n, dtype=torch.float64)
    return 1 / (i[:, None] + j + 1)


def singular(A):
    return torch.linalg.svdvals(A).tolist()


# --- Exact oracles ----------------------------------------------------------------------------------------------------


def fractions(A):
    """Every float of a matrix as the rational number it is."""
    return [[Fraction(a) for a in row] for row in A.tolist()]


def gram(A):
    rows = fractions(A)
    return [[sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) for y in rows] for x in rows]


def positive_definite(M):
    """``L D L^T`` in fractions, column by column: the slow twin of the elimination in integers."""
    M = [list(row) for row in M]
    for k in range(len(M)):
        if M[k][k] <= 0:
            return False
        for i in range(k + 1, len(M)):
            factor = M[i][k] / M[k][k]
            M[i] = [a - factor * b for a, b in zip(M[i], M[k], strict=True)]
    return True


def shifted(M, sign, square):
    """``sign * M + square I``."""
    return [[sign * a + (square if i == j else 0) for j, a in enumerate(row)] for i, row in enumerate(M)]


def norm_below(A, s):
    """Whether ``||A||_2 < s``, exactly."""
    return positive_definite(shifted(gram(A), -1, Fraction(s) ** 2))


def frobenius_square(A):
    return sum((a * a for row in fractions(A) for a in row), Fraction(0))


def exact_product(A, B):
    columns = list(zip(*fractions(B), strict=True))
    return [[sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) for y in columns] for x in fractions(A)]


@contextlib.contextmanager
def flushing():
    """In this thread numbers below 2^-1022 are zero, as operands and as results."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def theorem_c(w, phi, alpha_0, R_0, C, epsilon):
    """Theorem C as it is stated, for Python numbers or fractions; layers are counted from 1, index 0 is unused."""
    L = len(w)
    w, C, d = [0, *w], [0, *C], [0] * L
    bar = [a + b for a, b in zip(w, C, strict=True)]
    for l in range(1, L):
        d[l] = d[l - 1] * bar[l] + phi[l - 1] * C[l]
    g = [0] + [(phi[l - 1] + d[l - 1]) * math.prod(bar[l + 1 :]) for l in range(1, L + 1)]
    alpha = alpha_0 - d[L - 1]
    B = sum(g[l] ** 2 for l in range(1, L))
    rho = (1 - epsilon) * alpha**2 - B
    T = [g[l] * R_0 / rho for l in range(1, L)] + [alpha * R_0 / rho]
    phi_bar = phi[L - 1] + d[L - 1]
    return {"d": d[L - 1], "phi": phi_bar, "alpha": alpha, "B": B, "rho": rho, "T": T, "eta": 2 * epsilon / phi_bar**2}


def theorem_p(w, X_F, alpha_0, R_0, C):
    """Theorem P as it is stated: the three left sides over their right sides, and the largest step."""
    L = len(w)
    bar = [a + b for a, b in zip(w, C, strict=True)]
    P = [math.prod(bar[:l] + bar[l + 1 :]) for l in range(L)]
    S = sum(P[l] ** 2 for l in range(L - 1)) / bar[-1] ** 2
    ratios = [
        alpha_0**2 / (16 * X_F * R_0 * max(P[l] / C[l] for l in range(L))),
        alpha_0**3 / (32 * X_F**2 * bar[-1] * S * R_0),
        alpha_0**2 / (16 * X_F**2 * bar[-1] ** 2 * S),
    ]
    phi_bar = X_F * math.prod(bar[:-1])
    hidden, every = sum(b**-2 for b in bar[:-1]), sum(b**-2 for b in bar)
    return ratios, min(8 / alpha_0**2, hidden / (phi_bar**2 * bar[-1] ** 2 * every**2))
