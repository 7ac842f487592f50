"""One very wide trained layer, ``f(x) = sum_r a_r relu(w_r.x) / sqrt(m)``, streamed over its neurons.

The signs ``a_r = +-1`` are not trained.  With the gates ``A_ri = 1{w_r.x_i > 0}`` the Jacobian J of the N outputs has
the rows ``a_r A_ri x_i / sqrt(m)``, one block for each neuron; it has ``N m d`` entries and is never formed.  Every
function here walks over panels of neurons, ``Z = X W[:, :, a:b]`` of shape (S, N, b - a), so that memory beyond the
weights stays bounded however large m is.  A neuron at ``w.x = 0`` counts as closed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.arguments import checked
from companion.minimum_norm.kernel_limit import check_scale

_PANEL_BYTES = 8 * 2**20  # one panel on a CPU: it stays in the cache between its product and what is done with it
_PANEL_BYTES_GPU = 32 * 2**20


def check_layer(X: Tensor, W: Tensor, signs: Tensor) -> tuple[Float[Tensor, "S d m"], Float[Tensor, "S m"]]:
    """Refuse weights and signs that do not form a layer for these inputs, and give both their ensemble axis.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(d, m)`` or ``(S, d, m)``.
        signs: ``(m,)`` or ``(S, m)``, every entry +1 or -1.

    Returns:
        ``W`` as ``(S, d, m)`` and ``signs`` as ``(S, m)``, views where possible.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, numbers whose products overflow, or a sign other than +1
            and -1.
    """
    for name, A in (("X", X), ("W", W), ("signs", signs)):
        check_scale(name, A, smallest=0.0)
        if A.dtype != X.dtype or A.device != X.device:
            raise ValueError(f"{name} is {A.dtype} on {A.device}, X is {X.dtype} on {X.device}; make them equal")
    if W.ndim not in (2, 3) or W.shape[-2] != X.shape[-1] or W.numel() == 0:
        raise ValueError(f"W has shape {tuple(W.shape)}; ({X.shape[-1]}, m) or (S, {X.shape[-1]}, m) is needed")
    W = W[None] if W.ndim == 2 else W
    if signs.ndim not in (1, 2) or signs.shape[-1] != W.shape[2] or signs.shape[:-1] not in ((), W.shape[:1]):
        raise ValueError(f"signs has shape {tuple(signs.shape)}; ({W.shape[2]},) or {(*W.shape[::2],)} is needed")
    if not bool((signs.abs() == 1).all()):
        raise ValueError(f"signs holds {float(signs[signs.abs() != 1][0])}; every sign must be +1 or -1")
    return W, signs.expand(W.shape[0], -1)


def chunk_size(S: int, N: int, m: int, like: Tensor, chunk: int | None = None) -> int:
    """The number of neurons in a panel: `chunk`, or on a CPU 2,048 if they take 1 to 8 MB, on a GPU 32 MB."""
    if chunk is not None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; at least one neuron is needed")
        return chunk
    neuron = S * N * like.element_size()
    c = max(64, _PANEL_BYTES_GPU // neuron)
    if like.device.type == "cpu":
        c = max(64, min(_PANEL_BYTES // neuron, max(2048, _PANEL_BYTES // (8 * neuron))))
    return m if c >= m else c // 64 * 64


def panels(
    X: Float[Tensor, "N d"], W: Float[Tensor, "S d m"], chunk: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "S N c"]]]:
    """Walk over the pre-activations ``Z = X W`` in panels of `chunk` neurons; one buffer is reused for all of them.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(S, d, m)``.
        chunk: neurons in a panel; None for the default.

    Yields:
        The slice of neurons, and their pre-activations ``(S, N, c)``, valid until the next panel.
    """
    (S, _, m), N = W.shape, len(X)
    chunk = chunk_size(S, N, m, X, chunk)
    buffer = X.new_empty(S * N * min(chunk, m))
    for a in range(0, m, chunk):
        part = slice(a, min(a + chunk, m))
        c = part.stop - a
        Z = buffer[: S * N * c].view(S, N, c)
        multiply(X, W[:, :, part], Z)
        yield part, Z


def multiply(X: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """``X W`` for every member of the ensemble, into `out`; the plain matrix product for a single one."""
    if len(W) == 1:
        torch.mm(X, W[0], out=out[0])
    else:
        torch.bmm(X.expand(len(W), *X.shape), W, out=out)
    return out


def weigh(Z: Tensor, a: Tensor, out: Tensor) -> None:
    """``out += Z a`` for every member: matrix-vector products, which a batched product does badly."""
    for z, sign, total in zip(Z, a, out, strict=True):
        total.addmv_(z, sign)


@checked
def forward(
    X: Float[Tensor, "N d"], W: Float[Tensor, "... d m"], signs: Float[Tensor, "... m"], chunk: int | None = None
) -> Float[Tensor, "S N"]:
    """Compute ``f(x_i) = sum_r a_r relu(w_r.x_i) / sqrt(m)`` for every network.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(d, m)`` or ``(S, d, m)``.
        signs: ``(m,)`` or ``(S, m)``, every entry +1 or -1.
        chunk: neurons at a time; None for panels of a few megabytes.

    Returns:
        ``(S, N)``.

    Raises:
        TypeError, ValueError: as `check_layer`.
    """
    return outputs(X, *check_layer(X, W, signs), chunk)


def outputs(
    X: Float[Tensor, "N d"], W: Float[Tensor, "S d m"], signs: Float[Tensor, "S m"], chunk: int | None = None
) -> Float[Tensor, "S N"]:
    """`forward` for arguments that are checked already."""
    f = X.new_zeros(len(W), len(X))
    for part, Z in panels(X, W, chunk):
        weigh(Z.relu_(), signs[:, part], f)
    return f / math.sqrt(W.shape[2])


def tangent(
    X: Float[Tensor, "N d"],
    W: Float[Tensor, "S d m"],
    signs: Float[Tensor, "S m"],
    V: Float[Tensor, "S d m"],
    chunk: int | None = None,
) -> Float[Tensor, "S N"]:
    """Compute ``(J v)_i = sum_r a_r A_ri (v_r.x_i) / sqrt(m)``, the derivative of the outputs at W along V."""
    out = X.new_zeros(len(W), len(X))
    chunk = chunk_size(2 * len(W), len(X), W.shape[2], X, chunk)
    for (part, Z), (_, U) in zip(panels(X, W, chunk), panels(X, V, chunk), strict=True):
        U.masked_fill_(Z <= 0, 0)
        weigh(U, signs[:, part], out)
    return out / math.sqrt(W.shape[2])


def pull_back(
    X: Float[Tensor, "N d"],
    W: Float[Tensor, "S d m"],
    signs: Float[Tensor, "S m"],
    e: Float[Tensor, "S N"],
    chunk: int | None = None,
) -> Float[Tensor, "S d m"]:
    """Compute ``(J^T e)_r = a_r / sqrt(m) sum_i e_i A_ri x_i``: X weighted by e meets the 0/1 gates."""
    weighted = (X * e[:, :, None]).mT / math.sqrt(W.shape[2])  # (S, d, N)
    out = torch.empty_like(W)
    for part, Z in panels(X, W, chunk):
        out[:, :, part] = (weighted @ torch.gt(Z, 0, out=Z)) * signs[:, None, part]
    return out


def add_counts(total: Int[Tensor, "S N M"], A: Int[Tensor, "S N c"], B: Int[Tensor, "S M c"]) -> None:
    """``total += A B^T``, exactly, for entries in {-1, 0, 1}: int8 products where torch has them, else float32.

    Args:
        total: int64 or int32.
        A: int8, at most 2^24 columns.
        B: int8.
    """
    # torch's int8 product leaves its output unwritten for a single column
    if A.device.type == "cpu" and A.shape[2] >= 16 and _int8_products():
        for t, a, b in zip(total, A, B, strict=True):
            t.add_(torch._int_mm(a, b.T))  # noqa: SLF001
    else:  # below 2^24 every partial sum is an integer that float32 holds; TensorFloat-32 is exact too on such entries
        total.add_((A.float() @ B.float().mT).to(total.dtype))


@functools.cache
def _int8_products() -> bool:
    """Whether torch has int8 products on this CPU and they are right; the function is not public."""
    if not hasattr(torch, "_int_mm"):
        return False
    A = (torch.arange(7 * 1001, dtype=torch.int64, device="cpu").reshape(7, 1001) ** 2 % 3 - 1).to(torch.int8)
    return torch.equal(torch._int_mm(A, A.T), A.int() @ A.int().T)  # noqa: SLF001


def gate_counts(X: Float[Tensor, "N d"], W: Float[Tensor, "S d m"], chunk: int | None = None) -> Int[Tensor, "S N N"]:
    """Count, for every pair of inputs, the neurons that are open at both: ``C_ij = #{r: w_r.x_i > 0, w_r.x_j > 0}``.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(S, d, m)``.
        chunk: neurons in a panel; the counts do not depend on it.

    Returns:
        Exact integers, given the signs of the pre-activations.
    """
    (S, _, m), N = W.shape, len(X)
    chunk = min(m, max(64, chunk_size(4 * S, N, m, X, chunk)))
    counts = torch.zeros(S, N, N, dtype=torch.int32, device=X.device)  # m < 2^31; int64 sums take longer
    gates = torch.empty(S * N * min(chunk, m), dtype=torch.int8, device=X.device)
    for _, Z in panels(X, W, chunk):
        # compared in place and then copied: half the time of a comparison into bytes
        A = gates[: Z.numel()].view(Z.shape).copy_(torch.gt(Z, 0, out=Z))
        add_counts(counts, A, A)
    return counts.long()


@checked
def empirical_gram(
    X: Float[Tensor, "N d"], W: Float[Tensor, "*S d m"], *, chunk: int | None = None
) -> Float[Tensor, "*S N N"]:
    """Compute ``G = J J^T``, ``G_ij = x_i.x_j #{r: w_r.x_i > 0, w_r.x_j > 0} / m``, the NTK of one trained ReLU layer.

    The network is ``f(x) = sum_r a_r relu(w_r.x) / sqrt(m)``, ``a_r = +-1``, with W trained; the signs cancel. The
    counts are exact integers, streamed over the neurons, and J (N x m d numbers) is never formed.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(d, m)`` or ``(S, d, m)``.
        chunk: neurons at a time, None for panels of a few megabytes; the counts do not depend on it.

    Returns:
        ``(N, N)`` or ``(S, N, N)``; only the N^2 products with ``x_i.x_j`` are rounded.

    Raises:
        TypeError, ValueError: NaN, infinity or another dtype than floating point, or shapes that do not fit.
    """
    if W.ndim not in (2, 3) or W.shape[-2] != X.shape[1] or W.dtype != X.dtype or W.device != X.device:
        found = f"{tuple(W.shape)} {W.dtype} on {W.device}"
        raise ValueError(f"W is {found}; (d, m) or (S, d, m) with d = {X.shape[1]}, {X.dtype}, {X.device} is needed")
    check_scale("X", X, smallest=0.0)
    counts = gate_counts(X, W if W.ndim == 3 else W[None], chunk)
    G = (X @ X.T) * counts.to(X.dtype) / W.shape[-1]
    return G if W.ndim == 3 else G[0]


class WideStep:
    """The step function of gradient descent on ``0.5 * ||f(X) - y||^2`` over W, for `descent.iterate`.

    ``W <- W + eta J(W)^T (y - f(W))``, two passes over the panels.  Between them the gates are kept as bytes, N of
    them for each neuron, or found again by a third product when they would take more than `gate_bytes`.

    Args:
        X: inputs ``(N, d)``.
        y: targets ``(S, N)``.
        signs: ``(S, m)``.
        eta: the step of every network ``(S,)``.
        chunk: neurons in a panel; None for the default.  Bits depend on it.
        gate_bytes: the most that the gates may take.
    """

    @checked
    def __init__(
        self,
        X: Float[Tensor, "N d"],
        y: Float[Tensor, "S N"],
        signs: Float[Tensor, "S m"],
        eta: Float[Tensor, " S"],
        chunk: int | None = None,
        gate_bytes: int = 2**30,
    ) -> None:
        (S, m), (N, d) = signs.shape, X.shape
        self.X, self.y, self.signs, self.eta = X, y, signs.contiguous(), eta
        self.chunk = chunk = min(m, chunk_size(S, N, m, X, chunk))
        parts = [slice(a, min(a + chunk, m)) for a in range(0, m, chunk)]
        self.keep = S * N * m <= gate_bytes
        store = torch.empty(S * N * (m if self.keep else 0), dtype=torch.int8, device=X.device)
        panel, update = X.new_empty(S * N * chunk), X.new_empty(S * d * chunk)
        self.f, self.e, self.norms, self.weighted = y.new_empty(S, N), torch.empty_like(y), eta.new_empty(S), None
        self.parts = []
        for part in parts:
            a, c = part.start, part.stop - part.start
            gates = store[S * N * a : S * N * part.stop].view(S, N, c) if self.keep else None
            view = panel[: S * N * c].view(S, N, c), gates, update[: S * d * c].view(S, d, c)
            self.parts.append((part, self.signs[:, part].contiguous(), *view))

    def outputs(self, W: Tensor) -> Tensor:
        """``f(W)``, (S, N), and the gates if they are kept."""
        self.f.zero_()
        for part, a, Z, gates, _ in self.parts:
            multiply(self.X, W[:, :, part], Z)
            weigh(Z.relu_(), a, self.f)
            if gates is not None:
                gates.view(torch.bool).copy_(Z)  # open where relu is not zero: twice as fast as a comparison
        return self.f.mul_(self.signs.shape[1] ** -0.5)

    def __call__(self, params: list[Tensor], k: int, move: bool) -> Tensor:
        W = params[0]
        torch.sub(self.y, self.outputs(W), out=self.e)
        norms = torch.linalg.vector_norm(self.e, dim=1)
        if move:
            scaled = self.e * (self.eta * self.signs.shape[1] ** -0.5)[:, None]
            weighted = (self.X * scaled[:, :, None]).mT.contiguous()
            for part, a, Z, gates, U in self.parts:
                if gates is None:
                    multiply(self.X, W[:, :, part], Z)
                    torch.gt(Z, 0, out=Z)
                else:
                    Z.copy_(gates)
                torch.bmm(weighted, Z, out=U)
                W[:, :, part].addcmul_(U, a[:, None])
        return norms
