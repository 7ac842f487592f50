"""The numbers that Theorems P and C read of a network, and both theorems as functions of them.

Everything here is batched over leading axes, so that a map over widths or scales is one call. Both theorems ask for
radii C with ``C >= T(C)``, T nondecreasing: the smallest are found by iterating from next to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import networks, rigor
from companion.arguments import checked
from companion.rigor.formulas import maximum, minimum
from companion.rigor.rounding import scaled

_INFLATION = 1e-6  # the fixed points are inflated by this factor at every round, so that they end strictly inside
_MAX_ROUNDS = 20_000
_LEAST = 2.0**-900  # where the radii start: a T(C) that underflows to 0 must not pass for T(C) <= C
_FAR = 1e100
SHARES = (0.001, 0.01, *(k / 50 for k in range(1, 50)))  # the values of epsilon that are tried


# --- What is read of a network ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectra:
    """All that Theorems P and C read of a network at initialization; leading axes are batched.

    Args:
        w: ``||W_l||_2`` for l = 1..L, shape (..., L), L >= 2.
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

    def __post_init__(self) -> None:
        for name in _names():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"{name} is {type(value).__name__}; a tensor of floats is needed")
            shape = self.w.shape if name in ("w", "phi") else self.w.shape[:-1]
            if value.shape != shape or not self.w.ndim or self.w.shape[-1] < 2:
                found = f"{name} has shape {tuple(value.shape)}, w {tuple(self.w.shape)}"
                raise ValueError(f"{found}; w and phi of shape (..., L), L >= 2, and (...) for the others are needed")

    def scaled(self, beta: Tensor | float) -> Spectra:
        """The spectra after ``W_{L-1} -> beta W_{L-1}``, for ReLU and ``W_L = 0`` (then ``R_0`` stays ``||Y||_F``)."""
        beta = torch.as_tensor(beta, dtype=self.w.dtype, device=self.w.device)
        w, phi = self.w.clone(), self.phi.clone()
        w[..., -2] *= beta
        phi[..., -1] *= beta
        return replace(self, w=w, phi=phi, alpha_0=self.alpha_0 * beta)

    def member(self, s: int) -> Spectra:
        """The spectra of one network of a batch."""
        return Spectra(*(getattr(self, name)[s] for name in _names()))

    @staticmethod
    def cat(parts: Sequence[Spectra]) -> Spectra:
        """Join batches of networks of one depth, which may have different data, along the first batch axis."""
        return Spectra(*(torch.cat([getattr(p, name) for p in parts]) for name in _names()))


def _names() -> list[str]:
    return [field.name for field in fields(Spectra)]


@checked
def spectra(X: Float[Tensor, "N d"], Y: Float[Tensor, "N K"], weights: Sequence[Tensor]) -> Spectra:
    """``w_l = ||W_l||_2``, ``phi_l = ||F_l||_2``, ``alpha_0 = sigma_N(F_{L-1})``, ``R_0`` in ordinary floating point.

    Args:
        X: inputs, shape (N, d).
        Y: targets, shape (N, K).
        weights: L >= 2 tensors of shape (S, n_in, n_out) or (n_in, n_out).

    Returns:
        The `Spectra` with batch shape (S,).  ``alpha_0`` is 0 when the last hidden layer is narrower than N.

    Raises:
        TypeError, ValueError: data or weights that do not fit, or so large that features overflow.
    """
    networks.check_weights(weights, X, Y)
    stacked = networks.as_ensemble(weights)
    F, R = finite_features(X, Y, stacked)
    S = len(stacked[0])
    alpha_0, last = singular_ends(F[-1])
    first = [rigor.spectral_norm(X).expand(S), *(rigor.spectral_norm(f) for f in F[1:-1])]
    return Spectra(
        torch.stack([rigor.spectral_norm(W) for W in stacked], -1),
        torch.stack([*first[: len(stacked) - 1], last], -1),
        alpha_0,
        rigor.norm(R.flatten(-2)),
        rigor.norm(X.flatten()).expand(S),
    )


def finite_features(X: Tensor, Y: Tensor, stacked: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``F_0, ..., F_{L-1}`` and the residual ``F_{L-1} W_L - Y``, or one sentence when float64 cannot hold them."""
    F = networks.features(stacked, X)
    R = F[-1] @ stacked[-1] - Y
    # 2^-20: no norm of them may overflow either
    if not all(bool((A.abs() < torch.finfo(A.dtype).max * 2.0**-20).all()) for A in (*F, *stacked, R)):
        raise ValueError("X, Y and weights make numbers too large for their dtype; scale X or the weights down")
    return F, R


def singular_ends(F: Tensor) -> tuple[Tensor, Tensor]:
    """``sigma_N(F)`` and ``||F||_2`` of N rows; ``sigma_N`` is 0 for fewer columns, both are NaN for F not finite.

    The Gram matrix has both, but squares the condition number: where that costs digits of ``sigma_N``, the singular
    values are computed.
    """
    N, width = F.shape[-2:]
    if width < N:
        return F.new_zeros(F.shape[:-2]), rigor.spectral_norm(F)
    lost = ~torch.isfinite(F).flatten(-2).all(-1)
    if bool(lost.any()):
        F = F.masked_fill(lost[..., None, None], 0.0)
    G, exponent = rigor.gram(F)
    values = torch.linalg.eigvalsh(G).clamp_min(0)
    smallest, largest = (scaled(v.sqrt(), exponent[..., 0, 0]).to(F.dtype) for v in (values[..., 0], values[..., -1]))
    if not bool((values[..., 0] > 1e-6 * values[..., -1]).all()):
        smallest = torch.linalg.svdvals(F)[..., N - 1]
    return torch.where(lost, math.nan, smallest), torch.where(lost, math.nan, largest)


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


def theorem_c(
    w: list[Any], phi: list[Any], alpha_0: Any, C: list[Any], epsilon: Any, mode: str = "gd", path: str = "telescope"
) -> tuple[Any, Any, Any, Any, Any, list[Any]]:
    """Theorem C's formula, on numbers of any kind: tensors (measured) or fractions (exact), one for each layer.

    With ``lambda_l = w_l + C_l``, ``d_l = d_{l-1} lambda_l + phi_{l-1} C_l``, ``g_l = (phi_{l-1} + d_{l-1})
    prod_{p>l} lambda_p``, ``alpha = alpha_0 - d_{L-1}``, ``B = sum_{l<L} g_l^2``, ``rho = (1-epsilon) alpha^2 - B``.

    Returns:
        ``(d_{L-1}, phi_{L-1} + d_{L-1}, alpha, B, rho, g)``, where ``T = g R_0 / rho``: the last of g is alpha, or
        ``g_L`` for the plain path.
    """
    bar = [a + c for a, c in zip(w, C, strict=True)]
    d, grown = 0, [phi[0]]
    for layer in range(len(w) - 1):
        d = d * bar[layer] + phi[layer] * C[layer]
        grown.append(phi[layer + 1] + d)
    above, g = 1, [grown[-1]]
    for layer in reversed(range(len(w) - 1)):
        above = above * bar[layer + 1]
        g.insert(0, grown[layer] * above)
    alpha = alpha_0 - d
    B = sum(x**2 for x in g[:-1]) if mode == "gd" else 0 * d
    rho = (1 - epsilon) * alpha**2 - B if mode == "gd" else alpha**2
    return d, grown[-1], alpha, B, rho, g if path == "plain" else [*g[:-1], alpha]


def at_radii(
    s: Spectra, C: Tensor, epsilon: Tensor | float, mode: str = "gd", path: str = "telescope", rounds: int = 0
) -> AtRadii:
    """`ball_map` without its check of the arguments."""
    d, phi, alpha, B, rho, g = theorem_c(
        list(s.w.unbind(-1)), list(s.phi.unbind(-1)), s.alpha_0, list(C.unbind(-1)), epsilon, mode, path
    )
    T = torch.stack(g, -1) * (s.R_0 / rho)[..., None]
    feasible = (alpha > 0) & (rho > 0) & (T <= C).all(-1)
    return AtRadii(C, T, d, phi, alpha, B, rho, feasible, rounds)


@checked
def ball_map(
    s: Spectra,
    C: Float[Tensor, "*radii L"],
    epsilon: Float[Tensor, "*grid"] | float,
    mode: Literal["gd", "flow"] = "gd",
    path: Literal["telescope", "plain"] = "telescope",
) -> AtRadii:
    """Evaluate Theorem C's bounds ``T_l(C) = g_l R_0 / rho`` (l < L) and ``T_L(C) = alpha R_0 / rho`` once.

    The formulas are those of `theorem_c`.

    Args:
        s: the network's spectra, batch shape (...).
        C: radii, shape (..., L).
        epsilon: the share of the rate that is given to the step, in (0, 1).
        mode: ``"gd"``, or ``"flow"`` for gradient flow (``rho = alpha^2``).
        path: ``"telescope"``, or ``"plain"`` for ``T_L = g_L R_0 / rho``, the bound without the telescoping sum.

    Returns:
        The `AtRadii` at C.

    Raises:
        ValueError: epsilon outside (0, 1), radii of another depth or below 0, an unknown mode or path.

    Source: Theorem C, derived in lesson 1.
    """
    check_share(epsilon)
    if not C.ndim or C.shape[-1] != s.w.shape[-1] or not bool((C >= 0).all()):
        raise ValueError(f"C has shape {tuple(C.shape)}; {s.w.shape[-1]} radii >= 0, one for each layer, are needed")
    return at_radii(s, C, epsilon, mode, path)


@checked
def ball_fixed_point(
    s: Spectra,
    *,
    epsilon: Float[Tensor, "*grid"] | float = 0.25,
    mode: Literal["gd", "flow"] = "gd",
    path: Literal["telescope", "plain"] = "telescope",
) -> AtRadii:
    """Find radii with ``C >= T(C)`` by ``C <- (1 + 1e-6) T(C)`` from next to ``C = 0``.

    T is nondecreasing, so the iteration stays below every admissible C: if it breaks down (alpha or rho <= 0), no
    radii exist for an ``R_0`` that is larger by the inflation; if it neither stops nor breaks down, nothing is decided.

    Args:
        s: the network's spectra, any batch shape.
        epsilon: the share of the rate given to the step, a number or a tensor that broadcasts with the batch.
        mode: ``"gd"`` or ``"flow"``.
        path: ``"telescope"`` or ``"plain"``, as in `ball_map`.

    Returns:
        The `AtRadii` at the last radii; ``feasible`` holds one flag for each network.

    Raises:
        ValueError: epsilon outside (0, 1), or an unknown mode or path.

    Source: Theorem C, derived in lesson 1.
    """
    check_share(epsilon)
    ball = at_radii(s, torch.full_like(s.w, _LEAST), epsilon, mode, path)
    for rounds in range(1, _MAX_ROUNDS):
        alive = (ball.alpha > 0) & (ball.rho > 0) & ~ball.feasible
        if not bool(alive.any()):
            break
        C = torch.where(alive[..., None], inflated(ball.T), ball.C)
        ball = at_radii(s, C, epsilon, mode, path, rounds)
    return ball


def inflated(T: Tensor) -> Tensor:
    """The next radii: a little more than ``T(C)``, so that the iteration ends strictly inside."""
    return (T * (1 + _INFLATION)).clamp_min(_LEAST)


def check_share(epsilon: Tensor | float) -> None:
    """Refuse an epsilon outside (0, 1)."""
    for share in epsilon.flatten().tolist() if isinstance(epsilon, Tensor) else [epsilon]:
        if not 0 < share < 1:
            raise ValueError(f"epsilon is {share}; a number strictly between 0 and 1 is needed")


def best_share(s: Spectra, step: float | None = None) -> float | None:
    """Choose epsilon among `SHARES` for one network.

    Args:
        s: the network's spectra, no batch.
        step: the step that will be used, if it is known.

    Returns:
        Without a step the epsilon that maximizes ``max_step * rho``, the proved progress of one step. With a step the
        smallest that allows it, which has the smallest radii, or the one with the largest step where none allows it.
        None where radii exist for none of them.
    """
    share = s.w.new_tensor(SHARES)
    wide = Spectra(*(value.expand(len(SHARES), *value.shape) for value in (getattr(s, name) for name in _names())))
    ball = ball_fixed_point(wide, epsilon=share)
    if not bool(ball.feasible.any()):
        return None
    largest = 2 * share / ball.phi / ball.phi
    if step is None:
        return SHARES[int(torch.where(ball.feasible, largest * ball.rho, -math.inf).argmax())]
    largest = torch.where(ball.feasible, largest, -math.inf)
    enough = largest >= step * (1 + 1e-12)  # not by a hair: it will be compared again, in another arithmetic
    return SHARES[int(enough.to(torch.int8).argmax() if bool(enough.any()) else largest.argmax())]


@checked
def two_layer_threshold(epsilon: float = 0.25, mode: Literal["gd", "flow"] = "gd") -> float:
    """Corollary D: for L = 2 and ``W_2 = 0`` Theorem C holds iff ``alpha_0^2 >= threshold * ||X||_2 ||Y||_F``.

    ``1 / threshold = max_delta sqrt(delta (1-delta)) (a - b delta)``, ``a = 1 - epsilon``, ``b = 2 - epsilon``; for
    gradient flow the threshold is ``sqrt(256/27)``.

    Args:
        epsilon: the share of the rate given to the step, in (0, 1).
        mode: ``"gd"`` or ``"flow"``.

    Returns:
        The threshold: 5.6905 at epsilon = 1/4, towards 4 as epsilon falls to 0, 3.0792 for the flow.

    Raises:
        ValueError: epsilon outside (0, 1), or an unknown mode.

    Source: Corollary D, derived in lesson 1.
    """
    check_share(epsilon)
    if mode == "flow":
        return math.sqrt(256 / 27)
    a, b = 1 - float(epsilon), 2 - float(epsilon)
    delta = (3 * b + 2 * a - math.sqrt((3 * b + 2 * a) ** 2 - 16 * a * b)) / (8 * b)
    return 1 / (math.sqrt(delta * (1 - delta)) * (a - b * delta))


# --- Theorem P --------------------------------------------------------------------------------------------------------


class PaperAtRadii(NamedTuple):
    """Theorem P at radii C: ``ratios`` (..., 3) are left over right sides of (i)-(iii), ``step`` the largest one."""

    C: Tensor
    ratios: Tensor
    step: Tensor
    feasible: Tensor


def theorem_p(w: list[Any], X_F: Any, alpha_0: Any, R_0: Any, C: list[Any]) -> tuple[list[Any], Any]:
    """Theorem P's formula, on numbers of any kind: tensors (measured) or fractions (exact), one for each layer.

    With ``lambda_l = w_l + C_l``, ``P_l = prod_{p != l} lambda_p``, ``S = sum_{l<L} P_l^2 / lambda_L^2``:
    (i) ``alpha_0^2 >= 16 ||X||_F R_0 max_l P_l / C_l``, (ii) ``alpha_0^3 >= 32 ||X||_F^2 lambda_L S R_0``,
    (iii) ``alpha_0^2 >= 16 ||X||_F^2 lambda_L^2 S``.

    Returns:
        The right over the left sides of (i)-(iii), and the largest step.
    """
    bar = [a + c for a, c in zip(w, C, strict=True)]
    x, R, last, L = X_F / alpha_0, R_0 / alpha_0, bar[-1], len(w)
    P = [math.prod(bar[:layer] + bar[layer + 1 :]) for layer in range(L)]
    # x P_l / lambda_L without the division, since lambda_L may be 0; nothing is squared that may leave the floats
    parts = [x * math.prod(bar[:layer] + bar[layer + 1 : -1]) for layer in range(L - 1)]
    largest = reduce(maximum, (p / c for p, c in zip(P, C, strict=True)))
    sides = [16 * x * R * largest, 32 * sum(p**2 for p in parts) * last * R, 16 * sum((p * last) ** 2 for p in parts)]
    hidden = sum(b**-2 for b in bar[:-1])
    return sides, minimum(8 / alpha_0**2, hidden / (X_F * P[-1] * last * (hidden + last**-2)) ** 2)


def paper_map(s: Spectra, C: Tensor) -> PaperAtRadii:
    """Evaluate Theorem P's three conditions and its step (`theorem_p`) at radii C of shape (..., L)."""
    sides, step = theorem_p(list(s.w.unbind(-1)), s.X_F, s.alpha_0, s.R_0, list(C.unbind(-1)))
    ratios = 1 / torch.stack(sides, -1)
    return PaperAtRadii(C, ratios, step, (ratios >= 1).all(-1))


def paper_fixed_point(s: Spectra) -> PaperAtRadii:
    """Theorem P at its optimal radii: the smallest C with ``C_l >= 16 ||X||_F R_0 P_l(C) / alpha_0^2``.

    Conditions (ii) and (iii) only worsen as C grows, so that no other radii do better (lesson 1).  Where no radii
    satisfy (i), C = 0 is returned: the ratio of (i) is then 0, and those of (ii) and (iii) are upper bounds.
    """
    C, done = torch.full_like(s.w, _LEAST), torch.zeros_like(s.alpha_0, dtype=torch.bool)
    scale = 16 * (s.X_F / s.alpha_0) * (s.R_0 / s.alpha_0)
    for _ in range(_MAX_ROUNDS):
        bar = (s.w + C).unbind(-1)
        T = torch.stack([scale * math.prod(bar[:layer] + bar[layer + 1 :]) for layer in range(len(bar))], -1)
        done = (T <= C).all(-1)
        moving = ~done & (T.amax(-1) < 1e60)
        if not bool(moving.any()):
            break
        C = torch.where(moving[..., None], inflated(T), C)
    return paper_map(s, torch.where(done[..., None], C, torch.zeros_like(C)))


@checked
def necessary_condition(s: Spectra, N: int) -> Tensor:
    """``1 / (16 N w_L^2 sum_{l<L} w_l^-2)``: below 1, no radii satisfy Theorem P (infinite for ``W_L = 0``).

    Args:
        s: the network's spectra, any batch shape.
        N: how many samples, at least 1.

    Returns:
        The ratio, the batch shape.

    Raises:
        ValueError: N below 1.

    Source: derived in lesson 1 from ``alpha_0^2 <= ||F_{L-1}||_F^2 / N`` and condition (iii).
    """
    if N < 1:
        raise ValueError(f"N is {N}; at least one sample is needed")
    return 1 / (16 * N * s.w[..., -1] ** 2 * (s.w[..., :-1] ** -2).sum(-1))


# --- How much is needed -----------------------------------------------------------------------------------------------


def bisect(feasible: Callable[[Tensor], Tensor], like: Tensor, low: float, high: float, tol: float = 1e-5) -> Tensor:
    """The point from `low` on, on a log scale, where a predicate turns from false to true; inf if not even at 1e100."""
    lo, hi = (torch.full_like(like, math.log(end)) for end in (low, high))
    possible = feasible(hi.exp())
    if not bool(possible.all()):
        hi = torch.where(possible, hi, math.log(_FAR))
        possible = feasible(hi.exp())
    for _ in range(100):
        mid = (lo + hi) / 2
        good = feasible(mid.exp())
        lo, hi = torch.where(good, lo, mid), torch.where(good, mid, hi)
        if float((hi - lo).max()) < tol:
            break
    return torch.where(possible, hi.exp(), math.inf)


@checked
def smallest_beta(s: Spectra, *, theorem: Literal["C", "P"] = "C", epsilon: float = 0.25, tol: float = 1e-4) -> Tensor:
    """The smallest factor beta of ``W_{L-1}`` at which Theorem C (or P) holds, for ``W_L = 0``.

    Feasibility is monotone in beta then (lesson 1, fact 5), so that bisection is enough.

    Args:
        s: spectra of networks with ``W_L = 0``, any batch shape.
        theorem: ``"C"`` or ``"P"``.
        epsilon: the share of the rate given to the step in Theorem C, in (0, 1).
        tol: relative accuracy, from 1e-9; the iteration slows down like ``tol^-1/2`` near the edge.

    Returns:
        beta from 1e-6 on, the batch shape, from above (the theorem holds there); infinite where 1e100 is not enough.

    Raises:
        ValueError: some ``W_L`` is not zero, an unknown theorem, epsilon or tol out of range.

    Source: derived in lesson 1.
    """
    check_share(epsilon)
    if bool((s.w[..., -1] != 0).any()):
        raise ValueError(f"W_L has norm {float(s.w[..., -1].max()):.3g}; the smallest beta needs W_L = 0")
    if not 1e-9 <= tol < 1:
        raise ValueError(f"tol is {tol}; a number from 1e-9 to 1 is needed")
    holds = theorem_holds(theorem, epsilon)
    return bisect(lambda beta: holds(s.scaled(beta)), s.alpha_0, 1e-6, 1e12, tol)


def theorem_holds(theorem: str, epsilon: float) -> Callable[[Spectra], Tensor]:
    """Theorem C, or P at its optimal radii, as a predicate of spectra."""
    if theorem == "C":
        return lambda s: ball_fixed_point(s, epsilon=epsilon).feasible
    return lambda s: paper_fixed_point(s).feasible


def largest_residual(s: Spectra, *, epsilon: float = 0.25) -> float:
    """The largest ``R_0``, to 0.1 %, at which Theorem C holds with all else unchanged (0 under interference)."""
    if not float(at_radii(s, torch.zeros_like(s.w), epsilon).rho) > 0:
        return 0.0

    def fits(shrink: Tensor) -> Tensor:
        return ball_fixed_point(replace(s, R_0=s.R_0 / shrink), epsilon=epsilon).feasible

    return float(s.R_0 / bisect(fits, s.R_0, 1e-6, 1e15, tol=1e-3))
