"""Two-layer networks as blocks, the usual residual ones: `TanhMLP` and `ReluMLP`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from companion.mean_field.blocks.base import Answers, Block, Constants, largest_form, largest_norm, like
from companion.rigor import Interval
from companion.rigor.formulas import sqrt
from companion.runs import count


class _MLP(Block):
    """``f = v sigma(a . z + b)`` with ``theta = (v, a, b)``, ``k = 2 d + 1``; a subclass gives sigma."""

    @property
    def k(self) -> int:
        return 2 * self.d + 1

    @property
    def _parts(self) -> tuple[slice, slice, slice]:
        return slice(self.d), slice(self.d, 2 * self.d), slice(2 * self.d, None)

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, a, b = (theta[..., part] for part in self._parts)
        return v, a, b[..., 0]

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
        count("d", self.d, 1)

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(s)
        return h, 1 - h * h

    def constants(
        self,
        theta: Float[Tensor, "*B k"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        """Bounds in terms of ``|v|``, ``|a|`` and the states' norm; without `theta` both are at most `radius`."""
        of, V, W = like(theta), *(largest_norm(theta, radius, part) for part in self._parts[:2])
        lift, bend = sqrt(1 + of(reach) ** 2), of(Fraction(4, 3)) / sqrt(of(3))  # bend = max |tanh''|
        return Constants(
            F=V,
            A=V * W,
            A_F=V * W,
            B=sqrt(1 + V * V * lift**2),
            H_zz=bend * V * W * W,
            H_ztheta=sqrt(W * W + (V * (bend * W * lift + 1)) ** 2),
            H_thetatheta=largest_form(lift, bend * V * lift**2),
        )

    def _answers(self) -> Answers:
        return (
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
        count("d", self.d, 1)

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return s.relu(), (s > 0).to(s.dtype)

    def constants(
        self,
        theta: Float[Tensor, "*B k"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        """Bounds of the first derivatives where they exist; there are none for second derivatives."""
        V, W, offset = (largest_norm(theta, radius, part) for part in self._parts)
        r = like(theta)(reach)
        top = W * r + offset
        B = sqrt(top**2 + V * V * (1 + r**2))
        return Constants(V * top, V * W, V * W, B, math.inf, math.inf, math.inf)

    def _answers(self) -> Answers:
        return (
            ("no", "relu has a kink"),
            ("no", "the second derivatives do not exist"),
            ("yes", "two-layer networks are dense"),
            ("no", "homogeneous of degree 2 for positive factors only, and not twice differentiable"),
            ("no", "k_1 is neither 1 nor k for a C2 block of this form"),
            ("no", "a normal law is not concentrated on a bounded set"),
            ("not checkable", "needs a differentiable dE/drho"),
        )
