"""How the Jacobian of a mean-field ResNet can move while it trains: the numbers behind a proof of zero loss.

J has a row for each sample, ``J_{i,lm} = d_theta f(z_l^i, theta_lm)^T P_{l+1}^i`` in coordinates scaled by
``sqrt(w_m / L)``, so that ``K = J J^T`` and ``||Theta||_*^2 = (1/L) sum_lm w_m |theta_lm|^2``. If
``||J - J'|| <= Lambda ||Theta - Theta'||_*`` in a ball, and the residual r is small against ``lambda_min(K)``, gradient
descent stays in the ball and the loss goes to zero there (lesson 2). Two ways to Lambda:

- uniform: from the block's constants alone; the propagators between layers are at most ``e^A``.
- local: from the propagators and the derivatives ``d_theta f`` of the net at hand, and how far they can move.

Each formula is written once. On particles that are a tensor its value is measured; on an `Interval` of particles every
rounding is counted, and the upper end of the result is certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion import rigor
from companion.arguments import checked
from companion.mean_field.blocks import Block, check_fit, like
from companion.mean_field.enclosures import enclose
from companion.mean_field.flow import derivative
from companion.mean_field.resnets import adjoint
from companion.rigor import Interval
from companion.rigor.formulas import exp, expm1, lower, minimum, sqrt, upper

Numbers = Tensor | Interval

_ROUNDS = 500  # of the search for the radius that one particle cannot leave
_FAR = 1e60  # no radius beyond this is tried; powers of it are still floats
_MORE = 1 + 1e-5  # how far beyond the last need each round goes
_LEAST = 2.0**-960  # a smaller eigenvalue has lost digits to underflow


@checked
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

    Raises:
        TypeError, ValueError: see `forward`.
    """
    share = check_fit(block, theta, X, weights, v=v)
    S, L, _, _ = theta.shape
    z, P = adjoint(block, theta, X, v.expand(S, *X.shape).contiguous(), weights)
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

    Raises:
        ValueError: states or derivatives that overflow.
    """
    if certified:
        net = enclose(block, theta, X, v, weights, local=local)
        return Centre(*net.bounds(y, counts), *(net.local_bounds() if local else ()))
    root, share = counts.to(X).sqrt(), _share(theta, weights)[0]
    z, P = adjoint(block, theta[None], X, v.expand(1, *X.shape).contiguous(), weights)
    r = (z[-1, 0] @ v - y) * root
    K = gram_kernel(block, theta[None], X, v, weights)[0] * root * root[:, None]
    if not bool(torch.isfinite(K).all() & torch.isfinite(r).all()):
        raise ValueError("theta, X or v is too large: the outputs or their derivatives are not finite floats")
    values = torch.linalg.eigvalsh(K)
    lam, top = float(values[0]), float(values[-1])
    lam = lam if lam > max(1e-14 * len(X) * top, _LEAST) else 0.0  # below that, only round-off
    basic = (float(rigor.norm(r)), lam, top, float(rigor.norm(z).max()))
    if not local:
        return Centre(*basic)
    layers = derivative(block, z[:-1, 0], theta, share) / len(theta)
    layers.diagonal(dim1=-2, dim2=-1).add_(1)
    products, largest = layers[:0], 1.0
    for layer in layers:  # all products that end here
        products = torch.cat([layer @ products, layer[None]])
        largest = max(largest, float(torch.linalg.matrix_norm(products, 2).max()))
    unit = float((rigor.norm(P) / rigor.norm(v)).max())
    axes = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)[:, None].expand(-1, *X.shape)
    B = [
        sum(block.rows(state, particles[None], p[None])[0].square().sum(-1) for p in axes).amax(0)  # of (n, M)
        for state, particles in zip(z, theta, strict=False)
    ]
    return Centre(*basic, unit, largest, torch.stack(B).sqrt())


# --- regions ----------------------------------------------------------------------------------------------------------


class Lipschitz(NamedTuple):
    """``||J - J'|| <= Lambda ||Theta - Theta'||_*`` and ``||J|| <= beta`` in a region.

    ``growth = e^A`` bounds the propagators, ``B`` is the root mean square and ``B_max`` the maximum of
    ``||d_theta f||``. All are numbers of the kind that the particles are.
    """

    Lambda: Numbers
    beta: Numbers
    growth: Numbers
    B: Numbers
    B_max: Numbers


class Region(NamedTuple):
    """`Lambda` and `beta` where every particle is within `radius` of its place, which no particle can leave."""

    Lambda: Numbers
    beta: Numbers
    radius: float


_NOWHERE = Region(*[torch.tensor(math.inf, dtype=torch.float64, device="cpu")] * 2, math.inf)


def _share(theta: Numbers, weights: Tensor | None) -> tuple[Numbers, Numbers]:
    """The particles' weights, and their sum: 1 for the tensor that is meant, near 1 for the numbers that are stored."""
    of, M = like(theta), theta.shape[1]
    if weights is None:
        share = (of(1) / of(M)).expand(M)
        return (share.to(theta) if isinstance(theta, Tensor) else share), of(1)
    return of(weights), of(weights).sum(0)


def _mean(value: Numbers, share: Numbers) -> Numbers:
    """The mean over the layers of the weighted mean over a layer's particles."""
    return (value * share).sum(-1).sum(0) / value.shape[0]


def _top(value: Numbers) -> Numbers:
    return Interval(value.lo.max(), value.hi.max()) if isinstance(value, Interval) else value.max()


def lipschitz_bound(
    block: Block,
    theta: Float[Tensor, "L M k"] | Interval,
    n: int,
    kappa: float = 1.0,
    *,
    radius: float = 0.0,
    reach: float = math.inf,
    weights: Float[Tensor, " M"] | None = None,
) -> Lipschitz:
    """``Lambda = sqrt(n) kappa e^A (H_zz phi B^2 + H_zt B (1 + phi) + H_tt)``, ``beta = sqrt(n) kappa B e^A``.

    The smaller of two: with means of A and ``H_zz``, root mean squares of B and ``H_zt``, the maximum of ``H_tt`` and
    ``phi = e^A``; or with maxima throughout and ``phi^2 = (e^{2A} - 1) / 2A``. A maximum bounds a mean by itself times
    the sum of the weights, which need not be exactly 1.

    Args:
        block: the block.
        theta: one network ``(L, M, k)``; an `Interval` for certified numbers.
        n: number of samples.
        kappa: norm of the readout.
        radius: the region: every particle within `radius` of its place.
        reach: a bound on the states, where the block's constants need one.
        weights: ``(M,)``, sum 1; None for ``1/M``.

    Returns:
        `Lipschitz`; infinite where the block's constants are.

    Source: derived in lesson 2.
    """
    of, (share, total) = like(theta), _share(theta, weights)
    c = block.constants(theta, radius, reach).spread(theta)
    H_tt, size = _top(c.H_thetatheta), sqrt(of(n)) * of(kappa)

    def bounds(A: Numbers, H_zz: Numbers, B: Numbers, H_zt: Numbers, phi: Numbers) -> tuple[Numbers, Numbers]:
        scale = size * exp(A)
        return scale * (H_zz * phi * B**2 + H_zt * B * (1 + phi) + H_tt), scale * B

    A, H_zz = _mean(c.A, share), _mean(c.H_zz, share)
    B, H_zt = sqrt(_mean(c.B**2, share)), sqrt(_mean(c.H_ztheta**2, share))
    by_means = bounds(A, H_zz, B, H_zt, exp(A))
    A_top, H_zz_top = _top(c.A) * total, _top(c.H_zz) * total
    B_top, H_zt_top = _top(c.B) * sqrt(total), _top(c.H_ztheta) * sqrt(total)
    phi = sqrt(expm1(2 * A_top) / (2 * A_top)) if lower(A_top) > 1e-3 else exp(A_top)  # which is never less
    by_maxima = bounds(A_top, H_zz_top, B_top, H_zt_top, phi)
    Lambda, beta = (minimum(*pair) for pair in zip(by_means, by_maxima, strict=True))
    return Lipschitz(Lambda, beta, exp(A), B, _top(c.B))


Need = Callable[[Numbers, tuple[float, ...]], tuple[Region, tuple[float, ...]]]


def _fixed_point(need: Need, theta: Numbers, had: tuple[float, ...]) -> tuple[Region, tuple[float, ...]]:
    """The region and the smallest numbers found that suffice for what they themselves need; infinite without such."""
    if isinstance(theta, Interval):  # begin where ordinary floats end
        had = _fixed_point(need, theta.lo, had)[1]
    for _ in range(_ROUNDS):
        if not all(x < _FAR for x in had):
            break
        region, want = need(theta, had)
        if all(x <= y for x, y in zip(want, had, strict=True)):
            return region, had
        had = tuple(max(y, x * _MORE) if x < _FAR else math.inf for x, y in zip(want, had, strict=True))
    return _NOWHERE, (math.inf,) * len(had)


def uniform_region(
    block: Block,
    theta: Float[Tensor, "L M k"] | Interval,
    at: Centre,
    n: int,
    kappa: float,
    *,
    factor: int,
    weights: Float[Tensor, " M"] | None = None,
) -> Region:
    """The smallest radius R with ``R >= factor sqrt(n) kappa B_max e^A |r| / lambda``, all within that radius.

    The right-hand side bounds the path of one particle if the residual falls as the theorem says. States move by at
    most ``e^A B ||Delta||_*``, and ``||Delta||_* <= R`` but for weights whose sum is not exactly 1.

    Args:
        block: the block.
        theta: one network ``(L, M, k)``; an `Interval` for certified numbers.
        at: the net, from `centre`.
        n: number of samples, repeated ones included.
        kappa: norm of the readout.
        factor: 8 for gradient descent, 4 for the flow.
        weights: ``(M,)``, sum 1; None for ``1/M``.

    Returns:
        `Region`; infinite where there is no such radius.

    Source: derived in lesson 2.
    """

    def need(theta: Numbers, had: tuple[float, ...]) -> tuple[Region, tuple[float, ...]]:
        of, (radius, reach), total = like(theta), had, _share(theta, weights)[1]
        bound = lipschitz_bound(block, theta, n, kappa, radius=radius, reach=reach, weights=weights)
        path = factor * sqrt(of(n)) * of(kappa) * bound.B_max * bound.growth * of(at.r) / of(at.lam)
        far = of(at.reach) + bound.growth * bound.B * of(radius) * sqrt(total)
        return Region(bound.Lambda, bound.beta, radius), (upper(path), upper(far))

    return _fixed_point(need, theta, (0.0, at.reach))[0]


def local_region(
    block: Block,
    theta: Float[Tensor, "L M k"] | Interval,
    at: Centre,
    n: int,
    kappa: float,
    *,
    factor: int,
    weights: Float[Tensor, " M"] | None = None,
) -> Region:
    """The same with the net's own propagators ``G``, adjoints ``g`` and ``b_lm = max_i ||d_theta f||``.

    Within ``||Delta||_* <= rho`` (`rho` bounds the movement) and ``|Delta_lm| <= R``, with ``eta = G' B``::

        |dz| <= eta ||Delta||_*,  B_lm <= b_lm + H_zt eta rho + H_tt R,  eps = (H_zz eta + H_zt) rho,
        G' = G e^{G eps},  g' = g e^{G eps},  R >= factor sqrt(n) kappa max B_lm g' |r| / lambda,
        Lambda = sqrt(n) kappa g' (B G' (H_zz eta + H_zt) + H_zt eta + H_tt)

    since the Jacobians of the layers move by at most eps in total, and a product of moved layers expands into products
    of old ones with the moves in between. B and ``H_zt`` are root mean squares, ``H_zz`` a mean, ``H_tt`` a maximum.

    Args:
        block, theta, at, n, kappa, factor, weights: as in `uniform_region`; `at` measured with ``local=True``.

    Returns:
        `Region`; infinite where the numbers do not settle.

    Source: derived in lesson 2.
    """

    def need(theta: Numbers, had: tuple[float, ...]) -> tuple[Region, tuple[float, ...]]:
        of, share, (radius, wide, eta, reach) = like(theta), _share(theta, weights)[0], had
        G, g, r, wide, eta = (of(x) for x in (at.propagator, at.adjoint, at.r, wide, eta))
        rho, size = factor * r / (2 * sqrt(of(at.lam))), sqrt(of(n)) * of(kappa)
        c = block.constants(theta, radius, reach).spread(theta)
        H_zz, H_zt = _mean(c.H_zz, share), sqrt(_mean(c.H_ztheta**2, share))
        each = minimum(of(at.B) + c.H_ztheta * eta * rho + c.H_thetatheta * of(radius), c.B)
        B, bend = sqrt(_mean(each**2, share)), H_zz * eta + H_zt
        grown = exp(G * bend * rho)
        path = factor * size * _top(each) * g * grown * r / of(at.lam)
        Lambda = size * g * grown * (B * wide * bend + H_zt * eta + _top(c.H_thetatheta))
        want = (path, G * grown, wide * B, of(at.reach) + eta * rho)
        return Region(Lambda, size * g * grown * B, radius), tuple(upper(x) for x in want)

    return _fixed_point(need, theta, (0.0, at.propagator, 0.0, at.reach))[0]
