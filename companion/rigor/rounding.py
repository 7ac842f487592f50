"""The model of the machine, and the only way to round outward.

Notation: ``u = 2^-53``, ``gamma_k = k u / (1 - k u)``. Two things are assumed of float64 arithmetic:

- one ``+ - * / sqrt`` rounds to nearest: the result is ``x (1 + d)``, ``|d| <= u``, for the exact x;
- a sum or an inner product of length k, in any order, fused or not, obeys
  ``|fl(a.b) - a.b| <= gamma_k |a|.|b|``.

Both up to underflow. A processor may also be told to take every operand and every result below ``2^-1022`` for zero,
and keeps that setting for each thread apart, so that no test can tell what another thread does. Nothing here forbids
it: a lost operand moves a sum by less than ``2^-1022`` and a product by less than ``2^-1022`` times the other factor, a
lost result by less than ``2^-1022``, and every bound leaves room for that: `up` and `down` move by ``TINY = 2^-1020``
at least, and where subnormal operands may meet large ones (`has_subnormal`), a term for them is added. A comparison may
take a subnormal number for 0; copies and moves of bits lose nothing.

That excludes Strassen's products, TF32 and emulated float64, so what is rigorous runs on the CPU.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

UNIT = 2.0**-53
TINY = 2.0**-1020  # four times the smallest normal number
LARGEST = sys.float_info.max
MAGNITUDE = 2**63 - 1  # all bits of a float but its sign


# --- Scalars ----------------------------------------------------------------------------------------------------------


def round_up(x: float, ulps: int = 1) -> float:
    """Return an upper bound on any number that was rounded to nearest, or flushed to zero, to `x`.

    Args:
        x: a float; infinity and NaN are returned unchanged.
        ulps: how many floats to step.

    Returns:
        The next float but ``ulps - 1`` above `x`, and ``TINY`` more, which is seen next to 0 only.
    """
    for _ in range(ulps):
        x = math.nextafter(x, math.inf)
    return x + TINY


def round_down(x: float, ulps: int = 1) -> float:
    """Return a lower bound on any number that was rounded to nearest, or flushed to zero, to `x`.

    Args:
        x: a float; minus infinity and NaN are returned unchanged.
        ulps: how many floats to step.

    Returns:
        The next float but ``ulps - 1`` below `x`, and ``TINY`` less, which is seen next to 0 only.
    """
    for _ in range(ulps):
        x = math.nextafter(x, -math.inf)
    return x - TINY


def gamma(k: int) -> float:
    """Compute ``gamma_k = k u / (1 - k u)``, ``u = 2^-53``, rounded up: the relative error of k roundings.

    Args:
        k: number of roundings, below 2^52.

    Returns:
        A float at least ``gamma_k``.
    """
    return round_up(k * UNIT / round_down(1 - k * UNIT))


def sum_up(*terms: float) -> float:
    """Bound the sum of nonnegative floats from above."""
    total = 0.0
    for term in terms:
        total = round_up(total + term)
    return total


def scaled_down(x: float, exponent: int) -> float:
    """Return ``x 2^exponent``, x >= 0, rounded down where it is no float, and 0 below the normal numbers."""
    try:
        value = math.ldexp(x, exponent)
    except OverflowError:
        return LARGEST
    return value if value >= 2.0**-1022 else 0.0


def scaled_up(x: float, exponent: int) -> float:
    """Return ``x 2^exponent``, x >= 0, rounded up where it is no float or no normal number; 0 stays 0."""
    try:
        value = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
    return max(value, 2.0**-1022) if x > 0 else value


# --- Tensors ----------------------------------------------------------------------------------------------------------


def up(x: Tensor) -> Tensor:
    """Bound from above what was rounded to nearest, or flushed to zero, to `x`, entry by entry; see `round_up`."""
    return torch.nextafter(x, x.new_tensor(math.inf)) + TINY


def down(x: Tensor) -> Tensor:
    """Bound from below what was rounded to nearest, or flushed to zero, to `x`, entry by entry; see `round_down`."""
    return torch.nextafter(x, x.new_tensor(-math.inf)) - TINY


def power_of_two(k: Tensor) -> Tensor:
    """Make ``2^k`` of bits, for whole numbers k from -1022 to 1023."""
    return ((k.to(torch.int64) + 1023) << 52).view(torch.float64)


def scaled(x: Tensor, k: Tensor | int) -> Tensor:
    """Compute ``x 2^k`` for whole numbers k from -2044 to 2046, exactly where the result is a normal number.

    Args:
        x: float64; a subnormal x is scaled exactly too, also where the processor takes it for zero.
        k: whole numbers that broadcast with `x`.

    Returns:
        The products; what is below ``2^-1022`` is off by at most that, what is too large is infinite.
    """
    k = torch.as_tensor(k, dtype=torch.int64, device=x.device)
    if has_subnormal(x):
        bits = x.view(torch.int64)
        whole = torch.where(bits & MAGNITUDE < 2**52, bits & MAGNITUDE, 0).to(torch.float64)  # |x| 2^1074
        part = torch.copysign(scaled(whole, (k - 1074).clamp(min=-2044)), x)
        return torch.where(bits & MAGNITUDE < 2**52, part, scaled(torch.where(whole > 0, 1.0, x), k))
    half = k >> 1
    return x * power_of_two(half) * power_of_two(k - half)


def has_subnormal(x: Tensor) -> bool:
    """Whether `x` holds a number other than 0 below ``2^-1022`` in size; asks the bits, which no setting changes."""
    bits = x.view(torch.int64) & MAGNITUDE
    return bool(((bits > 0) & (bits < 2**52)).any())


def widened(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ends around the numbers of `x` that are not subnormal: `x` itself wherever it is a normal number or 0."""
    if not has_subnormal(x):
        return x, x
    bits = x.view(torch.int64)
    small = (bits & MAGNITUDE > 0) & (bits & MAGNITUDE < 2**52)
    edge = torch.where(small, torch.full_like(x, 2.0**-1022), x)
    zero = torch.where(small, torch.zeros_like(x), x)
    return torch.where(small & (bits < 0), -edge, zero), torch.where(small & (bits > 0), edge, zero)


# --- Input ------------------------------------------------------------------------------------------------------------


def dense(A: Tensor, name: str) -> Tensor:
    """Return a tensor whose numbers can be read one by one; a TypeError for a sparse one, or one without numbers."""
    if A.layout != torch.strided or A.is_meta:
        raise TypeError(f"{name} is {A.layout} on {A.device}; a dense tensor with numbers is needed")
    return A


def checked(A: Tensor, name: str = "A") -> Tensor:
    """Return a matrix on the CPU and outside autograd, or say in one sentence why it is refused.

    Args:
        A: float64 matrix ``(n, m)``, finite.
        name: what the caller calls it.

    Returns:
        The same numbers.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity.
    """
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} is a {type(A).__name__}; a torch.Tensor is needed")
    if A.dtype != torch.float64:
        raise TypeError(
            f"{name} is {A.dtype}; rigorous bounds need float64 (cast with {name}.double(), which is exact)"
        )
    if A.ndim != 2 or A.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(A.shape)}; a matrix (n, m) with n, m >= 1 is needed")
    A = dense(A, name).detach().cpu().resolve_neg()
    if not all(math.isfinite(end) for end in A.aminmax()):
        raise ValueError(f"{name} holds NaN or infinity; finite numbers are needed")
    return A
