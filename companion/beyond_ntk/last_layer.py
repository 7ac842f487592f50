"""The last layer alone: its loss, convex in V, and the geometry of the frozen features.

``M = [h, 1]`` holds the features of the N samples and a constant column, ``V`` the last layer's weights with its bias
as the last row, ``q = M V`` the outputs, and the loss is an **average**::

    L(V) = (1/N) sum_i l_i(q_i),   l_i = |q - y_i|^2 / 2 ("squared")  or  log sum_k e^{q_k} - q_{y_i} ("cross_entropy").

Its gradient ``M^T [grad l_i] / N`` is Lipschitz with ``L_H = Lambda sigma_1(M)^2 / N``, where ``Lambda`` is 1 for the
squared loss and 1/2 for cross-entropy. A leading axis S stands for many networks at once. Derived in lesson 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, rigor
from companion.arguments import checked

Loss = Literal["squared", "cross_entropy"]
LAMBDA = {"squared": 1.0, "cross_entropy": 0.5}  # Lipschitz constants of the losses' gradients
_RIGOROUS = 4096  # up to this many samples or features sigma_1 is bounded rigorously


# --- The loss ---------------------------------------------------------------------------------------------------------


def check_targets(name: str, Y: Tensor, N: int, loss: str | None, K: int | None = None) -> tuple[Tensor, Loss]:
    """Refuse targets that do not fit, and say which loss they are for.

    Args:
        name: what the caller calls them.
        Y: targets ``(N, K)`` for the squared loss, integer labels ``(N,)`` for cross-entropy.
        N: number of samples.
        loss: ``"squared"`` or ``"cross_entropy"``; None for what the dtype says.
        K: number of outputs; None where it is not known.

    Returns:
        The targets without a gradient, labels as int64, and the loss.

    Raises:
        TypeError: not a tensor, or a dtype that is not the loss'.
        ValueError: an unknown loss, a wrong shape, NaN or infinity, labels out of range, or a single class.
    """
    if not isinstance(Y, Tensor):
        raise TypeError(f"{name} is a {type(Y).__name__}; a torch.Tensor is needed")
    if loss not in (None, *LAMBDA):
        raise ValueError(f"loss is {loss!r}; 'squared' or 'cross_entropy' is needed")
    loss = loss or ("squared" if Y.is_floating_point() else "cross_entropy")
    squared = loss == "squared"
    if Y.is_floating_point() != squared or Y.is_complex() or Y.dtype == torch.bool:
        what = "floating-point targets (N, K)" if squared else "integer labels (N,)"
        raise TypeError(f"{name} is {Y.dtype}; loss {loss!r} needs {what}")
    if Y.ndim != (2 if squared else 1) or len(Y) != N:
        shape, wrong = ("(N, K)", 1) if squared else ("(N,)", 2)
        repair = f"; write {name}[:, {'None' if squared else '0'}]" if Y.ndim == wrong and len(Y) == N else ""
        raise ValueError(f"{name} has shape {tuple(Y.shape)}; {shape} with N = {N} is needed{repair}")
    Y = Y.detach()
    if squared:
        if not bool(torch.isfinite(Y).all()):
            raise ValueError(f"{name} holds NaN or infinity; finite numbers are needed")
        if K is not None and Y.shape[1] != K:
            raise ValueError(f"{name} has {Y.shape[1]} columns, but there are {K} outputs; they must be equal")
        return Y, loss
    low, high = int(Y.min()), int(Y.max())
    if low < 0 or (K is not None and high >= K):
        raise ValueError(f"{name} holds labels {low} to {high}; 0 to {'K - 1' if K is None else K - 1} is needed")
    if low == high:
        raise ValueError(f"{name} holds one class only; at least two classes are needed")
    return Y.long(), loss


def check_problem(M: Tensor, V: Tensor, Y: Tensor, loss: str) -> Tensor:
    """Refuse features, last layers and targets that do not form a phase-2 problem.

    Args:
        M: features ``(N, m+1)`` or ``(S, N, m+1)``.
        V: last layer ``(m+1, K)`` or ``(S, m+1, K)``.
        Y: targets ``(N, K)`` for the squared loss, labels ``(N,)`` for cross-entropy.
        loss: ``"squared"`` or ``"cross_entropy"``.

    Returns:
        The targets, labels as int64.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: as `check_targets`, or shapes that do not fit.
    """
    data.check_matrix("M", M, "(N, m+1), or a stack,", stacks=True)
    data.check_matrix("V", V, "(m+1, K), or a stack,", stacks=True)
    Y, loss = check_targets("Y", Y, M.shape[-2], loss, V.shape[-1])
    if V.shape[-2] != M.shape[-1]:
        raise ValueError(f"M has {M.shape[-1]} columns and V has {V.shape[-2]} rows; they must be equal")
    for name, A in (("V", V), ("Y", Y)):
        if A.is_floating_point() and A.dtype != M.dtype:
            raise TypeError(f"{name} is {A.dtype} and M is {M.dtype}; equal dtypes are needed")
    return Y


def pointwise(q: Float[Tensor, "... N K"], Y: Tensor, loss: str = "squared") -> Float[Tensor, "... N"]:
    """Compute ``l_i(q_i)`` for every sample.

    Args:
        q: outputs.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``.

    Returns:
        The losses, all nonnegative.
    """
    if loss == "squared":
        return 0.5 * (q - Y).square().sum(-1)
    own = Y[:, None].expand(*q.shape[:-1], 1)
    others = (q - q.gather(-1, own)).scatter(-1, own, -math.inf)
    return torch.logaddexp(torch.logsumexp(others, dim=-1), q.new_zeros(()))  # accurate also where it is tiny


def slope(q: Float[Tensor, "... N K"], Y: Tensor, loss: str = "squared") -> Float[Tensor, "... N K"]:
    """Compute ``grad l_i(q_i)``: ``q_i - y_i``, or ``softmax(q_i) - e_{y_i}``; arguments as in `pointwise`."""
    return q - Y if loss == "squared" else torch.softmax(q, -1) - torch.nn.functional.one_hot(Y, q.shape[-1]).to(q)


@checked
def average_loss(
    M: Float[Tensor, "... N p"], V: Float[Tensor, "... p K"], Y: Tensor, loss: str = "squared"
) -> Float[Tensor, "*S"]:
    """Compute ``L(V) = (1/N) sum_i l_i(M_i V)``, an average over the samples.

    Args:
        M: features with their constant column.
        V: the last layer.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``.

    Returns:
        A number for each network.
    """
    Y = check_problem(M, V, Y, loss)
    return pointwise(M @ V, Y, loss).mean(-1)


# --- The features' geometry -------------------------------------------------------------------------------------------


class Centred(NamedTuple):
    """Coordinates in which the features have mean zero and the constant column their size: same outputs, smaller L_H.

    The centred features ``[h - mean, c 1]`` are ``M B`` with ``B`` the map `back`; a method can use them without
    forming them.

    Args:
        mean: the features' mean ``(..., 1, m)``.
        scale: ``c = ||h - mean||_2 / sqrt(N)``, ``(..., 1, 1)``.
    """

    mean: Tensor
    scale: Tensor

    def features(self, M: Float[Tensor, "... N p"]) -> Float[Tensor, "... N p"]:
        """The centred features themselves, a copy as large as M."""
        h = M[..., :-1] - self.mean
        return torch.cat([h, self.scale.expand(*h.shape[:-1], 1)], dim=-1)

    def to(self, V: Float[Tensor, "... p K"]) -> Float[Tensor, "... p K"]:
        """The last layer that gives the same outputs on the centred features."""
        h, b = V[..., :-1, :], V[..., -1:, :]
        return torch.cat([h, (b + self.mean @ h) / self.scale], dim=-2)

    def back(self, V: Float[Tensor, "... p K"]) -> Float[Tensor, "... p K"]:
        """The inverse of `to`, a linear map ``B``."""
        h, b = V[..., :-1, :], V[..., -1:, :]
        return torch.cat([h, self.scale * b - self.mean @ h], dim=-2)

    def pull(self, G: Float[Tensor, "... p K"]) -> Float[Tensor, "... p K"]:
        """``B^T G``: turns a gradient in V into one in the centred coordinates."""
        h, b = G[..., :-1, :], G[..., -1:, :]
        return torch.cat([h - self.mean.mT @ b, self.scale * b], dim=-2)


@checked
def centre(M: Float[Tensor, "... N p"]) -> Centred:
    """Find the coordinates in which ``M = [h, 1]`` becomes ``[h - mean, c 1]``: same span, smaller ``L_H``.

    Args:
        M: features whose last column is constant 1.

    Returns:
        The two maps of last layers.

    Raises:
        ValueError: the last column is not 1, or there is no other.
    """
    if M.shape[-1] < 2 or not bool((M[..., -1] == 1).all()):
        raise ValueError("M has no constant last column; features [h, 1] are needed for centring")
    h = M[..., :-1]
    mean = h.mean(-2, keepdim=True)

    def apply(x: Tensor) -> Tensor:
        return h @ x - mean @ x

    def transposed(y: Tensor) -> Tensor:
        return (y.mT @ h).mT - mean.mT * y.sum(-2, keepdim=True)

    scale = top_singular_value(apply, transposed, mean)[..., None, None] / math.sqrt(M.shape[-2])
    return Centred(mean, torch.where(scale > 0, scale, 1.0))


_Map = Callable[[Tensor], Tensor]


def top_singular_value(apply: _Map, transposed: _Map, like: Tensor, rounds: int = 200) -> Float[Tensor, "*S"]:
    """The largest singular value to about three digits, from below, by power iteration with a fixed start.

    `like` is ``(..., 1, p)`` and gives the number of columns, the dtype and the device.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape[-1], 1, generator=g, dtype=torch.float64).to(like).expand(*like.shape[:-2], -1, 1)
    value = like.new_zeros(like.shape[:-2])
    for _ in range(rounds):
        y = apply(x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-300))
        before, value = value, torch.linalg.vector_norm(y, dim=(-2, -1))
        x = transposed(y)
        if bool((value <= before * (1 + 1e-5)).all()):
            break
    return value


@checked
def curvature(
    M: Float[Tensor, "... N p"], loss: str = "squared", *, frame: Centred | None = None
) -> Float[Tensor, "*S"]:
    """Compute an upper bound on ``L_H = Lambda sigma_1^2 / N``; the step ``1 / L_H`` is covered by the theorems.

    Where `is_rigorous` (float64 on the CPU, at most 4,096 samples or features) it is one for sure, with all rounding;
    else it is the power iteration's value plus one percent, measured.

    Args:
        M: features ``(N, m+1)`` or ``(S, N, m+1)``.
        loss: ``"squared"`` or ``"cross_entropy"``.
        frame: coordinates in which the steps are taken; None for those of `M`.

    Returns:
        A number for each network.

    Raises:
        ValueError: an unknown loss, or features that are no matrix of finite numbers.
    """
    data.check_matrix("M", M, "(N, m+1), or a stack,", stacks=True)
    if loss not in LAMBDA:
        raise ValueError(f"loss is {loss!r}; 'squared' or 'cross_entropy' is needed")
    if is_rigorous(M):
        A = frame.features(M) if frame else M
        # the centred features are rounded, entry by entry: that moves sigma_1 by u times their norm at most
        sigma = [
            rigor.spectral_norm_upper(B) + 2 * rigor.UNIT * rigor.frobenius_norm_upper(B)
            for B in A.reshape(-1, *A.shape[-2:]).contiguous()
        ]
        top = rigor.point(M.new_tensor([rigor.round_up(x) for x in sigma]).reshape(M.shape[:-2]))
        return smoothness(top, M.shape[-2], loss).hi
    if frame:
        sigma = top_singular_value(lambda x: M @ frame.back(x), lambda y: frame.pull((y.mT @ M).mT), M[..., :1, :])
    else:
        sigma = top_singular_value(lambda x: M @ x, lambda y: (y.mT @ M).mT, M[..., :1, :])
    return smoothness(1.01 * sigma, M.shape[-2], loss)


def is_rigorous(M: Tensor) -> bool:
    """Whether `curvature` of these features is a proved bound."""
    return M.dtype == torch.float64 and M.device.type == "cpu" and min(M.shape[-2:]) <= _RIGOROUS


def smoothness(sigma_1: Any, N: int, loss: str) -> Any:
    """``L_H = Lambda sigma_1^2 / N``, for a tensor or an interval."""
    return sigma_1**2 * LAMBDA[loss] / N
