"""Exact arithmetic on stored floats: each is the rational number it is, and one elimination without fractions.

Everything here runs in Python's whole numbers, needs no library, and its cost grows with the length of the numbers: it
is for matrices of a few dozen rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.rigor.rounding import MAGNITUDE, checked

__all__ = ["exact_rank", "exact_sigma_min_exceeds", "null_space", "whole_numbers"]


def whole_numbers(A: Float[Tensor, "n m"]) -> tuple[list[list[int]], int]:
    """Write ``A = 2^e M`` with whole numbers M, read from the bits of the floats.

    Args:
        A: float64 matrix ``(n, m)``, finite.

    Returns:
        M as n lists of m whole numbers, and e.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity.
    """
    bits = checked(A).contiguous().view(torch.int64)
    field = (bits & MAGNITUDE) >> 52
    size = (bits & (2**52 - 1)) + torch.where(field > 0, 2**52, 0)
    mantissas, exponents = torch.where(bits < 0, -size, size), field.clamp(min=1) - 1075
    least = int(exponents[size > 0].min()) if bool((size > 0).any()) else 0
    pairs = (zip(*rows, strict=True) for rows in zip(mantissas.tolist(), exponents.tolist(), strict=True))
    return [[m << max(0, e - least) for m, e in row] for row in pairs], least


# --- Elimination ------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A pivot: its column, its value, and whether it stood on the diagonal."""

    column: int
    pivot: int
    diagonal: bool


def _eliminate(M: list[list[int]], above: bool = False) -> Iterator[_Step]:
    """Bring `M` to echelon form in place, pivot by pivot, in whole numbers: every division is exact (Bareiss).

    Without an exchange pivot k is the leading principal minor of order k. With `above` the rows above a pivot are
    cleared too, and all pivots are equal in the end (Gauss-Jordan).
    """
    previous, lead = 1, 0
    for column in range(len(M[0])):
        found = next((r for r in range(lead, len(M)) if M[r][column]), None)
        if found is None:
            continue
        M[lead], M[found] = M[found], M[lead]
        top = M[lead]
        pivot = top[column]
        yield _Step(column, pivot, found == lead == column)
        for r in range(0 if above else lead + 1, len(M)):
            if r != lead:
                head = M[r][column]
                M[r] = [(pivot * a - head * b) // previous for a, b in zip(M[r], top, strict=True)]
        previous, lead = pivot, lead + 1
        if lead == len(M):
            return


def exact_rank(A: Float[Tensor, "n m"]) -> int:
    """Compute the rank of the stored floats; a few rows are tried first.

    Args:
        A: float64 matrix ``(n, m)``, finite.

    Returns:
        The rank.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity.
    """
    rows = whole_numbers(A)[0]
    few, columns = 3 * A.shape[1], sum(map(any, zip(*rows, strict=True)))
    if len(rows) > few and sum(1 for _ in _eliminate([*rows[:few]])) == columns:
        return columns
    return sum(1 for _ in _eliminate(rows))


def null_space(A: Sequence[Sequence[Fraction | int]]) -> list[list[Fraction]]:
    """Compute a basis of ``{z : A z = 0}`` over the rationals.

    Args:
        A: n rows of m rational numbers.

    Returns:
        ``m - rank A`` vectors of m fractions, each with a 1 at its free column.
    """
    rows = [[Fraction(a) for a in row] for row in A]
    scale = math.lcm(*(a.denominator for row in rows for a in row))
    M = [[int(a * scale) for a in row] for row in rows]
    steps = list(_eliminate(M, above=True))
    lead = [step.column for step in steps]
    basis = []
    for free in (c for c in range(len(M[0])) if c not in lead):
        z = [Fraction(0)] * len(M[0])
        z[free] = Fraction(1)
        for r, c in enumerate(lead):
            z[c] = Fraction(-M[r][free], steps[-1].pivot)
        basis.append(z)
    return basis


def exact_sigma_min_exceeds(A: Float[Tensor, "n m"], s: float | Fraction) -> bool:
    """Decide ``sigma_min(A) > s`` exactly: all leading minors of ``A A^T - s^2 I`` are positive.

    Args:
        A: float64 matrix ``(n, m)``, finite. With n > m the answer is always False.
        s: a nonnegative number; a float is taken as the rational it is.

    Returns:
        True exactly when ``sigma_min(A) > s``.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity, or a negative or non-finite `s`.

    Source: Sylvester's criterion; Bareiss (1968), fraction-free elimination.
    """
    if not isinstance(s, float | int | Fraction):
        raise TypeError(f"s is a {type(s).__name__}; a number is needed")
    if not (isinstance(s, Fraction | int) or math.isfinite(s)) or s < 0:
        raise ValueError(f"s is {s}; a finite number >= 0 is needed")
    rows, exponent = whole_numbers(A)
    square = (Fraction(s) / Fraction(2) ** exponent) ** 2
    gram = [[square.denominator * sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    for i, row in enumerate(gram):
        row[i] -= square.numerator
    positive = 0
    for step in _eliminate(gram):
        if not (step.diagonal and step.pivot > 0):
            return False
        positive += 1
    return positive == len(gram)
