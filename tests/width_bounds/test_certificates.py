"""Theorems P and C: the numbers they are known to give, their proofs' inequalities on runs, and what they refuse."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from companion import data, descent, kernels, networks
from companion import width_bounds as wb
from companion.width_bounds import certificates


def problem(N, d, widths, seed, *, beta=1.0, S=None, radius=1.0):
    generator = torch.Generator().manual_seed(seed)
    X, Y = data.sphere(N, d, generator, radius=radius), data.signs(N, generator)
    schemes = ["gaussian"] + ["lecun"] * (len(widths) - 2)
    weights = networks.init_mlp(widths, scheme=schemes, beta=beta, zero_last=True, S=S, generator=generator)
    return X, Y, weights


@pytest.fixture(scope="module")
def envelope_net():
    """N = d = 50, n = 1600: the first network of lesson 1."""
    return problem(50, 50, (50, 1600, 1), 0)


@pytest.fixture(scope="module")
def deep_net():
    """16-64-64-1 with the middle matrix at 1.3 times the smallest beta."""
    X, Y, weights = problem(16, 16, (16, 64, 64, 1), 2)
    weights[1] *= 1.3 * float(wb.smallest_beta(wb.spectra(X, Y, weights)))
    return X, Y, weights


# --- the theorems' constants ------------------------------------------------------------------------------------------


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


def test_handy_form_of_corollary_d(envelope_net):
    X, Y, weights = envelope_net
    s = wb.spectra(X, Y, weights)
    assert float(s.alpha_0**2 / (s.phi[0, 0] * s.R_0)) > 6
    q = wb.certify(X, Y, weights).quantities
    step = 0.37 / float(s.phi[0, 1]) ** 2
    assert step <= q["max_step"]
    assert q["rho"] > 0.39 * q["alpha_0"] ** 2


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
    X, Y, weights = problem(6, 6, (6, 60, 1), seed)
    s = wb.spectra(X, Y, weights).member(0)
    largest = wb.largest_residual(s)
    feasible = wb.ball_fixed_point(replace(s, R_0=torch.tensor(factor * largest, dtype=torch.float64))).feasible
    assert largest == 0.0 or bool(feasible)


def test_smallest_beta_is_the_switch_and_agrees_with_corollary_d():
    X, Y, weights = problem(12, 12, (12, 60, 1), 3)
    s = wb.spectra(X, Y, weights)
    beta = float(wb.smallest_beta(s))
    closed = math.sqrt(wb.two_layer_threshold() * float(s.phi[0, 0] * s.R_0) / float(s.alpha_0) ** 2)
    assert beta == pytest.approx(closed, rel=2e-4)
    for theorem in ("C", "P"):
        beta = wb.smallest_beta(s, theorem=theorem)
        holds = {
            "C": lambda t: wb.ball_fixed_point(s.scaled(t)).feasible,
            "P": lambda t: wb.paper_fixed_point(s.scaled(t)).feasible,
        }[theorem]
        assert bool(holds(beta))
        assert not bool(holds(0.999 * beta))


def test_median_scales_at_linear_width():
    """N = d = 32, n = 4N, eight seeds: the medians that lesson 1 draws."""
    median = {}
    for L, widths in ((2, (32, 128, 1)), (3, (32, 32, 128, 1))):
        drawn = wb.Spectra.cat([wb.spectra(*problem(32, 32, widths, 100 + seed)) for seed in range(8)])
        for theorem in "CP":
            median[L, theorem] = float(wb.smallest_beta(drawn, theorem=theorem).median())
    assert median[2, "P"] == pytest.approx(128, rel=0.2)
    assert median[2, "C"] == pytest.approx(3.44, rel=0.2)
    assert 1 / 1.7 < median[3, "P"] / 1.4e6 < 1.7
    assert 1 / 1.7 < median[3, "C"] / 215 < 1.7


# --- Theorem P --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), L=st.integers(2, 3))
def test_dominance_theorem_p_implies_theorem_c(seed, L):
    X, Y, weights = problem(5, 5, (5, 40, 1) if L == 2 else (5, 12, 40, 1), seed)
    s = wb.spectra(X, Y, weights)
    beta = wb.smallest_beta(s, theorem="P")
    assume(bool(beta.isfinite()))  # infinite when a hidden layer happens to collapse two rows
    s = s.scaled(1.01 * beta)
    paper, ball = wb.paper_fixed_point(s), wb.ball_fixed_point(s, epsilon=0.25)
    assert bool(paper.feasible)
    assert bool(ball.feasible)
    assert float(ball.rho) >= float(s.alpha_0) ** 2 / 8
    phi_bar = s.X_F * (s.w + paper.C)[..., :-1].prod(-1)
    assert 0.5 / float(ball.phi) ** 2 >= 0.5 / float(phi_bar) ** 2
    assert float(0.5 / phi_bar**2 / paper.step) >= 8 * float(phi_bar / s.alpha_0) ** 2


def test_the_paper_conditions_against_the_formulas():
    X, Y, weights = problem(6, 6, (6, 30, 1), 4, beta=50.0)
    radii = [0.5, 2.0]
    s = wb.spectra(X, Y, weights).member(0)
    bar = [float(s.w[0]) + 0.5, float(s.w[1]) + 2.0]
    x, a, R = float(s.X_F), float(s.alpha_0), float(s.R_0)
    P, S = [bar[1], bar[0]], bar[1] ** 2 / bar[1] ** 2
    right = [16 * x * R * max(P[0] / 0.5, P[1] / 2.0), 32 * x**2 * bar[1] * S * R, 16 * x**2 * bar[1] ** 2 * S]
    expected = [a**2 / right[0], a**3 / right[1], a**2 / right[2]]
    found = [row.measured for row in wb.paper_conditions(X, Y, weights, radii).assumptions if row.name.startswith("(")]
    assert found == pytest.approx(expected, rel=1e-12)


def test_optimal_radii_are_no_worse_than_any_others():
    X, Y, weights = problem(20, 20, (20, 200, 1), 1, beta=70.0)
    best = wb.paper_conditions(X, Y, weights)
    assert best.holds
    s = wb.spectra(X, Y, weights)
    for scale in (0.5, 0.99):
        assert not wb.paper_map(s, scale * torch.tensor(best.quantities["radii"]).double()[None]).feasible


def test_both_theorems_hold_at_beta_70_with_the_known_rates():
    X, Y, weights = problem(20, 20, (20, 200, 1), 1, beta=70.0)
    paper, ours = wb.paper_conditions(X, Y, weights), wb.certify(X, Y, weights)
    assert paper.quantities["rate"] == pytest.approx(7e-9, rel=1.0)
    assert 3e-3 < ours.quantities["rho"] * ours.quantities["max_step"] < 1.2e-2


def test_the_necessary_condition_refuses_lecun_and_is_implied_by_p():
    generator = torch.Generator().manual_seed(5)
    X, Y = data.sphere(50, 50, generator), data.signs(50, generator)
    weights = networks.init_mlp((50, 50, 2000, 1), scheme="lecun", generator=generator)
    s = wb.spectra(X, Y, weights)
    assert float(wb.necessary_condition(s, 50)) < 1
    assert not wb.paper_conditions(X, Y, weights).holds
    X, Y, weights = problem(20, 20, (20, 200, 1), 1, beta=70.0)
    weights[1] = 1e-3 * torch.ones_like(weights[1])
    s = wb.spectra(X, Y, weights)
    if bool(wb.paper_fixed_point(s).feasible):
        assert float(wb.necessary_condition(s, 20)) >= 1


# --- certificates -----------------------------------------------------------------------------------------------------


def test_the_certificate_lists_what_was_promised(envelope_net):
    cert = wb.certify(*envelope_net)
    assert cert.holds
    assert cert.status == "measured"
    assert {"alpha", "rho", "max_step", "radii"} <= set(cert.quantities)
    assert 7.0 < cert.quantities["alpha_0"] ** 2 / cert.quantities["R_0"] < 40


def test_certified_values_are_one_sided_and_close(envelope_net):
    measured, proved = wb.certify(*envelope_net), wb.certify(*envelope_net, level="certified")
    assert proved.holds
    assert proved.status == "certified"
    assert proved.quantities["alpha_0"] <= measured.quantities["alpha_0"]
    assert proved.quantities["R_0"] >= measured.quantities["R_0"]
    assert proved.quantities["max_step"] <= measured.quantities["max_step"] * (1 + 1e-12)
    assert proved.quantities["rho"] == pytest.approx(measured.quantities["rho"], rel=0.05)


def test_certified_inequalities_hold_in_rationals(deep_net):
    """Theorem C's inequalities, recomputed here in exact rationals from the printed quantities alone."""
    X, Y, weights = deep_net
    cert = wb.certify(X, Y, weights, level="certified")
    assert cert.holds
    s = certificates._certified_spectra(X, Y, [W[0] for W in weights])
    C = [Fraction(c) for c in cert.quantities["radii"]]
    w, phi = ([Fraction(v) for v in t.tolist()] for t in (s.w, s.phi))
    d1 = phi[0] * C[0]
    d2 = d1 * (w[1] + C[1]) + phi[1] * C[1]
    alpha = Fraction(float(s.alpha_0)) - d2
    g1 = phi[0] * (w[1] + C[1]) * (w[2] + C[2])
    g2 = (phi[1] + d1) * (w[2] + C[2])
    rho = Fraction(3, 4) * alpha**2 - g1**2 - g2**2
    R_0 = Fraction(float(s.R_0))
    assert alpha > 0
    assert rho > 0
    assert all(c >= t * R_0 / rho for c, t in zip(C, (g1, g2, alpha), strict=True))
    assert Fraction(cert.quantities["rho"]) <= rho
    assert Fraction(cert.quantities["max_step"]) <= Fraction(1, 2) / (phi[2] + d2) ** 2


def test_the_feature_enclosure_contains_exact_arithmetic():
    """Features, products and residual of a tiny deep net in Fractions, against the certified one-sided numbers."""
    X, Y, weights = problem(3, 2, (2, 3, 4, 1), 6)
    one = [W[0] for W in weights]
    s = certificates._certified_spectra(X, Y, one)
    F = [[Fraction(v) for v in row] for row in X.tolist()]
    for W in one[:-1]:
        M = [[Fraction(v) for v in row] for row in W.tolist()]
        F = [[max(sum(a * M[i][j] for i, a in enumerate(row)), Fraction(0)) for j in range(len(M[0]))] for row in F]
    last = [Fraction(v) for v in one[-1][:, 0].tolist()]
    R = [
        sum(a * b for a, b in zip(row, last, strict=True)) - Fraction(y)
        for row, y in zip(F, Y[:, 0].tolist(), strict=True)
    ]
    assert sum(r * r for r in R) <= Fraction(float(s.R_0)) ** 2
    exact = torch.tensor([[float(v) for v in row] for row in F], dtype=torch.float64)
    assert float(torch.linalg.svdvals(exact)[0]) <= float(s.phi[-1])
    assert float(s.alpha_0) <= float(torch.linalg.svdvals(exact)[-1])


def test_auto_epsilon_is_at_least_as_good(envelope_net):
    plain, auto = wb.certify(*envelope_net), wb.certify(*envelope_net, epsilon="auto")
    progress = [c.quantities["rho"] * c.quantities["max_step"] for c in (plain, auto)]
    assert progress[1] >= progress[0]


def test_an_ensemble_reports_every_member():
    X, Y, weights = problem(8, 8, (8, 400, 1), 7, S=4, beta=2.0)
    weights[0][2] *= 0.05
    cert = wb.certify(X, Y, weights)
    assert len(cert.members) == 4
    assert [m.holds for m in cert.members].count(True) == 3
    assert not cert.holds
    assert "3 of 4" in cert.verdict()
    paper = wb.paper_conditions(X, Y, weights)
    assert len(paper.members) == 4


def test_reasons():
    X, Y, weights = problem(8, 8, (8, 30, 1), 8)
    assert wb.certify(X, Y, weights).reason.startswith("residual_too_large")
    assert wb.certify(X, Y, [weights[0][..., :7], weights[1][:, :7]]).reason.startswith("too_narrow")
    wide = [50 * weights[0], weights[1]]
    assert wb.certify(X, Y, wide, step=1.0).reason.startswith("step_too_large")
    heavy = [weights[0], torch.full_like(weights[1], 5.0)]
    assert wb.certify(X, Y, heavy).reason.startswith("interference")
    assert wb.certify(X, Y, heavy).quantities.get("beta") is None
    zero = X.clone()
    zero[3] = 0
    assert "row 3" in wb.certify(zero, Y, weights).reason
    parallel = X.clone()
    parallel[5] = 3 * X[2]
    assert "rows 2 and 5" in wb.certify(parallel, Y, weights).reason
    plane = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    pairs = torch.cat([plane, -plane])
    small = networks.init_mlp((2, 50, 1), scheme="gaussian", zero_last=True)
    found = wb.certify(pairs, Y[:6], small)
    assert found.reason.startswith("dependent_antipodal_pairs")
    assert "(0, 3)" in found.reason
    assert not wb.paper_conditions(pairs, Y[:6], small).holds


def test_the_hint_of_a_refusal_is_right():
    X, Y, weights = problem(8, 8, (8, 30, 1), 8)
    cert = wb.certify(X, Y, weights)
    beta, R_0 = cert.quantities["beta"], cert.quantities["largest_R_0"]
    assert wb.certify(X, Y, [1.0001 * beta * weights[0], weights[1]]).holds
    assert wb.certify(X, 0.9999 * R_0 / float(torch.linalg.matrix_norm(Y)) * Y, weights).holds
    assert not wb.certify(X, 1.002 * R_0 / float(torch.linalg.matrix_norm(Y)) * Y, weights).holds


def test_independent_antipodal_pairs_are_fine():
    X, Y, _ = problem(3, 8, (8, 1), 9)
    X, Y = torch.cat([X, -X]), torch.cat([Y, Y])
    weights = networks.init_mlp((8, 3000, 1), scheme="gaussian", zero_last=True)
    assert wb.certify(X, Y, weights).holds


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("entry", [wb.certify, wb.paper_conditions])
def test_bad_input_is_refused_in_one_sentence(entry):
    X, Y, weights = problem(4, 4, (4, 20, 1), 10)
    nan, inf = X.clone(), X.clone()
    nan[1, 2], inf[0, 0] = math.nan, math.inf
    cases = [
        (ValueError, r"X\[1, 2\] is nan", (nan, Y, weights)),
        (ValueError, r"X\[0, 0\] is inf", (inf, Y, weights)),
        (TypeError, "X has dtype torch.int64", (X.long(), Y, weights)),
        (TypeError, "X has dtype torch.float16", (X.half(), Y, weights)),
        (TypeError, "a certificate needs float64", (X.float(), Y.float(), [W.float() for W in weights])),
        (ValueError, r"Y has shape \(4,\)", (X, Y[:, 0], weights)),
        (ValueError, "with N = 4, as in X", (X, Y[:3], weights)),
        (ValueError, "weights is empty", (X, Y, [])),
        (ValueError, "at least 2 are needed", (X, Y, [weights[0][..., :1]])),
        (ValueError, "W_2 takes", (X, Y, [weights[0][..., :10], weights[1]])),
    ]
    for error, words, arguments in cases:
        with pytest.raises(error, match=words):
            entry(*arguments)


def test_options_out_of_range_are_refused():
    X, Y, weights = problem(4, 4, (4, 20, 1), 10)
    s = wb.spectra(X, Y, weights)
    for words, call in (
        ("epsilon is 1.5", lambda: wb.certify(X, Y, weights, epsilon=1.5)),
        ("epsilon is 'best'", lambda: wb.certify(X, Y, weights, epsilon="best")),
        ("level is 'proof'", lambda: wb.certify(X, Y, weights, level="proof")),
        ("step is 0", lambda: wb.certify(X, Y, weights, step=0.0)),
        ("radii is", lambda: wb.paper_conditions(X, Y, weights, [1.0])),
        ("radii is", lambda: wb.paper_conditions(X, Y, weights, [1.0, -1.0])),
        ("mode is", lambda: wb.ball_fixed_point(s, mode="sgd")),
        ("path is", lambda: wb.ball_fixed_point(s, path="short")),
        ("theorem is", lambda: wb.smallest_beta(s, theorem="Q")),
        ("p is 2", lambda: wb.chernoff_width(X, Y, 2.0)),
        ("unit rows are needed", lambda: wb.chernoff_width(3 * X, Y)),
        ("W_L has norm", lambda: wb.smallest_beta(wb.spectra(X, Y, [weights[0], 1 + weights[1]]))),
        ("step is", lambda: wb.envelope(wb.certify(X, Y, [90 * weights[0], weights[1]]), 1.0, torch.arange(3))),
        ("does not hold", lambda: wb.envelope(wb.certify(X, Y, weights), 1e-6, torch.arange(3))),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- runs against the theorem -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_runs_obey_every_line_of_theorem_c(deep_net, fraction):
    X, Y, weights = deep_net
    cert = wb.certify(X, Y, weights)
    step = fraction * cert.quantities["max_step"]
    run = wb.train(X, Y, weights, step, 3000, every=100, certificate=cert)
    assert bool((run.residual[:, 0] <= wb.envelope(cert, step, run.steps) * (1 + 1e-10)).all())
    assert bool((run.observed["sigma_min"] >= cert.quantities["alpha"]).all())
    assert bool((run.observed["moves"][:, 0] <= torch.tensor(cert.quantities["radii"]).double()).all())
    assert bool((run.observed["drift"] <= cert.quantities["d"]).all())
    assert 0.8e-3 < cert.quantities["rho"] * cert.quantities["max_step"] < 4e-3


def test_the_envelope_at_a_smaller_step_has_the_better_rate(envelope_net):
    cert = wb.certify(*envelope_net)
    k = torch.tensor([0, 1000])
    half = cert.quantities["max_step"] / 2
    curve = wb.envelope(cert, half, k)
    assert float(curve[0]) == pytest.approx(cert.quantities["R_0"])
    assert float(curve[1]) < cert.quantities["R_0"] * (1 - half * cert.quantities["rho"]) ** 1000


def test_train_warns_when_the_step_leaves_the_theorem():
    X, Y, weights = problem(8, 8, (8, 200, 1), 11, beta=3.0)
    cert = wb.certify(X, Y, weights)
    assert cert.holds
    with pytest.warns(UserWarning, match="not covered"):
        wb.train(X, Y, weights, 1.5 * cert.quantities["max_step"], 10)
    with pytest.raises(ValueError, match="step"):
        wb.train(X, Y, weights, 0.0, 10)


def test_hidden_ascent_keeps_the_conclusions(deep_net):
    X, Y, weights = deep_net
    cert = wb.certify(X, Y, weights)
    step = cert.quantities["max_step"]

    def ascent(state, R, gradients):
        return [-G for G in gradients[:-1]] + gradients[-1:]

    run = wb.train(X, Y, weights, step, 1000, every=100, certificate=cert, update=ascent)
    assert bool((run.residual[:, 0] <= wb.envelope(cert, step, run.steps) * (1 + 1e-10)).all())
    assert bool((run.observed["moves"][:, 0] <= torch.tensor(cert.quantities["radii"]).double()).all())


def test_frozen_features_on_digits():
    digits = data.digits(n=50)
    generator = torch.Generator().manual_seed(7)
    weights = networks.init_mlp((64, 4096, 10), scheme="gaussian", beta=2.0, zero_last=True, generator=generator)
    cert = wb.certify(digits.X, digits.Y, weights, epsilon=0.4)
    assert cert.holds
    step = cert.quantities["max_step"]
    run = descent.train(weights, digits.X, digits.Y, step, 200, every=50)
    F = networks.features(weights, digits.X)[-1][0]
    values, U = torch.linalg.eigh(F @ F.T)
    for k, residual in zip(run.steps.tolist(), run.residual[:, 0].tolist(), strict=True):
        frozen = torch.linalg.matrix_norm((1 - step * values)[:, None] ** k * (U.T @ digits.Y))
        assert residual == pytest.approx(float(frozen), rel=1e-4)


# --- widths -----------------------------------------------------------------------------------------------------------


def test_proxy_width_of_corollary_d_in_closed_form():
    X, Y, _ = problem(40, 40, (40, 1), 12)
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    expected = wb.two_layer_threshold() * float(torch.linalg.matrix_norm(X, 2) * torch.linalg.matrix_norm(Y)) / smallest
    assert wb.proxy_width(X, Y) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "power", "theory"),
    [
        ({"theorem": "P", "radius": 1.0, "last": "lecun"}, 2.0, 2.0),
        ({"theorem": "P"}, 1.5, 1.5),
    ],
)
def test_proxy_exponents_with_lambda_divided_out(options, power, theory):
    sizes, widths, smallest = (64, 256), [], []
    for N in sizes:
        X, Y, _ = problem(N, N, (N, 1), 13)
        widths.append(math.log(wb.proxy_width(X, Y, **options)))
        smallest.append(math.log(float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])))
    run = math.log(sizes[1] / sizes[0])
    slope, fall = (widths[1] - widths[0]) / run, (smallest[1] - smallest[0]) / run
    assert slope + power * fall == pytest.approx(theory, abs=0.05)


def test_proxies_of_the_true_width_setting():
    """N = 64, d = 8, rows of norm sqrt(8), LeCun everywhere."""
    X, Y, _ = problem(64, 8, (8, 1), 64, radius=math.sqrt(8))
    options = {"scale": 8**-0.5, "last": "lecun"}
    assert 0.5 < wb.proxy_width(X, Y, **options) / 2.8e5 < 2
    assert 0.5 < wb.proxy_width(X, Y, theorem="P", **options) / 4.3e8 < 2
    assert 0.5 < wb.proxy_width(X, Y, theorem="P", radius=1.0, **options) / 8.3e10 < 2


def test_deep_lecun_is_infeasible_at_every_width():
    X, Y, _ = problem(64, 64, (64, 1), 14)
    below = torch.randn(64, 64, generator=torch.Generator().manual_seed(15), dtype=torch.float64)
    assert wb.proxy_width(X, Y, theorem="P", lower=[below], scale=1 / 8, last="lecun") == math.inf


def test_drawn_networks_concentrate_near_the_proxy():
    X, Y, _ = problem(128, 128, (128, 1), 16)
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    ratios = []
    for seed in range(6):
        weights = networks.init_mlp((128, 16 * 128, 1), scheme="gaussian", zero_last=True, generator=seed)
        ratios.append(float(wb.spectra(X, Y, weights).alpha_0[0]) / math.sqrt(16 * 128 * smallest))
    assert 0.88 < sum(ratios) / 6 < 0.94


def test_hermite_bounds_rise_to_lambda():
    X = data.digits(n=60).X
    bounds = wb.hermite_lower_bound(X, 40)
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    assert bool((bounds[1:] >= bounds[:-1] - 1e-13).all())
    assert float(bounds[-1]) <= smallest + 1e-13
    assert float(bounds[-1]) > 0.3 * smallest


def test_chernoff_width_is_loose_but_safe():
    X, Y, _ = problem(128, 128, (128, 1), 17)
    assert wb.chernoff_width(X, Y, 0.01) == pytest.approx(7.4e5, rel=0.3)
    assert wb.proxy_width(X, Y) == pytest.approx(1500, rel=0.3)
    X, Y, _ = problem(8, 8, (8, 1), 18)
    n = math.ceil(wb.chernoff_width(X, Y, 0.01))
    assert wb.certify(X, Y, networks.init_mlp((8, n, 1), scheme="gaussian", zero_last=True)).holds
