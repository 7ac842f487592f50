r"""Elementary functions of float64 tensors with a proved error, in ``+ - * /``, comparisons and moves of bits alone.

Each function f comes with a constant ``ERROR[f]``, and for every float x the computed value ``f~(x)`` obeys::

    |f~(x) - f(x)| <= ERROR[f] |f(x)| + TINY,      TINY = 2^-1020

except that it is infinite where the true value is above the largest float, less a few units in its last place. Nothing
is assumed of a library's ``exp`` or ``log``. Assumed of the machine: one ``+ - * /`` errs by at most
``u = 2^-53`` relatively, fused with the next one or not; a result or an operand below ``2^-1022`` may be flushed to
zero, which changes no value below by more than ``TINY / 4``, and no step of the proofs speaks of it again. "First
order" means up to ``10^-12 u``, for which every constant has room.

**The common core.** ``log 2 = HI + LO``, where HI has 32 bits and LO is rounded. With k the integer next to
``x / log 2``, ``|k| <= 1077``, ``r = (x - k HI) - k LO``. ``k HI`` is exact (11 + 32 bits). So is ``x - k HI``: for
k = 0 there is nothing to subtract, and else ``|x| >= 1/4``, so that it is a whole number of ``2^-54`` below ``2^-1.4``.
Hence with ``r* = x - k log 2``: ``|r*| <= R = 0.3466`` and ``|r - r*| <= u |r| + 5e-7 u`` (for k = 0: r = x).

``s = r + r^2 q(r)``, ``q(r) = sum_(j<=12) r^j / (j+2)!``, approximates ``e^r - 1`` with a remainder below
``R^15 / 15! / (1 - R/16) < 0.001 u``. In Horner's scheme the term j of q bears ``2j + 2`` roundings (one is its
coefficient's), the exact ``1/2`` only one. So ``|q~ - q| <= (1/2 + sum_(j>=1) (2j+2) R^j / (j+2)!) u <= 0.765 u``, and
with two more roundings and ``q <= 0.5632``, ``r^2 q`` errs by at most ``A = R^2 (2 q + 0.765) u <= 0.2274 u``.

**exp** ``= 2^k (1 + s)``; the powers of two are exact. The last sum errs by u; s by ``u |s| + A``, r by
``e^r (u |r| + ...)``: relatively at most ``u + (1 - e^-R) / e^-R u + A / e^-R + R u`` where ``r < 0``, which is
``(1 + 0.4143 + 0.3217 + 0.3466) u < 2.09 u``, and less where ``r > 0``.

**expm1** ``= 2^k s + (2^k - 1)``. For k = 0: ``u + A / (1 - e^-R) < 1.78 u``. Else, with ``D_r = |e^r - 1| + 0.2274 +
e^r |r|`` in u, the sum errs by ``2^k D_r / |2^k e^r - 1| + 1``, and by one more where ``2^k - 1`` is no float
(``|k| > 53``): the worst of it is k = 1, ``r = -R``: ``2 * 0.7655 / 0.4142 + 1 < 4.7 u``. For negative x the worst is
k = -1, ``r = R``: ``0.5 * 1.132 / 0.2929 + 1 < 2.94 u``.

**tanh** ``|x| = -T / (2 + T)``, ``T = expm1(-2 |x|)`` in ``(-1, 0]``. T's relative error counts ``2 / (2 + T)`` times,
and two roundings follow. k = 0: ``1.172 * 1.78 + 2 < 4.1 u``; k = -1, largest at ``r = R``:
``1.172 * 2.94 + 2 < 5.45 u``; for ``k <= -2`` at most ``1.48 * 1.5 + 2 < 4.3 u``, and ``2 * 1.5 + 2 + 0.1`` where
``2^k - 1`` is rounded. Beyond ``|x| = 20``, tanh(20) stands for tanh x: they differ by less than ``2 e^-40 < 0.08 u``.

**log** ``= k log 2 + log(1 + f)``, ``x = 2^k (1 + f)``, ``1 + f`` in ``[sqrt(1/2), sqrt(2))`` and f exact. With
``s = f / (2 + f)``, ``h = f^2 / 2`` and ``P = log(1 + f) / s - 2 = sum_(j>=1) 2 s^(2j) / (2j+1)``:
``log(1 + f) = f - (h - s (h + P))``. Ten terms leave a remainder below ``0.002 u``. ``|s| <= 0.1716``, two roundings;
``s^2`` five; P, at most 0.0198, at most 9.4; h, at most 0.0858, one. So ``h + P`` errs by
``(0.0858 + 0.187 + 0.1056) u``, ``s (h + P)`` by ``(0.1716 * 0.379 + 3 * 0.0182) u < 0.12 u``, ``h - s (h + P)`` by
``(0.0858 + 0.12 + 0.0182 + 0.0858) u < 0.31 u`` with the small ``k LO`` in it, and f less that by
``(0.31 + 0.3467) u``. For k = 0 this is relatively at most ``1 + 0.31 / 0.3466 < 1.9`` u (for smaller ``|f|`` the first
part falls like f^2, the logarithm like f). For other k the sum with ``k HI``, which is exact, adds u, and the result is
at least ``log(2) / 2``: ``1 + 0.657 / 0.3465 < 2.9 u``.

**log1p** is the same with f = x and k = 0 where ``-0.2928 < x < 0.4142``. Elsewhere ``1 + x = w + c`` exactly, with
``w = fl(1 + x)`` and ``|c| <= u w``, and ``c / w`` joins ``k LO``: ``log(1 + c / w)`` less ``c / w`` is second order.

**sigmoid** ``= 1 / (1 + e)`` or ``e / (1 + e)``, ``e = exp(-|x|)``: ``(2.09 + 2) u``. **softplus** ``= max(x, 0) + l``,
``l = log1p(e)``: l errs absolutely by ``(2.09 e / (1 + e) + 2.9 l) u``, relatively by at most ``(2.09 + 2.9) u``, which
is all for negative x. For other x the sum adds u, l is at most the result, which is at least ``log 2``, and
``e / (1 + e) <= 1/2``: ``1 + 2.09 * 0.5 / 0.693 + 2.9 < 5.42 u``.

Source: the argument reductions are those of the standard libraries; the errors are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from companion.rigor.rounding import LARGEST, MAGNITUDE, TINY, UNIT, power_of_two

LN2_HI = 2977044471 / 2**32
LN2_LO = 1.9082149292705877e-10
_ROOT_HALF = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
_EXP = [1 / math.factorial(j + 2) for j in range(13)]
_LOG = [2 / (2 * j + 3) for j in range(10)]


# --- The common cores -------------------------------------------------------------------------------------------------


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    """``sum_j c_j x^j`` by Horner's scheme."""
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = torch.addcmul(x.new_tensor(c), total, x)
    return total


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(k, s)`` with ``e^x = 2^k (1 + s)``."""
    k = torch.round(x * (1 / math.log(2)))
    r = (x - k * LN2_HI) - k * LN2_LO
    return k, r + r * r * _polynomial(_EXP, r)


def _fraction(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(k, f)`` with ``x = 2^k (1 + f)``, for positive finite x, subnormal ones too."""
    bits = x.view(torch.int64)
    small = bits < 2**52
    bits = torch.where(small, bits.to(torch.float64).view(torch.int64), bits)  # x 2^1074, which is a whole number
    k = (bits - _ROOT_HALF) >> 52
    return k.to(torch.float64) - 1074 * small, (bits - (k << 52)).view(torch.float64) - 1


def _log_of(k: Tensor, f: Tensor, rest: Tensor | float) -> Tensor:
    """``k log 2 + log(1 + f) + rest``, where `rest` is below u."""
    s, h = f / (2 + f), 0.5 * (f * f)
    z = s * s
    return k * LN2_HI + (f - (h - (s * (h + z * _polynomial(_LOG, z)) + (k * LN2_LO + rest))))


# --- The functions ----------------------------------------------------------------------------------------------------


def exp(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute ``e^x`` within ``2.1 u``; 0 or a number below ``2^-1022`` at the lower end, infinite above 709.78.

    Args:
        x: float64, any numbers; NaN stays NaN.

    Returns:
        The values, of the shape of `x`.

    Source: derived at the top of this module.
    """
    k, s = _reduced(x.clamp(-746.0, 710.0))
    half = torch.floor(0.5 * k)
    return (1 + s) * power_of_two(half) * power_of_two(k - half)


def expm1(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute ``e^x - 1`` within ``4.75 u`` (3 u for negative x), also next to 0; arguments and source as `exp`."""
    k, s = _reduced(x.clamp(-700.0, 710.0))
    half = power_of_two(k - 1)  # 2^1024 would be no float
    return torch.where(k == 0, s, 2 * (half * s + (half - 0.5)))


def tanh(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute ``tanh x`` within ``5.5 u``, also next to 0; arguments and source as `exp`."""
    T = expm1((-2 * x.abs()).clamp(min=-40.0))
    return torch.copysign(T / (2 + T), x)


def log(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute ``log x`` within ``3 u``, also next to 1; minus infinity at 0, NaN below; else as `exp`."""
    out = _log_of(*_fraction(x), 0.0)
    bits = x.view(torch.int64)  # a comparison with 0 might take a subnormal number for 0
    out = torch.where(bits & MAGNITUDE == 0, -math.inf, torch.where(bits < 0, math.nan, out))
    return torch.where(torch.isfinite(x) | (x < 0), out, x)


def log1p(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute ``log(1 + x)`` within ``3 u``, also next to 0; minus infinity at -1, NaN below; else as `exp`."""
    w = 1 + x
    c = torch.where(x.abs() > 1, 1 - (w - x), x - (w - 1))
    near = (x > -0.2928) & (x < 0.4142)
    k, f = _fraction(w)
    zero = torch.zeros_like(x)
    out = _log_of(torch.where(near, zero, k), torch.where(near, x, f), torch.where(near, zero, c / w))
    out = torch.where(w > 0, out, torch.where(w == 0, -math.inf, math.nan))
    return torch.where(torch.isfinite(x), out, torch.where(x > 0, x, math.nan))


def sigmoid(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute ``1 / (1 + e^-x)`` within ``4.25 u``; arguments and source as `exp`."""
    e = exp(-x.abs())
    return torch.where(x < 0, e, 1.0) / (1 + e)


def softplus(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute ``log(1 + e^x)`` within ``5.5 u``; arguments and source as `exp`."""
    return x.clamp(min=0.0) + log1p(exp(-x.abs()))


Function = Callable[[Tensor], Tensor]

ERROR: dict[Function, float] = {
    exp: 2.1 * UNIT,
    expm1: 4.75 * UNIT,
    tanh: 5.5 * UNIT,
    log: 3 * UNIT,
    log1p: 3 * UNIT,
    sigmoid: 4.25 * UNIT,
    softplus: 5.5 * UNIT,
}
_RANGE: dict[Function, tuple[float, float]] = {
    exp: (0.0, math.inf),
    expm1: (-1.0, math.inf),
    tanh: (-1.0, 1.0),
    sigmoid: (0.0, 1.0),
    softplus: (0.0, math.inf),
}


def ends(function: Function, lo: Float[Tensor, "*s"], hi: Float[Tensor, "*s"]) -> tuple[Tensor, Tensor]:
    """Enclose one of the functions above, all of which increase, over intervals.

    The value v at an end is off by at most ``E |f| + TINY <= (E + u) |v| + 2 TINY``; what is added to it or taken from
    it here, ``(E + 3 u) |v| + 4 TINY`` before rounding, covers its own roundings as well.

    Args:
        function: a key of `ERROR`.
        lo: lower ends, float64; minus infinity is allowed.
        hi: upper ends, of the same shape; infinity is allowed.

    Returns:
        A number at most ``f(lo)`` and a number at least ``f(hi)``; NaN where the function is not defined.

    Source: derived at the top of this module.
    """
    low = function(lo)
    high = low if hi is lo else function(hi)
    share, (least, most) = ERROR[function] + 3 * UNIT, _RANGE.get(function, (-math.inf, math.inf))
    low, high = low.clamp(max=LARGEST), high.clamp(min=-LARGEST)
    low = low - (low.abs() * share + 4 * TINY)
    high = high + (high.abs() * share + 4 * TINY)
    return low.clamp(min=least), high.clamp(max=most)
