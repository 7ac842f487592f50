"""Theorem C and Theorem P on one network and one data set: certificates, their curve, and runs that watch them.

Theorem C's certificate is also made rigorous: one-sided bounds on the spectra of the stored floats, and the final
inequalities in exact rationals.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, descent, networks, rigor
from companion.certificate import Assumption, Certificate, assumed, compare
from companion.width_bounds.fixed_points import (
    AtRadii,
    PaperAtRadii,
    Spectra,
    ball_fixed_point,
    ball_map,
    best_epsilon,
    check_choices,
    inflated,
    largest_residual,
    necessary_condition,
    paper_fixed_point,
    paper_map,
    smallest_beta,
    spectra,
)

# --- Theorem C --------------------------------------------------------------------------------------------------------


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
        check_choices(epsilon, "gd", "telescope")
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


def _quantities(s: Spectra, ball: AtRadii, epsilon: float, max_step: float) -> dict[str, Any]:
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
    s: Spectra, ball: AtRadii, epsilon: float, rows: tuple[Assumption, ...], quantities: dict[str, Any], zero_last: bool
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


# --- Theorem C, rigorously --------------------------------------------------------------------------------------------


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
    R_0 = up(up(rigor.frobenius_norm_upper(R) * (1 + 4 * rigor.UNIT)) + out)
    X_F = rigor.frobenius_norm_upper(X)
    number = torch.tensor([alpha_0, R_0, X_F], dtype=torch.float64)
    return Spectra(torch.tensor(w, dtype=torch.float64), torch.tensor(phi, dtype=torch.float64), *number)


class _Proof(NamedTuple):
    ball: AtRadii
    holds: bool
    max_step: float


def _exact_ball(s: Spectra, ball: AtRadii, epsilon: float) -> _Proof | None:
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
        ball = ball_map(s, inflated(ball.T), epsilon)._replace(rounds=ball.rounds + 1)
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


# --- Theorem P --------------------------------------------------------------------------------------------------------


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


def _paper_one(s: Spectra, ball: PaperAtRadii, necessary: float, i: int, rows: list[Assumption]) -> Certificate:
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


# --- Training ---------------------------------------------------------------------------------------------------------


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
