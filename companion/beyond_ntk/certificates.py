"""How far is this loss from the global minimum, and how fast does the last layer get there? Proofs for a network.

The network ends in ``h``, then ``q = V^T [h, 1]``; ``M = [h, 1]`` is (N, m + 1), ``sigma_1 >= ... >= sigma_N`` are its
singular values, and the loss is an average, ``L = (1/N) sum_i l_i(q_i)``.

- *Gap* (`certify_gap`): ``L - inf L <= L - floor``, where the floor is what equal inputs cost. No rank is needed.
- *Rate* (`certify_rate`): a lower bound on ``sigma_N``, and the rates of gradient descent on V that follow from it.

Both speak of the network with the stored parameters and exact real arithmetic, in evaluation mode, through the
enclosures of `companion.enclosures`. A certificate that does not hold says *not shown*, with the reason.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx, nn

from companion import rigor
from companion.beyond_ntk.expressivity import LIBRARY, library_row
from companion.certificate import Certificate, assumed, compare, silent
from companion.data import equal_inputs
from companion.networks.reading import Head, NoEnclosure, head
from companion.rigor import modules
from companion.rigor.modules import BATCH
from companion.rigor.rounding import UNIT, gamma, round_down, round_up

Loss = Literal["squared", "cross_entropy"]
LOSSES = ("squared", "cross_entropy")
_GROW = 1 + 1e-9  # of every computed upper bound, as in `companion.verified`
_SHRINK = 1 - 1e-9


# --- G: the gap to the global minimum -------------------------------------------------------------------------------

GAP = "Gap: L - inf L over all parameters"


def _check_targets(y: Tensor, X: Tensor, loss: Loss | None) -> tuple[Tensor, Loss]:
    """The targets, float64 or int64 on the CPU, and the loss, which the dtype decides when it is not given."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y is a {type(y).__name__}; a torch.Tensor is needed")
    if loss not in (None, *LOSSES):
        raise ValueError(f"loss is {loss!r}; one of {', '.join(map(repr, LOSSES))} is needed")
    kind: Loss = loss or ("squared" if y.is_floating_point() else "cross_entropy")
    if y.is_floating_point() != (kind == "squared") or y.is_complex() or y.dtype == torch.bool:
        what = "floating-point targets (N, K)" if kind == "squared" else "integer labels (N,)"
        raise TypeError(f"y is {y.dtype}; loss {kind!r} needs {what}")
    if len(y) != len(X) or y.ndim != (2 if kind == "squared" else 1):
        shape = "(N, K)" if kind == "squared" else "(N,)"
        raise ValueError(f"y has shape {tuple(y.shape)}; {shape} with N = {len(X)} is needed")
    y = y.detach().cpu()
    if kind == "squared":
        if not bool(torch.isfinite(y).all()):
            raise ValueError("y holds NaN or infinity; finite numbers are needed")
        return y.double(), kind
    if int(y.min()) < 0 or int(y.min()) == int(y.max()):
        raise ValueError(f"y holds labels from {int(y.min())} to {int(y.max())}; two classes, from 0 on, are needed")
    return y.long(), kind


def _outputs_fit(y: Tensor, q: Tensor, loss: Loss) -> None:
    if q.ndim != 2 or (y.shape[1] != q.shape[1] if loss == "squared" else int(y.max()) >= q.shape[1]):
        found = f"shape {tuple(y.shape)}" if loss == "squared" else f"a label {int(y.max())}"
        raise ValueError(f"y has {found}, but the model's outputs have shape {tuple(q.shape)}; they do not fit")


def loss_bounds(
    q: Float[Tensor, "N K"], D: Float[Tensor, "N K"], y: Tensor, loss: Loss = "squared"
) -> tuple[float, float]:
    """Enclose ``L = (1/N) sum_i l_i(q_i)`` for every ``|q - q~| <= D``: rounded outward.

    Squared, ``l = 0.5 ||q - y||^2``: with ``E = D + u |fl(q~ - y)|``, ``sqrt(2 N L)`` is within ``||E||_F`` of
    ``||fl(q~ - y)||_F``. Cross-entropy, ``l = log sum_k exp(q_k - q_y)``: it moves by at most ``max_k |error of
    q_k - q_y|``; its evaluation is accurate to ``(K + 16) u`` relatively, where the library's accuracy is assumed.

    Args:
        q: outputs, float64 ``(N, K)``.
        D: their radii.
        y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``.

    Returns:
        A lower and an upper bound; the upper one is infinite where numbers overflow.

    Raises:
        TypeError, ValueError: a ball that is none, or targets that do not fit.

    Source: derived in lesson 3.
    """
    rigor.check_ball(q, D, 2)
    y, loss = _check_targets(y, q, loss)
    _outputs_fit(y, q, loss)
    N = len(q)
    if loss == "squared":
        r = q - y
        E = (D + UNIT * r.abs()).mul_(_GROW).add_(2.0**-1070)
        if not bool(torch.isfinite(r).all() and torch.isfinite(E).all()):
            return 0.0, math.inf
        middle, spread = rigor.frobenius_norm_upper(r), rigor.frobenius_norm_upper(E)
        least = middle * (1 - 4 * gamma(2 * r.numel() + 8)) - spread  # how far `middle` may be above the norm
        upper = _finite_square(round_up(middle + spread)) * _GROW / (2 * N) * _GROW + 1e-300
        return max(0.0, _finite_square(max(0.0, least)) * _SHRINK / (2 * N) * _SHRINK - 1e-300), upper
    losses, radius = _cross_entropy(q, D, y)
    if not bool(torch.isfinite(losses).all() and torch.isfinite(radius).all()):
        return 0.0, math.inf
    upper = math.fsum((losses + radius).tolist()) / N * _GROW + 1e-300
    return max(0.0, math.fsum((losses - radius).clamp(min=0).tolist()) / N * _SHRINK - 1e-300), upper


def _finite_square(x: float) -> float:
    return x * x if x < 1e150 else math.inf


def _cross_entropy(q: Tensor, D: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's loss and its radius."""
    K, label = q.shape[1], y[:, None]
    d = q - q.gather(1, label)
    moved = (D + D.gather(1, label) + UNIT * d.abs()).scatter_(1, label, 0.0)
    top, arg = d.max(dim=1, keepdim=True)  # >= 0, since d_y = 0
    rest = torch.exp(d - top).scatter_(1, arg, 0.0)
    losses = (top + torch.log1p(rest.sum(dim=1, keepdim=True)))[:, 0]
    largest = d.abs().amax(dim=1)
    radius = moved.amax(dim=1) + 2 * UNIT * largest + (K + 16) * UNIT * losses
    return losses, radius.mul_(_GROW).add_(K * 2.0**-1022)


def duplicate_floor_lower(groups: Int[Tensor, " N"], y: Tensor, loss: Loss = "squared") -> float:
    """Bound from below what equal inputs cost: ``(1/N) sum_groups inf_q sum_(i in group) l_i(q)``, a floor of L.

    Squared: half the squared distances to the group's mean, in exact fractions. Cross-entropy: ``sum_k c_k
    log(n / c_k)`` for a group of n samples with c_k labels k.

    Args:
        groups: the group of each sample, see `equal_inputs`.
        y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``.

    Returns:
        The floor, rounded down; every parameter of every network has at least this loss.

    Raises:
        TypeError, ValueError: targets that do not fit.

    Source: derived in lesson 3 (equal inputs have equal outputs).
    """
    y, loss = _check_targets(y, groups, loss)
    N, sizes = len(groups), torch.bincount(groups)
    crowded = (sizes[groups] > 1).nonzero()[:, 0].tolist()
    members: dict[int, list[int]] = {}
    for i in crowded:
        members.setdefault(int(groups[i]), []).append(i)
    if loss == "squared":
        total = Fraction(0)
        for group in members.values():
            for column in y[group].T.tolist():
                exact = [Fraction(value) for value in column]
                total += (sum(v * v for v in exact) - sum(exact) ** 2 / len(exact)) / 2
        return max(0.0, round_down(float(total / N))) if total else 0.0
    terms = []
    for group in members.values():
        counts = [c for c in torch.bincount(y[group]).tolist() if c]
        terms += [c * math.log1p((len(group) - c) / c) for c in counts]
    return max(0.0, math.fsum(terms) / N * _SHRINK) if any(terms) else 0.0


def certify_gap(
    model: nn.Module,
    X: Float[Tensor, "N ..."],
    y: Tensor,
    *,
    loss: Loss | None = None,
    within: float | None = None,
    ridge: float | None = None,
    last: nn.Module | None = None,
    batch: int = BATCH,
) -> Certificate:
    """Prove how far the network's loss is from the least loss that any parameters of any network have.

    ``L - inf L <= L_upper - floor``: the loss is enclosed in exact real arithmetic (`loss_bounds`), and the floor is
    what equal inputs with different targets cost (`duplicate_floor_lower`; 0 without equal inputs). No rank is needed.
    Where the gap is not small, `ridge` asks instead how far the *last layer* is from its own optimum: for
    ``P(V) = L(V) + ridge/2 ||V||^2``, ``P(V) - min P <= ||grad P(V)||^2 / (2 ridge)``, in plain floating point.

    Args:
        model: any module with one input.
        X: inputs ``(N, ...)``, float32 or float64, taken as exact.
        y: targets ``(N, K)`` for the squared loss ``0.5 ||q - y||^2``, or labels ``(N,)`` for cross-entropy.
        loss: ``"squared"`` or ``"cross_entropy"``; None for what the dtype of y says. Averaged over samples.
        within: the gap that is asked for; None for any finite one.
        ridge: a positive number, see above.
        last: the last layer, needed for `ridge` only; None for the last ``nn.Linear`` that the model calls.
        batch: rows evaluated at once.

    Returns:
        A certificate. Quantities: ``gap``, ``loss_upper``, ``loss_lower``, ``floor``, ``largest_radius``; with `ridge`
        also ``ridge_gap`` and ``gradient_norm`` (of L in the last layer), measured.

    Raises:
        TypeError: model not a module, X not floating point, or y of the wrong dtype.
        ValueError: X or y empty, NaN or infinite, shapes that do not fit, one class only, or a bad option.

    Source: derived in lesson 3.
    """
    X = modules.inputs(X)
    y, loss = _check_targets(y, X, loss)
    for name, number in (("within", within), ("ridge", ridge)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} is {number}; a positive finite number is needed")
    try:
        network = modules.read(model)
        end = None if ridge is None else head(network, last)
        if end and end.problem:
            return silent(GAP, [], end.problem)
        q, D = modules.enclose(network, X, batch=batch)
    except NoEnclosure as error:
        return silent(GAP, [], f"no_enclosure: {error}")
    _outputs_fit(y, q, loss)
    lower, upper = loss_bounds(q, D, y, loss)
    floor = duplicate_floor_lower(equal_inputs(X), y, loss)
    gap = round_up(upper - floor)
    rows = [
        compare("L - inf L", gap, "<" if within is None else "<=", math.inf if within is None else within, "certified")
    ]
    rows += [assumed(LIBRARY)] if loss == "cross_entropy" else library_row(network)
    found = {"gap": gap, "loss_upper": upper, "loss_lower": lower, "floor": floor, "largest_radius": float(D.max())}
    if end:
        found |= _ridge_quantities(end, X, y, loss, ridge, batch)
    if not rows[0].holds:
        return Certificate(GAP, False, tuple(rows), found, f"gap: at most {gap:.3g} was shown")
    return Certificate(GAP, True, tuple(rows), found)


def _ridge_quantities(end: Head, X: Tensor, y: Tensor, loss: Loss, ridge: float, batch: int) -> dict[str, float]:
    """``||grad P||^2 / (2 ridge)`` and ``||grad L||`` in the last layer, in plain floating point."""
    layer = end.last
    gradient, offset = torch.zeros_like(layer.weight), torch.zeros(layer.out_features).double()
    done = 0
    for h, _ in modules.blocks(end.network, X, before=layer, batch=batch):
        part = y[done : done + len(h)]
        q = F.linear(h, layer.weight, layer.bias)
        if loss == "squared":
            g = q - part
        else:
            g = torch.softmax(q, dim=1)
            g[torch.arange(len(g)), part] -= 1
        gradient += g.T @ h / len(X)
        offset += g.sum(dim=0) / len(X)
        done += len(h)
    norm = torch.cat([gradient, offset[:, None]], dim=1) if layer.bias is not None else gradient
    V = torch.cat([layer.weight, layer.bias[:, None]], dim=1) if layer.bias is not None else layer.weight
    return {
        "ridge_gap": float((norm + ridge * V).square().sum()) / (2 * ridge),
        "gradient_norm": float(norm.norm()),
    }


# --- R: the rate ----------------------------------------------------------------------------------------------------

RATE = "Rate: gradient descent on the last layer"


def certify_rate(
    model: nn.Module,
    X: Float[Tensor, "N ..."],
    *,
    y: Tensor | None = None,
    loss: Loss | None = None,
    last: nn.Module | None = None,
    steps: int = 1000,
    method: Literal["auto", "shift", "inverse"] = "auto",
    batch: int = BATCH,
) -> Certificate:
    """Prove ``sigma_N(M) > 0`` at the present features, and what gradient descent on the last layer then does.

    ``sigma_N`` of the true features is at least `verified.sigma_min_lower` of the computed ones, less the norm of their
    radii. Then, for L averaged, ``eta = N / (Lambda sigma_1^2)``, Lambda = 1 (squared) or 1/2 (cross-entropy)::

        squared:  L(V_t) <= min( (1 - sigma_N^2 / sigma_1^2)^t L(V_0),  R^2 / (2 eta t) ),  R = ||Y - M V_0|| / sigma_N
        cross-entropy:  L(V_t) <= (K - 1) / t + (||V_0|| + sqrt(N) log t / sigma_N)^2 / (2 eta t)
        Nesterov, squared:  L(V_t) <= 2 R^2 / (eta (t + 1)^2)

    Memory: about five arrays like M, ``8 N (m + 1)`` bytes each; for N up to 20,000.

    Args:
        model: any module with one input that ends in a dense layer; V_0 is that layer.
        X: inputs ``(N, ...)``, float32 or float64, taken as exact.
        y: targets or labels as in `certify_gap`; None for the spectrum alone.
        loss: as in `certify_gap`; without y, ``"squared"`` unless given.
        last: the last layer; None for the last ``nn.Linear`` that the model calls.
        steps: t, the number of steps at which the bounds are evaluated.
        method: see `verified.sigma_min_lower`.
        batch: rows evaluated at once.

    Returns:
        A certificate. Quantities: ``sigma_min``, ``sigma_max``, ``sigma_min_floats`` (of the computed matrix),
        ``radius`` (the norm of the radii), ``smoothness``, ``max_step``; squared: ``contraction`` c and ``linear_rate``
        1 - c; with y: ``bound`` (and squared: ``nesterov_bound``, ``distance`` R) after `steps` steps.

    Raises:
        TypeError, ValueError: as `certify_gap`, or steps below 1.

    Source: derived in lesson 3.
    """
    X = modules.inputs(X)
    if steps < 1:
        raise ValueError(f"steps is {steps}; a positive number is needed")
    if y is not None:
        y, loss = _check_targets(y, X, loss)
    elif loss not in (None, *LOSSES):
        raise ValueError(f"loss is {loss!r}; one of {', '.join(map(repr, LOSSES))} is needed")
    loss = loss or "squared"
    try:
        end = head(model, last)
        if end.problem:
            return silent(RATE, [], end.problem)
        N, width = len(X), end.last.in_features + (end.last.bias is not None)
        rows = [compare("columns of M", width, ">=", N, "exact")]
        if not rows[0].holds:
            return silent(RATE, rows, f"width: M has {width} columns; at least N = {N} are needed")
        h, D = modules.enclose(end.network, X, before=end.last, batch=batch)
        if h.ndim != 2:
            raise NoEnclosure(f"the last layer's input has shape {tuple(h.shape[1:])} a sample, not a vector")
    except NoEnclosure as error:
        return silent(RATE, [], f"no_enclosure: {error}")
    M = h if end.last.bias is None else torch.cat([h, h.new_ones(N, 1)], dim=1)
    radius, floats = rigor.frobenius_norm_upper(D), rigor.sigma_min_lower(M, method=method)
    sigma = max(0.0, round_down(floats - radius))
    top = round_up(rigor.spectral_norm_upper(M) + radius)
    rows += [compare("σ_N(M)", sigma, ">", 0.0, "certified"), *library_row(end.network, _before(end))]
    found = {"sigma_min": sigma, "sigma_max": top, "sigma_min_floats": floats, "radius": radius}
    if not sigma > 0 or not math.isfinite(top):
        reason = f"sigma_min: {floats:.2e} was shown of the computed matrix, whose radius is {radius:.2e}"
        return Certificate(RATE, False, tuple(rows), found, reason)
    found |= _rates(end.last, M, D, y, loss, sigma, top, steps)
    return Certificate(RATE, True, tuple(rows), found)


def _before(end: Head) -> set[fx.Node]:
    (node,) = end.network.calls(end.last)
    return modules.ancestors(node.args[0])


def _rates(
    last: nn.Linear, M: Tensor, D: Tensor, y: Tensor | None, loss: Loss, sigma: float, top: float, steps: int
) -> dict[str, float]:
    """The numbers of the theorems, rounded to the safe side."""
    N, curvature = len(M), 1.0 if loss == "squared" else 0.5
    smooth = curvature * top * top / N * _GROW
    found = {"smoothness": smooth, "max_step": round_down(1 / smooth)}
    share = (sigma / top) ** 2 * (1 - 3e-9)  # eta sigma_N^2 / N, rounded down
    if loss == "squared":
        found |= {"contraction": share, "linear_rate": round_up(1 - share)}
    if y is None:
        return found
    q, spread = rigor.dense_ball(M[:, : last.in_features], D, last.weight, last.bias)
    _outputs_fit(y, q, loss)
    if loss == "squared":
        r = rigor.frobenius_norm_upper(((q - y).abs() * _GROW + spread).mul_(_GROW))
        distance = r / sigma * _GROW
        found["distance"] = distance
        slow = distance * distance * smooth / (2 * steps) * _GROW
        fast = math.exp(steps * math.log1p(-share)) * r * r / (2 * N) * _GROW + 1e-300
        found["bound"] = min(slow, fast)
        found["nesterov_bound"] = 2 * distance * distance * smooth / (steps + 1) ** 2 * _GROW
    else:
        size = rigor.frobenius_norm_upper(last.weight)
        size = math.hypot(size, float(last.bias.norm())) * _GROW if last.bias is not None else size
        reach = size + math.sqrt(N) * math.log(steps) / sigma * _GROW
        found["bound"] = ((q.shape[1] - 1) / steps + reach * reach * smooth / (2 * steps)) * _GROW
    return found
