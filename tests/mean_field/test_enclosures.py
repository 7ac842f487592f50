"""Enclosed networks against high precision, and against the floating-point network."""

import itertools
from fractions import Fraction

import mpmath
import pytest
import torch

from companion import mean_field as mf
from companion.mean_field.blocks import RBF, BallBump, Bias, Custom, GaussBump, Linear, TanhMLP
from companion.mean_field.enclosures import _FORMULAS, enclose
from companion.mean_field.resnets import adjoint
from companion.rigor import Interval

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


def exact(block, z, theta):
    """The block in high precision, by its definition."""
    d, exp = block.d, mpmath.exp
    if isinstance(block, BallBump):
        q = 1 / mpmath.sqrt(1 + sum(w * w for w in theta[1:]))
        c = [mpmath.mpf(block.R) * w * q for w in theta[1 + d :]]
        bump = theta[0] * q * exp(-sum((a - b) ** 2 for a, b in zip(z, c, strict=True)) / 2)
        return [bump * w for w in theta[1 : 1 + d]]
    if isinstance(block, GaussBump):
        s = z[0] - theta[0]
        return [mpmath.mpf(block.alpha) * s * exp((1 - s * s) / 2)]
    if isinstance(block, RBF):
        bump = exp(-sum((a - b) ** 2 for a, b in zip(z, theta[d:], strict=True)) / 2)
        return [bump * u for u in theta[:d]]
    if isinstance(block, TanhMLP):
        h = mpmath.tanh(sum(a * b for a, b in zip(theta[d : 2 * d], z, strict=True)) + theta[2 * d])
        return [h * v for v in theta[:d]]
    return [theta[0] * a for a in z] if isinstance(block, Linear) else list(theta)


def exact_states(block, theta, x, w):
    """States of one input; theta is a list of layers of lists of particles."""
    states = [list(x)]
    for layer in theta:
        each = [exact(block, states[-1], particle) for particle in layer]
        moved = [sum(a * f[i] for a, f in zip(w, each, strict=True)) for i in range(block.d)]
        states.append([a + b / len(theta) for a, b in zip(states[-1], moved, strict=True)])
    return states


def contains(interval, index, value):
    low, high = (mpmath.mpf(float(end[index])) for end in (interval.lo, interval.hi))
    return low - mpmath.mpf(10) ** -40 <= value <= high + mpmath.mpf(10) ** -40  # of the difference quotients below


@pytest.mark.parametrize("scale", [1e-6, 1.0, 6.0])
@pytest.mark.parametrize("block", [*BLOCKS[:1], *BLOCKS[2:]], ids=lambda b: f"{b.name}{b.d}")
def test_states_adjoints_and_jacobian_contain_the_values_in_high_precision(block, scale):
    mpmath.mp.dps, step = 90, mpmath.mpf(10) ** -25
    theta, X, v = problem(block, L=2, M=2, n=2, seed=int(scale))
    theta = theta * scale
    weights = torch.tensor([0.3, 0.7], dtype=F64) if scale == 1 else None
    w = [mpmath.mpf(a) for a in weights.tolist()] if scale == 1 else [mpmath.mpf(1) / 2] * 2
    found = enclose(block, theta, X, v, weights, local=True)
    particles = [[[mpmath.mpf(a) for a in p] for p in layer] for layer in theta.tolist()]
    out = [mpmath.mpf(a) for a in v.tolist()]

    def output(at, x):
        return sum(a * b for a, b in zip(out, exact_states(block, at, x, w)[-1], strict=True))

    for i, x in enumerate([[mpmath.mpf(a) for a in row] for row in X.tolist()]):
        states = exact_states(block, particles, x, w)
        assert contains(found.output, i, output(particles, x))
        assert all(contains(found.z, (l, i, a), states[l][a]) for l in range(3) for a in range(block.d))
        for l, m, k in itertools.product(range(2), range(2), range(block.k)):
            before = particles[l][m][k]
            ends = []
            for sign in (1, -1):
                particles[l][m][k] = before + sign * step
                ends.append(output(particles, x))
            particles[l][m][k] = before
            slope = (ends[0] - ends[1]) / (2 * step) * mpmath.sqrt(2 / w[m])
            assert contains(found.J, (i, (2 * l + m) * block.k + k), slope), (l, m, k)
        for l, a in itertools.product(range(3), range(block.d)):  # the adjoint of state l: the rest of the net from it
            ends = []
            for sign in (1, -1):
                z = list(states[l])
                z[a] += sign * step
                for layer in particles[l:]:
                    each = [exact(block, z, p) for p in layer]
                    moved = [sum(q * f[b] for q, f in zip(w, each, strict=True)) for b in range(block.d)]
                    z = [p + q / 2 for p, q in zip(z, moved, strict=True)]
                ends.append(sum(p * q for p, q in zip(out, z, strict=True)))
            assert contains(found.P, (l, i, a), (ends[0] - ends[1]) / (2 * step)), (l, a)


@pytest.mark.parametrize("block", [*BLOCKS[:1], *BLOCKS[2:]], ids=lambda b: f"{b.name}{b.d}")
def test_formulas_contain_every_point_of_a_wide_interval(block):
    generator, formulas = torch.Generator().manual_seed(3), _FORMULAS[type(block)]
    theta, X, v = problem(block, L=1, M=5, n=4)
    theta, width = theta[0], 0.3
    z = Interval(X[:, None] - width, X[:, None] + width)
    p = Interval((v - width).expand(4, 1, block.d), (v + width).expand(4, 1, block.d))
    value, (back, rows) = formulas[0](block, z, theta), formulas[1](block, z, theta, p)
    for trial in range(60):
        shift, turn = (2 * torch.rand(4, block.d, generator=generator, dtype=F64) - 1 for _ in range(2))
        if trial < 2**block.d:  # the corners
            shift = torch.tensor([1.0 if trial >> a & 1 else -1.0 for a in range(block.d)], dtype=F64).expand(4, -1)
            turn = shift.flip(0)
        at, q = X + width * shift, v + width * turn
        each = block.rows(at[None], theta[None], q[None])[0]
        assert near_inside(value, block.f(at[:, None], theta))
        assert near_inside(rows, each)
        for m in range(5):
            one = block.pull(at[:, None], theta[m].expand(4, 1, -1), torch.ones(1, dtype=F64), q[:, None])[0][:, 0]
            assert near_inside(back[:, m], one)


def near_inside(interval, value):
    """Containment up to the rounding of the value itself."""
    slack = 1e-14 * (1 + value.abs())
    return bool(((interval.lo - slack <= value) & (value <= interval.hi + slack)).all())


def test_the_smallest_eigenvalue_gives_way_to_the_radius_of_the_jacobian():
    # sixteen layers that halve a state by z - 1.5 z: every layer widens the intervals five times as much as the numbers
    theta, X, v = torch.full((16, 1, 1), -24.0, dtype=F64), torch.tensor([[0.7]], dtype=F64), torch.ones(1, dtype=F64)
    found = enclose(Linear(1), theta, X, v)
    mid, radius = found.J.split()
    assert float(radius.norm()) > 1e-6 * float(mid.norm())
    r, low, high, size = found.bounds(torch.zeros(1, dtype=F64), torch.ones(1, dtype=torch.int64))
    assert r >= float(found.output.magnitude()) > 0
    assert size >= 0.7
    sigma, width = float(torch.linalg.svdvals(mid)[-1]), float(radius.norm())
    assert low == pytest.approx((sigma - width) ** 2, rel=1e-6, abs=0)
    assert high == pytest.approx((sigma + width) ** 2, rel=1e-6, abs=0)
    exact_square = sum((Fraction(X.item()) * Fraction(-1, 2) ** 15) ** 2 for _ in range(16)) / 16
    assert Fraction(low) < exact_square < Fraction(high)


def test_numbers_too_large_are_refused():
    theta = torch.full((40, 1, 1), 1e12, dtype=F64)
    with pytest.raises(ValueError, match="theta, X or v is too large"):
        enclose(Linear(1), theta, torch.ones(1, 1, dtype=F64), torch.ones(1, dtype=F64))


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
