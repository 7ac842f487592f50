"""Proofs that a network of one hidden layer sits at a bad strict minimum: fractions, balls, Kantorovich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.basins import exact
from companion.basins.exact import ExactPoint
from companion.basins.shallow import check_shallow, loss_derivatives, train_lm_newton
from companion.certificate import Assumption, Certificate, compare
from companion.networks import Activation
from companion.rigor import arbs

# |sigma|, |sigma'|, |sigma''|, |sigma'''|; exp depends on the range
BOUNDS = {
    "sin": (1.0, 1.0, 1.0, 1.0),
    "cos": (1.0, 1.0, 1.0, 1.0),
    "tanh": (1.0, 1.0, 0.7699, 2.0),
    "sigmoid": (1.0, 0.25, 0.09623, 0.125),
    "gauss": (1.0, 0.6066, 1.0, 1.3802),
}


class Kantorovich(NamedTuple):
    """``gamma = ||grad L||``, ``smallest`` and ``largest`` eigenvalue, ``M >= ||L'''||`` on the ball of ``radius``.

    ``holds`` (S,): ``M gamma <= smallest^2 / 4`` and ``2 gamma / smallest < radius``, in floating point.
    """

    gamma: Tensor
    smallest: Tensor
    largest: Tensor
    M: Tensor
    radius: Tensor
    holds: Tensor


def kantorovich(weights: Sequence[Tensor], X: Tensor, Y: Tensor, act: str | Activation) -> Kantorovich:
    """If ``M gamma <= lambda^2 / 4`` and ``2 gamma / lambda < r``, a strict minimum lies within ``2 gamma / lambda``.

    ``M = sum_n 3 G_1 G_2 + (|e_n| + r G_1) G_3`` bounds the third derivative on the ball of radius r, with
    ``G_1^2 = m b_0^2 + b_1^2 (||v|| + r)^2 ||x||^2``, ``G_2 = b_1 ||x|| + b_2 V ||x||^2``,
    ``G_3 = 3 b_2 ||x||^2 + b_3 V ||x||^3``, ``V = max |v_j| + r`` and ``|sigma^(k)| <= b_k``.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, 1) or without S.
        X: inputs, shape (N, D) or (S, N, D).
        Y: targets, shape (N, 1) or (S, N, 1).
        act: sin, cos, tanh, sigmoid, gauss or exp.

    Returns:
        The `Kantorovich` numbers, each (S,).

    Raises:
        TypeError: not float64.
        ValueError: an activation whose derivatives have no known bounds.  Source: derived in lesson 5.
    """
    (W, V), sigma = check_shallow(weights, X, Y, act)
    if sigma.name not in BOUNDS and sigma.name != "exp":
        raise ValueError(f"act is {sigma.name!r}; one of {', '.join(BOUNDS)} or exp is needed for bounds")
    d = loss_derivatives(weights, X, Y, act)
    values = torch.linalg.eigvalsh(d.hessian)
    gamma, smallest = torch.linalg.vector_norm(d.gradient, dim=1), values[:, 0]
    radius = (3 * gamma / smallest.clamp_min(1e-300)).clamp(1e-14, 1e6)
    r, m = radius[:, None], W.shape[2]
    x = torch.linalg.vector_norm(X, dim=-1).expand(len(W), -1)  # (S, N)
    if sigma.name == "exp":
        top = torch.exp(((X @ W).amax(-1) + r * x).amax(1, keepdim=True))
        b = (top,) * 4
    else:
        b = BOUNDS[sigma.name]
    size, biggest = torch.linalg.vector_norm(V[..., 0], dim=1)[:, None] + r, V[..., 0].abs().amax(1)[:, None] + r
    G_1 = (m * b[0] ** 2 + (b[1] * size * x) ** 2) ** 0.5
    G_2 = b[1] * x + b[2] * biggest * x**2
    G_3 = 3 * b[2] * x**2 + b[3] * biggest * x**3
    M = (3 * G_1 * G_2 + (d.e.abs() + r * G_1) * G_3).sum(1)
    holds = (smallest > 0) & (M * gamma <= smallest**2 / 4) & (2 * gamma < smallest * radius)
    return Kantorovich(gamma, smallest, values[:, -1], M, radius, holds)


def certify_strict_minimum(
    weights: Sequence[Tensor] | ExactPoint,
    X: Any,
    Y: Any,
    act: str,
    method: str = "interval",
    *,
    competitor: Sequence[Tensor] | ExactPoint | None = None,
) -> Certificate:
    """A bad strict minimum: zero gradient, ``Hess L > 0``, and lower weights elsewhere.

    - ``"exact"``: the point is an `ExactPoint` and every sign is read off fractions;
    - ``"interval"``: a box around the floats holds exactly one critical point (Krawczyk), with positive pivots of the
      Hessian on the whole box, in balls;
    - ``"kantorovich"``: the same conclusion from `kantorovich`, batched, in plain floating point.

    Args:
        weights: ``[W, V]`` (with a leading S for ``"kantorovich"``), or an `ExactPoint`.
        X: inputs (N, D); integers for ``"exact"``.
        Y: targets (N, 1); fractions for ``"exact"``.
        act: the activation's name.
        method: see above.
        competitor: lower weights of the same or another width; searched for by training when None.

    Returns:
        The certificate; for several networks, with one for each as `members`.

    Raises:
        TypeError: not float64, or a point that is not exact for ``"exact"``.
        ValueError: an unknown method, relu or step (they have no Hessian), NaN, data that do not fit.
        ModuleNotFoundError: ``"interval"`` without python-flint.
    """
    if method not in ("exact", "interval", "kantorovich"):
        raise ValueError(f"method is {method!r}; one of exact, interval, kantorovich is needed")
    if method == "exact":
        return _exact_certificate(weights, X, Y, act, competitor)
    if isinstance(weights, ExactPoint):
        raise TypeError(f"weights is an ExactPoint; [W, V] is needed for method {method!r}")
    stacked, _ = check_shallow(weights, X, Y, act)
    if competitor is None:
        competitor = _search_competitor(stacked, X, Y, act)
    check_shallow(competitor, X, Y, act)
    if method == "interval":
        return _interval_certificate(stacked, X, Y, act, competitor)
    lower = loss_derivatives(competitor, X, Y, act).loss
    here, k = loss_derivatives(stacked, X, Y, act).loss, kantorovich(stacked, X, Y, act)
    members = []
    for s in range(len(stacked[0])):
        room = float(k.gamma[s] * 2 * k.gamma[s] / k.smallest[s].clamp_min(1e-300))  # L at the minimum may be lower
        rows = (
            compare("4 M ||grad L|| / lambda_min^2", float(4 * k.M[s] * k.gamma[s] / k.smallest[s] ** 2), "<=", 1.0),
            compare("lambda_min of the Hessian", float(k.smallest[s]), ">", 0.0),
            compare("distance 2 ||grad L|| / lambda_min, in the ball", float(2 * k.gamma[s] / k.smallest[s]), "<",
                    float(k.radius[s])),
            compare("loss of the competitor", float(lower.min()), "<", float(here[s]) - room),
        )  # fmt: skip
        members.append(_minimum("bad strict minimum (Kantorovich)", rows, {"L": float(here[s])}))
    if len(members) == 1:
        return members[0]
    failed = [s for s, c in enumerate(members) if not c.holds]
    row = compare("networks at a bad strict minimum", len(members) - len(failed), "=", len(members))
    reason = f"network {failed[0]}: {members[failed[0]].reason}" if failed else ""
    return Certificate("bad strict minimum (Kantorovich)", not failed, (row,), {}, reason, tuple(members))


def _minimum(theorem: str, rows: tuple[Assumption, ...], found: dict[str, Any]) -> Certificate:
    failed = next((r.name for r in rows if not r.holds), "")
    return Certificate(theorem, not failed, rows, found, failed and f"not shown: {failed}")


def _exact_certificate(point: Any, X: Any, Y: Any, act: str, competitor: Any) -> Certificate:
    if not isinstance(point, ExactPoint):
        raise TypeError(f"weights is {type(point).__name__}; an ExactPoint is needed for method 'exact'")
    if point.act != act:
        raise ValueError(f"act is {act!r} but the point's activation is {point.act!r}; they must be equal")
    X = exact.integers(X)
    if len(Y) != len(X):
        raise ValueError(f"Y has {len(Y)} rows, X has {len(X)}; one target for each input is needed")
    y = [Fraction(t[0] if isinstance(t, list | tuple) else t) for t in Y]
    if competitor is None:
        competitor, _ = exact.best_exact_neuron(act, point.base, X, y)
    d, other = point.derivatives(X, y), competitor.derivatives(X, y).loss
    pivots = exact.ldl_pivots(d.hessian)
    positive = sum(t > 0 for t in pivots)
    rows = (
        compare("entries of the gradient that are not 0", sum(t != 0 for t in d.gradient), "=", 0, "exact"),
        compare("positive pivots of the Hessian", positive, "=", len(d.hessian), "exact"),
        compare("loss of the competitor", float(other), "<", float(d.loss), "exact"),
    )
    if other < d.loss and not rows[2].holds:  # equal after rounding, different as fractions
        rows = (*rows[:2], Assumption("competitor is lower", True, "is", True, "exact", True))
    return _minimum("bad strict minimum (fractions)", rows, {"L": d.loss, "L of the competitor": float(other)})


def _interval_certificate(
    weights: Sequence[Tensor], X: Tensor, Y: Tensor, act: str, competitor: Sequence[Tensor]
) -> Certificate:
    if act not in arbs.BALL_ACTIVATIONS:
        raise ValueError(f"act is {act!r}; one of {', '.join(arbs.BALL_ACTIVATIONS)} is needed for balls")
    if len(weights[0]) != 1 or X.ndim != 2 or Y.ndim != 2:
        raise ValueError(f"weights holds {len(weights[0])} networks; the interval certificate takes one")
    (W,), (V,) = weights
    box = exact.krawczyk(W, V[:, 0], X, Y[:, 0], act)
    W_c, V_c = (t.reshape(t.shape[-2:]) for t in competitor)
    other = exact.ball_derivatives(W_c.T.tolist(), V_c[:, 0].tolist(), X, Y[:, 0], act).loss
    rows = (
        Assumption("Krawczyk: one critical point in the box", box.radius is not None, "is", True, "certified",
                   box.radius is not None),
        compare("smallest pivot of the Hessian on the box", box.smallest_pivot, ">", 0.0, "certified"),
        compare("loss of the competitor", math.nextafter(float(other.upper()), math.inf), "<", box.loss_low,
                "certified"),
    )  # fmt: skip
    found = {"radius of the box": box.radius, "L from": box.loss_low, "L to": box.loss_high}
    return _minimum("bad strict minimum (balls)", rows, found)


def _search_competitor(weights: Sequence[Tensor], X: Tensor, Y: Tensor, act: str) -> list[Tensor]:
    """The lowest of 64 networks of the same shape, trained from seeded starts."""
    if X.ndim != 2 or Y.ndim != 2:
        raise ValueError("competitor is missing; it is needed when every network has its own data")
    _, D, m = weights[0].shape
    generator = torch.Generator().manual_seed(0)
    size = 3 / float(X.abs().max())
    W = size * torch.randn(64, D, m, generator=generator, dtype=torch.float64)
    V = torch.randn(64, m, 1, generator=generator, dtype=torch.float64)
    trained = train_lm_newton([W, V], X, Y, act, iters=100)
    best = int(torch.nan_to_num(trained.loss, nan=math.inf).argmin())
    return [T[best] for T in trained.weights]
