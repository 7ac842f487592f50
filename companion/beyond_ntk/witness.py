"""The witness in the proof of expressivity: wide-layer weights whose features have an explicit lower bound."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import checked


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


@checked
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
        ValueError: fewer than two numbers, equal or nearly equal ones (named), beta or a scale that is too small.
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
    if not beta > 0:
        raise ValueError(f"beta is {beta}; a positive number is needed")
    F = math.hypot(1.0, math.sqrt(6 * (N - 1)) / float(gaps.min()))
    least = N * F * math.log(2) / beta
    if not math.isfinite(4 * least * float(sorted_z.abs().max())):
        raise ValueError(f"z has a gap of {float(gaps.min()):.2g}; the weights overflow, larger gaps are needed")
    s = 4 * least if s is None else s
    if not s > least:
        raise ValueError(f"s is {s}; more than N F ln2 / beta = {least:.3g} is needed")
    weight = torch.full_like(sorted_z[:-1], float(s))
    h = torch.logaddexp(beta * s * (z.double()[:, None] - sorted_z[:-1]), z.new_zeros((), dtype=torch.float64)) / beta
    M = torch.cat([h, z.new_ones(N, 1, dtype=torch.float64)], 1)
    bound = min(1.0, s) * (1 / F - N * math.log(2) / (beta * s))
    return Witness(weight, -s * sorted_z[:-1], M, bound)
