"""Theorems P and C as functions of a network's spectra."""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import gaussian, relu_problem, seeded

from companion import networks
from companion import width_bounds as wb
from companion.width_bounds import fixed_points


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def random_spectra(seed, L, alpha=(20.0, 40.0)):
    """Spectra of no network, and radii: numbers between 0 and 1, and a large ``alpha_0``."""
    generator = seeded(seed)
    w, phi, C = (torch.rand(L, generator=generator, dtype=torch.float64) for _ in range(3))
    R_0, X_F, share = torch.rand(3, generator=generator, dtype=torch.float64)
    return wb.Spectra(w, phi, alpha[0] + (alpha[1] - alpha[0]) * share, R_0, X_F), 0.1 * C


def no_network(alpha_0, R_0=1.0):
    """Two layers, ``||X|| = ||F_1|| = 1``, ``W_2 = 0``: only alpha_0 and R_0 matter."""
    return wb.Spectra(float64(1.0, 0.0), float64(1.0, 1.0), *float64(alpha_0, R_0, 1.0))


# --- What is read of a network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-163, 1e-250, 1e-300, 1e150, 1e300])
def test_norms_neither_underflow_nor_overflow(size):
    """2^k X has 2^k times the norms, to the bit, also where its squares are no floats."""
    power = 2.0 ** round(math.log2(size))
    X, Y, W = gaussian(3, 4), gaussian(3, 2, seed=1), [gaussian(4, 5, seed=2), gaussian(5, 2, seed=3)]
    plain = wb.spectra(X, Y, W)
    scaled = wb.spectra(power * X, power * Y, W)
    for name in ("phi", "alpha_0", "R_0", "X_F"):
        assert torch.equal(getattr(scaled, name), power * getattr(plain, name)), name
    assert torch.equal(scaled.w, plain.w)


def test_spectra_are_the_singular_values():
    X, Y, W = (
        gaussian(3, 4),
        gaussian(3, 2, seed=1),
        [gaussian(2, 4, 5, seed=2), gaussian(2, 5, 3, seed=3), gaussian(2, 3, 2, seed=4)],
    )
    s, F = wb.spectra(X, Y, W), networks.features(W, X)
    for i in range(2):
        assert s.w[i].tolist() == pytest.approx([float(torch.linalg.svdvals(V[i])[0]) for V in W])
        assert s.phi[i].tolist() == pytest.approx([float(torch.linalg.svdvals(f[i])[0]) for f in F])
        assert float(s.alpha_0[i]) == pytest.approx(float(torch.linalg.svdvals(F[-1][i])[2]))
        assert float(s.R_0[i]) == pytest.approx(float((F[-1][i] @ W[-1][i] - Y).square().sum().sqrt()))
    assert s.X_F.tolist() == pytest.approx([float(X.square().sum().sqrt())] * 2)
    assert wb.spectra(X, Y, [W[0][..., :2], W[1][:, :2], W[2]]).w.shape == (2, 3)


def test_scaled_spectra_are_those_of_the_scaled_network():
    X, Y, weights = relu_problem(5, 4, (4, 6, 9, 1), 3)
    found = wb.spectra(X, Y, weights).scaled(8.0)
    expected = wb.spectra(X, Y, [weights[0], 8 * weights[1], weights[2]])
    for name in ("w", "phi", "alpha_0", "R_0", "X_F"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_the_smallest_singular_value_keeps_its_digits():
    """Where the Gram matrix would lose them: 1e-5, 1e-9 and 1e-13 beside 1, known to 1e-16 of the norm."""
    U, V = torch.linalg.qr(gaussian(4, 4))[0], torch.linalg.qr(gaussian(9, 4, seed=1))[0]
    for smallest in (0.5, 1e-5, 1e-9, 1e-13):
        F = (U * float64(1.0, 0.7, 0.6, smallest)) @ V.T
        found, norm = fixed_points.singular_ends(F)
        assert float(found) == pytest.approx(smallest, rel=1e-9, abs=2e-15)
        assert float(norm) == pytest.approx(1.0, rel=1e-13)


def test_singular_values_of_what_is_too_narrow_or_not_finite():
    F = gaussian(2, 3, 5)
    F[1, 0, 0] = math.inf
    smallest, norm = fixed_points.singular_ends(F)
    assert float(smallest[0]) == pytest.approx(float(torch.linalg.svdvals(F[0])[2]))
    assert math.isnan(smallest[1])
    assert math.isnan(norm[1])
    assert float(fixed_points.singular_ends(gaussian(4, 3))[0]) == 0


@pytest.mark.usefixtures("unchecked")
def test_spectra_refuse_what_are_no_spectra():
    w, one = float64(1.0, 1.0), float64(1.0)[0]
    for error, words, arguments in (
        (TypeError, "alpha_0 is float", (w, w, 1.0, one, one)),
        (ValueError, r"phi has shape \(3,\), w \(2,\)", (w, float64(1, 1, 1), one, one, one)),
        (ValueError, r"R_0 has shape \(2,\)", (w, w, one, w, one)),
        (ValueError, "L >= 2", (w[:1], w[:1], one, one, one)),
    ):
        with pytest.raises(error, match=words):
            wb.Spectra(*arguments)
    for first, last in ((1e200, 1e200), (1.0, 1e306)):  # products overflow, or only norms
        huge = [first * gaussian(4, 5), last * gaussian(5, 2)]
        with pytest.raises(ValueError, match="too large for their dtype"):
            wb.spectra(gaussian(3, 4), gaussian(3, 2), huge)


# --- The theorems' constants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 0.05, 0.25, 0.5, 0.9])
def test_threshold_of_corollary_d(epsilon):
    """``1 / threshold`` is a maximum over delta; 4 is its limit, sqrt(256/27) that of the flow."""
    delta = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    most = ((delta * (1 - delta)).sqrt() * ((1 - epsilon) - (2 - epsilon) * delta)).max()
    assert wb.two_layer_threshold(epsilon) == pytest.approx(1 / float(most), rel=1e-8)
    flow = (delta * (1 - delta) ** 3).sqrt().max()
    assert wb.two_layer_threshold(epsilon, "flow") == pytest.approx(1 / float(flow), rel=1e-8)
    assert wb.two_layer_threshold(1e-9) == pytest.approx(4.0, abs=1e-7)


@pytest.mark.parametrize("mode", ["gd", "flow"])
@pytest.mark.parametrize("phi", [1.0, 1e3])
def test_the_fixed_point_switches_at_the_threshold_whatever_the_feature_norm(mode, phi):
    one = torch.ones((), dtype=torch.float64)
    for side, expected in ((1.001, True), (0.999, False)):
        inverse_r = wb.two_layer_threshold(0.25, mode) * side
        s = wb.Spectra(torch.zeros(2).double(), torch.tensor([1.0, phi]).double(), one, one / inverse_r, one)
        assert bool(wb.ball_fixed_point(s, mode=mode).feasible) is expected


@given(seed=st.integers(0, 10**6), L=st.integers(2, 5), epsilon=st.floats(0.01, 0.99))
def test_ball_map_is_the_theorem_as_stated(seed, L, epsilon):
    s, C = random_spectra(seed, L)
    ball = wb.ball_map(s, C, epsilon)
    stated = oracles.theorem_c(s.w.tolist(), s.phi.tolist(), float(s.alpha_0), float(s.R_0), C.tolist(), epsilon)
    for name in ("d", "phi", "alpha", "B", "rho"):
        assert float(getattr(ball, name)) == pytest.approx(stated[name], rel=1e-12), name
    assert ball.T.tolist() == pytest.approx(stated["T"], rel=1e-12)
    plain = wb.ball_map(s, C, epsilon, path="plain")  # g_L R_0 / rho instead of alpha R_0 / rho
    assert float(plain.T[-1]) == pytest.approx(stated["T"][-1] * stated["phi"] / stated["alpha"], rel=1e-12)
    flow = wb.ball_map(s, C, epsilon, mode="flow")  # rho is alpha^2
    assert (flow.T * stated["alpha"] ** 2).tolist() == pytest.approx((ball.T * stated["rho"]).tolist(), rel=1e-12)
    assert bool(ball.feasible) is (stated["alpha"] > 0 and stated["rho"] > 0 and bool((ball.T <= C).all()))


@pytest.mark.parametrize("C", [[2.0, 0.0], [0.0, 2.0], [0.1, 0.1]])
def test_radii_are_refused_when_any_line_fails(C):
    """``alpha < 0 < rho``, ``rho < 0 < alpha``, and only ``T_2 > C_2``."""
    s = no_network(1.0, R_0=0.2)
    ball = wb.ball_map(s, float64(*C), 0.25)
    assert [bool(ball.alpha > 0), bool(ball.rho > 0), bool((ball.T <= ball.C).all())].count(False) == 1
    assert not bool(ball.feasible)


@given(seed=st.integers(0, 10**6), L=st.integers(2, 4))
def test_the_formula_is_exact_on_fractions(seed, L):
    s, C = random_spectra(seed, L)
    w, phi, radii = ([Fraction(x) for x in part.tolist()] for part in (s.w, s.phi, C))
    alpha_0, R_0 = Fraction(float(s.alpha_0)), Fraction(float(s.R_0))
    d, grown, alpha, B, rho, g = fixed_points.theorem_c(w, phi, alpha_0, radii, Fraction(1, 3))
    stated = oracles.theorem_c(w, phi, alpha_0, R_0, radii, Fraction(1, 3))
    assert [d, grown, alpha, B, rho] == [stated[name] for name in ("d", "phi", "alpha", "B", "rho")]
    assert [x * R_0 / rho for x in g] == stated["T"]


def test_the_map_is_monotone_so_that_one_sided_bounds_suffice():
    met = Counter()
    for seed in range(200):
        small, C = random_spectra(seed, 2 + seed % 3, alpha=(0.5, 3.0))
        worse = wb.Spectra(1.1 * small.w, 1.2 * small.phi, 0.95 * small.alpha_0, 1.3 * small.R_0, small.R_0)
        first, second = wb.ball_map(small, C, 0.2), wb.ball_map(worse, 1.05 * C, 0.25)
        assert second.rho < first.rho or second.alpha <= 0
        if second.rho > 0 and second.alpha > 0:
            met["T"] += 1
            assert bool((second.T > first.T).all())
    assert met["T"] > 40


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 0.9))
def test_a_certificate_is_monotone_in_the_residual(seed, factor):
    X, Y, weights = relu_problem(6, 6, (6, 60, 1), seed)
    s = wb.spectra(X, Y, weights).member(0)
    largest = fixed_points.largest_residual(s)
    assert largest > 0
    assert bool(wb.ball_fixed_point(replace(s, R_0=float64(factor * largest)[0])).feasible)
    assert not bool(wb.ball_fixed_point(replace(s, R_0=float64(1.002 * largest)[0])).feasible)


def test_no_residual_is_small_enough_under_interference():
    s = wb.Spectra(float64(1.0, 1.0), float64(1.0, 1.0), *float64(1.1, 1.0, 1.0))
    assert fixed_points.largest_residual(s) == 0.0
    assert fixed_points.largest_residual(replace(s, alpha_0=float64(3.0)[0])) > 0


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


@pytest.mark.parametrize("alpha_0", [1.0, 1e-7, 1e-20])
def test_smallest_beta_of_two_layers_however_large(alpha_0):
    s = no_network(alpha_0)
    closed = math.sqrt(wb.two_layer_threshold()) / alpha_0
    assert float(wb.smallest_beta(s)) == pytest.approx(closed, rel=2e-4)
    assert float(wb.smallest_beta(replace(s, alpha_0=float64(0.0)[0]))) == math.inf


def test_without_a_residual_nothing_moves():
    s = no_network(3.0, R_0=0.0)
    ball, paper = wb.ball_fixed_point(s), fixed_points.paper_fixed_point(s)
    assert bool(ball.feasible)
    assert bool(paper.feasible)
    assert 0 < float(ball.C.max()) < 1e-200
    assert 0 < float(paper.C.max()) < 1e-200


def test_a_bound_that_underflows_is_no_radius_of_zero():
    """``T_1 = R_0 C_2 / rho`` is below every float; the radii are not."""
    ball = wb.ball_fixed_point(no_network(3.0, R_0=1e-200))
    assert bool(ball.feasible)
    assert bool((ball.C > 0).all())


def test_the_best_share():
    lost, won = no_network(1.99), no_network(math.sqrt(wb.two_layer_threshold(0.1)) * 1.001)
    assert fixed_points.best_share(lost) is None
    assert not bool(wb.ball_fixed_point(won, epsilon=0.12).feasible)
    share = fixed_points.best_share(won)
    progress = {}
    for epsilon in fixed_points.SHARES[:7]:  # up to 0.1
        ball = wb.ball_fixed_point(won, epsilon=epsilon)
        progress[epsilon] = float(2 * epsilon / ball.phi**2 * ball.rho) if bool(ball.feasible) else 0.0
    assert share == max(progress, key=progress.get)
    most = {e: 2 * e / float(wb.ball_fixed_point(won, epsilon=e).phi) ** 2 for e in progress}
    assert fixed_points.best_share(won, 0.9 * most[0.04]) == 0.04  # the smallest that allows the step
    assert fixed_points.best_share(won, 1.0005 * most[0.04]) == 0.06
    assert fixed_points.best_share(won, 1.0) == max(most, key=most.get)  # none does: the largest step


@pytest.mark.slow
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


@given(seed=st.integers(0, 10**6), L=st.integers(2, 4))
def test_paper_map_is_the_theorem_as_stated(seed, L):
    s, C = random_spectra(seed, L, alpha=(0.1, 40.0))
    at = fixed_points.paper_map(s, C)
    ratios, step = oracles.theorem_p(s.w.tolist(), float(s.X_F), float(s.alpha_0), float(s.R_0), C.tolist())
    assert at.ratios.tolist() == pytest.approx(ratios, rel=1e-12)
    assert float(at.step) == pytest.approx(step, rel=1e-12)
    assert bool(at.feasible) is (min(ratios) >= 1)


@pytest.mark.parametrize("size", [1e-170, 1e120, 1e160])
def test_the_ratios_of_theorem_p_leave_no_float(size):
    """(i)-(iii) do not change when X and alpha_0 are multiplied by one number, and R_0 too."""
    s, C = random_spectra(5, 3)
    found = fixed_points.paper_map(replace(s, X_F=size * s.X_F, alpha_0=size * s.alpha_0, R_0=size * s.R_0), C)
    assert found.ratios.tolist() == pytest.approx(fixed_points.paper_map(s, C).ratios.tolist(), rel=1e-12)


@pytest.mark.parametrize("L", [2, 3, 4])
def test_the_optimal_radii_satisfy_the_first_condition_and_no_smaller_ones_do(L):
    for seed in range(10):
        s, _ = random_spectra(seed, L, alpha=(30.0, 40.0))
        at = fixed_points.paper_fixed_point(s)
        assert float(at.ratios[0]) >= 1
        assert float(fixed_points.paper_map(s, 0.99 * at.C).ratios[0]) < 1
    lost = replace(s, alpha_0=float64(1e-3)[0])
    assert not bool(fixed_points.paper_fixed_point(lost).C.any())


def test_the_necessary_condition_by_hand():
    s = wb.Spectra(float64(2.0, 4.0, 0.5), float64(1.0, 1.0, 1.0), *float64(1.0, 1.0, 1.0))
    assert float(wb.necessary_condition(s, 3)) == pytest.approx(1 / (16 * 3 * 0.25 * (1 / 4 + 1 / 16)), rel=1e-14)
    with pytest.raises(ValueError, match="N is 0"):
        wb.necessary_condition(s, 0)


@given(seed=st.integers(0, 10**6), L=st.integers(2, 3))
def test_dominance_theorem_p_implies_theorem_c(seed, L):
    X, Y, weights = relu_problem(5, 5, (5, 40, 1) if L == 2 else (5, 12, 40, 1), seed)
    s = wb.spectra(X, Y, weights)
    if float(s.alpha_0) < 1e-12 * float(s.phi[0, -1]):
        return  # a hidden layer happens to collapse two rows
    s = s.scaled(1.01 * wb.smallest_beta(s, theorem="P"))
    paper, ball = fixed_points.paper_fixed_point(s), wb.ball_fixed_point(s, epsilon=0.25)
    assert bool(paper.feasible)
    assert bool(ball.feasible)
    assert float(ball.rho) >= float(s.alpha_0) ** 2 / 8
    phi_bar = s.X_F * (s.w + paper.C)[..., :-1].prod(-1)
    assert 0.5 / float(ball.phi) ** 2 >= 0.5 / float(phi_bar) ** 2
    assert float(0.5 / phi_bar**2 / paper.step) >= 8 * float(phi_bar / s.alpha_0) ** 2
