"""The tied trap: equal wide neurons stay equal, and the loss stays above a floor (lesson 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion.arguments import checked
from companion.beyond_ntk.phase1 import outputs


@checked
def tied_floor(Y: Float[Tensor, "N K"]) -> float:
    """Compute ``(1/2N) sum_{k >= 2} sigma_k^2(Y - mean Y)``: no network with equal wide neurons gets below.

    Off the constants its residual is a matrix of rank at most 1 minus ``Y - mean Y``: Eckart and Young (lesson 3).

    Args:
        Y: targets ``(N, K)``.

    Returns:
        The floor of the averaged squared loss; 0 for two one-hot classes, ``(K-2) / (2K)`` for K balanced ones.
    """
    return float(torch.linalg.svdvals(Y - Y.mean(0))[1:].square().sum() / (2 * len(Y)))


def _check_parts(model: nn.Module) -> None:
    names = [name for name, _ in model.named_children()][-3:]
    if names != ["wide", "wide_activation", "last"]:
        raise ValueError(f"model ends in {names}; wide, wide_activation, last is needed")


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
        _check_parts(model)
        parts = list(model.named_children())
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


@checked
def tie(model: nn.Sequential) -> nn.Sequential:
    """Copy a network and give all its wide neurons the weights of the first, incoming and outgoing.

    Args:
        model: a network with parts ``wide`` and ``last``; not changed.

    Returns:
        The tied copy, an ordinary network that floating point can untie.

    Raises:
        ValueError: the model has no such parts.
    """
    _check_parts(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.wide.weight.copy_(twin.wide.weight[:1].expand_as(twin.wide.weight))
        twin.wide.bias.copy_(twin.wide.bias[:1].expand_as(twin.wide.bias))
        twin.last.weight.copy_(twin.last.weight[:, :1].expand_as(twin.last.weight))
    return twin


@checked
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


@checked
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
        loss = 0.5 * (outputs(net, X) - Y).square().sum(1).mean()
        losses[k] = loss.detach()
        if k < steps:
            loss.backward()
            rule.step()
    return net, losses
