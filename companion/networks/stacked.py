"""Multilayer networks as stacked weights: ``F_0 = X``, ``F_l = sigma(F_{l-1} W_l)``, output ``F_{L-1} W_L``, no biases.

An ensemble of S networks of one shape is a list of L tensors ``(S, n_in, n_out)``; one network is a list of matrices.
There are no layer objects: every function takes the weights, so that the mathematics is all there is to read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import checked
from companion.networks.activations import Activation, activation

_find = activation  # for functions with an argument of that name


_STD: dict[str, Callable[[int], float]] = {
    "lecun": lambda n_in: 1 / math.sqrt(n_in),
    "he": lambda n_in: math.sqrt(2 / n_in),
    "gaussian": lambda n_in: 1.0,
}

Seeds = torch.Generator | int | Sequence[torch.Generator | int]


@checked
def init_mlp(
    widths: Sequence[int],
    *,
    scheme: str | Sequence[str] = "lecun",
    beta: float = 1.0,
    zero_last: bool = False,
    S: int | None = None,
    generator: Seeds = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> list[Float[Tensor, "S n_in n_out"]]:
    """Draw ``W_l ~ N(0, s_l^2)`` entry by entry, with ``s_l^2`` = 1/n_in (lecun), 2/n_in (he) or 1 (gaussian).

    Numbers are drawn on the CPU in float64, one network after the other, and then cast: a CPU and a GPU run, float32
    and float64, start from the same numbers, and network s does not depend on S.

    Args:
        widths: ``(d, n_1, ..., n_L)``, the last one the number of outputs.
        scheme: one scheme for all layers, or one for each of the L layers.
        beta: factor on ``W_{L-1}``, the matrix that feeds the wide last hidden layer.
        zero_last: whether ``W_L = 0``.
        S: number of networks; the number of seeds if `generator` is a sequence, else 1.
        generator: one generator or seed from which all networks are drawn, or a sequence with one for each network.
        dtype: float32 or float64.
        device: where the weights live.

    Returns:
        The weights, L tensors ``(S, n_in, n_out)``.

    Raises:
        ValueError: fewer than two widths, a width below 1, an unknown scheme, a `beta` that is not finite, `beta`
            without a hidden layer, or a number of seeds other than S.
    """
    L = len(widths) - 1
    if L < 1 or min(widths) < 1:
        raise ValueError(f"widths is {tuple(widths)}; (d, n_1, ..., n_L) with L >= 1 and every width >= 1 is needed")
    schemes = [scheme] * L if isinstance(scheme, str) else list(scheme)
    if len(schemes) != L or any(s not in _STD for s in schemes):
        raise ValueError(f"scheme is {scheme!r}; one of {', '.join(_STD)}, or a list of {L} of them, is needed")
    if not math.isfinite(beta) or (L == 1 and beta != 1):
        raise ValueError(f"beta is {beta}; a finite factor is needed, and 1 where there is no hidden layer")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype is {dtype}; torch.float32 or torch.float64 is needed")
    generators = _generators(generator, S)
    shape = list(itertools.pairwise(widths))
    scales = [_STD[s](n_in) for s, (n_in, _) in zip(schemes, shape, strict=True)]
    if L > 1:
        scales[L - 2] *= beta
    if zero_last:
        scales[-1] = 0.0
    weights = [torch.empty(len(generators), *s, dtype=dtype, device=device) for s in shape]
    for member, g in enumerate(generators):
        for W, s, scale in zip(weights, shape, scales, strict=True):
            draw = torch.randn(s, generator=g, dtype=torch.float64)
            W[member] = torch.zeros_like(draw) if scale == 0 else draw.mul_(scale)
    return weights


def _generators(generator: Seeds, S: int | None) -> list[torch.Generator]:
    """One CPU generator for each network; a single one is shared and drawn from in turn."""
    if S is not None and S < 1:
        raise ValueError(f"S is {S}; at least one network is needed")
    single = isinstance(generator, torch.Generator | int)
    given = [generator] * (S or 1) if single else list(generator)
    if not given or (S is not None and len(given) != S):
        raise ValueError(f"generator holds {len(given)} seeds; {S or 'at least 1'} needed, one for each network")
    made: list[torch.Generator] = []
    for g in given:
        if isinstance(g, int):
            g = made[0] if single and made else torch.Generator().manual_seed(g)
        if g.device.type != "cpu":
            raise ValueError(f"generator lives on {g.device}; a CPU generator is needed, so that all devices agree")
        made.append(g)
    return made


def as_ensemble(weights: Sequence[Tensor]) -> list[Float[Tensor, "S n_in n_out"]]:
    """Give a single network ``(n_in, n_out)`` its leading ensemble axis (views, nothing is copied)."""
    return [W[None] if W.ndim == 2 else W for W in weights]


def check_weights(weights: Sequence[Tensor], X: Tensor, Y: Tensor | None = None) -> None:
    """Refuse weights that do not form a network for these data.

    Args:
        weights: L tensors, all ``(n_in, n_out)`` or all ``(S, n_in, n_out)``.
        X: inputs, shape ``(N, d)``.
        Y: targets, shape ``(N, K)``, or None.

    Raises:
        TypeError: not tensors, or a dtype other than float32 and float64.
        ValueError: an empty list, shapes that do not chain from d to K, unequal S, dtypes or devices, NaN or infinity.
    """
    if isinstance(weights, Tensor) or not len(weights):
        found = "a single tensor" if isinstance(weights, Tensor) else "empty"
        raise ValueError(f"weights is {found}; a list of matrices W_1, ..., W_L is needed")
    for i, W in enumerate(weights, 1):
        if not isinstance(W, Tensor) or W.dtype not in (torch.float32, torch.float64):
            found = W.dtype if isinstance(W, Tensor) else type(W).__name__
            raise TypeError(f"weights: W_{i} is {found}; a float32 or float64 tensor is needed")
        if W.ndim not in (2, 3) or W.shape[:-2] != weights[0].shape[:-2] or W.numel() == 0:
            shapes = ", ".join(str(tuple(V.shape)) for V in weights)
            raise ValueError(f"weights have shapes {shapes}; all (n_in, n_out) or all (S, n_in, n_out) is needed")
        n_in = X.shape[-1] if i == 1 else weights[i - 2].shape[-1]
        if W.shape[-2] != n_in:
            below = "X has" if i == 1 else f"W_{i - 1} gives"
            raise ValueError(f"weights: W_{i} takes {W.shape[-2]} inputs but {below} {n_in}; they must be equal")
        if W.dtype != X.dtype or W.device != X.device:
            raise ValueError(f"weights: W_{i} is {W.dtype} on {W.device}, X is {X.dtype} on {X.device}; make them one")
        if not all(torch.isfinite(m) for m in W.detach().aminmax()):
            raise ValueError(f"weights: W_{i} holds NaN or infinity; finite numbers are needed")
    if Y is not None and Y.shape[-1] != weights[-1].shape[-1]:
        raise ValueError(
            f"Y has {Y.shape[-1]} columns but the network has {weights[-1].shape[-1]} outputs; they must be equal"
        )
    if Y is not None and (Y.dtype != X.dtype or Y.device != X.device):
        raise ValueError(f"Y is {Y.dtype} on {Y.device}, X is {X.dtype} on {X.device}; make them equal")


def _layers(weights: Sequence[Tensor], X: Tensor, sigma: Activation) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The weights as an ensemble, the features F_0..F_{L-1} and the pre-activations Z_1..Z_{L-1}."""
    if not len(weights):
        raise ValueError("weights is empty; a list of matrices W_1, ..., W_L is needed")
    weights = as_ensemble(weights)
    F = [X.expand(weights[0].shape[0], *X.shape[-2:])]
    Z = []
    for W in weights[:-1]:
        Z.append(F[-1] @ W)
        F.append(sigma.value(Z[-1]))
    return weights, F, Z


def features(
    weights: Sequence[Tensor], X: Float[Tensor, "*S N d"], activation: str | Activation = "relu"
) -> list[Float[Tensor, "S N n"]]:
    """Compute ``F_0 = X`` and ``F_l = sigma(F_{l-1} W_l)`` for ``l = 1, ..., L-1``.

    Args:
        weights: L tensors ``(S, n_in, n_out)`` or ``(n_in, n_out)``.
        X: inputs ``(N, d)``, or ``(S, N, d)`` with each network's own inputs.
        activation: name or `Activation`.

    Returns:
        ``[F_0, ..., F_{L-1}]``, shapes ``(S, N, n_l)``; ``F_0`` is a view of `X`.
    """
    return _layers(weights, X, _find(activation))[1]


def forward(
    weights: Sequence[Tensor], X: Float[Tensor, "*S N d"], activation: str | Activation = "relu"
) -> Float[Tensor, "S N K"]:
    """Compute the output ``F_{L-1} W_L`` of every network; arguments as in `features`."""
    weights, F, _ = _layers(weights, X, _find(activation))
    return F[-1] @ weights[-1]


def gradients(
    weights: Sequence[Tensor],
    X: Float[Tensor, "*S N d"],
    Y: Float[Tensor, "*S N K"],
    activation: str | Activation = "relu",
) -> tuple[Float[Tensor, "S N K"], list[Float[Tensor, "S n_in n_out"]]]:
    """Compute the gradient of ``Phi = 0.5 * sum((F_{L-1} W_L - Y)^2)`` for every network, in closed form.

    ``D_L = R = F_{L-1} W_L - Y``, ``D_l = (D_{l+1} W_{l+1}^T) * sigma'(F_{l-1} W_l)``, ``grad_l = F_{l-1}^T D_l``.

    Args:
        weights: L tensors ``(S, n_in, n_out)`` or ``(n_in, n_out)``.
        X: inputs ``(N, d)``, or ``(S, N, d)`` with each network's own inputs.
        Y: targets ``(N, K)``, or ``(S, N, K)`` with each network's own targets.
        activation: name or `Activation`.

    Returns:
        The residual ``R`` ``(S, N, K)`` and the L gradients ``(S, n_in, n_out)``.
    """
    sigma = _find(activation)
    weights, F, Z = _layers(weights, X, sigma)
    R = F[-1] @ weights[-1] - Y
    D, grads = R, [F[-1].mT @ R]
    for l in range(len(weights) - 1, 0, -1):
        D = (D @ weights[l].mT) * sigma.derivative(Z[l - 1])
        grads.append(F[l - 1].mT @ D)
    return R, grads[::-1]
