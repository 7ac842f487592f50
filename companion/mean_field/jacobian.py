"""How the Jacobian of a mean-field ResNet can move while it trains: the numbers behind a proof of zero loss.

J has a row for each sample, ``J_{i,lm} = d_theta f(z_l^i, theta_lm)^T P_{l+1}^i`` in coordinates scaled by
``sqrt(w_m / L)``, so that ``K = J J^T`` and ``||Theta||_*^2 = (1/L) sum_lm w_m |theta_lm|^2``. If
``||J - J'|| <= Lambda ||Theta - Theta'||_*`` in a ball, and the residual r is small against ``lambda_min(K)``, gradient
descent stays in the ball and the loss goes to zero there (lesson 2). Two ways to Lambda:

- uniform: from the block's constants alone; the propagators between layers are at most ``e^A``.
- local: from the propagators and the derivatives ``d_theta f`` of the net at hand, and how far they can move.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.mean_field.blocks import Block
from companion.mean_field.coupling import exp
from companion.mean_field.enclosures import enclose
from companion.mean_field.flow import derivative
from companion.mean_field.resnets import adjoint

SLACK = 1e-10  # certified level: covers the roundings of sums and formulas of up to 10^5 nonnegative numbers
_ROUNDS = 500  # of the search for the radius that one particle cannot leave
_FAR = 1e60  # no radius beyond this is tried; powers of it are still floats
_MORE = 1 + 1e-5  # how far beyond the last need each round goes


def gram_kernel(
    block: Block,
    theta: Float[Tensor, "S L M k"],
    X: Float[Tensor, "n d"],
    v: Float[Tensor, " d"],
    weights: Float[Tensor, " M"] | None = None,
) -> Float[Tensor, "S n n"]:
    """Compute ``K_ij = (1/L) sum_lm w_m J_{i,lm}.J_{j,lm}``, ``J_{i,lm} = d_theta f(z_l^i, theta_lm)^T P_{l+1}^i``.

    P is the unit adjoint, ``P_L = v``. Under the flow ``dr/ds = -(1/n) K r``, so that ``dE/ds = -r.K r / n^2``. Rows of
    J are made layer by layer.

    Args:
        block: the block.
        theta: particles ``(S, L, M, k)``.
        X: inputs ``(n, d)``.
        v: the readout.
        weights: ``(M,)``, sum 1; None for ``1/M``.

    Returns:
        ``(S, n, n)``, symmetric.
    """
    S, L, M, _ = theta.shape
    z, P = adjoint(block, theta, X, v.expand(S, *X.shape).contiguous(), weights)
    share = theta.new_full((M,), 1 / M) if weights is None else weights
    scale = (share / L).sqrt()[:, None]
    K = theta.new_zeros(S, len(X), len(X))
    for layer in range(L):
        J = (block.rows(z[layer], theta[:, layer], P[layer + 1]) * scale).flatten(2)
        K.baddbmm_(J, J.mT)
    return K


# --- the net at hand --------------------------------------------------------------------------------------------------


class Centre(NamedTuple):
    """One net: upper bounds of all, but of ``lam``.

    Args:
        r: residual norm.
        lam: smallest eigenvalue of K, from below.
        top: largest eigenvalue of K.
        reach: largest norm of a state.
        adjoint: largest norm of a unit adjoint state over kappa; None where it was not asked for.
        propagator: largest norm of a product of the Jacobians ``I + (1/L) sum_m w_m d_z f`` of successive layers.
        B: ``max_i ||d_theta f(z_l^i, theta_lm)||`` ``(L, M)``.
    """

    r: float
    lam: float
    top: float
    reach: float
    adjoint: float | None = None
    propagator: float | None = None
    B: Tensor | None = None


def _share(theta: Tensor, weights: Tensor | None) -> Tensor:
    return theta.new_full((theta.shape[1],), 1 / theta.shape[1]) if weights is None else weights


def centre(
    block: Block,
    theta: Float[Tensor, "L M k"],
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    *,
    counts: Int[Tensor, " n"],
    weights: Float[Tensor, " M"] | None = None,
    local: bool = False,
    certified: bool = False,
) -> Centre:
    """Measure one net, or bound it rigorously.

    Args:
        block: the block.
        theta: one network ``(L, M, k)``.
        X: distinct inputs ``(n, d)``.
        y: targets ``(n,)``.
        v: the readout.
        counts: how often each sample occurs; it then counts as one, with the root of that number as its weight.
        weights: ``(M,)``, sum 1; None for ``1/M``.
        local: also what `local_ball` needs.
        certified: in interval arithmetic.

    Returns:
        `Centre`.
    """
    if certified:
        net = enclose(block, theta, X, v, weights, local=local)
        return Centre(*net.bounds(y, counts), *(net.local_bounds() if local else ()))
    root, share = counts.to(X).sqrt(), _share(theta, weights)
    z, P = adjoint(block, theta[None], X, v.expand(1, *X.shape).contiguous(), weights)
    r = (z[-1, 0] @ v - y) * root
    K = gram_kernel(block, theta[None], X, v, weights)[0] * root * root[:, None]
    values = torch.linalg.eigvalsh(K)
    lam, top = float(values[0]), float(values[-1])
    lam = lam if lam > 1e-14 * len(X) * top else 0.0  # below that, only round-off
    reach = float(torch.linalg.vector_norm(z, dim=-1).max())
    basic = (float(torch.linalg.vector_norm(r)), lam, top, reach)
    if not local:
        return Centre(*basic)
    layers = derivative(block, z[:-1, 0], theta, share) / len(theta)
    layers.diagonal(dim1=-2, dim2=-1).add_(1)
    products, largest = layers[:0], 1.0
    for layer in layers:  # all products that end here
        products = torch.cat([layer @ products, layer[None]])
        largest = max(largest, float(torch.linalg.matrix_norm(products, 2).max()))
    unit = float((torch.linalg.vector_norm(P, dim=-1) / torch.linalg.vector_norm(v)).max())
    axes = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)[:, None].expand(-1, *X.shape)
    B = [
        sum(block.rows(state, particles[None], p[None])[0].square().sum(-1) for p in axes).amax(0)  # over a: (n, M)
        for state, particles in zip(z, theta, strict=False)
    ]
    return Centre(*basic, unit, largest, torch.stack(B).sqrt())


# --- balls ------------------------------------------------------------------------------------------------------------


class Lipschitz(NamedTuple):
    """``||J - J'|| <= Lambda ||Theta - Theta'||_*`` and ``||J|| <= beta`` in a ball.

    ``growth = e^A`` bounds the propagators, ``B`` is the root mean square and ``B_max`` the maximum of
    ``||d_theta f||``.
    """

    Lambda: float
    beta: float
    growth: float
    B: float
    B_max: float


class Ball(NamedTuple):
    """`Lambda` and `beta` where every particle is within `radius` of its place, which no particle can leave."""

    Lambda: float
    beta: float
    radius: float


_NOWHERE = Ball(math.inf, math.inf, math.inf)


def _mean(value: Tensor, share: Tensor, power: int = 1) -> float:
    return float((value**power @ share).mean()) ** (1 / power)


def lipschitz_bound(
    block: Block,
    theta: Float[Tensor, "L M k"],
    n: int,
    kappa: float = 1.0,
    *,
    radius: float = 0.0,
    reach: float = math.inf,
    weights: Float[Tensor, " M"] | None = None,
    slack: float = 0.0,
) -> Lipschitz:
    """``Lambda = sqrt(n) kappa e^A (H_zz phi B^2 + H_zt B (1 + phi) + H_tt)``, ``beta = sqrt(n) kappa B e^A``.

    The smaller of two: with means of A and ``H_zz``, root mean squares of B and ``H_zt``, the maximum of ``H_tt`` and
    ``phi = e^A``; or with maxima throughout and ``phi^2 = (e^{2A} - 1) / 2A``.

    Args:
        block: the block.
        theta: one network ``(L, M, k)``.
        n: number of samples.
        kappa: norm of the readout.
        radius: the ball: every particle within `radius` of its place.
        reach: a bound on the states, where the block's constants need one.
        weights: ``(M,)``, sum 1; None for ``1/M``.
        slack: relative allowance for rounding.

    Returns:
        `Lipschitz`; infinite where the block's constants are.

    Source: derived in lesson 2.
    """
    c, share, up = block.constants(theta, radius, reach), _share(theta, weights), 1 + slack
    H_tt = float(c.H_thetatheta.max()) * up

    def bounds(A: float, H_zz: float, B: float, H_zt: float, phi: float) -> tuple[float, float]:
        size = math.sqrt(n) * kappa * exp(A) * up
        return size * (H_zz * phi * B**2 + H_zt * B * (1 + phi) + H_tt) * up, size * B * up

    A, H_zz = (_mean(value, share) * up for value in (c.A, c.H_zz))
    B, H_zt = (_mean(value, share, 2) * up for value in (c.B, c.H_ztheta))
    growth = exp(A) * up
    by_means = bounds(A, H_zz, B, H_zt, growth)
    A_top, H_zz_top, B_top, H_zt_top = (float(value.max()) * up for value in (c.A, c.H_zz, c.B, c.H_ztheta))
    phi = math.sqrt((exp(2 * A_top) - 1) / (2 * A_top)) * up**2 if A_top > 1e-3 else exp(A_top) * up
    by_maxima = bounds(A_top, H_zz_top, B_top, H_zt_top, phi)
    return Lipschitz(min(by_means[0], by_maxima[0]), min(by_means[1], by_maxima[1]), growth, B, B_top)


def uniform_ball(
    block: Block,
    theta: Float[Tensor, "L M k"],
    at: Centre,
    n: int,
    kappa: float,
    *,
    factor: int,
    weights: Float[Tensor, " M"] | None = None,
    slack: float = 0.0,
) -> Ball:
    """The smallest radius R with ``R >= factor sqrt(n) kappa B_max e^A |r| / lambda``, all within that radius.

    The right-hand side bounds the path of one particle if the residual falls as the theorem says.

    Args:
        block: the block.
        theta: one network ``(L, M, k)``.
        at: the net, from `centre`.
        n: number of samples, repeated ones included.
        kappa: norm of the readout.
        factor: 8 for gradient descent, 4 for the flow.
        weights: ``(M,)``, sum 1; None for ``1/M``.
        slack: relative allowance for rounding.

    Returns:
        `Ball`; infinite where there is no such radius.
    """
    radius, reach, up = 0.0, at.reach, 1 + slack
    for _ in range(_ROUNDS):
        ball = lipschitz_bound(block, theta, n, kappa, radius=radius, reach=reach, weights=weights, slack=slack)
        path = factor * math.sqrt(n) * kappa * ball.B_max * ball.growth * at.r / at.lam * up
        far = (at.reach + ball.growth * ball.B * radius) * up
        if not max(path, far) < _FAR:
            break
        if path <= radius and far <= reach:
            return Ball(ball.Lambda, ball.beta, radius)
        radius, reach = max(radius, path * _MORE), max(reach, far * _MORE)
    return _NOWHERE


def local_ball(
    block: Block,
    theta: Float[Tensor, "L M k"],
    at: Centre,
    n: int,
    kappa: float,
    *,
    factor: int,
    weights: Float[Tensor, " M"] | None = None,
    slack: float = 0.0,
) -> Ball:
    """The same with the net's own propagators ``G``, adjoints ``g`` and ``b_lm = max_i ||d_theta f||``.

    Within ``||Delta||_* <= rho`` (`rho` bounds the movement) and ``|Delta_lm| <= R``, with ``eta = G' B``::

        |dz| <= eta ||Delta||_*,  B_lm <= b_lm + H_zt eta rho + H_tt R,  eps = (H_zz eta + H_zt) rho,
        G' = G e^{G eps},  g' = g e^{G eps},  R >= factor sqrt(n) kappa max B_lm g' |r| / lambda,
        Lambda = sqrt(n) kappa g' (B G' (H_zz eta + H_zt) + H_zt eta + H_tt)

    since the Jacobians of the layers move by at most eps in total, and a product of moved layers expands into products
    of old ones with the moves in between. B and ``H_zt`` are root mean squares, ``H_zz`` a mean, ``H_tt`` a maximum.

    Args:
        block, theta, at, n, kappa, factor, weights, slack: as in `uniform_ball`; `at` measured with ``local=True``.

    Returns:
        `Ball`; infinite where the numbers do not settle. Source: derived in lesson 2.
    """
    share, up = _share(theta, weights), 1 + slack
    G, g, b = at.propagator * up, at.adjoint * up, at.B * up
    rho = factor / 2 * at.r / math.sqrt(at.lam) * up
    size = math.sqrt(n) * kappa * up
    had = (0.0, G, 0.0, at.reach)  # R, G', eta, reach
    for _ in range(_ROUNDS):
        radius, wide, eta, reach = had
        c = block.constants(theta, radius, reach)
        H_zz, H_zt = _mean(c.H_zz, share) * up, _mean(c.H_ztheta, share, 2) * up
        H_tt = float(c.H_thetatheta.max()) * up
        each = torch.minimum(b + (c.H_ztheta * eta * rho + c.H_thetatheta * radius), c.B) * up
        B, bend = _mean(each, share, 2) * up, (H_zz * eta + H_zt) * up
        grown = exp(G * bend * rho * up) * up
        path = factor * size * float(each.max()) * g * grown * at.r / at.lam * up
        need = (path, G * grown, wide * B * up, (at.reach + eta * rho) * up)
        if not max(need) < _FAR:
            break
        if all(x <= y for x, y in zip(need, had, strict=True)):
            Lambda = size * g * grown * (B * wide * bend + H_zt * eta + H_tt) * up
            return Ball(Lambda, size * g * grown * B * up, radius)
        had = tuple(max(y, x * _MORE) for x, y in zip(need, had, strict=True))
    return _NOWHERE
