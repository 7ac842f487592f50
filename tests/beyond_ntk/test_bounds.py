"""Rates, exact curves, gaps and floors of lesson 3, against runs and closed forms."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import seeded

from companion.beyond_ntk import bounds as rb
from companion.beyond_ntk import last_layer as ll
from companion.beyond_ntk import phase2


def problem(N=12, m=20, K=3, loss="squared", seed=0):
    g = seeded(seed)
    h = torch.nn.functional.relu(torch.randn(N, m, generator=g, dtype=torch.float64)) + 1
    M = torch.cat([h, torch.ones(N, 1, dtype=torch.float64)], 1)
    V0 = 0.1 * torch.randn(m + 1, K, generator=g, dtype=torch.float64)
    labels = torch.arange(N) % K
    return M, V0, labels if loss == "cross_entropy" else torch.nn.functional.one_hot(labels).double()


@pytest.mark.parametrize("shape", [(12, 20), (20, 6)])
def test_gd_follows_the_exact_curve(shape):
    M, V0, Y = problem(*shape)
    step = len(M) / float(torch.linalg.matrix_norm(M, 2)) ** 2
    run = phase2.phase2_gd(M, V0, Y, step=step * (1 - 1e-9), steps=400, centred=False)
    curve = rb.exact_curve(M, V0, Y, run.steps, step=run.step)
    seen = run.losses >= 1e-12 * run.losses[0]
    assert float((run.losses / curve - 1)[seen].abs().max()) < 1e-8
    torch.testing.assert_close(rb.exact_curve(M, V0, Y, [0])[0], run.losses[0])


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["squared", "cross_entropy"]), st.sampled_from(["gd", "nesterov"]))
def test_runs_stay_below_their_bound(seed, loss, method):
    M, V0, Y = problem(10, 6 + seed % 9, loss=loss, seed=seed)
    frame = ll.centre(M)
    run = {"gd": phase2.phase2_gd, "nesterov": phase2.phase2_nesterov}[method](M, V0, Y, loss=loss, steps=60)
    bound = rb.comparator_bound(frame.features(M), frame.to(V0), Y, run.steps, loss=loss, step=run.step, method=method)
    assert bool((run.losses <= bound * (1 + 1e-9) + 1e-15).all())
    assert float(bound[-1]) < float(bound[0])  # the bound says something


def test_comparators_are_optimal_among_themselves():
    # squared loss: the bound is the least value over k of an explicit expression
    M, V0, Y = problem(8, 12)
    U, s, Wt = torch.linalg.svd(M, full_matrices=False)
    best = math.inf
    for k in range(9):
        V = V0 + (Wt[:k].T / s[:k]) @ (U[:, :k].T @ (Y - M @ V0))
        value = ll.average_loss(M, V, Y) + (V - V0).square().sum() / (2 * 0.01 * 50)
        best = min(best, float(value))
    assert float(rb.comparator_bound(M, V0, Y, 50, step=0.01)) == pytest.approx(best, rel=1e-10)


def test_further_comparators_only_sharpen_the_bound():
    M, V0, labels = problem(10, 6, loss="cross_entropy")
    run = phase2.phase2_gd(M, V0, labels, loss="cross_entropy", steps=200, centred=False)
    better = [
        phase2.phase2_lbfgs(M, V0, labels, loss="cross_entropy", ridge=r, steps=100).V for r in (1e-1, 1e-2, 1e-3)
    ]
    plain, sharp = (
        rb.comparator_bound(M, V0, labels, run.steps, loss="cross_entropy", step=run.step, comparators=c)
        for c in ((), better)
    )
    assert bool((sharp <= plain).all())
    assert float(sharp[-1]) < float(plain[-1])
    assert bool((run.losses <= sharp * (1 + 1e-9)).all())


def test_linear_rate_holds_and_is_attained_at_the_slowest_direction():
    M, V0, Y = problem(8, 12)
    s = torch.linalg.svdvals(M)
    step = 8 / float(s[0]) ** 2
    factor = rb.linear_rate(float(s[7]), 8, step)
    curve = rb.exact_curve(M, V0, Y, torch.arange(200), step=step)
    assert bool((curve <= factor ** torch.arange(200) * curve[0] * (1 + 1e-12)).all())
    # start in the slowest direction alone: the factor is then exact for the root of the loss, and squared for the loss
    U = torch.linalg.svd(M)[0]
    slow = rb.exact_curve(M, torch.zeros_like(V0), U[:, 7:8].expand(-1, 3), [0, 1], step=step)
    assert float(slow[1] / slow[0]) == pytest.approx(factor**2, rel=1e-10)


def test_cross_entropy_corollary_holds():
    M, V0, labels = problem(6, 12, loss="cross_entropy")
    sigma_N = float(torch.linalg.svdvals(M)[5])
    run = phase2.phase2_gd(M, V0, labels, loss="cross_entropy", steps=2000, every=50, centred=False)
    bound = rb.cross_entropy_bound(
        sigma_N, 6, 3, run.steps[1:], step=run.step, V0_norm=float(torch.linalg.matrix_norm(V0))
    )
    assert bool((run.losses[1:] <= bound).all())
    assert float(rb.cross_entropy_bound(0.0, 6, 3, 10, step=0.1)) == math.inf


def test_rates_are_the_theorems_text():
    """``R^2 / (2 eta t)``, ``2 R^2 / (eta (t+1)^2)``, ``(K-1)/t + (V_0 + sqrt(N) log t / sigma_N)^2 / (2 eta t)``."""
    for seed in range(20):
        R, eta, sigma, size = torch.rand(4, generator=seeded(seed), dtype=torch.float64).add(0.1).tolist()
        N, K, t = 3 + seed, 2 + seed % 4, 1 + 7 * seed
        exact = [Fraction(x) for x in (R, eta, sigma, size)]
        assert rb.gd_rate(exact[0], exact[1], t) == exact[0] ** 2 / (2 * exact[1] * t)
        assert rb.nesterov_rate(exact[0], exact[1], t) == 2 * exact[0] ** 2 / (exact[1] * (t + 1) ** 2)
        assert rb.contraction(exact[2], N, exact[1], exact[3]) == exact[1] * exact[3] * exact[2] ** 2 / N
        found = float(rb.cross_entropy_bound(sigma, N, K, t, step=eta, V0_norm=size))
        text = (K - 1) / t + (size + math.sqrt(N) * math.log(t) / sigma) ** 2 / (2 * eta * t)
        assert found == pytest.approx(text, rel=1e-12)


def test_gradient_descent_comes_within_six_of_its_rate():
    """One sample, one feature, squared loss: ``L(V_t) = (1 - eta)^(2t) / 2``, and R = 1."""
    M, Y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t in (3, 10, 1000):
        step = 1 / (2 * t + 1)
        curve = rb.exact_curve(M, torch.ones(1, 1, dtype=torch.float64), Y, t, step=step)
        bound = rb.gd_rate(1.0, step, t)
        assert float(curve) == pytest.approx((1 - step) ** (2 * t) / 2, rel=1e-12)
        assert bound / 6 < float(curve) <= bound / 2  # the sharp constant is 1 / (4 eta t)
        found = rb.comparator_bound(M, torch.ones(1, 1, dtype=torch.float64), Y, t, step=step)
        assert float(found) == pytest.approx(min(0.5, bound), rel=1e-12)


def test_kaczmarz_contracts_on_average():
    M, V0, Y = problem(5, 8)
    t = [0, 40, 160]
    best, bound = rb.kaczmarz_bound(M, V0, Y, t)
    torch.testing.assert_close(M @ best, Y)
    for k, limit in zip(t, bound, strict=True):
        runs = phase2.single_sample_sgd(M, V0, Y, steps=k, S=400, generator=seeded(k))
        error = (runs.V - best).square().sum((1, 2))
        assert float(error.mean()) <= float(limit) * 1.0001 + 3 * float(error.std()) / 20
    with pytest.raises(ValueError, match="consistent"):
        rb.kaczmarz_bound(torch.cat([M, M]), V0, torch.cat([Y, Y + 1]), t)


def test_sgd_average_stays_below_its_bound():
    M, V0, labels = problem(10, 6, loss="cross_entropy")
    step = 0.2 / float(M.square().sum(1).max())
    for T in (10, 300):
        runs = phase2.single_sample_sgd(
            M, V0, labels, loss="cross_entropy", step=step, steps=T, S=50, generator=seeded(T), every=T
        )
        mean = float(ll.average_loss(M, runs.average, labels, "cross_entropy").mean())
        assert mean <= float(rb.sgd_bound(M, V0, labels, T, step=step))
    B = float(M.square().sum(1).max().sqrt())
    slopes = ll.slope(M @ V0, labels, "cross_entropy")
    assert (
        float((torch.linalg.vector_norm(slopes, dim=1) * torch.linalg.vector_norm(M, dim=1)).max()) <= math.sqrt(2) * B
    )


def test_sgd_pays_for_its_step():
    """A large step: the mean of the iterates is above everything in the bound but ``eta B^2``."""
    M, labels = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0, 1])
    V0 = torch.zeros(1, 2, dtype=torch.float64)
    for step in (3.0, 10.0, 30.0):
        runs = phase2.single_sample_sgd(
            M, V0, labels, loss="cross_entropy", step=step, steps=400, S=100, every=400, generator=seeded(1)
        )
        mean = ll.average_loss(M, runs.V, labels, "cross_entropy").mean()
        bound = float(rb.sgd_bound(M, V0, labels, 400, step=step))
        assert bound == pytest.approx(math.log(2) + step, rel=1e-2)  # the best V is 0, where the runs begin
        assert float(mean) > 1.1 * math.log(2)  # the last iterates stay away from it
        average = ll.average_loss(M, runs.average, labels, "cross_entropy").mean()
        assert float(average) <= bound


@given(st.integers(0, 10_000), st.sampled_from([1e-1, 1e-2, 1e-3]))
def test_both_forms_of_the_ridge_gap_agree(seed, ridge):
    M, V0, labels = problem(7, 4, loss="cross_entropy", seed=seed)
    gap = rb.ridge_gap(M, V0, labels, ridge)
    # absolute, on the scale of the dual's own numbers
    assert gap.gradient == pytest.approx(gap.fenchel, rel=1e-10, abs=1e-10)


def test_ridge_gap_bounds_the_true_gap():
    M, V0, labels = problem(7, 4, loss="cross_entropy")
    ridge = 0.05

    def P(V):
        return float(ll.average_loss(M, V, labels, "cross_entropy") + 0.5 * ridge * V.square().sum())

    best = phase2.phase2_lbfgs(M, V0, labels, loss="cross_entropy", ridge=ridge, steps=500).V
    gap = rb.ridge_gap(M, V0, labels, ridge).gradient
    assert 0 < P(V0) - P(best) <= gap
    assert rb.ridge_gap(M, best, labels, ridge).gradient < 1e-13


def test_duplicate_floor_by_hand():
    groups = torch.tensor([0, 0, 1, 1, 2])
    Y = torch.tensor([[0.0], [2.0], [5.0], [5.0], [7.0]], dtype=torch.float64)
    assert rb.duplicate_floor(groups, Y) == pytest.approx((0.5 + 0.5) / 5)
    labels = torch.tensor([0, 1, 1, 1, 0])
    assert rb.duplicate_floor(groups, labels, "cross_entropy") == pytest.approx(2 * math.log(2) / 5)
    assert rb.duplicate_floor(torch.arange(5), Y) == 0.0


@given(st.integers(0, 10_000))
def test_duplicate_floor_is_a_floor_and_is_reached(seed):
    M, _, Y = problem(9, 14, seed=seed)
    M[3] = M[7]
    M[4] = M[7]
    Y[3] = Y[3] + 1.5
    floor = rb.duplicate_floor(torch.unique(M, dim=0, return_inverse=True)[1], Y)
    best = torch.linalg.lstsq(M, Y, driver="gelsd").solution
    assert float(ll.average_loss(M, best, Y)) == pytest.approx(floor, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rb.exact_curve(*problem(), [-1]), "t is"),
        (lambda: rb.comparator_bound(*problem(), [1], step=0.1, method="adam"), "method is 'adam'"),
        (lambda: rb.linear_rate(-1.0, 3, 0.1), "sigma_N, N, step, mu"),
        (lambda: rb.cross_entropy_bound(1.0, 3, 2, [0], step=0.1), "t >= 1"),
        (lambda: rb.ridge_gap(*problem(loss="cross_entropy"), 0.0), "ridge is 0.0"),
        (lambda: rb.duplicate_floor(torch.arange(3), torch.ones(4, 1)), r"Y has shape \(4, 1\); \(N, K\) with N = 3"),
        (lambda: rb.duplicate_floor(torch.arange(3), torch.ones(3, 1), "hinge"), "loss is 'hinge'"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
