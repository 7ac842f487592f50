"""What is certified about basins, and what must not be."""

import math
from fractions import Fraction

import pytest
import torch
from making import e1_at, gaussian, seeded, shallow_problem

from companion import basins, data, networks
from companion.networks import Activation
from companion.rigor import arbs

F64 = torch.float64


@pytest.mark.parametrize(
    ("N", "m", "act", "loss", "holds", "words"),
    [
        (5, 6, "tanh", "continuous", True, "no basin at all"),
        (5, 5, "tanh", "square", True, "no bad basin"),
        (5, 5, "tanh", "continuous", False, "no bad basin"),
        (5, 4, "tanh", "square", False, "no bad basin"),
        (5, 1, "relu", "square", True, "at any width"),
        (5, 9, "step", "square", False, "no bad basin"),
    ],
)
def test_no_basin_counts_neurons(N, m, act, loss, holds, words):
    certificate = basins.certify_no_basin(N, m, act, loss)
    assert certificate.holds is holds
    assert words in certificate.theorem


def test_no_basin_below_full_column_rank_and_with_repeated_inputs():
    X = gaussian(6, 3, seed=1)
    assert not basins.certify_no_basin(6, 2, "tanh", X=X)
    X[:, 2] = X[:, 0] + X[:, 1]  # rounded: the stored floats need not have rank 2
    X[:, 2] = 2 * X[:, 0]
    assert basins.certify_no_basin(6, 2, "tanh", X=X).assumptions[-1].measured == 2
    X = gaussian(6, 3, seed=1)[[0, 0, 1, 1, 2, 3]]
    certificate = basins.certify_no_basin(6, 4, "tanh", X=X)
    assert certificate.holds
    assert certificate.quantities["distinct inputs"] == 4


def test_the_digits_have_no_basin_at_any_width_because_pixels_are_empty():
    X = data.digits(n=None, centre=False, normalize=False).X
    assert (X == 0).all(0).nonzero()[:, 0].tolist() == [0, 32, 39]
    few = X[:100]
    certificate = basins.certify_no_basin(100, 1, "tanh", X=few)
    assert certificate.holds
    assert certificate.assumptions[-1].measured == int(torch.linalg.matrix_rank(few))


def test_a_relu_ray_keeps_the_loss():
    (W, V), X, _ = shallow_problem(1, 6, 3, 2)
    f = networks.forward([W, V], X, "relu")
    for scale in (2.0, 1e3):
        torch.testing.assert_close(networks.forward([scale * W, V / scale], X, "relu"), f)


def test_inputs_that_differ_in_one_coordinate_only_are_distinct():
    for column in (0, 1):
        X = torch.ones(3, 2, dtype=F64)
        X[:, column] = torch.tensor([0.0, 1.0, 2.0])
        assert not basins.certify_no_basin(3, 2, "tanh", X=X)
        assert "at all" in basins.certify_no_basin(3, 2, "tanh", X=X[[0, 0, 0]]).theorem


@pytest.mark.parametrize("N", range(2, 9))
def test_exponentials_of_one_input_have_no_bad_basin_from_half_the_width_on(N):
    """2 m >= N' as Theorem T says; below it a bad strict minimum exists, so nothing may be certified."""
    x = torch.arange(1, N + 1, dtype=F64)[:, None]
    for m in range(1, N + 1):
        certificate = basins.certify_no_basin(2 * N, m, "exp", X=torch.cat([x, x]))
        assert certificate.holds is (2 * m >= N)
        # a bias among the outputs has no weight of its own inside: one zero more, not two
        assert basins.certify_no_basin(N, m, "exp", X=x, output_bias=True).holds is (2 * m + 1 >= N)
        for loss in ("quasi-convex", "continuous"):
            assert basins.certify_no_basin(N, m, "exp", loss, X=x).holds is (m > N or (m == N and loss[0] == "q"))
        assert basins.certify_no_basin(N, m, "exp", X=x, K=2).holds is (m >= N)
        if 2 * m < N <= 5:
            assert basins.exact_bad_minimum("exp", range(0, -m, -1), range(1, N + 1), 2).certificate().holds


def test_bad_minima_just_outside_theorem_t_are_not_denied():
    """With an output bias: exp on (0, 1, 2, 3), e = (-4, 8, -5, 1), w = ln 2, v = 0.3.  Two outputs: two neurons."""
    x = torch.arange(4, dtype=F64)[:, None]
    e = torch.tensor([-4.0, 8, -5, 1], dtype=F64)

    def loss(theta):
        y = 0.3 * 2 ** x[:, 0] - e
        return 0.5 * (theta[0] * torch.exp(theta[1] * x[:, 0]) + theta[2] - y).square().sum()

    at = torch.tensor([0.3, math.log(2), 0.0], dtype=F64)
    assert float(torch.autograd.functional.jacobian(loss, at).abs().max()) < 1e-12
    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, at))
    assert float(eigenvalues[0]) > 0.4
    assert float(loss(at)) == pytest.approx(0.5 * float(e @ e))
    features = torch.stack([torch.exp(-6 * x[:, 0]), torch.ones(4, dtype=F64)], 1)
    y = (0.3 * 2 ** x[:, 0] - e)[:, None]
    assert 0.5 * float((features @ torch.linalg.lstsq(features, y).solution - y).square().sum()) < float(loss(at)) - 5
    assert not basins.certify_no_basin(4, 1, "exp", X=x, output_bias=True)
    assert not basins.certify_no_basin(4, 2, "exp", X=x, K=2)


def test_a_bias_gives_exponentials_a_ray():
    X = torch.randint(-9, 10, (6, 3), generator=seeded()).double()
    X[:, 2] = 1
    hidden = X @ torch.tensor([[1.0, 0, 2], [0, 1, 0], [1, 1, 0]], dtype=F64)  # the constant is a combination now
    for inputs in (X, hidden):
        for K in (1, 3):
            certificate = basins.certify_no_basin(6, 1, "exp", "continuous", X=inputs, K=K)
            assert "at any width" in certificate.theorem
            assert certificate.status == "exact"
    assert not basins.certify_no_basin(6, 1, "exp", X=X[:, :2])
    assert not basins.certify_no_basin(6, 1, "exp", X=torch.cat([X[:, :2], 0 * X[:, 2:] + X[:, :1] ** 2], 1))
    assert not basins.certify_no_basin(6, 1, "tanh", X=X)


def test_sines_of_whole_numbers_touch_less_often_than_others():
    """On x_n = k_n x with |k_n| <= M, g_e = sin w P(cos w): at most (M - 1) / 2 touches with independent features."""
    for M in range(2, 9):
        x = torch.arange(1, M + 1, dtype=F64)[:, None]
        for m in range(1, M):
            for inputs in (x, 0.375 * x, -x):
                assert basins.certify_no_basin(M, m, "sin", X=inputs).holds is (2 * m >= M)
            assert not basins.certify_no_basin(M, m, "sin", X=x, output_bias=True) or m + 1 >= M
            assert not basins.certify_no_basin(M, m, "sin", X=x, K=2)
            assert not basins.certify_no_basin(M, m, "sin", X=x + 2**-20)
            assert not basins.certify_no_basin(M, m, "sin", X=torch.cat([x, x**2], 1))
    found = basins.touching_points(torch.tensor([[1.0], [2.0], [3.0]], dtype=F64), 2, "sin", 400, seeded(1), spread=9.0)
    other = basins.touching_points(torch.tensor([[1.0], [2.17], [3.41]]).double(), 2, "sin", 400, seeded(1), spread=9.0)
    assert not bool(found.touches.any())
    assert bool(other.touches.any())


def test_activations_are_recognized_by_identity_not_by_name():
    sine = (torch.sin, torch.cos, lambda z: -torch.sin(z))
    for name in ("relu", "identity", "exp"):
        assert not basins.certify_no_basin(5, 1, Activation(name, *sine), X=torch.arange(1.0, 6).double()[:, None] ** 2)
    assert basins.certify_no_basin(5, 5, Activation("step", *sine))
    X = torch.cat([gaussian(5, 1), torch.ones(5, 1, dtype=F64)], 1)
    assert not basins.certify_no_basin(5, 1, Activation("exp", *sine), X=X)
    weights, X, Y = e1_at()
    fifty = Activation(
        "sin", lambda z: torch.sin(50 * z), lambda z: 50 * torch.cos(50 * z), lambda z: -2500 * torch.sin(50 * z)
    )
    for level, words in (("measured", "companion's own"), ("certified", "with balls"), ("exact", "must be equal")):
        point = basins.example_e1().point if level == "exact" else weights
        with pytest.raises(ValueError, match=words):
            basins.certify_strict_minimum(point, X, Y, fifty, level, competitor=point)
    with pytest.raises(ValueError, match="with balls"):
        basins.certify_full_rank(weights, X, fifty)


# --- bad strict minima: every refusal for its own reason --------------------------------------------------------------

LOW = e1_at(math.pi / 6, -4.0)[0]
SADDLE = e1_at(math.asin(math.sqrt(7 / 8)), 0.0)[0]


@pytest.mark.parametrize("level", ["certified", "measured"])
@pytest.mark.parametrize(
    ("point", "competitor", "reasons"),
    [
        (e1_at()[0], LOW, None),
        (SADDLE, LOW, ("Krawczyk", "lambda_min")),
        (e1_at(v=2.0)[0], LOW, ("Krawczyk", "4 M")),
        (basins.split_neuron(e1_at()[0], 0, (0.3, 0.7)), LOW, ("Krawczyk", "4 M")),
        (e1_at()[0], e1_at()[0], ("loss of the competitor",) * 2),
        (LOW, e1_at()[0], ("loss of the competitor",) * 2),
        (e1_at()[0], basins.split_neuron(LOW, 0, (0.3, 0.7)), ("width of the competitor",) * 2),
    ],
)
def test_every_refusal_has_its_reason(level, point, competitor, reasons):
    _, X, Y = e1_at()
    certificate = basins.certify_strict_minimum(point, X, Y, "sin", level, competitor=competitor)
    assert certificate.holds is (reasons is None)
    if reasons:
        assert reasons[level == "measured"] in certificate.reason
        assert "not shown" not in certificate.reason


def test_every_refusal_in_fractions_has_its_reason():
    e1, half = basins.example_e1(), Fraction(1, 2)
    double = basins.ExactPoint("sin", (0, 1), ((1,), (1,)), (3 * half, -half))  # E1 split: critical, a saddle
    off = basins.ExactPoint("sin", (0, 1), ((1,),), (Fraction(2),))
    wide = basins.ExactPoint("sin", e1.competitor.base, ((1,), (1,)), (Fraction(-4), Fraction(0)))
    for point, competitor, reason in (
        (e1.point, e1.competitor, ""),
        (double, e1.competitor, "positive pivots"),
        (off, e1.competitor, "entries of the gradient"),
        (e1.point, e1.point, "loss of the competitor"),
        (e1.competitor, e1.point, "entries of the gradient"),
        (e1.point, wide, "width of the competitor"),
    ):
        certificate = basins.certify_strict_minimum(point, e1.X, e1.y, "sin", "exact", competitor=competitor)
        assert reason in certificate.reason
        assert certificate.holds is (reason == "")


def test_a_competitor_that_is_lower_by_less_than_rounding_is_lower():
    """Losses 9 and 9 - 10^-30: equal as floats, different as fractions."""
    e1 = basins.example_e1()
    (v,) = e1.point.v
    near = basins.ExactPoint("sin", (0, 1), ((1,),), (v,))
    tiny = Fraction(1, 10**15)
    y = (e1.y[0] + tiny, e1.y[1])
    there = near.derivatives(e1.X, y)
    assert float(there.loss) == pytest.approx(9, abs=1e-14)
    lower = basins.ExactPoint("sin", (0, 1), ((1,),), (v - there.gradient[0] / 2,))
    assert lower.derivatives(e1.X, y).loss < there.loss
    certificate = basins.certify_strict_minimum(near, e1.X, y, "sin", "exact", competitor=lower)
    assert certificate.assumptions[-1].holds
    assert not basins.certify_strict_minimum(near, e1.X, y, "sin", "exact", competitor=near).assumptions[-1].holds


def test_a_global_minimum_is_not_bad_because_a_wider_network_is_lower():
    """One tanh neuron at the lowest loss that one neuron has; three neurons have loss 0."""
    X = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    Y = 1.3 * torch.tanh(0.7 * X) + 0.01 * torch.tensor([[1.0], [-2.0], [1.0]], dtype=F64)
    start = [torch.full((1, 1, 1), t, dtype=F64) for t in (0.7, 1.3)]
    trained = basins.train_lm_newton(start, X, Y, "tanh")
    w = torch.linspace(-30, 30, 200_000, dtype=F64)
    H = torch.tanh(X * w)
    profile = 0.5 * (Y.square().sum() - (H * Y).sum(0) ** 2 / H.square().sum(0))
    assert float(trained.loss) < float(profile.min()) * (1 + 1e-9)
    W = torch.tensor([[0.5, 1.0, 2.0]], dtype=F64)
    wide = [W, torch.linalg.solve(torch.tanh(X @ W), Y)]
    for level in ("certified", "measured"):
        for competitor, reason in ((wide, "width of the competitor"), (None, "loss of the competitor")):
            found = basins.certify_strict_minimum(trained.weights, X, Y, "tanh", level, competitor=competitor)
            assert reason in found.reason


def test_a_competitor_on_other_data_does_not_count():
    """Two networks, each with data of its own: the lower loss is that of the other data."""
    weights, X, Y = e1_at()
    two, Xs = [torch.cat([a, b]) for a, b in zip(weights, LOW, strict=True)], X.expand(2, 2, 1)
    own = basins.certify_strict_minimum(two, Xs, Y, "sin", "measured", competitor=two)
    assert [c.holds for c in own.members] == [False, False]
    swapped = basins.certify_strict_minimum(two, Xs, Y, "sin", "measured", competitor=[T.flip(0) for T in two])
    assert [c.holds for c in swapped.members] == [True, False]
    with pytest.raises(ValueError, match="2 data sets for 1 networks"):
        basins.certify_strict_minimum(two, Xs, Y, "sin", "measured", competitor=LOW)
    with pytest.raises(ValueError, match="competitor is missing"):
        basins.certify_strict_minimum(two, Xs, Y, "sin", "measured")
    with pytest.raises(ValueError, match="competitor holds 2 networks"):
        basins.certify_strict_minimum(weights, X, Y, "sin", "certified", competitor=two)


def test_the_loss_at_a_minimum_nearby_may_be_lower_than_here():
    """The competitor must lie below L - 2 gamma^2 / lambda, not only below L."""
    weights, X, Y = e1_at(v=1.001)
    here = float(basins.loss_derivatives(weights, X, Y, "sin").loss)
    lower = e1_at(v=1.0005)[0]
    assert 9 < float(basins.loss_derivatives(lower, X, Y, "sin").loss) < here
    certificate = basins.certify_strict_minimum(weights, X, Y, "sin", "measured", competitor=lower)
    assert [r.holds for r in certificate.assumptions] == [True, True, True, True, False]
    assert basins.certify_strict_minimum(weights, X, Y, "sin", "measured", competitor=LOW)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"competitor": basins.ExactPoint("exp", 2, ((1,),), (Fraction(1),))},
            ValueError,
            "competitor has the activation",
        ),
        ({"competitor": basins.ExactPoint("sin", (0, 1), ((1, 2),), (Fraction(1),))}, ValueError, "the neurons take 2"),
        ({"competitor": LOW}, TypeError, "competitor is list; an ExactPoint is needed"),
        ({"weights": LOW}, TypeError, "weights is list; an ExactPoint is needed"),
        ({"act": "tanh"}, ValueError, "act is 'tanh'"),
        ({"Y": [[-2, 99], [-4, 7]]}, ValueError, "Y has 2 columns"),
        ({"Y": [-2]}, ValueError, "Y has 1 rows"),
        ({"Y": [-2, math.nan]}, ValueError, "finite rational numbers"),
        ({"X": [[1], [1, 2]]}, ValueError, "X has rows of"),
        ({"X": [[1.5], [3]]}, ValueError, "integer inputs"),
    ],
)
def test_exact_data_that_do_not_fit_are_named(unchecked, change, error, words):
    e1 = basins.example_e1()
    given = {"weights": e1.point, "X": e1.X, "Y": e1.y, "act": "sin", "competitor": e1.competitor} | change
    with pytest.raises(error, match=words):
        basins.certify_strict_minimum(level="exact", **given)


@pytest.mark.parametrize("level", ["certified", "measured"])
def test_e1_is_certified_in_floats_too(level):
    weights, X, Y = basins.example_e1().tensors()
    certificate = basins.certify_strict_minimum(weights, X, Y, "sin", level)
    assert certificate.holds, certificate
    assert certificate.status == level


def test_kantorovich_in_a_batch_gives_one_certificate_each():
    weights, X, Y = basins.example_e1().tensors()
    two = [torch.stack([weights[0], weights[0] + 0.3]), torch.stack([weights[1]] * 2)]
    certificate = basins.certify_strict_minimum(two, X, Y, "sin", "measured", competitor=e1_at(math.pi / 6, -4.0)[0])
    assert [c.holds for c in certificate.members] == [True, False]
    assert certificate.reason.endswith("(network 1)")


def test_criterion_r_is_certified_at_one_point_of_a_deep_net():
    X = gaussian(4, 2)
    deep = [gaussian(2, 5, seed=1), gaussian(5, 6, seed=2), gaussian(6, 1, seed=3)]
    certificate = basins.certify_full_rank(deep, X, "tanh")
    assert certificate.holds
    assert certificate.status == "certified"
    H = networks.features(deep, X, "tanh")[-1][0]
    assert certificate.quantities["sigma_N(H) >="] <= float(torch.linalg.svdvals(H)[-1]) * (1 + 1e-9)
    narrow = [gaussian(2, 5, seed=1), gaussian(5, 3, seed=2), gaussian(3, 1, seed=3)]
    assert "width" in basins.certify_full_rank(narrow, X, "tanh").reason
    assert not basins.certify_full_rank([0 * W for W in deep], X, "tanh")


def test_criterion_r_counts_what_the_balls_do_not_know(monkeypatch):
    """Midpoints of full rank prove nothing when the features are known to 1 only."""
    X = gaussian(4, 2)
    far = [1e16 * gaussian(2, 5, seed=1), gaussian(5, 1, seed=3)]
    middle, radius = arbs.enclosed_features(far, X, "sin")
    assert float(torch.linalg.svdvals(middle)[-1]) > 0.05
    assert float(radius.max()) > 0.5
    assert not basins.certify_full_rank(far, X, "sin")
    near = [gaussian(2, 5, seed=1), gaussian(5, 1, seed=3)]
    floor = basins.certify_full_rank(near, X, "sin").quantities["sigma_N(H) >="]
    middle, radius = arbs.enclosed_features(near, X, "sin")
    for known, holds in ((0.999, True), (1.001, False)):
        monkeypatch.setattr(
            arbs, "enclosed_features", lambda *a, t=known: (middle, torch.eye(4, 5).double() * t * floor / 2)
        )
        assert basins.certify_full_rank(near, X, "sin").holds is holds
