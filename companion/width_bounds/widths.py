"""Widths: how wide a network must be for a theorem to speak, by random-matrix limits and by a Chernoff bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from companion import kernels, networks
from companion.width_bounds.fixed_points import Spectra, bisect, largest_singular_value, paper_map, theorem_holds


def proxy_spectra(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    lower: Sequence[Tensor],
    n: Tensor | float,
    *,
    scale: float = 1.0,
    last: str = "zero",
) -> Spectra:
    """The spectra of a network whose last hidden layer has n neurons, with random-matrix limits in place of draws.

    ``alpha_0 = scale sqrt(n lambda_min(K))``, ``phi = scale sqrt(n lambda_max(K))``, ``w = scale (sqrt(n) + sqrt(m))``
    for an m x n Gaussian matrix with standard deviation scale, K the ReLU kernel of the features below.  A proxy: a
    drawn network needs somewhat more (lesson 1 measures how much).

    Args:
        X: inputs, shape (N, d).
        Y: targets, shape (N, K).
        lower: the layers below the wide one, each (n_in, n_out); empty for L = 2.
        n: widths, any batch shape.
        scale: standard deviation of the entries of ``W_{L-1}``.
        last: ``"zero"`` for ``W_L = 0``, ``"lecun"`` for entries of variance 1/n.

    Returns:
        The `Spectra` with the batch shape of n.
    """
    return _proxy(X, Y, lower, scale, last)(torch.as_tensor(n, dtype=X.dtype, device=X.device))


def _proxy(X: Tensor, Y: Tensor, lower: Sequence[Tensor], scale: float, last: str) -> Callable[[Tensor], Spectra]:
    """`proxy_spectra` as a function of n alone: the kernel is built once."""
    if last not in ("zero", "lecun"):
        raise ValueError(f"last is {last!r}; 'zero' or 'lecun' is needed")
    top = X.new_zeros(lower[-1].shape[-1] if len(lower) else X.shape[1], 1)
    below = [f.reshape(f.shape[-2:]) for f in networks.features([*lower, top], X)]
    values = torch.linalg.eigvalsh(kernels.relu_kernel(below[-1]))
    small, large, trace = values[0].clamp_min(0), values[-1], values.sum()
    fixed_w = [largest_singular_value(W) for W in lower]
    fixed_phi = [largest_singular_value(f) for f in below]
    energy = (Y**2).sum() + (Y.shape[1] * scale**2 * trace if last == "lecun" else 0)
    X_F = torch.linalg.matrix_norm(X)

    def of(n: Tensor) -> Spectra:
        w = [v.expand(n.shape) for v in fixed_w] + [scale * (n.sqrt() + math.sqrt(below[-1].shape[1]))]
        w.append(1 + (Y.shape[1] / n).sqrt() if last == "lecun" else torch.zeros_like(n))
        phi = [v.expand(n.shape) for v in fixed_phi] + [scale * (n * large).sqrt()]
        alpha_0 = scale * (n * small).sqrt()
        return Spectra(
            torch.stack(w, -1), torch.stack(phi, -1), alpha_0, energy.sqrt().expand(n.shape), X_F.expand(n.shape)
        )

    return of


def proxy_width(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    *,
    theorem: str = "C",
    lower: Sequence[Tensor] = (),
    scale: float = 1.0,
    last: str = "zero",
    epsilon: float = 0.25,
    radius: float | None = None,
) -> float:
    """The width at which Theorem C (or P) starts to hold for `proxy_spectra`; infinite if it never does.

    Args:
        X: inputs, shape (N, d).
        Y: targets, shape (N, K).
        theorem: ``"C"`` or ``"P"``.
        lower: the layers below the wide one.
        scale: standard deviation of the entries of the wide layer's matrix.
        last: ``"zero"`` or ``"lecun"``.
        epsilon: as in `certify`.
        radius: for Theorem P, the common value of all C_l; the optimal radii when omitted.

    Returns:
        The width as a real number; drawn networks need somewhat more (lesson 1 prints how much).
    """
    holds = theorem_holds(theorem, epsilon)
    if radius is not None:

        def holds(s: Spectra) -> Tensor:
            return paper_map(s, torch.full_like(s.w, radius)).feasible

    family = _proxy(X, Y, lower, scale, last)
    return float(bisect(lambda n: holds(family(n)), X.new_ones(()), float(X.shape[0]), 1e40))


def chernoff_width(X: Float[Tensor, "N d"], Y: Float[Tensor, "N K"], p: float = 0.01) -> float:
    """Corollary E: a width at which Corollary D covers a draw of ``W_1 ~ N(0, 1)`` with probability at least 1 - p.

    ``n >= max(24 R_t log(N/p), 12 s ||Y||_F) / lambda_*`` with ``s = ||X||_2``, ``R_t = (sqrt(N/2) + t)^2`` and the
    least t with ``exp(-t^2 / 2 s^2) (R_t + 2 s^2 + 2 sqrt(N/2) s^2 / t) <= lambda_* / 4``.

    Args:
        X: inputs with unit rows, shape (N, d).
        Y: targets, shape (N, K).
        p: the allowed probability of failure, in (0, 1).

    Returns:
        The width.

    Raises:
        ValueError: rows of X that are not of unit norm, p outside (0, 1).
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p}; a probability strictly between 0 and 1 is needed")
    norms = torch.linalg.vector_norm(X, dim=1)
    if not bool(((norms - 1).abs() < 1e-9).all()):
        raise ValueError(
            f"X has row norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}; unit rows are needed"
        )
    N = X.shape[0]
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    s = float(largest_singular_value(X))
    half = math.sqrt(N / 2)

    def tail(t: Tensor) -> Tensor:
        left = torch.exp(-(t**2) / (2 * s**2)) * ((half + t) ** 2 + 2 * s**2 + 2 * half * s**2 / t)
        return left <= smallest / 4

    t = float(bisect(tail, torch.ones((), dtype=torch.float64), 1e-3, 1e6))
    truncation = (half + t) ** 2
    return max(24 * truncation * math.log(N / p), 12 * s * float(torch.linalg.matrix_norm(Y))) / smallest


def hermite_lower_bound(X: Float[Tensor, "N d"], r_max: int) -> Float[Tensor, " R"]:
    """``lambda_min(sum_{r <= R} mu_r^2 (X X^T)^{o r})`` for R = 0..r_max: lower bounds on ``lambda_* = lambda_min(K)``.

    Args:
        X: inputs with unit rows, shape (N, d).
        r_max: the last power.

    Returns:
        The r_max + 1 bounds, nondecreasing (each added term is positive semidefinite).
    """
    mu = kernels.relu_hermite(r_max).to(X)
    cosines = (X @ X.mT).clamp(-1, 1)
    total, power, bounds = torch.zeros_like(cosines), torch.ones_like(cosines), []
    for r in range(r_max + 1):
        total, power = total + mu[r] * power, power * cosines
        bounds.append(torch.linalg.eigvalsh(total)[0])
    return torch.stack(bounds)
