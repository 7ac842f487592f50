"""Interval arithmetic on float64 tensors: every true value lies between two stored floats.

The two ends are torch tensors of one shape; an end may be infinite. Each operation rounds its ends outward
(`companion.rigor.rounding`); the elementary functions are those of `companion.rigor.elementary`. Where an operation is
not defined on the whole interval (a quotient by an interval with 0 in it), the ends are NaN, which no later operation
turns into a number and no comparison takes for true.

A float in a formula counts as the number that it is: ``x * 0.5`` is exact, ``x * 0.1`` is not what it looks like. So
numbers beside an interval are whole numbers, fractions, tensors, or floats with at most 20 binary places; anything else
is wrapped by its author: ``point(Fraction(1, 10))`` for a tenth, ``point(0.1)`` for the float next to it.

There is no ``<``, since of two intervals often neither is surely less: compare ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from companion.rigor import elementary
from companion.rigor.rounding import LARGEST, TINY, dense, down, gamma, up, widened

__all__ = ["Interval", "Number", "cat", "point", "stack"]


@dataclass(frozen=True, eq=False)
class Interval:
    """All numbers between `lo` and `hi`, entry by entry; the operations enclose every possible result.

    Args:
        lo: lower ends, float64, no subnormal ones (`point` and `around` see to that).
        hi: upper ends, the same shape.
    """

    lo: Tensor
    hi: Tensor

    @staticmethod
    def around(value: Tensor, radius: Tensor) -> Interval:
        """All numbers within `radius` of `value`, the inverse of `split`."""
        return Interval(down(value - radius), up(value + radius))

    @property
    def shape(self) -> torch.Size:
        return self.lo.shape

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.lo[index], self.hi[index])

    # --- Arithmetic ---------------------------------------------------------------------------------------------------

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __abs__(self) -> Interval:
        least = torch.maximum(self.lo, -self.hi).clamp(min=0.0)
        return Interval(least, torch.maximum(-self.lo, self.hi))

    def __add__(self, other: Number) -> Interval:
        other = _lift(other, self)
        return Interval(down(self.lo + other.lo), up(self.hi + other.hi))

    def __sub__(self, other: Number) -> Interval:
        return self + (-_lift(other, self))

    def __rsub__(self, other: Number) -> Interval:
        return _lift(other, self) + (-self)

    def __mul__(self, other: Number) -> Interval:
        other = _lift(other, self)
        ends = [_product(a, b) for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        least = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
        most = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
        return Interval(down(least), up(most))

    def __truediv__(self, other: Number) -> Interval:
        return self * _lift(other, self).reciprocal()

    def __rtruediv__(self, other: Number) -> Interval:
        return _lift(other, self) / self

    __radd__, __rmul__ = __add__, __mul__

    def __pow__(self, exponent: int) -> Interval:
        """Whole powers; even ones are never below 0."""
        if not isinstance(exponent, int) or isinstance(exponent, bool):
            raise TypeError(f"the exponent is {exponent!r}; a whole number is needed")
        if exponent < 0:
            return self.reciprocal() ** -exponent
        base = self if exponent % 2 else abs(self)
        least, most = _power(base.lo, exponent, down), _power(base.hi, exponent, up)
        if exponent % 2:
            least = torch.where(self.lo < 0, -_power(self.lo, exponent, up), least)
            most = torch.where(self.hi < 0, -_power(self.hi, exponent, down), most)
        return Interval(least, most)

    def reciprocal(self) -> Interval:
        """``1 / x``; NaN where 0 may be in x."""
        positive, negative = self.lo > 0, self.hi < 0
        low, high = down(1 / self.hi), up(1 / self.lo)
        low = torch.where(positive, low.clamp(min=0.0), low)
        high = torch.where(negative, high.clamp(max=0.0), high)
        return _only_where(positive | negative, Interval(low, high))

    def square(self) -> Interval:
        """``x^2``, never below 0."""
        return self**2

    def sum(self, dim: int) -> Interval:
        """The sum over one axis, in any order: off by ``gamma_n sum |x|``, and what is flushed."""
        n = self.lo.shape[dim]
        k = gamma(n + 4)
        errors = [k * end.abs().sum(dim) * (1 + 2 * k) + (n + 1) * TINY for end in (self.lo, self.hi)]
        return Interval(down(self.lo.sum(dim) - up(errors[0])), up(self.hi.sum(dim) + up(errors[1])))

    # --- Functions ----------------------------------------------------------------------------------------------------

    def sqrt(self) -> Interval:
        """The square root of numbers known not to be negative: a lower end below 0 counts as 0."""
        root = Interval(down(self.lo.clamp(min=0.0).sqrt()).clamp(min=0.0), up(self.hi.sqrt()))
        return _only_where(self.hi >= 0, root)

    def exp(self) -> Interval:
        return Interval(*elementary.ends(elementary.exp, self.lo, self.hi))

    def expm1(self) -> Interval:
        """``e^x - 1``."""
        return Interval(*elementary.ends(elementary.expm1, self.lo, self.hi))

    def log(self) -> Interval:
        """The logarithm of numbers known to be positive: a lower end below 0 counts as 0."""
        log = Interval(*elementary.ends(elementary.log, self.lo.clamp(min=0.0), self.hi))
        return _only_where(self.hi > 0, log)

    def log1p(self) -> Interval:
        """``log(1 + x)`` of numbers known to be above -1: a lower end below that counts as -1."""
        log = Interval(*elementary.ends(elementary.log1p, self.lo.clamp(min=-1.0), self.hi))
        return _only_where(self.hi > -1, log)

    def tanh(self) -> Interval:
        return Interval(*elementary.ends(elementary.tanh, self.lo, self.hi))

    def clamp(self, least: float, most: float) -> Interval:
        """Both ends clamped; an enclosure of the clamped numbers."""
        return Interval(self.lo.clamp(least, most), self.hi.clamp(least, most))

    def maximum(self, other: Number) -> Interval:
        """The larger of two numbers."""
        other = _lift(other, self)
        return Interval(torch.maximum(self.lo, other.lo), torch.maximum(self.hi, other.hi))

    # --- Shapes -------------------------------------------------------------------------------------------------------

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
        return mid, torch.maximum(up(mid - self.lo), up(self.hi - mid))


Number = Interval | Tensor | Fraction | int | float


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two ends; 0 times an infinite end is 0, as every number in between is finite."""
    out = a * b
    lost = out.isnan()
    if bool(lost.any()):
        out = torch.where(lost & ~a.isnan() & ~b.isnan(), 0.0, out)
    return out


def _power(x: Tensor, exponent: int, outward: Callable[[Tensor], Tensor]) -> Tensor:
    """``|x|^exponent``, rounded up or down after every product, and not below 0."""
    size = x.abs()
    out = size if exponent else torch.where(x.isnan(), x, torch.ones_like(x))
    for _ in range(exponent - 1):
        out = outward(out * size).clamp(min=0.0)
    return out


def _only_where(defined: Tensor, x: Interval) -> Interval:
    """`x`, with both ends NaN where it is not defined."""
    return Interval(torch.where(defined, x.lo, math.nan), torch.where(defined, x.hi, math.nan))


def _lift(value: Number, like: Interval) -> Interval:
    """A number beside an interval, as an interval."""
    if isinstance(value, Interval):
        return value
    if isinstance(value, float) and not (value * 2**20).is_integer():
        raise TypeError(
            f"{value!r} is no short binary fraction; point({value!r}) or point(Fraction(...)) says what is meant"
        )
    return point(value, like.lo.device)


def point(value: Tensor | Fraction | float | int, device: torch.device | str | None = None) -> Interval:
    """The interval of one number: exact for floats and tensors, two neighbouring floats for other fractions.

    Args:
        value: a float64 tensor, a float, a whole number or a fraction; a subnormal number becomes an interval with
            the ends 0 and ``2^-1022``.
        device: where a number that is no tensor goes; None for the CPU.

    Returns:
        The interval, of the shape of `value`.

    Raises:
        TypeError: a tensor that is not float64.
        ValueError: NaN or infinity.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.float64:
            raise TypeError(f"value is {value.dtype}; intervals need torch.float64")
        if not bool(torch.isfinite(dense(value, "value")).all()):
            raise ValueError("value holds NaN or infinity; finite numbers are needed")
        return Interval(*widened(value.detach()))
    low, high = (_neighbour(value, side) for side in (-math.inf, math.inf))
    ends = (torch.tensor(end, dtype=torch.float64, device=device or "cpu") for end in (low, high))
    (low, _), (_, high) = (widened(end) for end in ends)
    return Interval(low, high)


def _neighbour(value: Fraction | float | int, side: float) -> float:
    """The float at `value`, or else the one beside it towards `side`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"value is {value}; a finite number is needed")
    try:
        near = float(value)
    except OverflowError:
        near = LARGEST if (value > 0) != (side > 0) else math.inf
        return near if value > 0 else -near
    inside = Fraction(near) > value if side < 0 else Fraction(near) < value
    return math.nextafter(near, side) if inside else near


def cat(parts: Sequence[Interval], dim: int = 0) -> Interval:
    """Join intervals along an axis."""
    return Interval(torch.cat([p.lo for p in parts], dim), torch.cat([p.hi for p in parts], dim))


def stack(parts: Sequence[Interval], dim: int = 0) -> Interval:
    """Join intervals of one shape along a new axis."""
    return Interval(torch.stack([p.lo for p in parts], dim), torch.stack([p.hi for p in parts], dim))
