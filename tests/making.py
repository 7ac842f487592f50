"""What many tests make their inputs with."""

import math

import torch

from companion import beyond_ntk as by
from companion import data, minimum_norm, networks
from companion.beyond_ntk import vision


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


def sphere_example():
    """Lesson 4's twenty inputs on the sphere in ten dimensions with a quadratic target."""
    g = seeded(1000)
    X = torch.randn(20, 10, generator=g, dtype=torch.float64)
    X /= torch.linalg.vector_norm(X, dim=1, keepdim=True)
    b = torch.randn(10, generator=g, dtype=torch.float64)
    y = (X @ (b / torch.linalg.vector_norm(b))) ** 2
    return X, (y - y.mean()) / y.std()


def wide_layer(seed, N=4, d=3, m=64, kappa=1.0, S=1, antisymmetric=True, kinks=0):
    """A random small problem for one wide layer; the first `kinks` neurons start almost at a kink of some input."""
    g = seeded(seed)
    X = data.sphere(N, d, g) * (0.5 + torch.rand(N, 1, generator=g, dtype=torch.float64))
    y = torch.randn(N, generator=g, dtype=torch.float64)
    W0, signs = minimum_norm.initialize(d, m, kappa=kappa, S=S, antisymmetric=antisymmetric, generator=g)
    for r in range(kinks):
        x = X[r % N]
        W0[:, :, r] -= (W0[:, :, r] @ x)[:, None] / (x @ x) * x * (1 - 1e-3)
    return X, y, W0, signs


def layer_jacobian(X, W, signs):
    """The Jacobian of one wide layer's outputs, ``(N, d m)``."""
    J = (X @ W > 0)[:, None, :] * signs * X[:, :, None] / math.sqrt(W.shape[1])
    return J.reshape(len(X), -1)


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


def relu_problem(N, d, widths, seed, *, beta=1.0, S=None, radius=1.0):
    """Points on a sphere, random signs, and a ReLU network with ``W_L = 0``, its first layer standard normal."""
    generator = seeded(seed)
    X, Y = data.sphere(N, d, generator, radius=radius), data.signs(N, generator)
    schemes = ["gaussian"] + ["lecun"] * (len(widths) - 2)
    return X, Y, networks.init_mlp(widths, scheme=schemes, beta=beta, zero_last=True, S=S, generator=generator)


def images(N=40, K=3, dtype=torch.float32):
    X = torch.randn(N, 16, generator=seeded(1), dtype=torch.float32).to(dtype)
    return X, torch.arange(N) % K


def resnet(seed=0, dropout=0.3, dtype=torch.float32):
    model = by.conv_resnet((1, 4, 4), (3, 4), 45, 3, generator=seeded(seed), dtype=dtype)
    model.flatten = torch.nn.Sequential(model.flatten, torch.nn.Dropout(dropout))
    return model


def sgd(params):
    return torch.optim.SGD(params, 0.05, momentum=0.9)


def run_two_phase(model, tau=2, X=None, y=None, optimizer=sgd, seed=7, **options):
    X0, y0 = images()
    options = {"batch": 16, "augment": vision.random_shift((1, 4, 4), 1)} | options
    return by.two_phase(
        model,
        model.last,
        X0 if X is None else X,
        y0 if y is None else y,
        optimizer,
        tau,
        generator=seeded(seed),
        **options,
    )


def near_net(block, L, M, n, gap, seed, scale=1.0):
    """A random mean-field net, inputs, targets within about `gap` of its outputs, and a readout."""
    from companion import mean_field as mf

    generator, F64 = seeded(seed), torch.float64
    theta = torch.randn(1, L, M, block.k, generator=generator, dtype=F64) * scale
    X = torch.linspace(-1.5, 1.5, n, dtype=F64)[:, None] + 0.1 * torch.randn(n, block.d, generator=generator, dtype=F64)
    v = torch.randn(block.d, generator=generator, dtype=F64).abs() + 0.2
    outputs = mf.forward(block, theta, X)[-1, 0] @ v
    return theta, X, outputs + gap * torch.randn(n, generator=generator, dtype=F64), v
