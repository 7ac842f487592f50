"""What every block of a mean-field ResNet gives: its function, products with its derivatives, constants, and an audit.

A block of one's own is a subclass of `Block` with `f` alone, or a plain function in `Custom`: everything else then
comes from automatic differentiation, only slower than the closed forms of `companion.blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Constants:
    """Bounds of a block and its derivatives, as numbers or as one number for each particle.

    Args:
        F: of ``|f|``.
        A: of ``||d_z f||``.
        A_F: of the Frobenius norm of ``d_z f``.
        B: of ``||d_theta f||``.
        H_zz: of the second derivative in z, as a bilinear form.
        H_ztheta: of the mixed one.
        H_thetatheta: of the second derivative in theta.
    """

    F: float | Tensor
    A: float | Tensor
    A_F: float | Tensor
    B: float | Tensor
    H_zz: float | Tensor
    H_ztheta: float | Tensor
    H_thetatheta: float | Tensor


class Hypothesis(NamedTuple):
    """One line of the audit of a block.

    Args:
        name: the hypothesis.
        answer: ``"yes"``, ``"no"`` or ``"not checkable"``.
        why: one sentence.
    """

    name: str
    answer: str
    why: str


HYPOTHESES = ("C2", "growth", "universality", "homogeneity", "k_1", "separation", "Sard")


def largest(a: float | Tensor, c: float | Tensor) -> float | Tensor:
    """The largest value of ``2 a x y + c y^2`` on ``x^2 + y^2 = 1``, for ``a, c >= 0``."""
    return (c + (c * c + 4 * a * a) ** 0.5) / 2


class Block:
    """A block ``f(z, theta)``: a subclass gives `d`, `k` and `f`; the rest has a default by automatic differentiation.

    Args (as attributes):
        d: the dimension of the state.
        k: the number of parameters of a particle.
    """

    d: int
    k: int

    @property
    def name(self) -> str:
        """How the block is called in tables."""
        return type(self).__name__

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B k"]) -> Float[Tensor, "*B d"]:
        """The function itself, entry by entry over broadcast leading axes: the definition, and the tests' oracle."""
        raise NotImplementedError

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*B k"]:
        """Draw particles from the block's initial law, ``(*shape, k)`` in float64; normal by default."""
        return torch.randn(*shape, self.k, generator=generator, dtype=torch.float64)

    def mean_field(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M k"], w: Float[Tensor, " M"]
    ) -> Float[Tensor, "S n d"]:
        """``sum_m w_m f(z_i, theta_m)``."""
        return torch.einsum("snmd,m->snd", self.f(z[:, :, None], theta[:, None]), w)

    def pull(
        self,
        z: Float[Tensor, "S n d"],
        theta: Float[Tensor, "S M k"],
        w: Float[Tensor, " M"],
        p: Float[Tensor, "S n d"],
    ) -> tuple[Float[Tensor, "S n d"], Float[Tensor, "S M k"]]:
        """``p_i^T sum_m w_m d_z f(z_i, theta_m)``, and for each particle ``sum_i p_i^T d_theta f(z_i, theta_m)``.

        The second is without the weight: it is the gradient with respect to the law at ``theta_m``.
        """
        with torch.enable_grad():
            z, theta = z.detach().requires_grad_(), theta.detach().requires_grad_()
            pairs = torch.einsum("snmd,snd->snm", self.f(z[:, :, None], theta[:, None]), p)
            (back,) = torch.autograd.grad((pairs * w).sum(), z, retain_graph=True, materialize_grads=True)
            (grads,) = torch.autograd.grad(pairs.sum(), theta, materialize_grads=True)
        return back, grads

    def rows(
        self, z: Float[Tensor, "S n d"], theta: Float[Tensor, "S M k"], p: Float[Tensor, "S n d"]
    ) -> Float[Tensor, "S n M k"]:
        """``p_i^T d_theta f(z_i, theta_m)`` for each sample: the layer's part of the Jacobian."""
        with torch.enable_grad():
            shape = (*z.shape[:2], *theta.shape[1:])
            each = theta.detach()[:, None].expand(shape).clone().requires_grad_()
            pairs = torch.einsum("snmd,snd->snm", self.f(z[:, :, None], each), p)
            return torch.autograd.grad(pairs.sum(), each, materialize_grads=True)[0]

    def constants(
        self, theta: Float[Tensor, "*B k"] | None = None, radius: float | None = None, reach: float = math.inf
    ) -> Constants:
        """Bounds for all ``|z| <= reach`` and all parameters, or for each particle within `radius` of `theta`.

        Args:
            theta: particles, or None.
            radius: how far a particle may be from `theta`, None for 0; without `theta` how large parameters may be
                (`BallBump`, `RBF`: only u), None for no limit: the bounds are infinite where there are none.
            reach: bound of the states' norm; only some blocks need it.

        Returns:
            Numbers without `theta`, tensors ``(*B,)`` with it.
        """
        unknown = math.inf if theta is None else theta.new_full(theta.shape[:-1], math.inf)
        return Constants(*[unknown] * 7)

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The audit of the block and its initial law against the hypotheses of the theorems, in fixed order."""
        return audit(*[("not checkable", "the block is a function without a formula")] * 7)


def audit(*rows: tuple[str, str]) -> tuple[Hypothesis, ...]:
    """The lines of an audit: answer and reason for each of `HYPOTHESES`, in that order."""
    return tuple(Hypothesis(name, *row) for name, row in zip(HYPOTHESES, rows, strict=True))


def check_dimension(d: int, least: int = 1) -> None:
    """Refuse a dimension that is not an integer >= `least`."""
    if isinstance(d, bool) or not isinstance(d, int):
        raise TypeError(f"d is {d!r}; an integer is needed")
    if d < least:
        raise ValueError(f"d is {d}; an integer >= {least} is needed")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value!r}; a positive finite number is needed")


def reached(theta: Tensor | None, radius: float | None) -> float:
    """The radius that is meant when none is given: 0 around particles, no limit without them."""
    if radius is None:
        return math.inf if theta is None else 0.0
    return radius


def norm(x: Tensor) -> Tensor:
    """The Euclidean norm over the last axis."""
    return torch.linalg.vector_norm(x, dim=-1)


@dataclass(frozen=True)
class Custom(Block):
    """A block made from a plain function; derivatives come from automatic differentiation.

    Args:
        function: ``(z (..., d), theta (..., k)) -> (..., d)``, made of torch operations that broadcast.
        d: the dimension of the state.
        k: the number of parameters of a particle.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    d: int
    k: int

    def __post_init__(self) -> None:
        check_dimension(self.d)
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k is {self.k!r}; a positive integer is needed")
        if not callable(self.function):
            raise TypeError(f"function is {type(self.function).__name__}; a function of z and theta is needed")
        z, theta = torch.zeros(2, 1, self.d, dtype=torch.float64), torch.zeros(1, 3, self.k, dtype=torch.float64)
        found = self.function(z, theta)
        if not isinstance(found, Tensor) or tuple(found.shape) != (2, 3, self.d):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"function returned {shape} for z (2, 1, {self.d}) and theta (1, 3, {self.k}); "
                f"(2, 3, {self.d}) is needed"
            )

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "Custom")

    def f(self, z: Float[Tensor, "*#B d"], theta: Float[Tensor, "*#B k"]) -> Float[Tensor, "*B d"]:
        return self.function(z, theta)
