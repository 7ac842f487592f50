"""The wide ReLU layer: its start, the minimum-norm solution of its linearization, and descent with its distance to it.

Weights are ``(d, m)`` or ``(S, d, m)``, signs ``(m,)`` or ``(S, m)``, targets ``(N,)`` or ``(S, N)``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, descent, rigor
from companion.arguments import checked
from companion.minimum_norm import first_layer
from companion.minimum_norm.gates import largest_eigenvalue
from companion.minimum_norm.kernel_limit import check_inputs, check_scale


@checked
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
    if not 0 < kappa <= 1e100:
        raise ValueError(f"kappa is {kappa}; a positive number up to 1e+100 is needed")
    generator = torch.Generator("cpu").manual_seed(0) if generator is None else generator
    drawn = m // 2 if antisymmetric else m
    W = torch.randn(S, d, drawn, generator=generator, dtype=torch.float64, device="cpu").mul_(kappa)
    if antisymmetric:
        one = W.new_ones(S, drawn)
        return torch.cat([W, W], dim=2), torch.cat([one, -one], dim=1)
    coins = torch.randint(0, 2, (S, m), generator=generator, dtype=torch.int64, device="cpu")
    return W, coins.double().mul_(2).sub_(1)


@checked
def figure_1_data(
    seed: int = 11, *, bias: bool = False, radius: float = 1.0
) -> tuple[Float[Tensor, "100 d"], Float[Tensor, " 100"]]:
    """Draw data like those of the paper's Figure 1: ``x`` uniform in ``[-1, 1]^5``, then scaled; ``y = (x . beta)^2``.

    ``beta`` is standard normal here. The paper does not print whether its bias is used in the figure; its text scales
    the inputs to norm 1, its theory to ``sqrt(d)``.

    Args:
        seed: of the data.
        bias: append a one to every input, as the paper's theory does.
        radius: the norm of the inputs, before the one is appended; y does not depend on it.

    Returns:
        ``X`` ``(100, 5)``, or ``(100, 6)`` with the bias, and ``y`` ``(100,)``, standardized (divisor 99); float64.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    X = data.unit_rows(2 * torch.rand(100, 5, generator=g, dtype=torch.float64, device="cpu") - 1)
    y = (X @ torch.randn(5, generator=g, dtype=torch.float64, device="cpu")) ** 2
    y, X = (y - y.mean()) / y.std(), radius * X
    return (torch.cat([X, X.new_ones(100, 1)], 1) if bias else X), y


@checked
def safe_step(X: Float[Tensor, "N d"]) -> float:
    """``1 / ||X||_2^2``: every ``G(w)`` has norm at most ``||X||_2^2``, so that ``eta lambda_max <= 1``.

    Raises:
        ValueError: inputs that are all zero, or so large or small that the square is no float.
    """
    check_inputs(X, geometry=False)
    if not bool(X.any()):
        raise ValueError("X is zero; no step is needed to fit nothing")
    return 1 / float(rigor.spectral_norm(X.double())) ** 2


def check_problem(
    X: Tensor, y: Tensor, W0: Tensor, signs: Tensor, *, precise: bool = True, geometry: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The targets as (S, N), weights as (S, d, m), signs as (S, m), or one clear sentence about what is wrong.

    The arguments are finite tensors already; `precise` asks for float64 and ``m d >= N``, `geometry` also for inputs
    whose kernel is not singular.
    """
    check_inputs(X, geometry=geometry)
    y = y[:, 0] if y.shape == (len(X), 1) else y
    if y.dtype != X.dtype or y.device != X.device:
        raise TypeError(f"y is {y.dtype} on {y.device}; a tensor of {X.dtype} on {X.device}, like X, is needed")
    W0, signs = first_layer.check_layer(X, W0, signs)
    check_scale("y", y)
    if y.shape not in ((len(X),), (len(W0), len(X))):
        raise ValueError(f"y has shape {tuple(y.shape)}; ({len(X)},) or {(len(W0), len(X))} is needed")
    if precise and X.dtype != torch.float64:
        raise TypeError(f"X has dtype {X.dtype}; the decomposition needs float64")
    (_, d, m), N = W0.shape, len(X)
    if precise and m * d < N:
        raise ValueError(f"W0 has m d = {m} x {d} weights for N = {N} samples; G_0 is singular unless m d >= N")
    pairs = data.degeneracies(X).antipodal_pairs if geometry else []
    if pairs:
        i, j = pairs[0]
        warnings.warn(
            f"X has antipodal rows {i}, {j}: the paper excludes them; without a bias no neuron is open at both",
            stacklevel=4,
        )
    return y.expand(len(W0), -1), W0, signs


def check_steps(step: float | Tensor, S: int, like: Tensor) -> Tensor:
    """The step of every network ``(S,)``."""
    eta = torch.as_tensor(step, dtype=torch.float64, device=like.device)
    if eta.shape not in ((), (S,)) or not bool(((eta >= 1e-100) & (eta <= 1e100)).all()):
        raise ValueError(f"step is {eta.tolist()}; a positive finite number (1e-100 to 1e+100), or {S}, is needed")
    return eta.to(like).expand(S)


def check_belongs(solution: MinimumNorm | None, X: Tensor, y: Tensor, W0: Tensor, signs: Tensor) -> None:
    """Refuse the solution of another problem: ``w*`` and its projection belong to one ``w_0``."""
    if solution is not None:
        for name, A in (("X", X), ("y", y), ("W0", W0), ("signs", signs)):
            if not torch.equal(getattr(solution, name), A):
                raise ValueError(f"solution has another {name}; what solve returned for this {name} is needed")


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


@checked(double=True)
def solve(
    X: Float[Tensor, "N d"],
    y: Float[Tensor, "*targets"],
    W0: Float[Tensor, "... d m"],
    signs: Float[Tensor, "... m"],
) -> MinimumNorm:
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
    y, W0, signs = check_problem(X, y, W0, signs, geometry=True)
    gram = first_layer.empirical_gram(X, W0)
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool(info.any()):
        s = int(info.nonzero()[0, 0])
        small = float(torch.linalg.eigvalsh(gram[s])[0])
        raise ValueError(f"G_0 of network {s} has smallest eigenvalue {small:.1e}; a wider layer is needed")
    e0 = y - first_layer.outputs(X, W0, signs)
    alpha = torch.cholesky_solve(e0[..., None], factor)[..., 0]
    W = W0 + first_layer.pull_back(X, W0, signs, alpha)
    return MinimumNorm(X, y, W0, signs, gram, factor, alpha, W, (e0 * alpha).sum(-1))


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


@checked(double=True)
def lyapunov_terms(solution: MinimumNorm, W: Float[Tensor, "... d m"], step: float | Float[Tensor, " S"]) -> Lyapunov:
    """Evaluate ``(V_{k+1} - V_k) / 2 = eta (-||e||^2 + e.b) + eta^2 / 2 ||J^T e||^2``, which holds at every step.

    Here ``V = ||w - w*||^2`` and ``b = (J_0 - J_k) w* = y - J_k w*``; ``||J_k - J_0||^2`` is the largest eigenvalue of
    ``X X^T`` times the counts of changed gates.

    Args:
        solution: from `solve`.
        W: the iterate ``(S, d, m)`` or ``(d, m)``.
        step: eta, one for all networks or ``(S,)``.

    Returns:
        `Lyapunov`.

    Raises:
        ValueError: weights of another shape than the solution's, or a step that is not positive.

    Source: the Lyapunov identity, derived in lesson 4.
    """
    s = solution
    W = W[None] if W.ndim == 2 else W
    if W.shape != s.W.shape:
        raise ValueError(f"W has shape {tuple(W.shape)}, the solution's is {tuple(s.W.shape)}; they must be equal")
    check_scale("W", W, smallest=0.0)
    eta = check_steps(step, len(s.W0), s.X)
    e = s.y - first_layer.outputs(s.X, W, s.signs)
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


@checked
def train(
    X: Float[Tensor, "N d"],
    y: Float[Tensor, "*targets"],
    W0: Float[Tensor, "... d m"],
    signs: Float[Tensor, "... m"],
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
    y, W0, signs = check_problem(X, y, W0, signs, precise=decompose, geometry=decompose)
    eta = check_steps(step, len(W0), X)
    check_belongs(solution, X, y, W0, signs)
    if decompose and solution is None:
        solution = solve(X, y, W0, signs)
    gram = first_layer.empirical_gram(X, W0) if solution is None else solution.gram
    warn_of_large_steps(eta * largest_eigenvalue(gram), 4)
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


def warn_of_large_steps(product: Tensor, stacklevel: int) -> None:
    """Say that ``eta lambda_max(G_0)``, `product`, is 2 or more."""
    if bool((product >= 2).any()):
        warnings.warn(
            f"step times λ_max(G_0) is {float(product.max()):.2f}, at least 2: the linear dynamics is unstable, and "
            "even zero loss would not mean minimum norm",
            stacklevel=stacklevel,
        )
