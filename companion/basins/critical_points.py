"""A critical point near given floats: Kantorovich's theorem in floating point, Krawczyk's test in balls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.basins.exact import Jets2, derivatives, ldl_pivots
from companion.basins.shallow import check_shallow, loss_derivatives, recognized
from companion.networks import Activation
from companion.rigor.arbs import ball_functions, ends, flint

_BOUNDS = {  # |sigma^(k)| <= b_k, k = 0..3; exp depends on the range
    "sin": (1.0, 1.0, 1.0, 1.0),
    "cos": (1.0, 1.0, 1.0, 1.0),
    "tanh": (1.0, 1.0, 0.7699, 2.0),  # 4 / 3^(3/2)
    "sigmoid": (1.0, 0.25, 0.09623, 0.125),  # 3^(1/2) / 18
    "gauss": (1.0, 0.6066, 1.0, 1.3802),  # e^(-1/2); t (3 - t^2) e^(-t^2 / 2) at t^2 = 3 - 6^(1/2)
}


class Kantorovich(NamedTuple):
    """``gamma = ||grad L||``, ``smallest`` and ``largest`` eigenvalue, ``M >= ||L'''||`` on the ball of ``radius``.

    ``holds`` (S,): ``M gamma <= smallest^2 / 4`` and ``2 gamma / smallest < radius``, in floating point.
    """

    gamma: Tensor
    smallest: Tensor
    largest: Tensor
    M: Tensor
    radius: Tensor
    holds: Tensor


def kantorovich(
    weights: Sequence[Tensor], X: Tensor, Y: Tensor, act: str | Activation, radius: float | None = None
) -> Kantorovich:
    """If ``M gamma <= lambda^2 / 4`` and ``2 gamma / lambda < r``, a strict minimum lies within ``2 gamma / lambda``.

    On that ball ``Hess L >= lambda - 2 M gamma / lambda >= lambda / 2``, and on its boundary, at ``s = 2 gamma /
    lambda``, the slope outwards is at least ``-gamma + lambda s - M s^2 / 2 >= gamma / 2``.

    ``M = sum_n 3 G_1 G_2 + (|e_n| + r G_1) G_3`` bounds the third derivative on the ball of radius r: with
    ``|f'| <= G_1``, ``|f''| <= G_2``, ``|f'''| <= G_3`` at every input, ``L''' = sum_n 3 f' f'' + e f'''``.  Here
    ``G_1^2 = m b_0^2 + b_1^2 (||v|| + r)^2 ||x||^2``, ``G_2 = b_1 ||x|| + b_2 V ||x||^2``,
    ``G_3 = 3 b_2 ||x||^2 + b_3 V ||x||^3``, ``V = max |v_j| + r`` and ``|sigma^(k)| <= b_k``.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, 1) or without S.
        X: inputs, shape (N, D) or (S, N, D).
        Y: targets, shape (N, 1) or (S, N, 1).
        act: sin, cos, tanh, sigmoid, gauss or exp.
        radius: r; None for ``3 gamma / lambda``, at most 10^6.

    Returns:
        The `Kantorovich` numbers, each (S,).

    Raises:
        TypeError: not float64.
        ValueError: an activation whose derivatives have no known bounds.

    Source: Kantorovich's theorem for the gradient; the bound M is derived above.
    """
    (W, V), sigma = check_shallow(weights, X, Y, act)
    if not recognized(sigma, "exp", *_BOUNDS):
        raise ValueError(f"act is {sigma.name!r}; companion's own {', '.join(_BOUNDS)} or exp is needed for bounds")
    d = loss_derivatives(weights, X, Y, act)
    finite = torch.isfinite(d.hessian).flatten(1).all(1)
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], d.hessian, 0))  # 0 shows nothing
    gamma, smallest = torch.linalg.vector_norm(d.gradient, dim=1), values[:, 0]
    reach = 3 * gamma / smallest.clamp_min(1e-300) if radius is None else torch.full_like(gamma, radius)
    reach = reach.clamp(1e-14, 1e6)
    M = _third_derivative(W, V[..., 0], X, d.e, sigma.name, reach[:, None])
    holds = (smallest > 0) & (M * gamma <= smallest**2 / 4) & (2 * gamma < smallest * reach)
    return Kantorovich(gamma, smallest, values[:, -1], M, reach, holds)


def _third_derivative(W: Tensor, v: Tensor, X: Tensor, e: Tensor, act: str, r: Tensor) -> Tensor:
    """M of `kantorovich` on the balls of radius r (S, 1)."""
    m = W.shape[2]
    x = torch.linalg.vector_norm(X, dim=-1).expand(len(W), -1)  # (S, N)
    if act == "exp":
        b_0 = b_1 = b_2 = b_3 = torch.exp(((X @ W).amax(-1) + r * x).amax(1, keepdim=True))
    else:
        b_0, b_1, b_2, b_3 = _BOUNDS[act]
    size, largest = torch.linalg.vector_norm(v, dim=1)[:, None] + r, v.abs().amax(1)[:, None] + r
    G_1 = (m * b_0**2 + (b_1 * size * x) ** 2) ** 0.5
    G_2 = b_1 * x + b_2 * largest * x**2
    G_3 = 3 * b_2 * x**2 + b_3 * largest * x**3
    return (3 * G_1 * G_2 + (e.abs() + r * G_1) * G_3).sum(1)


# --- in balls ---------------------------------------------------------------------------------------------------------


def ball_derivatives(W: Sequence[Sequence[Any]], v: Sequence[Any], X: Tensor, y: Tensor, act: str) -> Jets2:
    """Loss, gradient, Hessian on balls: every true value for weights in the balls lies in the result.

    Args:
        W: m rows ``w_j`` of D balls (or floats, taken as exact).
        v: m balls.
        X: inputs (N, D), taken as the exact floats they are.
        y: targets (N,).
        act: one of `BALL_ACTIVATIONS`.

    Returns:
        The `Jets2`, entries of type ``flint.arb``.
    """
    arb, jet = flint().arb, ball_functions()[act]
    X, y = [[arb(t) for t in row] for row in X.tolist()], [arb(t) for t in y.tolist()]
    jets = [[jet(sum((w[d] * row[d] for d in range(len(row))), arb(0))) for w in W] for row in X]
    return derivatives(jets, v, X, y)


class Krawczyk(NamedTuple):
    """What `krawczyk` found: ``radius`` of the box (None if not shown), smallest pivot, enclosure of the loss."""

    radius: float | None
    smallest_pivot: float
    loss_low: float
    loss_high: float


def krawczyk(W: Tensor, v: Tensor, X: Tensor, y: Tensor, act: str) -> Krawczyk:
    """Show that the box ``theta +- r`` holds exactly one critical point, and that it is a strict minimum.

    ``K = theta - Y grad L(theta) + (I - Y Hess L(box)) (box - theta)`` inside the box gives existence and uniqueness
    (Krawczyk); positive pivots of ``L D L^T`` of the Hessian on the whole box give strictness.

    Args:
        W: (D, m).
        v: (m,).
        X: (N, D).
        y: (N,).
        act: one of `BALL_ACTIVATIONS`.

    Returns:
        The `Krawczyk` record; ``radius`` None means that it was not shown.
    """
    lib = flint()
    arb, m, D = lib.arb, W.shape[1], W.shape[0]
    theta = [*v.tolist(), *W.T.reshape(-1).tolist()]

    def at(balls: list[Any]) -> Jets2:
        return ball_derivatives([balls[m + j * D : m + (j + 1) * D] for j in range(m)], balls[:m], X, y, act)

    here = at([arb(t) for t in theta])
    H = torch.tensor([[float(t.mid()) for t in row] for row in here.hessian], dtype=torch.float64, device="cpu")
    low, high = ends(here.loss)
    if int(torch.linalg.matrix_rank(H)) < len(H):
        return Krawczyk(None, 0.0, low, high)
    R = [[arb(t) for t in row] for row in torch.linalg.inv(H).tolist()]  # any matrix will do: nothing trusts it
    p = range(len(theta))
    newton = [sum((R[i][k] * here.gradient[k] for k in p), arb(0)) for i in p]
    least = max(float(abs(t).upper()) for t in newton)
    smallest = 0.0
    for factor in (2.0, 10.0, 100.0, 1e4):
        r = max(factor * least, 1e-15)
        box = at([arb(t, r) for t in theta])
        pivots = ldl_pivots(box.hessian)
        smallest = min(float(t.lower()) for t in pivots)
        inside = True
        for i in p:
            spread = sum(
                (abs((1 if i == k else 0) - sum((R[i][l] * box.hessian[l][k] for l in p), arb(0))) for k in p), arb(0)
            )
            inside &= bool(abs(newton[i]) + spread * r < r)
        if inside and smallest > 0 and len(pivots) == len(theta):
            return Krawczyk(r, smallest, *ends(box.loss))
    return Krawczyk(None, smallest, low, high)
