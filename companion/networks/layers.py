"""Layers of our own: activations that are analytic as written, and the sum of two branches as a module."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Softplus(nn.Module):
    """``softplus(x) = log(1 + exp(beta x)) / beta``, evaluated as ``logaddexp(beta x, 0) / beta``.

    ``torch.nn.Softplus`` is the identity beyond a threshold, with a jump of 2e-9 there: it is not analytic, and its
    huge thresholds overflow. This one is the function of the theorems.

    Args:
        beta: sharpness, positive; ReLU in the limit.

    Raises:
        ValueError: `beta` is not positive and finite.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta is {beta}; a positive finite number is needed")
        self.beta = float(beta)

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Apply the activation entry by entry."""
        return torch.logaddexp(self.beta * x, x.new_zeros(())) / self.beta

    def extra_repr(self) -> str:
        """The argument, for printing."""
        return f"beta={self.beta:g}"


class Square(nn.Module):
    """``x -> x^2``: an activation that is analytic but a polynomial, for which width buys no rank."""

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Apply the activation entry by entry."""
        return x * x


class Sine(nn.Module):
    """``x -> sin(x)``, analytic and not a polynomial."""

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Apply the activation entry by entry."""
        return torch.sin(x)


class Residual(nn.Module):
    """``x -> body(x) + shortcut(x)``.

    Args:
        body: the branch that learns a correction.
        shortcut: ``nn.Identity()`` where shapes agree, else a convolution that makes them agree.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Sum the two branches."""
        return self.body(x) + self.shortcut(x)
