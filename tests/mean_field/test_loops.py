"""Every loop against automatic differentiation through its block's definition, kept or recomputed, weighted or not."""

import pytest
import torch

from companion.mean_field import loops as layer_loops
from companion.mean_field.blocks import RBF, BallBump, Bias, Custom, GaussBump, Linear, ReluMLP, Squares, TanhMLP


def twist(z, theta):
    return theta[..., :2] * torch.cos(z - theta[..., 2:])


BLOCKS = [
    BallBump(1),
    BallBump(3, R=1.5),
    GaussBump(1.5),
    ReluMLP(3),
    TanhMLP(2),
    RBF(2),
    Linear(2),
    Bias(2),
    Squares(1),
]
BLOCKS += [Custom(twist, 2, 4)]
S, L, M, n = 3, 4, 6, 5


def example(block, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    w = torch.rand(M, generator=g, dtype=torch.float64) + 0.1
    return 0.5 * randn(S, L, M, block.k), randn(n, block.d), (w / w.sum()).to(dtype), randn(S, n, block.d)


def slow(block, theta, X, w, p_L):
    """States, adjoints and gradients with respect to the laws, all by automatic differentiation."""
    theta = theta.clone().requires_grad_()
    z = [X.expand(S, n, block.d).clone().requires_grad_()]
    for l in range(L):
        z.append(z[-1] + torch.einsum("snmd,m->snd", block.f(z[-1][:, :, None], theta[:, l, None]), w) / L)
    grads = torch.autograd.grad((z[-1] * p_L).sum(), [theta, *z], materialize_grads=True)
    return torch.stack(z).detach(), torch.stack(grads[1:]), grads[0] * L / w[:, None]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.name}-{b.d}")
def test_equals_autograd(block, equal, keep):
    theta, X, w, p_L = example(block)
    w = torch.full_like(w, 1 / M) if equal else w
    loop = layer_loops.loop(block, (S, L, M, n), w, keep)
    states, adjoints, gradient = slow(block, theta, X, w, p_L)
    for _ in range(2):  # the memory of a first pass must not show in a second
        loop.load(theta)
        torch.testing.assert_close(loop.forward(X), states, rtol=1e-12, atol=1e-12)
        G, p = torch.full_like(theta, torch.nan), torch.empty_like(states)
        loop.backward(p_L, G, p)
        torch.testing.assert_close(p, adjoints, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(G, gradient, rtol=1e-12, atol=1e-12)


def test_the_quick_loops_are_used():
    assert {type(layer_loops.loop(b, (S, L, M, n), torch.ones(M) / M, False)) for b in BLOCKS} == {
        layer_loops.Loop,
        layer_loops.MLPLoop,
        layer_loops.BallBumpLoop,
        layer_loops.GaussBumpLoop,
    }


@pytest.mark.parametrize("block", [BallBump(2), ReluMLP(2)], ids=["BallBump", "ReluMLP"])
def test_float32(block):
    theta, X, w, p_L = example(block)
    _, _, gradient = slow(block, theta, X, w, p_L)
    loop = layer_loops.loop(block, (S, L, M, n), w.float(), False)
    loop.load(theta.float())
    loop.forward(X.float())
    G = torch.empty_like(theta, dtype=torch.float32)
    loop.backward(p_L.float(), G)
    assert float((G - gradient).norm() / gradient.norm()) < 1e-5
