"""What many tests make their inputs with."""

import math

import torch


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def shallow_problem(S, N, D, m, seed=0, *, bias=False):
    """S networks of one hidden layer, their inputs and one target for each input, standard normal."""
    X = gaussian(N, D, seed=seed)
    X = torch.cat([X, torch.ones(N, 1, dtype=torch.float64)], 1) if bias else X
    weights = [gaussian(S, X.shape[1], m, seed=seed + 1), gaussian(S, m, 1, seed=seed + 2)]
    return weights, X, gaussian(N, 1, seed=seed + 3)


def e1_at(w=math.pi / 2, v=1.0):
    """Lesson 5's example E1 at the weights (w, v), by default its bad minimum."""
    weights = [torch.tensor([[[t]]], dtype=torch.float64) for t in (w, v)]
    X, Y = torch.tensor([[1.0], [3.0]], dtype=torch.float64), torch.tensor([[-2.0], [-4.0]], dtype=torch.float64)
    return weights, X, Y
