"""What Theorem C promises of a run, and runs that watch it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion import descent, networks, rigor
from companion.arguments import checked
from companion.certificate import Certificate
from companion.rigor.formulas import upper
from companion.rigor.rounding import up
from companion.width_bounds.certificates import certify, check_network
from companion.width_bounds.fixed_points import finite_features, singular_ends


@checked
def envelope(certificate: Certificate, step: float | Float[Tensor, " S"], k: Tensor) -> Tensor:
    """Theorem C's curve ``(1 - eta rho')^k R_0``, an upper bound on the residual norm after k steps, rounded up.

    A step below the largest one leaves more of the rate: ``rho' = (1 - eta phi^2 / 2) alpha^2 - B`` (lesson 1, fact 2).

    Args:
        certificate: a certificate that holds, from `certify`.
        step: the step size eta, one for all networks or one for each.
        k: whole numbers of steps, any shape.

    Returns:
        The bounds on ``||R_k||_F``: the shape of k, for an ensemble with a last axis S.

    Raises:
        ValueError: the certificate does not hold, k is below 0, or step is not in (0, max_step] of every network.

    Source: Theorem C, derived in lesson 1.
    """
    if not certificate.holds or "rho" not in certificate.quantities:
        found = certificate.reason or f"it is one of {certificate.theorem}"
        raise ValueError(f"certificate does not hold ({found}); an envelope needs one of Theorem C that does")
    if k.is_complex() or bool((k < 0).any()) or (k.is_floating_point() and bool((k != k.round()).any())):
        raise ValueError("k holds a number that is not a count of steps; whole numbers >= 0 are needed")
    members = certificate.members or (certificate,)
    curves = [_curve(m.quantities, eta, k) for m, eta in zip(members, _steps(step, len(members)), strict=True)]
    return torch.stack(curves, -1) if certificate.members else curves[0]


def _curve(q: dict[str, Any], step: float, k: Tensor) -> Tensor:
    """One network's envelope: every power by repeated squaring, each product rounded up."""
    if not 0 < step <= q["max_step"]:
        raise ValueError(f"step is {step}; a number in (0, {q['max_step']!r}] is needed")
    eta, phi, alpha, B = (Fraction(x) for x in (step, q["phi"], q["alpha"], q["B"]))
    rho = (1 - eta * phi**2 / 2) * alpha**2 - B
    left = k.to(torch.int64)
    square = torch.tensor(upper(1 - eta * rho), dtype=torch.float64, device=k.device)
    power = torch.full_like(left, q["R_0"], dtype=torch.float64)
    while bool((left > 0).any()):
        power = torch.where(left % 2 == 1, up(power * square), power)
        square, left = up(square * square), left // 2
    return power


def _steps(step: float | Tensor, S: int) -> list[float]:
    """A step for each of S networks, as Python numbers."""
    if not isinstance(step, Tensor) or step.ndim == 0:
        return [float(step)] * S
    if len(step) != S:
        raise ValueError(f"step has shape {tuple(step.shape)}; one number, or one for each of {S} networks, is needed")
    return step.tolist()


@checked
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
        weights: initial weights, L >= 2 tensors of shape (S, n_in, n_out) or (n_in, n_out).
        step: the step size eta for the loss ``0.5 * ||F_{L-1} W_L - Y||_F^2``, one number or one for each network.
        steps: how many steps.
        certificate: what `certify` said about these weights; computed here when omitted (float64 only).
        **options: of `descent.train`: every, update, progress, checkpoint, observe, ...

    Returns:
        A `descent.Run` whose ``observed`` also holds ``sigma_min`` (T, S), ``moves`` (T, S, L), the norms
        ``||W_l - W_l^0||_F``, and ``drift`` (T, S), ``||F_{L-1} - F_{L-1}^0||_F``.

    Warns:
        UserWarning: a network is covered, but only for smaller steps.

    Raises:
        ValueError, TypeError: as `descent.train`; a certificate of other weights or data.

    Source: Theorem C, derived in lesson 1.
    """
    start = [W.clone() for W in check_network(X, Y, weights)]
    F, R = finite_features(X, Y, start)
    F_0 = F[-1]
    if certificate is None and X.dtype == torch.float64:
        largest = max(_steps(step, len(start[0])))
        certificate = certify(X, Y, start, step=largest if largest > 0 else None)
    if certificate is not None:
        _check_covered(certificate, step, rigor.norm(R.flatten(-2)), singular_ends(F_0)[0])

    def sigma_min(state: descent.State) -> Tensor:
        return singular_ends(networks.features(state.weights, X)[-1])[0]

    def moves(state: descent.State) -> Tensor:
        return torch.stack([rigor.norm((W - V).flatten(-2)) for W, V in zip(state.weights, start, strict=True)], -1)

    def drift(state: descent.State) -> Tensor:
        return rigor.norm((networks.features(state.weights, X)[-1] - F_0).flatten(-2))

    observe = {"sigma_min": sigma_min, "moves": moves, "drift": drift} | (options.pop("observe", None) or {})
    return descent.train(weights, X, Y, step, steps, observe=observe, **options)


def _check_covered(certificate: Certificate, step: float | Tensor, R_0: Tensor, alpha_0: Tensor) -> None:
    """Refuse a certificate of another network; warn of steps that a network's own certificate does not allow."""
    members = certificate.members or (certificate,)
    if not any("rho" in member.quantities for member in members):
        return  # nothing is promised
    if len(members) != len(R_0):
        raise ValueError(f"certificate is of {len(members)} networks, weights hold {len(R_0)}; the same are needed")
    steps = _steps(step, len(members))
    beyond = []
    for member, eta, residual, smallest in zip(members, steps, R_0.tolist(), alpha_0.tolist(), strict=True):
        q = member.quantities
        if "rho" not in q:
            continue
        if residual > q["R_0"] * (1 + 1e-6) or smallest < q["alpha_0"] * (1 - 1e-6):
            found = f"R₀ ≤ {q['R_0']:.3g} and α₀ ≥ {q['alpha_0']:.3g}, here they are {residual:.3g} and {smallest:.3g}"
            raise ValueError(f"certificate says {found}; one of these weights and data is needed")
        if eta > q["max_step"]:
            beyond.append((eta, q["max_step"]))
    if beyond:
        warnings.warn(
            f"step is {beyond[0][0]:.3g}; Theorem C allows at most {beyond[0][1]:.3g}, so this run is not covered",
            stacklevel=4,
        )
