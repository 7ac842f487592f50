"""Phase 2: only the last layer moves, on frozen features. The methods that solve this convex problem, and their runs.

The letters are those of `last_layer`. A leading axis S stands for many networks at once. Derived in lesson 3.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion import descent, runs
from companion.arguments import checked
from companion.beyond_ntk.last_layer import (
    Centred,
    average_loss,
    centre,
    check_problem,
    curvature,
    is_rigorous,
    pointwise,
    slope,
    top_singular_value,
)
from companion.rigor.rounding import down


@dataclass(frozen=True)
class Phase2:
    """A finished phase 2.

    Args:
        method: what was run.
        V: the last iterate ``(m+1, K)``, in the coordinates of `M` as it was given.
        losses: ``L(V_t)`` at the recorded t, ``(T,)``; with a leading ensemble axis ``(T, S)``.
        steps: the recorded t, ``(T,)``.
        step: the step size used; None where there is none.
        covered: how surely a rate of lesson 3 covers this method and step: ``"certified"``, ``"measured"`` where `step`
            or ``sigma_1`` is, or ``""`` if none does. A loss below a bound needs no rate.
        centred: whether the steps were taken in centred coordinates, see `centre`.
        average: the mean of the iterates, where the method's theorem is about it.
    """

    method: str
    V: Tensor
    losses: Tensor
    steps: Tensor
    step: float | Tensor | None = None
    covered: str = ""
    centred: bool = False
    average: Tensor | None = None


# --- Gradient descent and Nesterov's method ---------------------------------------------------------------------------


def _step(M: Tensor, loss: str, step: float | Tensor | None, kind: str, frame: Centred | None) -> tuple[Tensor, str]:
    """The step of every network and how surely the theorems cover it; refused where it must diverge."""
    L_H = curvature(M, loss, frame=frame)
    if step is None:
        step = down(1 / L_H) if is_rigorous(M) else 1 / L_H
    eta = torch.as_tensor(step, dtype=M.dtype, device=M.device).expand(L_H.shape)
    if not bool((torch.isfinite(eta) & (eta > 0)).all()):
        raise ValueError(f"step is {step}; a positive finite number is needed")
    excess = float((eta * L_H).max())
    # L_H is an upper bound: what lies within two percent of it may well be below the truth
    if loss == "squared" and excess > 2.04:
        raise ValueError(f"step is {excess:.3g} / L_H; squared loss diverges above 2 / L_H")
    if excess > 1 + 1e-6:
        warnings.warn(f"step is {excess:.3g} / L_H, not covered by the rate of {kind}", stacklevel=3)
        return eta.clone(), ""
    return eta.clone(), "certified" if is_rigorous(M) and excess <= 1 else "measured"


def _descend(
    kind: str,
    M: Tensor,
    V0: Tensor,
    Y: Tensor,
    loss: str,
    step: float | Tensor | None,
    steps: int,
    every: int,
    centred: bool,
    options: Mapping[str, Any],
) -> Phase2:
    """Gradient descent or Nesterov's method; M V is kept beside V, so that a step costs two products."""
    Y = check_problem(M, V0, Y, loss)
    if M.ndim != V0.ndim or M.ndim > 3:
        raise ValueError(f"M has {M.ndim} axes and V0 has {V0.ndim}; two, or three for several networks, are needed")
    single = M.ndim == 2
    M, V0 = (M[None], V0[None]) if single else (M, V0)
    frame = centre(M) if centred else None
    V = frame.to(V0) if frame else V0
    back, pull = (frame.back, frame.pull) if frame else (_same, _same)
    step = step[None] if single and isinstance(step, Tensor) and step.ndim == 0 else step
    eta, covered = _step(M, loss, step, kind, frame)
    eta, N = eta[:, None, None], M.shape[-2]
    a = _momenta(steps) if kind == "nesterov" else None

    def move(params: list[Tensor], k: int, go: bool) -> Tensor:
        V, Q = params[0], params[1]
        value = pointwise(Q, Y, loss).mean(-1)
        if not go:
            return value
        if a is None or k == 0:  # Nesterov's first point of evaluation is V_0 itself
            y, q = V, Q
        else:
            c = (a[k - 1] - 1) / a[k]
            y, q = V + c * (V - params[2]), Q + c * (Q - params[3])
        new = y - eta / N * pull((slope(q, Y, loss).mT @ M).mT)
        if a is not None:
            params[2].copy_(V), params[3].copy_(Q)
        V.copy_(new), Q.copy_(_outputs(M, back(new)))
        return value

    start = [V, _outputs(M, back(V))]
    start += [t.clone() for t in start] if a is not None else []
    config = {"kind": kind, "M": M, "Y": Y, "loss": loss, "step": eta.clone(), "centred": centred}
    run = descent.iterate(start, move, steps, every=every, config=config, **options)
    V = back(run.weights[0])
    losses, eta = run.residual, eta[:, 0, 0]
    if single:
        V, losses, eta = V[0], losses[:, 0], float(eta[0])
    return Phase2(kind, V, losses, run.steps, eta, covered, centred)


def _outputs(M: Tensor, V: Tensor) -> Tensor:
    """``M V`` as the transpose of ``V^T M^T``: half the time for few outputs, and so is the gradient."""
    return (V.mT @ M.mT).mT


def _same(V: Tensor) -> Tensor:
    return V


def _momenta(steps: int) -> list[float]:
    """Nesterov's ``a_0 = 1``, ``a_{s+1} = (1 + sqrt(1 + 4 a_s^2)) / 2``."""
    a = [1.0]
    for _ in range(steps):
        a.append((1 + math.sqrt(1 + 4 * a[-1] ** 2)) / 2)
    return a


@checked
def phase2_gd(
    M: Float[Tensor, "*S N p"],
    V0: Float[Tensor, "*S p K"],
    Y: Tensor,
    *,
    loss: str = "squared",
    step: float | Tensor | None = None,
    steps: int = 1000,
    every: int = 1,
    centred: bool = True,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Phase2:
    """Gradient descent ``V_{t+1} = V_t - eta grad L(V_t)``; ``L(V_t) <= L(V) + |V_0 - V|^2 / (2 eta t)`` for every V.

    Args:
        M: features ``[h, 1]``, ``(N, m+1)`` or ``(S, N, m+1)``.
        V0: the start ``(m+1, K)`` or ``(S, m+1, K)``.
        Y: targets ``(N, K)``, or labels ``(N,)``; shared by all networks.
        loss: ``"squared"`` or ``"cross_entropy"``, averaged.
        step: ``eta``; None for ``1 / L_H``, network by network.
        steps: number of steps.
        every: record at 0, every, 2 every, ... and at the end.
        centred: take the steps in centred coordinates (see `centre`); the bounds then hold there.
        progress: show a bar; None for only in a terminal.
        checkpoint: file that makes the run resumable, see `descent.iterate`.

    Returns:
        The run, `V` in the coordinates of `M`.

    Raises:
        ValueError: data that do not fit, or a step above ``2 / L_H`` with the squared loss.

    Warns:
        UserWarning: a step above ``1 / L_H``, which no rate covers.
    """
    options = {"progress": progress, "checkpoint": checkpoint}
    return _descend("gd", M, V0, Y, loss, step, steps, every, centred, options)


@checked
def phase2_nesterov(
    M: Float[Tensor, "*S N p"],
    V0: Float[Tensor, "*S p K"],
    Y: Tensor,
    *,
    loss: str = "squared",
    step: float | Tensor | None = None,
    steps: int = 1000,
    every: int = 1,
    centred: bool = True,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Phase2:
    """Nesterov: ``V_{s+1} = y_s - eta grad L(y_s)``, ``y_{s+1} = V_{s+1} + (a_s - 1)/a_{s+1} (V_{s+1} - V_s)``.

    ``L(V_t) <= L(V) + 2 |V_0 - V|^2 / (eta (t + 1)^2)`` for every V. Arguments and results as in `phase2_gd`.
    """
    options = {"progress": progress, "checkpoint": checkpoint}
    return _descend("nesterov", M, V0, Y, loss, step, steps, every, centred, options)


# --- Least squares and L-BFGS -----------------------------------------------------------------------------------------


@checked
def phase2_least_squares(
    M: Float[Tensor, "N p"],
    V0: Float[Tensor, "p K"],
    Y: Tensor,
    *,
    loss: str = "squared",
) -> Phase2:
    """Solve ``min |M V - Y|``, and among the solutions take the one nearest to V0: ``V = V0 + M^+ (Y - M V0)``.

    QR and two rounds of refinement; where M is too close to losing rank, singular values with a cut-off. For labels the
    one-hot code is fitted: another objective than cross-entropy, whose value is what is recorded.

    Args:
        M: features ``[h, 1]``, ``(N, m+1)``.
        V0: the start ``(m+1, K)``.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: which loss is recorded.

    Returns:
        The run; ``losses`` holds the loss before and after.

    Raises:
        ValueError: data that do not fit.

    Warns:
        UserWarning: ``u sigma_1 / sigma_min > 1e-6``: the solution is huge and predicts poorly.
    """
    Y = check_problem(M, V0, Y, loss)
    target = Y if loss == "squared" else torch.nn.functional.one_hot(Y, V0.shape[-1]).to(M)
    wide = M.shape[0] <= M.shape[1]
    Q, R = torch.linalg.qr(M.mT if wide else M)
    spread = _spread(R)
    unit = torch.finfo(M.dtype).eps / 2
    if unit * spread > 1e-6:
        warnings.warn(
            f"M has sigma_1 / sigma_min = {spread:.1g}; the least squares solution is huge and predicts poorly",
            stacklevel=2,
        )
    V = V0.clone()
    for _ in range(3):
        r = target - M @ V
        if unit * spread > 1e-3 or not math.isfinite(spread):
            V = V + torch.linalg.pinv(M, rtol=unit * max(M.shape)) @ r
        elif wide:
            V = V + Q @ torch.linalg.solve_triangular(R.mT, r, upper=False)
        else:
            V = V + torch.linalg.solve_triangular(R, Q.mT @ r, upper=True)
    losses = torch.stack([average_loss(M, v, Y, loss) for v in (V0, V)])
    return Phase2("least_squares", V, losses, torch.tensor([0, 1]))


def _spread(R: Float[Tensor, "n n"], rounds: int = 8) -> float:
    """``sigma_1 / sigma_n`` of a triangular matrix, roughly, by power iteration on it and on its inverse."""
    if not bool((R.diagonal() != 0).all()):
        return math.inf
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(R), 2, generator=g, dtype=torch.float64).to(R)
    smallest = R.new_ones(())
    for _ in range(rounds):
        x = x / torch.linalg.vector_norm(x)
        y = torch.linalg.solve_triangular(R.mT, x, upper=False)
        smallest = torch.linalg.vector_norm(y)
        x = torch.linalg.solve_triangular(R, y, upper=True)
    largest = top_singular_value(lambda x: R @ x, lambda y: R.mT @ y, R[:1])
    return float(largest * smallest)


@checked
def phase2_lbfgs(
    M: Float[Tensor, "N p"],
    V0: Float[Tensor, "p K"],
    Y: Tensor,
    *,
    loss: str = "squared",
    ridge: float = 0.0,
    steps: int = 200,
    centred: bool = True,
) -> Phase2:
    """Minimize ``P(V) = L(V) + (ridge / 2) |V|^2`` by L-BFGS with a strong-Wolfe line search.

    No rate is claimed; the loss that was reached bounds its own gap, and `ridge_gap` bounds the one of ``P``.

    Args:
        M: features ``[h, 1]``, ``(N, m+1)``.
        V0: the start ``(m+1, K)``.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``, averaged.
        ridge: ``lambda >= 0``, on all of V in the coordinates of `M`.
        steps: number of steps at most.
        centred: search in centred coordinates; the minimum does not depend on it.

    Returns:
        The run; ``losses`` holds ``L`` without the ridge, before and after.

    Raises:
        ValueError: data that do not fit, or a negative ridge.
    """
    Y = check_problem(M, V0, Y, loss)
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge is {ridge}; a number >= 0 is needed")
    start = average_loss(M, V0, Y, loss)
    if not math.isfinite(float(start + ridge * V0.square().sum())):
        raise ValueError("M, V0 or Y is so large that the loss at V0 overflows; smaller numbers are needed")
    frame = centre(M) if centred else None
    back = frame.back if frame else _same
    V = (frame.to(V0) if frame else V0.clone()).detach().requires_grad_()
    tiny = torch.finfo(M.dtype).eps
    optimizer = torch.optim.LBFGS(
        [V],
        max_iter=steps,
        max_eval=4 * steps,
        history_size=20,
        tolerance_grad=tiny,
        tolerance_change=tiny**2,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = pointwise(_outputs(M, back(V)), Y, loss).mean() + 0.5 * ridge * back(V).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    V = back(V.detach())
    taken = optimizer.state[optimizer.param_groups[0]["params"][0]].get("n_iter", steps)
    losses = torch.stack([start, average_loss(M, V, Y, loss)])
    return Phase2("lbfgs", V, losses, torch.tensor([0, taken]), centred=centred)


# --- Stochastic gradients ---------------------------------------------------------------------------------------------


@checked
def phase2_momentum_sgd(
    M: Float[Tensor, "N p"],
    V0: Float[Tensor, "p K"],
    Y: Tensor,
    *,
    loss: str = "squared",
    step: float,
    momentum: float = 0.9,
    batch: int = 64,
    epochs: int = 10,
    generator: torch.Generator,
    velocity: Tensor | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Phase2:
    """Mini-batch momentum: ``v <- momentum v + grad``, ``V <- V - eta v``. Judged by its loss only: no theorem here.

    Args:
        M: features ``[h, 1]``, ``(N, m+1)``.
        V0: the start ``(m+1, K)``.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``, averaged over the mini-batch.
        step: ``eta > 0``.
        momentum: in [0, 1).
        batch: samples at once; the samples are shuffled anew in every epoch.
        epochs: passes through the samples.
        generator: CPU generator for the shuffling.
        velocity: the start of v, e.g. what a base algorithm arrives with; None for 0.
        progress: show a bar; None for only in a terminal.
        checkpoint: file that makes the run resumable.

    Returns:
        The run, a recorded loss for each epoch.

    Raises:
        ValueError: data that do not fit, or a number out of range.
    """
    Y = check_problem(M, V0, Y, loss)
    if not (step > 0 and 0 <= momentum < 1 and batch >= 1):
        raise ValueError(f"step, momentum, batch are {step}, {momentum}, {batch}; > 0, in [0, 1) and >= 1 are needed")
    N = len(M)
    seed = int(torch.randint(2**62, (), generator=generator))

    def epoch(params: list[Tensor], k: int, go: bool) -> Tensor:
        V, v = params
        value = pointwise(M @ V, Y, loss).mean()[None]
        if go:
            order = torch.randperm(N, generator=torch.Generator().manual_seed(seed + k)).to(M.device)
            for part in order.split(batch):
                rows = M[part]
                v.mul_(momentum).add_(rows.mT @ slope(rows @ V, Y[part], loss), alpha=1 / len(part))
                V.sub_(v, alpha=step)
        return value

    start = [V0, torch.zeros_like(V0) if velocity is None else velocity]
    config = {"M": M, "Y": Y, "loss": loss, "rule": [step, momentum, batch, seed]}
    run = descent.iterate(start, epoch, epochs, progress=progress, checkpoint=checkpoint, config=config)
    return Phase2("momentum_sgd", run.weights[0], run.residual[:, 0], run.steps, step)


@checked
def single_sample_sgd(
    M: Float[Tensor, "N p"],
    V0: Float[Tensor, "p K"],
    Y: Tensor,
    *,
    loss: str = "squared",
    step: float | None = None,
    steps: int = 1000,
    S: int = 1,
    every: int = 1,
    generator: torch.Generator,
) -> Phase2:
    """``V <- V - eta M_i^T grad l_i(M_i V)`` for a uniformly drawn sample i, in S independent runs at once.

    With the squared loss and ``eta = 1 / max |M_i|^2`` this is Kaczmarz's method with a common step.

    Args:
        M: features ``[h, 1]``, ``(N, m+1)``.
        V0: the start ``(m+1, K)``.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``.
        step: ``eta``; None for ``1 / max |M_i|^2``.
        steps: number of steps.
        S: number of independent runs.
        every: record at 0, every, 2 every, ... and at the end.
        generator: CPU generator that draws the samples.

    Returns:
        The run: `V` ``(S, m+1, K)``, `losses` ``(T, S)``, `average` the mean of ``V_0, ..., V_{steps-1}``.

    Raises:
        ValueError: data that do not fit, or a step that is not positive.
    """
    Y = check_problem(M, V0, Y, loss)
    eta = 1 / float(M.square().sum(1).max()) if step is None else step
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"step is {step}; a positive finite number is needed")
    S, every = runs.count("S", S, 1), runs.count("every", every, 1)
    seed = int(torch.randint(2**62, (), generator=generator))

    def one(params: list[Tensor], k: int, go: bool) -> Tensor:
        V, total = params
        value = pointwise(M @ V, Y, loss).mean(-1) if k % every == 0 or k == steps else V.new_zeros(S)
        if go:
            i = torch.randint(len(M), (S,), generator=torch.Generator().manual_seed(seed + k)).to(M.device)
            total.add_(V)
            rows = M[i][:, None, :]
            q = rows @ V
            V.sub_(rows.mT * slope(q[:, 0], Y[i], loss)[:, None], alpha=eta)
        return value

    V = V0.expand(S, *V0.shape)
    run = descent.iterate([V, torch.zeros_like(V)], one, steps, every=every, progress=False)
    average = run.weights[1] / max(1, steps)
    return Phase2("single_sample_sgd", run.weights[0], run.residual, run.steps, eta, average=average)
