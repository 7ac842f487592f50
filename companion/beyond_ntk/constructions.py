"""The constructions in the proofs of lesson 3: an explicit full-rank witness, BatchNorm's modes, and the tied trap."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

# --- a witness with an explicit lower bound


class Witness(NamedTuple):
    """Wide-layer weights on scalar features z that make ``M = [sigma(a_j z_i + b_j), 1]`` square and invertible.

    Args:
        weight: ``a_j = s``, ``(N-1,)``.
        bias: ``b_j = -s z_j``, ``(N-1,)``, the z sorted.
        M: the features with their constant column, ``(N, N)``, rows in the order of z as given.
        bound: a lower bound on ``sigma_N(M)``, positive.
    """

    weight: Tensor
    bias: Tensor
    M: Tensor
    bound: float


def spline_witness(z: Float[Tensor, " N"], beta: float, s: float | None = None) -> Witness:
    """Build ``sigma_beta(s (z - z_j))``, ``j < N``: ``sigma_N(M) >= min(1, s) (1/F - N ln2 / (beta s))``.

    ``F = sqrt(1 + 6 (N - 1) / g^2)`` with g the least gap of the sorted z. Divided by s the features are within
    ``ln2 / (beta s)`` of the hinges ``(z - z_j)_+``, a triangular matrix whose inverse is explicit (lesson 3).

    Args:
        z: distinct numbers ``(N,)``, ``N >= 2``.
        beta: the softplus' sharpness.
        s: the scale, above ``N F ln2 / beta``; None for four times that.

    Returns:
        The witness.

    Raises:
        ValueError: fewer than two numbers, equal ones (named), or a scale that is too small.
    """
    N = len(z)
    order = torch.argsort(z)
    sorted_z = z[order].double()
    gaps = sorted_z.diff()
    if N < 2 or not bool(torch.isfinite(z).all()):
        raise ValueError(f"z holds {N} numbers; at least two finite ones are needed")
    if not bool((gaps > 0).all()):
        i = int((gaps <= 0).nonzero()[0])
        raise ValueError(f"z[{int(order[i])}] and z[{int(order[i + 1])}] are equal; distinct numbers are needed")
    F = math.sqrt(1 + 6 * (N - 1) / float(gaps.min()) ** 2)
    least = N * F * math.log(2) / beta
    s = 4 * least if s is None else s
    if not s > least:
        raise ValueError(f"s is {s}; more than N F ln2 / beta = {least:.3g} is needed")
    weight = torch.full((N - 1,), float(s), dtype=torch.float64)
    h = torch.logaddexp(beta * s * (z.double()[:, None] - sorted_z[:-1]), z.new_zeros((), dtype=torch.float64)) / beta
    M = torch.cat([h, torch.ones(N, 1, dtype=torch.float64)], 1)
    bound = min(1.0, s) * (1 / F - N * math.log(2) / (beta * s))
    return Witness(weight, -s * sorted_z[:-1], M, bound)


# --- BatchNorm

_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Statistics = Mapping[str, tuple[Tensor, Tensor]]


def batchnorm_statistics(model: nn.Module, X: Float[Tensor, "N d"]) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure the mean and the (biased) variance of every BatchNorm's input, over all of X in eval mode.

    Args:
        model: any module with BatchNorm layers; not changed.
        X: inputs ``(N, d)``.

    Returns:
        Mean and variance ``(C,)`` by the layer's name.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            axes = [i for i in range(given[0].ndim) if i != 1]
            found[name] = (given[0].mean(axes), given[0].var(axes, correction=0))

        return hook

    twin = copy.deepcopy(model).eval()
    for name, part in twin.named_modules():
        if isinstance(part, _BATCHNORM):
            part.register_forward_pre_hook(look(name))
    with torch.no_grad():
        twin(X)
    return found


def switch_batchnorm(model: nn.Module, statistics: Statistics) -> nn.Module:
    """Give BatchNorm layers other statistics and undo it: ``gamma' = gamma sqrt((v' + e) / (v + e))``, ...

    ``b' = b + gamma (mu' - mu) / sqrt(v + e)``. The copy computes the same function in eval mode; with the statistics
    of `batchnorm_statistics` it does so in full-batch train mode, too. So full rank for one value of the buffers is
    full rank for every other (lesson 3).

    Args:
        model: any module; not changed.
        statistics: the new mean and variance by the layer's name; other layers stay.

    Returns:
        A copy in eval mode.

    Raises:
        ValueError: a name that is no BatchNorm with statistics and affine parameters, or parameters that are shared.
    """
    twin = copy.deepcopy(model).eval()
    parts = dict(twin.named_modules())
    seen: set[int] = set()
    for name, (mean, variance) in statistics.items():
        part = parts.get(name)
        if not isinstance(part, _BATCHNORM) or part.running_mean is None or part.weight is None:
            raise ValueError(f"statistics names {name!r}; a BatchNorm with buffers and affine parameters is needed")
        if id(part.weight) in seen:
            raise ValueError(f"BatchNorm {name!r} shares its parameters with another; each needs its own")
        seen.add(id(part.weight))
        with torch.no_grad():
            root = torch.sqrt(part.running_var + part.eps)
            part.bias.add_(part.weight * (mean - part.running_mean) / root)
            part.weight.mul_(torch.sqrt(variance + part.eps) / root)
            part.running_mean.copy_(mean)
            part.running_var.copy_(variance)
    return twin


# --- the tied trap


def tied_floor(Y: Float[Tensor, "N K"]) -> float:
    """Compute ``(1/2N) sum_{k >= 2} sigma_k^2(Y - mean Y)``: no network with equal wide neurons gets below.

    Off the constants its residual is a matrix of rank at most 1 minus ``Y - mean Y``: Eckart and Young (lesson 3).

    Args:
        Y: targets ``(N, K)``.

    Returns:
        The floor of the averaged squared loss; 0 for two one-hot classes, ``(K-2) / (2K)`` for K balanced ones.
    """
    return float(torch.linalg.svdvals(Y - Y.mean(0))[1:].square().sum() / (2 * len(Y)))


class TiedNet(nn.Module):
    """``q = m w sigma(A^T xi + a) + b``: the m equal wide neurons of a tied network as one of multiplicity m.

    The gradients of A, a and w are divided by m, so that any elementwise optimizer moves them as it moves each copy in
    the full network, and no rounding can tear the copies apart.

    Args:
        model: a network with parts ``wide``, ``wide_activation`` and ``last`` as `vision.mlp` builds them; its first
            wide neuron is the one that is kept.
    """

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        parts = list(model.named_children())
        names = [name for name, _ in parts]
        if names[-3:] != ["wide", "wide_activation", "last"]:
            raise ValueError(f"model ends in {names[-3:]}; wide, wide_activation, last is needed")
        self.m = model.wide.out_features
        self.lower = nn.Sequential(*(copy.deepcopy(part) for _, part in parts[:-3]))
        like = {"dtype": model.wide.weight.dtype, "device": model.wide.weight.device}
        self.activation = copy.deepcopy(model.wide_activation)
        self.A = nn.Parameter(model.wide.weight.detach()[:1].clone())
        self.a = nn.Parameter(model.wide.bias.detach()[:1].clone())
        self.w = nn.Parameter(model.last.weight.detach()[:, :1].clone())
        bias = model.last.bias
        self.b = nn.Parameter(torch.zeros(model.last.out_features, **like) if bias is None else bias.detach().clone())
        for parameter in (self.A, self.a, self.w):
            parameter.register_hook(lambda g: g / self.m)

    def forward(self, X: Float[Tensor, "N d"]) -> Float[Tensor, "N K"]:
        """The outputs of the tied network."""
        h = self.activation(nn.functional.linear(self.lower(X), self.A, self.a))
        return self.m * nn.functional.linear(h, self.w) + self.b


def tie(model: nn.Sequential) -> nn.Sequential:
    """Copy a network and give all its wide neurons the weights of the first, incoming and outgoing.

    Args:
        model: a network with parts ``wide`` and ``last``; not changed.

    Returns:
        The tied copy, an ordinary network that floating point can untie.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.wide.weight.copy_(twin.wide.weight[:1].expand_as(twin.wide.weight))
        twin.wide.bias.copy_(twin.wide.bias[:1].expand_as(twin.wide.bias))
        twin.last.weight.copy_(twin.last.weight[:, :1].expand_as(twin.last.weight))
    return twin


def untie(net: TiedNet, model: nn.Sequential) -> nn.Sequential:
    """Copy a `TiedNet` back into an ordinary network of the layout of `model`.

    Args:
        net: the tied network.
        model: gives the layout; not changed.

    Returns:
        A tied network with the same outputs.
    """
    twin = copy.deepcopy(model)
    lower = nn.Sequential(*list(twin.children())[:-3])
    lower.load_state_dict(net.lower.state_dict())
    with torch.no_grad():
        twin.wide.weight.copy_(net.A.expand_as(twin.wide.weight))
        twin.wide.bias.copy_(net.a.expand_as(twin.wide.bias))
        twin.last.weight.copy_(net.w.expand_as(twin.last.weight))
        if twin.last.bias is not None:
            twin.last.bias.copy_(net.b)
    return twin


def tied_train(
    model: nn.Sequential,
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
) -> tuple[TiedNet, Float[Tensor, " T"]]:
    """Train the tied version of a network, full batch, on ``L = (1/2N) |q - Y|^2``, without rounding escape.

    Args:
        model: a network as `vision.mlp` builds it; not changed.
        X: inputs ``(N, d)``.
        Y: targets ``(N, K)``.
        optimizer: makes an elementwise optimizer (SGD, Adam, ...) from parameters.
        steps: number of steps.

    Returns:
        The tied network and its loss before each step and after the last, ``(steps + 1,)``; never below `tied_floor`.

    Raises:
        ValueError: a negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; a number >= 0 is needed")
    net = TiedNet(model)
    rule = optimizer(net.parameters())
    losses = torch.zeros(steps + 1, dtype=X.dtype, device=X.device)
    for k in range(steps + 1):
        rule.zero_grad()
        loss = 0.5 * (net(X) - Y).square().sum(1).mean()
        losses[k] = loss.detach()
        if k < steps:
            loss.backward()
            rule.step()
    return net, losses
