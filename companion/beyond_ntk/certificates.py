"""How far is this loss from the global minimum, and how fast does the last layer get there? Proofs for a network.

The network ends in ``h``, then ``q = V^T [h, 1]``; ``M = [h, 1]`` is (N, m + 1), ``sigma_1 >= ... >= sigma_N`` are its
singular values, and the loss is an average, ``L = (1/N) sum_i l_i(q_i)``.

- *Gap* (`certify_gap`): ``L - inf L <= L - floor``, where the floor is what equal inputs cost. No rank is needed.
- *Rate* (`certify_rate`): a lower bound on ``sigma_N``, and the rates of gradient descent on V that follow from it.

Both speak of the network with the stored parameters and exact real arithmetic, in evaluation mode, through the
enclosures of `companion.rigor`. A certificate that does not hold says *not shown*, with the reason.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion import rigor
from companion.arguments import checked
from companion.beyond_ntk import bounds
from companion.beyond_ntk.last_layer import Loss, centre, check_targets, smoothness
from companion.certificate import Certificate, compare, show, silent
from companion.data import equal_inputs
from companion.networks.reading import Head, NoEnclosure, head, inputs, read
from companion.rigor import Interval, formulas, modules, point
from companion.rigor.modules import BATCH

# --- The loss, enclosed -----------------------------------------------------------------------------------------------


def loss_bounds(
    q: Float[Tensor, "N K"], D: Float[Tensor, "N K"], y: Tensor, loss: Loss | None = None
) -> tuple[float, float]:
    """Enclose ``L = (1/N) sum_i l_i(q_i)`` for every ``|q - q~| <= D``, in interval arithmetic.

    Squared: ``l = 0.5 ||q - y||^2``, entry by entry. Cross-entropy: ``l = (q_a - q_y) + log(1 + sum_{k != a}
    exp(q_k - q_a))``, the same for every a; that of the largest computed output is taken.

    Args:
        q: outputs, float64 ``(N, K)``.
        D: their radii.
        y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``; None for what the dtype of y says.

    Returns:
        A lower and an upper bound; 0 and infinity where numbers overflow.

    Raises:
        TypeError, ValueError: a ball that is none, or targets that do not fit.

    Source: derived in lesson 3.
    """
    rigor.check_ball(q, D, 2)
    y, loss = check_targets("y", y, len(q), loss, q.shape[1])
    if loss == "squared":
        e = point(D).hi
        losses = ((point(q) - y.double() + Interval(-e, e)) ** 2).sum(1) / 2
    else:
        losses = _cross_entropy(Interval.around(q, D), q.argmax(1), y)
    mean = losses.sum(0) / len(q)
    low, high = float(mean.lo), float(mean.hi)
    return max(0.0, low) if math.isfinite(low) else 0.0, math.inf if math.isnan(high) else high


def _cross_entropy(Q: Interval, a: Tensor, y: Tensor) -> Interval:
    """Each sample's loss, from the outputs and one class a of each, best a large one."""
    rows = torch.arange(len(y), device="cpu")
    top, own = Q[rows, a], Q[rows, y]
    lead = _where(a == y, 0.0, top - own)  # exactly 0 where a is the label
    return lead + _others(Q, a).sum(1).log1p()


def _others(Q: Interval, a: Tensor) -> Interval:
    """``exp(q_k - q_a)``, with 0 at ``k = a``."""
    rows = torch.arange(len(a), device="cpu")
    ratios = (Q - Q[rows, a].unsqueeze(1)).exp()
    return _where(torch.nn.functional.one_hot(a, Q.shape[1]).bool(), 0.0, ratios)


def _where(condition: Tensor, value: float, other: Interval) -> Interval:
    return Interval(torch.where(condition, value, other.lo), torch.where(condition, value, other.hi))


# --- G: the gap to the global minimum ---------------------------------------------------------------------------------

_GAP = "Gap: L - inf L over all parameters"


@checked
def certify_gap(
    model: nn.Module,
    X: Float[Tensor, "N ..."],
    y: Tensor,
    *,
    loss: Loss | None = None,
    ridge: float | None = None,
    last: nn.Module | None = None,
    batch: int = BATCH,
) -> Certificate:
    """Prove how far the network's loss is from the least loss that any parameters of any network have.

    ``L - inf L <= L_upper - floor``: the loss is enclosed in exact real arithmetic (`loss_bounds`), and the floor is
    what equal inputs with different targets cost (`bounds.duplicate_floor`; 0 without equal inputs). No rank is needed.
    It holds where this says something: where the loss is surely below that of the best constant outputs, which need no
    network. Where the gap is not small, `ridge` asks instead how far the *last layer* is from its own optimum: for
    ``P(V) = L(V) + ridge/2 ||V||^2``, ``P(V) - min P <= ||grad P(V)||^2 / (2 ridge)``.

    Args:
        model: any module with one input.
        X: inputs ``(N, ...)``, float32 or float64, taken as exact.
        y: targets ``(N, K)`` for the squared loss ``0.5 ||q - y||^2``, or labels ``(N,)`` for cross-entropy.
        loss: ``"squared"`` or ``"cross_entropy"``; None for what the dtype of y says. Averaged over samples.
        ridge: a positive number, see above.
        last: the last layer, needed for `ridge` only; None for the last ``nn.Linear`` that the model calls.
        batch: rows evaluated at once.

    Returns:
        A certificate; when it does not hold, its reason begins with ``no_enclosure``, ``architecture`` or ``vacuous``.
        Quantities, all certified: ``gap``, ``loss_upper``, ``loss_lower``, ``floor``, ``largest_radius``; with `ridge`
        also ``ridge_gap`` and ``gradient_norm`` (of L in the last layer), upper bounds.

    Raises:
        TypeError: model not a module, X not floating point, or y of the wrong dtype.
        ValueError: X or y empty, NaN or infinite, shapes that do not fit, one class only, or a bad option.

    Source: derived in lesson 3.
    """
    y, loss = check_targets("y", y, len(X), loss)
    X, y = inputs(X), y.cpu().double() if loss == "squared" else y.cpu()
    if ridge is not None and not ridge > 0:
        raise ValueError(f"ridge is {ridge}; a positive number is needed")
    try:
        network = read(model)
        end = None if ridge is None else head(network, last)
        if end and end.problem:
            return silent(_GAP, [], end.problem)
        q, D = modules.enclose(network, X, batch=batch)
        if q.ndim != 2:
            raise NoEnclosure(f"the output has shape {tuple(q.shape[1:])} a sample, not a vector")
    except NoEnclosure as error:
        return silent(_GAP, [], f"no_enclosure: {error}")
    check_targets("y", y, len(X), loss, q.shape[1])
    lower, upper = loss_bounds(q, D, y, loss)
    constant = bounds.duplicate_floor(torch.zeros(len(X), dtype=torch.int64, device="cpu"), y, loss)
    floor = bounds.duplicate_floor(equal_inputs(X), y, loss)
    gap = rigor.round_up(upper - floor)
    rows = [compare("L; the best constant outputs have", upper, "<", constant, "certified")]
    found = {"gap": gap, "loss_upper": upper, "loss_lower": lower, "floor": floor, "largest_radius": float(D.max())}
    if end:
        found |= _ridge_quantities(end, X, y, loss, ridge, batch)
    if not rows[0].holds:
        reason = f"vacuous: L <= {upper:.3g} was shown, and the best constant outputs have {constant:.3g}"
        return Certificate(_GAP, False, tuple(rows), found, reason)
    says = f"L - inf L <= {show(gap, side='up')}, where the best constant outputs have L = {show(constant)}"
    return Certificate(_GAP, True, tuple(rows), found, says=says)


def _ridge_quantities(end: Head, X: Tensor, y: Tensor, loss: Loss, ridge: float, batch: int) -> dict[str, float]:
    """``||grad P||^2 / (2 ridge)`` and ``||grad L||`` in the last layer, rounded up."""
    layer, done, gradient = end.last, 0, None
    for h, D in modules.blocks(end.network, X, before=layer, batch=batch):
        q, radius = rigor.dense_ball(h, D, layer.weight, layer.bias)
        G = _slope(Interval.around(q, radius), q.argmax(1), y[done : done + len(h)], loss)
        part = _transposed_product(G, h, D)
        part = part if layer.bias is None else rigor.cat([part, G.sum(0).unsqueeze(1)], dim=1)
        gradient = part if gradient is None else gradient + part
        done += len(h)
    gradient = gradient / len(X)
    V = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], dim=1)
    regularized = gradient + point(V) * point(ridge)
    return {
        "ridge_gap": formulas.upper(rigor.norm(regularized.flatten(0)) ** 2 / (2 * point(ridge))),
        "gradient_norm": formulas.upper(rigor.norm(gradient.flatten(0))),
    }


def _slope(Q: Interval, a: Tensor, y: Tensor, loss: Loss) -> Interval:
    """The gradient of each sample's loss in its outputs; of cross-entropy the softmax less the label's code."""
    if loss == "squared":
        return Q - y
    code = torch.nn.functional.one_hot(a, Q.shape[1])
    ratios = _where(code.bool(), 1.0, _others(Q, a))
    return ratios / ratios.sum(1).unsqueeze(1) - torch.nn.functional.one_hot(y, Q.shape[1]).double()


def _transposed_product(G: Interval, h: Tensor, D: Tensor) -> Interval:
    """``G^T h``, of an interval and a ball: ``|G - g| <= e`` adds ``e^T (|h| + D)``."""
    g, e = G.split()
    value, radius = rigor.dense_ball(g.T.contiguous(), torch.zeros_like(g.T), h.T)
    size = Interval.around(h.abs(), D).hi
    extra = [rigor.dense_ball(A.T.contiguous(), torch.zeros_like(A.T), B.T) for A, B in ((e, size), (g.abs(), D))]
    around = Interval.around(value, radius)
    for middle, off in extra:
        more = Interval.around(middle, off).hi
        around = around + Interval(-more, more)
    return around


# --- R: the rate ------------------------------------------------------------------------------------------------------

_RATE = "Rate: gradient descent on the last layer"


@checked
def certify_rate(
    model: nn.Module,
    X: Float[Tensor, "N ..."],
    *,
    y: Tensor | None = None,
    loss: Loss | None = None,
    last: nn.Module | None = None,
    steps: int = 1000,
    centred: bool = True,
    method: Literal["auto", "shift", "inverse"] = "auto",
    batch: int = BATCH,
) -> Certificate:
    """Prove ``sigma_N(M) > 0`` at the present features, and what gradient descent on the last layer then does.

    ``sigma_N`` of the true features is at least `rigor.sigma_min_lower` of the computed ones, less the norm of their
    radii. Then, for L averaged and steps of size `max_step`, at most ``1 / L_H = N / (Lambda sigma_1^2)`` with Lambda
    = 1 (squared) or 1/2 (cross-entropy)::

        squared:  L(V_t) <= (1 - eta sigma_N^2 / N)^t ||Y - M V_0||^2 / (2 N)
        cross-entropy:  L(V_t) <= (K - 1) / t + (||V_0|| + sqrt(N) log t / sigma_N)^2 / (2 eta t)
        Nesterov, squared:  L(V_t) <= 2 R^2 / (eta (t + 1)^2),  R = ||Y - M V_0|| / sigma_N

    All numbers are those of the coordinates in which the steps are taken: centred ones (`centre`), as in `phase2_gd`
    and `phase2_nesterov`, or those of the layer itself. Memory: about five arrays like M, ``8 N (m + 1)`` bytes each;
    for N up to 20,000.

    Args:
        model: any module with one input that ends in a dense layer; V_0 is that layer.
        X: inputs ``(N, ...)``, float32 or float64, taken as exact.
        y: targets or labels as in `certify_gap`; None for the spectrum alone.
        loss: as in `certify_gap`; without y, ``"squared"`` unless given.
        last: the last layer; None for the last ``nn.Linear`` that the model calls.
        steps: t, the number of steps at which the bounds are evaluated.
        centred: whether the steps are taken in centred coordinates; a last layer without bias has none.
        method: see `rigor.sigma_min_lower`.
        batch: rows evaluated at once.

    Returns:
        A certificate. Quantities: ``sigma_min``, ``sigma_max``, ``sigma_min_floats`` (of the computed matrix),
        ``radius`` (the norm of the radii), ``smoothness``, ``max_step``; squared: ``contraction`` c and ``linear_rate``
        1 - c; with y: ``start``, a bound on ``L(V_0)``, and ``bound`` after `steps` steps of gradient descent, equal to
        ``start`` where the rates say nothing; squared: ``nesterov_bound`` and ``distance`` R, too.

    Raises:
        TypeError, ValueError: as `certify_gap`, or steps below 1.

    Source: derived in lesson 3.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; a positive number is needed")
    if y is not None:
        y, loss = check_targets("y", y, len(X), loss)
        y = y.cpu().double() if loss == "squared" else y.cpu()
    X, loss = inputs(X), loss or "squared"
    try:
        end = head(model, last)
        if end.problem:
            return silent(_RATE, [], end.problem)
        N, width = len(X), end.last.in_features + (end.last.bias is not None)
        rows = [compare("columns of M", width, ">=", N, "exact")]
        if not rows[0].holds:
            return silent(_RATE, rows, f"width: M has {width} columns; at least N = {N} are needed")
        h, D = modules.enclose(end.network, X, before=end.last, batch=batch)
        if h.ndim != 2:
            raise NoEnclosure(f"the last layer's input has shape {tuple(h.shape[1:])} a sample, not a vector")
    except NoEnclosure as error:
        return silent(_RATE, [], f"no_enclosure: {error}")
    A, E, V0_norm = _coordinates(end.last, h, D, centred)
    radius, floats = rigor.frobenius_norm_upper(E), rigor.sigma_min_lower(A, method=method)
    sigma = max(0.0, rigor.round_down(floats - radius))
    top = rigor.round_up(rigor.spectral_norm_upper(A) + radius)
    rows.append(compare("σ_N(M)", sigma, ">", 0.0, "certified"))
    found = {"sigma_min": sigma, "sigma_max": top, "sigma_min_floats": floats, "radius": radius}
    if not sigma > 0 or not math.isfinite(top):
        reason = f"sigma_min: {floats:.2e} was shown of the computed matrix, whose radius is {radius:.2e}"
        return Certificate(_RATE, False, tuple(rows), found, reason)
    found |= _spectrum(N, loss, point(sigma), point(top))
    if not 0 < found["max_step"] < math.inf:
        return Certificate(_RATE, False, tuple(rows), found, f"range: sigma_1 = {top:.2e} is too large or too small")
    if y is not None:
        q = Interval.around(*rigor.dense_ball(h, D, end.last.weight, end.last.bias))
        found |= _bounds(q, y, loss, found, V0_norm, steps)
    return Certificate(_RATE, True, tuple(rows), found, says=_gain(found, steps))


def _gain(found: dict[str, float], steps: int) -> str:
    """What was gained, for the first line."""
    if "bound" not in found:
        return f"rank M = N, σ_N >= {show(found['sigma_min'], side='down')}"
    if found["bound"] == found["start"]:
        return f"rank M = N, but the rate says nothing yet after {steps} steps (vacuous)"
    return f"L <= {show(found['bound'], side='up')} after {steps} steps"


def _coordinates(last: nn.Linear, h: Tensor, D: Tensor, centred: bool) -> tuple[Tensor, Tensor, Interval]:
    """The features in the coordinates of the steps, with radii, and ``|V_0|`` there."""
    W = point(last.weight)
    if last.bias is None:
        return h, D, rigor.norm(W.flatten(0))
    none = torch.zeros(len(h), 1, dtype=torch.float64, device="cpu")
    ones, b = torch.ones_like(none), last.bias.detach()
    if not centred:
        return torch.cat([h, ones], 1), torch.cat([D, none], 1), rigor.norm(rigor.cat([W.flatten(0), point(b)]))
    frame = centre(torch.cat([h, ones], 1))
    middle, spread = (point(h) - frame.mean).split()  # the mean and the scale are exact: they define the coordinates
    A = torch.cat([middle, frame.scale.expand(len(h), 1)], 1)
    E = torch.cat([Interval.around(spread, D).hi, none], 1)
    moved = Interval.around(*rigor.dense_ball(frame.mean, torch.zeros_like(frame.mean), last.weight, last.bias))
    return A, E, rigor.norm(rigor.cat([W.flatten(0), (moved / frame.scale).flatten(0)]))


def _spectrum(N: int, loss: Loss, sigma: Interval, top: Interval) -> dict[str, float]:
    """What the singular values say, rounded to the safe side."""
    L_H = smoothness(top, N, loss)
    found = {"smoothness": formulas.upper(L_H), "max_step": formulas.lower(1 / L_H)}
    if loss == "squared":
        share = bounds.contraction(sigma, N, point(found["max_step"]))
        found |= {"contraction": formulas.lower(share), "linear_rate": formulas.upper(1 - share)}
    return found


def _bounds(
    q: Interval, y: Tensor, loss: Loss, found: dict[str, float], V0_norm: Interval, steps: int
) -> dict[str, float]:
    """The bounds on the loss after `steps` steps, rounded up."""
    sigma, step, t = (point(x) for x in (found["sigma_min"], found["max_step"], steps))
    N, K = q.shape
    middle, radius = q.split()
    start = loss_bounds(middle, radius, y, loss)[1]
    if loss == "cross_entropy":
        rate = bounds.cross_entropy_rate(sigma, point(N).sqrt(), K, t, step, V0_norm)
        return {"start": start, "bound": min(start, formulas.upper(rate))}
    residual = rigor.norm((q - y).flatten(0))
    R = residual / sigma
    rate = ((1 - point(found["contraction"])).log() * t).exp() * residual**2 / (2 * N)
    return {
        "distance": formulas.upper(R),
        "start": start,
        "bound": min(start, formulas.upper(rate)),
        "nesterov_bound": formulas.upper(bounds.nesterov_rate(R, step, t)),
    }
