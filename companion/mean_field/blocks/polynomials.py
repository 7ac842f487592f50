"""Blocks that are polynomials, each too poor for one reason: `Linear`, `Bias` and `Squares`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.mean_field.blocks.base import Answers, Block, Constants, largest_norm, like
from companion.rigor import Interval
from companion.rigor.formulas import sqrt
from companion.runs import count


@dataclass(frozen=True)
class Linear(Block):
    """``f(z, theta) = theta z`` with one number theta, ``k = 1``: a network that can only stretch.

    Args:
        d: the dimension of the state.
    """

    d: int = 1

    def __post_init__(self) -> None:
        count("d", self.d, 1)

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
        self,
        theta: Float[Tensor, "*B 1"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        of, T = like(theta), largest_norm(theta, radius)
        return Constants(T * of(reach), T, T * sqrt(of(self.d)), of(reach), of(0), of(1), of(0))

    def _answers(self) -> Answers:
        return (
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
        count("d", self.d, 1)

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
        self,
        theta: Float[Tensor, "*B d"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        of = like(theta)
        return Constants(largest_norm(theta, radius), of(0), of(0), of(1), of(0), of(0), of(0))

    def _answers(self) -> Answers:
        return (
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
        count("d", self.d, 1)

    @property
    def k(self) -> int:
        return self.d * (self.d + 1)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*B k"]:
        return super().draw(shape, generator) / 4

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B k"]) -> Float[Tensor, "*B d"]:
        rows = theta.unflatten(-1, (self.d, self.d + 1))
        return ((rows[..., : self.d] * z[..., None, :]).sum(-1) + rows[..., self.d]).square()

    def constants(
        self,
        theta: Float[Tensor, "*B k"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        """Bounds in terms of ``|theta|`` and the states' norm."""
        of, T = like(theta), largest_norm(theta, radius)
        lift = sqrt(1 + of(reach) ** 2)
        return Constants(
            F=T * T * lift**2,
            A=2 * T * T * lift,
            A_F=2 * T * T * lift,
            B=2 * T * lift**2,
            H_zz=2 * T * T,
            H_ztheta=4 * T * lift,
            H_thetatheta=2 * lift**2,
        )

    def _answers(self) -> Answers:
        return (
            ("yes", "a polynomial"),
            ("no", "f grows like |z|^2"),
            ("no", "the averages are polynomials of degree 2, and nonnegative"),
            ("yes", "2-homogeneous, the other case of the theory: there universality must fail"),
            ("no", "k_1 = k"),
            ("no", "a normal law is not concentrated between two spheres"),
            ("not checkable", "moot without universality"),
        )
