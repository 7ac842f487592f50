"""What many tests make their inputs with."""

import torch


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def phase2_problem(N=12, m=20, K=3, loss="squared", seed=0, dtype=torch.float64):
    g = seeded(seed)
    h = torch.logaddexp(torch.randn(N, m, generator=g, dtype=dtype), torch.zeros((), dtype=dtype)) + 1
    M = torch.cat([h, torch.ones(N, 1, dtype=dtype)], 1)
    V0 = 0.1 * torch.randn(m + 1, K, generator=g, dtype=dtype)
    labels = torch.arange(N) % K
    Y = labels if loss == "cross_entropy" else torch.nn.functional.one_hot(labels).to(dtype)
    return M, V0, Y
