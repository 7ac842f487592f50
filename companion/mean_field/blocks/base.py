"""What every block of a mean-field ResNet gives: its function, products with its derivatives, constants, and an audit.

A block of one's own is a subclass of `Block` with `f` alone, or a plain function in `Custom`: everything else then
comes from automatic differentiation, only slower than the closed forms of `BallBump` and the like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import rigor
from companion.rigor import Interval
from companion.rigor.formulas import number, sqrt
from companion.rigor.rounding import LARGEST
from companion.runs import count

# --- constants --------------------------------------------------------------------------------------------------------


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

    F: float | Tensor | Interval
    A: float | Tensor | Interval
    A_F: float | Tensor | Interval
    B: float | Tensor | Interval
    H_zz: float | Tensor | Interval
    H_ztheta: float | Tensor | Interval
    H_thetatheta: float | Tensor | Interval

    def _map(self, change: Callable[[Any], Any]) -> Constants:
        return Constants(*(change(getattr(self, f.name)) for f in fields(self)))

    def spread(self, theta: Float[Tensor, "*B k"] | Interval) -> Constants:
        """The same bounds with one number for each particle of `theta`, ``(*B,)``, in theta's kind of number."""
        of, shape = like(theta), theta.shape[:-1]

        def each(x: float | Tensor | Interval) -> Tensor | Interval:
            x = of(x)
            return x.expand(*shape) if isinstance(x, Interval) else x.to(theta).expand(shape)

        return self._map(each)

    def largest(self) -> Constants:
        """The largest of each over all particles, as floats."""
        return self._map(lambda x: float(x.max()) if isinstance(x, Tensor) else float(x))

    def finite(self) -> bool:
        """Whether every bound is a finite number."""
        return all(math.isfinite(x) for x in vars(self.largest()).values())


def like(theta: Tensor | Interval | None) -> Callable[[Any], Tensor | Interval]:
    """How a float or fraction in a formula becomes the kind of number that `theta` is; numbers of that kind stay."""
    level = "certified" if isinstance(theta, Interval) else "measured"
    return lambda x: x if isinstance(x, Interval) else number(x, level)


def largest_norm(theta: Tensor | Interval | None, radius: float | None, part: slice = slice(None)) -> Tensor | Interval:
    """How large a part of a particle can be: within `radius` of `theta` (None: 0), or below `radius` (None: no limit).

    Args:
        theta: particles ``(*B, k)``, or None.
        radius: see `Block.constants`.
        part: the parameters that are meant.

    Returns:
        ``(*B,)``, or one number without `theta`.
    """
    if theta is None:
        return like(None)(math.inf if radius is None else radius)
    return rigor.norm(theta[..., part]) + like(theta)(radius or 0.0)


def largest_form(a: Tensor | Interval, c: Tensor | Interval) -> Tensor | Interval:
    """The largest value of ``2 a x y + c y^2`` on ``x^2 + y^2 = 1``, for ``a, c >= 0``."""
    return (c + sqrt(c * c + 4 * a * a)) / 2


# --- the audit --------------------------------------------------------------------------------------------------------


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

Answers = tuple[tuple[str, str], ...]  # answer and reason for each of `HYPOTHESES`, in that order


# --- blocks -----------------------------------------------------------------------------------------------------------


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
        self,
        theta: Float[Tensor, "*B k"] | Interval | None = None,
        radius: float | None = None,
        reach: float = math.inf,
    ) -> Constants:
        """Bounds for all ``|z| <= reach`` and all parameters, or for each particle within `radius` of `theta`.

        Args:
            theta: particles, as intervals where the bounds are to be certified, or None.
            radius: how far a particle may be from `theta`, None for 0; without `theta` how large parameters may be
                (`BallBump`, `RBF`: only u), None for no limit: the bounds are infinite where there are none.
            reach: bound of the states' norm; only some blocks need it.

        Returns:
            Bounds in theta's kind of number, one for each particle where they differ (see `Constants.spread`).
        """
        return Constants(*[math.inf] * 7)

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The audit of the block and its initial law against the hypotheses of the theorems, in fixed order.

        Answers are proved for the very class that writes them down: a subclass may have another function or law.
        """
        answers = vars(type(self)).get("_answers")
        if answers is None:
            why = f"nothing is proved about {self.name}"
            return tuple(Hypothesis(name, "not checkable", why) for name in HYPOTHESES)
        return tuple(Hypothesis(name, *row) for name, row in zip(HYPOTHESES, answers(self), strict=True))


def check_fit(
    block: Block,
    theta: Float[Tensor, "*S M k"],
    X: Float[Tensor, "n d"],
    weights: Float[Tensor, " M"] | None = None,
    **others: Tensor,
) -> Float[Tensor, " M"]:
    """Refuse what does not fit the block or the particles, and return the particles' weights, equal ones for None.

    Args:
        block: the block.
        theta: particles; gives dtype and device.
        X: inputs.
        weights: the particles' weights, or None.
        **others: further tensors of the same dtype and device.

    Returns:
        Weights ``(M,)``, nonnegative, of sum 1 up to rounding.

    Raises:
        ValueError: another number of parameters or coordinates than the block's, another dtype or device than that of
            theta, a negative weight, or weights of another sum.
    """
    if theta.shape[-1] != block.k:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (..., M, {block.k}) is needed for {block.name}")
    if X.shape[1] != block.d:
        raise ValueError(f"X has shape {tuple(X.shape)}; (n, {block.d}) is needed for {block.name}")
    for name, A in {"X": X, "weights": weights, **others}.items():
        if A is not None and (A.dtype != theta.dtype or A.device != theta.device):
            found = f"theta is {theta.dtype} on {theta.device}, {name} is {A.dtype} on {A.device}"
            raise ValueError(f"{found}; make them equal")
    M = theta.shape[-2]
    if weights is None:
        return theta.new_full((M,), 1 / M)
    total = math.fsum(weights.tolist())
    if not abs(total - 1) <= 1e3 * torch.finfo(weights.dtype).eps or bool((weights < 0).any()):
        found = f"weights sum to {total:.9g}, the smallest is {float(weights.min()):.3g}"
        raise ValueError(f"{found}; weights >= 0 of sum 1 are needed")
    return weights


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite."""
    if not (isinstance(value, int | float) and 0 < value <= LARGEST):
        raise ValueError(f"{name} is {value!r}; a positive finite number is needed")


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
        count("d", self.d, 1)
        count("k", self.k, 1)
        if not callable(self.function):
            raise TypeError(f"function is {type(self.function).__name__}; a function of z and theta is needed")
        z, theta = (
            torch.zeros(*shape, dtype=torch.float64, device="cpu") for shape in ((2, 1, self.d), (1, 3, self.k))
        )
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
