"""What the tests of several modules share: slow twins in exact fractions, matrices of known kind, flushed numbers."""

import contextlib
import math
from fractions import Fraction

import pytest
import torch

from companion import rigor


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


def gram(A):
    rows = rigor.to_fractions(A)
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
    return sum((a * a for row in rigor.to_fractions(A) for a in row), Fraction(0))


def exact_product(A, B):
    columns = list(zip(*rigor.to_fractions(B), strict=True))
    return [
        [sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) for y in columns] for x in rigor.to_fractions(A)
    ]


@contextlib.contextmanager
def flushing():
    """In this thread numbers below 2^-1022 are zero, as operands and as results."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
