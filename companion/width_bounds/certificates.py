"""Result 1, width bounds (Nguyen 2021): when gradient descent on a deep ReLU network is proved to reach zero loss.

The network has layers ``F_0 = X``, ``F_l = relu(F_{l-1} W_l)`` for ``l < L`` and the output ``F_{L-1} W_L``, no biases;
the loss is ``0.5 * ||F_{L-1} W_L - Y||_F^2``.  Two theorems look at one initialization and one data set:

- Theorem P, the paper's, with explicit constants: `paper_conditions`.
- Theorem C, the course's, derived in lesson 1, weaker hypotheses and the same conclusion: `certify`.

Both only read a handful of numbers, the `Spectra` of the network; everything that decides a theorem is a plain
function of them, batched over leading axes, so that a map over widths or scales is one call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, descent, kernels, networks, rigor
from companion.certificate import Assumption, Certificate, assumed, compare

INFLATION = 1e-6  # the fixed points are inflated by this factor at every round, so that they end strictly inside
MAX_ROUNDS = 20_000
_UNIT = 2.0**-53


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
    w = torch.stack([_largest_singular_value(W) for W in stacked], -1)
    first = _largest_singular_value(X).expand(S)
    phi = torch.stack([first, *(_largest_singular_value(f) for f in F[1:])], -1)
    alpha_0 = torch.linalg.svdvals(F[-1])[..., N - 1] if width >= N else torch.zeros_like(first)
    R_0 = torch.linalg.matrix_norm(F[-1] @ stacked[-1] - Y)
    return Spectra(w, phi, alpha_0, R_0, torch.linalg.matrix_norm(X).expand(S))


def _largest_singular_value(A: Tensor) -> Tensor:
    """``||A||_2`` through the smaller Gram matrix: the largest singular value loses nothing by squaring."""
    G = A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A
    return torch.linalg.eigvalsh(G)[..., -1].clamp_min(0).sqrt()


# --- Theorem C ------------------------------------------------------------------------------------------------------


class Ball(NamedTuple):
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


def ball_map(s: Spectra, C: Tensor, epsilon: Tensor | float, mode: str = "gd", path: str = "telescope") -> Ball:
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
        The `Ball` at C.  Source: Theorem C, derived in lesson 1.
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
    return Ball(C, T, d, phi[-1], alpha, B, rho, feasible, 0)


def ball_fixed_point(s: Spectra, *, epsilon: Tensor | float = 0.25, mode: str = "gd", path: str = "telescope") -> Ball:
    """Find radii with ``C >= T(C)`` by ``C <- (1 + 1e-6) T(C)`` from ``C = 0``.

    T is nondecreasing, so the iteration stays below every admissible C: if it breaks down (alpha or rho <= 0), no
    radii exist for spectra smaller by the inflation; if it neither stops nor breaks down, nothing is decided.

    Args:
        s: the network's spectra, any batch shape.
        epsilon: the share of the rate given to the step, a number or a tensor that broadcasts with the batch.
        mode: ``"gd"`` or ``"flow"``.
        path: ``"telescope"`` or ``"plain"``, as in `ball_map`.

    Returns:
        The `Ball` at the last radii; ``feasible`` holds one flag for each network.

    Raises:
        ValueError: epsilon outside (0, 1), or an unknown mode or path.
    """
    _check_choices(epsilon, mode, path)
    ball = ball_map(s, torch.zeros_like(s.w), epsilon, mode, path)
    for rounds in range(1, MAX_ROUNDS):
        alive = (ball.alpha > 0) & (ball.rho > 0) & ~ball.feasible
        if not bool(alive.any()):
            break
        C = torch.where(alive[..., None], ball.T * (1 + INFLATION), ball.C)
        ball = ball_map(s, C, epsilon, mode, path)._replace(rounds=rounds)
    return ball


def _check_choices(epsilon: Tensor | float, mode: str, path: str) -> None:
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


def certify(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    weights: Sequence[Tensor],
    *,
    epsilon: float | str = 0.25,
    level: str = "measured",
    step: float | None = None,
) -> Certificate:
    """Does Theorem C cover this network and data?  ``||R_k||_F <= (1 - eta rho)^k ||R_0||_F`` if it holds.

    Args:
        X: inputs, shape (N, d), float64.
        Y: targets, shape (N, K), float64.
        weights: initial weights, L >= 2 tensors of shape (S, n_in, n_out) or (n_in, n_out), float64.
        epsilon: the share of the rate given to the step, in (0, 1), or ``"auto"`` for `best_epsilon`.
        level: ``"measured"`` (ordinary floating point) or ``"certified"`` (every rounding error of the features,
            singular values and norms bounded, the final inequalities in exact rationals).
        step: the step size eta that will be used; the largest admissible one when omitted.

    Returns:
        A `Certificate`.  ``quantities`` holds ``alpha``, ``rho``, ``max_step``, ``radii``, ``R_0``, ``alpha_0``,
        ``d``, ``B``, ``phi``, ``epsilon``, ``rounds``; on failure the largest admissible ``R_0``, and for ``W_L = 0``
        the factor ``beta`` of ``W_{L-1}`` that would do.  ``holds=False`` means "not shown", never "does not converge".
        An ensemble of S networks gives the first network that is not shown, or else the one with the smallest
        ``alpha_0``, and all of them in ``members``.

    Raises:
        TypeError: an argument is not a tensor, or not float64.
        ValueError: NaN, infinity, wrong shape, an empty list of weights, unknown level, epsilon or step out of range.

    Source: Theorem C, derived in lesson 1.
    """
    stacked = _validated(X, Y, weights)
    if level not in ("measured", "certified"):
        raise ValueError(f"level is {level!r}; 'measured' or 'certified' is needed")
    if isinstance(epsilon, str) and epsilon != "auto":
        raise ValueError(f"epsilon is {epsilon!r}; a number between 0 and 1 or 'auto' is needed")
    if not isinstance(epsilon, str):
        _check_choices(epsilon, "gd", "telescope")
    if step is not None and not (step > 0 and math.isfinite(step)):
        raise ValueError(f"step is {step}; a positive number is needed")
    N, width = X.shape[0], stacked[-1].shape[1]
    first = _data_rows(X, N, width, len(stacked))
    if not all(a.holds for a, _ in first):
        reason = next(reason for a, reason in first if not a.holds)
        return Certificate("Theorem C", False, tuple(a for a, _ in first), {}, reason)
    rows = tuple(a for a, _ in first)
    members = []
    for s in range(stacked[0].shape[0]):
        one = [W[s] for W in stacked]
        values = _certified_spectra(X, Y, one) if level == "certified" else spectra(X, Y, one).member(0)
        share = best_epsilon(values) if epsilon == "auto" else float(epsilon)
        zero_last = not bool(one[-1].any())
        members.append(_certify_one(values, share, level, step, rows, zero_last))
    return _gather(members)


def _gather(members: list[Certificate]) -> Certificate:
    if len(members) == 1:
        return members[0]
    failing = [m for m in members if not m.holds]
    worst = failing[0] if failing else min(members, key=lambda m: m.quantities["alpha_0"])
    return replace(worst, members=tuple(members))


def _validated(X: Tensor, Y: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    data.check(X, Y, geometry=False)
    networks.check_weights(weights, X, Y)
    if X.dtype != torch.float64:
        raise TypeError(f"X has dtype {X.dtype}; a certificate needs float64")
    if len(weights) < 2:
        raise ValueError(f"weights has {len(weights)} matrix; at least 2 are needed (one hidden layer)")
    return networks.as_ensemble(weights)


def _data_rows(X: Tensor, N: int, width: int, L: int) -> list[tuple[Assumption, str]]:
    """The lines about the data and the width, each with the reason that a failure gives."""
    found = data.degeneracies(X)
    dependent = found.antipodal_dependent and L == 2
    reason = ""
    if found.zero_rows:
        reason = f"zero_row: row {found.zero_rows[0]} of X is zero, and its features are zero at every width"
    elif found.parallel_pairs:
        i, j = found.parallel_pairs[0]
        reason = (
            f"parallel_rows: rows {i} and {j} of X are positively parallel, and so are their features at every width"
        )
    elif dependent:
        pairs = ", ".join(f"({i}, {j})" for i, j in found.antipodal_pairs)
        reason = f"dependent_antipodal_pairs: the antipodal pairs {pairs} of X are linearly dependent"
    rows = [(Assumption("rows of X in general position", not reason, "is", True, "measured", not reason), reason)]
    narrow = f"too_narrow: the last hidden layer has {width} neurons; at least N = {N} are needed"
    rows.append((compare("n ≥ N", width, ">=", N, "exact"), narrow))
    return rows


def _certify_one(
    s: Spectra, epsilon: float, level: str, step: float | None, rows: tuple[Assumption, ...], zero_last: bool
) -> Certificate:
    """Theorem C for one network from its spectra (one-sided bounds are enough: T is monotone in each of them)."""
    status = "certified" if level == "certified" else "measured"
    if status == "certified" and float(s.alpha_0) > 0:  # alpha_0 > 0 proves what the floating-point look at X suggests
        rows = tuple(replace(a, status="certified") if a.status == "measured" else a for a in rows)
    rows = (*rows, compare("α₀ = σ_N(F_{L-1})", float(s.alpha_0), ">", 0.0, status))
    if not rows[-1].holds:
        detail = "sigma_min_unresolved: no positive lower bound on the smallest singular value was found"
        return Certificate("Theorem C", False, rows, {"epsilon": epsilon}, detail)
    ball = ball_fixed_point(s, epsilon=epsilon)
    proof = _exact_ball(s, ball, epsilon) if level == "certified" else None
    if proof is not None:
        ball = proof.ball
    max_step = 2 * epsilon / float(ball.phi) ** 2 if proof is None else proof.max_step
    closed = bool(ball.feasible) if proof is None else proof.holds
    final = "exact" if proof is not None else status
    rows = (
        *rows,
        compare("α = α₀ - d_{L-1}", float(ball.alpha), ">", 0.0, status),
        compare("B, against (1-ε) α²", float(ball.B), "<", float(ball.rho + ball.B), status),
        compare("T_l(C) ≤ C_l in every layer", closed, "is", True, final),
        compare("η", max_step if step is None else step, "<=", max_step, status),
        assumed("full-batch gradient descent in exact arithmetic, no biases"),
    )
    holds = all(a.holds for a in rows)
    quantities = _quantities(s, ball, epsilon, max_step)
    reason = "" if holds else _reason(s, ball, epsilon, rows, quantities, zero_last)
    return Certificate("Theorem C", holds, rows, quantities, reason)


def _quantities(s: Spectra, ball: Ball, epsilon: float, max_step: float) -> dict[str, Any]:
    return {
        "alpha": float(ball.alpha),
        "rho": float(ball.rho),
        "max_step": max_step,
        "radii": ball.C.tolist(),
        "R_0": float(s.R_0),
        "alpha_0": float(s.alpha_0),
        "d": float(ball.d),
        "B": float(ball.B),
        "phi": float(ball.phi),
        "epsilon": epsilon,
        "rounds": ball.rounds,
    }


def _reason(
    s: Spectra, ball: Ball, epsilon: float, rows: tuple[Assumption, ...], quantities: dict[str, Any], zero_last: bool
) -> str:
    if all(a.holds for a in rows if a.name != "η"):
        return f"step_too_large: the theorem asks for η ≤ {quantities['max_step']:.3g}"
    start = ball_map(s, torch.zeros_like(s.w), epsilon)
    if float(start.rho) <= 0:
        return "interference: B exceeds (1-ε) α₀² already without any movement, so that no target helps"
    if float(ball.rho) > 0 and float(ball.alpha) > 0:
        return "undecided: the radii are too close to the edge of feasibility"
    quantities["largest_R_0"] = largest_residual(s, epsilon=epsilon)
    hint = f"residual_too_large: R₀ is {float(s.R_0):.3g}; {quantities['largest_R_0']:.3g} would do"
    if zero_last:
        quantities["beta"] = float(smallest_beta(s, epsilon=epsilon, tol=1e-3))
        hint += f", or W_{{L-1}} scaled by {quantities['beta']:.3g}"
    return hint


def envelope(certificate: Certificate, step: float, k: Tensor) -> Tensor:
    """Theorem C's curve ``(1 - eta rho')^k R_0``, an upper bound on the residual norm after k steps.

    A step below the largest one leaves more of the rate: ``rho' = (1 - eta phi^2 / 2) alpha^2 - B`` (lesson 1, fact 2).

    Args:
        certificate: a certificate that holds, from `certify`.
        step: the step size eta.
        k: numbers of steps, any shape.

    Returns:
        The bounds on ``||R_k||_F``, the shape of k.

    Raises:
        ValueError: the certificate does not hold, or step is not in (0, max_step].
    """
    if not certificate.holds:
        raise ValueError(f"certificate does not hold ({certificate.reason}); an envelope needs one that does")
    q = certificate.quantities
    if not 0 < step <= q["max_step"]:
        raise ValueError(f"step is {step}; a number in (0, {q['max_step']:.6g}] is needed")
    rho = (1 - step * q["phi"] ** 2 / 2) * q["alpha"] ** 2 - q["B"]
    return (1 - step * rho) ** k.to(torch.float64) * q["R_0"]


# --- Theorem C, rigorously ------------------------------------------------------------------------------------------


def _certified_spectra(X: Tensor, Y: Tensor, weights: list[Tensor]) -> Spectra:
    """One-sided bounds on the spectra of the exact-arithmetic network with these stored floats as its weights.

    ``e_l >= ||fl(F_l) - F_l||_F`` obeys ``e_l = e_{l-1} ||W_l||_2 + ||fl(F_{l-1} W_l) - F_{l-1} W_l||_F``, since ReLU
    is 1-Lipschitz and exact in floats (lesson 1, appendix).
    """
    up = rigor.round_up
    X, Y, weights = X.cpu(), Y.cpu(), [W.cpu() for W in weights]
    w = [rigor.spectral_norm_upper(W) for W in weights]
    phi, error, F = [rigor.spectral_norm_upper(X)], 0.0, X
    for W, norm in zip(weights[:-1], w, strict=False):
        error = up(up(error * norm) + rigor.product_error(F, W))
        F = torch.relu(F @ W)
        phi.append(up(rigor.spectral_norm_upper(F) + error))
    alpha_0 = max(0.0, rigor.round_down(rigor.sigma_min_lower(F) - error))
    out = up(up(error * w[-1]) + rigor.product_error(F, weights[-1]))
    R = F @ weights[-1] - Y
    # the subtraction itself: |fl(a - b) - (a - b)| <= u |fl(a - b)|
    R_0 = up(up(rigor.frobenius_norm_upper(R) * (1 + 4 * _UNIT)) + out)
    X_F = rigor.frobenius_norm_upper(X)
    number = torch.tensor([alpha_0, R_0, X_F], dtype=torch.float64)
    return Spectra(torch.tensor(w, dtype=torch.float64), torch.tensor(phi, dtype=torch.float64), *number)


class _Proof(NamedTuple):
    ball: Ball
    holds: bool
    max_step: float


def _exact_ball(s: Spectra, ball: Ball, epsilon: float) -> _Proof | None:
    """Check ``alpha, rho > 0`` and ``T(C) <= C`` in rationals, and round the quantities outward.

    rho is a difference of nearly equal numbers at the edge, which the inflation of the fixed point need not cover:
    when the rational check fails, the iteration goes on for a few more rounds.
    """
    if not bool(ball.feasible):
        return None
    for _ in range(20):
        proof = _rational_check(s, ball.C, epsilon)
        if proof is not None:
            d, phi, alpha, B, rho, T = proof
            up, down = rigor.round_up, rigor.round_down
            number = torch.tensor(
                [up(float(d)), up(float(phi)), down(float(alpha)), up(float(B)), down(float(rho))], dtype=torch.float64
            )
            bounds = torch.tensor([up(float(t)) for t in T], dtype=torch.float64)
            rounded = ball._replace(
                d=number[0], phi=number[1], alpha=number[2], B=number[3], rho=number[4], T=torch.minimum(bounds, ball.C)
            )
            return _Proof(rounded, True, down(float(2 * Fraction(epsilon) / phi**2)))
        ball = ball_map(s, ball.T * (1 + INFLATION), epsilon)._replace(rounds=ball.rounds + 1)
        if not (float(ball.alpha) > 0 and float(ball.rho) > 0):
            break
    return _Proof(ball, False, 0.0)


class _Exact(NamedTuple):
    d: Fraction
    phi: Fraction
    alpha: Fraction
    B: Fraction
    rho: Fraction
    T: list[Fraction]


def _rational_check(s: Spectra, C: Tensor, epsilon: float) -> _Exact | None:
    """``(d, phi, alpha, B, rho, T)`` of Theorem C in exact rationals, or None when an inequality fails."""
    radii = [Fraction(c) for c in C.tolist()]
    bar = [Fraction(w) + c for w, c in zip(s.w.tolist(), radii, strict=True)]
    phi_0 = [Fraction(p) for p in s.phi.tolist()]
    R_0, L, d, phi = Fraction(float(s.R_0)), len(radii), Fraction(0), [phi_0[0]]
    for layer in range(L - 1):
        d = d * bar[layer] + phi_0[layer] * radii[layer]
        phi.append(phi_0[layer + 1] + d)
    alpha = Fraction(float(s.alpha_0)) - d
    g = [phi[layer] * math.prod(bar[layer + 1 :]) for layer in range(L - 1)]
    B = sum((x**2 for x in g), Fraction(0))
    rho = (1 - Fraction(epsilon)) * alpha**2 - B
    if alpha <= 0 or rho <= 0:
        return None
    T = [x * R_0 / rho for x in (*g, alpha)]
    if any(t > c for t, c in zip(T, radii, strict=True)):
        return None
    return _Exact(d, phi[-1], alpha, B, rho, T)


# --- Theorem P ------------------------------------------------------------------------------------------------------


class PaperBall(NamedTuple):
    """Theorem P at radii C: ``ratios`` (..., 3) are left over right sides of (i)-(iii), ``step`` the largest one."""

    C: Tensor
    ratios: Tensor
    step: Tensor
    feasible: Tensor


def paper_map(s: Spectra, C: Tensor) -> PaperBall:
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
    return PaperBall(C, 1 / right, step, (right <= 1).all(-1))


def paper_fixed_point(s: Spectra) -> PaperBall:
    """Theorem P at its optimal radii: the smallest C with ``C_l >= 16 ||X||_F R_0 P_l(C) / alpha_0^2``.

    Conditions (ii) and (iii) only worsen as C grows, so that no other radii do better (lesson 1).  Where no radii
    satisfy (i), C = 0 is returned: the ratio of (i) is then 0, and those of (ii) and (iii) are upper bounds.
    """
    scale = (16 * s.X_F * s.R_0 / s.alpha_0**2)[..., None]
    C, done = torch.zeros_like(s.w), torch.zeros_like(s.alpha_0, dtype=torch.bool)
    for _ in range(MAX_ROUNDS):
        bar = s.w + C
        T = scale * torch.stack([_product_without(bar, layer) for layer in range(bar.shape[-1])], -1)
        done = (T <= C).all(-1)
        moving = ~done & (T.amax(-1) < 1e60)
        if not bool(moving.any()):
            break
        C = torch.where(moving[..., None], T * (1 + INFLATION), C)
    return paper_map(s, torch.where(done[..., None], C, torch.zeros_like(C)))


def _product_without(bar: Tensor, layer: int) -> Tensor:
    keep = [i for i in range(bar.shape[-1]) if i != layer]
    return bar[..., keep].prod(-1)


def paper_conditions(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    weights: Sequence[Tensor],
    radii: Sequence[float] | None = None,
) -> Certificate:
    """Theorem P on one network: ``Phi_k <= (1 - eta alpha_0^2 / 8)^k Phi_0`` if it holds.

    Args:
        X: inputs, shape (N, d), float64.
        Y: targets, shape (N, K), float64.
        weights: initial weights, L >= 2 tensors of shape (S, n_in, n_out) or (n_in, n_out), float64.
        radii: the constants C_l > 0, one for each layer; the optimal ones when omitted.

    Returns:
        A `Certificate` with the ratios of the left to the right sides of (i)-(iii) as its lines; ``quantities`` holds
        ``alpha_0``, ``max_step``, ``rate`` (of the loss, for one step), ``radii`` and ``necessary``, the ratio of
        `necessary_condition`, which must be at least 1 for any radii to exist.

    Raises:
        TypeError: an argument is not a tensor, or not float64.
        ValueError: as for `certify`; radii not positive or not one for each layer.

    Source: Nguyen (2021), Theorem 2.2, as restated by Cong, Ramezani and Mahdavi (2021), appendix D.
    """
    stacked = _validated(X, Y, weights)
    if radii is not None and (len(radii) != len(stacked) or not all(c > 0 for c in radii)):
        raise ValueError(f"radii is {list(radii)}; {len(stacked)} positive numbers are needed, one for each layer")
    N = X.shape[0]
    rows = _data_rows(X, N, stacked[-1].shape[1], len(stacked))
    bad = [reason for a, reason in rows if not a.holds]
    if bad:
        return Certificate("Theorem P", False, tuple(a for a, _ in rows), {}, bad[0])
    s = spectra(X, Y, stacked)
    if radii is None:
        ball = paper_fixed_point(s)
    else:
        ball = paper_map(s, torch.tensor(list(radii), dtype=s.w.dtype, device=s.w.device).expand_as(s.w))
    necessary = necessary_condition(s, N)
    members = [_paper_one(s.member(i), ball, float(necessary[i]), i, [a for a, _ in rows]) for i in range(len(s.R_0))]
    return _gather(members)


def _paper_one(s: Spectra, ball: PaperBall, necessary: float, i: int, rows: list[Assumption]) -> Certificate:
    alpha_0, step = float(s.alpha_0), float(ball.step[i])
    rows = [*rows, compare("α₀ = σ_N(F_{L-1})", alpha_0, ">", 0.0)]
    found = bool(ball.C[i].any())  # optimal radii that do not exist come back as zeros
    if found:
        names = ("(i) α₀² / right side", "(ii) α₀³ / right side", "(iii) α₀² / right side")
        rows += [compare(name, float(r), ">=", 1.0) for name, r in zip(names, ball.ratios[i], strict=True)]
    else:
        rows.append(compare("(i) is satisfied by some radii", False, "is", True))
    rows.append(assumed("full-batch gradient descent in exact arithmetic, no biases"))
    quantities = {"alpha_0": alpha_0, "R_0": float(s.R_0), "necessary": necessary}
    if found:
        rate = step * alpha_0**2 / 8
        quantities |= {"max_step": step, "rate": rate, "radii": ball.C[i].tolist()}
    broken = [a.name.split(" ")[0] for a in rows if not a.holds]
    reason = f"condition {', '.join(broken)} fails" if found else "no_radii: no C satisfies condition (i)"
    return Certificate("Theorem P", not broken, tuple(rows), quantities, "" if not broken else reason)


def necessary_condition(s: Spectra, N: int) -> Tensor:
    """``1 / (16 N w_L^2 sum_{l<L} w_l^-2)``: below 1, no radii satisfy Theorem P (infinite for ``W_L = 0``).

    Derived in lesson 1 from ``alpha_0^2 <= ||F_{L-1}||_F^2 / N`` and condition (iii).
    """
    return 1 / (16 * N * s.w[..., -1] ** 2 * (s.w[..., :-1] ** -2).sum(-1))


# --- how much is needed ---------------------------------------------------------------------------------------------


def _bisect(feasible: Callable[[Tensor], Tensor], like: Tensor, low: float, high: float, tol: float = 1e-5) -> Tensor:
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
    holds = _theorem(theorem, epsilon)
    return _bisect(lambda beta: holds(s.scaled(beta)), s.alpha_0, 1e-6, 1e12, tol)


def _theorem(theorem: str, epsilon: float) -> Callable[[Spectra], Tensor]:
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

    return float(s.R_0 / _bisect(fits, s.R_0, 1e-6, 1e15, tol=1e-3))


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
    _check_choices(epsilon, mode, "telescope")
    if mode == "flow":
        return math.sqrt(256 / 27)
    a, b = 1 - epsilon, 2 - epsilon
    delta = (3 * b + 2 * a - math.sqrt((3 * b + 2 * a) ** 2 - 16 * a * b)) / (8 * b)
    return 1 / (math.sqrt(delta * (1 - delta)) * (a - b * delta))


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
    fixed_w = [_largest_singular_value(W) for W in lower]
    fixed_phi = [_largest_singular_value(f) for f in below]
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
    holds = _theorem(theorem, epsilon)
    if radius is not None:

        def holds(s: Spectra) -> Tensor:
            return paper_map(s, torch.full_like(s.w, radius)).feasible

    family = _proxy(X, Y, lower, scale, last)
    return float(_bisect(lambda n: holds(family(n)), X.new_ones(()), float(X.shape[0]), 1e40))


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
    s = float(_largest_singular_value(X))
    half = math.sqrt(N / 2)

    def tail(t: Tensor) -> Tensor:
        left = torch.exp(-(t**2) / (2 * s**2)) * ((half + t) ** 2 + 2 * s**2 + 2 * half * s**2 / t)
        return left <= smallest / 4

    t = float(_bisect(tail, torch.ones((), dtype=torch.float64), 1e-3, 1e6))
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


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    weights: Sequence[Tensor],
    step: float | Float[Tensor, " S"],
    steps: int,
    *,
    certificate: Certificate | None = None,
    **options: Any,
) -> descent.Run:
    """Full-batch gradient descent that watches every quantity that Theorem C bounds.

    Args:
        X: inputs, shape (N, d).
        Y: targets, shape (N, K).
        weights: initial weights, L tensors of shape (S, n_in, n_out) or (n_in, n_out).
        step: the step size eta for the loss ``0.5 * ||F_{L-1} W_L - Y||_F^2``, one number or one for each network.
        steps: how many steps.
        certificate: what `certify` said about these weights; computed here when omitted (float64 only).
        **options: of `descent.train`: every, update, progress, checkpoint, observe, ...

    Returns:
        A `descent.Run` whose ``observed`` also holds ``sigma_min`` (T, S), ``moves`` (T, S, L), the norms
        ``||W_l - W_l^0||_F``, and ``drift`` (T, S), ``||F_{L-1} - F_{L-1}^0||_F``.

    Warns:
        UserWarning: the certificate holds, but only for smaller steps.

    Raises:
        ValueError, TypeError: as `descent.train`.
    """
    data.check(X, Y, geometry=False)
    networks.check_weights(weights, X, Y)
    start = [W.clone() for W in networks.as_ensemble(weights)]
    if certificate is None and X.dtype == torch.float64 and len(start) > 1:
        certificate = certify(X, Y, start)
    largest = float(torch.as_tensor(step, dtype=torch.float64).max())
    if certificate is not None and certificate.holds and largest > certificate.quantities["max_step"]:
        bound = certificate.quantities["max_step"]
        warnings.warn(
            f"step is {largest:.3g}; Theorem C allows at most {bound:.3g}, so this run is not covered",
            stacklevel=2,
        )
    F_0 = networks.features(start, X)[-1]
    N, width = F_0.shape[-2:]

    def sigma_min(state: descent.State) -> Tensor:
        F = networks.features(state.weights, X)[-1]
        return torch.linalg.svdvals(F)[:, N - 1] if width >= N else F.new_zeros(len(F))

    def moves(state: descent.State) -> Tensor:
        return torch.stack([torch.linalg.matrix_norm(W - V) for W, V in zip(state.weights, start, strict=True)], -1)

    def drift(state: descent.State) -> Tensor:
        return torch.linalg.matrix_norm(networks.features(state.weights, X)[-1] - F_0)

    observe = {"sigma_min": sigma_min, "moves": moves, "drift": drift} | options.pop("observe", {})
    return descent.train(weights, X, Y, step, steps, observe=observe, **options)
