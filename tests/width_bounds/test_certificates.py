"""Certificates of Theorems P and C: what they promise, what runs do then, and what they refuse."""

import math
from fractions import Fraction

import pytest
import torch
from making import relu_problem

from companion import data, descent, networks
from companion import width_bounds as wb
from companion.width_bounds import certificates, fixed_points

# --- Theorem C --------------------------------------------------------------------------------------------------------


def test_handy_form_of_corollary_d(envelope_net):
    X, Y, weights = envelope_net
    s = wb.spectra(X, Y, weights)
    assert float(s.alpha_0**2 / (s.phi[0, 0] * s.R_0)) > 6
    q = wb.certify(X, Y, weights).quantities
    step = 0.37 / float(s.phi[0, 1]) ** 2
    assert step <= q["max_step"]
    assert q["rho"] > 0.39 * q["alpha_0"] ** 2


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
    s = certificates.certified_spectra(X, Y, [W[0] for W in weights])
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
    X, Y, weights = relu_problem(3, 2, (2, 3, 4, 1), 6)
    one = [W[0] for W in weights]
    s = certificates.certified_spectra(X, Y, one)
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
    X, Y, weights = relu_problem(8, 8, (8, 400, 1), 7, S=4, beta=2.0)
    weights[0][2] *= 0.05
    cert = wb.certify(X, Y, weights)
    assert len(cert.members) == 4
    assert [m.holds for m in cert.members].count(True) == 3
    assert not cert.holds
    assert "3 of 4" in cert.verdict()
    paper = wb.certify_paper(X, Y, weights)
    assert len(paper.members) == 4


def test_reasons():
    X, Y, weights = relu_problem(8, 8, (8, 30, 1), 8)
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
    assert not wb.certify_paper(pairs, Y[:6], small).holds


def test_the_hint_of_a_refusal_is_right():
    X, Y, weights = relu_problem(8, 8, (8, 30, 1), 8)
    cert = wb.certify(X, Y, weights)
    beta, R_0 = cert.quantities["beta"], cert.quantities["largest_R_0"]
    assert wb.certify(X, Y, [1.0001 * beta * weights[0], weights[1]]).holds
    assert wb.certify(X, 0.9999 * R_0 / float(torch.linalg.matrix_norm(Y)) * Y, weights).holds
    assert not wb.certify(X, 1.002 * R_0 / float(torch.linalg.matrix_norm(Y)) * Y, weights).holds


def test_independent_antipodal_pairs_are_fine():
    X, Y, _ = relu_problem(3, 8, (8, 1), 9)
    X, Y = torch.cat([X, -X]), torch.cat([Y, Y])
    weights = networks.init_mlp((8, 3000, 1), scheme="gaussian", zero_last=True)
    assert wb.certify(X, Y, weights).holds


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("entry", [wb.certify, wb.certify_paper])
def test_bad_input_is_refused_in_one_sentence(entry):
    X, Y, weights = relu_problem(4, 4, (4, 20, 1), 10)
    nan, inf = X.clone(), X.clone()
    nan[1, 2], inf[0, 0] = math.nan, math.inf
    cases = [
        (ValueError, r"X\[1, 2\] is nan", (nan, Y, weights)),
        (ValueError, r"X\[0, 0\] is inf", (inf, Y, weights)),
        (TypeError, "X has dtype torch.int64", (X.long(), Y, weights)),
        (TypeError, "X has dtype torch.float16", (X.half(), Y, weights)),
        (
            TypeError,
            "X has dtype torch.float32; torch.float64 is needed",
            (X.float(), Y.float(), [W.float() for W in weights]),
        ),
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
    X, Y, weights = relu_problem(4, 4, (4, 20, 1), 10)
    s = wb.spectra(X, Y, weights)
    for words, call in (
        ("epsilon is 1.5", lambda: wb.certify(X, Y, weights, epsilon=1.5)),
        ("epsilon is 'best'", lambda: wb.certify(X, Y, weights, epsilon="best")),
        ("level is 'proof'", lambda: wb.certify(X, Y, weights, level="proof")),
        ("step is 0", lambda: wb.certify(X, Y, weights, step=0.0)),
        ("radii is", lambda: wb.certify_paper(X, Y, weights, [1.0])),
        ("radii is", lambda: wb.certify_paper(X, Y, weights, [1.0, -1.0])),
        ("mode is", lambda: wb.ball_fixed_point(s, mode="sgd")),
        ("path is", lambda: wb.ball_fixed_point(s, path="short")),
        ("theorem is", lambda: wb.smallest_beta(s, theorem="Q")),
        ("p is 2", lambda: wb.chernoff_width(X, Y, 2.0)),
        ("unit rows are needed", lambda: wb.chernoff_width(3 * X, Y)),
        ("W_L has norm", lambda: wb.smallest_beta(wb.spectra(X, Y, [weights[0], 1 + weights[1]]))),
        ("step is", lambda: wb.envelope(wb.certify(X, Y, [90 * weights[0], weights[1]]), 1.0, torch.arange(3))),
        ("does not hold", lambda: wb.envelope(wb.certify(X, Y, weights), 1e-6, torch.arange(3))),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


# --- Theorem P --------------------------------------------------------------------------------------------------------


def test_the_certify_paper_against_the_formulas():
    X, Y, weights = relu_problem(6, 6, (6, 30, 1), 4, beta=50.0)
    radii = [0.5, 2.0]
    s = wb.spectra(X, Y, weights).member(0)
    bar = [float(s.w[0]) + 0.5, float(s.w[1]) + 2.0]
    x, a, R = float(s.X_F), float(s.alpha_0), float(s.R_0)
    P, S = [bar[1], bar[0]], bar[1] ** 2 / bar[1] ** 2
    right = [16 * x * R * max(P[0] / 0.5, P[1] / 2.0), 32 * x**2 * bar[1] * S * R, 16 * x**2 * bar[1] ** 2 * S]
    expected = [a**2 / right[0], a**3 / right[1], a**2 / right[2]]
    found = [row.measured for row in wb.certify_paper(X, Y, weights, radii).assumptions if row.name.startswith("(")]
    assert found == pytest.approx(expected, rel=1e-12)


def test_optimal_radii_are_no_worse_than_any_others():
    X, Y, weights = relu_problem(20, 20, (20, 200, 1), 1, beta=70.0)
    best = wb.certify_paper(X, Y, weights)
    assert best.holds
    s = wb.spectra(X, Y, weights)
    for scale in (0.5, 0.99):
        assert not fixed_points.paper_map(s, scale * torch.tensor(best.quantities["radii"]).double()[None]).feasible


def test_both_theorems_hold_at_beta_70_with_the_known_rates():
    X, Y, weights = relu_problem(20, 20, (20, 200, 1), 1, beta=70.0)
    paper, ours = wb.certify_paper(X, Y, weights), wb.certify(X, Y, weights)
    assert paper.quantities["rate"] == pytest.approx(7e-9, rel=1.0)
    assert 3e-3 < ours.quantities["rho"] * ours.quantities["max_step"] < 1.2e-2


def test_the_necessary_condition_refuses_lecun_and_is_implied_by_p():
    generator = torch.Generator().manual_seed(5)
    X, Y = data.sphere(50, 50, generator), data.signs(50, generator)
    weights = networks.init_mlp((50, 50, 2000, 1), scheme="lecun", generator=generator)
    s = wb.spectra(X, Y, weights)
    assert float(wb.necessary_condition(s, 50)) < 1
    assert not wb.certify_paper(X, Y, weights).holds
    X, Y, weights = relu_problem(20, 20, (20, 200, 1), 1, beta=70.0)
    weights[1] = 1e-3 * torch.ones_like(weights[1])
    s = wb.spectra(X, Y, weights)
    if bool(fixed_points.paper_fixed_point(s).feasible):
        assert float(wb.necessary_condition(s, 20)) >= 1


# --- Runs against the theorem -----------------------------------------------------------------------------------------


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
    X, Y, weights = relu_problem(8, 8, (8, 200, 1), 11, beta=3.0)
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
