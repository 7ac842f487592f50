"""The infinitely wide, infinitely deep ResNet: weighted particles that carry the law of the parameters.

The law at depth t in [0, 1] is ``rho_t = sum_m w_m delta(theta_m(t))``. One block and data ``X`` (n, d), ``y`` (n,),
readout ``g(z) = v.z``, loss ``E = (1/2n) sum_i r_i^2`` with ``r_i = v.Z_i(1) - y_i``::

    dZ/dt = int f(Z, theta) drho_t,  Z(0) = x       dP/dt = -(d_z int f drho_t)^T P,  P(1) = r v
    d theta/ds = -grad_theta (dE/drho),             (dE/drho)(theta, t) = (1/n) sum_i P_i(t).f(Z_i(t), theta)

Depth is resolved by collocation in D Chebyshev points, so that the error falls faster than any power of 1/D; the
training time s by the classical Runge-Kutta scheme, or by gradient descent's own Euler steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import checked
from companion.mean_field.blocks import Block, check_fit, check_positive

_ROUNDS = 60  # of Newton's iteration for the states; two or three are usual
_MOST_STEPS = 10**7
_MOST_NODES = 10**4  # of a rule, and points in depth


# --- laws as weighted particles ---------------------------------------------------------------------------------------


@checked
def density_rule(
    density: Callable[[Tensor], Tensor], support: tuple[float, float], m: int
) -> tuple[Float[Tensor, "m 1"], Float[Tensor, " m"]]:
    """Gauss-Legendre: ``int g rho dtheta ~ sum_m w_m g(theta_m)`` for a density on an interval, weights summing to 1.

    Args:
        density: a nonnegative function of a tensor, up to a factor.
        support: the interval (a, b).
        m: number of nodes.

    Returns:
        Nodes ``(m, 1)`` and weights ``(m,)``.

    Raises:
        ValueError: an empty interval, no node, or a density that is negative, not finite or zero at every node.
    """
    if len(support) != 2 or not support[0] < support[1] or not 1 <= m <= _MOST_NODES:
        raise ValueError(f"support and m are {support}, {m}; (a, b), a < b, and 1 <= m <= {_MOST_NODES} are needed")
    a, b = support
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(m))
    nodes = a + (b - a) * (nodes + 1) / 2
    values = density(nodes)
    if not bool((torch.isfinite(values) & (values >= 0)).all()) or not bool(values.any()):
        raise ValueError("density is negative, not finite, or zero at every node; a density is needed")
    weights = weights * values
    return nodes[:, None], weights / weights.sum()


@checked
def normal_rule(dims: int, order: int) -> tuple[Float[Tensor, "M k"], Float[Tensor, " M"]]:
    """The law ``u = 0``, ``omega ~ N(0, I)`` by the product Gauss-Hermite rule: ``order ** dims`` particles.

    Args:
        dims: the dimension of omega, ``2 d`` for `BallBump`.
        order: nodes in each coordinate.

    Returns:
        Particles ``(u, omega)`` ``(order ** dims, 1 + dims)`` and weights summing to 1.
    """
    if not 1 <= dims <= 32 or not 1 <= order <= _MOST_NODES or order**dims > 10**7:
        raise ValueError(f"dims and order are {dims} and {order}; positive numbers with order^dims <= 10^7 are needed")
    x, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(order))
    omega = torch.cartesian_prod(*[x] * dims).reshape(-1, dims)
    weights = torch.cartesian_prod(*[w / w.sum()] * dims).reshape(-1, dims).prod(1)
    return torch.cat([torch.zeros(len(omega), 1, dtype=x.dtype), omega], dim=1), weights / weights.sum()


# --- depth ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Depth:
    """Collocation in depth: ``int_0^{t_j} g dt ~ sum_k Q_jk g(t_k)`` in D Chebyshev-Lobatto points of [0, 1].

    Args:
        t: the points ``(D,)``, from 0 to 1.
        Q: the integration matrix ``(D, D)``, exact for polynomials of degree below D; its last row is the
            Clenshaw-Curtis rule.
    """

    t: Float[Tensor, " D"]
    Q: Float[Tensor, "D D"]

    @staticmethod
    def chebyshev(D: int, like: Tensor | None = None) -> Depth:
        """The rule with D points, on the device of `like`."""
        if not 2 <= D <= _MOST_NODES:
            raise ValueError(f"depth is {D}; at least 2 points are needed, and at most {_MOST_NODES}")
        x = -np.cos(np.pi * np.arange(D) / (D - 1))
        x[np.abs(x) < 1e-15] = 0.0
        series = np.eye(D)
        integrals = np.stack([np.polynomial.chebyshev.chebint(c, lbnd=-1) for c in series])  # (D, D + 1)
        values = np.polynomial.chebyshev.chebvander(x, D) @ integrals.T
        Q = values @ np.linalg.inv(np.polynomial.chebyshev.chebvander(x, D - 1)) / 2
        Q[0] = 0.0
        device = None if like is None else like.device
        return Depth(torch.from_numpy((x + 1) / 2).to(device), torch.from_numpy(Q).to(device))

    def interpolate(self, values: Float[Tensor, "D ..."], t: Float[Tensor, " T"]) -> Float[Tensor, "T ..."]:
        """The polynomial through the values in the D points, at other depths t: the barycentric formula."""
        sign = torch.ones_like(self.t)
        sign[1::2] = -1
        sign[0], sign[-1] = sign[0] / 2, sign[-1] / 2
        gap = t[:, None] - self.t
        exact = gap == 0
        share = sign / torch.where(exact, torch.ones_like(gap), gap)
        share = torch.where(exact.any(1, keepdim=True), exact.to(share), share)
        return torch.tensordot(share / share.sum(1, keepdim=True), values, dims=1)

    def states(
        self,
        field: Callable[[Tensor], tuple[Tensor, Tensor]],
        X: Float[Tensor, "n d"],
        guess: Float[Tensor, "D n d"],
    ) -> tuple[Float[Tensor, "D n d"], Float[Tensor, "D n d d"]]:
        """Solve ``Z(t_j) = x + sum_k Q_jk F(Z_k, t_k)`` by Newton's iteration, all depths at once.

        Args:
            field: maps Z ``(D, n, d)`` to F ``(D, n, d)`` and its derivative ``(D, n, d, d)``, ``[..., a, b]`` the
                derivative of component a with respect to ``z_b``.
            X: the inputs.
            guess: where to begin.

        Returns:
            Z and the derivative of F along it.

        Raises:
            ValueError: the iteration does not settle.
        """
        Z, last = guess, math.inf
        for _ in range(_ROUNDS):
            F, J = field(Z)
            defect = X + torch.tensordot(self.Q, F, dims=1) - Z
            size = float(defect.abs().max() / (1 + Z.abs().max()))
            if size < 1e-14 or (size < 1e-11 and size > last / 4):
                return Z, J
            Z, last = Z + _collocate(self.Q, J, defect), size
            if not math.isfinite(size):
                break
        raise ValueError(f"depth has {len(self.t)} points, too few for this field, or X, y or v are too large")

    def adjoint(self, J: Float[Tensor, "D n d d"], last: Float[Tensor, "n d"]) -> Float[Tensor, "D n d"]:
        """Solve ``P(t_j) = P(1) + int_{t_j}^1 J^T P dt`` in the same points."""
        return _collocate(self.Q[-1] - self.Q, J.mT, last.expand(len(self.t), -1, -1))


def _collocate(Q: Tensor, J: Tensor, right: Tensor) -> Tensor:
    """Solve ``U_j - sum_k Q_jk J_k U_k = right_j`` for every sample; J is (D, n, d, d), right (D, n, d)."""
    D, n, d = right.shape
    system = -(Q[None, :, None, :, None] * J.permute(1, 2, 0, 3)[:, None])  # (n, D, d, D, d)
    system = system.reshape(n, D * d, D * d)
    system.diagonal(dim1=1, dim2=2).add_(1)
    solved = torch.linalg.solve(system, right.transpose(0, 1).reshape(n, D * d, 1))
    return solved.reshape(n, D, d).transpose(0, 1)


# --- the limit flow ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """The limit along training: T snapshots, D depths, n samples, M particles.

    Args:
        times: training times s ``(T,)``.
        t: depths ``(D,)``, Chebyshev points of [0, 1].
        loss: E ``(T,)``, without the regulariser.
        Z: states ``(T, D, n, d)``.
        P: adjoint states ``(T, D, n, d)``.
        theta: particles ``(T, D, M, k)``.
        weights: ``(M,)``.
    """

    times: Tensor
    t: Tensor
    loss: Tensor
    Z: Tensor
    P: Tensor
    theta: Tensor
    weights: Tensor

    def particles_at(self, t: Float[Tensor, " D2"]) -> Float[Tensor, "T D2 M k"]:
        """The particles at other depths."""
        depth = Depth.chebyshev(len(self.t), self.t)
        return depth.interpolate(self.theta.transpose(0, 1), t.to(self.t)).transpose(0, 1)


def derivative(block: Block, z: Tensor, theta: Tensor, weights: Tensor) -> Float[Tensor, "S n d d"]:
    """The derivative of the mean field, ``[..., a, b]`` that of component a with respect to ``z_b``: d pullbacks."""
    rows = []
    for a in range(z.shape[-1]):
        p = torch.zeros_like(z)
        p[..., a] = 1
        rows.append(block.pull(z, theta, weights, p)[0])
    return torch.stack(rows, dim=-2)


def check_times(times: Sequence[float] | Tensor) -> Float[Tensor, " T"]:
    """The training times as float64 on the CPU, or one sentence: they must be from 0 on, and increasing."""
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if not len(times) or not bool((times >= 0).all() & (times.diff() > 0).all()):
        raise ValueError(f"times is {times.tolist()}; increasing finite numbers from 0 on are needed")
    return times


class _Limit:
    """The right-hand side of the limit flow in collocation; remembers the last states as the next guess."""

    def __init__(
        self, block: Block, X: Tensor, y: Tensor, v: Tensor, weights: Tensor, depth: Depth, decay: float
    ) -> None:
        self.block, self.X, self.y, self.v, self.weights = block, X, y, v, weights
        self.depth, self.decay = depth, decay
        self.Z: Tensor | None = None

    def solve(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States, adjoint states and residuals for particles (D, M, k)."""
        if self.Z is None:
            self.Z = self._euler(theta)

        def field(Z: Tensor) -> tuple[Tensor, Tensor]:
            F = self.block.mean_field(Z, theta, self.weights)
            return F, derivative(self.block, Z, theta, self.weights)

        self.Z, J = self.depth.states(field, self.X, self.Z)
        r = self.Z[-1] @ self.v - self.y
        return self.Z, self.depth.adjoint(J, r[:, None] * self.v), r

    def _euler(self, theta: Tensor) -> Tensor:
        Z = [self.X]
        for j, gap in enumerate(self.depth.t.diff().tolist()):
            Z.append(Z[-1] + gap * self.block.mean_field(Z[-1][None], theta[j, None], self.weights)[0])
        return torch.stack(Z)

    def velocity(self, theta: Tensor, s: float) -> Tensor:
        Z, P, _ = self.solve(theta)
        move = self.block.pull(Z, theta, self.weights, P)[1] / -len(self.y)
        return move - 2 * self.decay * math.exp(-s) * theta if self.decay else move


@checked(double=True)
def limit_flow(
    block: Block,
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    theta: Float[Tensor, "*D M k"],
    weights: Float[Tensor, " M"],
    *,
    times: Sequence[float] | Float[Tensor, " T"],
    step: float,
    method: Literal["rk4", "gd"] = "rk4",
    depth: int = 13,
    decay: float = 0.0,
) -> Flow:
    """Integrate ``d theta/ds = -grad (dE/drho)`` for weighted particles: the infinitely deep net of law ``rho``.

    Args:
        block: the block.
        X: inputs ``(n, d)``.
        y: targets ``(n,)``.
        v: the readout ``(d,)``.
        theta: initial particles ``(M, k)``, the same at every depth, or ``(D, M, k)`` in the Chebyshev points.
        weights: ``(M,)``, nonnegative, sum 1.
        times: increasing training times at which to keep the flow; the first may be 0.
        step: the largest step in s; each interval between two times is divided evenly.
        method: ``"rk4"`` for the flow, ``"gd"`` for gradient descent of this step (Euler in s).
        depth: number of points in depth.
        decay: c in the regulariser ``c e^{-s} int int |theta|^2``, which the paper's flow has with c = 1 (0: none).

    Returns:
        A `Flow`.

    Raises:
        TypeError, ValueError: data that are not finite float64, weights not summing to 1, times not increasing, a
            step that is not positive, an unknown method, or too few points in depth.

    Source: the limit equations, lesson 2.
    """
    times = check_times(times)
    check_positive("step", step)
    if float(times[-1]) / step > _MOST_STEPS:
        raise ValueError(f"step is {step}; at most {_MOST_STEPS} steps up to time {float(times[-1])} are possible")
    check_fit(block, theta, X, weights, y=y, v=v)
    rule = Depth.chebyshev(depth, X)
    if theta.ndim == 2:
        theta = theta.expand(depth, -1, -1)
    if theta.ndim != 3 or len(theta) != depth:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (M, k) or ({depth}, M, k) is needed")
    limit = _Limit(block, X, y, v, weights, rule, decay)
    theta, s, kept = theta.clone(), 0.0, []
    for target in times.tolist():
        count = math.ceil((target - s) / step - 1e-9)
        for j in range(count):
            h = (target - s) / count
            theta = _advance(limit, theta, s + j * h, h, method)
        s = target
        Z, P, r = limit.solve(theta)
        kept.append((0.5 * r.square().mean(), Z, P, theta))
    loss, Z, P, particles = (torch.stack(column) for column in zip(*kept, strict=True))
    return Flow(times.to(X), rule.t, loss, Z, P, particles, weights)


def _advance(limit: _Limit, theta: Tensor, s: float, h: float, method: str) -> Tensor:
    one = limit.velocity(theta, s)
    if method == "gd":
        return theta + h * one
    two = limit.velocity(theta + h / 2 * one, s + h / 2)
    three = limit.velocity(theta + h / 2 * two, s + h / 2)
    four = limit.velocity(theta + h * three, s + h)
    return theta + h / 6 * (one + 2 * (two + three) + four)
