"""Certificates of Theorems P and C: what they promise, what runs do then, and what they refuse."""

import math
from dataclasses import replace
from fractions import Fraction

import oracles
import pytest
import torch
from making import gaussian, relu_problem, seeded

from companion import data, networks
from companion import width_bounds as wb
from companion.width_bounds import certificates, fixed_points

BIG = 2.0**53
# sums of three terms whose exact value is 3 or 1, in orders of summation that err each way
CANCELLING = [
    *(((*x,), 3) for x in ((BIG + 2, 1.0, -BIG), (1.0, BIG + 2, -BIG), (-BIG, 1.0, BIG + 2))),
    *(((*x,), 1) for x in ((BIG, 1.0, -BIG), (1.0, BIG, -BIG), (-BIG, 1.0, BIG))),
]


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def at_ratio(ratio, seed=1, last=0.0):
    """A network with ``alpha_0^2 = ratio ||X|| R_0``, and interference of `last` times ``alpha_0^2``."""
    X, Y, (W_1, W_2) = relu_problem(8, 8, (8, 200, 1), seed)
    s = wb.spectra(X, Y, [W_1, W_2]).member(0)
    direction = gaussian(200, 1, seed=9)
    W_2 = math.sqrt(last) * float(s.alpha_0 / s.phi[0]) * direction / torch.linalg.vector_norm(direction)
    size = float(s.alpha_0**2 / (ratio * s.phi[0] * torch.linalg.vector_norm(Y)))
    return X, torch.relu(X @ W_1[0]) @ W_2 + size * Y, [W_1[0], W_2]


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
    assert {a.status for a in cert.assumptions} == {"measured", "exact", "assumed"}
    assert {"alpha", "rho", "max_step", "radii"} <= set(cert.quantities)
    assert 7.0 < cert.quantities["alpha_0"] ** 2 / cert.quantities["R_0"] < 40


def test_certified_values_are_one_sided_and_close(envelope_net):
    measured, proved = wb.certify(*envelope_net), wb.certify(*envelope_net, level="certified")
    assert proved.holds
    assert proved.status == "certified"
    for name, side in (("alpha_0", -1), ("alpha", -1), ("rho", -1), ("max_step", -1), ("R_0", 1), ("d", 1), ("B", 1)):
        gain = side * (proved.quantities[name] / measured.quantities[name] - 1)
        assert 0 < gain < (0.05 if name == "rho" else 1e-3), name
    assert proved.quantities["phi"] > measured.quantities["phi"]


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
    assert Fraction(cert.quantities["alpha"]) < alpha
    for name, exact in (("d", d2), ("B", g1**2 + g2**2), ("phi", phi[2] + d2)):
        assert Fraction(cert.quantities[name]) > exact
    assert Fraction(cert.quantities["max_step"]) <= Fraction(1, 2) / (phi[2] + d2) ** 2


@pytest.mark.parametrize(("x", "exact"), CANCELLING)
@pytest.mark.parametrize("depth", [2, 3])
def test_the_enclosure_covers_features_that_cancel(x, exact, depth):
    """``F_1 = sum x``, computed wrong in its first digit, then multiplied by 1 in every later layer."""
    weights = [torch.ones(3, 1, dtype=torch.float64)] + [float64([1.0])] * (depth - 1)
    s = certificates._certified_spectra(float64(x), float64([0.0]), weights)
    assert Fraction(float(s.alpha_0)) <= exact
    assert all(Fraction(v) >= exact for v in s.phi.tolist()[1:])
    assert Fraction(float(s.R_0)) >= exact
    assert Fraction(float(s.w[0])) ** 2 >= 3


@pytest.mark.parametrize(("x", "exact"), CANCELLING)
def test_the_residual_covers_an_output_that_cancels(x, exact):
    weights = [float64([abs(v) for v in x]), float64(*[[math.copysign(1.0, v)] for v in x])]
    X, Y = float64([1.0]), float64([0.0])
    assert Fraction(float(certificates._certified_spectra(X, Y, weights).R_0)) >= exact
    assert Fraction(float(certificates._measured_spectra(X, Y, weights).R_0)) >= exact


@pytest.mark.parametrize("place", [0, -1])
def test_the_residual_covers_a_long_sum(place):
    """4,096 ones beside 2^53: those that are added to it one by one are lost."""
    terms = torch.ones(1, 4097, dtype=torch.float64)
    terms[0, place] = BIG
    weights = [terms, torch.ones(4097, 1, dtype=torch.float64)]
    R_0 = certificates._certified_spectra(float64([1.0]), float64([0.0]), weights).R_0
    assert Fraction(float(R_0)) >= 2**53 + 4096


def test_the_residual_covers_its_subtraction():
    """``2^-54 - (-1)`` is computed as 1."""
    s = certificates._certified_spectra(float64([1.0]), float64([-1.0]), [float64([1.0]), float64([2.0**-54])])
    assert Fraction(float(s.R_0)) >= 1 + Fraction(1, 2**54)


def test_radii_a_little_too_small_are_refused():
    one = float64(1.0)[0]
    s = wb.Spectra(float64(0.0, 0.0), float64(1.0, 1.0), one, one / 6, one)
    C = wb.ball_fixed_point(s, epsilon=0.25).C.tolist()
    found = certificates._in_fractions(s, C, 0.25)
    w, phi, radii = ([Fraction(x) for x in part] for part in (s.w.tolist(), s.phi.tolist(), C))
    stated = oracles.theorem_c(w, phi, Fraction(1), Fraction(float(s.R_0)), radii, Fraction(1, 4))
    assert list(found) == [stated[name] for name in ("d", "phi", "alpha", "B", "rho")]
    for layer in range(2):
        less = [c * (0.99 if l == layer else 1) for l, c in enumerate(C)]
        assert certificates._in_fractions(s, less, 0.25) is None
    assert certificates._in_fractions(s, [0.9, 0.9], 0.25) is None  # rho < 0
    assert certificates._in_fractions(s, [0.0, 2.0], 0.25) is None  # rho < 0 < alpha
    assert certificates._in_fractions(s, [2.0, 0.0], 0.25) is None  # alpha < 0 < rho
    still = replace(s, w=float64(0.0, 2.0), R_0=0 * one)
    assert certificates._in_fractions(still, [0.0, 0.0], 0.25) is None  # rho < 0, and no residual


def test_the_feature_enclosure_contains_exact_arithmetic():
    """Features, products and residual of a tiny deep net in Fractions, against the certified one-sided numbers."""
    X, Y, weights = relu_problem(3, 2, (2, 3, 4, 1), 6)
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


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_the_step_is_compared_with_max_step_itself(level):
    X, Y, weights = relu_problem(8, 8, (8, 200, 1), 1, beta=3.0)
    q = wb.certify(X, Y, weights, level=level).quantities
    step, s = q["max_step"], wb.spectra(X, Y, weights)
    assert step == pytest.approx(0.5 / (float(s.phi[0, 1]) + q["d"]) ** 2, rel=1e-4)
    assert wb.certify(X, Y, weights, level=level, step=step).quantities["epsilon"] == 0.25
    beyond = wb.certify(X, Y, weights, level=level, step=math.nextafter(step, 1), epsilon=0.25)
    assert beyond.reason == f"step_too_large: the theorem asks for η ≤ {step!r}"
    assert wb.certify(X, Y, weights, level=level, step=1.5 * step).quantities["epsilon"] > 0.25


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_epsilon_is_tried_before_refusing(level):
    """Between 4 and 5.69 a smaller epsilon than 1/4 is needed; below 4 none is enough."""
    problem = at_ratio(4.5)
    cert = wb.certify(*problem, level=level)
    assert cert.holds
    assert wb.two_layer_threshold(cert.quantities["epsilon"]) < 4.5
    assert wb.certify(*problem, level=level, epsilon="auto").quantities == cert.quantities
    assert wb.certify(*problem, level=level, step=1e-9).quantities["epsilon"] == 0.001
    reason = wb.certify(*problem, level=level, epsilon=0.25).reason
    assert reason.startswith(f"epsilon_too_large: no radii at ε = 0.25, but at ε = {cert.quantities['epsilon']}")
    assert wb.certify(*at_ratio(3.9), level=level, epsilon=0.25).reason.startswith("residual_too_large")


def test_interference_is_measured_against_every_epsilon():
    assert wb.certify(*at_ratio(1e4, last=0.85)).holds
    assert wb.certify(*at_ratio(1e4, last=0.85), epsilon=0.25).reason.startswith("epsilon_too_large")
    X, Y, (W_1, W_2) = at_ratio(1e4, last=1.2)
    cert = wb.certify(X, Y, [W_1, W_2])
    assert cert.reason.startswith("interference")
    assert cert.quantities["B_0"] == pytest.approx(1.2 * cert.quantities["alpha_0"] ** 2, rel=1e-9)
    share = float(cert.reason.split("less than ")[1].split(" ")[0])
    assert share == pytest.approx(math.sqrt(0.999 / 1.2), abs=0.01)
    small = 1e-4 * (Y - torch.relu(X @ W_1) @ W_2)
    for scale, holds in ((0.97 * share, True), (1.03 * share, False)):
        assert wb.certify(X, torch.relu(X @ W_1) @ (scale * W_2) + small, [W_1, scale * W_2]).holds is holds


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_a_refusal_lists_facts_only(level):
    """What is known before anything moves, and no iterate of a search that broke down."""
    X, Y, weights = relu_problem(10, 10, (10, 15, 80, 1), 3)
    cert = wb.certify(X, Y, weights, level=level)
    assert cert.reason.startswith("residual_too_large")
    assert list(cert.quantities) == ["alpha_0", "R_0", "phi", "B_0", "epsilon", "largest_R_0", "beta"]
    s = wb.spectra(X, Y, weights).member(0)
    for name, value in (("alpha_0", s.alpha_0), ("R_0", s.R_0), ("phi", s.phi[-1])):
        assert cert.quantities[name] == pytest.approx(float(value), rel=1e-4)
    assert cert.quantities["B_0"] == 0
    assert [a.holds for a in cert.assumptions] == [True, True, True, True, False]
    assert "η" not in [a.name for a in cert.assumptions]


def test_no_hint_is_given_that_was_not_found():
    X, Y, weights = relu_problem(4, 4, (4, 40, 1), 1)
    weights = [1e-100 * weights[0], weights[1]]
    cert = wb.certify(X, 1e-163 * Y, weights)
    assert cert.quantities["R_0"] == pytest.approx(2e-163)
    assert cert.reason.startswith("residual_too_large: R₀ is 2e-163")
    assert wb.certify(X, 1e-163 * Y, [cert.quantities["beta"] * weights[0], weights[1]]).holds
    cert = wb.certify(X, 1e120 * Y, [1e100 * weights[0], weights[1]])  # more than 1e100 times too large
    assert "largest_R_0" not in cert.quantities
    assert (
        cert.reason == f"residual_too_large: R₀ is 2e+120; W_{{L-1}} scaled by {cert.quantities['beta']:.3g} would do"
    )


# --- Numbers of any size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_inputs_whose_squares_underflow(level):
    """``||X||_2 = 1e-163`` is no 0: the hidden layer interferes."""
    X, Y, weights = relu_problem(4, 4, (4, 40, 1), 1)
    weights = [1e148 * weights[0], 1e149 * gaussian(1, 40, 1)]
    X = 1e-163 * X
    Y = networks.forward(weights, X)[0] * (1 + 1e-12 * Y)
    cert = wb.certify(X, Y, weights, level=level)
    assert cert.reason.startswith("interference")
    W_L = float(torch.linalg.vector_norm(weights[1] / 1e149))
    norm = float(torch.linalg.matrix_norm(X * 1e163, 2))
    assert cert.quantities["B_0"] == pytest.approx((norm * W_L * 1e-14) ** 2, rel=1e-6)


@pytest.mark.parametrize("level", ["measured", "certified"])
@pytest.mark.parametrize(
    "sizes", [(1e150, 1e10), (3e153, 1.0), (1e155, 1e-150), (1e-200, 1.0), (1.0, 1e-200), (1e-155, 1e155)]
)
def test_a_certificate_at_any_scale_is_true(level, sizes):
    """Only ``||X|| R_0 / alpha_0^2`` counts (Corollary D), however large or small its parts are."""
    X, Y, (W_1, W_2) = at_ratio(9.0)
    X, W_1 = sizes[0] * X, sizes[1] * W_1
    q = wb.certify(*at_ratio(9.0)).quantities
    product = sizes[0] * sizes[1] * sizes[1]  # alpha_0^2 / ||X||, beside what it was
    if not 1e-290 < product < 1e290:
        product = 0.0
    cert = wb.certify(X, product * Y, [W_1, W_2], level=level)
    if cert.holds:
        assert cert.quantities["alpha_0"] == pytest.approx(sizes[0] * sizes[1] * q["alpha_0"], rel=1e-4)
        assert cert.quantities["max_step"] > 0
        assert all(0 < c < math.inf for c in cert.quantities["radii"])
    else:
        assert cert.reason.startswith("undecided")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("level", ["measured", "certified"])
@pytest.mark.parametrize("sizes", [(1e155, 1e155), (1.0, 1e306)])
def test_features_that_overflow_are_refused_in_one_sentence(level, sizes):
    X, Y, weights = relu_problem(4, 4, (4, 40, 1), 1)
    with pytest.raises(ValueError, match="too large for their dtype; scale X or the weights down"):
        wb.certify(sizes[0] * X, Y, [sizes[1] * weights[0], weights[1]], level=level)


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_dependent_features_are_named(level):
    X = data.sphere(4, 4, seeded(0)).abs()
    narrow = [torch.ones(4, 1, dtype=torch.float64), gaussian(1, 30, seed=5), torch.zeros(30, 1, dtype=torch.float64)]
    cert = wb.certify(X, 1e-40 * data.signs(4, seeded(2)), narrow, level=level)
    assert cert.reason.startswith("sigma_min_unresolved")
    assert "rows 0 and 1 of F_1 are, to rounding, positively parallel" in cert.reason
    assert cert.quantities["alpha_0"] == 0
    for radii in (None, [1.0, 1.0, 1.0]):
        paper = wb.certify_paper(X, data.signs(4, seeded(2)), narrow, radii, level=level)
        assert paper.reason.startswith("sigma_min_unresolved")
    X, Y = data.sphere(12, 12, seeded(4)), data.signs(12, seeded(54))
    schemes = ["gaussian", "lecun", "lecun"]
    weights = networks.init_mlp((12, 3, 2000, 1), scheme=schemes, zero_last=True, generator=4)
    dead = (networks.features(weights, X)[1][0] == 0).all(1).nonzero()[:, 0].tolist()
    assert len(dead) == 2
    reason = wb.certify(X, Y, weights, level=level).reason
    assert reason.endswith(f"no neuron of layer 1 is active on sample {dead[0]}, {dead[1]}, whatever the widths above")
    X, Y, (W_1, W_2) = relu_problem(4, 4, (4, 40, 1), 1)
    off = -W_1.abs() * X[2].sign()[:, None]
    reason = wb.certify(X, Y, [off, W_2], level=level).reason
    assert "no neuron of layer 1 is active on sample" in reason
    assert "above" not in reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("level", ["measured", "certified"])
def test_the_default_dtype_changes_nothing(dtype, level):
    problem = relu_problem(6, 6, (6, 12, 60, 1), 2, beta=30.0)
    expected = [entry(*problem).to_json() for entry in (wb.certify, wb.certify_paper)]
    expected.append(wb.certify(*problem, level=level).to_json())
    torch.set_default_dtype(dtype)
    try:
        found = [entry(*problem).to_json() for entry in (wb.certify, wb.certify_paper)]
        found.append(wb.certify(*problem, level=level).to_json())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_gradients_and_inference_change_nothing():
    X, Y, weights = relu_problem(6, 6, (6, 60, 1), 2, beta=3.0)
    expected = wb.certify(X, Y, weights).to_json()
    wanted = [W.clone().requires_grad_() for W in weights]
    assert wb.certify(X.clone().requires_grad_(), Y, wanted).to_json() == expected
    with torch.inference_mode():
        assert wb.certify(X.clone(), Y.clone(), [W.clone() for W in weights]).to_json() == expected


# --- Ensembles --------------------------------------------------------------------------------------------------------


def test_what_an_ensemble_promises_holds_for_every_member():
    X, Y, weights = relu_problem(8, 8, (8, 100, 1), 3, S=3)
    for s, factor in enumerate((8.0, 4.0, 6.0)):
        weights[0][s] *= factor
    cert = wb.certify(X, Y, weights)
    assert cert.holds
    singles = [wb.certify(X, Y, [W[s] for W in weights]) for s in range(3)]
    assert [m.to_json() for m in cert.members] == [c.to_json() for c in singles]
    for name in ("max_step", "rho"):
        assert cert.quantities[name] == min(c.quantities[name] for c in singles)
    assert cert.quantities["max_step"] == singles[0].quantities["max_step"]
    assert cert.quantities["rho"] == singles[1].quantities["rho"]
    assert cert.quantities["alpha_0"] == singles[1].quantities["alpha_0"]


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
    assert "beta" not in wb.certify(X, Y, heavy).quantities
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
    deep = networks.init_mlp((2, 50, 50, 1), scheme="gaussian", zero_last=True)
    assert wb.certify(pairs, Y[:6], deep).assumptions[0].holds  # they need not stay dependent above F_1


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
        ("radii is", lambda: wb.certify_paper(X, Y, weights, [1.0, 0.0])),
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


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_the_certificate_of_theorem_p_is_the_theorem_as_stated(level):
    X, Y, weights = relu_problem(6, 6, (6, 30, 1), 4, beta=150.0)
    weights[1] = 1e-3 * gaussian(1, 30, 1)
    radii = [0.5, 8.0]
    cert = wb.certify_paper(X, Y, weights, radii, level=level)
    one = [W[0] for W in weights]
    s = certificates._certified_spectra(X, Y, one) if level == "certified" else wb.spectra(X, Y, one).member(0)
    ratios, step = oracles.theorem_p(s.w.tolist(), float(s.X_F), float(s.alpha_0), float(s.R_0), radii)
    assert [row.measured for row in cert.assumptions if row.name.startswith("(")] == pytest.approx(ratios, rel=1e-9)
    assert min(ratios) >= 1
    assert cert.holds
    assert cert.status == level
    assert cert.quantities["max_step"] == pytest.approx(step, rel=1e-9)
    assert cert.quantities["rate"] == pytest.approx(step * float(s.alpha_0) ** 2 / 8, rel=1e-9)
    w, C = ([Fraction(x) for x in part] for part in (s.w.tolist(), radii))
    exact = oracles.theorem_p(w, *(Fraction(float(x)) for x in (s.X_F, s.alpha_0, s.R_0)), C)[1]
    assert Fraction(cert.quantities["max_step"]) < exact
    assert Fraction(cert.quantities["rate"]) < exact * Fraction(float(s.alpha_0)) ** 2 / 8
    assert wb.certify_paper(X, Y, weights, [0.5, 2.0], level=level).reason == "condition (i) fails"  # a ratio of 0.6
    necessary = 1 / (16 * 6 * float(s.w[1]) ** 2 / float(s.w[0]) ** 2)
    assert cert.quantities.get("necessary") == (pytest.approx(necessary) if level == "measured" else None)


def test_a_certified_theorem_p_is_beyond_the_measured_one():
    problem = relu_problem(6, 6, (6, 10, 30, 1), 4, beta=1e6)
    measured, proved = (wb.certify_paper(*problem, level=level) for level in ("measured", "certified"))
    assert measured.holds
    assert proved.holds
    assert (measured.status, proved.status) == ("measured", "certified")
    assert proved.quantities["alpha_0"] < measured.quantities["alpha_0"]
    assert proved.quantities["R_0"] > measured.quantities["R_0"]
    for found, shown in zip(proved.assumptions[3:6], measured.assumptions[3:6], strict=True):
        assert 0.99 * shown.measured < found.measured <= shown.measured


def test_a_condition_of_theorem_p_that_fails_is_named():
    X, Y, weights = relu_problem(6, 6, (6, 30, 1), 4, beta=50.0)
    assert wb.certify_paper(X, Y, weights, [1e-9, 2.0]).reason == "condition (i) fails"
    assert wb.certify_paper(X, Y, weights, [1.0, 1e9]).reason == "condition (i), (ii), (iii) fails"
    assert wb.certify_paper(X, 1e9 * Y, weights).reason.startswith("no_radii")
    assert "max_step" not in wb.certify_paper(X, Y, weights, [1e-9, 2.0]).quantities


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
    rate = ours.quantities["rho"] * ours.quantities["max_step"]
    assert rate == pytest.approx(2 * 0.25 * 0.75 * (ours.quantities["alpha_0"] / ours.quantities["phi"]) ** 2, rel=0.01)
    # by dominance P's step is at most 1/(8 (phi_bar/alpha_0)^2) of C's, and its rate is that of the loss
    s = wb.spectra(X, Y, weights)
    phi_bar = float(s.X_F) * (float(s.w[0, 0]) + paper.quantities["radii"][0])
    assert 0 < paper.quantities["rate"] <= (float(s.alpha_0) / phi_bar) ** 4 / 128


def test_the_necessary_condition_refuses_lecun_and_is_implied_by_p():
    generator = torch.Generator().manual_seed(5)
    X, Y = data.sphere(50, 50, generator), data.signs(50, generator)
    weights = networks.init_mlp((50, 50, 2000, 1), scheme="lecun", generator=generator)
    s = wb.spectra(X, Y, weights)
    assert float(wb.necessary_condition(s, 50)) < 1
    assert not wb.certify_paper(X, Y, weights).holds
    X, Y, weights = relu_problem(20, 20, (20, 200, 1), 1, beta=70.0)
    weights[1] = 1e-5 * torch.ones_like(weights[1])
    cert = wb.certify_paper(X, Y, weights)
    assert cert.holds
    assert cert.quantities["necessary"] >= 1
