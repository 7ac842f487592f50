"""A theorem's formula, written once: functions of any number, run on tensors, on intervals and on fractions.

A formula in ``+ - * /``, whole powers and the functions below says the same of three kinds of numbers. On tensors its
value is measured, on `Interval` it is certified (every rounding counted, nothing to multiply by ``1 + slack``), on
`Fraction` it is exact. `number` turns a stored float into the kind that a level asks for, `lower` and `upper` turn a
result back into floats, rounded outward. The rate of a network of one hidden layer, say::

    def rate(alpha, g, epsilon):
        return (1 - epsilon) * alpha**2 - g**2

    rho = lower(rate(*(number(t, level) for t in (alpha, g, 0.25))))

On tensors of shape (S,) the same lines answer for S networks at once, on intervals too. ``if x < y`` has no place in a
formula: two intervals may be neither surely less nor surely not. `lower` and `upper` of the result decide.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from companion.rigor.intervals import Interval, point

Level = Literal["measured", "certified", "exact"]


def number(value: Tensor | Fraction | float | int, level: Level) -> Any:
    """Turn a stored number into the kind that a level computes with.

    Args:
        value: a float64 tensor of any shape (one number for ``"exact"``), a float, a whole number or a fraction; a
            float is taken as the rational number that it is.
        level: ``"measured"``, ``"certified"`` or ``"exact"``.

    Returns:
        A float64 tensor, an `Interval`, or a `Fraction`.

    Raises:
        ValueError: another level, or NaN or infinity where these are no numbers.
    """
    if level == "measured":
        value = float(value) if isinstance(value, Fraction) else value
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    if level == "certified":
        return point(value)
    if level == "exact":
        return Fraction(value.item() if isinstance(value, Tensor) else value)
    raise ValueError(f"level is {level!r}; one of 'measured', 'certified', 'exact' is needed")


def upper(x: Tensor | Interval | Fraction | float) -> float:
    """Return a float at least `x`, one number of any kind; a tensor's own value, whose error nobody knows."""
    x = point(x) if isinstance(x, Fraction) else x
    return float(x.hi if isinstance(x, Interval) else x)


def lower(x: Tensor | Interval | Fraction | float) -> float:
    """Return a float at most `x`, one number of any kind; a tensor's own value, whose error nobody knows."""
    x = point(x) if isinstance(x, Fraction) else x
    return float(x.lo if isinstance(x, Interval) else x)


# --- Functions --------------------------------------------------------------------------------------------------------


def sqrt(x: Any) -> Any:
    """Take the square root; of a fraction only where it is a fraction again.

    Args:
        x: a tensor, an `Interval`, or a `Fraction`.

    Returns:
        The same kind of number.

    Raises:
        TypeError: a fraction whose root is none.
        ValueError: a fraction below 0.
    """
    if not isinstance(x, Fraction | int):
        return x.sqrt()
    if x < 0:
        raise ValueError(f"x is {x}; a number >= 0 is needed")
    x = Fraction(x)
    root = Fraction(math.isqrt(x.numerator * x.denominator), x.denominator)  # sqrt(p / q) = sqrt(p q) / q
    return root if root * root == x else _transcendental("sqrt", x, {})


def exp(x: Any) -> Any:
    """Compute ``e^x`` of a tensor or an `Interval`; of fractions only where it is one, at 0."""
    return _transcendental("exp", x, {0: 1})


def expm1(x: Any) -> Any:
    """Compute ``e^x - 1`` of a tensor or an `Interval`; of fractions only where it is one, at 0."""
    return _transcendental("expm1", x, {0: 0})


def log(x: Any) -> Any:
    """Compute ``log x`` of a tensor or an `Interval`; of fractions only where it is one, at 1."""
    return _transcendental("log", x, {1: 0})


def _transcendental(name: str, x: Any, exact: dict[int, int]) -> Any:
    if not isinstance(x, Fraction | int):
        return getattr(x, name)()
    if x not in exact:
        raise TypeError(f"{name}({x}) is no fraction; the level 'certified' or 'measured' is needed for this formula")
    return Fraction(exact[x])


def maximum(x: Any, y: Any) -> Any:
    """Take the larger of two numbers of one kind, or of such a number and a whole number or fraction."""
    if isinstance(x, Interval):
        return x.maximum(y)
    if isinstance(y, Interval):
        return y.maximum(x)
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        like = x if isinstance(x, Tensor) else y
        return torch.maximum(*(a if isinstance(a, Tensor) else like.new_tensor(float(a)) for a in (x, y)))
    return max(x, y)


def minimum(x: Any, y: Any) -> Any:
    """Take the smaller of two numbers of one kind, or of such a number and a whole number or fraction."""
    return -maximum(-x, -y)
