"""What theory says about phase 2 before it is run: rates, exact curves, floors, and gaps that a gradient proves.

The letters are those of `last_layer`: ``L(V) = (1/N) sum_i l_i(M_i V)`` with ``M = [h, 1]``, ``sigma_1 >= ... >=
sigma_N`` its singular values and U its left singular vectors. Everything here is derived in lesson 3. The rates at the
top are functions of any number: on tensors they are measured, on intervals certified. What follows is evaluated in
plain floating point, but for `duplicate_floor`, which is rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.arguments import checked
from companion.beyond_ntk import last_layer
from companion.beyond_ntk.last_layer import Loss
from companion.rigor import formulas, norm, point, stack

# --- The rates, for any kind of number --------------------------------------------------------------------------------


def gd_rate(R: Any, step: Any, t: Any) -> Any:
    """``R^2 / (2 eta t)``: gradient descent is that close to ``L(V)`` after t steps, ``R = |V_0 - V|``."""
    return R**2 / (2 * step * t)


def nesterov_rate(R: Any, step: Any, t: Any) -> Any:
    """``2 R^2 / (eta (t + 1)^2)``, the same for Nesterov's method."""
    return 2 * R**2 / (step * (t + 1) ** 2)


def contraction(sigma_N: Any, N: int, step: Any, mu: Any = 1) -> Any:
    """``eta mu sigma_N^2 / N``, what one step of gradient descent takes off ``L - L*``, relatively."""
    return step * mu * sigma_N**2 / N


def cross_entropy_rate(sigma_N: Any, root_N: Any, K: Any, t: Any, step: Any, V0_norm: Any) -> Any:
    """``(K-1)/t + (|V_0| + sqrt(N) log t / sigma_N)^2 / (2 eta t)``, see `cross_entropy_bound`."""
    return (K - 1) / t + gd_rate(V0_norm + root_N * formulas.log(t) / sigma_N, step, t)


# --- Gradient descent and Nesterov's method ---------------------------------------------------------------------------


def _times(t: Tensor | Sequence[int] | int) -> Tensor:
    t = torch.atleast_1d(t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu"))
    if t.numel() == 0 or not bool((t >= 0).all()):
        raise ValueError(f"t is {t.tolist()}; numbers of steps >= 0 are needed")
    return t


@checked
def exact_curve(
    M: Float[Tensor, "N p"],
    V0: Float[Tensor, "p K"],
    Y: Float[Tensor, "N K"],
    t: Tensor | Sequence[int] | int,
    *,
    step: float | None = None,
) -> Float[Tensor, " T"]:
    """Compute ``L(V_t) = (1/2N) sum_k (1 - eta sigma_k^2 / N)^{2t} |C_k|^2`` of gradient descent, squared loss.

    ``C = U^T (Y - M V_0)`` with the full N x N factor U, and ``sigma_k = 0`` beyond the rank (lesson 3, linear rate).

    Args:
        M: features ``(N, m+1)``, of any rank.
        V0: the start ``(m+1, K)``.
        Y: targets ``(N, K)``.
        t: numbers of steps.
        step: ``eta``; None for ``N / sigma_1^2``.

    Returns:
        The loss at each t.
    """
    Y = last_layer.check_problem(M, V0, Y, "squared")
    U, s, _ = torch.linalg.svd(M, full_matrices=True) if len(M) > M.shape[1] else torch.linalg.svd(M, False)
    N = len(M)
    s = torch.cat([s, s.new_zeros(N - len(s))])
    eta = N / float(s[0]) ** 2 if step is None else step
    C = (U.T @ (Y - M @ V0)).square().sum(1)
    factors = (1 - contraction(s, N, eta)).abs()
    powers = torch.where(factors > 0, factors, 1e-300) ** (2 * _times(t).to(M.device)[:, None])
    return (powers * C).sum(1) / (2 * N)


@checked
def linear_rate(sigma_N: float, N: int, step: float, mu: float = 1.0) -> float:
    """Compute the factor ``1 - eta mu sigma_N^2 / N`` of ``L(V_t) - L* <= factor^t (L(V_0) - L*)``.

    Args:
        sigma_N: the N-th singular value of the features, of which rank N is needed.
        N: number of samples.
        step: ``eta <= 1 / L_H``.
        mu: every ``l_i`` is mu-strongly convex; 1 for the squared loss, and no such mu exists for cross-entropy.

    Returns:
        The factor, in [0, 1].

    Raises:
        ValueError: numbers out of range, or a step above ``N / (mu sigma_N^2)``, which no smoothness allows.
    """
    if not (sigma_N >= 0 and N >= 1 and step > 0 and mu >= 0):
        raise ValueError(f"sigma_N, N, step, mu are {sigma_N}, {N}, {step}, {mu}; numbers >= 0 and a step > 0 needed")
    factor = 1 - contraction(sigma_N, N, step, mu)
    if factor < 0:
        raise ValueError(f"step is {step}; at most 1 / L_H is needed, and that is at most N / (mu sigma_N^2)")
    return factor


@checked
def comparator_bound(
    M: Float[Tensor, "N p"],
    V0: Float[Tensor, "p K"],
    Y: Tensor,
    t: Tensor | Sequence[int] | int,
    *,
    loss: str = "squared",
    step: float,
    method: Literal["gd", "nesterov"] = "gd",
    comparators: Sequence[Tensor] = (),
) -> Float[Tensor, " T"]:
    """Compute ``min_V L(V) + |V_0 - V|^2 / (2 eta t)`` (gd) or ``... + 2 |V_0 - V|^2 / (eta (t+1)^2)`` (nesterov).

    Any comparator V gives a bound on ``L(V_t)``; tried are ``V_0 + sum_{j <= k} v_j u_j^T (c Y - M V_0) / sigma_j`` for
    every k, and for cross-entropy (Y one-hot) about 25 values of k and a grid of margins c.

    Args:
        M: features ``(N, m+1)`` in the coordinates in which the steps are taken.
        V0: the start ``(m+1, K)`` in these coordinates.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        t: numbers of steps; at 0 the bound is the loss itself.
        loss: ``"squared"`` or ``"cross_entropy"``.
        step: ``eta <= 1 / L_H``.
        method: ``"gd"`` or ``"nesterov"``.
        comparators: further V to try, each ``(m+1, K)`` in the same coordinates.

    Returns:
        The bound at each t.

    Raises:
        ValueError: an unknown method, or data that do not fit.
    """
    Y = last_layer.check_problem(M, V0, Y, loss)
    if not step > 0:
        raise ValueError(f"step is {step}; a number > 0 is needed")
    t = _times(t).to(M.device)
    losses, squares = _comparators(M, V0, Y, loss)
    for V in comparators:
        losses = torch.cat([losses, last_layer.average_loss(M, V, Y, loss)[None]])
        squares = torch.cat([squares, (V - V0).square().sum()[None]])
    weight = {"gd": gd_rate, "nesterov": nesterov_rate}[method](1, step, t)
    start = last_layer.average_loss(M, V0, Y, loss)
    bound = (losses + weight[:, None] * squares).amin(1)
    bound = torch.where(torch.isfinite(bound), bound, start)
    return torch.minimum(bound, start) if method == "gd" else torch.where(t == 0, start, bound)


def _comparators(M: Tensor, V0: Tensor, Y: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """``L(V)`` and ``|V_0 - V|^2`` of all comparators; the first one is V_0 itself."""
    N = len(M)
    U, s, _ = torch.linalg.svd(M, full_matrices=False)
    keep = s > s[0] * torch.finfo(M.dtype).eps * max(M.shape)
    U, s = U[:, keep], s[keep]
    Q0 = M @ V0
    if loss == "squared":
        C = U.T @ (Y - Q0)
        c2 = C.square().sum(1)
        total = (Y - Q0).square().sum()
        outside = (total - c2.sum()).clamp_min(0)
        # summed from the small end, so that nothing cancels
        tail = torch.cat([c2.flip(0).cumsum(0).flip(0), c2.new_zeros(1)]) + outside
        squares = torch.cat([c2.new_zeros(1), (c2 / s.square()).cumsum(0)])
        return tail / (2 * N), squares
    code = torch.nn.functional.one_hot(Y, V0.shape[1]).to(M)
    a, b = U.T @ code, U.T @ Q0
    r = len(s)
    ks = sorted({round(r ** (i / 24)) for i in range(25)} | {r})
    losses, squares = [last_layer.pointwise(Q0, Y, loss).mean()], [Q0.new_zeros(())]
    for k in ks:
        for c in (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0):
            D = c * a[:k] - b[:k]
            losses.append(last_layer.pointwise(Q0 + U[:, :k] @ D, Y, loss).mean())
            squares.append((D.square().sum(1) / s[:k].square()).sum())
    return torch.stack(losses), torch.stack(squares)


@checked
def cross_entropy_bound(
    sigma_N: float, N: int, K: int, t: Tensor | Sequence[int] | int, *, step: float, V0_norm: float = 0.0
) -> Float[Tensor, " T"]:
    """Compute ``(K-1)/t + (|V_0| + sqrt(N) log t / sigma_N)^2 / (2 eta t)``: GD, hard labels, rank N.

    The comparator is ``V_0 + M^+ (log(t) Y - M V_0)``, whose loss is at most ``(K-1)/t``.

    Args:
        sigma_N: the N-th singular value of the features.
        N: number of samples.
        K: number of classes.
        t: numbers of steps >= 1.
        step: ``eta <= 1 / L_H``.
        V0_norm: ``|V_0|_F``.

    Returns:
        The bound at each t; infinite where `sigma_N` is 0.
    """
    t = _times(t)
    if bool((t < 1).any()) or not step > 0 or K < 2 or N < 1 or not (sigma_N >= 0 and V0_norm >= 0):
        raise ValueError(
            f"t, step, K, N, sigma_N, V0_norm are {t.tolist()}, {step}, {K}, {N}, {sigma_N}, {V0_norm}; "
            "t >= 1, step > 0, K >= 2, N >= 1 and numbers >= 0 are needed"
        )
    if sigma_N == 0:
        return torch.full_like(t, math.inf)
    return cross_entropy_rate(sigma_N, math.sqrt(N), float(K), t, step, V0_norm)


@checked
def kaczmarz_bound(
    M: Float[Tensor, "N p"], V0: Float[Tensor, "p K"], Y: Float[Tensor, "N K"], t: Tensor | Sequence[int] | int
) -> tuple[Float[Tensor, "p K"], Float[Tensor, " T"]]:
    """Compute ``(1 - sigma_+^2 / (N B^2))^t |V_0 - V*|^2``, a bound on ``E |V_t - V*|^2`` for a consistent system.

    ``B = max |M_i|``, the step is ``1 / B^2``, ``V*`` is the solution of ``M V = Y`` nearest to V_0 and ``sigma_+`` the
    least nonzero singular value.

    Args:
        M: features ``(N, m+1)``.
        V0: the start ``(m+1, K)``.
        Y: targets ``(N, K)`` in the range of M.
        t: numbers of steps.

    Returns:
        ``V*`` and the bound at each t.

    Raises:
        ValueError: ``M V = Y`` has no solution, to rounding.
    """
    Y = last_layer.check_problem(M, V0, Y, "squared")
    U, s, Wt = torch.linalg.svd(M, full_matrices=False)
    keep = s > s[0] * torch.finfo(M.dtype).eps * max(M.shape)
    U, s, Wt = U[:, keep], s[keep], Wt[keep]
    V = V0 + Wt.T @ ((U.T @ (Y - M @ V0)) / s[:, None])
    miss = float(torch.linalg.vector_norm(M @ V - Y))
    if miss > 1e-6 * float(torch.linalg.vector_norm(Y)):
        raise ValueError(f"Y is off the range of M by {miss:.2g}; a consistent system M V = Y is needed")
    factor = 1 - contraction(float(s[-1] / norm(M).max()), len(M), 1)  # the step is 1 / B^2
    return V, factor ** _times(t) * float((V0 - V).square().sum())


@checked
def sgd_bound(
    M: Float[Tensor, "N p"],
    V0: Float[Tensor, "p K"],
    labels: Int[Tensor, " N"],
    t: Tensor | Sequence[int] | int,
    *,
    step: float,
) -> Float[Tensor, " T"]:
    """Compute ``min_V L(V) + |V_0 - V|^2 / (2 eta T) + eta B^2``, a bound on ``E L`` at the mean of T SGD iterates.

    Cross-entropy, uniform single samples, ``B = max |M_i|``: gradients have norm at most ``sqrt(2) B``.

    Args:
        M: features ``(N, m+1)``.
        V0: the start ``(m+1, K)``.
        labels: classes ``(N,)``.
        t: numbers of steps T >= 1.
        step: ``eta``, any.

    Returns:
        The bound at each T.
    """
    labels = last_layer.check_problem(M, V0, labels, "cross_entropy")
    t = _times(t)
    if not step > 0 or bool((t < 1).any()):
        raise ValueError(f"step is {step} and t is {t.tolist()}; step > 0 and t >= 1 are needed")
    losses, squares = _comparators(M, V0, labels, "cross_entropy")
    best = (losses + gd_rate(1, step, t)[:, None] * squares).amin(1)
    return best + step * float(M.square().sum(1).max())


class RidgeGap(NamedTuple):
    """Two forms of the same bound on ``P(V) - min P``, ``P = L + (lambda/2) |V|^2``.

    Args:
        gradient: ``|grad P|^2 / (2 lambda)``, by strong convexity.
        fenchel: ``P(V) - D(softmax(M V))`` with Fenchel's dual D.
    """

    gradient: float
    fenchel: float


@checked
def ridge_gap(M: Float[Tensor, "N p"], V: Float[Tensor, "p K"], labels: Int[Tensor, " N"], ridge: float) -> RidgeGap:
    """Bound ``P(V) - min P`` for cross-entropy with a ridge: ``|grad P(V)|^2 / (2 lambda)``, no rank needed.

    It equals the Fenchel gap at ``p = softmax(M V)`` with ``D(p) = mean H(p_i) - |M^T (p - e_y) / N|^2 / (2 lambda)``,
    because ``lse(q) = p.q + H(p)`` there.

    Args:
        M: features ``(N, m+1)``.
        V: last layer ``(m+1, K)``.
        labels: classes ``(N,)``.
        ridge: ``lambda > 0``.

    Returns:
        The two forms; the first is the accurate one.

    Raises:
        ValueError: a ridge that is not positive, or data that do not fit.
    """
    labels = last_layer.check_problem(M, V, labels, "cross_entropy")
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge is {ridge}; a positive finite number is needed")
    q = M @ V
    G = M.T @ last_layer.slope(q, labels, "cross_entropy") / len(M)
    p = torch.softmax(q, 1)
    primal = last_layer.pointwise(q, labels, "cross_entropy").mean() + 0.5 * ridge * V.square().sum()
    dual = torch.special.entr(p).sum(1).mean() - G.square().sum() / (2 * ridge)
    return RidgeGap(float((G + ridge * V).square().sum() / (2 * ridge)), float(primal - dual))


@checked
def duplicate_floor(groups: Int[Tensor, " N"], Y: Tensor, loss: Loss | None = None) -> float:
    """Bound from below ``inf L = (1/N) sum_groups inf_q sum_{i in group} l_i(q)``: equal inputs get equal outputs.

    The least loss of any network whose inputs are equal within groups, attained if the rows over distinct inputs are
    independent (squared: half the squared distances to the groups' means), or approached (cross-entropy: ``sum_k c_k
    log(n / c_k)`` for n samples with c_k labels k). With one group it is the loss of the best constant outputs.

    Args:
        groups: the group of each sample ``(N,)``, e.g. from `companion.data.equal_inputs`.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``; None for what the dtype of Y says.

    Returns:
        The floor, with all rounding, rounded down; 0 without duplicates.

    Raises:
        TypeError, ValueError: targets that do not fit.

    Source: derived in lesson 3 (equal inputs have equal outputs).
    """
    Y, loss = last_layer.check_targets("Y", Y.cpu(), len(groups), loss)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(i)
    crowded = [rows for rows in members.values() if len(rows) > 1]
    if not crowded:
        return 0.0
    if loss == "squared":
        parts = []
        for rows in crowded:
            r = point(Y[rows].double()) - Y[rows].double().mean(0)  # from any point; from the mean nothing cancels
            parts.append(((r**2).sum(0) - r.sum(0) ** 2 / len(rows)).sum(0) / 2)
        least = stack(parts).sum(0)
    else:
        counts = [(c, len(rows)) for rows in crowded for c in torch.bincount(Y[rows]).tolist() if 0 < c < len(rows)]
        c, n = Y.new_tensor([*counts, (1, 1)], dtype=torch.float64).T.contiguous()
        least = (point(c) * (point(n) / point(c)).log()).sum(0)
    floor = float((least / len(groups)).lo)
    return max(0.0, floor) if math.isfinite(floor) else 0.0
