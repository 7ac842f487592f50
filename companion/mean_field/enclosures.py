"""Mean-field ResNets in interval arithmetic: states, unit adjoints and Jacobian of the stored numbers, enclosed.

For each block that is written as a formula, `value` encloses ``f(z_i, theta_m)``, and `products` encloses
``p_i^T d_z f(z_i, theta_m)`` and ``p_i^T d_theta f(z_i, theta_m)``, for intervals z and p and exact particles. The net
is then enclosed layer by layer, as `forward` and `adjoint` compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion import rigor
from companion.mean_field.blocks import RBF, BallBump, Bias, Block, GaussBump, Linear, TanhMLP
from companion.rigor import Interval, cat, point, stack

_LARGEST = 2 * 10**7  # numbers in the Jacobian
_TOO_LARGE = "theta, X or v is too large: the outputs, or products of their derivatives, are not finite floats"

Value = Callable[[Block, Interval, Tensor], Interval]
Products = Callable[[Block, Interval, Tensor, Interval], tuple[Interval, Interval]]


# --- blocks: z and p are (n, 1, d), theta is (M, k), results (n, M, d) and (n, M, k) ----------------------------------


def _bump(gap: Interval) -> Interval:
    """``exp(-|gap|^2 / 2)``, ``(n, M, 1)``."""
    return (-0.5 * gap.square().sum(-1)).exp().unsqueeze(-1)


def _ball_chart(block: BallBump, theta: Tensor) -> tuple[Interval, Interval, Interval, Interval]:
    """``u, b, R c`` and q of `BallBump`, each ``(1, M, .)``."""
    omega = point(theta[None, :, 1:])
    q = (omega.square().sum(-1) + 1.0).sqrt().reciprocal().unsqueeze(-1)
    zeta = omega * q
    return point(theta[None, :, :1]), zeta[..., : block.d], zeta[..., block.d :] * point(block.R), q


def _ball_value(block: BallBump, z: Interval, theta: Tensor) -> Interval:
    u, b, centre, _ = _ball_chart(block, theta)
    return u * b * _bump(z - centre)


def _ball_products(block: BallBump, z: Interval, theta: Tensor, p: Interval) -> tuple[Interval, Interval]:
    u, b, centre, q = _ball_chart(block, theta)
    gap = z - centre
    bump = _bump(gap)
    pairs = bump * (p * b).sum(-1).unsqueeze(-1)  # p.f / u
    g_b, g_c = u * bump * p, u * pairs * gap * point(block.R)
    zeta, g = cat([b, centre * point(block.R).reciprocal()], -1), cat([g_b, g_c], -1)
    inner = (zeta * g).sum(-1).unsqueeze(-1)
    return -(u * pairs * gap), cat([pairs, q * (g - zeta * inner)], -1)


def _gauss(block: GaussBump, z: Interval, theta: Tensor) -> tuple[Interval, Interval]:
    gap = z - point(theta[None])
    return gap, point(0.5).exp() * point(block.alpha) * _bump(gap)


def _gauss_value(block: GaussBump, z: Interval, theta: Tensor) -> Interval:
    gap, bump = _gauss(block, z, theta)
    return gap * bump


def _gauss_products(block: GaussBump, z: Interval, theta: Tensor, p: Interval) -> tuple[Interval, Interval]:
    gap, bump = _gauss(block, z, theta)
    slope = p * (bump * (1.0 - gap.square()))
    return slope, -slope


def _rbf_value(block: RBF, z: Interval, theta: Tensor) -> Interval:
    return point(theta[None, :, : block.d]) * _bump(z - point(theta[None, :, block.d :]))


def _rbf_products(block: RBF, z: Interval, theta: Tensor, p: Interval) -> tuple[Interval, Interval]:
    u, gap = point(theta[None, :, : block.d]), z - point(theta[None, :, block.d :])
    bump = _bump(gap)
    g_c = bump * (p * u).sum(-1).unsqueeze(-1) * gap
    return -g_c, cat([bump * p, g_c], -1)


def _tanh(block: TanhMLP, z: Interval, theta: Tensor) -> tuple[Interval, Interval, Interval]:
    v, a, b = (point(part[None]) for part in theta.split([block.d, block.d, 1], dim=1))
    return v, a, ((a * z).sum(-1).unsqueeze(-1) + b).tanh()


def _tanh_value(block: TanhMLP, z: Interval, theta: Tensor) -> Interval:
    v, _, h = _tanh(block, z, theta)
    return v * h


def _tanh_products(block: TanhMLP, z: Interval, theta: Tensor, p: Interval) -> tuple[Interval, Interval]:
    v, a, h = _tanh(block, z, theta)
    slope = (1.0 - h.square()) * (p * v).sum(-1).unsqueeze(-1)
    return slope * a, cat([h * p, slope * z, slope], -1)


def _linear_value(block: Linear, z: Interval, theta: Tensor) -> Interval:
    return point(theta[None]) * z


def _linear_products(block: Linear, z: Interval, theta: Tensor, p: Interval) -> tuple[Interval, Interval]:
    each = (p * z).sum(-1).unsqueeze(-1)
    return point(theta[None]) * p, each.expand(each.shape[0], len(theta), 1)


def _bias_value(block: Bias, z: Interval, theta: Tensor) -> Interval:
    return point(theta[None]).expand(z.shape[0], *theta.shape)


def _bias_products(block: Bias, z: Interval, theta: Tensor, p: Interval) -> tuple[Interval, Interval]:
    shape = (z.shape[0], *theta.shape)
    return point(theta.new_zeros(shape)), p.expand(*shape)


_FORMULAS: dict[type, tuple[Value, Products]] = {
    BallBump: (_ball_value, _ball_products),
    GaussBump: (_gauss_value, _gauss_products),
    RBF: (_rbf_value, _rbf_products),
    TanhMLP: (_tanh_value, _tanh_products),
    Linear: (_linear_value, _linear_products),
    Bias: (_bias_value, _bias_products),
}


# --- the net ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enclosure:
    """States of all layers, outputs, and the Jacobian of the outputs in the scaled coordinates of `gram_kernel`.

    Args:
        z: states ``(L + 1, n, d)``.
        P: unit adjoints ``(L + 1, n, d)``, ``P_L = v``.
        output: ``v.z_L`` ``(n,)``.
        J: ``sqrt(w_m / L) J_{i,lm}``, ``(n, L M k)``.
        layers: the Jacobians ``I + (1/L) sum_m w_m d_z f`` of the layers ``(L, n, d, d)``, where asked for.
        B: ``max_i ||d_theta f(z_l^i, theta_lm)||`` from above ``(L, M)``, where asked for.
        kappa: ``|v|``, where asked for.
    """

    z: Interval
    P: Interval
    output: Interval
    J: Interval
    layers: Interval | None = None
    B: Tensor | None = None
    kappa: Interval | None = None

    def local_bounds(self) -> tuple[float, float, Tensor]:
        """Bound what `local_region` needs: unit adjoints over kappa, products of layers, ``d_theta f``.

        Returns:
            ``max |P| / kappa``, the largest norm of a product of successive `layers`, and ``max_i ||d_theta f||``
            ``(L, M)``, all from above.
        """
        largest, products = 1.0, self.layers[:0]
        for l in range(self.layers.shape[0]):
            layer = self.layers[l : l + 1]
            grown = (layer.unsqueeze(-1) * products.unsqueeze(-3)).sum(-2)  # matrix products
            products = cat([grown, layer], 0)
            largest = max(largest, _norm_upper(products))
        adjoint = (rigor.norm(self.P) / self.kappa).hi
        return float(adjoint.max()), largest, self.B

    def bounds(self, y: Float[Tensor, " n"], counts: Int[Tensor, " n"]) -> tuple[float, float, float, float]:
        """Bound the residual norm, ``lambda_min`` and ``lambda_max`` of ``J J^T``, and the largest norm of a state.

        Every enclosed J is within the Frobenius norm of its radius of the midpoint, whose extreme singular values are
        bounded by `rigor`.

        Args:
            y: targets.
            counts: how often each sample occurs; its residual and its row count with the root of that.

        Returns:
            ``|r|`` (upper), ``lambda_min`` (lower, 0.0 when nothing positive is shown), ``lambda_max`` (upper), and
            ``max |z|`` (upper).
        """
        root = point(counts.to(y)).sqrt()
        residual = rigor.frobenius_norm_upper(((self.output - point(y)) * root).magnitude()[None])
        mid, radius = (self.J * root.unsqueeze(1)).split()
        error = rigor.frobenius_norm_upper(radius)
        low = rigor.sigma_min_lower(mid) if mid.shape[0] <= mid.shape[1] else 0.0
        low = max(0.0, rigor.round_down(low - error))
        high = rigor.round_up(rigor.spectral_norm_upper(mid) + error)
        size = float(rigor.norm(self.z).hi.max())
        if not math.isfinite(high * high):
            raise ValueError(_TOO_LARGE)
        return residual, rigor.round_down(low * low, 2) if low else 0.0, rigor.round_up(high * high, 2), size


def enclose(
    block: Block,
    theta: Float[Tensor, "L M k"],
    X: Float[Tensor, "n d"],
    v: Float[Tensor, " d"],
    weights: Float[Tensor, " M"] | None = None,
    *,
    local: bool = False,
) -> Enclosure:
    """Run the net and its adjoint in interval arithmetic, for the stored numbers as they are.

    Args:
        block: `BallBump`, `GaussBump`, `RBF`, `TanhMLP`, `Linear` or `Bias`.
        theta: one network ``(L, M, k)``, float64, on the CPU.
        X: inputs ``(n, d)``.
        v: the readout ``(d,)``.
        weights: ``(M,)``; None for ``1/M``.
        local: also the Jacobians of the layers and ``||d_theta f||``.

    Returns:
        An `Enclosure`.

    Raises:
        TypeError: a block without interval formulas, or numbers that are not float64 on the CPU.
        ValueError: a Jacobian of more than 2 10^7 numbers.
    """
    if type(block) not in _FORMULAS:
        known = ", ".join(sorted(t.__name__ for t in _FORMULAS))
        raise TypeError(f"block is {type(block).__name__}; interval formulas exist for {known}")
    for name, A in (("theta", theta), ("X", X), ("v", v)):
        if A.dtype != torch.float64 or A.device.type != "cpu":
            raise TypeError(f"{name} is {A.dtype} on {A.device}; interval arithmetic needs float64 on the CPU")
    (L, M, k), (n, d) = theta.shape, X.shape
    if n * L * M * k > _LARGEST:
        raise ValueError(f"n L M k is {n * L * M * k}; the certified level is for at most {_LARGEST}, use 'measured'")
    value, products = _FORMULAS[type(block)]
    share = (1 / point(M)).expand(M) if weights is None else point(weights)
    share = share / L
    column = share.unsqueeze(1)
    states = [point(X)]
    for layer in theta:
        moved = (value(block, states[-1].unsqueeze(1), layer) * column).sum(1)
        states.append(states[-1] + moved)
    P = [point(v.expand(n, d))]
    rows = []
    for l in range(L - 1, -1, -1):
        back, each = products(block, states[l].unsqueeze(1), theta[l], P[-1].unsqueeze(1))
        rows.append((each * column.sqrt()).flatten(1))
        P.append(P[-1] + (back * column).sum(1))
    z, adjoints = (stack(list(part)) for part in (states, reversed(P)))
    output = (z[-1] * point(v)).sum(-1)
    J = cat(rows[::-1], 1)
    if not all(bool(torch.isfinite(end).all()) for part in (output, J) for end in (part.lo, part.hi)):
        raise ValueError(_TOO_LARGE)
    if not local:
        return Enclosure(z, adjoints, output, J)
    return Enclosure(z, adjoints, output, J, *_derivatives(block, z, theta, column), rigor.norm(point(v)))


def _derivatives(block: Block, z: Interval, theta: Tensor, column: Interval) -> tuple[Interval, Tensor]:
    """The Jacobians of the layers ``(L, n, d, d)``, and the largest Frobenius norm of ``d_theta f`` ``(L, M)``."""
    products, n, d = _FORMULAS[type(block)][1], z.shape[1], z.shape[2]
    eye = torch.eye(d, dtype=theta.dtype, device=theta.device)
    layers, B = [], []
    for l, particles in enumerate(theta):
        rows, squares = [], None
        for a in range(d):  # component a of f
            back, each = products(block, z[l].unsqueeze(1), particles, point(eye[a].expand(n, 1, d)))
            rows.append((back * column).sum(1) + point(eye[a]))
            square = each.square().sum(-1)
            squares = square if squares is None else squares + square
        layers.append(stack(rows))  # (d, n, d)
        B.append(squares.sqrt().hi.amax(0))
    stacked = stack(layers)
    return Interval(stacked.lo.transpose(1, 2), stacked.hi.transpose(1, 2)), torch.stack(B)


def _norm_upper(A: Interval) -> float:
    """The largest spectral norm of enclosed matrices: ``min(||A||_F, sqrt(||A||_1 ||A||_inf))``, rounded up."""
    size = Interval(*[A.magnitude()] * 2)
    frobenius = rigor.norm(rigor.norm(size))
    columns, rows = (size.sum(dim).hi.amax(-1) for dim in (-2, -1))
    mixed = (Interval(columns, columns) * Interval(rows, rows)).sqrt()
    return float(torch.minimum(frobenius.hi, mixed.hi).max())
