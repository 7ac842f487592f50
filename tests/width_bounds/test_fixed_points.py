"""Theorems P and C as functions of a network's spectra."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from making import relu_problem

from companion import width_bounds as wb
from companion.width_bounds import fixed_points

# --- The theorems' constants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "mode", "value"), [(0.25, "gd", 5.6905), (1e-9, "gd", 4.0), (0.25, "flow", 3.0792)]
)
def test_threshold_of_corollary_d(epsilon, mode, value):
    assert wb.two_layer_threshold(epsilon, mode) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("mode", ["gd", "flow"])
@pytest.mark.parametrize("phi", [1.0, 1e3])
def test_the_fixed_point_switches_at_the_threshold_whatever_the_feature_norm(mode, phi):
    one = torch.ones((), dtype=torch.float64)
    for side, expected in ((1.001, True), (0.999, False)):
        inverse_r = wb.two_layer_threshold(0.25, mode) * side
        s = wb.Spectra(torch.zeros(2).double(), torch.tensor([1.0, phi]).double(), one, one / inverse_r, one)
        assert bool(wb.ball_fixed_point(s, mode=mode).feasible) is expected


def test_ball_map_against_a_plain_loop(deep_net):
    """The batched evaluation equals the theorem's formulas written out with Python numbers."""
    s = wb.spectra(*deep_net).member(0)
    C, epsilon = [0.01, 0.0002, 0.04], 0.3
    ball = wb.ball_map(s, torch.tensor(C, dtype=torch.float64), epsilon)
    w, phi, L = s.w.tolist(), s.phi.tolist(), 3
    bar = [a + b for a, b in zip(w, C, strict=True)]
    d = [0.0]
    for l in range(1, L):
        d.append(d[-1] * bar[l - 1] + phi[l - 1] * C[l - 1])
    g = [(phi[l] + d[l]) * math.prod(bar[l + 1 :]) for l in range(L)]
    alpha = float(s.alpha_0) - d[-1]
    B = g[0] ** 2 + g[1] ** 2
    rho = (1 - epsilon) * alpha**2 - B
    expected = [g[0] * float(s.R_0) / rho, g[1] * float(s.R_0) / rho, alpha * float(s.R_0) / rho]
    assert ball.T.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(ball.rho) == pytest.approx(rho, rel=1e-12)
    plain = wb.ball_map(s, torch.tensor(C, dtype=torch.float64), epsilon, path="plain")
    assert float(plain.T[-1]) == pytest.approx(g[-1] * float(s.R_0) / rho, rel=1e-12)


@given(seed=st.integers(0, 10**6), L=st.integers(2, 4))
def test_the_map_is_monotone_so_that_one_sided_bounds_suffice(seed, L):
    generator = torch.Generator().manual_seed(seed)
    w, phi, C = (torch.rand(L, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, R_0 = 20 + 20 * torch.rand((), generator=generator).double(), torch.rand((), generator=generator).double()
    small = wb.Spectra(w, phi, alpha, R_0, R_0)
    C = 0.1 * C
    worse = wb.Spectra(1.1 * w, 1.2 * phi, 0.95 * alpha, 1.3 * R_0, R_0)
    first, second = wb.ball_map(small, C, 0.2), wb.ball_map(worse, 1.05 * C, 0.25)
    assert first.rho > 0
    if second.rho > 0 and second.alpha > 0:
        assert bool((second.T >= first.T).all())


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 0.9))
def test_a_certificate_is_monotone_in_the_residual(seed, factor):
    X, Y, weights = relu_problem(6, 6, (6, 60, 1), seed)
    s = wb.spectra(X, Y, weights).member(0)
    largest = fixed_points.largest_residual(s)
    feasible = wb.ball_fixed_point(replace(s, R_0=torch.tensor(factor * largest, dtype=torch.float64))).feasible
    assert largest == 0.0 or bool(feasible)


def test_smallest_beta_is_the_switch_and_agrees_with_corollary_d():
    X, Y, weights = relu_problem(12, 12, (12, 60, 1), 3)
    s = wb.spectra(X, Y, weights)
    beta = float(wb.smallest_beta(s))
    closed = math.sqrt(wb.two_layer_threshold() * float(s.phi[0, 0] * s.R_0) / float(s.alpha_0) ** 2)
    assert beta == pytest.approx(closed, rel=2e-4)
    for theorem in ("C", "P"):
        beta = wb.smallest_beta(s, theorem=theorem)
        holds = {
            "C": lambda t: wb.ball_fixed_point(s.scaled(t)).feasible,
            "P": lambda t: fixed_points.paper_fixed_point(s.scaled(t)).feasible,
        }[theorem]
        assert bool(holds(beta))
        assert not bool(holds(0.999 * beta))


def test_median_scales_at_linear_width():
    """N = d = 32, n = 4N, eight seeds: the medians that lesson 1 draws."""
    median = {}
    for L, widths in ((2, (32, 128, 1)), (3, (32, 32, 128, 1))):
        drawn = wb.Spectra.cat([wb.spectra(*relu_problem(32, 32, widths, 100 + seed)) for seed in range(8)])
        for theorem in "CP":
            median[L, theorem] = float(wb.smallest_beta(drawn, theorem=theorem).median())
    assert median[2, "P"] == pytest.approx(128, rel=0.2)
    assert median[2, "C"] == pytest.approx(3.44, rel=0.2)
    assert 1 / 1.7 < median[3, "P"] / 1.4e6 < 1.7
    assert 1 / 1.7 < median[3, "C"] / 215 < 1.7


# --- Theorem P --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), L=st.integers(2, 3))
def test_dominance_theorem_p_implies_theorem_c(seed, L):
    X, Y, weights = relu_problem(5, 5, (5, 40, 1) if L == 2 else (5, 12, 40, 1), seed)
    s = wb.spectra(X, Y, weights)
    beta = wb.smallest_beta(s, theorem="P")
    assume(bool(beta.isfinite()))  # infinite when a hidden layer happens to collapse two rows
    s = s.scaled(1.01 * beta)
    paper, ball = fixed_points.paper_fixed_point(s), wb.ball_fixed_point(s, epsilon=0.25)
    assert bool(paper.feasible)
    assert bool(ball.feasible)
    assert float(ball.rho) >= float(s.alpha_0) ** 2 / 8
    phi_bar = s.X_F * (s.w + paper.C)[..., :-1].prod(-1)
    assert 0.5 / float(ball.phi) ** 2 >= 0.5 / float(phi_bar) ** 2
    assert float(0.5 / phi_bar**2 / paper.step) >= 8 * float(phi_bar / s.alpha_0) ** 2
