"""What many tests make their inputs with."""

import torch

from companion import data, networks


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def relu_problem(N, d, widths, seed, *, beta=1.0, S=None, radius=1.0):
    """Points on a sphere, random signs, and a ReLU network with ``W_L = 0``, its first layer standard normal."""
    generator = seeded(seed)
    X, Y = data.sphere(N, d, generator, radius=radius), data.signs(N, generator)
    schemes = ["gaussian"] + ["lecun"] * (len(widths) - 2)
    return X, Y, networks.init_mlp(widths, scheme=schemes, beta=beta, zero_last=True, S=S, generator=generator)
