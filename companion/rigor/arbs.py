"""The one door to python-flint (the extra ``certify``): real balls of any precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Jet = tuple[Any, Any, Any]  # sigma, sigma', sigma'' in any number type


def flint() -> Any:
    """The module python-flint, or a clear error."""
    try:
        import flint
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "interval certificates need python-flint; install it with: pip install wide-enough[certify]"
        ) from None
    return flint


def ball_functions() -> dict[str, Callable[[Any], Jet]]:
    """The activations that have balls: ``z -> (sigma, sigma', sigma'')`` by name."""

    def of_tanh(z: Any) -> Jet:
        t = z.tanh()
        return t, 1 - t * t, -2 * t * (1 - t * t)

    def of_sigmoid(z: Any) -> Jet:
        s = 1 / (1 + (-z).exp())
        return s, s * (1 - s), s * (1 - s) * (1 - 2 * s)

    def of_softplus(z: Any) -> Jet:
        s = 1 / (1 + (-z).exp())
        return (1 + z.exp()).log(), s, s * (1 - s)

    def of_gauss(z: Any) -> Jet:
        g = (-z * z / 2).exp()
        return g, -z * g, (z * z - 1) * g

    return {
        "sin": lambda z: (z.sin(), z.cos(), -z.sin()),
        "cos": lambda z: (z.cos(), -z.sin(), -z.cos()),
        "exp": lambda z: (z.exp(),) * 3,
        "tanh": of_tanh,
        "sigmoid": of_sigmoid,
        "softplus": of_softplus,
        "gauss": of_gauss,
    }


BALL_ACTIVATIONS = tuple(ball_functions())


def ends(ball: Any) -> tuple[float, float]:
    """Floats below and above a ball."""
    return math.nextafter(float(ball.lower()), -math.inf), math.nextafter(float(ball.upper()), math.inf)


def enclosed_features(weights: Sequence[Tensor], X: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Midpoints and radii (N, m) that enclose the last hidden features of a network of any depth, weights taken exact.

    Args:
        weights: L matrices ``(n_in, n_out)``.
        X: inputs (N, d).
        act: one of `BALL_ACTIVATIONS`.

    Returns:
        Midpoints as floats, and upper bounds on the distance of the true features from them.

    Raises:
        ValueError: X or a weight holds NaN or infinity, where the features are no functions of the weights.
    """
    for name, A in (("X", X), *((f"W_{i + 1}", W) for i, W in enumerate(weights))):
        if not bool(torch.isfinite(A).all()):
            raise ValueError(f"{name} holds NaN or infinity; finite numbers are needed")
    lib, jet = flint(), ball_functions()[act]
    F = lib.arb_mat(X.tolist())
    for W in weights[:-1]:
        Z = F * lib.arb_mat(W.tolist())
        F = lib.arb_mat([[jet(Z[i, j])[0] for j in range(Z.ncols())] for i in range(Z.nrows())])
    rows = [[F[i, j] for j in range(F.ncols())] for i in range(F.nrows())]
    middle = [[float(t.mid()) for t in row] for row in rows]
    radius = [[ends(abs(t - c))[1] for t, c in zip(r, cs, strict=True)] for r, cs in zip(rows, middle, strict=True)]
    return tuple(torch.tensor(part, dtype=torch.float64, device="cpu") for part in (middle, radius))
