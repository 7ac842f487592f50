"""Blocks made of bell curves: `BallBump`, for which the convergence theorem holds, `GaussBump` and `RBF`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from companion.mean_field.blocks.base import Answers, Block, Constants, check_positive, largest_form, largest_norm, like
from companion.rigor import Interval
from companion.rigor.formulas import exp, sqrt
from companion.runs import count

_SQRT_E = math.exp(0.5)


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
        count("d", self.d, 1)
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
        self,
        theta: Float[Tensor, "*B k"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        """Bounds in terms of ``U``, the largest ``|u|``, for all z, omega; without `theta`, `radius` is U itself."""
        of, U = like(theta), largest_norm(theta, radius, slice(1))
        R2, inv_e = of(self.R) ** 2, exp(of(-1))
        beta = R2 * exp(1 / R2 - 1) if self.R >= 1 else of(1)
        chart = of(Fraction(48, 25)) / sqrt(of(5))  # of the second derivative of omega -> omega / sqrt(1 + |omega|^2)
        H = (R2 + sqrt(R2**2 + 4 * R2 * inv_e)) / 2 + chart * sqrt(beta)
        return Constants(
            F=U,
            A=U * sqrt(inv_e),
            A_F=U * sqrt(inv_e),
            B=sqrt(1 + U * U * beta),
            H_zz=U,
            H_ztheta=sqrt(inv_e + U * U * (inv_e + R2)),
            H_thetatheta=largest_form(sqrt(beta), U * H),
        )

    def _answers(self) -> Answers:
        return (
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
        self,
        theta: Float[Tensor, "*B 1"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        of = like(theta)
        alpha, root = of(self.alpha), sqrt(of(6))
        A = alpha * exp(of(1) / 2)
        H = alpha * root * sqrt(3 - root) * exp((root - 2) / 2)  # |3 s - s^3| exp((1 - s^2) / 2) at s^2 = 3 - sqrt(6)
        return Constants(alpha, A, A, A, H, H, H)

    def _answers(self) -> Answers:
        return (
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
        count("d", self.d, 1)

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
        self,
        theta: Float[Tensor, "*B k"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        """Bounds in terms of ``U``, the largest ``|u|``; without `theta`, `radius` is U itself."""
        of, U = like(theta), largest_norm(theta, radius, slice(self.d))
        inv_e = exp(of(-1))
        return Constants(
            F=U,
            A=U * sqrt(inv_e),
            A_F=U * sqrt(inv_e),
            B=sqrt(1 + U * U * inv_e),
            H_zz=U,
            H_ztheta=sqrt(inv_e + U * U),
            H_thetatheta=largest_form(sqrt(inv_e), U),
        )

    def _answers(self) -> Answers:
        return (
            ("yes", "smooth in z and theta"),
            ("yes", "bounded for bounded |u|"),
            ("yes", "Gaussians with all centres are dense"),
            ("no" if self.d > 1 else "yes", "f is linear in u, which has d coordinates"),
            ("no" if self.d > 1 else "yes", f"k_1 = {self.d}, where the theorem has 1"),
            ("no", "the law is not concentrated on bounded u"),
            ("not checkable", "the centres are unbounded and dE/drho vanishes at infinity"),
        )
