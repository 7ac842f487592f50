"""Balls: a pair ``(value, radius)`` says that the true number is within `radius` of `value`, entry by entry.

Each function takes the ball around the input of a layer to one around its output: the layer is evaluated in floats, and
the radius grows by what the rounding may have done. `companion.rigor.modules` strings them together.

A layer that is a product of k terms errs by ``gamma_k (|W| |h| + |b|)``. The radius is computed in floats as well, from
sums of at most 2^22 nonnegative numbers: ``GROW`` covers their roundings. ``exp``, ``log`` and ``tanh`` are those of
`companion.rigor.elementary`, with the errors proved there. Where subnormal numbers count as 0, an entry of the input
moves by less than ``TINY``, which joins its radius, and a subnormal weight takes `_lost`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from companion.networks.reading import exact_double
from companion.rigor import elementary
from companion.rigor.rounding import TINY, UNIT, dense, gamma, has_subnormal

GROW = 1 + 1e-9  # covers 2^22 roundings of a sum of nonnegative numbers, and what is done with it

Ball = tuple[Tensor, Tensor]


def check_ball(value: Tensor, radius: Tensor, *ranks: int) -> None:
    """One sentence about what is wrong with a ball, or nothing; `ranks` are the numbers of axes that are allowed."""
    for name, A in (("value", value), ("radius", radius)):
        if not isinstance(A, Tensor):
            raise TypeError(f"{name} is a {type(A).__name__}; a torch.Tensor is needed")
        if A.dtype != torch.float64 or A.device.type != "cpu":
            raise TypeError(f"{name} is {A.dtype} on {A.device}; enclosures need float64 on the CPU")
        if A.numel() == 0 or A.shape != value.shape or (ranks and A.ndim not in ranks):
            axes = " or ".join(map(str, ranks)) or "any number of"
            raise ValueError(f"{name} has shape {tuple(A.shape)}; {axes} axes, no empty one, equal shapes are needed")
        low, high = (float(end) for end in dense(A, name).aminmax())
        if not (math.isfinite(low) and math.isfinite(high)) or (name == "radius" and low < 0):
            raise ValueError(f"{name} lies between {low} and {high}; finite numbers are needed, no radius below 0")


def _parameters(k: int, **parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters of a layer as float64 on the CPU, which is exact."""
    if k >= 2**22:
        raise ValueError(f"the layer sums {k} terms; fewer than 2^22 are needed")
    out = []
    for name, A in parameters.items():
        if A is not None:
            if not isinstance(A, Tensor):
                raise TypeError(f"{name} is a {type(A).__name__}; a torch.Tensor is needed")
            if not dense(A, name).is_floating_point() or not bool(torch.isfinite(A).all()):
                raise ValueError(f"{name} is {A.dtype} or holds NaN or infinity; finite floating point is needed")
            A = exact_double(A.detach().cpu())
        out.append(A)
    return out


def _lost(weight: Tensor, value: Tensor, radius: Tensor, k: int) -> float:
    """What k products lose where a subnormal weight counts as 0, in the value and in the radius."""
    return 2.0**-1019 * k * float(torch.maximum(value.abs(), radius).max()) if has_subnormal(weight) else 0.0


def _spread(value: Tensor, radius: Tensor, k: int) -> Tensor:
    """At least ``D + gamma_k |h|``, what a linear map with nonnegative weights takes to its own radius."""
    return value.abs().mul_(gamma(k) * GROW).add_(radius).mul_(1 + 4 * UNIT).add_(TINY)


def dense_ball(
    value: Float[Tensor, "N p"],
    radius: Float[Tensor, "N p"],
    weight: Float[Tensor, "m p"],
    bias: Float[Tensor, " m"] | None = None,
) -> Ball:
    """Enclose ``x W^T + b`` for every x with ``|x - h| <= D``: radius ``|W| D + gamma_(p+2) (|W| |h| + |b|)``.

    Args:
        value: ``h``, the middle, float64 ``(N, p)``.
        radius: ``D >= 0``, the same shape.
        weight: ``W``, ``(m, p)``; float32 is cast exactly.
        bias: ``b``, ``(m,)``, or None.

    Returns:
        The computed ``h W^T + b`` and its radius, underflow included, ``(N, m)``.

    Raises:
        TypeError, ValueError: a ball that is not float64, not finite, negative or empty, or bad parameters.

    Source: the standard model of floating-point arithmetic; derived in lesson 3.
    """
    check_ball(value, radius, 2)
    k = value.shape[1]
    W, b = _parameters(k, weight=weight, bias=bias)
    if W.ndim != 2 or W.shape[1] != k or (b is not None and b.shape != W.shape[:1]):
        found = f"weight has shape {tuple(W.shape)}, bias {'None' if b is None else tuple(b.shape)}"
        raise ValueError(f"{found}; (m, {k}) and (m,), or no bias, are needed")
    out, spread = value @ W.T, _spread(value, radius, k + 2) @ W.abs().T
    if b is not None:
        out += b
        spread += gamma(k + 2) * b.abs()
    return out, spread.mul_(GROW).add_((k + 2) * TINY + _lost(W, value, radius, k))


def conv2d_ball(
    value: Float[Tensor, "N C H W"],
    radius: Float[Tensor, "N C H W"],
    weight: Float[Tensor, "out fan h w"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Ball:
    """Enclose a convolution as the product it is: unfold, multiply; the radius as in `dense_ball`.

    A library's convolution may use Winograd's or Fourier's algorithm, about whose rounding the model says nothing.

    Args:
        value: ``h``, float64 ``(N, C, H, W)``.
        radius: ``D >= 0``, the same shape.
        weight: ``(out, C / groups, h, w)``; float32 is cast exactly.
        bias: ``(out,)``, or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; zeros are padded.

    Returns:
        The computed convolution and its radius, ``(N, out, H', W')``.

    Raises:
        TypeError, ValueError: as `dense_ball`.

    Source: the standard model of floating-point arithmetic; derived in lesson 3.
    """
    check_ball(value, radius, 4)
    (n_out, fan, *window), (N, C, *size) = weight.shape, value.shape
    if fan * groups != C or n_out % groups:
        raise ValueError(f"weight has shape {tuple(weight.shape)} with groups {groups}; value has {C} channels")
    pair = [(a, a) if isinstance(a, int) else tuple(a) for a in (stride, padding, dilation)]
    H, W = ((size[a] + 2 * pair[1][a] - pair[2][a] * (window[a] - 1) - 1) // pair[0][a] + 1 for a in (0, 1))
    k = fan * math.prod(window)
    kernel, b = _parameters(k, weight=weight.reshape(groups, n_out // groups, k), bias=bias)
    unfold = partial(F.unfold, kernel_size=window, stride=pair[0], padding=pair[1], dilation=pair[2])
    out, spread = value.new_empty(N, n_out, H, W), value.new_empty(N, n_out, H, W)
    size_abs, h, D = kernel.abs(), value, _spread(value, radius, k + 2)
    rows = max(1, 2**18 // (C * math.prod(window) * H * W))  # 2 MB: the panel stays in the cache
    for r in (slice(i, i + rows) for i in range(0, N, rows)):
        for target, image, matrix in ((out, h, kernel), (spread, D, size_abs)):
            columns = unfold(image[r]).reshape(-1, groups, k, H * W)
            target[r] = (matrix @ columns).reshape(-1, n_out, H, W)
    if b is not None:
        out += b[:, None, None]
        spread += gamma(k + 2) * b.abs()[:, None, None]
    return out, spread.mul_(GROW).add_((k + 2) * TINY + _lost(kernel, value, radius, k))


def batchnorm_ball(
    value: Float[Tensor, "N C *rest"],
    radius: Float[Tensor, "N C *rest"],
    mean: Float[Tensor, " C"],
    var: Float[Tensor, " C"],
    weight: Float[Tensor, " C"] | None = None,
    bias: Float[Tensor, " C"] | None = None,
    eps: float = 1e-5,
) -> Ball:
    """Enclose BatchNorm in eval mode, ``gamma (x - mu) / sqrt(v + eps) + b``.

    With ``rho = |gamma| / sqrt(v + eps)`` the radius is ``rho D + 10 u (rho (|h| + |mu|) + |b|)`` and underflow.

    Args:
        value: ``h``, float64 ``(N, C, ...)``.
        radius: ``D >= 0``, the same shape.
        mean, var: the stored statistics ``mu``, ``v``, ``(C,)``.
        weight, bias: ``gamma``, ``b``, ``(C,)``, or None for 1 and 0.
        eps: added to the variance.

    Returns:
        The computed values and their radius.

    Raises:
        TypeError, ValueError: as `dense_ball`, or ``v + eps`` not positive.

    Source: derived in lesson 3.
    """
    check_ball(value, radius)
    mu, v, g, b = _parameters(1, mean=mean, var=var, weight=weight, bias=bias)
    if not bool((v + eps > 0).all()):
        raise ValueError(f"var + eps is {float((v + eps).min())} somewhere; a positive number is needed")
    g, b = torch.ones_like(v) if g is None else g, torch.zeros_like(v) if b is None else b
    root, mu, b, g = (a.reshape(-1, *[1] * (value.ndim - 2)) for a in (torch.sqrt(v + eps), mu, b, g))
    scale = g / root
    out = (value - mu).mul_(scale).add_(b)
    size, rho = value.abs() + mu.abs(), scale.abs() * (1 + 8 * UNIT)
    spread = (size * rho).add_(b.abs()).mul_(10 * UNIT).add_(rho * (radius + TINY))
    return out, spread.mul_(GROW).add_(size.add_(radius).add_(1).mul_(TINY + TINY / root))


def add_ball(
    value: Float[Tensor, "*s"],
    radius: Float[Tensor, "*s"],
    other: Float[Tensor, "*s"],
    other_radius: Float[Tensor, "*s"],
) -> Ball:
    """Enclose the sum of two branches: radius ``D_1 + D_2 + u |h_1 + h_2|``.

    Args:
        value, radius: the first ball, float64.
        other, other_radius: the second, of the same shape.

    Returns:
        The computed sum and its radius.

    Raises:
        TypeError, ValueError: as `dense_ball`, or two shapes.
    """
    check_ball(value, radius)
    check_ball(other, other_radius)
    if value.shape != other.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}, other {tuple(other.shape)}; equal shapes are needed")
    out = value + other
    return out, (radius + other_radius).add_(out.abs(), alpha=UNIT).mul_(GROW).add_(TINY)


def avgpool_ball(
    value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"], pool: Callable[[Tensor], Tensor], terms: int
) -> Ball:
    """Enclose means over windows: radius ``mean D + gamma_(k+2) mean |h|``.

    Args:
        value, radius: the ball, float64.
        pool: the pooling: sums of at most `terms` entries, each divided by a number. It is applied to both.
        terms: ``k``, the largest number of entries in a window.

    Returns:
        The computed means and their radius.

    Raises:
        TypeError, ValueError: as `dense_ball`.
    """
    check_ball(value, radius)
    _parameters(terms)
    return pool(value), pool(_spread(value, radius, terms + 2)).mul_(GROW).add_((terms + 2) * TINY)


def maxpool_ball(value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"], pool: Callable[[Tensor], Tensor]) -> Ball:
    """Enclose maxima over windows: the largest radius in the window, since ``|max a - max b| <= max |a - b|``.

    Args:
        value, radius: the ball, float64.
        pool: the pooling; it is applied to both.

    Returns:
        The maxima, which are exact, and their radius.

    Raises:
        TypeError, ValueError: as `dense_ball`.
    """
    check_ball(value, radius)
    return pool(value), pool(_compared(value, radius))


def _compared(value: Tensor, radius: Tensor) -> Tensor:
    """The radius of a choice among the entries, which is exact but where a subnormal number counts as 0."""
    return radius + TINY if has_subnormal(value) or has_subnormal(radius) else radius.clone()


def relu_ball(value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"]) -> Ball:
    """Enclose ``max(x, 0)``, which is exact and moves no two numbers apart; raises as `dense_ball`."""
    check_ball(value, radius)
    return value.clamp(min=0), _compared(value, radius)


def tanh_ball(value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"]) -> Ball:
    """Enclose ``tanh x``, whose slope is at most 1: radius ``D + 5.5 u |h|``; raises as `dense_ball`."""
    return _rising(elementary.tanh, 1.0, value, radius)


def sigmoid_ball(value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"]) -> Ball:
    """Enclose ``1 / (1 + e^-x)``, whose slope is at most 1/4: radius ``D / 4 + 4.25 u |h|``; raises as `dense_ball`."""
    return _rising(elementary.sigmoid, 0.25, value, radius)


def _rising(function: elementary.Function, slope: float, value: Tensor, radius: Tensor) -> Ball:
    """A function of `elementary` with slopes between 0 and `slope`."""
    check_ball(value, radius)
    out = function(value)
    spread = (slope * radius).add_(out.abs(), alpha=elementary.ERROR[function] + UNIT)
    return out, spread.mul_(GROW).add_(4 * TINY)


def softplus_ball(
    value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"], beta: float = 1.0, threshold: float | None = None
) -> Ball:
    """Enclose ``log(1 + exp(beta x)) / beta``, whose slope is at most 1: radius ``D + 2 u |x| + 7.5 u |h|``.

    Args:
        value, radius: the ball, float64.
        beta: sharpness, positive.
        threshold: None for the analytic function; a number for PyTorch's ``F.softplus``, which is x where
            ``beta x`` exceeds it: the jump there, ``log(1 + exp(-threshold)) / beta``, joins the radius.

    Returns:
        The computed values and their radius.

    Raises:
        TypeError, ValueError: as `dense_ball`, or a beta that is not positive and finite.
    """
    check_ball(value, radius)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; a positive finite number is needed")
    out = elementary.softplus(value * beta).div_(beta)
    spread = radius.add(value.abs(), alpha=2 * UNIT).add_(
        out.abs(), alpha=elementary.ERROR[elementary.softplus] + 2 * UNIT
    )
    if threshold is not None:
        beyond = torch.tensor([-threshold], dtype=torch.float64, device="cpu")
        spread.add_(float(elementary.ends(elementary.softplus, beyond, beyond)[1]) / beta * GROW)
    return out, spread.mul_(GROW).add_(4 * TINY * (1 + 1 / beta))
