"""The numbers that Theorems P and C read of a network, and both theorems as functions of them.

Everything here is batched over leading axes, so that a map over widths or scales is one call. Both theorems ask for
radii C with ``C >= T(C)``, T nondecreasing: the smallest are found by iterating from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import networks

_INFLATION = 1e-6  # the fixed points are inflated by this factor at every round, so that they end strictly inside
_MAX_ROUNDS = 20_000


# --- What is read of a network ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectra:
    """All that Theorems P and C read of a network at initialization; leading axes are batched.

    Args:
        w: ``||W_l||_2`` for l = 1..L, shape (..., L).
        phi: ``||F_l||_2`` for l = 0..L-1, shape (..., L); ``phi[..., 0] = ||X||_2``.
        alpha_0: ``sigma_N(F_{L-1})``, shape (...).
        R_0: ``||F_{L-1} W_L - Y||_F``, shape (...).
        X_F: ``||X||_F``, shape (...).
    """

    w: Float[Tensor, "*batch L"]
    phi: Float[Tensor, "*batch L"]
    alpha_0: Float[Tensor, "*batch"]
    R_0: Float[Tensor, "*batch"]
    X_F: Float[Tensor, "*batch"]

    def scaled(self, beta: Tensor | float) -> Spectra:
        """The spectra after ``W_{L-1} -> beta W_{L-1}``, for ReLU and ``W_L = 0`` (then ``R_0`` stays ``||Y||_F``)."""
        beta = torch.as_tensor(beta, dtype=self.w.dtype, device=self.w.device)
        w, phi = self.w.clone(), self.phi.clone()
        w[..., -2] *= beta
        phi[..., -1] *= beta
        return replace(self, w=w, phi=phi, alpha_0=self.alpha_0 * beta)

    def member(self, s: int) -> Spectra:
        """The spectra of one network of a batch."""
        return Spectra(self.w[s], self.phi[s], self.alpha_0[s], self.R_0[s], self.X_F[s])

    @staticmethod
    def cat(parts: Sequence[Spectra]) -> Spectra:
        """Join batches of networks of one depth, which may have different data, along the first batch axis."""
        names = ("w", "phi", "alpha_0", "R_0", "X_F")
        return Spectra(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


def spectra(X: Float[Tensor, "N d"], Y: Float[Tensor, "N K"], weights: Sequence[Tensor]) -> Spectra:
    """``w_l = ||W_l||_2``, ``phi_l = ||F_l||_2``, ``alpha_0 = sigma_N(F_{L-1})``, ``R_0`` in ordinary floating point.

    Args:
        X: inputs, shape (N, d).
        Y: targets, shape (N, K).
        weights: L tensors of shape (S, n_in, n_out) or (n_in, n_out).

    Returns:
        The `Spectra` with batch shape (S,).  ``alpha_0`` is 0 when the last hidden layer is narrower than N.
    """
    stacked = networks.as_ensemble(weights)
    F = networks.features(stacked, X)
    S, (N, width) = stacked[0].shape[0], F[-1].shape[-2:]
    w = torch.stack([largest_singular_value(W) for W in stacked], -1)
    first = largest_singular_value(X).expand(S)
    phi = torch.stack([first, *(largest_singular_value(f) for f in F[1:])], -1)
    alpha_0 = torch.linalg.svdvals(F[-1])[..., N - 1] if width >= N else torch.zeros_like(first)
    R_0 = torch.linalg.matrix_norm(F[-1] @ stacked[-1] - Y)
    return Spectra(w, phi, alpha_0, R_0, torch.linalg.matrix_norm(X).expand(S))


def largest_singular_value(A: Tensor) -> Tensor:
    """``||A||_2`` through the smaller Gram matrix: the largest singular value loses nothing by squaring."""
    G = A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A
    return torch.linalg.eigvalsh(G)[..., -1].clamp_min(0).sqrt()


# --- Theorem C --------------------------------------------------------------------------------------------------------


class AtRadii(NamedTuple):
    """The quantities of Theorem C at radii C; leading axes are batched.

    ``C`` and ``T`` have shape (..., L): the radii and the bounds ``T(C)`` that they must exceed.  ``d = d_{L-1}``
    bounds the movement of the last features, ``phi = phi_{L-1}`` their norm, ``alpha`` their smallest singular value;
    ``B`` is the interference of the hidden layers and ``rho`` the rate.  ``feasible`` says ``alpha, rho > 0`` and
    ``T <= C``.
    """

    C: Tensor
    T: Tensor
    d: Tensor
    phi: Tensor
    alpha: Tensor
    B: Tensor
    rho: Tensor
    feasible: Tensor
    rounds: int


def ball_map(s: Spectra, C: Tensor, epsilon: Tensor | float, mode: str = "gd", path: str = "telescope") -> AtRadii:
    """Evaluate Theorem C's bounds ``T_l(C) = g_l R_0 / rho`` (l < L) and ``T_L(C) = alpha R_0 / rho`` once.

    With ``lambda_l = w_l + C_l``, ``d_l = d_{l-1} lambda_l + phi_{l-1} C_l``, ``g_l = (phi_{l-1} + d_{l-1})
    prod_{p>l} lambda_p``, ``alpha = alpha_0 - d_{L-1}``, ``B = sum_{l<L} g_l^2``, ``rho = (1-epsilon) alpha^2 - B``.

    Args:
        s: the network's spectra, batch shape (...).
        C: radii, shape (..., L).
        epsilon: the share of the rate that is given to the step, in (0, 1).
        mode: ``"gd"``, or ``"flow"`` for gradient flow (``rho = alpha^2``).
        path: ``"telescope"``, or ``"plain"`` for ``T_L = g_L R_0 / rho``, the bound without the telescoping sum.

    Returns:
        The `AtRadii` at C.  Source: Theorem C, derived in lesson 1.
    """
    L = s.w.shape[-1]
    bar = s.w + C
    d = torch.zeros_like(s.alpha_0)
    phi = [s.phi[..., 0]]
    for layer in range(L - 1):
        d = d * bar[..., layer] + s.phi[..., layer] * C[..., layer]
        phi.append(s.phi[..., layer + 1] + d)
    above = torch.ones_like(d)
    g = [phi[-1]]
    for layer in reversed(range(L - 1)):
        above = above * bar[..., layer + 1]
        g.insert(0, phi[layer] * above)
    alpha = s.alpha_0 - d
    B = torch.stack([x**2 for x in g[:-1]], -1).sum(-1) if mode == "gd" else torch.zeros_like(d)
    rho = (1 - epsilon) * alpha**2 - B if mode == "gd" else alpha**2
    last = g[-1] if path == "plain" else alpha
    T = torch.stack([*g[:-1], last], -1) * (s.R_0 / rho)[..., None]
    feasible = (alpha > 0) & (rho > 0) & (T <= C).all(-1)
    return AtRadii(C, T, d, phi[-1], alpha, B, rho, feasible, 0)


def ball_fixed_point(
    s: Spectra, *, epsilon: Tensor | float = 0.25, mode: str = "gd", path: str = "telescope"
) -> AtRadii:
    """Find radii with ``C >= T(C)`` by ``C <- (1 + 1e-6) T(C)`` from ``C = 0``.

    T is nondecreasing, so the iteration stays below every admissible C: if it breaks down (alpha or rho <= 0), no
    radii exist for spectra smaller by the inflation; if it neither stops nor breaks down, nothing is decided.

    Args:
        s: the network's spectra, any batch shape.
        epsilon: the share of the rate given to the step, a number or a tensor that broadcasts with the batch.
        mode: ``"gd"`` or ``"flow"``.
        path: ``"telescope"`` or ``"plain"``, as in `ball_map`.

    Returns:
        The `AtRadii` at the last radii; ``feasible`` holds one flag for each network.

    Raises:
        ValueError: epsilon outside (0, 1), or an unknown mode or path.
    """
    check_choices(epsilon, mode, path)
    ball = ball_map(s, torch.zeros_like(s.w), epsilon, mode, path)
    for rounds in range(1, _MAX_ROUNDS):
        alive = (ball.alpha > 0) & (ball.rho > 0) & ~ball.feasible
        if not bool(alive.any()):
            break
        C = torch.where(alive[..., None], inflated(ball.T), ball.C)
        ball = ball_map(s, C, epsilon, mode, path)._replace(rounds=rounds)
    return ball


def inflated(T: Tensor) -> Tensor:
    """The next radii: a little more than ``T(C)``, so that the iteration ends strictly inside."""
    return T * (1 + _INFLATION)


def check_choices(epsilon: Tensor | float, mode: str, path: str) -> None:
    share = torch.as_tensor(epsilon)
    if not bool(((share > 0) & (share < 1)).all()):
        raise ValueError(f"epsilon is {epsilon}; a number strictly between 0 and 1 is needed")
    if mode not in ("gd", "flow"):
        raise ValueError(f"mode is {mode!r}; 'gd' or 'flow' is needed")
    if path not in ("telescope", "plain"):
        raise ValueError(f"path is {path!r}; 'telescope' or 'plain' is needed")


def best_epsilon(s: Spectra) -> float:
    """The epsilon on a grid of 49 values that maximizes ``max_step * rho``, the proved progress of one step.

    Returns 0.25 when no value of the grid is feasible.
    """
    grid = torch.linspace(0.02, 0.98, 49, dtype=s.w.dtype, device=s.w.device)
    wide = Spectra(*(x.expand(49, *x.shape) for x in (s.w, s.phi, s.alpha_0, s.R_0, s.X_F)))
    ball = ball_fixed_point(wide, epsilon=grid)
    progress = torch.where(ball.feasible, 2 * grid / ball.phi**2 * ball.rho, torch.zeros_like(grid))
    return float(grid[progress.argmax()]) if bool(ball.feasible.any()) else 0.25


def two_layer_threshold(epsilon: float = 0.25, mode: str = "gd") -> float:
    """Corollary D: for L = 2 and ``W_2 = 0`` Theorem C holds iff ``alpha_0^2 >= threshold * ||X||_2 ||Y||_F``.

    ``1 / threshold = max_delta sqrt(delta (1-delta)) (a - b delta)``, ``a = 1 - epsilon``, ``b = 2 - epsilon``; for
    gradient flow the threshold is ``sqrt(256/27)``.

    Args:
        epsilon: the share of the rate given to the step, in (0, 1).
        mode: ``"gd"`` or ``"flow"``.

    Returns:
        The threshold: 5.6905 at epsilon = 1/4, 3.0792 for the flow.
    """
    check_choices(epsilon, mode, "telescope")
    if mode == "flow":
        return math.sqrt(256 / 27)
    a, b = 1 - epsilon, 2 - epsilon
    delta = (3 * b + 2 * a - math.sqrt((3 * b + 2 * a) ** 2 - 16 * a * b)) / (8 * b)
    return 1 / (math.sqrt(delta * (1 - delta)) * (a - b * delta))


# --- Theorem P --------------------------------------------------------------------------------------------------------


class PaperAtRadii(NamedTuple):
    """Theorem P at radii C: ``ratios`` (..., 3) are left over right sides of (i)-(iii), ``step`` the largest one."""

    C: Tensor
    ratios: Tensor
    step: Tensor
    feasible: Tensor


def paper_map(s: Spectra, C: Tensor) -> PaperAtRadii:
    """Evaluate Theorem P's three conditions and its step at radii C of shape (..., L).

    With ``lambda_l = w_l + C_l``, ``P_l = prod_{p != l} lambda_p``, ``S = sum_{l<L} P_l^2 / lambda_L^2``:
    (i) ``alpha_0^2 >= 16 ||X||_F R_0 max_l P_l / C_l``, (ii) ``alpha_0^3 >= 32 ||X||_F^2 lambda_L S R_0``,
    (iii) ``alpha_0^2 >= 16 ||X||_F^2 lambda_L^2 S``.
    """
    bar = s.w + C
    P = torch.stack([_product_without(bar, layer) for layer in range(bar.shape[-1])], -1)
    last, lowers = bar[..., -1], P[..., -1]
    # sum_{l<L} (P_l / lambda_L)^2 without the division: lambda_L = 0 when W_L = 0 and C = 0
    S = torch.stack([_product_without(bar[..., :-1], layer) ** 2 for layer in range(bar.shape[-1] - 1)], -1).sum(-1)
    right = torch.stack(
        [
            16 * s.X_F * s.R_0 * torch.where(C > 0, P / C, math.inf).amax(-1) / s.alpha_0**2,
            32 * s.X_F**2 * last * S * s.R_0 / s.alpha_0**3,
            16 * s.X_F**2 * last**2 * S / s.alpha_0**2,
        ],
        -1,
    )
    hidden = (bar[..., :-1] ** -2).sum(-1)
    step = torch.minimum(8 / s.alpha_0**2, hidden / (s.X_F * lowers * last * (hidden + last**-2)) ** 2)
    return PaperAtRadii(C, 1 / right, step, (right <= 1).all(-1))


def paper_fixed_point(s: Spectra) -> PaperAtRadii:
    """Theorem P at its optimal radii: the smallest C with ``C_l >= 16 ||X||_F R_0 P_l(C) / alpha_0^2``.

    Conditions (ii) and (iii) only worsen as C grows, so that no other radii do better (lesson 1).  Where no radii
    satisfy (i), C = 0 is returned: the ratio of (i) is then 0, and those of (ii) and (iii) are upper bounds.
    """
    scale = (16 * s.X_F * s.R_0 / s.alpha_0**2)[..., None]
    C, done = torch.zeros_like(s.w), torch.zeros_like(s.alpha_0, dtype=torch.bool)
    for _ in range(_MAX_ROUNDS):
        bar = s.w + C
        T = scale * torch.stack([_product_without(bar, layer) for layer in range(bar.shape[-1])], -1)
        done = (T <= C).all(-1)
        moving = ~done & (T.amax(-1) < 1e60)
        if not bool(moving.any()):
            break
        C = torch.where(moving[..., None], inflated(T), C)
    return paper_map(s, torch.where(done[..., None], C, torch.zeros_like(C)))


def _product_without(bar: Tensor, layer: int) -> Tensor:
    keep = [i for i in range(bar.shape[-1]) if i != layer]
    return bar[..., keep].prod(-1)


def necessary_condition(s: Spectra, N: int) -> Tensor:
    """``1 / (16 N w_L^2 sum_{l<L} w_l^-2)``: below 1, no radii satisfy Theorem P (infinite for ``W_L = 0``).

    Derived in lesson 1 from ``alpha_0^2 <= ||F_{L-1}||_F^2 / N`` and condition (iii).
    """
    return 1 / (16 * N * s.w[..., -1] ** 2 * (s.w[..., :-1] ** -2).sum(-1))


# --- How much is needed -----------------------------------------------------------------------------------------------


def bisect(feasible: Callable[[Tensor], Tensor], like: Tensor, low: float, high: float, tol: float = 1e-5) -> Tensor:
    """The switching point, on a log scale, of a predicate that is false below and true above; inf if never true."""
    lo, hi = torch.full_like(like, math.log(low)), torch.full_like(like, math.log(high))
    possible = feasible(hi.exp())
    for _ in range(100):
        mid = (lo + hi) / 2
        good = feasible(mid.exp())
        lo, hi = torch.where(good, lo, mid), torch.where(good, mid, hi)
        if float((hi - lo).max()) < tol:
            break
    return torch.where(possible, hi.exp(), torch.full_like(like, math.inf))


def smallest_beta(s: Spectra, *, theorem: str = "C", epsilon: float = 0.25, tol: float = 1e-4) -> Tensor:
    """The smallest factor beta of ``W_{L-1}`` at which Theorem C (or P) holds, for ``W_L = 0``.

    Feasibility is monotone in beta then (lesson 1, fact 5), so that bisection is enough.

    Args:
        s: spectra of networks with ``W_L = 0``, any batch shape.
        theorem: ``"C"`` or ``"P"``.
        epsilon: as in `certify`.
        tol: relative accuracy; the iteration slows down like ``tol^-1/2`` near the edge.

    Returns:
        beta, the batch shape, from above (the theorem holds there).

    Raises:
        ValueError: some ``W_L`` is not zero, or the theorem is unknown.
    """
    if bool((s.w[..., -1] != 0).any()):
        raise ValueError(f"W_L has norm {float(s.w[..., -1].max()):.3g}; the smallest beta needs W_L = 0")
    holds = theorem_holds(theorem, epsilon)
    return bisect(lambda beta: holds(s.scaled(beta)), s.alpha_0, 1e-6, 1e12, tol)


def theorem_holds(theorem: str, epsilon: float) -> Callable[[Spectra], Tensor]:
    if theorem == "C":
        return lambda s: ball_fixed_point(s, epsilon=epsilon).feasible
    if theorem == "P":
        return lambda s: paper_fixed_point(s).feasible
    raise ValueError(f"theorem is {theorem!r}; 'C' or 'P' is needed")


def largest_residual(s: Spectra, *, epsilon: float = 0.25) -> float:
    """The largest ``R_0``, to 0.1 %, at which Theorem C holds with all else unchanged (0 under interference)."""
    if float(ball_map(s, torch.zeros_like(s.w), epsilon).rho) <= 0:
        return 0.0

    def fits(shrink: Tensor) -> Tensor:
        return ball_fixed_point(replace(s, R_0=s.R_0 / shrink), epsilon=epsilon).feasible

    return float(s.R_0 / bisect(fits, s.R_0, 1e-6, 1e15, tol=1e-3))
