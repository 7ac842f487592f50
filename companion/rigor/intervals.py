"""Interval arithmetic on float64 tensors: every true value lies between two stored floats.

The two ends are torch tensors of one shape. Assumed of the machine: float64 additions, subtractions, products,
quotients and square roots round to nearest (IEEE 754); each result is then moved one float outward. Nothing is assumed
of `exp`: it is a Taylor polynomial in interval arithmetic after the argument is reduced by a multiple of log 2, with
its remainder bounded. Sums in any order obey ``|fl(sum) - sum| <= gamma_k sum|.|`` (see `companion.verified`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from companion.rigor.linear_algebra import gamma

__all__ = ["Interval", "cat", "point"]

# log 2 = LN2 + rest, 0 < rest < LN2_REST; LN2 has 32 bits, so that small multiples of it are exact
LN2 = 2977044471 / 2**32
LN2_REST = (1.90821492927058775e-10, 1.90821492927058790e-10)
_TERMS = 18


def _down(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -math.inf))


def _up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))


@dataclass(frozen=True)
class Interval:
    """All numbers between `lo` and `hi`, entry by entry; the operations enclose every possible result.

    Args:
        lo: lower ends, float64.
        hi: upper ends, the same shape.
    """

    lo: Tensor
    hi: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.lo.shape

    def __getitem__(self, index: object) -> Interval:
        return Interval(self.lo[index], self.hi[index])

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __add__(self, other: Interval | float) -> Interval:
        other = _lift(other, self)
        return Interval(_down(self.lo + other.lo), _up(self.hi + other.hi))

    def __sub__(self, other: Interval | float) -> Interval:
        return self + (-_lift(other, self))

    def __rsub__(self, other: float) -> Interval:
        return _lift(other, self) + (-self)

    def __mul__(self, other: Interval | float) -> Interval:
        other = _lift(other, self)
        ends = [a * b for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        least = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
        most = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
        return Interval(_down(least), _up(most))

    __radd__, __rmul__ = __add__, __mul__

    def reciprocal(self) -> Interval:
        """``1 / x`` for intervals of positive numbers."""
        if not bool((self.lo > 0).all()):
            raise ZeroDivisionError("reciprocal of an interval that is not positive")
        return Interval(_down(1 / self.hi), _up(1 / self.lo))

    def square(self) -> Interval:
        """``x^2``, never below 0."""
        a, b = self.lo * self.lo, self.hi * self.hi
        inside = (self.lo <= 0) & (self.hi >= 0)
        least = torch.where(inside, torch.zeros_like(a), torch.minimum(a, b))
        return Interval(_down(least).clamp_min(0), _up(torch.maximum(a, b)))

    def sqrt(self) -> Interval:
        """The square root of nonnegative numbers; a lower end below 0 counts as 0."""
        return Interval(_down(self.lo.clamp_min(0).sqrt()).clamp_min(0), _up(self.hi.sqrt()))

    def sum(self, dim: int) -> Interval:
        """The sum over one axis, in any order."""
        k = gamma(self.lo.shape[dim] + 4)
        lo, hi = self.lo.sum(dim), self.hi.sum(dim)
        low_error, high_error = (k * end.abs().sum(dim) * (1 + 2 * k) for end in (self.lo, self.hi))
        return Interval(_down(lo - _up(low_error)), _up(hi + _up(high_error)))

    def exp(self) -> Interval:
        """``e^x``: the lower end of ``e^lo`` and the upper end of ``e^hi``, as exp is increasing."""
        return Interval(_exp(self.lo).lo, _exp(self.hi).hi)

    def tanh(self) -> Interval:
        """``1 - 2 / (1 + e^{2x})``."""
        return (1.0 - 2.0 * (1.0 + (2.0 * self.clamp(-40.0, 40.0)).exp()).reciprocal()).clamp(-1.0, 1.0)

    def clamp(self, least: float, most: float) -> Interval:
        """Both ends clamped; an enclosure of the clamped numbers."""
        return Interval(self.lo.clamp(least, most), self.hi.clamp(least, most))

    def unsqueeze(self, dim: int) -> Interval:
        return Interval(self.lo.unsqueeze(dim), self.hi.unsqueeze(dim))

    def flatten(self, start: int) -> Interval:
        return Interval(self.lo.flatten(start), self.hi.flatten(start))

    def expand(self, *shape: int) -> Interval:
        return Interval(self.lo.expand(shape), self.hi.expand(shape))

    def magnitude(self) -> Tensor:
        """The largest absolute value in each interval."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    def split(self) -> tuple[Tensor, Tensor]:
        """A midpoint and a radius with the interval inside ``midpoint +- radius``."""
        mid = self.lo / 2 + self.hi / 2
        return mid, torch.maximum(_up(mid - self.lo), _up(self.hi - mid))


def _lift(value: Interval | float, like: Interval) -> Interval:
    if isinstance(value, Interval):
        return value
    number = torch.as_tensor(value, dtype=like.lo.dtype)
    return Interval(number, number)


def point(value: Tensor | float | Fraction) -> Interval:
    """The interval of one number: exact for floats and tensors, two neighbouring floats for a fraction."""
    if isinstance(value, Fraction):
        near = float(value)
        exact = Fraction(near) == value
        ends = (near if exact else math.nextafter(near, side) for side in (-math.inf, math.inf))
        return Interval(*(torch.tensor(end, dtype=torch.float64) for end in ends))
    number = torch.as_tensor(value, dtype=torch.float64)
    return Interval(number, number)


def cat(parts: list[Interval], dim: int) -> Interval:
    """Join intervals along an axis."""
    return Interval(torch.cat([p.lo for p in parts], dim), torch.cat([p.hi for p in parts], dim))


def _exp(x: Tensor) -> Interval:
    """Enclose ``e^x`` for floats x: ``2^k sum_j r^j / j!`` with ``r = x - k log 2`` and the remainder bounded."""
    inside = x.clamp(-700.0, 700.0)
    k = torch.round(inside / LN2)
    # k LN2 is exact: 11 + 32 bits
    r = point(inside) - point(k * LN2) - point(k) * Interval(*(x.new_tensor(end) for end in LN2_REST))
    total = point(Fraction(1, math.factorial(_TERMS))).expand(*x.shape)
    for j in range(_TERMS - 1, -1, -1):
        total = total * r + point(Fraction(1, math.factorial(j)))
    # |r| < 0.36: the next terms sum to less than 0.36^19 / 19! * 2 < 1e-25
    total = total + Interval(x.new_tensor(-1e-25), x.new_tensor(1e-25))
    # scaling by a power of two is exact: |k| < 1012
    lo, hi = (torch.as_tensor(np.ldexp(end.numpy(), k.int().numpy())) for end in (total.lo, total.hi))
    lo = torch.where(x < -700, torch.zeros_like(lo), lo)
    hi = torch.where(x > 700, torch.full_like(hi, math.inf), hi)
    return Interval(lo, hi)
