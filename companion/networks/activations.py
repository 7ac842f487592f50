"""Activations with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.arguments import checked


@dataclass(frozen=True)
class Activation:
    """An activation ``sigma`` with its derivatives, applied entry by entry.

    Args:
        name: how it is called in `activation` and in stored configurations.
        value: ``z -> sigma(z)``.
        derivative: ``z -> sigma'(z)``; the convention at a kink or a jump is 0.
        second: ``z -> sigma''(z)``, where a lesson needs it.
        pull: ``(D, h) -> D * sigma'(z)`` with ``h = sigma(z)``, in place on ``D``; None if ``sigma'`` is no function of
            ``sigma``. With it the trainer keeps one array for each layer instead of two.
        value_: ``z -> sigma(z)`` in place on ``z``, where torch has it, so that nothing is allocated.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor] | None = None
    pull: Callable[[Tensor, Tensor], Tensor] | None = None
    value_: Callable[[Tensor], Tensor] | None = None


def _softplus(z: Tensor) -> Tensor:
    # torch's softplus is the identity beyond 20 and so 2e-9 off there; logaddexp is accurate everywhere.
    return torch.logaddexp(z, z.new_zeros(()))


def _tanh_second(z: Tensor) -> Tensor:
    h = torch.tanh(z)
    return -2 * h * (1 - h**2)


def _sigmoid_second(z: Tensor) -> Tensor:
    h = torch.sigmoid(z)
    return h * (1 - h) * (1 - 2 * h)


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _sigmoid_derivative(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)  # 1 - sigmoid(z) would cancel for large z


def _relu_pull(D: Tensor, h: Tensor) -> Tensor:
    # One pass, nothing allocated: D where h > 0, else 0.
    return torch.ops.aten.threshold_backward.grad_input(D, h, 0, grad_input=D)


def _tanh_pull(D: Tensor, h: Tensor) -> Tensor:
    return D.mul_(1 - h.square())


def _softplus_pull(D: Tensor, h: Tensor) -> Tensor:
    return D.mul_(torch.expm1(-h).neg_())


def _sigmoid_pull(D: Tensor, h: Tensor) -> Tensor:
    return D.mul_(h).mul_(1 - h)


def _gauss(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z**2)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("relu", torch.relu, _step, torch.zeros_like, _relu_pull, torch.relu_),
        Activation("step", _step, torch.zeros_like, torch.zeros_like, lambda D, h: D.zero_()),
        Activation("tanh", torch.tanh, lambda z: 1 - torch.tanh(z) ** 2, _tanh_second, _tanh_pull, torch.tanh_),
        Activation("softplus", _softplus, torch.sigmoid, _sigmoid_derivative, _softplus_pull),
        Activation("sigmoid", torch.sigmoid, _sigmoid_derivative, _sigmoid_second, _sigmoid_pull, torch.sigmoid_),
        Activation("sin", torch.sin, torch.cos, lambda z: -torch.sin(z), None, torch.sin_),
        Activation("exp", torch.exp, torch.exp, torch.exp, lambda D, h: D.mul_(h), torch.exp_),
        Activation("identity", torch.clone, torch.ones_like, torch.zeros_like, lambda D, h: D, lambda z: z),
        Activation("cos", torch.cos, lambda z: -torch.sin(z), lambda z: -torch.cos(z), None, torch.cos_),
        Activation("gauss", _gauss, lambda z: -z * _gauss(z), lambda z: (z**2 - 1) * _gauss(z)),
    )
}


@checked
def activation(name: str | Activation) -> Activation:
    """Look up an activation by name; an `Activation` is returned as it is.

    Raises:
        ValueError: no activation has this name.
    """
    if isinstance(name, Activation):
        return name
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; one of {', '.join(ACTIVATIONS)} or an Activation is needed")
    return ACTIVATIONS[name]
