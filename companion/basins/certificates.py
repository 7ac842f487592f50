"""What is proved about basins: none at this width, a bad strict minimum here, roads from almost everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion import networks, rigor
from companion.basins import exact
from companion.basins.critical_points import ball_derivatives, kantorovich, krawczyk
from companion.basins.exact import ExactPoint
from companion.basins.shallow import check_shallow, loss_derivatives, train_lm_newton
from companion.certificate import Assumption, Certificate, assumed, compare
from companion.networks import Activation, activation
from companion.rigor import arbs

# --- above the width: no basin ----------------------------------------------------------------------------------------

_HOMOGENEOUS = ("relu", "identity")
_QUASI_CONVEX = ("square", "logistic", "convex", "quasi-convex")


def certify_no_basin(
    N: int, m: int, act: str | Activation, loss: str = "square", X: Float[Tensor, "N D"] | None = None
) -> Certificate:
    """Theorem P': no bad basin if ``m >= N`` (quasi-convex loss), no basin at all if ``m >= N + 1``; corollaries.

    Without a width: a positively homogeneous activation (ReLU) has a ray of constant loss through every point, and so
    have inputs with ``rank X < D`` in a net of one hidden layer.  With X of one hidden layer, N may be replaced by the
    number of distinct inputs.

    Args:
        N: number of samples.
        m: width of the last hidden layer, an output bias counted as one more.
        act: name or `Activation`; a step is refused, because the loss must be continuous.
        loss: ``"square"``, ``"logistic"``, ``"convex"``, ``"quasi-convex"`` or ``"continuous"``.
        X: inputs of a net with one hidden layer, bias column included, shape (N, D); None for any depth.

    Returns:
        The certificate.  It promises nothing about training, and ``holds=False`` does not say that a basin exists.

    Raises:
        TypeError: X is not a float64 tensor.
        ValueError: N or m below 1, an unknown loss, or X with another number of rows.
            Source: Theorem P', derived in lesson 5 after Li, Ding and Sun.
    """
    sigma = activation(act)
    if N < 1 or m < 1:
        raise ValueError(f"N is {N}, m is {m}; at least one sample and one neuron are needed")
    if loss not in (*_QUASI_CONVEX, "continuous"):
        raise ValueError(f"loss is {loss!r}; one of {', '.join(_QUASI_CONVEX)} or continuous is needed")
    if X is not None and (not isinstance(X, Tensor) or X.dtype != torch.float64):
        raise TypeError(f"X is {X.dtype if isinstance(X, Tensor) else type(X).__name__}; a float64 tensor is needed")
    if X is not None and (X.ndim != 2 or len(X) != N or not bool(torch.isfinite(X).all())):
        raise ValueError(f"X has shape {tuple(X.shape)}; finite inputs of shape ({N}, D), one row a sample, are needed")
    needed = N if X is None else len(torch.unique(X, dim=0))
    samples = "N" if needed == N else "number of distinct inputs"
    smooth = (
        assumed(f"{sigma.name} is continuous"),
        assumed(f"the {loss} loss is a continuous function of the outputs"),
    )
    found = {"N": N, "m": m} | ({"distinct inputs": needed} if X is not None else {})
    if sigma.name == "step":
        row = Assumption("sigma is continuous", "jump at 0", "is", "continuous", "exact", False)
        return Certificate("Theorem P': no bad basin", False, (row,), found, "activation: a step is not continuous")
    if m > needed:
        rows = (*smooth, compare(f"width m >= {samples} + 1", m, ">=", needed + 1, "exact"))
        return Certificate("Theorem P': no basin at all, good or bad", True, rows, found)
    if sigma.name in _HOMOGENEOUS:
        row = Assumption(f"{sigma.name} is positively homogeneous", True, "is", True, "exact", True)
        return Certificate("Corollary of P': no basin at any width", True, (*smooth, row), found)
    if X is not None and (rank := rigor.exact_rank(X)) < X.shape[1]:
        rows = (*smooth, compare("rank X < D", rank, "<", X.shape[1], "exact"))
        return Certificate("Corollary of P': no basin at any width", True, rows, found | {"rank X": rank})
    width = compare(f"width m >= {samples}", m, ">=", needed, "exact")
    convex = Assumption("the loss is quasi-convex", loss, "is", "quasi-convex", "assumed", loss in _QUASI_CONVEX)
    holds = width.holds and convex.holds
    reason = "" if holds else (f"width: m < {samples}" if not width.holds else "loss: quasi-convexity was not given")
    return Certificate("Theorem P': no bad basin", holds, (*smooth, convex, width), found, reason)


# --- a bad strict minimum ---------------------------------------------------------------------------------------------


def certify_strict_minimum(
    weights: Sequence[Tensor] | ExactPoint,
    X: Any,
    Y: Any,
    act: str,
    level: str = "certified",
    *,
    competitor: Sequence[Tensor] | ExactPoint | None = None,
) -> Certificate:
    """A bad strict minimum: zero gradient, ``Hess L > 0``, and lower weights elsewhere.

    - ``"exact"``: the point is an `ExactPoint` and every sign is read off fractions;
    - ``"certified"``: a box around the floats holds exactly one critical point (Krawczyk), with positive pivots of the
      Hessian on the whole box, in balls;
    - ``"measured"``: the same conclusion from `kantorovich`, batched, in plain floating point.

    Args:
        weights: ``[W, V]`` (with a leading S for ``"measured"``), or an `ExactPoint`.
        X: inputs (N, D); integers for ``"exact"``.
        Y: targets (N, 1); fractions for ``"exact"``.
        act: the activation's name.
        level: see above.
        competitor: lower weights of the same or another width; searched for by training when None.

    Returns:
        The certificate; for several networks, with one for each as `members`.

    Raises:
        TypeError: not float64, or a point that is not exact for ``"exact"``.
        ValueError: an unknown level, relu or step (they have no Hessian), NaN, data that do not fit.
        ModuleNotFoundError: ``"certified"`` without python-flint.
    """
    if level not in ("exact", "certified", "measured"):
        raise ValueError(f"level is {level!r}; one of exact, certified, measured is needed")
    if level == "exact":
        return _exact_certificate(weights, X, Y, act, competitor)
    if isinstance(weights, ExactPoint):
        raise TypeError(f"weights is an ExactPoint; [W, V] is needed for level {level!r}")
    stacked, _ = check_shallow(weights, X, Y, act)
    if competitor is None:
        competitor = _search_competitor(stacked, X, Y, act)
    check_shallow(competitor, X, Y, act)
    if level == "certified":
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
        raise TypeError(f"weights is {type(point).__name__}; an ExactPoint is needed for level 'exact'")
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
    box = krawczyk(W, V[:, 0], X, Y[:, 0], act)
    W_c, V_c = (t.reshape(t.shape[-2:]) for t in competitor)
    other = ball_derivatives(W_c.T.tolist(), V_c[:, 0].tolist(), X, Y[:, 0], act).loss
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


# --- roads from almost everywhere -------------------------------------------------------------------------------------


def certify_full_rank(weights: Sequence[Tensor], X: Float[Tensor, "N d"], act: str) -> Certificate:
    """Criterion (R): for an analytic activation, features of rank N at one point have rank N at almost every point.

    The last features H of a network of any depth are enclosed in balls, and ``sigma_min(mid H) - ||rad H||_F > 0`` is
    shown with every rounding error bounded.  Then some N x N minor is an analytic function that is not identically
    zero, so every start has, after an arbitrarily small step, a road down to any level above the infimum.

    Args:
        weights: L matrices of one network of any depth.
        X: inputs, shape (N, d).
        act: an analytic activation: sin, cos, exp, tanh, sigmoid, softplus or gauss.

    Returns:
        The certificate; it does not hold when the width is below N or when rank N was not shown.

    Raises:
        TypeError: X is not float64.
        ValueError: an activation that is not analytic, or weights that do not fit.
        ModuleNotFoundError: python-flint is not installed.
    """

    if X.dtype != torch.float64:
        raise TypeError(f"X is {X.dtype}; a float64 tensor is needed")
    if act not in arbs.BALL_ACTIVATIONS:
        known = ", ".join(arbs.BALL_ACTIVATIONS)
        raise ValueError(f"act is {act!r}; an analytic activation, one of {known}, is needed")
    networks.check_weights(weights, X)
    if weights[0].ndim == 3 and len(weights[0]) != 1:
        raise ValueError(f"weights holds {len(weights[0])} networks; one is needed")
    middle, radius = arbs.enclosed_features([W.reshape(W.shape[-2:]) for W in weights], X, act)
    N, m = middle.shape
    floor = 0.0
    if m >= N:
        floor = max(0.0, rigor.round_down(rigor.sigma_min_lower(middle) - rigor.frobenius_norm_upper(radius)))
    rows = (
        assumed("l is convex and continuous"),
        compare("width of the last hidden layer", m, ">=", N, "exact"),
        compare("sigma_N(H) at this point, at least", floor, ">", 0.0, "certified"),
    )
    holds = all(r.holds for r in rows)
    reason = "" if holds else ("width: m < N" if m < N else "rank: full rank was not shown at this point")
    found = {"sigma_N(H) >=": floor, "activation": activation(act).name}
    return Certificate("Criterion (R): roads from almost everywhere", holds, rows, found, reason)
