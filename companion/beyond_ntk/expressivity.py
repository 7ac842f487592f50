"""Can this network fit these data? A proof by a sort, for a network of the user.

The network ends in ``h = sigma(A xi + a)`` of width m, then ``q = V^T [h, 1]``; the ``xi_i`` are the lower layers'
outputs on N samples, and ``M = [h, 1]`` is (N, m + 1). If the ``xi_i`` are pairwise distinct, sigma is analytic and not
a polynomial, and ``m >= N - 1``, then ``rank M = N`` for almost every ``(A, a)`` (lesson 3). `certify_expressivity`
shows it for the network with the stored parameters and exact real arithmetic, in evaluation mode, through
`companion.rigor`; no N x N matrix is formed. A certificate that does not hold says *not shown*, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion import rigor
from companion.arguments import checked
from companion.certificate import Assumption, Certificate, compare, silent
from companion.data import equal_inputs, equal_pairs
from companion.networks.layers import Softplus
from companion.networks.reading import Head, NoEnclosure, head
from companion.rigor import modules
from companion.rigor.modules import BATCH
from companion.rigor.rounding import UNIT

_NAMED = 1000  # pairs that are named at most
_PAIRS = 2**18  # pairs compared at once


# --- Distinct points --------------------------------------------------------------------------------------------------


class Separation(NamedTuple):
    """Which points were shown to be distinct.

    Args:
        projection: ``z_i = w . xi_i``, computed, ``(N,)``.
        error: ``e_i``, what rounding and the radius may have moved it by, ``(N,)``.
        inspected: pairs whose intervals ``z_i ± e_i`` overlap, so that their coordinates were compared.
        unresolved: number of pairs not shown to be distinct.
        pairs: the first of these pairs, ``i < j``.
    """

    projection: Float[Tensor, " N"]
    error: Float[Tensor, " N"]
    inspected: int
    unresolved: int
    pairs: list[tuple[int, int]]


@checked(double=True)
def separation(
    xi: Float[Tensor, "N p"], D: Float[Tensor, "N p"] | None = None, *, seed: int = 0, limit: int = 10**8
) -> Separation:
    """Show that points known only within ``|x_i - xi_i| <= D_i`` are pairwise distinct, with a sort.

    One random vector w gives intervals ``z_i ± e_i`` that hold ``w . x_i``, ends rounded outward. Sorted by lower end,
    two points whose intervals do not meet are distinct. It is not enough to compare neighbours: a wide interval may
    reach over many narrow ones. For each point all intervals that begin below its upper end are looked at, and each of
    these pairs needs a coordinate with ``|xi_ik - xi_jk| > D_ik + D_jk``.

    Args:
        xi: the middles, float64 ``(N, p)``.
        D: the radii ``(N, p)``; None for points that are known exactly.
        seed: of the random vector; any value gives a proof.
        limit: pairs inspected at most; the rest counts as unresolved.

    Returns:
        The projections, the number of pairs inspected, and the pairs that were not resolved.

    Raises:
        TypeError, ValueError: not float64, not finite, empty, a negative radius, or shapes that differ.

    Source: derived in lesson 3.
    """
    D = torch.zeros_like(xi) if D is None else D
    rigor.check_ball(xi, D, 2)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(1, xi.shape[1], dtype=torch.float64, device="cpu", generator=generator)
    z, e = (column[:, 0] for column in rigor.dense_ball(xi, D, w))
    if not bool(torch.isfinite(z).all() and torch.isfinite(e).all()):
        raise ValueError("xi overflows in a projection; smaller numbers are needed")
    lower = np.nextafter((z - e).numpy(), -math.inf)
    upper = np.nextafter((z + e).numpy(), math.inf)
    order = np.argsort(lower, kind="stable")
    # partners of the i-th point in the order: those after it that begin at or below its upper end
    ends = np.searchsorted(lower[order], upper[order], side="right")
    many = np.maximum(ends - np.arange(len(order)) - 1, 0)
    total = int(many.sum())
    unresolved, inspected, pairs = 0, 0, []
    for i, j in _pairs(many, min(total, limit)):
        inspected += len(i)
        i, j = torch.from_numpy(order[i]), torch.from_numpy(order[j])
        apart = ((xi[i] - xi[j]).abs_().mul_(1 - 4 * UNIT) > D[i] + D[j]).any(dim=1)
        unresolved += int((~apart).sum())
        if len(pairs) < _NAMED:
            left = zip(i[~apart].tolist(), j[~apart].tolist(), strict=True)
            pairs += [(min(a, b), max(a, b)) for a, b in left]
    return Separation(z, e, inspected, unresolved + total - inspected, sorted(pairs[:_NAMED]))


def _pairs(many: np.ndarray, total: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of positions ``(i, i + 1), ..., (i, i + many_i)`` for all i, `total` pairs at most."""
    ends = np.cumsum(many)
    for start in range(0, total, _PAIRS):
        k = np.arange(start, min(start + _PAIRS, total))
        i = np.searchsorted(ends, k, side="right")
        yield i, i + 1 + k - (ends[i] - many[i])


def _some(pairs: list[tuple[int, int]], total: int | None = None, most: int = 5) -> str:
    total = len(pairs) if total is None else total
    return ", ".join(str(p) for p in pairs[:most]) + (f" and {total - most} more" if total > most else "")


# --- E: expressivity --------------------------------------------------------------------------------------------------

_EXPRESSIVITY = "Expressivity: rank M = N for almost every wide layer"


@checked
def certify_expressivity(
    model: nn.Module,
    X: Float[Tensor, "N ..."],
    *,
    last: nn.Module | None = None,
    seed: int = 0,
    batch: int = BATCH,
) -> Certificate:
    """Show that ``rank M = N`` for almost every ``(A, a)``, over the present lower layers: sufficient and cheap.

    Theorem (lesson 3): let sigma be real-analytic, not a polynomial, and ``m >= N - 1`` (``m >= N`` if the last layer
    has no bias). If the lower layers' outputs ``xi_i`` are pairwise distinct, almost every ``(A, a)`` gives
    ``rank M = N``. It says nothing about the rank at the present ``(A, a)``, nor about the size of ``sigma_N``.

    The ``xi_i`` are enclosed in float64 and told apart by `separation`, at the cost of forward passes and a sort.

    Args:
        model: any module with one input that ends in dense layer, activation, dense layer.
        X: inputs ``(N, ...)``, float32 or float64, taken as exact.
        last: the last layer; None for the last ``nn.Linear`` that the model calls.
        seed: of the random projection; any value gives a proof.
        batch: rows evaluated at once.

    Returns:
        A certificate. Its reason, when it does not hold, begins with one of ``no_enclosure``, ``architecture``,
        ``bias``, ``activation``, ``width``, ``equal_inputs``, ``not_separated``. Quantities: ``rank``,
        ``width_needed``, ``pairs_inspected``, ``largest_radius``, ``least_gap`` (of the sorted projections).

    Raises:
        TypeError: model not a module, `last` not an ``nn.Linear``, or X not floating point.
        ValueError: X empty, NaN or infinite, or `last` not a part of the model.

    Source: derived in lesson 3, after the expressivity condition of Kawaguchi and Sun (2021).
    """
    X = modules.inputs(X)
    try:
        end = head(model, last)
    except NoEnclosure as error:
        return silent(_EXPRESSIVITY, [], f"no_enclosure: {error}")
    if end.problem:
        return silent(_EXPRESSIVITY, [], end.problem)
    rows, reason = _expressive_rows(end, X)
    if reason:
        return silent(_EXPRESSIVITY, rows, reason)
    try:
        xi, D = modules.enclose(end.network, X, before=end.wide, batch=batch)
        if xi.ndim != 2:
            raise NoEnclosure(f"the wide layer's input has shape {tuple(xi.shape[1:])} a sample, not a vector")
        found = separation(xi, D, seed=seed)
    except NoEnclosure as error:
        return silent(_EXPRESSIVITY, rows, f"no_enclosure: {error}")
    radius = float(D.max())
    status = "certified" if radius else "exact"
    rows.append(compare("pairs ξ_i, ξ_j not shown distinct", found.unresolved, "=", 0, status))
    if found.unresolved:
        pairs = _some(found.pairs, found.unresolved)
        reason = f"not_separated: the lower features of samples {pairs}, known up to {radius:.1e}"
        return silent(_EXPRESSIVITY, rows, reason)
    sorted_z = found.projection.sort().values
    quantities = {
        "rank": len(X),
        "width_needed": rows[1].required,
        "pairs_inspected": found.inspected,
        "largest_radius": radius,
        "least_gap": float(sorted_z.diff().min()) if len(X) > 1 else math.inf,
    }
    return Certificate(_EXPRESSIVITY, True, tuple(rows), quantities)


def _expressive_rows(end: Head, X: Tensor) -> tuple[list[Assumption], str]:
    """What can be said without evaluating the network: data, width, bias, activation; and the first failure."""
    groups = equal_inputs(X)
    N, distinct = len(X), int(groups.max()) + 1
    m, needed = end.last.in_features, N - 1 if end.last.bias is not None else N
    rows = [
        compare("equal inputs", N - distinct, "=", 0, "exact"),
        compare("width m", m, ">=", needed, "exact"),
        compare("σ analytic, not a polynomial", end.analytic, "is", True, "exact"),
    ]
    if end.wide is None:
        return rows, f"architecture: {end.activation} before the last layer, not an activation after a dense layer"
    rows.append(compare("the wide layer has a bias", end.wide.bias is not None, "is", True, "exact"))
    if end.network.shared(end.wide):
        return rows, "architecture: the wide layer is used twice or shares its parameters"
    if not rows[2].holds:
        return rows, f"activation: {end.activation} is {_why_not(end.activation)}"
    if (beta := _sharpness(end)) is not None and not 0 < beta < math.inf:
        return rows, f"activation: {end.activation} has beta = {beta}; a positive number is needed"
    if not rows[3].holds:
        return rows, "bias: the wide layer has none, and odd activations then lose rank"
    if not rows[1].holds:
        return rows, f"width: m = {m}; at least {needed} is needed for N = {N}"
    if not rows[0].holds:
        pairs = _some(equal_pairs(groups))
        return rows, f"equal_inputs: samples {pairs} are equal, and so are their features at every width"
    return rows, ""


def _why_not(activation: str) -> str:
    """What is wrong with an activation that is not listed, and the repair where there is one."""
    name = activation.lower()
    if "softplus" in name:
        return "clipped, not analytic; use companion.networks.Softplus"
    if "relu" in name:
        return "not analytic; companion.networks.Softplus is"
    return "not listed"


def _sharpness(end: Head) -> float | None:
    """The softplus' beta at the time of asking, which may have been set by hand; None for another activation."""
    (node,) = end.network.calls(end.last)
    layer = end.network.layer(node.args[0])
    return float(layer.beta) if isinstance(layer, Softplus) else None
