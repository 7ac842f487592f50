"""Enclosed networks against python-flint in high precision, and against the floating-point network."""

import pytest
import torch

from companion import mean_field as mf
from companion.mean_field.blocks import RBF, BallBump, Bias, Custom, GaussBump, Linear, TanhMLP
from companion.mean_field.enclosures import enclose
from companion.mean_field.resnets import adjoint

F64 = torch.float64
BLOCKS = [BallBump(1), BallBump(2), BallBump(2, R=1.7), GaussBump(0.7), RBF(2), TanhMLP(2), Linear(2), Bias(2)]


def problem(block, L=3, M=4, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(L, M, block.k, generator=generator, dtype=F64)
    X, v = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((n, block.d), (block.d,)))
    return theta, X, v


def inside(interval, value):
    return bool(((interval.lo <= value) & (value <= interval.hi)).all())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.name}{b.d}")
def test_enclosure_contains_the_float_network_up_to_its_rounding_and_is_narrow(block):
    theta, X, v = problem(block)
    found = enclose(block, theta, X, v)
    z, P = adjoint(block, theta[None], X, v.expand(1, *X.shape).contiguous())
    for interval, value in ((found.z, z[:, 0]), (found.P, P[:, 0]), (found.output, z[-1, 0] @ v)):
        mid, radius = interval.split()
        assert torch.allclose(mid, value, rtol=1e-13, atol=1e-13)
        assert float(radius.max()) < 1e-12
    mid, radius = found.J.split()
    K = mf.gram_kernel(block, theta[None], X, v)[0]
    assert torch.allclose(mid @ mid.T, K, rtol=1e-12, atol=1e-13)
    assert float(radius.max()) < 1e-12


def arb_net(flint, block, theta, X, v):
    """The outputs of BallBump in balls of 200 bits, by the definition."""
    arb = flint.arb
    L, M, _ = theta.shape
    outputs = []
    for x in X.tolist():
        z = [arb(a) for a in x]
        for layer in theta.tolist():
            moved = [arb(0)] * block.d
            for u, *omega in layer:
                omega = [arb(w) for w in omega]
                q = 1 / (1 + sum((w * w for w in omega), arb(0))).sqrt()
                b, c = [w * q for w in omega[: block.d]], [w * q for w in omega[block.d :]]
                square = sum(((a - arb(block.R) * e) ** 2 for a, e in zip(z, c, strict=True)), arb(0))
                bump = (-square / 2).exp() * arb(u)
                moved = [m + bump * e for m, e in zip(moved, b, strict=True)]
            z = [a + m / (L * M) for a, m in zip(z, moved, strict=True)]
        outputs.append(sum((arb(e) * a for e, a in zip(v.tolist(), z, strict=True)), arb(0)))
    return outputs


@pytest.mark.parametrize("block", [BallBump(1), BallBump(2)], ids=lambda b: f"d{b.d}")
def test_outputs_and_jacobian_contain_the_values_in_high_precision(block):
    flint = pytest.importorskip("flint")
    flint.ctx.prec = 300
    theta, X, v = problem(block, L=2, M=3)
    L, M, k = theta.shape
    found = enclose(block, theta, X, v)
    base = arb_net(flint, block, theta, X, v)
    for i, value in enumerate(base):
        assert flint.arb(found.output.lo[i].item()) <= value <= flint.arb(found.output.hi[i].item())
    # the Jacobian by central differences of order four and step 2^-30: their error is about 2^-120
    step, scale = 2.0**-30, flint.arb(L * M)
    for index in range(0, L * M * k, 5):
        shifted = []
        for sign in (1, -1, 2, -2):
            moved = theta.clone().flatten()
            moved[index] += sign * step
            exact = moved[index].item() - theta.flatten()[index].item()
            shifted.append((arb_net(flint, block, moved.view_as(theta), X, v), exact))
        (plus, a), (minus, b), (plus2, _), (minus2, _) = shifted
        assert a == -b == step
        for i in range(len(X)):
            slope = (8 * (plus[i] - minus[i]) - (plus2[i] - minus2[i])) / flint.arb(12 * step) * scale.sqrt()
            slack = flint.arb(1e-30)
            assert (
                flint.arb(found.J.lo[i, index].item()) - slack
                <= slope
                <= flint.arb(found.J.hi[i, index].item()) + slack
            )


@pytest.mark.parametrize("block", [BallBump(2), GaussBump(1.0), TanhMLP(2)], ids=lambda b: b.name)
def test_bounds_bracket_the_measured_numbers(block):
    theta, X, v = problem(block, L=4, M=16)
    y, counts = torch.tensor([0.3, -0.2, 1.0], dtype=F64), torch.tensor([1, 3, 2])
    r, low, high, size = enclose(block, theta, X, v).bounds(y, counts)
    states = mf.forward(block, theta[None], X)
    root = counts.to(F64).sqrt()
    residual = (states[-1, 0] @ v - y) * root
    values = torch.linalg.eigvalsh(mf.gram_kernel(block, theta[None], X, v)[0] * root * root[:, None])
    norm = float(torch.linalg.vector_norm(residual))
    assert norm * (1 - 1e-13) <= r <= norm * (1 + 1e-11)
    assert float(values[0]) * (1 - 1e-4) <= low <= float(values[0]) * (1 + 1e-10)
    assert float(values[-1]) * (1 - 1e-10) <= high <= float(values[-1]) * (1 + 1e-4)
    top = float(torch.linalg.vector_norm(states, dim=-1).max())
    assert top * (1 - 1e-13) <= size <= top * (1 + 1e-11)


def test_a_singular_kernel_shows_nothing_positive():
    block = Bias(1)
    theta, X, v = problem(block)
    _, low, _, _ = enclose(block, theta, X, v).bounds(torch.zeros(3, dtype=F64), torch.ones(3, dtype=torch.int64))
    assert low == 0.0


def test_weights_are_used():
    block = BallBump(1)
    theta, X, v = problem(block)
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=F64)
    found = enclose(block, theta, X, v, weights)
    mid, _ = found.J.split()
    assert torch.allclose(mid @ mid.T, mf.gram_kernel(block, theta[None], X, v, weights)[0], rtol=1e-12)
    assert inside(found.z[0], X)


def test_what_cannot_be_enclosed_is_refused():
    theta, X, v = problem(GaussBump(1.0))
    with pytest.raises(TypeError, match="interval formulas exist for BallBump"):
        enclose(Custom(lambda z, theta: theta * z, 1, 1), theta, X, v)
    with pytest.raises(TypeError, match=r"theta is torch\.float32"):
        enclose(GaussBump(1.0), theta.float(), X, v)
    with pytest.raises(ValueError, match="use 'measured'"):
        enclose(GaussBump(1.0), torch.zeros(1000, 10000, 1, dtype=F64), X, v)
