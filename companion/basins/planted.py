"""Result 5, basins (Li, Ding and Sun 2018-22): why bad basins disappear when the last hidden layer gets wide.

The network is ``f(x) = sum_j v_j sigma(w_j . x)`` (a bias is a constant column of X), the loss ``0.5 ||f - y||^2``.  A
*basin* is a compact set of weights that is strictly lower than everything nearby; it is bad if it is above ``inf L``.

- `no_basin`: Theorem P' and its corollaries, from integers and exact ranks.
- `plant_bad_minimum`, `exact_bad_minimum`, `touching_points`: bad strict minima below the width (Theorems T and N).
- `certify_strict_minimum`: a proof for one network, in fractions, in balls, or by Kantorovich's theorem.
- `descent_road`, `road_losses`: a road down from every start at width ``m >= q`` (Theorem Q).
- `train_lm_newton`, `classify_endpoints`: where training ends, one class for each kind of end.
- `langevin_exit_times`, `exit_time_pde`, `eyring_kramers`: how long noise needs to leave a bad basin.

The statements are derived in lesson 5; names of theorems are the lesson's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion import rigor
from companion.basins import exact, langevin
from companion.basins.certificates import BOUNDS, certify_strict_minimum, kantorovich
from companion.basins.exact import ExactPoint
from companion.basins.shallow import Trained, check_shallow, dual_function, loss_derivatives
from companion.certificate import Assumption, Certificate, assumed, compare
from companion.networks import Activation, activation

# --- above the width: no basin ----------------------------------------------------------------------------------------

_HOMOGENEOUS = ("relu", "identity")
_QUASI_CONVEX = ("square", "logistic", "convex", "quasi-convex")


def no_basin(
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
    if X is not None and (rank := rigor.exact_rank(X.double())) < X.shape[1]:
        rows = (*smooth, compare("rank X < D", rank, "<", X.shape[1], "exact"))
        return Certificate("Corollary of P': no basin at any width", True, rows, found | {"rank X": rank})
    width = compare(f"width m >= {samples}", m, ">=", needed, "exact")
    convex = Assumption("the loss is quasi-convex", loss, "is", "quasi-convex", "assumed", loss in _QUASI_CONVEX)
    holds = width.holds and convex.holds
    reason = "" if holds else (f"width: m < {samples}" if not width.holds else "loss: quasi-convexity was not given")
    return Certificate("Theorem P': no bad basin", holds, (*smooth, convex, width), found, reason)


# --- below the width: bad strict minima -------------------------------------------------------------------------------


class Planted(NamedTuple):
    """A bad strict minimum: the targets ``Y`` (N, 1), the weights ``[W, V]``, its loss, and a lower competitor."""

    weights: list[Tensor]
    Y: Tensor
    loss: float
    competitor: list[Tensor]
    competitor_loss: float


def plant_bad_minimum(
    W: Float[Tensor, "D m"],
    e: Float[Tensor, " N"],
    X: Float[Tensor, "N D"],
    act: str | Activation,
    tau: float = 1.0,
    *,
    seed: int = 0,
) -> Planted:
    """Theorem N: if ``g_e = 0``, ``grad g_e = 0``, ``s_j Hess g_e > 0``, put ``sign v_j = s_j``, ``y = H v - tau e``.

    The point is then a strict minimum with ``L = tau^2 ||e||^2 / 2``.  One neuron w' beats it as soon as ``|v|`` is
    small enough and ``g_e(w') != 0``; ``|v|`` is halved until that happens.

    Args:
        W: the touching points, shape (D, m).
        e: the normal, shape (N,).
        X: inputs, shape (N, D).
        act: name or `Activation` with two derivatives.
        tau: scale of the residual, positive.
        seed: of the search for the competitor.

    Returns:
        The `Planted` minimum.

    Raises:
        TypeError: not float64.
        ValueError: ``e = 0`` or ``g_e = 0`` everywhere (every minimum is then global), g_e does not touch zero at W,
            its Hessian there is not definite, dependent features, or a tau that is not positive.
            Source: Theorem N, derived in lesson 5.
    """
    D, m = W.shape
    check_shallow([W, W.new_ones(m, 1)], X, None, act)
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau is {tau}; a positive finite number is needed")
    if e.shape != X.shape[:1] or not bool(torch.isfinite(e).all()) or not float(e.abs().max()) > 0:
        raise ValueError(f"e has shape {tuple(e.shape)}; {X.shape[0]} finite numbers, not all zero, are needed")
    sigma = activation(act)
    H = sigma.value(X @ W)  # (N, m)
    pool = torch.randn(D, 4000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pool = pool * torch.logspace(-1, 1, 4000, dtype=torch.float64) / float(X.square().mean().sqrt())
    features = sigma.value(X @ pool)
    sizes = torch.linalg.vector_norm(features, dim=0)
    usable = torch.isfinite(sizes) & (sizes > 0)
    pool, features, sizes = pool[:, usable], features[:, usable], sizes[usable]
    reached = (e @ features).abs() / (sizes * torch.linalg.vector_norm(e))
    if not bool((reached > 1e-10).any()):
        raise ValueError("e is orthogonal to every feature, g_e = 0 everywhere; every minimum with it is global")
    (g,), (grad,), (hess,) = dual_function(e, X, act, W)
    scale = torch.linalg.vector_norm(e) * torch.linalg.vector_norm(H, dim=0).clamp_min(1e-300)
    if bool((g.abs() > 1e-7 * scale).any()) or bool((grad.abs().amax(1) > 1e-6 * scale * X.abs().max()).any()):
        raise ValueError(f"g_e is {g.tolist()} at W with gradients {grad.tolist()}; both must vanish")
    curvature = torch.linalg.eigvalsh(hess)
    signs = torch.where(curvature[:, 0] > 0, 1.0, -1.0).to(W)
    if not bool(((signs * curvature[:, 0] > 0) & (signs * curvature[:, -1] > 0)).all()):
        raise ValueError(f"Hess g_e has eigenvalues {curvature.tolist()} at W; definite ones are needed (Theorem N)")
    if float(torch.linalg.svdvals(H / torch.linalg.vector_norm(H, dim=0))[-1]) < 1e-9:
        raise ValueError("W gives dependent features; independent ones are needed")
    v = signs / torch.linalg.vector_norm(H, dim=0)
    loss = 0.5 * tau**2 * float(e @ e)
    for _ in range(200):
        y = H @ v - tau * e
        c = (features.mT @ y) / sizes**2
        losses = 0.5 * (y @ y - (c * sizes) ** 2)
        best = int(losses.argmin())
        if float(losses[best]) < loss * (1 - 1e-6):
            competitor = [pool[:, best : best + 1].clone(), c[best].reshape(1, 1)]
            return Planted([W.clone(), v[:, None]], y[:, None], loss, competitor, float(losses[best]))
        v = v / 2
    raise ValueError("no competitor was found; another seed or other touching points are needed")


class TouchingPoints(NamedTuple):
    """Starts of `touching_points`: ``e`` (S, N), ``W`` (S, D, m), and for each start what was reached.

    ``touches``: the equations hold with independent features and g_e does not vanish identically; ``definite``: and
    every ``Hess g_e(w_j)`` is definite, so that Theorem N applies.
    """

    e: Tensor
    W: Tensor
    residual: Tensor
    touches: Tensor
    definite: Tensor


def touching_points(
    X: Float[Tensor, "N D"],
    m: int,
    act: str | Activation,
    starts: int,
    generator: torch.Generator,
    *,
    iters: int = 80,
    spread: float = 3.0,
) -> TouchingPoints:
    """Solve ``g_e(w_j) = 0``, ``grad g_e(w_j) = 0`` (j = 1..m), ``|e| = 1`` by damped Gauss-Newton from random starts.

    Equations and features of neuron j are measured in units of its feature vector, so that no neuron solves them by
    fading away.  Failing to find a solution does not show that there is none.

    Args:
        X: inputs, shape (N, D).
        m: number of points at which g_e shall touch zero.
        act: name or `Activation` with two derivatives.
        starts: number S of random starts, all at once.
        generator: a CPU generator.
        iters: iterations.
        spread: standard deviation of the starts' ``w_j``, in units of ``1 / max |X|``.

    Returns:
        The `TouchingPoints`.

    Raises:
        TypeError: X is not float64.
        ValueError: m or starts below 1, or an activation without two derivatives.
    """
    N, D = X.shape
    if m < 1 or starts < 1 or iters < 1:
        raise ValueError(f"m, starts, iters are {m}, {starts}, {iters}; at least 1 of each is needed")
    check_shallow([X.new_ones(D, m), X.new_ones(m, 1)], X, None, act)
    sigma = activation(act)
    size = float(X.abs().amax())
    e = torch.nn.functional.normalize(torch.randn(starts, N, generator=generator, dtype=torch.float64), dim=1).to(X)
    W = (torch.randn(starts, D, m, generator=generator, dtype=torch.float64) * spread / size).to(X)
    damping = torch.full((starts,), 1e-2).to(X)
    F, J = _touching_system(e, W, X, sigma)
    for _ in range(iters):
        K = J @ J.mT
        K.diagonal(dim1=1, dim2=2).add_((damping * F.norm(dim=1).clamp(max=1) + 1e-14)[:, None])
        factor, _ = torch.linalg.cholesky_ex(K)
        delta = (J.mT @ torch.cholesky_solve(F[..., None], factor))[..., 0]
        e_new, W_new = e - delta[:, :N], W - delta[:, N:].view(starts, m, D).mT
        F_new, J_new = _touching_system(e_new, W_new, X, sigma)
        better = F_new.norm(dim=1) < F.norm(dim=1)
        damping = (damping * torch.where(better, 0.25, 4.0)).clamp(1e-12, 1e8)
        pick = better[:, None, None]
        e, W = torch.where(pick[..., 0], e_new, e), torch.where(pick, W_new, W)
        F, J = torch.where(pick[..., 0], F_new, F), torch.where(pick, J_new, J)
    H = sigma.value(X @ W)
    # a neuron that has faded away (sin at w = 0) satisfies everything in the limit
    bounded = (W.abs().amax((1, 2)) * size < 10 + 10 * spread) & (H.square().sum(1).amin(1) > 1e-8)
    H = torch.nn.functional.normalize(H, dim=1)
    residual = F.norm(dim=1)
    independent = torch.linalg.svdvals(H)[:, -1] > 1e-3 if m <= N else torch.zeros_like(bounded)
    _, _, hess = dual_function(e, X, act, W)
    Z = X @ W
    unit = torch.einsum("sn,snj,nd->sj", e.abs(), sigma.second(Z).abs(), X**2)[..., None].clamp_min(1e-300)
    relative = torch.linalg.eigvalsh(hess) / unit
    one_sign = (relative.amin(-1) > 1e-7) | (relative.amax(-1) < -1e-7)
    touches = (residual < 1e-12) & independent & bounded & (relative.abs().amax((1, 2)) > 1e-7)
    return TouchingPoints(e, W, residual, touches, touches & one_sign.all(1))


def _touching_system(e: Tensor, W: Tensor, X: Tensor, sigma: Activation) -> tuple[Tensor, Tensor]:
    """The equations (S, m (1+D) + 1) and their Jacobian in (e, w_1, ..., w_m), scaled by the features' norms."""
    S, D, m = W.shape
    N = len(X)
    Z = X @ W
    H, first, second = sigma.value(Z), sigma.derivative(Z), sigma.second(Z)  # (S, N, m)
    unit = H.square().sum(1).sqrt().clamp_min(1e-300)[:, None]
    H, first, second = H / unit, first / unit, second / unit
    slopes = torch.einsum("snj,nd->sjdn", first, X)  # (S, m, D, N)
    g, grad = torch.einsum("sn,snj->sj", e, H), torch.einsum("sjdn,sn->sjd", slopes, e)
    hess = torch.einsum("sn,snj,nd,nc->sjdc", e, second, X, X)
    norm = 0.5 * (e.square().sum(1, keepdim=True) - 1)
    rows = m * (1 + D) + 1
    J = e.new_zeros(S, rows, N + m * D)
    J[:, :m, :N] = H.mT
    J[:, m:-1, :N] = slopes.reshape(S, m * D, N)
    J[:, -1, :N] = e
    for j in range(m):
        w = slice(N + j * D, N + (j + 1) * D)
        J[:, j, w] = grad[:, j]
        J[:, m + j * D : m + (j + 1) * D, w] = hess[:, j]
    return torch.cat([g, grad.flatten(1), norm], 1), J


# --- exact examples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactMinimum:
    """A bad strict minimum in rationals: the point, the data, and a competitor (its own base is allowed)."""

    point: ExactPoint
    X: tuple[tuple[int, ...], ...]
    y: tuple[Fraction, ...]
    competitor: ExactPoint

    def tensors(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The nearest floating-point ``[W, V]``, X (N, D) and Y (N, 1)."""
        Y = torch.tensor([[float(t)] for t in self.y], dtype=torch.float64)
        return self.point.weights(), torch.tensor(self.X, dtype=torch.float64), Y

    def certificate(self) -> Certificate:
        """The exact certificate of `certify_strict_minimum`."""
        return certify_strict_minimum(
            self.point, self.X, self.y, self.point.act, method="exact", competitor=self.competitor
        )


def exact_bad_minimum(act: str, a: Sequence[int], x: Sequence[int], base: Any) -> ExactMinimum:
    """Theorem N (a) in rationals, one input: ``w_j = a_j u`` on integers x, e from the left kernel of the nodes.

    The nodes ``[sigma(w_j x), x sigma'(w_j x)]`` are 2m rational vectors; any e orthogonal to them with
    ``g_e''(w_j) != 0`` gives a strict minimum for ``y = H v - e``, and v is halved until one neuron beats it.

    Args:
        act: ``"exp"``, ``"sigmoid"``, ``"tanh"`` or ``"sin"``.
        a: m different integers.
        x: N different integers, ``N >= 2 m + 1``.
        base: b with ``u = ln b``, or for sin a rational point ``(cos u, sin u)``.

    Returns:
        The `ExactMinimum`.

    Raises:
        ValueError: inputs that are not integers or repeat, too few of them, a base without rational features, or a
            kernel in which every ``g_e''(w_j)`` vanishes.  Source: Theorem N, derived in lesson 5.
    """
    X = exact.integers([[t] for t in x])
    m, N = len(a), len(X)
    if len(set(a)) < m or m < 1 or len(set(X)) < N:
        raise ValueError(f"a is {list(a)}, x is {list(x)}; different integers are needed")
    if 2 * m >= N:
        raise ValueError(f"x holds {N} inputs; at least 2 m + 1 = {2 * m + 1} are needed for m = {m} neurons")
    point = ExactPoint(act, base, tuple((int(t),) for t in a), (Fraction(1),) * m)
    jets = point.jets(X)
    nodes = [[jets[n][j][0] for n in range(N)] for j in range(m)]
    nodes += [[X[n][0] * jets[n][j][1] for n in range(N)] for j in range(m)]
    kernel = rigor.null_space(nodes)
    e, second = None, []
    for power in range(1, 6):  # combinations of the kernel's basis until no g'' vanishes
        trial = [sum(Fraction((i + 1) ** (power - 1)) * z[n] for i, z in enumerate(kernel)) for n in range(N)]
        second = [sum(trial[n] * jets[n][j][2] * X[n][0] ** 2 for n in range(N)) for j in range(m)]
        if kernel and all(second):
            e = trial
            break
    if e is None:
        raise ValueError(f"g_e'' vanishes at one of a = {list(a)} for every e tried; other a or x are needed")
    size = Fraction(1)
    for _ in range(200):
        v = tuple(size if s > 0 else -size for s in second)
        y = tuple(sum(jets[n][j][0] * v[j] for j in range(m)) - e[n] for n in range(N))
        competitor, lowest = exact.best_exact_neuron(act, base, X, y, reach=2 + max(abs(int(t)) for t in a))
        if lowest < sum(t * t for t in e) / 2:
            return ExactMinimum(ExactPoint(act, base, point.multiples, v), X, y, competitor)
        size /= 2
    raise ValueError("no single neuron with small integer multiples beats the minimum; another base is needed")


def example_e1() -> ExactMinimum:
    """E1: sine, x = (1, 3), y = (-2, -4): a strict minimum at ``(w, v) = (pi/2, 1)`` with ``L = 9``, 0 at (pi/6, -4).

    The competitor stands next to ``(pi/6, -4)``, at the rational rotation with ``sin w = 120/241``.
    """
    competitor = ExactPoint("sin", (Fraction(209, 241), Fraction(120, 241)), ((1,),), (Fraction(-4),))
    point = ExactPoint("sin", (0, 1), ((1,),), (Fraction(1),))
    return ExactMinimum(point, ((1,), (3,)), (Fraction(-2), Fraction(-4)), competitor)


def example_e4() -> ExactMinimum:
    """E4: exp, D = 2, a strict bad minimum at ``w = (-ln 2, 0)``, ``v = 1`` although ``Hess g_e`` is indefinite."""
    X = ((3, 0), (0, 1), (-1, 0), (0, -1))
    y = (Fraction(-23, 8), Fraction(7, 4), Fraction(23, 16), Fraction(7, 4))
    h = [Fraction(4) ** row[0] for row in X]  # features of w = (ln 4, 0)
    c = sum(s * t for s, t in zip(h, y, strict=True)) / sum(s * s for s in h)
    point = ExactPoint("exp", Fraction(2), ((-1, 0),), (Fraction(1),))
    return ExactMinimum(point, X, y, ExactPoint("exp", Fraction(2), ((2, 0),), (c,)))


# --- wider by one neuron ----------------------------------------------------------------------------------------------


def split_neuron(weights: Sequence[Tensor], j: int, shares: Sequence[float]) -> list[Tensor]:
    """Replace neuron j by copies with output weights ``lambda_i v_j``, ``sum_i lambda_i = 1``: the same function.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, K) or without S.
        j: which neuron.
        shares: the ``lambda_i``; any signs.

    Returns:
        ``[W, V]`` with the copies in the place of neuron j.

    Raises:
        ValueError: j out of range, or shares that do not sum to 1.
    """
    W, V = weights
    m = W.shape[-1]
    if not 0 <= j < m:
        raise ValueError(f"j is {j}; one of the neurons 0 to {m - 1} is needed")
    parts = torch.tensor(list(shares), dtype=V.dtype, device=V.device)
    if not len(parts) or abs(float(parts.sum()) - 1) > 1e-12 * max(1.0, float(parts.abs().max())):
        raise ValueError(f"shares are {list(shares)}; numbers with sum 1 are needed")
    column, row = W[..., :, j : j + 1], V[..., j : j + 1, :]
    W = torch.cat([W[..., :, :j], column.expand(*column.shape[:-1], len(parts)), W[..., :, j + 1 :]], -1)
    V = torch.cat([V[..., :j, :], parts[:, None] * row, V[..., j + 1 :, :]], -2)
    return [W.contiguous(), V.contiguous()]


def add_silent_neuron(weights: Sequence[Tensor], w: Float[Tensor, "*S D"]) -> list[Tensor]:
    """Append a neuron with input weights w and output weight 0: the same function, one neuron wider.

    Raises:
        ValueError: w does not have D entries.
    """
    W, V = weights
    if w.shape[-1] != W.shape[-2]:
        raise ValueError(f"w has {w.shape[-1]} entries, the neurons have {W.shape[-2]}; they must be equal")
    W = torch.cat([W, w.expand(*W.shape[:-1])[..., None]], -1)
    return [W, torch.cat([V, V.new_zeros(*V.shape[:-2], 1, V.shape[-1])], -2)]


# --- where training ends ----------------------------------------------------------------------------------------------

CLASSES = ("zero loss", "strict, bad", "strict, best of its starts", "saddle", "degenerate", "drifting", "unconverged")


@dataclass(frozen=True)
class Endpoints:
    """What kind of point every trained network ended at.

    Args:
        label: index into `CLASSES`, (S,).
        smallest: smallest eigenvalue of the Hessian, (S,).
        best: the lowest loss among the starts on the same data, (S,).
        shown: for the strict ones, whether Kantorovich's inequality holds in floating point, (S,).
    """

    label: Int[Tensor, " S"]
    smallest: Float[Tensor, " S"]
    best: Float[Tensor, " S"]
    shown: Bool[Tensor, " S"]

    def fraction(self, name: str) -> float:
        """The fraction of networks in the class `name` of `CLASSES`."""
        return float((self.label == CLASSES.index(name)).double().mean())


def classify_endpoints(
    trained: Trained,
    X: Float[Tensor, "*x N D"],
    Y: Float[Tensor, "*y N 1"],
    act: str | Activation,
    *,
    starts: int,
    tolerance: float = 1e-8,
    zero: float = 1e-14,
) -> Endpoints:
    """Sort end points of training into `CLASSES`, which are never merged.

    ``zero loss``: ``L <= zero ||y||^2``; ``strict``: gradient below the tolerance and ``lambda_min > 1e-7 lambda_max``,
    *bad* if a start on the same data ended lower; ``saddle``: at rest with ``lambda_min < -1e-7 lambda_max``;
    ``degenerate``: at rest otherwise; ``drifting``: parameters large and growing, or at rest beyond 1000;
    ``unconverged``: the rest.  *Best of its starts* does not mean global.

    Args:
        trained: the result of `train_lm_newton`.
        X: inputs, shape (N, D) or (S, N, D).
        Y: targets, shape (N, 1) or (S, N, 1).
        act: the activation used.
        starts: how many consecutive networks share one data set; divides S.
        tolerance: a network is at rest when ``||grad L||`` is below this.
        zero: what counts as zero loss, relative to ``||y||^2``.

    Returns:
        The `Endpoints`.

    Raises:
        ValueError: starts does not divide S.
    """
    S = len(trained.loss)
    if starts < 1 or S % starts:
        raise ValueError(f"starts is {starts}; a divisor of the number {S} of networks is needed")
    smallest, largest = torch.empty_like(trained.loss), torch.empty_like(trained.loss)
    shown = torch.zeros(S, dtype=torch.bool, device=trained.loss.device)
    bounded = activation(act).name in (*BOUNDS, "exp")
    for part in torch.arange(S, device=trained.loss.device).split(1024):
        x, y = (T if T.ndim == 2 else T[part] for T in (X, Y))
        own = [T[part] for T in trained.weights]
        values = torch.linalg.eigvalsh(torch.nan_to_num(loss_derivatives(own, x, y, act).hessian))
        smallest[part], largest[part] = values[:, 0], values[:, -1]
        if bounded:
            shown[part] = kantorovich(own, x, y, act).holds
    best = torch.nan_to_num(trained.loss, nan=math.inf).view(-1, starts).amin(1).repeat_interleave(starts)
    size = torch.maximum(trained.weights[0].abs().amax((1, 2)), trained.weights[1].abs().amax((1, 2)))
    energy = Y.square().sum((-1, -2)).expand(S)
    rest = trained.gradient < tolerance
    strict = rest & (smallest > 1e-7 * largest)
    moving = (size > 8) & (size > 1.02 * trained.halfway)
    label = torch.full((S,), CLASSES.index("unconverged"), device=rest.device)
    order = (
        ("drifting", ~rest & moving),
        ("degenerate", rest),
        ("saddle", rest & (smallest < -1e-7 * largest)),
        ("drifting", rest & ~strict & (size > 1e3)),
        ("strict, best of its starts", strict),
        ("strict, bad", strict & (trained.loss > best * (1 + 1e-6) + 1e-9 * energy)),
        ("zero loss", trained.loss <= zero * energy),
    )
    for name, which in order:
        label = torch.where(which, CLASSES.index(name), label)
    return Endpoints(label, smallest, best, shown)


# --- the exit time of E1 ----------------------------------------------------------------------------------------------


def exit_time_pde(T: float, *, per_unit: int = 40) -> float:
    """Mean time in which noisy descent at temperature T takes E1's bad minimum below ``L = 4.5``, at width 1.

    ``T Lap u - grad L . grad u = -1`` on ``w in [-pi/2, pi/2]`` (the ends are symmetry axes), ``v in [-6, 6]``.

    Args:
        T: temperature.
        per_unit: grid cells for a unit of length.

    Returns:
        ``u(pi/2, 1)``.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def loss(w: Tensor, v: Tensor) -> Tensor:
        return 0.5 * ((v * torch.sin(w) + 2) ** 2 + (v * torch.sin(3 * w) + 4) ** 2)

    box = (-math.pi / 2, math.pi / 2, -6.0, 6.0)
    return langevin.mean_exit_time(loss, T, box, 4.5, per_unit=per_unit).at(math.pi / 2, 1.0)
