"""Networks: stacked weights of our own, activations, layers, and what reads a `torch.nn.Module`."""

from companion.networks.activations import ACTIVATIONS, Activation, activation
from companion.networks.layers import Residual, Sine, Softplus, Square
from companion.networks.reading import Head, Network, NoEnclosure, ancestors, head, inputs, read
from companion.networks.stacked import as_ensemble, check_weights, features, forward, gradients, init_mlp

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Head",
    "Network",
    "NoEnclosure",
    "Residual",
    "Sine",
    "Softplus",
    "Square",
    "activation",
    "ancestors",
    "as_ensemble",
    "check_weights",
    "features",
    "forward",
    "gradients",
    "head",
    "init_mlp",
    "inputs",
    "read",
]
