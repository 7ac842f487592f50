"""Theorem C and Theorem P on one network and one data set: certificates.

What a network gives, its `Spectra`, is measured, or bounded rigorously for the stored floats; the inequalities between
these numbers are checked in exact rationals at either level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, networks, rigor
from companion.arguments import checked
from companion.certificate import Assumption, Certificate, assumed, compare, gather, silent
from companion.rigor.formulas import lower, upper
from companion.width_bounds.fixed_points import (
    SHARES,
    Spectra,
    at_radii,
    ball_fixed_point,
    best_share,
    check_share,
    finite_features,
    inflated,
    largest_residual,
    necessary_condition,
    paper_fixed_point,
    smallest_beta,
    spectra,
    theorem_c,
    theorem_p,
)

_UNDECIDED = "undecided: the radii are too close to the edge of feasibility, or their squares leave float64"
_UNRESOLVED = "sigma_min_unresolved: no positive lower bound on the smallest singular value was found"
_DESCENT = "full-batch gradient descent in exact arithmetic, no biases"


# --- Theorem C --------------------------------------------------------------------------------------------------------


@checked(double=True)
def certify(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    weights: Sequence[Tensor],
    *,
    epsilon: float | Literal["auto"] | None = None,
    level: Literal["measured", "certified"] = "measured",
    step: float | None = None,
) -> Certificate:
    """Does Theorem C cover this network and data?  ``||R_k||_F <= (1 - eta rho)^k ||R_0||_F`` if it holds.

    Args:
        X: inputs, shape (N, d), float64.
        Y: targets, shape (N, K), float64.
        weights: initial weights, L >= 2 tensors of shape (S, n_in, n_out) or (n_in, n_out), float64.
        epsilon: the share of the rate given to the step, in (0, 1); ``"auto"`` for the value of a grid that proves the
            most progress in one step; None for 1/4 and, where that shows nothing, the grid.
        level: ``"measured"`` (ordinary floating point) or ``"certified"`` (every rounding error of the features,
            singular values and norms bounded). The final inequalities are checked in exact rationals either way.
        step: the step size eta that will be used; the largest admissible one when omitted.

    Returns:
        A `Certificate`.  ``quantities`` holds ``alpha``, ``rho``, ``max_step``, ``radii``, ``R_0``, ``alpha_0``,
        ``d``, ``B``, ``phi``, ``epsilon``, ``rounds``, rounded to the safe side.  A refusal lists what was found before
        anything moves, ``R_0``, ``alpha_0``, ``phi`` and ``B_0``, and what would do: ``largest_R_0`` and, for
        ``W_L = 0``, the factor ``beta`` of ``W_{L-1}``.  ``holds=False`` means "not shown", never "does not converge".
        An ensemble of S networks holds if each does; ``max_step`` and ``rho`` are then the smallest of all, the rest is
        that of the network with the smallest ``alpha_0``, and every network's own certificate is in ``members``.

    Raises:
        TypeError: an argument is not a tensor, or not float64.
        ValueError: NaN, infinity, wrong shape, an empty list of weights, unknown level, epsilon or step out of range,
            or numbers so large that features overflow.

    Source: Theorem C, derived in lesson 1.
    """
    stacked = check_network(X, Y, weights)
    if epsilon is not None and epsilon != "auto":
        check_share(epsilon)
    if step is not None and not step > 0:
        raise ValueError(f"step is {step}; a positive number is needed")
    rows, reason = _data_rows(X, stacked[-1].shape[1], len(stacked))
    if reason:
        return silent("Theorem C", rows, reason)
    ask = _Asked(epsilon, level, step)
    members = [_certify_one(X, Y, [W[s] for W in stacked], ask, rows) for s in range(len(stacked[0]))]
    front = gather(members, key=lambda member: member.quantities["alpha_0"])
    if not front.holds:
        return front
    rho = min(member.quantities["rho"] for member in members)
    return replace(front, quantities=front.quantities | {"rho": rho})


class _Asked(NamedTuple):
    epsilon: float | str | None
    level: str
    step: float | None


def check_network(X: Tensor, Y: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights as an ensemble, or one sentence that says why they are no network with a hidden layer."""
    networks.check_weights(weights, X, Y)
    if len(weights) < 2:
        raise ValueError(f"weights has {len(weights)} matrix; at least 2 are needed (one hidden layer)")
    return [W.detach() for W in networks.as_ensemble(weights)]


def _data_rows(X: Tensor, width: int, L: int) -> tuple[list[Assumption], str]:
    """The lines about the data and the width, and the reason that the first failure gives."""
    found, N = data.degeneracies(X), len(X)
    reason = ""
    if found.zero_rows:
        reason = f"zero_row: row {found.zero_rows[0]} of X is zero, and its features are zero at every width"
    elif found.parallel_pairs:
        i, j = found.parallel_pairs[0]
        reason = (
            f"parallel_rows: rows {i} and {j} of X are, to rounding, positively parallel, and so are their features "
            "at every width"
        )
    elif found.antipodal_dependent and L == 2:
        pairs = ", ".join(f"({i}, {j})" for i, j in found.antipodal_pairs)
        reason = f"dependent_antipodal_pairs: the antipodal pairs {pairs} of X are linearly dependent"
    rows = [Assumption("rows of X in general position", not reason, "is", True, "measured", not reason)]
    rows.append(compare("n ≥ N", width, ">=", N, "exact"))
    if not rows[-1].holds and not reason:
        reason = f"too_narrow: the last hidden layer has {width} neurons; at least N = {N} are needed"
    return rows, reason


def _resolved(rows: list[Assumption], alpha_0: float, level: str) -> list[Assumption]:
    """The lines about the data; a certified ``alpha_0 > 0`` proves what the floating-point look at X suggests."""
    if level == "measured" or alpha_0 == 0:
        return rows
    return [replace(a, status="certified") if a.status == "measured" else a for a in rows]


def _certify_one(X: Tensor, Y: Tensor, one: list[Tensor], ask: _Asked, rows: list[Assumption]) -> Certificate:
    """Theorem C for one network; one-sided bounds on its spectra are enough, as T is monotone in each of them."""
    s = _certified_spectra(X, Y, one) if ask.level == "certified" else _measured_spectra(X, Y, one)
    alpha_0 = float(s.alpha_0)
    rows = [*_resolved(rows, alpha_0, ask.level), compare("α₀ = σ_N(F_{L-1})", alpha_0, ">", 0.0, ask.level)]
    facts = {"alpha_0": alpha_0, "R_0": float(s.R_0), "phi": float(s.phi[-1])}
    if not rows[-1].holds:
        return Certificate("Theorem C", False, tuple(rows), facts, _UNRESOLVED + _dependent(X, Y, one))
    epsilon = _share(s, ask)
    proof = _prove(s, epsilon)
    if proof is None:
        return _refuse(s, ask, epsilon, rows, facts, zero_last=not bool(one[-1].any()))
    step, most = ask.step or proof["max_step"], proof["max_step"]
    rows += [
        compare("α = α₀ - d_{L-1}", proof["alpha"], ">", 0.0, ask.level),
        compare("B, against (1-ε) α²", proof["B"], "<", (1 - epsilon) * proof["alpha"] ** 2, ask.level),
        compare("T_l(C) ≤ C_l in every layer", True, "is", True, "exact" if ask.level == "certified" else "measured"),
        compare("η", step, "<=", most, ask.level),
        assumed(_DESCENT),
    ]
    reason = ""
    if not all(a.holds for a in rows):
        reason = _UNDECIDED if step <= most else f"step_too_large: the theorem asks for η ≤ {most!r}"
    return Certificate("Theorem C", not reason, tuple(rows), proof, reason)


def _measured_spectra(X: Tensor, Y: Tensor, one: list[Tensor]) -> Spectra:
    """The measured `Spectra` of one network, with what rounding may have made of them taken off.

    A product of ``F_{L-1}`` and ``W_L`` that cancels against Y leaves its rounding in ``R_0``; a singular value below
    the rounding of the features says nothing, and counts as 0.
    """
    s = spectra(X, Y, one).member(0)
    width = max(max(W.shape) for W in one)
    resolution = 8 * max(len(X), one[-1].shape[-2]) * rigor.UNIT * s.phi[-1]
    R_0 = s.R_0 + len(one) * width * rigor.UNIT * s.phi[-1] * s.w[-1]
    return replace(s, R_0=R_0, alpha_0=torch.where(s.alpha_0 > resolution, s.alpha_0, 0.0))


def _dependent(X: Tensor, Y: Tensor, one: list[Tensor]) -> str:
    """Where the features become dependent, if one layer shows it: dead or parallel samples stay so above it."""
    F, _ = finite_features(X, Y, [W[None] for W in one])
    for layer, f in enumerate(F[1:], 1):
        found = data.degeneracies(f[0])
        above = ", whatever the widths above" if layer < len(F) - 1 else ""
        if found.zero_rows:
            samples = ", ".join(map(str, found.zero_rows[:5]))
            return f"; no neuron of layer {layer} is active on sample {samples}{above}"
        if found.parallel_pairs:
            i, j = found.parallel_pairs[0]
            return f"; rows {i} and {j} of F_{layer} are, to rounding, positively parallel{above}"
    return ""


def _share(s: Spectra, ask: _Asked) -> float:
    """The epsilon to prove with; the smallest of the grid, where most networks have radii, when there are none."""
    if isinstance(ask.epsilon, str) or ask.epsilon is None:
        ball = ball_fixed_point(s, epsilon=0.25)
        enough = ask.step is None or ask.step <= 2 * 0.25 / float(ball.phi) / float(ball.phi)
        if ask.epsilon is None and bool(ball.feasible) and enough:
            return 0.25
        return best_share(s, ask.step) or SHARES[0]
    return float(ask.epsilon)


def _prove(s: Spectra, epsilon: float) -> dict[str, Any] | None:
    """Theorem C's quantities, rounded to the safe side, at radii where its inequalities hold in exact rationals.

    rho is a difference of nearly equal numbers at the edge, which the inflation of the fixed point need not cover:
    when the rational check fails, the iteration goes on for a few more rounds.
    """
    ball = ball_fixed_point(s, epsilon=epsilon)
    if not bool(ball.feasible):
        return None
    for _ in range(20):
        exact = _in_fractions(s, ball.C.tolist(), epsilon)
        if exact is not None:
            d, phi, alpha, B, rho = exact
            if lower(2 * Fraction(epsilon) / phi**2) == 0:
                return None  # a step that is no float is no promise
            return {
                "alpha": lower(alpha),
                "rho": lower(rho),
                "max_step": lower(2 * Fraction(epsilon) / phi**2),
                "radii": ball.C.tolist(),
                "R_0": float(s.R_0),
                "alpha_0": float(s.alpha_0),
                "d": upper(d),
                "B": upper(B),
                "phi": upper(phi),
                "epsilon": epsilon,
                "rounds": ball.rounds,
            }
        ball = at_radii(s, inflated(ball.T), epsilon, rounds=ball.rounds + 1)
        if not (float(ball.alpha) > 0 and float(ball.rho) > 0):
            break
    return None


def _in_fractions(s: Spectra, C: list[float], epsilon: float) -> tuple[Fraction, ...] | None:
    """``(d, phi, alpha, B, rho)`` of Theorem C in exact rationals, or None where an inequality fails."""
    w, phi_0, radii = ([Fraction(x) for x in part] for part in (s.w.tolist(), s.phi.tolist(), C))
    alpha_0, R_0 = (Fraction(float(x)) for x in (s.alpha_0, s.R_0))
    d, phi, alpha, B, rho, g = theorem_c(w, phi_0, alpha_0, radii, Fraction(epsilon))
    if alpha <= 0 or rho <= 0 or any(x * R_0 > c * rho for x, c in zip(g, radii, strict=True)):
        return None
    return d, phi, alpha, B, rho


def _refuse(
    s: Spectra, ask: _Asked, epsilon: float, rows: list[Assumption], facts: dict[str, Any], zero_last: bool
) -> Certificate:
    """No radii: the facts, and the cheapest change that would help."""
    w, phi = ([Fraction(x) for x in part] for part in (s.w.tolist(), s.phi.tolist()))
    B_0, rho_0 = theorem_c(w, phi, Fraction(float(s.alpha_0)), [Fraction(0)] * len(w), Fraction(epsilon))[3:5]
    free = Assumption("B before any move, against (1-ε) α₀²", upper(B_0), "<", lower(B_0 + rho_0), ask.level, rho_0 > 0)
    exists = Assumption("T_l(C) ≤ C_l in every layer, for some C", False, "is", True, ask.level, False)
    facts = facts | {"B_0": upper(B_0), "epsilon": epsilon}
    ball = ball_fixed_point(s, epsilon=epsilon)
    better = None if ask.epsilon in (None, "auto") else best_share(s, ask.step)
    if better is not None:
        reason = f"epsilon_too_large: no radii at ε = {epsilon:.3g}, but at ε = {better:.3g} (epsilon='auto')"
    elif not free.holds:
        needed = f"W_L = 0, or less than {math.sqrt((B_0 + rho_0) / B_0):.2g} W_L, is needed"
        reason = f"interference: B exceeds (1-ε) α₀² without any movement; {needed}"
    elif not (bool(ball.rho <= 0) or bool(ball.alpha <= 0)) or not 1e-145 < facts["alpha_0"] < 1e145:
        reason = _UNDECIDED
    else:
        largest = largest_residual(s, epsilon=epsilon)
        beta = float(smallest_beta(s, epsilon=epsilon, tol=1e-3)) if zero_last else math.inf
        facts |= ({"largest_R_0": largest} if largest > 0 else {}) | ({"beta": beta} if math.isfinite(beta) else {})
        changes = [f"{largest:.3g}"] * (largest > 0) + [f"W_{{L-1}} scaled by {beta:.3g}"] * math.isfinite(beta)
        reason = f"residual_too_large: R₀ is {facts['R_0']:.3g}"
        reason += f"; {', or '.join(changes)} would do" if changes else ""
    return Certificate("Theorem C", False, (*rows, free, exists), facts, reason)


# --- Theorem C, rigorously --------------------------------------------------------------------------------------------


def _certified_spectra(X: Tensor, Y: Tensor, weights: list[Tensor]) -> Spectra:
    """One-sided bounds on the spectra of the exact-arithmetic network with these stored floats as its weights.

    ``e_l >= ||fl(F_l) - F_l||_F`` obeys ``e_l = e_{l-1} ||W_l||_2 + ||fl(F_{l-1} W_l) - F_{l-1} W_l||_F``, since ReLU
    is 1-Lipschitz and exact in floats (lesson 1, appendix).
    """
    up = rigor.round_up
    X, Y, weights = X.cpu(), Y.cpu(), [W.cpu() for W in weights]
    stacks, R = finite_features(X, Y, [W[None] for W in weights])
    F = [f[0] for f in stacks]
    w = [rigor.spectral_norm_upper(W) for W in weights]
    phi, error = [rigor.spectral_norm_upper(X)], 0.0
    for below, f, W, norm in zip(F, F[1:], weights, w, strict=False):
        error = up(up(error * norm) + rigor.product_error(below, W))
        phi.append(up(rigor.spectral_norm_upper(f) + error))
    alpha_0 = max(0.0, rigor.round_down(rigor.sigma_min_lower(F[-1]) - error))
    out = up(up(error * w[-1]) + rigor.product_error(F[-1], weights[-1]))
    # the subtraction itself: |fl(a - b) - (a - b)| <= u |fl(a - b)|
    R_0 = up(up(rigor.frobenius_norm_upper(R[0]) * (1 + 4 * rigor.UNIT)) + out)
    numbers = (w, phi, alpha_0, R_0, rigor.frobenius_norm_upper(X))
    return Spectra(*(torch.tensor(x, dtype=torch.float64, device="cpu") for x in numbers))


# --- Theorem P --------------------------------------------------------------------------------------------------------


@checked(double=True)
def certify_paper(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    weights: Sequence[Tensor],
    radii: Sequence[float] | None = None,
    *,
    level: Literal["measured", "certified"] = "measured",
) -> Certificate:
    """Theorem P on one network: ``Phi_k <= (1 - eta alpha_0^2 / 8)^k Phi_0`` if it holds.

    Args:
        X: inputs, shape (N, d), float64.
        Y: targets, shape (N, K), float64.
        weights: initial weights, L >= 2 tensors of shape (S, n_in, n_out) or (n_in, n_out), float64.
        radii: the constants C_l > 0, one for each layer; the optimal ones when omitted.
        level: as in `certify`. Bounds from one side are enough: with them P implies Theorem C for every smaller norm,
            at a step that Theorem C allows (lesson 1, dominance).

    Returns:
        A `Certificate` with the ratios of the left to the right sides of (i)-(iii) as its lines; ``quantities`` holds
        ``alpha_0``, ``R_0``, ``max_step``, ``rate`` (of the loss, for one step), ``radii`` and, where it is measured
        and unless ``W_L = 0``, ``necessary``, the ratio of `necessary_condition`, which must be at least 1 for any
        radii to exist.

    Raises:
        TypeError: an argument is not a tensor, or not float64.
        ValueError: as for `certify`; radii not positive or not one for each layer.

    Source: Nguyen (2021), Theorem 2.2, as restated by Cong, Ramezani and Mahdavi (2021), appendix D.
    """
    stacked = check_network(X, Y, weights)
    if radii is not None and (len(radii) != len(stacked) or not all(c > 0 for c in radii)):
        raise ValueError(f"radii is {list(radii)}; {len(stacked)} positive numbers are needed, one for each layer")
    rows, reason = _data_rows(X, stacked[-1].shape[1], len(stacked))
    if reason:
        return silent("Theorem P", rows, reason)
    read = _certified_spectra if level == "certified" else _measured_spectra
    members = []
    for i in range(len(stacked[0])):
        s = read(X, Y, [W[i] for W in stacked])
        C = paper_fixed_point(s).C.tolist() if radii is None else [float(c) for c in radii]
        members.append(_paper_one(s, C, level, rows, len(X)))
    return gather(members, key=lambda member: member.quantities["alpha_0"])


def _paper_one(s: Spectra, C: list[float], level: str, rows: list[Assumption], N: int) -> Certificate:
    alpha_0, necessary = float(s.alpha_0), float(necessary_condition(s, N))
    rows = [*_resolved(rows, alpha_0, level), compare("α₀ = σ_N(F_{L-1})", alpha_0, ">", 0.0, level)]
    quantities = {"alpha_0": alpha_0, "R_0": float(s.R_0)}
    if level == "measured" and math.isfinite(necessary):
        quantities["necessary"] = necessary
    if not rows[-1].holds:
        return Certificate("Theorem P", False, tuple(rows), quantities, _UNRESOLVED)
    if not all(C):  # optimal radii that do not exist come back as zeros
        rows += [Assumption("(i) is satisfied by some radii", False, "is", True, level, False), assumed(_DESCENT)]
        return Certificate("Theorem P", False, tuple(rows), quantities, "no_radii: no C satisfies condition (i)")
    w, radii = ([Fraction(x) for x in part] for part in (s.w.tolist(), C))
    sides, step = theorem_p(w, *(Fraction(float(x)) for x in (s.X_F, s.alpha_0, s.R_0)), radii)
    for name, side in zip(
        ("(i) α₀² / right side", "(ii) α₀³ / right side", "(iii) α₀² / right side"), sides, strict=True
    ):
        rows.append(compare(name, lower(1 / side) if side else math.inf, ">=", 1.0, level))
    if lower(step) == 0:
        rows.append(Assumption("η is a float", 0.0, ">", 0.0, level, False))
    broken = [a.name.split(" ")[0] for a in rows if not a.holds]
    if not broken:
        rate = step * Fraction(alpha_0) ** 2 / 8
        quantities |= {"max_step": lower(step), "rate": lower(rate), "radii": C}
    rows.append(assumed(_DESCENT))
    reason = f"condition {', '.join(broken)} fails" if broken else ""
    return Certificate("Theorem P", not broken, tuple(rows), quantities, reason)
