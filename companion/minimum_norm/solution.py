"""Result 4, minimum norm (Satpathi and Srikant 2021): where gradient descent on a wide ReLU layer stops.

The network is ``f(x) = sum_r a_r relu(w_r.x) / sqrt(m)`` with fixed signs ``a_r = +-1``; the loss is
``0.5 * ||f(X) - y||^2``.  J is the Jacobian of the N outputs, ``G = J J^T``, ``e = y - f``; an index 0 means "at the
initial weights".  The minimum-norm solution ``w* = w_0 + J_0^T G_0^-1 e_0`` is the point nearest to ``w_0`` that fits
the data *linearly*; `solve` finds it, `train` follows the distance of gradient descent to it, and three certificates
bound that distance: `formula` from the kernel alone, `certify` from the initial weights, `certify_after` from any later
ones.  Weights are ``(d, m)`` or ``(S, d, m)``, signs ``(m,)`` or ``(S, m)``, targets ``(N,)`` or ``(S, N)``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, descent, kernels, rigor
from companion.certificate import Assumption, Certificate, assumed, compare
from companion.minimum_norm import first_layer, gates
from companion.minimum_norm.gates import SLACK, Loop, Problem, fragile_counts, largest_eigenvalue
from companion.minimum_norm.kernel_limit import (
    Constant,
    Generalization,
    KernelFit,
    equal_norm,
    generalization_bound,
    kernel_regression,
    perp_constant,
    perp_constant_n1,
    spectrum_bounds,
)

__all__ = [
    "Constant", "Generalization", "KernelFit", "Lyapunov", "MinimumNorm", "certify", "certify_after", "figure_1_data",
    "formula", "fragile_counts", "function_bound", "generalization_bound", "initialize", "kernel_regression",
    "linear_gd", "lyapunov_terms", "perp_constant", "perp_constant_n1", "safe_step", "solve", "spectrum_bounds",
    "train",
]  # fmt: skip


def initialize(
    d: int,
    m: int,
    *,
    kappa: float = 1.0,
    antisymmetric: bool = True,
    S: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "S d m"], Float[Tensor, "S m"]]:
    """Draw ``w_r ~ N(0, kappa^2 I)`` and ``a_r = +-1``; antisymmetric: mirrored pairs (w, +1), (w, -1), so ``f_0 = 0``.

    Args:
        d: inputs, any lift included.
        m: neurons, even if antisymmetric.
        kappa: standard deviation.
        antisymmetric: mirrored pairs instead of independent signs.
        S: number of networks.
        generator: CPU generator; None for seed 0.

    Returns:
        ``W0`` ``(S, d, m)`` and ``signs`` ``(S, m)``, float64; the columns r and r + m/2 are a mirrored pair.
    """
    if min(d, m, S) < 1 or (antisymmetric and m % 2):
        raise ValueError(f"d, m, S are {d}, {m}, {S}; positive numbers are needed, and an even m for mirrored pairs")
    if not (math.isfinite(kappa) and kappa > 0):
        raise ValueError(f"kappa is {kappa}; a positive finite number is needed")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = m // 2 if antisymmetric else m
    W = torch.randn(S, d, drawn, generator=generator, dtype=torch.float64).mul_(kappa)
    if antisymmetric:
        one = torch.ones(S, drawn, dtype=torch.float64)
        return torch.cat([W, W], dim=2), torch.cat([one, -one], dim=1)
    return W, torch.randint(0, 2, (S, m), generator=generator).double().mul_(2).sub_(1)


def figure_1_data(seed: int = 11, *, bias: bool = False) -> tuple[Float[Tensor, "100 d"], Float[Tensor, " 100"]]:
    """Draw the data of the paper's Figure 1: ``x`` uniform in ``[-1, 1]^5``, scaled to norm 1; ``y = (x . beta)^2``.

    The paper prints neither the law of ``beta`` (standard normal here) nor whether its bias is used in the figure.

    Args:
        seed: of the data.
        bias: append a one to every input, as the paper's theory does.

    Returns:
        ``X`` ``(100, 5)``, or ``(100, 6)`` with the bias, and ``y`` ``(100,)``, standardized (divisor 99); float64.
    """
    g = torch.Generator().manual_seed(seed)
    X = data.unit_rows(2 * torch.rand(100, 5, generator=g, dtype=torch.float64) - 1)
    y = (X @ torch.randn(5, generator=g, dtype=torch.float64)) ** 2
    y = (y - y.mean()) / y.std()
    return (torch.cat([X, X.new_ones(100, 1)], 1) if bias else X), y


def safe_step(X: Float[Tensor, "N d"]) -> float:
    """``1 / ||X||_2^2``: every ``G(w)`` has norm at most ``||X||_2^2``, so that ``eta lambda_max <= 1``."""
    return 1 / float(torch.linalg.matrix_norm(X.double(), 2)) ** 2


def _checked(
    X: Tensor, y: Tensor, W0: Tensor, signs: Tensor, *, precise: bool, geometry: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The targets as (S, N), weights as (S, d, m), signs as (S, m), or one clear sentence about what is wrong."""
    data.check(X, geometry=geometry)
    if isinstance(y, Tensor) and y.ndim == 2 and y.shape[1] == 1 and len(y) == len(X):
        y = y[:, 0]
    if not isinstance(y, Tensor) or y.dtype != X.dtype or y.device != X.device:
        found = f"{y.dtype} on {y.device}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y is {found}; a tensor of {X.dtype} on {X.device}, like X, is needed")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("y holds NaN or infinity; finite numbers are needed")
    W0, signs = first_layer.check_layer(X, W0, signs)
    if y.shape not in ((len(X),), (len(W0), len(X))):
        raise ValueError(f"y has shape {tuple(y.shape)}; ({len(X)},) or {(len(W0), len(X))} is needed")
    if precise and X.dtype != torch.float64:
        raise TypeError(f"X has dtype {X.dtype}; the decomposition and the certificates need float64")
    (_, d, m), N = W0.shape, len(X)
    if precise and m * d < N:
        raise ValueError(f"W0 has m d = {m} x {d} weights for N = {N} samples; G_0 is singular unless m d >= N")
    pairs = data.degeneracies(X).antipodal_pairs if geometry else []
    if pairs:
        i, j = pairs[0]
        warnings.warn(
            f"X has antipodal rows {i}, {j}: the paper excludes them; without a bias no neuron is open at both",
            stacklevel=3,
        )
    return y.expand(len(W0), -1), W0, signs


def _steps(step: float | Tensor, S: int, like: Tensor) -> Tensor:
    if not isinstance(step, float | int | Tensor):
        raise TypeError(f"step is {type(step).__name__}; a number, or a tensor with one for each network, is needed")
    eta = torch.as_tensor(step, dtype=torch.float64)
    if eta.shape not in ((), (S,)) or not bool((torch.isfinite(eta) & (eta > 0)).all()):
        raise ValueError(f"step is {eta.tolist()}; a positive finite number, or {S} of them, is needed")
    return eta.to(like).expand(S)


# --- the minimum-norm solution ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinimumNorm:
    """The minimum-norm solution of the linearized problem, ``w* = w_0 + J_0^T alpha``, ``alpha = G_0^-1 e_0``.

    Args:
        X: inputs ``(N, d)``.
        y: targets ``(S, N)``.
        W0: initial weights ``(S, d, m)``.
        signs: ``(S, m)``.
        gram: ``G_0`` ``(S, N, N)``.
        factor: its lower Cholesky factor.
        alpha: ``(S, N)``.
        W: ``w*`` ``(S, d, m)``.
        norm2: ``||w* - w_0||^2 = e_0.alpha``, ``(S,)``.
    """

    X: Tensor
    y: Tensor
    W0: Tensor
    signs: Tensor
    gram: Tensor
    factor: Tensor
    alpha: Tensor
    W: Tensor
    norm2: Tensor

    def split(self, W: Float[Tensor, "*S d m"]) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
        """Compute ``V_parallel = ||P_0 (w - w*)||^2`` and ``V_perp = ||(I - P_0)(w - w*)||^2``.

        P_0 projects on the range of ``J_0^T``, with the gates of the initial weights: one ``J_0 v``, one solve, one
        ``J_0^T``, O(N m d). The projection is subtracted before the norm is taken, so that a small ``V_perp`` keeps
        its digits.

        Args:
            W: weights ``(S, d, m)`` or ``(d, m)``.

        Returns:
            ``V_parallel`` and ``V_perp``, each ``(S,)``.
        """
        v = (W[None] if W.ndim == 2 else W) - self.W
        u = first_layer.tangent(self.X, self.W0, self.signs, v)
        c = torch.cholesky_solve(u[..., None], self.factor)[..., 0]
        v -= first_layer.pull_back(self.X, self.W0, self.signs, c)
        return (u * c).sum(-1), v.square_().sum((1, 2))

    def predict(self, Z: Float[Tensor, "M d"]) -> Float[Tensor, "S M"]:
        """``f_L(z, w*)``: the linearization at ``w_0`` of the network, evaluated at the minimum-norm solution."""
        return first_layer.tangent(Z, self.W0, self.signs, self.W)


def solve(X: Float[Tensor, "N d"], y: Tensor, W0: Tensor, signs: Tensor) -> MinimumNorm:
    """Minimize ``||w - w_0||`` subject to ``J_0 w = y``: one streamed Gram matrix, one Cholesky, one ``J_0^T``.

    Args:
        X: inputs ``(N, d)``, float64, any lift included.
        y: targets ``(N,)``, or ``(S, N)`` with each network's own.
        W0: initial weights ``(d, m)`` or ``(S, d, m)``.
        signs: ``(m,)`` or ``(S, m)``, +1 or -1.

    Returns:
        A `MinimumNorm`.

    Raises:
        TypeError: float32 or another dtype than float64.
        ValueError: duplicate directions (the pair is named), ``m d < N``, NaN, wrong shapes, or a ``G_0`` that is
            singular in floating point.
    """
    y, W0, signs = _checked(X, y, W0, signs, precise=True, geometry=True)
    gram = first_layer.empirical_gram(X, W0)
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool(info.any()):
        s = int(info.nonzero()[0, 0])
        small = float(torch.linalg.eigvalsh(gram[s])[0])
        raise ValueError(f"G_0 of network {s} has smallest eigenvalue {small:.1e}; a wider layer is needed")
    e0 = y - first_layer.forward(X, W0, signs)
    alpha = torch.cholesky_solve(e0[..., None], factor)[..., 0]
    W = W0 + first_layer.pull_back(X, W0, signs, alpha)
    return MinimumNorm(X, y, W0, signs, gram, factor, alpha, W, (e0 * alpha).sum(-1))


def linear_gd(solution: MinimumNorm, step: float | Tensor, k: int) -> tuple[Float[Tensor, "S d m"], Tensor]:
    """Compute gradient descent on the linearized network, ``w_k = w_0 + J_0^T sum_{l<k} eta (I - eta G_0)^l e_0``.

    Args:
        solution: from `solve`.
        step: eta.
        k: the number of steps.

    Returns:
        ``w_k`` ``(S, d, m)`` and the residual ``(I - eta G_0)^k e_0`` ``(S, N)``.
    """
    s, eta = solution, _steps(step, len(solution.W0), solution.X)
    e0 = (s.gram @ s.alpha[..., None])[..., 0]
    values, U = torch.linalg.eigh(s.gram)
    shrink = (1 - eta[:, None] * values) ** k
    c = (U.mT @ e0[..., None])[..., 0]
    moved = (U @ (c * (1 - shrink) / values)[..., None])[..., 0]
    return s.W0 + first_layer.pull_back(s.X, s.W0, s.signs, moved), (U @ (c * shrink)[..., None])[..., 0]


class Lyapunov(NamedTuple):
    """The terms of the Lyapunov identity at one iterate, each ``(S,)``.

    ``change`` is ``(||w_{k+1} - w*||^2 - ||w_k - w*||^2) / 2`` as the identity gives it; ``perp_next`` and
    ``parallel_next`` bound ``sqrt(V_perp)`` and ``sqrt(V_parallel)`` of the next iterate (if ``eta lambda_max(G_0) <=
    1``); ``e``, ``b``, ``drift`` and ``gap`` are ``||e_k||``, ``||b_k||``, ``||J_k - J_0||`` and ``||f - f_L||``.
    """

    V_parallel: Tensor
    V_perp: Tensor
    change: Tensor
    perp_next: Tensor
    parallel_next: Tensor
    e: Tensor
    b: Tensor
    drift: Tensor
    gap: Tensor


def lyapunov_terms(solution: MinimumNorm, W: Float[Tensor, "*S d m"], step: float | Tensor) -> Lyapunov:
    """Evaluate ``(V_{k+1} - V_k) / 2 = eta (-||e||^2 + e.b) + eta^2 / 2 ||J^T e||^2``, which holds at every step.

    Here ``V = ||w - w*||^2`` and ``b = (J_0 - J_k) w* = y - J_k w*``; ``||J_k - J_0||^2`` is the largest eigenvalue of
    ``X X^T`` times the counts of changed gates.

    Args:
        solution: from `solve`.
        W: the iterate ``(S, d, m)`` or ``(d, m)``.
        step: eta, one for all networks or ``(S,)``.

    Returns:
        `Lyapunov`. Source: the Lyapunov identity, derived in lesson 4.
    """
    s = solution
    W = W[None] if W.ndim == 2 else W
    eta = _steps(step, len(s.W0), s.X)
    e = s.y - first_layer.forward(s.X, W, s.signs)
    b = s.y - first_layer.tangent(s.X, W, s.signs, s.W)
    gap = s.y - e - first_layer.tangent(s.X, s.W0, s.signs, W)
    pushed = (e * (first_layer.empirical_gram(s.X, W) @ e[..., None])[..., 0]).sum(-1)
    change = eta * ((e * b).sum(-1) - e.square().sum(-1)) + 0.5 * eta**2 * pushed
    flips = torch.zeros_like(s.gram, dtype=torch.int64)
    for (_, Z0), (_, Z) in zip(first_layer.panels(s.X, s.W0), first_layer.panels(s.X, W), strict=True):
        moved = (Z > 0).to(torch.int8) - (Z0 > 0).to(torch.int8)
        first_layer.add_counts(flips, moved, moved)
    drift = largest_eigenvalue((s.X @ s.X.T) * flips / s.W0.shape[2]).sqrt()
    norm_e, norm_b, norm_gap = (torch.linalg.vector_norm(v, dim=1) for v in (e, b, gap))
    parallel, perp = s.split(W)
    spectrum = torch.linalg.eigvalsh(s.gram)
    kick = eta * drift * norm_e
    sideways = (1 - eta * spectrum[:, 0]) * parallel.clamp_min(0).sqrt() + eta * spectrum[:, -1].sqrt() * norm_gap
    return Lyapunov(parallel, perp, change, perp.sqrt() + kick, sideways + kick, norm_e, norm_b, drift, norm_gap)


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    X: Float[Tensor, "N d"],
    y: Tensor,
    W0: Tensor,
    signs: Tensor,
    step: float | Float[Tensor, " S"],
    steps: int,
    *,
    solution: MinimumNorm | None = None,
    decompose: bool = True,
    chunk: int | None = None,
    gate_bytes: int = 2**30,
    **options: Any,
) -> descent.Run:
    """Gradient descent ``w_{k+1} = w_k + eta J_k^T (y - f(w_k))`` on the wide layer, with its distance to ``w*``.

    Args:
        X: inputs ``(N, d)``; float64, or float32 with ``decompose=False``.
        y: targets ``(N,)`` or ``(S, N)``.
        W0: initial weights ``(d, m)`` or ``(S, d, m)``, not touched.
        signs: ``(m,)`` or ``(S, m)``.
        step: eta for the loss ``0.5 * ||f - y||^2``, one number or ``(S,)``.
        steps: number of steps.
        solution: what `solve` returned, to save its repetition.
        decompose: record ``V_parallel`` and ``V_perp``.
        chunk: neurons in a panel, see `first_layer.WideStep`.
        gate_bytes: memory for the gates, see `first_layer.WideStep`.
        **options: of `descent.iterate`: every, observe, progress, checkpoint, on_divergence, ...

    Returns:
        A `descent.Run` whose ``residual`` is ``||e_k||`` ``(T, S)``; ``observed`` holds ``V_parallel`` and ``V_perp``
        ``(T, S)`` unless ``decompose=False``.

    Warns:
        UserWarning: ``eta lambda_max(G_0) >= 2``: even a loss of zero then says nothing about the distance.

    Raises:
        TypeError, ValueError: as `solve`; `descent.Diverged` if the loss becomes infinite or NaN.
    """
    y, W0, signs = _checked(X, y, W0, signs, precise=decompose, geometry=decompose)
    eta = _steps(step, len(W0), X)
    if decompose and solution is None:
        solution = solve(X, y, W0, signs)
    gram = first_layer.empirical_gram(X, W0) if solution is None else solution.gram
    _warn_large(eta * largest_eigenvalue(gram))
    observe = dict(options.pop("observe", None) or {})
    if decompose:
        last: dict[int, tuple[Tensor, Tensor]] = {}

        def split(state: descent.State) -> tuple[Tensor, Tensor]:
            if state.step not in last:  # both observables ask for the same decomposition
                last.clear()
                last[state.step] = solution.split(state.weights[0])
            return last[state.step]

        observe |= {"V_parallel": lambda state: split(state)[0], "V_perp": lambda state: split(state)[1]}
    step_ = first_layer.WideStep(X, y, signs, eta, chunk, gate_bytes)
    config = {"X": X, "y": y.contiguous(), "signs": signs.contiguous(), "step": eta.contiguous(), "chunk": step_.chunk}
    return descent.iterate([W0], step_, steps, observe=observe, config=config, size=step, **options)


def _warn_large(product: Tensor) -> None:
    if bool((product >= 2).any()):
        warnings.warn(
            f"step times λ_max(G_0) is {float(product.max()):.2f}, at least 2: the linear dynamics is unstable, and "
            "even zero loss would not mean minimum norm",
            stacklevel=3,
        )


def _prepare(
    X: Tensor, y: Tensor, W0: Tensor, signs: Tensor, W: Tensor, step: float | Tensor, reference: str, level: str
) -> tuple[Problem, Tensor, Tensor, Tensor, Certificate | None]:
    """The checked problem around W, targets, initial weights and signs, and a refusal if the kernel is singular."""
    if reference not in ("gate", "midpoint"):
        raise ValueError(f"reference is {reference!r}; 'gate' or 'midpoint' is needed")
    if level not in ("measured", "certified"):
        raise ValueError(f"level is {level!r}; 'measured' or 'certified' is needed")
    y, W0, signs = _checked(X, y, W0, signs, precise=True, geometry=False)
    W = W[None] if isinstance(W, Tensor) and W.ndim == 2 else W
    if isinstance(W, Tensor) and W.shape != W0.shape:
        raise ValueError(f"W has shape {tuple(W.shape)}, W0 has {tuple(W0.shape)}; they must be equal")
    W, _ = first_layer.check_layer(X, W, signs)
    eta, certified = _steps(step, len(W), X), level == "certified"
    found = data.degeneracies(X)
    bad = [*found.parallel_pairs, *(found.antipodal_pairs if found.antipodal_dependent else [])]
    bad = [(i, i) for i in found.zero_rows] + bad
    line = Assumption("directions of the inputs distinct", not bad, "is", True, "measured", not bad)
    refusal = None
    if bad:
        reason = f"kernel singular: inputs {bad[0][0]}, {bad[0][1]}"
        refusal = Certificate("Counting theorem", False, (line,), {}, reason)
    e = y - first_layer.forward(X, W, signs)
    norm_e = torch.linalg.vector_norm(e, dim=1)
    if certified:
        norm_e = norm_e * (1 + SLACK) + gates.output_error(X, W, e)
    problem = Problem(X, W, e, norm_e, eta, first_layer.empirical_gram(X, W), certified)
    if refusal is None:
        _warn_large(eta * largest_eigenvalue(problem.gram))
    return problem, y, W0, signs, refusal


def certify(
    X: Float[Tensor, "N d"],
    y: Tensor,
    W0: Tensor,
    signs: Tensor,
    *,
    step: float | Float[Tensor, " S"],
    reference: str = "midpoint",
    level: str = "measured",
) -> Certificate:
    """Before training: does the counting theorem hold, and how far from ``w*`` can gradient descent end?

    Args:
        X: inputs ``(N, d)``, float64.
        y: targets ``(N,)`` or ``(S, N)``.
        W0: initial weights ``(d, m)`` or ``(S, d, m)``.
        signs: ``(m,)`` or ``(S, m)``.
        step: eta.
        reference: ``"gate"`` (around ``G_0``) or ``"midpoint"`` (around a mean of two, which closes earlier).
        level: ``"measured"``, or ``"certified"`` with every rounding error bounded; the theorem is then one about
            gradient descent in exact arithmetic from these stored numbers.

    Returns:
        A `Certificate`; for an ensemble that of the first network that is not shown (else of the first), and all in
        ``members``. ``quantities``: ``rate`` (``||e_k|| <= (1 - rate)^k ||e_0||``), ``Q_star``, ``lambda``,
        ``epsilon``, ``perp`` (bounds ``sqrt(V_perp)`` at every k), ``parallel`` and ``distance`` (in the limit),
        ``movement`` (bounds ``||w_k - w_0||``), ``b`` (bounds ``||b_k||``), ``fragile`` (fraction of gates),
        ``e_0``, and ``trivial = ||w_0 - w*||``, the distance of not training at all.

    Raises:
        TypeError, ValueError: as `solve`, except that a singular kernel gives ``holds=False``.

    Source: the counting theorem and its midpoint variant, derived in lesson 4.
    """
    p, _, W0, _, refusal = _prepare(X, y, W0, signs, W0, step, reference, level)
    if refusal is not None:
        return refusal
    loop, lam0 = gates.close_loop(p, reference), p.smallest(p.gram)
    m, up, size = p.W.shape[2], 1 + (SLACK if p.certified else 0), gates.sizes(X, p.certified)
    reached = torch.where(loop.closed, loop.Q_star, torch.nan)
    beta = p.norm(size * loop.counts.both / m).sqrt() * up
    sets = loop.counts.both.diagonal(dim1=1, dim2=2)
    D = torch.linalg.vector_norm(gates.reach_of(X, p.certified) * reached[:, None] * sets / m, dim=1) * up
    perp, parallel = beta * reached * up, D / lam0.sqrt() * up
    alpha = torch.linalg.solve(p.gram, p.e[..., None])[..., 0] if bool((lam0 > 0).all()) else p.e * torch.inf
    norm_alpha = p.norm_e / lam0 if p.certified else torch.linalg.vector_norm(alpha, dim=1)
    values = _rates(p, loop) | {
        "perp": perp,
        "parallel": parallel,
        "distance": torch.hypot(perp, parallel) * up,
        "b": (1 + norm_alpha / reached) * D * up,
        "fragile": sets.double().mean(1) / m,
        "trivial": (p.e * alpha).sum(-1).clamp_min(0).sqrt(),
    }
    name = f"Counting theorem ({reference}), before training"
    return _assemble(name, p, loop, lam0, reference, values)


def certify_after(
    X: Float[Tensor, "N d"],
    y: Tensor,
    W0: Tensor,
    signs: Tensor,
    W: Tensor,
    *,
    step: float | Float[Tensor, " S"],
    reference: str = "midpoint",
    level: str = "measured",
    solution: MinimumNorm | None = None,
) -> Certificate:
    """After K steps: gradient descent from W converges, and ``| ||w_inf - w*|| - ||W - w*|| | <= ||X|| Q_star``.

    The same inequalities as in `certify`, around W instead of ``w_0``; ``w*`` still belongs to ``w_0``.

    Args:
        X: inputs ``(N, d)``, float64.
        y: targets.
        W0: initial weights.
        signs: signs.
        W: the weights reached, the shape of `W0`.
        step: eta.
        reference: as in `certify`.
        level: as in `certify`; the distance of W to ``w*`` itself stays measured.
        solution: what `solve` returned for `W0`, to save its repetition.

    Returns:
        A `Certificate` with ``rate``, ``Q_star``, ``lambda``, ``epsilon``, ``e_0`` (the residual at W), ``movement``
        (from W on), ``here = ||W - w*||``, and ``distance_low``, ``distance_high`` around ``||w_inf - w*||``.

    Raises:
        TypeError, ValueError: as `certify`.

    Source: the counting theorem (a), (b), (f), derived in lesson 4.
    """
    p, y, W0, signs, refusal = _prepare(X, y, W0, signs, W, step, reference, level)
    if refusal is not None:
        return refusal
    solution = solve(X, y, W0, signs) if solution is None else solution
    loop = gates.close_loop(p, reference)
    values = _rates(p, loop)
    here = torch.linalg.vector_norm(p.W - solution.W, dim=(1, 2))
    values |= {
        "here": here,
        "distance_low": (here - values["movement"]).clamp_min(0),
        "distance_high": here + values["movement"],
    }
    name = f"Counting theorem ({reference}), after training"
    return _assemble(name, p, loop, p.smallest(p.gram), reference, values)


def _rates(p: Problem, loop: Loop) -> dict[str, Tensor]:
    norm_X = rigor.spectral_norm_upper(p.X) if p.certified else float(torch.linalg.matrix_norm(p.X, 2))
    reached = torch.where(loop.closed, loop.Q_star, torch.nan)
    return {
        "lambda": loop.lam,
        "epsilon": loop.eps,
        "rate": p.eta * (loop.lam - loop.eps) * (1 - SLACK if p.certified else 1),
        "Q_star": reached,
        "movement": norm_X * reached * (1 + (SLACK if p.certified else 0)),
        "e_0": p.norm_e,
    }


def _assemble(
    name: str, p: Problem, loop: Loop, lam0: Tensor, reference: str, values: dict[str, Tensor]
) -> Certificate:
    """One certificate for each network, and the first that is not shown in front."""
    status, (S, d, m) = "certified" if p.certified else "measured", p.W.shape
    made = []
    for s in range(S):
        lam, eps = float(loop.lam[s]), float(loop.eps[s])
        rows = [
            Assumption("directions of the inputs distinct", True, "is", True, status if lam > 0 else "measured", True),
            compare("m d, against N", m * d, ">=", len(p.X), "exact"),
            compare("λ = λ_min(G₀)", float(lam0[s]), ">", 0.0, status),
        ]
        if reference == "midpoint":
            rows.append(compare("λ = λ_min of the midpoint Gram matrix", lam, ">", 0.0, status))
        product = float(p.eta[s] * loop.top[s]) * (1 + (SLACK if p.certified else 0))
        rows += [
            compare("η λ_max", product, "<=", 1.0, status),
            compare("ε (fragile gates), against λ", eps, "<", lam, status),
            compare("Q*, against Q", float(loop.Q_star[s]), "<=", float(loop.Q[s]), status),
            assumed("full-batch gradient descent in exact arithmetic"),
        ]
        holds = all(a.holds for a in rows)
        reason = ""
        if not holds and product > 1:
            reason = f"step too large: η λ_max = {product:.3g}"
        elif not holds and not float(lam0[s]) > 0:
            reason = f"kernel singular: λ = {float(lam0[s]):.3g}"
        elif not holds and not float(loop.first[s]) < 1:
            reason = f"too many fragile gates: ε/λ = {float(loop.first[s]):.3g}"
        elif not holds:
            reason = "no Q closes the loop"
        kept = {key: float(v[s]) for key, v in values.items() if holds or math.isfinite(float(v[s]))}
        made.append(Certificate(name, holds, tuple(rows), kept, reason))
    if S == 1:
        return made[0]
    front = next((c for c in made if not c.holds), made[0])
    return Certificate(front.theorem, front.holds, front.assumptions, front.quantities, front.reason, tuple(made))


def function_bound(
    solution: MinimumNorm, Z: Float[Tensor, "M d"], Q: Float[Tensor, " S"], residual: float | Tensor = 0.0
) -> Float[Tensor, "S M"]:
    """Bound ``|f(z, w_k) - f_L(z, w*)|`` at new inputs z.

    The bound is ``tau_z |S_z| / sqrt(m) + Q ||h_z|| + ||alpha_z|| (||e_k|| + D + Q ||M||)`` with
    ``h_{z,j} = |z.x_j| #{r in S_j: A_r(z) = 1} / m``, ``M_ij = |x_i.x_j| #{r in S_j: A_ri = 1} / m`` and ``alpha_z =
    G_0^-1 J_0 grad f_0(z)``.

    Args:
        solution: from `solve`.
        Z: new inputs ``(M, d)``.
        Q: ``Q_star`` of a certificate from `certify` that holds, for every network ``(S,)``.
        residual: ``||e_k||``; 0 bounds the limit.

    Returns:
        ``(S, M)``. Source: the theorem on functions, derived in lesson 4.
    """
    X, W, m = solution.X, solution.W0, solution.W0.shape[2]
    N, both = len(X), torch.cat([solution.X, Z])
    inner = both @ X.T  # (N + M, N)
    tau = torch.linalg.vector_norm(inner, dim=1) * Q[:, None] / math.sqrt(m)  # (S, N + M)
    near = torch.zeros(len(W), len(both), dtype=torch.int64, device=X.device)
    open_near, open_open = (torch.zeros(len(W), len(both), N, dtype=torch.int64, device=X.device) for _ in range(2))
    for _, P in first_layer.panels(both, W, first_layer.default_chunk(4 * len(W), len(both), m, X)):
        fragile, gate = (P.abs() <= tau[:, :, None]).to(torch.int8), (P > 0).to(torch.int8)
        near += fragile.sum(-1)
        first_layer.add_counts(open_near, gate, fragile[:, :N].contiguous())
        first_layer.add_counts(open_open, gate, gate[:, :N].contiguous())
    flips = inner.abs() * open_near / m
    D = torch.linalg.vector_norm((tau * near)[:, :N] / math.sqrt(m), dim=1)
    h, M = torch.linalg.vector_norm(flips[:, N:], dim=2), torch.linalg.matrix_norm(flips[:, :N], 2)
    alpha = torch.cholesky_solve((inner * open_open / m)[:, N:].mT.contiguous(), solution.factor)
    spread = torch.linalg.vector_norm(alpha, dim=1)
    rest = (torch.as_tensor(residual).to(X) + D + Q * M)[:, None]
    return (tau * near)[:, N:] / math.sqrt(m) + Q[:, None] * h + spread * rest


def formula(
    X: Float[Tensor, "N d"],
    y: Float[Tensor, " N"],
    m: int,
    *,
    step: float,
    kappa: float = 1.0,
    delta: float = 0.05,
    antisymmetric: bool = True,
) -> Certificate:
    """Before drawing the network: the explicit width ``sqrt(m) >= 51.1 n rho^2 ||X|| E / (kappa lambda_0^2)``.

    Then with probability ``1 - 3 delta`` (mirrored pairs: ``1 - 2 delta``) the residual is at most
    ``(1 - eta lambda_0 / 4)^k ||e_0||``, and the limit lies within
    ``31.7 sqrt(n) rho ||X||^(1/2) E^(3/2) / (kappa^(1/2) lambda_0^(3/2) m^(1/4))`` of ``w*``.

    Args:
        X: inputs ``(N, d)`` of equal norm rho.
        y: targets ``(N,)``.
        m: neurons.
        step: eta.
        kappa: standard deviation of the initial weights.
        delta: the probability of each of the three ways to fail.
        antisymmetric: mirrored pairs, ``E = ||y||``; else ``E^2 = (||y||^2 + n kappa^2 rho^2 / 2) / delta``.

    Returns:
        A `Certificate` with ``width`` (the smallest m), ``distance``, ``rate``, ``trivial`` (``sqrt(y.H^-1 y)``) and
        ``informative``, the m at which the bound falls below that.

    Raises:
        ValueError: inputs of unequal norm, or a number out of range.

    Source: the explicit width, derived in lesson 4.
    """
    data.check(X)
    rho, n = equal_norm(X), len(X)
    if not (0 < delta < 1 and kappa > 0 and m >= 1 and step > 0):
        raise ValueError(f"delta, kappa, m, step are {delta}, {kappa}, {m}, {step}; 0 < delta < 1, the rest positive")
    H, norm_X = kernels.relu_ntk(X), float(torch.linalg.matrix_norm(X, 2))
    lam0 = float(torch.linalg.eigvalsh(H)[0])
    E = float(torch.linalg.vector_norm(y))
    if not antisymmetric:
        E = math.sqrt((E**2 + n * (kappa * rho) ** 2 / 2) / delta)
    need = (51.1 * n * rho**2 * norm_X * E / (kappa * lam0**2)) ** 2
    constant = 31.7 * math.sqrt(n) * rho * math.sqrt(norm_X) * E**1.5 / (math.sqrt(kappa) * lam0**1.5)
    trivial = math.sqrt(float(y @ torch.linalg.solve(H, y)))
    rows = [
        compare("λ₀ = λ_min(H)", lam0, ">", 0.0),
        compare("η ‖X‖²", step * norm_X**2, "<=", 1 + 1e-12),
        compare("m", m, ">=", need),
        assumed(f"w_r ~ N(0, κ²I) independent, {'mirrored pairs' if antisymmetric else 'independent signs'}"),
        assumed(f"one of the draws of probability at least {1 - (2 if antisymmetric else 3) * delta:.3g}"),
    ]
    if antisymmetric:
        log = math.log(n / delta)
        rows.insert(3, compare("m/2", m / 2, ">=", 8 * norm_X**2 / lam0 * log))
        rows.insert(
            4, compare("1.59 √m ‖X‖ E/(κ λ₀)", 1.59 * math.sqrt(m) * norm_X * E / (kappa * lam0), ">=", 3 * log)
        )
    holds = all(a.holds for a in rows)
    values = {"width": need, "rate": step * lam0 / 4, "distance": constant * m**-0.25}
    values |= {"trivial": trivial, "informative": max(need, (constant / trivial) ** 4)}
    return Certificate(
        "Explicit width (formula)", holds, tuple(rows), values, "" if holds else f"m is below {need:.3g}"
    )
