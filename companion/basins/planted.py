"""Below the width: bad strict minima planted at points where the dual function touches zero (Theorem N)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import checked
from companion.basins.shallow import check_shallow, dual_function, loss_derivatives
from companion.networks import Activation

_ROUNDING = 1e-12  # curvature below this fraction of its terms may be nothing but rounding
_FLAT = 1e-7  # and below this one a search that stopped at 1e-12 cannot tell it from none


class Planted(NamedTuple):
    """A bad strict minimum: the targets ``Y`` (N, 1), the weights ``[W, V]``, its loss, and a lower competitor."""

    weights: list[Tensor]
    Y: Tensor
    loss: float
    competitor: list[Tensor]
    competitor_loss: float


@checked(double=True)
def plant_bad_minimum(
    W: Float[Tensor, "D m"],
    e: Float[Tensor, " N"],
    X: Float[Tensor, "N D"],
    act: str | Activation,
    tau: float = 1.0,
    *,
    seed: int = 0,
) -> Planted:
    """Theorem N: if ``g_e = 0``, ``grad g_e = 0``, ``s_j Hess g_e > 0``, put ``sign v_j = s_j``, ``y = H v - tau e``.

    The point is then a strict minimum with ``L = tau^2 ||e||^2 / 2``.  One neuron w' beats it as soon as ``|v|`` is
    small enough and ``g_e(w') != 0``; ``|v|`` is halved until that happens.

    Args:
        W: the touching points, shape (D, m).
        e: the normal, shape (N,).
        X: inputs, shape (N, D).
        act: name or `Activation` with two derivatives.
        tau: scale of the residual, positive.
        seed: of the search for the competitor.

    Returns:
        The `Planted` minimum.

    Raises:
        TypeError: not float64.
        ValueError: ``e = 0`` or ``g_e = 0`` everywhere (every minimum is then global), g_e does not touch zero at W,
            its Hessian there is not definite beyond rounding, dependent features, a tau that is not positive, or
            numbers so ill-conditioned that the point found is no strict minimum in floating point.

    Source: Theorem N, derived in lesson 5.
    """
    D, m = W.shape
    _, sigma = check_shallow([W, W.new_ones(m, 1)], X, None, act)
    if not tau > 0:
        raise ValueError(f"tau is {tau}; a positive finite number is needed")
    if not float(e.abs().max()) > 0:
        raise ValueError("e is zero; a normal that is not zero is needed")
    H = sigma.value(X @ W)  # (N, m)
    pool = torch.randn(D, 4000, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64).to(X)
    scales = torch.logspace(-1, 1, 4000, dtype=torch.float64, device="cpu").to(X)
    pool = pool * scales / (float(X.square().mean().sqrt()) or 1.0)
    features = sigma.value(X @ pool)
    sizes = torch.linalg.vector_norm(features, dim=0)
    usable = torch.isfinite(sizes) & (sizes > 0)
    pool, features, sizes = pool[:, usable], features[:, usable], sizes[usable]
    reached = (e @ features).abs() / (sizes * torch.linalg.vector_norm(e))
    if not bool((reached > 1e-10).any()):
        raise ValueError("e is orthogonal to every feature of X, g_e = 0 everywhere; every minimum with it is global")
    (g,), (grad,), _ = dual_function(e, X, act, W)
    scale = torch.linalg.vector_norm(e) * torch.linalg.vector_norm(H, dim=0).clamp_min(1e-300)
    if bool((g.abs() > 1e-7 * scale).any()) or bool((grad.abs().amax(1) > 1e-6 * scale * X.abs().max()).any()):
        raise ValueError(f"e and X give g_e = {g.tolist()} at W with gradients {grad.tolist()}; both must vanish")
    (curvature,) = _relative_curvature(e[None], X, sigma, W[None])
    signs = curvature[:, 0].sign()
    if not bool((signs[:, None] * curvature > _ROUNDING).all()):
        raise ValueError(
            f"Hess g_e has eigenvalues {curvature.tolist()} at W, as fractions of sum |e_n sigma''| |x_n|^2; definite "
            "ones are needed (Theorem N)"
        )
    if float(torch.linalg.svdvals(H / torch.linalg.vector_norm(H, dim=0))[-1]) < 1e-9:
        raise ValueError("W gives dependent features; independent ones are needed")
    v = signs / torch.linalg.vector_norm(H, dim=0)
    loss = 0.5 * tau * tau * float(e @ e)
    for _ in range(200):
        y = H @ v - tau * e
        c = (features.mT @ y) / sizes**2
        losses = 0.5 * (y @ y - (c * sizes) ** 2)
        best = int(losses.argmin())
        if float(losses[best]) < loss * (1 - 1e-6):
            competitor = [pool[:, best : best + 1].clone(), c[best].reshape(1, 1)]
            planted = Planted([W.clone(), v[:, None]], y[:, None], loss, competitor, float(losses[best]))
            _check_minimum(planted.weights, X, planted.Y, sigma)
            return planted
        v = v / 2
    raise ValueError(f"tau is {tau}; no competitor was found, another seed or other touching points W, e are needed")


def _check_minimum(weights: list[Tensor], X: Tensor, Y: Tensor, sigma: Activation) -> None:
    """Refuse a Hessian H that is not positive, or that twice the Newton step changes by 1/1000 in its own norm.

    ``||H^-1/2 (H' - H) H^-1/2||`` does not depend on how weights are scaled, and measures how far the minimum is.
    """
    W, V = weights
    d = loss_derivatives(weights, X, Y, sigma)
    (H,), (gradient,) = d.hessian, d.gradient
    root, failed = torch.linalg.cholesky_ex(H)
    change = float("inf")
    if not int(failed):
        step = 2 * torch.cholesky_solve(gradient[:, None], root)[:, 0]
        moved = [W - step[len(V) :].view(W.T.shape).T, V - step[: len(V), None]]
        half = torch.linalg.solve_triangular(root, loss_derivatives(moved, X, Y, sigma).hessian[0] - H, upper=False)
        change = float(torch.linalg.matrix_norm(torch.linalg.solve_triangular(root, half.T, upper=False), 2))
    if not change < 1e-3:
        raise ValueError(
            f"W, e and X give a point whose Hessian changes by {change:.2g} of itself within twice the Newton step; "
            "numbers less ill-conditioned are needed"
        )


class TouchingPoints(NamedTuple):
    """Starts of `touching_points`: ``e`` (S, N), ``W`` (S, D, m), and for each start what was reached.

    ``touches``: the equations hold with independent features and g_e does not vanish identically; ``definite``: and
    every ``Hess g_e(w_j)`` is definite, so that Theorem N applies.
    """

    e: Tensor
    W: Tensor
    residual: Tensor
    touches: Tensor
    definite: Tensor


@checked(double=True)
def touching_points(
    X: Float[Tensor, "N D"],
    m: int,
    act: str | Activation,
    starts: int,
    generator: torch.Generator,
    *,
    iters: int = 80,
    spread: float = 3.0,
) -> TouchingPoints:
    """Solve ``g_e(w_j) = 0``, ``grad g_e(w_j) = 0`` (j = 1..m), ``|e| = 1`` by damped Gauss-Newton from random starts.

    Equations and features of neuron j are measured in units of its feature vector, so that no neuron solves them by
    fading away.  Failing to find a solution does not show that there is none.

    Args:
        X: inputs, shape (N, D).
        m: number of points at which g_e shall touch zero.
        act: name or `Activation` with two derivatives.
        starts: number S of random starts, all at once.
        generator: a CPU generator.
        iters: iterations.
        spread: standard deviation of the starts' ``w_j``, in units of ``1 / max |X|``.

    Returns:
        The `TouchingPoints`.

    Raises:
        TypeError: X is not float64.
        ValueError: m, starts, iters or spread not positive, X is zero, or an activation without two derivatives.
    """
    N, D = X.shape
    size = float(X.abs().amax())
    if min(m, starts, iters) < 1 or not spread > 0 or size == 0:
        raise ValueError(
            f"m, starts, iters, spread are {m}, {starts}, {iters}, {spread}, max |X| is {size}; at least 1 of each, a "
            "positive spread and inputs that are not all zero are needed"
        )
    _, sigma = check_shallow([X.new_ones(D, m), X.new_ones(m, 1)], X, None, act)
    e = torch.nn.functional.normalize(torch.randn(starts, N, generator=generator, dtype=torch.float64), dim=1).to(X)
    W = (torch.randn(starts, D, m, generator=generator, dtype=torch.float64) * spread / size).to(X)
    damping = X.new_full((starts,), 1e-2)
    F, J = _touching_system(e, W, X, sigma)
    for _ in range(iters):
        K = J @ J.mT
        K.diagonal(dim1=1, dim2=2).add_((damping * F.norm(dim=1).clamp(max=1) + 1e-14)[:, None])
        factor, _ = torch.linalg.cholesky_ex(K)
        delta = (J.mT @ torch.cholesky_solve(F[..., None], factor))[..., 0]
        e_new, W_new = e - delta[:, :N], W - delta[:, N:].view(starts, m, D).mT
        F_new, J_new = _touching_system(e_new, W_new, X, sigma)
        better = F_new.norm(dim=1) < F.norm(dim=1)
        damping = torch.where(better, damping / 4, damping * 4).clamp(1e-12, 1e8)
        pick = better[:, None, None]
        e, W = torch.where(pick[..., 0], e_new, e), torch.where(pick, W_new, W)
        F, J = torch.where(pick[..., 0], F_new, F), torch.where(pick, J_new, J)
    H = sigma.value(X @ W)
    # a neuron that has faded away (sin at w = 0) satisfies everything in the limit
    bounded = (W.abs().amax((1, 2)) * size < 10 + 10 * spread) & (H.square().sum(1).amin(1) > 1e-8)
    H = torch.nn.functional.normalize(H, dim=1)
    residual = F.norm(dim=1)
    independent = torch.linalg.svdvals(torch.nan_to_num(H))[:, -1] > 1e-3 if m <= N else torch.zeros_like(bounded)
    relative = _relative_curvature(e, X, sigma, W)
    one_sign = (relative.amin(-1) > _FLAT) | (relative.amax(-1) < -_FLAT)
    touches = (residual < 1e-12) & independent & bounded & (relative.abs().amax((1, 2)) > _FLAT)
    return TouchingPoints(e, W, residual, touches, touches & one_sign.all(1))


def _relative_curvature(e: Tensor, X: Tensor, sigma: Activation, W: Tensor) -> Tensor:
    """The eigenvalues (S, m, D) of ``Hess g_e`` at the columns of W, over ``sum_n |e_n sigma''| ||x_n||^2``."""
    _, _, hess = dual_function(e, X, sigma, W)
    unit = torch.einsum("sn,snj,nd->sj", e.abs(), sigma.second(X @ W).abs(), X**2)[..., None].clamp_min(1e-300)
    return torch.linalg.eigvalsh(hess) / unit


def _touching_system(e: Tensor, W: Tensor, X: Tensor, sigma: Activation) -> tuple[Tensor, Tensor]:
    """The equations (S, m (1+D) + 1) and their Jacobian in (e, w_1, ..., w_m), scaled by the features' norms."""
    S, D, m = W.shape
    N = len(X)
    Z = X @ W
    H, first, second = sigma.value(Z), sigma.derivative(Z), sigma.second(Z)  # (S, N, m)
    unit = H.square().sum(1).sqrt().clamp_min(1e-300)[:, None]
    H, first, second = H / unit, first / unit, second / unit
    slopes = torch.einsum("snj,nd->sjdn", first, X)  # (S, m, D, N)
    g, grad = torch.einsum("sn,snj->sj", e, H), torch.einsum("sjdn,sn->sjd", slopes, e)
    hess = torch.einsum("sn,snj,nd,nc->sjdc", e, second, X, X)
    norm = 0.5 * (e.square().sum(1, keepdim=True) - 1)
    rows = m * (1 + D) + 1
    J = e.new_zeros(S, rows, N + m * D)
    J[:, :m, :N] = H.mT
    J[:, m:-1, :N] = slopes.reshape(S, m * D, N)
    J[:, -1, :N] = e
    for j in range(m):
        w = slice(N + j * D, N + (j + 1) * D)
        J[:, j, w] = grad[:, j]
        J[:, m + j * D : m + (j + 1) * D, w] = hess[:, j]
    return torch.cat([g, grad.flatten(1), norm], 1), J


# --- wider by one neuron ----------------------------------------------------------------------------------------------


@checked
def split_neuron(weights: Sequence[Float[Tensor, "*S _ _"]], j: int, shares: Sequence[float]) -> list[Tensor]:
    """Replace neuron j by copies with output weights ``lambda_i v_j``, ``sum_i lambda_i = 1``: the same function.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, K) or without S.
        j: which neuron.
        shares: the ``lambda_i``; any signs.

    Returns:
        ``[W, V]`` with the copies in the place of neuron j.

    Raises:
        ValueError: not two matrices that fit, j out of range, or shares that do not sum to 1.
    """
    shapes = [tuple(T.shape) for T in weights]
    if len(shapes) != 2 or len(shapes[0]) not in (2, 3) or shapes[1][:-1] != (*shapes[0][:-2], shapes[0][-1]):
        raise ValueError(f"weights have shapes {shapes}; [W, V] of shapes (D, m), (m, K) or with a leading S is needed")
    W, V = weights
    m = W.shape[-1]
    if not 0 <= j < m:
        raise ValueError(f"j is {j}; one of the neurons 0 to {m - 1} is needed")
    parts = V.new_tensor(shares)
    if not len(parts) or abs(float(parts.sum()) - 1) > 1e-12 * max(1.0, float(parts.abs().max())):
        raise ValueError(f"shares are {list(shares)}; numbers with sum 1 are needed")
    column, row = W[..., :, j : j + 1], V[..., j : j + 1, :]
    W = torch.cat([W[..., :, :j], column.expand(*column.shape[:-1], len(parts)), W[..., :, j + 1 :]], -1)
    V = torch.cat([V[..., :j, :], parts[:, None] * row, V[..., j + 1 :, :]], -2)
    return [W.contiguous(), V.contiguous()]
