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
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, rigor

LAMBDA = {"squared": 1.0, "cross_entropy": 0.5}  # Lipschitz constants of the losses' gradients
_RIGOROUS = 4096  # up to this many samples or features sigma_1 is bounded rigorously


# --- The loss ---------------------------------------------------------------------------------------------------------


def check_problem(M: Tensor, V: Tensor | None, Y: Tensor, loss: str) -> None:
    """Refuse features, last layers and targets that do not form a phase-2 problem.

    Args:
        M: features ``(N, m+1)`` or ``(S, N, m+1)``.
        V: last layer ``(m+1, K)`` or ``(S, m+1, K)``, or None.
        Y: targets ``(N, K)`` for the squared loss, int64 labels ``(N,)`` for cross-entropy.
        loss: ``"squared"`` or ``"cross_entropy"``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: an unknown loss, wrong shapes, no rows, NaN or infinity, labels out of range, or a single class.
    """
    if loss not in LAMBDA:
        raise ValueError(f"loss is {loss!r}; 'squared' or 'cross_entropy' is needed")
    data.check_matrix("M", M, "(N, m+1), or a stack,", stacks=True)
    if V is not None:
        data.check_matrix("V", V, "(m+1, K), or a stack,", stacks=True)
    if loss == "squared":
        data.check_matrix("Y", Y, "(N, K), or a stack,", stacks=True)
    if Y.shape[-2 if loss == "squared" else -1] != M.shape[-2]:
        raise ValueError(
            f"M has {M.shape[-2]} rows and Y has shape {tuple(Y.shape)}; one target for each row is needed"
        )
    if V is not None and V.shape[-2] != M.shape[-1]:
        raise ValueError(f"M has {M.shape[-1]} columns and V has {V.shape[-2]} rows; they must be equal")
    if loss == "squared":
        if V is not None and Y.shape[-1] != V.shape[-1]:
            raise ValueError(f"Y has {Y.shape[-1]} columns and V has {V.shape[-1]}; they must be equal")
        return
    if Y.dtype != torch.int64 or Y.ndim != 1:
        raise TypeError(f"Y is {Y.dtype} of shape {tuple(Y.shape)}; int64 labels (N,) are needed for cross-entropy")
    K = None if V is None else V.shape[-1]
    low, high = int(Y.min()), int(Y.max())
    if low < 0 or (K is not None and high >= K):
        raise ValueError(f"Y holds labels {low} to {high}; 0 to {'K - 1' if K is None else K - 1} is needed")
    if low == high or K == 1:
        raise ValueError("Y holds one class only; at least two classes are needed")


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


def average_loss(
    M: Float[Tensor, "... N p"], V: Float[Tensor, "... p K"], Y: Tensor, loss: str = "squared"
) -> Float[Tensor, ...]:
    """Compute ``L(V) = (1/N) sum_i l_i(M_i V)``, an average over the samples.

    Args:
        M: features with their constant column.
        V: the last layer.
        Y: targets ``(N, K)``, or labels ``(N,)``.
        loss: ``"squared"`` or ``"cross_entropy"``.

    Returns:
        A number for each network.
    """
    check_problem(M, V, Y, loss)
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


Map = Callable[[Tensor], Tensor]


def top_singular_value(apply: Map, transposed: Map, like: Tensor, rounds: int = 200) -> Float[Tensor, ...]:
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


def curvature(
    M: Float[Tensor, "... N p"], loss: str = "squared", *, frame: Centred | None = None
) -> Float[Tensor, ...]:
    """Compute an upper bound on ``L_H = Lambda sigma_1^2 / N``; the step ``1 / L_H`` is covered by the theorems.

    On the CPU in float64, with at most 4,096 samples or features, the bound on ``sigma_1`` is rigorous; else it is the
    power iteration's value plus one percent, measured.

    Args:
        M: features ``(N, m+1)`` or ``(S, N, m+1)``.
        loss: ``"squared"`` or ``"cross_entropy"``.
        frame: coordinates in which the steps are taken; None for those of `M`.

    Returns:
        A number for each network.
    """
    if loss not in LAMBDA:
        raise ValueError(f"loss is {loss!r}; 'squared' or 'cross_entropy' is needed")
    if M.dtype == torch.float64 and M.device.type == "cpu" and min(M.shape[-2:]) <= _RIGOROUS:
        A = frame.features(M) if frame else M
        stack = A.reshape(-1, *A.shape[-2:])
        sigma = M.new_tensor([rigor.spectral_norm_upper(B.contiguous()) for B in stack]).reshape(M.shape[:-2])
    elif frame:
        sigma = 1.01 * top_singular_value(
            lambda x: M @ frame.back(x), lambda y: frame.pull((y.mT @ M).mT), M[..., :1, :]
        )
    else:
        sigma = 1.01 * top_singular_value(lambda x: M @ x, lambda y: (y.mT @ M).mT, M[..., :1, :])
    return LAMBDA[loss] * sigma.square() / M.shape[-2]
