"""Widths: how wide a network must be for a theorem to speak, by random-matrix limits and by a Chernoff bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion import kernels, networks, rigor
from companion.arguments import checked
from companion.width_bounds.fixed_points import Spectra, bisect, check_share, paper_map, theorem_holds


@checked(double=True)
def proxy_spectra(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    lower: Sequence[Tensor],
    n: Float[Tensor, "*batch"] | float,
    *,
    scale: float = 1.0,
    last: Literal["zero", "lecun"] = "zero",
) -> Spectra:
    """The spectra of a network whose last hidden layer has n neurons, with random-matrix limits in place of draws.

    ``alpha_0 = scale sqrt(n lambda_min(K))``, ``phi = scale sqrt(n lambda_max(K))``, ``w = scale (sqrt(n) + sqrt(m))``
    for an m x n Gaussian matrix with standard deviation scale, K the ReLU kernel of the features below.  A proxy: a
    drawn network needs somewhat more (lesson 1 measures how much).

    Args:
        X: inputs, shape (N, d), float64.
        Y: targets, shape (N, K), float64.
        lower: the layers below the wide one, each (n_in, n_out); empty for L = 2.
        n: widths, any batch shape.
        scale: standard deviation of the entries of ``W_{L-1}``.
        last: ``"zero"`` for ``W_L = 0``, ``"lecun"`` for entries of variance 1/n.

    Returns:
        The `Spectra` with the batch shape of n.  ``alpha_0`` is 0 where ``lambda_min(K)`` is below its rounding.

    Raises:
        TypeError: not tensors, or not float64.
        ValueError: NaN, infinity, shapes that do not fit, widths or a scale that are not positive, an unknown `last`.

    Source: derived in lesson 1.
    """
    widths = torch.as_tensor(n, dtype=X.dtype, device=X.device)
    if not bool((widths > 0).all()):
        raise ValueError(f"n is {n}; positive widths are needed")
    return _proxy(X, Y, lower, scale, last)(widths)


def _proxy(X: Tensor, Y: Tensor, lower: Sequence[Tensor], scale: float, last: str) -> Callable[[Tensor], Spectra]:
    """`proxy_spectra` as a function of n alone: the kernel is built once."""
    if not scale > 0:
        raise ValueError(f"scale is {scale}; a positive number is needed")
    if len(lower):
        networks.check_weights(lower, X)
        if lower[0].ndim == 3 and len(lower[0]) != 1:
            raise ValueError(f"lower holds {len(lower[0])} networks; one is needed")
        lower = [W.reshape(W.shape[-2:]) for W in lower]
    top = X.new_zeros(lower[-1].shape[-1] if len(lower) else X.shape[1], 1)
    below = [f[0] for f in networks.features([*lower, top], X)]
    small, large, trace = _kernel_ends(below[-1])
    fixed_w = [rigor.spectral_norm(W) for W in lower]
    fixed_phi = [rigor.spectral_norm(f) for f in below]
    energy = rigor.norm(Y.flatten()) ** 2 + (Y.shape[1] * scale**2 * trace if last == "lecun" else 0)
    X_F = rigor.norm(X.flatten())

    def of(n: Tensor) -> Spectra:
        w = [v.expand(n.shape) for v in fixed_w] + [scale * (n.sqrt() + math.sqrt(below[-1].shape[1]))]
        w.append(1 + (Y.shape[1] / n).sqrt() if last == "lecun" else torch.zeros_like(n))
        phi = [v.expand(n.shape) for v in fixed_phi] + [scale * (n * large).sqrt()]
        alpha_0 = scale * (n * small).sqrt()
        return Spectra(
            torch.stack(w, -1), torch.stack(phi, -1), alpha_0, energy.sqrt().expand(n.shape), X_F.expand(n.shape)
        )

    return of


def _kernel_ends(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``lambda_min``, ``lambda_max`` and trace of the ReLU kernel; a ``lambda_min`` below its rounding counts as 0."""
    K = kernels.relu_kernel(X)
    if not bool(torch.isfinite(K).all()):
        raise ValueError("X is too large: its kernel overflows; scale X down")
    values = torch.linalg.eigvalsh(K)
    small, large = values[0], values[-1]
    return torch.where(small > 8 * len(K) * rigor.UNIT * large, small, 0.0), large, values.sum()


@checked(double=True)
def proxy_width(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    *,
    theorem: Literal["C", "P"] = "C",
    lower: Sequence[Tensor] = (),
    scale: float = 1.0,
    last: Literal["zero", "lecun"] = "zero",
    epsilon: float = 0.25,
    radius: float | None = None,
) -> float:
    """The width at which Theorem C (or P) starts to hold for `proxy_spectra`; infinite if it never does.

    Args:
        X: inputs, shape (N, d), float64.
        Y: targets, shape (N, K), float64.
        theorem: ``"C"`` or ``"P"``.
        lower: the layers below the wide one.
        scale: standard deviation of the entries of the wide layer's matrix.
        last: ``"zero"`` or ``"lecun"``.
        epsilon: the share of the rate given to the step in Theorem C, in (0, 1).
        radius: for Theorem P, the common value of all C_l; the optimal radii when omitted.

    Returns:
        The width as a real number, at least N; drawn networks need somewhat more (lesson 1 prints how much). Infinite
        where 1e100 is not enough.

    Raises:
        TypeError: not tensors, or not float64.
        ValueError: as for `proxy_spectra`; epsilon or radius out of range, or a radius for Theorem C.

    Source: derived in lesson 1.
    """
    check_share(epsilon)
    holds = theorem_holds(theorem, epsilon)
    if radius is not None:
        if theorem != "P" or not radius > 0:
            raise ValueError(f"radius is {radius} for Theorem {theorem}; a positive number, for Theorem P, is needed")

        def holds(s: Spectra) -> Tensor:
            return paper_map(s, torch.full_like(s.w, radius)).feasible

    family = _proxy(X, Y, lower, scale, last)
    return float(bisect(lambda n: holds(family(n)), X.new_ones(()), float(X.shape[0]), 1e40))


@checked(double=True)
def chernoff_width(X: Float[Tensor, "N d"], Y: Float[Tensor, "N K"], p: float = 0.01) -> float:
    """Corollary E: a width at which Corollary D covers a draw of ``W_1 ~ N(0, 1)`` with probability at least 1 - p.

    ``n >= max(24 R_t log(N/p), 12 s ||Y||_F) / lambda_*`` with ``s = ||X||_2``, ``R_t = (sqrt(N/2) + t)^2`` and the
    least t with ``exp(-t^2 / 2 s^2) (R_t + 2 s^2 + 2 sqrt(N/2) s^2 / t) <= lambda_* / 4``.

    Args:
        X: inputs with unit rows, shape (N, d), float64.
        Y: targets, shape (N, K), float64.
        p: the allowed probability of failure, in (0, 1).

    Returns:
        The width; infinite where ``lambda_*`` is below its rounding, as for two equal rows.

    Raises:
        TypeError: not tensors, or not float64.
        ValueError: NaN, infinity, unequal N, rows of X that are not of unit norm, p outside (0, 1).

    Source: Corollary E, derived in lesson 1.
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p}; a probability strictly between 0 and 1 is needed")
    _check_unit_rows(X)
    N = X.shape[0]
    smallest = float(_kernel_ends(X)[0])
    if smallest == 0:
        return math.inf
    s = float(rigor.spectral_norm(X))
    half = math.sqrt(N / 2)

    def tail(t: Tensor) -> Tensor:
        left = torch.exp(-(t**2) / (2 * s**2)) * ((half + t) ** 2 + 2 * s**2 + 2 * half * s**2 / t)
        return left <= smallest / 4

    t = float(bisect(tail, X.new_ones(()), 1e-3, 1e6))
    truncation = (half + t) ** 2
    return max(24 * truncation * math.log(N / p), 12 * s * float(rigor.norm(Y.flatten()))) / smallest


def _check_unit_rows(X: Tensor) -> None:
    norms = rigor.norm(X)
    if not bool(((norms - 1).abs() < 1e-9).all()):
        raise ValueError(
            f"X has row norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}; unit rows are needed"
        )


@checked(double=True)
def hermite_lower_bound(X: Float[Tensor, "N d"], r_max: int) -> Float[Tensor, " R"]:
    """``lambda_min(sum_{r <= R} mu_r^2 (X X^T)^{o r})`` for R = 0..r_max: lower bounds on ``lambda_* = lambda_min(K)``.

    Args:
        X: inputs with unit rows, shape (N, d), float64.
        r_max: the last power, 0 to 10,000.

    Returns:
        The r_max + 1 bounds, nondecreasing (each added term is positive semidefinite).

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: NaN, infinity, rows of X that are not of unit norm, r_max out of range.

    Source: Schur's product theorem; lesson 1.
    """
    _check_unit_rows(X)
    if not 0 <= r_max <= 10_000:
        raise ValueError(f"r_max is {r_max}; a whole number from 0 to 10,000 is needed")
    mu = kernels.relu_hermite(r_max).to(X)
    cosines = (X @ X.mT).clamp(-1, 1)
    total, power, bounds = torch.zeros_like(cosines), torch.ones_like(cosines), []
    for r in range(r_max + 1):
        total, power = total + mu[r] * power, power * cosines
        bounds.append(torch.linalg.eigvalsh(total)[0])
    return torch.stack(bounds)
