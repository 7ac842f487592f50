"""A theorem's formula, written once: functions of any number, run on tensors, on intervals and on fractions.

A formula in ``+ - * /``, whole powers and the functions below says the same of three kinds of numbers. On tensors its
value is measured, on `Interval` it is certified (every rounding counted, nothing to multiply by ``1 + slack``), on
`Fraction` it is exact. `number` turns a stored float into the kind that a level asks for, `lower` and `upper` turn a
result back into floats, rounded outward. Theorem C's rate and radii, for any number of layers::

    def theorem_c(w, phi, alpha_0, R_0, C, epsilon):
        bar = [w_l + C_l for w_l, C_l in zip(w, C)]
        d, phi_bar = 0, [phi[0]]
        for l in range(len(w) - 1):
            d = d * bar[l] + phi[l] * C[l]
            phi_bar.append(phi[l + 1] + d)
        g = [phi_bar[l] * math.prod(bar[l + 1 :]) for l in range(len(w) - 1)]
        alpha = alpha_0 - d
        rho = (1 - epsilon) * alpha**2 - sum(x**2 for x in g)
        T = [x * R_0 / rho for x in (*g, alpha)]
        return below(0, alpha) & below(0, rho) & every(at_most(t, c) for t, c in zip(T, C)), rho

    lists = ([number(t, "certified") for t in part] for part in (w, phi))
    holds, rho = theorem_c(*lists, *(number(t, "certified") for t in (alpha_0, R_0)), ...)

On tensors of shape (S,) the same lines answer for S networks at once, on intervals too. ``if x < y`` has no place in a
formula: two intervals may be neither surely less nor surely not. `below` and `at_most` are true where it is sure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    if isinstance(x, Interval):
        return float(x.hi)
    if isinstance(x, Fraction):
        return float(point(x).hi)
    return float(x)


def lower(x: Tensor | Interval | Fraction | float) -> float:
    """Return a float at most `x`, one number of any kind; a tensor's own value, whose error nobody knows."""
    if isinstance(x, Interval):
        return float(x.lo)
    if isinstance(x, Fraction):
        return float(point(x).lo)
    return float(x)


# --- Functions --------------------------------------------------------------------------------------------------------


def sqrt(x: Any) -> Any:
    """Take the square root; of a fraction only where it is a fraction again (`root_between` gives bounds).

    Args:
        x: a tensor, an `Interval`, or a `Fraction`.

    Returns:
        The same kind of number.

    Raises:
        TypeError: a fraction whose root is none.
    """
    if isinstance(x, Fraction | int):
        low, high = root_between(Fraction(x), 0)
        return low if low == high else _transcendental("sqrt", x, {})
    return x.sqrt()


def exp(x: Any) -> Any:
    """Compute ``e^x`` of a tensor or an `Interval`; of fractions only where it is one, at 0."""
    return _transcendental("exp", x, {0: 1})


def expm1(x: Any) -> Any:
    """Compute ``e^x - 1`` of a tensor or an `Interval`; of fractions only where it is one, at 0."""
    return _transcendental("expm1", x, {0: 0})


def log(x: Any) -> Any:
    """Compute ``log x`` of a tensor or an `Interval`; of fractions only where it is one, at 1."""
    return _transcendental("log", x, {1: 0})


def log1p(x: Any) -> Any:
    """Compute ``log(1 + x)`` of a tensor or an `Interval`; of fractions only where it is one, at 0."""
    return _transcendental("log1p", x, {0: 0})


def tanh(x: Any) -> Any:
    """Compute ``tanh x`` of a tensor or an `Interval`; of fractions only where it is one, at 0."""
    return _transcendental("tanh", x, {0: 0})


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


def root_between(x: Fraction, places: int = 64) -> tuple[Fraction, Fraction]:
    """Bound a fraction's square root by fractions: ``low <= sqrt(x) <= high``, by an integer square root.

    Args:
        x: at least 0.
        places: binary places beyond those of ``sqrt(p q)``, ``x = p / q``.

    Returns:
        ``(low, high)``; equal where the root is found exactly, else ``high - low = 2^-places / q``.

    Raises:
        ValueError: x below 0.
    """
    if x < 0:
        raise ValueError(f"x is {x}; a number >= 0 is needed")
    square = x.numerator * x.denominator << 2 * places  # sqrt(p / q) = sqrt(p q) / q
    root, scale = math.isqrt(square), x.denominator << places
    return Fraction(root, scale), Fraction(root + (root * root != square), scale)


# --- Comparisons ------------------------------------------------------------------------------------------------------


def below(x: Any, y: Any) -> Any:
    """Say where ``x < y`` for sure.

    Args:
        x: a tensor, an `Interval`, a `Fraction`, or beside one of these a whole number.
        y: the same kind, or a whole number.

    Returns:
        A tensor of booleans, or a boolean for fractions. Where intervals are compared, False does not say ``x >= y``.
    """
    if isinstance(x, Interval):
        return x.below(y)
    return (-y).below(-x) if isinstance(y, Interval) else x < y


def at_most(x: Any, y: Any) -> Any:
    """Say where ``x <= y`` for sure; arguments and results as those of `below`."""
    if isinstance(x, Interval):
        return x.at_most(y)
    return (-y).at_most(-x) if isinstance(y, Interval) else x <= y


def every(conditions: Iterable[Any]) -> Any:
    """Join conditions with "and"; True without any."""
    result: Any = True
    for condition in conditions:
        result = condition & result
    return result
