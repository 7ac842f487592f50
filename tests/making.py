"""What many tests make their inputs with."""

import torch


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def near_net(block, L, M, n, gap, seed, scale=1.0):
    """A random mean-field net, inputs, targets within about `gap` of its outputs, and a readout."""
    from companion import mean_field as mf

    generator, F64 = seeded(seed), torch.float64
    theta = torch.randn(1, L, M, block.k, generator=generator, dtype=F64) * scale
    X = torch.linspace(-1.5, 1.5, n, dtype=F64)[:, None] + 0.1 * torch.randn(n, block.d, generator=generator, dtype=F64)
    v = torch.randn(block.d, generator=generator, dtype=F64).abs() + 0.2
    outputs = mf.forward(block, theta, X)[-1, 0] @ v
    return theta, X, outputs + gap * torch.randn(n, generator=generator, dtype=F64), v
