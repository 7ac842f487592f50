"""What is proved about basins: none at this width, a bad strict minimum here, roads from almost everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion import networks, rigor
from companion.arguments import checked
from companion.basins import exact
from companion.basins.critical_points import ball_derivatives, kantorovich, krawczyk
from companion.basins.exact import ExactPoint
from companion.basins.shallow import Derivatives, check_shallow, loss_derivatives, recognized, train_lm_newton
from companion.certificate import Assumption, Certificate, assumed, compare, gather, silent
from companion.data import equal_inputs
from companion.networks import Activation, activation
from companion.rigor import arbs
from companion.rigor.formulas import lower
from companion.rigor.rationals import whole_numbers

_Loss = Literal["square", "logistic", "convex", "quasi-convex", "continuous"]

# --- above the width: no basin ----------------------------------------------------------------------------------------


@checked(double=True)
def certify_no_basin(
    N: int,
    m: int,
    act: str | Activation,
    loss: _Loss = "square",
    X: Float[Tensor, "N D"] | None = None,
    *,
    K: int = 1,
    output_bias: bool = False,
) -> Certificate:
    """Theorem P': no bad basin if ``m >= N`` (quasi-convex loss), no basin at all if ``m >= N + 1``; and what is known.

    An output bias counts as one more neuron.  With X, of one hidden layer, N may be replaced by the number N' of
    distinct inputs.  An unbounded ray of constant loss through every point, so that no width has a basin, comes from

    - a positively homogeneous activation (ReLU);
    - ``rank X < D``;
    - exp with a bias, a constant that is a combination of the columns of X: ``(w_j + t u, e^-t v_j)``, ``X u = 1``.

    Theorem T: for one output, one input without bias and a convex loss there is no bad basin if m is above the number
    of points where some ``g_e`` touches zero, with independent features.  That is at most

    - ``(N' - 1) / 2`` for exp, since an exponential sum has at most ``N' - 1`` zeros; ``(N' - 2) / 2`` beside an output
      bias, which is one zero more;
    - ``(M - 1) / 2`` for sin, if all ``x_n = k_n x`` with whole numbers ``|k_n| <= M``: ``g_e = sin w P(cos w)``.

    Args:
        N: number of samples.
        m: number of neurons of the last hidden layer.
        act: name or `Activation`; a step is refused, because the loss must be continuous.  Only companion's own
            activations are recognized as homogeneous, exp or sin.
        loss: what is known of it.
        X: inputs of a net with one hidden layer, bias column included, shape (N, D); None for any depth.
        K: number of outputs.
        output_bias: whether the outputs have a bias.

    Returns:
        The certificate.  It promises nothing about training, and ``holds=False`` does not say that a basin exists.

    Raises:
        TypeError: a number that is not whole, or X is not a float64 tensor.
        ValueError: N, m or K below 1, an unknown loss, or X with another number of rows.

    Source: Theorems P' and T, derived in lesson 5 after Li, Ding and Sun.
    """
    sigma = activation(act)
    if min(N, m, K) < 1:
        raise ValueError(f"N is {N}, m is {m}, K is {K}; at least one sample, one neuron and one output are needed")
    if X is not None and len(X) != N:
        raise ValueError(f"N is {N}, X has shape {tuple(X.shape)}; (N, D), one row a sample, is needed")
    distinct = N if X is None else int(equal_inputs(X).max()) + 1
    samples = "N" if distinct == N else "number of distinct inputs"
    columns, neurons = m + output_bias, "width m, with the output bias," if output_bias else "width m"
    smooth = (
        assumed(f"{sigma.name} is continuous"),
        assumed(f"the {loss} loss is a continuous function of the outputs"),
    )
    found: dict[str, Any] = {"N": N, "m": m} | ({"distinct inputs": distinct} if X is not None else {})
    if recognized(sigma, "step"):
        row = Assumption("sigma is continuous", "jump at 0", "is", "continuous", "exact", False)
        return silent("Theorem P': no bad basin", (row,), "activation: a step is not continuous")
    if columns > distinct:
        rows = (*smooth, compare(f"{neurons} >= {samples} + 1", columns, ">=", distinct + 1, "exact"))
        return Certificate("Theorem P': no basin at all, good or bad", True, rows, found)
    if (ray := _ray(sigma, X)) is not None:
        return Certificate("Corollary of P': no basin at any width", True, (*smooth, ray), found)
    width = compare(f"{neurons} >= {samples}", columns, ">=", distinct, "exact")
    touches = _most_touches(sigma, X, distinct, output_bias)
    if not width.holds and loss in ("square", "logistic", "convex") and touches is not None and m > touches:
        rows = (
            Assumption("the loss is convex and finite", loss, "is", "convex", "assumed", True),
            compare("outputs K", K, "=", 1, "exact"),
            compare("width m, above the number of touches", m, ">", touches, "exact"),
        )
        if K == 1:
            return Certificate("Theorem T: no bad basin", True, (*smooth, *rows), found)
    convex = Assumption("the loss is quasi-convex", loss, "is", "quasi-convex", "assumed", loss != "continuous")
    reason = "" if convex.holds else "loss: quasi-convexity was not given"
    reason = reason if width.holds else f"width: m < {samples}"
    return Certificate("Theorem P': no bad basin", not reason, (*smooth, convex, width), found, reason)


def _ray(sigma: Activation, X: Tensor | None) -> Assumption | None:
    """Why through every point runs an unbounded ray of constant loss, if a reason is known."""
    if recognized(sigma, "relu", "identity"):
        return Assumption(f"{sigma.name} is positively homogeneous", True, "is", True, "exact", True)
    if X is None:
        return None
    rank = rigor.exact_rank(X)
    if rank < X.shape[1]:
        return compare("rank X < D", rank, "<", X.shape[1], "exact")
    if recognized(sigma, "exp"):
        constant = bool(((X[0] == X).all(0) & (X[0] != 0)).any())
        if constant or rigor.exact_rank(torch.cat([X, torch.ones_like(X[:, :1])], 1)) == rank:
            return Assumption("exp, and X u = 1 for some u: a bias", True, "is", True, "exact", True)
    return None


def _most_touches(sigma: Activation, X: Tensor | None, distinct: int, output_bias: bool) -> int | None:
    """A bound on the number of touches, None where none is known; see `certify_no_basin`."""
    if X is None or X.shape[1] != 1:
        return None
    if recognized(sigma, "exp"):
        return (distinct - 1 - output_bias) // 2
    if recognized(sigma, "sin") and not output_bias:
        multiples = [abs(k) for (k,) in whole_numbers(X)[0]]
        return (max(multiples) // math.gcd(*multiples) - 1) // 2
    return None


# --- a bad strict minimum ---------------------------------------------------------------------------------------------


@checked
def certify_strict_minimum(
    weights: Sequence[Tensor] | ExactPoint,
    X: Any,
    Y: Any,
    act: str | Activation,
    level: Literal["measured", "certified", "exact"] = "certified",
    *,
    competitor: Sequence[Tensor] | ExactPoint | None = None,
) -> Certificate:
    """A bad strict minimum: zero gradient, ``Hess L > 0``, and lower weights of at most this width elsewhere.

    - ``"exact"``: the point is an `ExactPoint` and every sign is read off fractions;
    - ``"certified"``: a box around the floats holds exactly one critical point (Krawczyk), with positive pivots of the
      Hessian on the whole box, in balls;
    - ``"measured"``: the same conclusion from Kantorovich's theorem, batched, in plain floating point.

    Args:
        weights: ``[W, V]`` (with a leading S for ``"measured"``), or an `ExactPoint`.
        X: inputs (N, D); integers for ``"exact"``.
        Y: targets (N, 1); fractions for ``"exact"``.
        act: the activation.
        level: see above.
        competitor: lower weights of the same or a smaller width, one network for each data set; searched for by
            training when None.

    Returns:
        The certificate; for several networks, with one for each as `members`.

    Raises:
        TypeError: not float64, or a point that is not exact for ``"exact"``.
        ValueError: an unknown level, relu or step (they have no Hessian), NaN, data or a competitor that do not fit.
        ModuleNotFoundError: ``"certified"`` without python-flint.
    """
    if level == "exact":
        return _exact_certificate(weights, X, Y, act, competitor)
    for name, given in (("weights", weights), ("competitor", competitor)):
        if isinstance(given, ExactPoint):
            raise TypeError(f"{name} is an ExactPoint; [W, V] is needed for level {level!r}")
    return _float_certificate(weights, X, Y, act, level, competitor)


@checked(double=True)
def _float_certificate(
    weights: Sequence[Tensor],
    X: Float[Tensor, "*x N D"],
    Y: Float[Tensor, "*y N 1"],
    act: str | Activation,
    level: str,
    competitor: Sequence[Tensor] | None,
) -> Certificate:
    stacked, sigma = check_shallow(weights, X, Y, act)
    if competitor is None:
        competitor = _search_competitor(stacked, X, Y, act)
    try:
        other, _ = check_shallow(competitor, X, Y, act)
    except (TypeError, ValueError) as error:
        raise type(error)(f"competitor: {error}") from None
    if level == "certified":
        return _ball_certificate(stacked, X, Y, sigma, other)
    at, there = loss_derivatives(stacked, X, Y, sigma), loss_derivatives(other, X, Y, sigma)
    k, below = kantorovich(stacked, X, Y, sigma), there.loss + _rounding(there, other, Y)
    if X.ndim == 2 and Y.ndim == 2:  # the lowest of all, for data that all share
        below = below.min().expand(len(at.loss))
    # the minimum itself may be lower than here
    bottom = at.loss - _rounding(at, stacked, Y) - 2 * k.gamma**2 / k.smallest.clamp_min(1e-300) * (k.smallest > 0)
    members = []
    for s in range(len(below)):
        rows = (
            compare("4 M ||grad L|| / lambda_min^2", float(4 * k.M[s] * k.gamma[s] / k.smallest[s] ** 2), "<=", 1.0),
            compare("lambda_min of the Hessian", float(k.smallest[s]), ">", 0.0),
            compare("distance 2 ||grad L|| / lambda_min, in the ball", float(2 * k.gamma[s] / k.smallest[s]), "<",
                    float(k.radius[s])),
            _no_wider(other[0].shape[2], stacked[0].shape[2]),
            compare("loss of the competitor", float(below[s]), "<", float(bottom[s])),
        )  # fmt: skip
        members.append(_minimum("bad strict minimum (Kantorovich)", rows, {"L": float(at.loss[s])}))
    return gather(members)


def _rounding(d: Derivatives, weights: Sequence[Tensor], Y: Tensor) -> Tensor:
    """How much rounding may move the losses, to first order: ``|e| (|J| |theta| + |y|)``, unit by unit, (S,)."""
    W, V = weights
    theta = torch.cat([V[..., 0], W.mT.flatten(1)], 1)
    terms = (d.J.abs() @ theta.abs()[..., None] + Y.abs())[..., 0]
    return torch.finfo(W.dtype).eps * (theta.shape[1] + 8) * (d.e.abs() * terms).sum(1)


def _minimum(theorem: str, rows: tuple[Assumption, ...], found: dict[str, Any]) -> Certificate:
    failed = next((r.name for r in rows if not r.holds), "")
    return Certificate(theorem, not failed, rows, found, failed and f"minimum: {failed}")


def _no_wider(competitor: int, m: int) -> Assumption:
    """A narrower network is one of this width with silent neurons; a wider one says nothing about ``inf L`` here."""
    return compare("width of the competitor", competitor, "<=", m, "exact")


def _exact_certificate(point: Any, X: Any, Y: Any, act: str | Activation, competitor: Any) -> Certificate:
    for name, given in (("weights", point), ("competitor", competitor)):
        if not isinstance(given, ExactPoint) and not (name == "competitor" and given is None):
            raise TypeError(f"{name} is {type(given).__name__}; an ExactPoint is needed for level 'exact'")
        if given is not None and (not recognized(activation(act), given.act) or given.act != point.act):
            raise ValueError(f"{name} has the activation {given.act!r}, act is {act!r}; they must be equal")
    X, y = exact.integers(X), exact.targets(Y)
    if len(y) != len(X):
        raise ValueError(f"Y has {len(y)} rows, X has {len(X)}; one target for each input is needed")
    if competitor is None:
        competitor, _ = exact.best_exact_neuron(point.act, point.base, X, y)
    d, other = point.derivatives(X, y), competitor.derivatives(X, y).loss
    positive = sum(t > 0 for t in exact.ldl_pivots(d.hessian))
    rows = (
        compare("entries of the gradient that are not 0", sum(t != 0 for t in d.gradient), "=", 0, "exact"),
        compare("positive pivots of the Hessian", positive, "=", len(d.hessian), "exact"),
        _no_wider(len(competitor.v), len(point.v)),
        # the fractions are compared; what is printed is rounded
        Assumption("loss of the competitor", lower(other), "<", lower(d.loss), "exact", other < d.loss),
    )
    return _minimum("bad strict minimum (fractions)", rows, {"L": d.loss, "L of the competitor": lower(other)})


def _ball_certificate(
    weights: Sequence[Tensor], X: Tensor, Y: Tensor, sigma: Activation, competitor: Sequence[Tensor]
) -> Certificate:
    _check_balls(sigma)
    for name, given in (("weights", weights), ("competitor", competitor)):
        if len(given[0]) != 1 or X.ndim != 2 or Y.ndim != 2:
            shapes = f"X {tuple(X.shape)}, Y {tuple(Y.shape)}"
            raise ValueError(
                f"{name} holds {len(given[0])} networks, {shapes}; one, on one data set, is needed for balls"
            )
    (W,), (V,) = weights
    box = krawczyk(W, V[:, 0], X, Y[:, 0], sigma.name)
    (W_c,), (V_c,) = competitor
    other = ball_derivatives(W_c.T.tolist(), V_c[:, 0].tolist(), X, Y[:, 0], sigma.name).loss
    rows = (
        Assumption("Krawczyk: one critical point in the box", box.radius is not None, "is", True, "certified",
                   box.radius is not None),
        compare("smallest pivot of the Hessian on the box", box.smallest_pivot, ">", 0.0, "certified"),
        _no_wider(W_c.shape[1], W.shape[1]),
        compare("loss of the competitor", arbs.ends(other)[1], "<", box.loss_low, "certified"),
    )  # fmt: skip
    found = {"radius of the box": box.radius, "L from": box.loss_low, "L to": box.loss_high}
    return _minimum("bad strict minimum (balls)", rows, found)


def _check_balls(sigma: Activation) -> None:
    if not recognized(sigma, *arbs.BALL_ACTIVATIONS):
        known = ", ".join(arbs.BALL_ACTIVATIONS)
        raise ValueError(f"act is {sigma.name!r}; an analytic activation with balls, one of {known}, is needed")


def _search_competitor(weights: Sequence[Tensor], X: Tensor, Y: Tensor, act: str | Activation) -> list[Tensor]:
    """The lowest of 64 networks of the same shape, trained from seeded starts."""
    if X.ndim != 2 or Y.ndim != 2:
        raise ValueError("competitor is missing; it is needed when every network has its own data")
    _, D, m = weights[0].shape
    generator = torch.Generator().manual_seed(0)
    size = 3 / (float(X.abs().max()) or 1.0)
    W = size * torch.randn(64, D, m, generator=generator, dtype=torch.float64)
    V = torch.randn(64, m, 1, generator=generator, dtype=torch.float64)
    trained = train_lm_newton([W.to(X), V.to(X)], X, Y, act, iters=100)
    best = int(torch.nan_to_num(trained.loss, nan=math.inf).argmin())
    return [T[best] for T in trained.weights]


# --- roads from almost everywhere -------------------------------------------------------------------------------------


@checked(double=True)
def certify_full_rank(weights: Sequence[Tensor], X: Float[Tensor, "N d"], act: str | Activation) -> Certificate:
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
        TypeError: not float64.
        ValueError: an activation that is not analytic, or weights that do not fit.
        ModuleNotFoundError: python-flint is not installed.

    Source: "A repair for deep networks", derived in lesson 5.
    """
    sigma = activation(act)
    _check_balls(sigma)
    networks.check_weights(weights, X)
    if weights[0].ndim == 3 and len(weights[0]) != 1:
        raise ValueError(f"weights holds {len(weights[0])} networks; one is needed")
    middle, radius = arbs.enclosed_features([W.reshape(W.shape[-2:]) for W in weights], X, sigma.name)
    N, m = middle.shape
    floor = 0.0
    if m >= N and bool(torch.isfinite(middle).all() and torch.isfinite(radius).all()):
        floor = max(0.0, rigor.round_down(rigor.sigma_min_lower(middle) - rigor.frobenius_norm_upper(radius)))
    rows = (
        assumed("l is quasi-convex and continuous"),
        compare("width of the last hidden layer", m, ">=", N, "exact"),
        compare("sigma_N(H) at this point, at least", floor, ">", 0.0, "certified"),
    )
    holds = all(r.holds for r in rows)
    reason = "" if holds else ("width: m < N" if m < N else "rank: full rank was not shown at this point")
    found = {"sigma_N(H) >=": floor, "activation": sigma.name}
    return Certificate("Criterion (R): roads from almost everywhere", holds, rows, found, reason)
