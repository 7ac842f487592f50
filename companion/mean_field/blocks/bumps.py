"""Blocks ``f(z, theta)`` of residual networks that average over particles: ``z <- z + (1/L) sum_m w_m f(z, theta_m)``.

A block knows its function and how to multiply by its derivatives, the constants that the theorems of lesson 2 need, and
which of their hypotheses it satisfies.  States are ``z (S, n, d)``, one layer's particles ``theta (S, M, k)`` with
weights ``w (M,)``.  `companion.block_base` says what a block of one's own must give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.mean_field.blocks.base import (
    HYPOTHESES,
    Block,
    Constants,
    Custom,
    Hypothesis,
    audit,
    check_dimension,
    check_positive,
    largest,
    norm,
    reached,
)

__all__ = [
    "HYPOTHESES", "RBF", "BallBump", "Bias", "Block", "Constants", "Custom", "GaussBump", "Hypothesis", "Linear",
    "ReluMLP", "Squares", "TanhMLP",
]  # fmt: skip

_SQRT_E = math.exp(0.5)
_GAUSS_H = 2.275432  # max |(3 s - s^3) exp((1 - s^2) / 2)|, at s^2 = 3 - sqrt(6), rounded up
_TANH_H = 0.769801  # max |tanh''| = 4 / (3 sqrt(3)), rounded up
_BALL_H = 0.8587  # bound of the second derivative of the chart omega -> omega / sqrt(1 + |omega|^2)


@dataclass(frozen=True)
class BallBump(Block):
    """``f(z, (u, omega)) = u b exp(-|z - R c|^2 / 2)`` with ``(b, c) = omega / sqrt(1 + |omega|^2)`` in the unit ball.

    ``u`` is one number, ``b`` and ``c`` are in R^d, so ``k = 2 d + 1``; the lesson's main block, for which the
    hypotheses of the convergence theorem hold.  Initial law: ``u = 0``, ``omega ~ N(0, I)``.

    Args:
        d: the dimension of the state.
        R: the radius of the ball of centres.
    """

    d: int
    R: float = 3.0

    def __post_init__(self) -> None:
        check_dimension(self.d)
        check_positive("R", self.R)

    @property
    def k(self) -> int:
        return 2 * self.d + 1

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*B k"]:
        omega = torch.randn(*shape, 2 * self.d, generator=generator, dtype=torch.float64)
        return torch.nn.functional.pad(omega, (1, 0))

    def chart(
        self, theta: Float[Tensor, "*B k"]
    ) -> tuple[Float[Tensor, "*B 1"], Float[Tensor, "*B d"], Float[Tensor, "*B d"], Float[Tensor, "*B 1"]]:
        """``u, b, c`` and ``q = (1 + |omega|^2)^(-1/2)``."""
        u, omega = theta[..., :1], theta[..., 1:]
        q = (1 + (omega * omega).sum(-1, keepdim=True)).rsqrt()
        zeta = omega * q
        return u, zeta[..., : self.d], zeta[..., self.d :], q

    def unchart(self, b: Tensor, c: Tensor, q: Tensor, g_b: Tensor, g_c: Tensor) -> Tensor:
        """Pull a covector at ``(b, c)`` back to omega: ``q (g - zeta (zeta . g))``."""
        inner = (b * g_b).sum(-1, keepdim=True) + (c * g_c).sum(-1, keepdim=True)
        return torch.cat([g_b - b * inner, g_c - c * inner], -1).mul_(q)

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B k"]) -> Float[Tensor, "*B d"]:
        u, b, c, _ = self.chart(theta)
        return u * b * torch.exp(-0.5 * (z - self.R * c).square().sum(-1, keepdim=True))

    def _bumps(self, z: Tensor, c: Tensor) -> Tensor:
        """``exp(-|z_i - R c_m|^2 / 2)``, ``(S, n, M)``."""
        exponent = torch.bmm(z, (self.R * c).mT)
        exponent -= 0.5 * z.square().sum(-1)[:, :, None]
        exponent -= 0.5 * (self.R * c).square().sum(-1)[:, None]
        return exponent.exp_()

    def mean_field(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M k"], w: Float[Tensor, " M"]
    ) -> Float[Tensor, "S n d"]:
        u, b, c, _ = self.chart(theta)
        return torch.bmm(self._bumps(z, c), u * b * w[:, None])

    def pull(
        self,
        z: Float[Tensor, "S n d"],
        theta: Float[Tensor, "S M k"],
        w: Float[Tensor, " M"],
        p: Float[Tensor, "S n d"],
    ) -> tuple[Float[Tensor, "S n d"], Float[Tensor, "S M k"]]:
        u, b, c, q = self.chart(theta)
        bumps = self._bumps(z, c)
        g_b = torch.bmm(bumps.mT, p)  # sum_i E_im p_i, the u of d f / d b still missing
        pairs = torch.bmm(p, b.mT).mul_(bumps)  # E_im (p_i . b_m), so that p_i^T f = u_m times it
        total = pairs.sum(1)[:, :, None]
        g_c = u * self.R * (torch.bmm(pairs.mT, z) - self.R * c * total)
        wu = u * w[:, None]
        back = torch.bmm(pairs, wu * self.R * c) - z * torch.bmm(pairs, wu)
        return back, torch.cat([total, self.unchart(b, c, q, u * g_b, g_c)], -1)

    def rows(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M k"], p: Float[Tensor, "S n d"]
    ) -> Float[Tensor, "S n M k"]:
        u, b, c, q = (t[:, None] for t in self.chart(theta))
        bumps = self._bumps(z, c[:, 0])[..., None]
        pairs = bumps * (p[:, :, None] * b).sum(-1, keepdim=True)
        g_c = u * self.R * pairs * (z[:, :, None] - self.R * c)
        return torch.cat([pairs, self.unchart(b, c, q, u * bumps * p[:, :, None], g_c)], -1)

    def constants(
        self, theta: Float[Tensor, "*B k"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        """Bounds in terms of ``U``, the largest ``|u|``, for all z, omega; without `theta`, `radius` is U itself."""
        radius = reached(theta, radius)
        U = radius if theta is None else theta[..., 0].abs() + radius
        R2 = self.R**2
        beta = R2 * math.exp(1 / R2 - 1) if self.R >= 1 else 1.0
        H = 0.5 * (R2 + math.sqrt(R2**2 + 4 * R2 / math.e)) + _BALL_H * math.sqrt(beta)
        return Constants(
            F=U,
            A=U / _SQRT_E,
            A_F=U / _SQRT_E,
            B=(1 + U * U * beta) ** 0.5,
            H_zz=U,
            H_ztheta=(1 / math.e + U * U * (1 / math.e + R2)) ** 0.5,
            H_thetatheta=largest(math.sqrt(beta), U * H),
        )

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("yes", "smooth in z, u and omega"),
            ("yes", "bounded for bounded |u|, uniformly in z and omega"),
            ("yes", "Gaussians with centres in a ball, times polynomials as limits, are dense"),
            ("yes", "f = u times a bounded Lipschitz function with Lipschitz differential"),
            ("yes", "k_1 = 1: u is one number"),
            ("yes", "the law is {u = 0} times a law with full support: every path from u < 0 to u > 0 meets it"),
            ("yes", "dE/drho is b . phi(c), smooth up to the boundary of the ball"),
        )


@dataclass(frozen=True)
class GaussBump(Block):
    """``f(z, theta) = alpha sqrt(e) (z - theta) exp(-(z - theta)^2 / 2)`` for ``d = k = 1``.

    All constants are global: ``F = alpha``, ``A = B = alpha sqrt(e)``, all ``H = 2.2754 alpha``.  One particle has no
    free factor, so that universality fails.  Initial law: density ``(1 - theta^2 / 9)^2 * 5 / 16`` on [-3, 3].

    Args:
        alpha: the height of the bump.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha)

    @property
    def d(self) -> int:
        return 1

    @property
    def k(self) -> int:
        return 1

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*B 1"]:
        # the density is that of Beta(3, 3) stretched to [-3, 3]: the median of five uniform numbers
        five = torch.rand(*shape, 5, generator=generator, dtype=torch.float64)
        return (6 * five.median(-1).values - 3)[..., None]

    @staticmethod
    def density(theta: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """The density of the initial law, ``(5/16) (1 - theta^2/9)^2`` on [-3, 3]."""
        return 0.3125 * (1 - theta.square() / 9).clamp_min(0).square()

    def f(self, z: Float[Tensor, "*#B 1"], theta: Float[Tensor, "*#B 1"]) -> Float[Tensor, "*B 1"]:
        s = z - theta
        return self.alpha * _SQRT_E * s * torch.exp(-0.5 * s * s)

    def _gauss(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``s = z_i - theta_m`` and ``alpha sqrt(e) exp(-s^2 / 2)``, each ``(S, n, M)``."""
        s = z - theta.mT
        return s, torch.exp(-0.5 * s * s).mul_(self.alpha * _SQRT_E)

    def mean_field(
        self, z: Float[Tensor, "S n 1"], theta: Float[Tensor, "S M 1"], w: Float[Tensor, " M"]
    ) -> Float[Tensor, "S n 1"]:
        s, g = self._gauss(z, theta)
        return (s.mul_(g) @ w)[..., None]

    def pull(
        self,
        z: Float[Tensor, "S n 1"],
        theta: Float[Tensor, "S M 1"],
        w: Float[Tensor, " M"],
        p: Float[Tensor, "S n 1"],
    ) -> tuple[Float[Tensor, "S n 1"], Float[Tensor, "S M 1"]]:
        s, g = self._gauss(z, theta)
        slope = g.mul_(1 - s * s)  # d f / d z, and minus d f / d theta
        return p * (slope @ w)[..., None], -torch.bmm(slope.mT, p)

    def rows(
        self, z: Float[Tensor, "S n 1"], theta: Float[Tensor, "S M 1"], p: Float[Tensor, "S n 1"]
    ) -> Float[Tensor, "S n M 1"]:
        s, g = self._gauss(z, theta)
        return (-p * g.mul_(1 - s * s))[..., None]

    def constants(
        self, theta: Float[Tensor, "*B 1"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        one = 1.0 if theta is None else theta.new_ones(theta.shape[:-1])
        F, A, H = self.alpha * one, self.alpha * _SQRT_E * one, self.alpha * _GAUSS_H * one
        return Constants(F, A, A, A, H, H, H)

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("yes", "smooth in z and theta"),
            ("yes", "bounded with all derivatives"),
            ("no", "one particle moves a state by at most alpha; the averages are bounded and not dense"),
            ("no", "no parameter enters as a factor"),
            ("no", "k_1 = 0: there is no such parameter"),
            ("no", "without a homogeneous parameter there is nothing to separate"),
            ("not checkable", "stated for homogeneous blocks only"),
        )


@dataclass(frozen=True)
class RBF(Block):
    """``f(z, (u, c)) = u exp(-|z - c|^2 / 2)`` with ``u, c`` in R^d, ``k = 2 d``.

    Args:
        d: the dimension of the state.
    """

    d: int

    def __post_init__(self) -> None:
        check_dimension(self.d)

    @property
    def k(self) -> int:
        return 2 * self.d

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B k"]) -> Float[Tensor, "*B d"]:
        u, c = theta[..., : self.d], theta[..., self.d :]
        return u * torch.exp(-0.5 * (z - c).square().sum(-1, keepdim=True))

    def _bumps(self, z: Tensor, c: Tensor) -> Tensor:
        exponent = torch.bmm(z, c.mT)
        exponent -= 0.5 * z.square().sum(-1)[:, :, None]
        exponent -= 0.5 * c.square().sum(-1)[:, None]
        return exponent.exp_()

    def mean_field(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M k"], w: Float[Tensor, " M"]
    ) -> Float[Tensor, "S n d"]:
        u, c = theta[..., : self.d], theta[..., self.d :]
        return torch.bmm(self._bumps(z, c), u * w[:, None])

    def pull(
        self,
        z: Float[Tensor, "S n d"],
        theta: Float[Tensor, "S M k"],
        w: Float[Tensor, " M"],
        p: Float[Tensor, "S n d"],
    ) -> tuple[Float[Tensor, "S n d"], Float[Tensor, "S M k"]]:
        u, c = theta[..., : self.d], theta[..., self.d :]
        bumps = self._bumps(z, c)
        g_u = torch.bmm(bumps.mT, p)
        pairs = torch.bmm(p, u.mT).mul_(bumps)  # p_i^T f(z_i, theta_m)
        g_c = torch.bmm(pairs.mT, z) - c * pairs.sum(1)[:, :, None]
        back = torch.bmm(pairs, c * w[:, None]) - z * (pairs @ w)[..., None]
        return back, torch.cat([g_u, g_c], -1)

    def constants(
        self, theta: Float[Tensor, "*B k"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        """Bounds in terms of ``U``, the largest ``|u|``; without `theta`, `radius` is U itself."""
        radius = reached(theta, radius)
        U = radius if theta is None else norm(theta[..., : self.d]) + radius
        return Constants(
            F=U,
            A=U / _SQRT_E,
            A_F=U / _SQRT_E,
            B=(1 + U * U / math.e) ** 0.5,
            H_zz=U,
            H_ztheta=(1 / math.e + U * U) ** 0.5,
            H_thetatheta=largest(1 / _SQRT_E, U),
        )

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("yes", "smooth in z and theta"),
            ("yes", "bounded for bounded |u|"),
            ("yes", "Gaussians with all centres are dense"),
            ("no" if self.d > 1 else "yes", "f is linear in u, which has d coordinates"),
            ("no" if self.d > 1 else "yes", f"k_1 = {self.d}, where the theorem has 1"),
            ("no", "the law is not concentrated on bounded u"),
            ("not checkable", "the centres are unbounded and dE/drho vanishes at infinity"),
        )


class _MLP(Block):
    """``f = v sigma(a . z + b)`` with ``theta = (v, a, b)``, ``k = 2 d + 1``; a subclass gives sigma."""

    @property
    def k(self) -> int:
        return 2 * self.d + 1

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return theta[..., : self.d], theta[..., self.d : 2 * self.d], theta[..., 2 * self.d]

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """``sigma(s)`` and ``sigma'(s)``."""
        raise NotImplementedError

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B k"]) -> Float[Tensor, "*B d"]:
        v, a, b = self._split(theta)
        return v * self._sigma((a * z).sum(-1) + b)[0][..., None]

    def mean_field(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M k"], w: Float[Tensor, " M"]
    ) -> Float[Tensor, "S n d"]:
        v, a, b = self._split(theta)
        h, _ = self._sigma(torch.baddbmm(b[:, None], z, a.mT))
        return torch.bmm(h.mul_(w), v)

    def pull(
        self,
        z: Float[Tensor, "S n d"],
        theta: Float[Tensor, "S M k"],
        w: Float[Tensor, " M"],
        p: Float[Tensor, "S n d"],
    ) -> tuple[Float[Tensor, "S n d"], Float[Tensor, "S M k"]]:
        v, a, b = self._split(theta)
        h, slope = self._sigma(torch.baddbmm(b[:, None], z, a.mT))
        g_v = torch.bmm(h.mT, p)
        slope = slope.mul_(torch.bmm(p, v.mT))
        g_a, g_b = torch.bmm(slope.mT, z), slope.sum(1)[..., None]
        return torch.bmm(slope.mul_(w), a), torch.cat([g_v, g_a, g_b], -1)


@dataclass(frozen=True)
class TanhMLP(_MLP):
    """``f(z, (v, a, b)) = v tanh(a . z + b)``, a two-layer network with smooth activation, ``k = 2 d + 1``.

    Args:
        d: the dimension of the state.
    """

    d: int

    def __post_init__(self) -> None:
        check_dimension(self.d)

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(s)
        return h, 1 - h * h

    def constants(
        self, theta: Float[Tensor, "*B k"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        """Bounds in terms of ``|v|``, ``|a|`` and the states' norm; without `theta` both are at most `radius`."""
        radius = reached(theta, radius)
        v, a, _ = (None,) * 3 if theta is None else self._split(theta)
        V, W = (radius, radius) if theta is None else (norm(v) + radius, norm(a) + radius)
        lift = math.hypot(1.0, reach)
        return Constants(
            F=V,
            A=V * W,
            A_F=V * W,
            B=(1 + V * V * lift**2) ** 0.5,
            H_zz=_TANH_H * V * W * W,
            H_ztheta=(W * W + (V * (_TANH_H * W * lift + 1)) ** 2) ** 0.5,
            H_thetatheta=largest(lift, _TANH_H * V * lift**2),
        )

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("yes", "smooth in z and theta"),
            ("no", "second derivatives grow like the square of the inner weights, however small v"),
            ("yes", "two-layer networks are dense"),
            ("no", "tanh(a . z + b) is not Lipschitz in z uniformly in a"),
            ("no" if self.d > 1 else "yes", f"k_1 = {self.d}, where the theorem has 1"),
            ("no", "the law is not concentrated on bounded v"),
            ("not checkable", "at infinity tanh(a . z + b) tends to a sign, which jumps"),
        )


@dataclass(frozen=True)
class ReluMLP(_MLP):
    """``f(z, (v, a, b)) = v relu(a . z + b)``, the usual residual block, ``k = 2 d + 1``; not differentiable.

    The derivative at the kink is taken as 0.

    Args:
        d: the dimension of the state.
    """

    d: int

    def __post_init__(self) -> None:
        check_dimension(self.d)

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return s.relu(), (s > 0).to(s.dtype)

    def constants(
        self, theta: Float[Tensor, "*B k"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        """Bounds of the first derivatives where they exist; there are none for second derivatives."""
        radius = reached(theta, radius)
        v, a, b = (None,) * 3 if theta is None else self._split(theta)
        V, W = (radius, radius) if theta is None else (norm(v) + radius, norm(a) + radius)
        offset = radius if theta is None else b.abs() + radius
        largest = W * reach + offset
        none = math.inf if theta is None else torch.full_like(V, math.inf)
        B = (largest**2 + V * V * (1 + reach**2)) ** 0.5
        return Constants(V * largest, V * W, V * W, B, none, none, none)

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("no", "relu has a kink"),
            ("no", "the second derivatives do not exist"),
            ("yes", "two-layer networks are dense"),
            ("no", "homogeneous of degree 2 for positive factors only, and not twice differentiable"),
            ("no", "k_1 is neither 1 nor k for a C2 block of this form"),
            ("no", "a normal law is not concentrated on a bounded set"),
            ("not checkable", "needs a differentiable dE/drho"),
        )


@dataclass(frozen=True)
class Linear(Block):
    """``f(z, theta) = theta z`` with one number theta, ``k = 1``: a network that can only stretch.

    Args:
        d: the dimension of the state.
    """

    d: int = 1

    def __post_init__(self) -> None:
        check_dimension(self.d)

    @property
    def k(self) -> int:
        return 1

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B 1"]) -> Float[Tensor, "*B d"]:
        return theta * z

    def mean_field(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M 1"], w: Float[Tensor, " M"]
    ) -> Float[Tensor, "S n d"]:
        return z * (theta[..., 0] @ w)[:, None, None]

    def pull(
        self,
        z: Float[Tensor, "S n d"],
        theta: Float[Tensor, "S M 1"],
        w: Float[Tensor, " M"],
        p: Float[Tensor, "S n d"],
    ) -> tuple[Float[Tensor, "S n d"], Float[Tensor, "S M 1"]]:
        return p * (theta[..., 0] @ w)[:, None, None], (p * z).sum((1, 2))[:, None, None].expand_as(theta).clone()

    def constants(
        self, theta: Float[Tensor, "*B 1"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        radius = reached(theta, radius)
        T = radius if theta is None else theta[..., 0].abs() + radius
        one = 1.0 if theta is None else torch.ones_like(T)
        return Constants(T * reach, T, T * math.sqrt(self.d), one * reach, 0 * one, one, 0 * one)

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("yes", "a polynomial"),
            ("yes", "bilinear in z and theta"),
            ("no", "all averages are multiples of z"),
            ("no", "linear in theta, but the factor z is not bounded"),
            ("yes", "k_1 = 1"),
            ("no", "a normal law is not concentrated on a bounded set"),
            ("not checkable", "dE/drho is linear; there are no further parameters"),
        )


@dataclass(frozen=True)
class Bias(Block):
    """``f(z, theta) = theta``, ``k = d``: all states move alike; the one case that is solved by hand.

    Args:
        d: the dimension of the state.
    """

    d: int = 1

    def __post_init__(self) -> None:
        check_dimension(self.d)

    @property
    def k(self) -> int:
        return self.d

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B d"]) -> Float[Tensor, "*B d"]:
        return theta + 0 * z

    def mean_field(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M d"], w: Float[Tensor, " M"]
    ) -> Float[Tensor, "S n d"]:
        return torch.einsum("smd,m->sd", theta, w)[:, None].expand_as(z)

    def pull(
        self,
        z: Float[Tensor, "S n d"],
        theta: Float[Tensor, "S M d"],
        w: Float[Tensor, " M"],
        p: Float[Tensor, "S n d"],
    ) -> tuple[Float[Tensor, "S n d"], Float[Tensor, "S M d"]]:
        return torch.zeros_like(z), p.sum(1)[:, None].expand_as(theta).clone()

    def constants(
        self, theta: Float[Tensor, "*B d"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        radius = reached(theta, radius)
        T = radius if theta is None else norm(theta) + radius
        one = 1.0 if theta is None else torch.ones_like(T)
        return Constants(T, 0 * one, 0 * one, one, 0 * one, 0 * one, 0 * one)

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("yes", "linear"),
            ("yes", "does not depend on z"),
            ("no", "all averages are constant in z"),
            ("no" if self.d > 1 else "yes", "linear in theta"),
            ("no" if self.d > 1 else "yes", f"k_1 = {self.d}, where the theorem has 1"),
            ("no", "a normal law is not concentrated on a bounded set"),
            ("not checkable", "dE/drho is linear; there are no further parameters"),
        )


@dataclass(frozen=True)
class Squares(Block):
    """``f_j(z, theta) = (a_j . z + b_j)^2`` with ``theta = (a_1, b_1, ..., a_d, b_d)``, ``k = d (d + 1)``.

    Smooth, homogeneous of degree 2 in theta, and nonnegative: every state can only grow.  Its averages are polynomials
    of degree 2, as those of every C2 block that is 2-homogeneous lie in a space of dimension ``k (k + 1) / 2``.
    Initial law: ``N(0, I / 16)``, so that no state explodes.

    Args:
        d: the dimension of the state.
    """

    d: int = 1

    def __post_init__(self) -> None:
        check_dimension(self.d)

    @property
    def k(self) -> int:
        return self.d * (self.d + 1)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*B k"]:
        return super().draw(shape, generator) / 4

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B k"]) -> Float[Tensor, "*B d"]:
        rows = theta.unflatten(-1, (self.d, self.d + 1))
        return ((rows[..., : self.d] * z[..., None, :]).sum(-1) + rows[..., self.d]).square()

    def constants(
        self, theta: Float[Tensor, "*B k"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        """Bounds in terms of ``|theta|`` and the states' norm."""
        radius = reached(theta, radius)
        T = radius if theta is None else norm(theta) + radius
        lift = math.hypot(1.0, reach)
        one = 1.0 if theta is None else torch.ones_like(T)
        return Constants(
            F=T * T * lift**2,
            A=2 * T * T * lift,
            A_F=2 * T * T * lift,
            B=2 * T * lift**2,
            H_zz=2 * T * T,
            H_ztheta=4 * T * lift,
            H_thetatheta=2 * lift**2 * one,
        )

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        return audit(
            ("yes", "a polynomial"),
            ("no", "f grows like |z|^2"),
            ("no", "the averages are polynomials of degree 2, and nonnegative"),
            ("yes", "2-homogeneous, the other case of the theory: there universality must fail"),
            ("no", "k_1 = k"),
            ("no", "a normal law is not concentrated between two spheres"),
            ("not checkable", "moot without universality"),
        )
