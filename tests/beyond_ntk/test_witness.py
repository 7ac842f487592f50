"""The witness with its bound, and probabilities that need no network."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import seeded

from companion import networks
from companion.beyond_ntk import witness


@settings(max_examples=20)
@given(st.integers(2, 7), st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 10.0]))
def test_witness_bound_is_below_the_true_singular_value(N, seed, beta):
    z = torch.rand(N, generator=seeded(seed), dtype=torch.float64) + torch.arange(N)
    z = z[torch.randperm(N, generator=seeded(seed + 1))]
    w = witness.spline_witness(z, beta)
    assert 0 < w.bound <= float(torch.linalg.svdvals(w.M)[-1]) * (1 + 1e-9)
    # the features are the network's own: softplus of an affine function of z, then the constant
    h = networks.Softplus(beta)(z[:, None] * w.weight + w.bias)
    torch.testing.assert_close(w.M[:, :-1], h, rtol=1e-9, atol=1e-9)


def test_more_neurons_only_raise_the_singular_value():
    w = witness.spline_witness(torch.tensor([0.0, 0.4, 1.5], dtype=torch.float64), 1.0)
    more = torch.cat([w.M, torch.randn(3, 5, generator=seeded(), dtype=torch.float64)], 1)
    assert float(torch.linalg.svdvals(more)[2]) >= float(torch.linalg.svdvals(w.M)[2])


def test_the_exercise_with_three_points():
    z = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    for s, expected in ((100.0, 0.97925), (200.0, 0.98961)):
        with mpmath.workdps(40):
            rows = [[mpmath.log(1 + mpmath.exp(s * (a - b))) / s for b in (0, 1)] + [1] for a in (0, 1, 2)]
            exact = float(mpmath.det(mpmath.matrix(rows)))
        assert exact == pytest.approx(expected, abs=5e-6)
        w = witness.spline_witness(z, 1.0, s)
        assert float(torch.linalg.det(w.M)) / s**2 == pytest.approx(exact, rel=1e-10)


def test_hinge_matrix_inverse_is_bounded_by_F():
    z = torch.tensor([0.0, 0.3, 0.35, 2.0, 7.0], dtype=torch.float64)
    T = torch.cat([torch.ones(5, 1, dtype=torch.float64), torch.relu(z[:, None] - z[:-1])], 1)
    g = float(z.diff().min())
    assert float(torch.linalg.matrix_norm(torch.linalg.inv(T))) ** 2 <= 1 + (6 * 5 - 10) / g**2 * (1 + 1e-12)


def test_witness_refuses():
    z = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"z\[0\] and z\[2\] are equal"):
        witness.spline_witness(z, 1.0)
    with pytest.raises(ValueError, match="s is 1"):
        witness.spline_witness(z[:2], 1.0, 1.0)
    with pytest.raises(ValueError, match="z holds 1"):
        witness.spline_witness(z[:1], 1.0)


def test_relu_loses_a_quarter():
    draws = torch.randn(2, 10**6, generator=seeded(5), dtype=torch.float64)
    A, a = draws
    equal = torch.relu(A + a) == torch.relu(-A + a)
    assert float(equal.double().mean()) == pytest.approx(0.25, abs=0.002)


def test_noise_alone_bounds_no_singular_value():
    s, gap, eps = 1e-3, 2.0, 2e-4
    A, a = s * torch.randn(2, 400_000, generator=seeded(6), dtype=torch.float64)
    h = networks.Softplus()(A * gap / 2 + a), networks.Softplus()(-A * gap / 2 + a)
    measured = float(((h[0] - h[1]).abs() <= eps).double().mean())
    assert measured == pytest.approx(math.erf(math.sqrt(2) * eps / (s * gap)), abs=0.005)


def test_tiny_gaps(unchecked):
    z = torch.tensor([0.0, 1e-200, 1.0], dtype=torch.float64)
    w = witness.spline_witness(z * 1e-3, 1.0)
    assert w.bound > 0
    with pytest.raises(ValueError, match="the weights overflow, larger gaps are needed"):
        witness.spline_witness(z * 1e-110, 1.0)
    with pytest.raises(ValueError, match="beta is 0"):
        witness.spline_witness(z, 0.0)


def test_the_bound_is_the_theorem_s():
    """``min(1, s) (1 / F - N ln 2 / (beta s))``, ``F = sqrt(1 + 6 (N - 1) / g^2)``, in 40 digits."""
    for seed in range(20):
        z = torch.rand(5, generator=seeded(seed), dtype=torch.float64)
        beta = 0.5 + seed
        for s in (None, 1e6):
            w = witness.spline_witness(z, beta, s)
            with mpmath.workdps(40):
                v = sorted(map(mpmath.mpf, z.tolist()))
                gap = min(b - a for a, b in itertools.pairwise(v))
                F, scale = mpmath.sqrt(1 + 24 / gap**2), mpmath.mpf(float(w.weight[0]))
                exact = min(1, scale) * (1 / F - 5 * mpmath.log(2) / (beta * scale))
            assert w.bound == pytest.approx(float(exact), rel=1e-12)
