"""Lesson 5: the numbers it quotes, the theorems on examples, the oracles of every fast path, bad input."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import basins, data, networks
from companion.basins import certificates as strict_minima
from companion.basins import exact as shallow_exact
from companion.basins import langevin, roads, shallow
from companion.rigor import arbs

F64 = torch.float64
SMOOTH = ["tanh", "softplus", "sigmoid", "sin", "exp", "cos", "gauss"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(S, N, D, m, seed=0, *, bias=False):
    X = normal(N, D, seed=seed)
    X = torch.cat([X, torch.ones(N, 1, dtype=F64)], 1) if bias else X
    return [normal(S, X.shape[1], m, seed=seed + 1), normal(S, m, 1, seed=seed + 2)], X, normal(N, 1, seed=seed + 3)


def e1(w=math.pi / 2, v=1.0):
    weights = [torch.tensor([[[w]]], dtype=F64), torch.tensor([[[v]]], dtype=F64)]
    return weights, torch.tensor([[1.0], [3.0]], dtype=F64), torch.tensor([[-2.0], [-4.0]], dtype=F64)


# --- derivatives ------------------------------------------------------------------------------------------------------


def by_autograd(weights, X, Y, act, loss):
    """Loss, gradient and Hessian of one network in theta = (v, w_1, ..., w_m), the slow way."""
    W, V = weights
    D, m = W.shape
    sigma = networks.activation(act)

    def value(theta):
        f = sigma.value(X @ theta[m:].view(m, D).T) @ theta[:m]
        y = Y[:, 0]
        if loss == "square":
            return 0.5 * ((f - y) ** 2).sum()
        return (torch.nn.functional.softplus(f) - y * f).sum()

    theta = torch.cat([V[:, 0], W.T.reshape(-1)]).clone()
    gradient = torch.autograd.functional.jacobian(value, theta)
    return value(theta), gradient, torch.autograd.functional.hessian(value, theta)


@pytest.mark.parametrize("loss", ["square", "logistic"])
@pytest.mark.parametrize("act", SMOOTH)
def test_the_closed_form_hessian_is_autograds(act, loss):
    (W, V), X, Y = problem(3, 5, 2, 4)
    W, Y = 0.7 * W, Y if loss == "square" else torch.sigmoid(Y)
    d = shallow.loss_derivatives([W, V], X, Y, act, loss=loss)
    for s in range(3):
        value, gradient, hessian = by_autograd([W[s], V[s]], X, Y, act, loss)
        torch.testing.assert_close(d.loss[s], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d.gradient[s], gradient, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d.hessian[s], hessian, rtol=1e-12, atol=1e-12)


def test_gradient_and_curvature_are_the_dual_function():
    (W, V), X, Y = problem(2, 6, 3, 4)
    d = shallow.loss_derivatives([W, V], X, Y, "tanh")
    g, grad, hess = shallow.dual_function(d.e, X, "tanh", W)
    torch.testing.assert_close(d.gradient, torch.cat([g, (V * grad).flatten(1)], 1))
    torch.testing.assert_close(d.curvature[:, 4:7, 4:7], V[:, 0, :, None] * hess[:, 0])
    torch.testing.assert_close(d.gram, d.J.mT @ d.J)


def test_own_data_for_each_network_agree_with_one_at_a_time():
    weights = [normal(3, 2, 4, seed=1), normal(3, 4, 1, seed=2)]
    X, Y = normal(3, 5, 2, seed=3), normal(3, 5, 1, seed=4)
    together = shallow.loss_derivatives(weights, X, Y, "tanh")
    for s in range(3):
        alone = shallow.loss_derivatives([W[s] for W in weights], X[s], Y[s], "tanh")
        torch.testing.assert_close(together.hessian[s], alone.hessian[0])


# --- the examples to check by hand ------------------------------------------------------------------------------------


def test_e1_is_a_strict_minimum_above_a_global_one():
    d = shallow.loss_derivatives(*e1(), "sin")
    assert float(d.loss) == pytest.approx(9, abs=1e-12)
    assert float(d.gradient.abs().max()) < 1e-12
    torch.testing.assert_close(d.hessian[0], torch.diag(torch.tensor([2.0, 24.0], dtype=F64)), atol=1e-12, rtol=0)
    assert float(shallow.loss_derivatives(*e1(math.pi / 6, -4.0), "sin").loss) < 1e-12


def test_e1s_saddles_and_barrier():
    saddle = shallow.loss_derivatives(*e1(math.asin(math.sqrt(7 / 8)), 0.0), "sin")
    assert float(saddle.loss) == pytest.approx(10, abs=1e-12)
    assert float(saddle.gradient.abs().max()) < 1e-12
    values = torch.linalg.eigvalsh(saddle.hessian[0])
    assert float(values[0]) == pytest.approx(-9.36771, abs=1e-5)
    assert float(values.prod()) == pytest.approx(-98, abs=1e-9)


def test_e1_with_soft_labels_and_cross_entropy():
    p = torch.tensor([[5 / 12], [1 / 12]], dtype=F64)
    weights, X, _ = e1(v=math.log(2))
    d = shallow.loss_derivatives(weights, X, p, "sin", loss="logistic")
    torch.testing.assert_close(
        d.hessian[0], torch.diag(torch.tensor([4 / 9, 2 * math.log(2)], dtype=F64)), atol=1e-12, rtol=0
    )
    assert float(d.loss) == pytest.approx(1.273028, abs=1e-6)
    lower, _, _ = e1(math.pi / 6, -2.0)
    assert float(shallow.loss_derivatives(lower, X, p, "sin", loss="logistic").loss) == pytest.approx(
        1.023523, abs=1e-6
    )


def test_e4_is_a_strict_minimum_with_an_indefinite_dual_hessian():
    weights, X, Y = basins.example_e4().tensors()
    d = shallow.loss_derivatives(weights, X, Y, "exp")
    assert float(d.loss) == pytest.approx(2673 / 512, abs=1e-12)
    expected = torch.tensor([0.5, 3.16281, 11.49344], dtype=F64)
    torch.testing.assert_close(torch.linalg.eigvalsh(d.hessian[0]), expected, atol=1e-5, rtol=0)
    _, _, hess = shallow.dual_function(d.e, X, "exp", weights[0])
    torch.testing.assert_close(hess[0, 0], torch.diag(torch.tensor([4.5, -1.5], dtype=F64)), atol=1e-10, rtol=0)
    certificate = basins.example_e4().certificate()
    assert certificate.status == "exact"
    assert certificate.quantities["L"] == Fraction(2673, 512)
    assert certificate.quantities["L of the competitor"] == pytest.approx(4.269249, abs=1e-6)


def test_e1s_certificate_is_exact():
    certificate = basins.example_e1().certificate()
    assert certificate.holds
    assert certificate.status == "exact"
    assert certificate.quantities["L"] == 9


@pytest.mark.parametrize("loss_floor", [2, 50])
def test_the_valley_of_the_deep_net_stands_at_every_last_width(loss_floor):
    """Two bias-free ReLU layers, first width 1: the sign of w decides which sample is seen at all."""
    m, X, Y = loss_floor, torch.tensor([[1.0], [-1.0]], dtype=F64), torch.tensor([[1.0], [2.0]], dtype=F64)

    def least(w):
        W2 = normal(1, m, seed=3).abs()
        H = networks.features([torch.tensor([[w]], dtype=F64), W2, torch.ones(m, 1, dtype=F64)], X)[-1][0]
        return 0.5 * float(((H @ torch.linalg.pinv(H) @ Y - Y) ** 2).sum())

    assert least(1.0) == pytest.approx(2, abs=1e-12)
    assert least(-1.0) == pytest.approx(0.5, abs=1e-12)
    assert least(0.0) == pytest.approx(2.5, abs=1e-12)


# --- theorem P' -------------------------------------------------------------------------------------------------------


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
    certificate = basins.no_basin(N, m, act, loss)
    assert certificate.holds is holds
    assert words in certificate.theorem


def test_no_basin_below_full_column_rank_and_with_repeated_inputs():
    X = normal(6, 3, seed=1)
    assert not basins.no_basin(6, 2, "tanh", X=X)
    X[:, 2] = X[:, 0] + X[:, 1]  # rounded: the stored floats need not have rank 2
    X[:, 2] = 2 * X[:, 0]
    assert basins.no_basin(6, 2, "tanh", X=X).quantities["rank X"] == 2
    X = normal(6, 3, seed=1)[[0, 0, 1, 1, 2, 3]]
    certificate = basins.no_basin(6, 4, "tanh", X=X)
    assert certificate.holds
    assert certificate.quantities["distinct inputs"] == 4


def test_the_digits_have_no_basin_at_any_width_because_pixels_are_empty():
    X = data.digits(n=None, centre=False, normalize=False).X
    empty = (X == 0).all(0).nonzero()[:, 0].tolist()
    assert empty == [0, 32, 39]
    certificate = basins.no_basin(len(X), 1, "tanh", X=X)
    assert certificate.holds
    assert certificate.quantities["rank X"] == 61


def test_a_relu_ray_keeps_the_loss():
    (W, V), X, _ = problem(1, 6, 3, 2)
    f = networks.forward([W, V], X, "relu")
    for scale in (2.0, 1e3):
        torch.testing.assert_close(networks.forward([scale * W, V / scale], X, "relu"), f)


# --- bad minima below the width ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "a", "base"),
    [
        ("exp", (0, -1), 2),
        ("tanh", (1,), 2),
        ("sigmoid", (1, -2), 3),
        ("sin", (1, 2), (Fraction(3, 5), Fraction(4, 5))),
    ],
)
def test_exact_bad_minima_agree_with_floating_point(act, a, base):
    found = basins.exact_bad_minimum(act, a, range(1, 2 * len(a) + 2), base)
    certificate = found.certificate()
    assert certificate.holds
    weights, X, Y = found.tensors()
    d = shallow.loss_derivatives(weights, X, Y, act)
    exact = found.point.derivatives(found.X, found.y)
    torch.testing.assert_close(d.hessian[0], torch.tensor([[float(t) for t in r] for r in exact.hessian]).double())
    assert float(d.gradient.abs().max()) < 1e-12
    assert float(torch.linalg.eigvalsh(d.hessian)[0, 0]) > 0
    lower = shallow.loss_derivatives(found.competitor.weights(), X, Y, act).loss
    assert float(lower) < float(d.loss)


@given(st.integers(-6, 6), st.integers(2, 5))
@settings(max_examples=30)
def test_exact_jets_are_the_activations(k, b):
    angle = (Fraction(3, 5), Fraction(4, 5))
    for act in shallow_exact.EXACT_ACTIVATIONS:
        base, u = (angle, math.atan2(4, 3)) if act == "sin" else (Fraction(b, 3), math.log(b / 3))
        if base == 1:
            continue
        z, sigma = torch.tensor(k * u, dtype=F64), networks.activation(act)
        jet = shallow_exact.exact_jet(act, base, k)
        for exact, close in zip(jet, (sigma.value(z), sigma.derivative(z), sigma.second(z)), strict=True):
            assert float(exact) == pytest.approx(float(close), rel=1e-9, abs=1e-12)


def test_ldl_pivots():
    A = [[Fraction(2), Fraction(1)], [Fraction(1), Fraction(1)]]
    assert shallow_exact.ldl_pivots(A) == [2, Fraction(1, 2)]
    assert shallow_exact.ldl_pivots([[Fraction(1), Fraction(2)], [Fraction(2), Fraction(1)]]) == [1, -3]


def test_exponentials_touch_only_below_half_the_width():
    X = torch.linspace(0.2, 2, 6, dtype=F64)[:, None]
    reached = [
        float(basins.touching_points(X, m, "exp", 300, torch.Generator().manual_seed(1)).definite.double().mean())
        for m in range(1, 6)
    ]
    assert reached[0] > 0.5  # 2 m <= N - 1 = 5
    assert reached[1] > 0.05
    assert reached[2:] == [0, 0, 0]


def test_sines_touch_beyond_half_the_width():
    X = torch.linspace(0.2, 2, 6, dtype=F64)[:, None] + 0.05 * normal(6, 1)
    t = basins.touching_points(X, 4, "sin", 400, torch.Generator().manual_seed(1), spread=20.0)
    assert int(t.definite.sum()) > 5


@pytest.mark.parametrize(("act", "m"), [("sin", 3), ("exp", 2), ("tanh", 2)])
def test_planted_minima_are_strict_and_bad(act, m):
    X = torch.linspace(0.3, 2, 6, dtype=F64)[:, None] + 0.05 * normal(6, 1)
    t = basins.touching_points(X, m, act, 200, torch.Generator().manual_seed(2), spread=20.0 if act == "sin" else 3.0)
    assert bool(t.definite.any())
    s = int(t.definite.nonzero()[0])
    planted = basins.plant_bad_minimum(t.W[s], t.e[s], X, act, 0.5)
    d = shallow.loss_derivatives(planted.weights, X, planted.Y, act)
    assert float(d.loss) == pytest.approx(planted.loss, rel=1e-9)
    assert float(d.gradient.abs().max()) < 1e-8
    assert float(torch.linalg.eigvalsh(d.hessian)[0, 0]) > 0
    lower = shallow.loss_derivatives(planted.competitor, X, planted.Y, act).loss
    assert float(lower) == pytest.approx(planted.competitor_loss, rel=1e-9)
    assert float(lower) < float(d.loss)
    certificate = basins.certify_strict_minimum(
        planted.weights, X, planted.Y, act, "interval", competitor=planted.competitor
    )
    assert certificate.holds, certificate
    assert certificate.status == "certified"


def test_planting_refuses_what_the_theorem_does_not_cover(unchecked):
    X = torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64)
    W = torch.tensor([[0.5]], dtype=F64)
    with pytest.raises(ValueError, match="orthogonal to every feature"):
        basins.plant_bad_minimum(W, torch.tensor([1.0, 1.0, 0.0], dtype=F64), X, "tanh")  # odd: g = 0 identically
    with pytest.raises(ValueError, match="both must vanish"):
        basins.plant_bad_minimum(W, torch.tensor([1.0, 0.0, 0.0], dtype=F64), X, "tanh")
    with pytest.raises(ValueError, match="not all zero"):
        basins.plant_bad_minimum(W, torch.zeros(3, dtype=F64), X, "tanh")
    with pytest.raises(ValueError, match="tau is -1"):
        basins.plant_bad_minimum(W, torch.ones(3, dtype=F64), X, "tanh", -1.0)
    weights, X4, Y4 = basins.example_e4().tensors()
    e = shallow.loss_derivatives(weights, X4, Y4, "exp").e[0]
    with pytest.raises(ValueError, match="definite ones are needed"):
        basins.plant_bad_minimum(weights[0], e, X4, "exp")


# --- certificates of strict minima ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["interval", "kantorovich"])
def test_e1_is_certified_in_floats_too(method):
    weights, X, Y = basins.example_e1().tensors()
    certificate = basins.certify_strict_minimum(weights, X, Y, "sin", method)
    assert certificate.holds, certificate
    assert certificate.status == {"interval": "certified", "kantorovich": "measured"}[method]


@pytest.mark.parametrize("method", ["interval", "kantorovich"])
def test_what_is_no_strict_minimum_is_not_certified(method):
    weights, X, Y = basins.example_e1().tensors()
    plateau = basins.split_neuron(weights, 0, (0.3, 0.7))  # a bad local minimum, not strict
    assert not basins.certify_strict_minimum(plateau, X, Y, "sin", method, competitor=e1(math.pi / 6, -4.0)[0])
    best = e1(math.pi / 6, -4.0)[0]  # strict, but nothing is lower
    assert not basins.certify_strict_minimum(best, X, Y, "sin", method, competitor=weights)
    off = [weights[0] + 0.3, weights[1]]
    assert not basins.certify_strict_minimum(off, X, Y, "sin", method, competitor=best)


def test_kantorovich_in_a_batch_gives_one_certificate_each():
    weights, X, Y = basins.example_e1().tensors()
    two = [torch.stack([weights[0], weights[0] + 0.3]), torch.stack([weights[1]] * 2)]
    certificate = basins.certify_strict_minimum(two, X, Y, "sin", "kantorovich", competitor=e1(math.pi / 6, -4.0)[0])
    assert [c.holds for c in certificate.members] == [True, False]
    assert certificate.reason.startswith("network 1")


@pytest.mark.parametrize("act", ["sin", "tanh", "sigmoid", "gauss", "cos", "exp"])
def test_the_bound_on_the_third_derivative_holds(act):
    """||L''(theta + u) - L''(theta)|| <= M ||u|| inside the ball, for 200 points theta and directions u."""
    (W, V), X, Y = problem(200, 4, 2, 3)
    k = strict_minima.kantorovich([W, V], X, Y, act)
    radius = k.radius.clamp(max=0.1)
    u = torch.nn.functional.normalize(normal(200, 9, seed=9), dim=1) * (0.99 * radius)[:, None]
    moved = [W + u[:, 3:].view(200, 3, 2).mT, V + u[:, :3, None]]
    change = shallow.loss_derivatives(moved, X, Y, act).hessian - shallow.loss_derivatives([W, V], X, Y, act).hessian
    ratio = torch.linalg.matrix_norm(change, 2) / (torch.linalg.vector_norm(u, dim=1) * k.M)
    inside = k.radius <= 0.1
    assert float(ratio[inside].max() if bool(inside.any()) else 0.0) <= 1
    assert float(ratio.median()) <= 1


def test_the_balls_enclose_the_floats():
    (W, V), X, Y = problem(1, 4, 2, 3)
    for act in arbs.BALL_ACTIVATIONS:
        d = shallow.loss_derivatives([W, V], X, Y, act)
        balls = shallow_exact.ball_derivatives(W[0].T.tolist(), V[0, :, 0].tolist(), X, Y[:, 0], act)
        for ball, number in zip(balls.gradient, d.gradient[0].tolist(), strict=True):
            assert abs(float(ball.mid()) - number) < 1e-10 * (1 + abs(number))


# --- roads ------------------------------------------------------------------------------------------------------------


def start(kind, D, m):
    W, V = normal(D, m, seed=2), normal(m, 1, seed=3)
    if kind == "dead":
        W = torch.zeros_like(W)
        W[-1] = -5.0
    if kind == "collapsed":
        W = W[:, :1].repeat(1, m)
    return [W, V]


@pytest.mark.parametrize("kind", ["random", "dead", "collapsed"])
@pytest.mark.parametrize("act", ["tanh", "relu", "step"])
@pytest.mark.parametrize("d", [2, 4])
@pytest.mark.parametrize("m", [20, 25])
def test_roads_never_rise_and_end_at_zero(act, d, m, kind):
    X = torch.cat([normal(20, d), torch.ones(20, 1, dtype=F64)], 1)
    Y = normal(20, 1, seed=5)
    weights = start(kind, d + 1, m)
    road = basins.descent_road(weights, X, Y, act)
    losses = basins.road_losses(road, 40)
    first = float(losses[0])
    assert first == pytest.approx(0.5 * float(((networks.forward(weights, X, act)[0] - Y) ** 2).sum()), rel=1e-12)
    assert float((losses[1:] - losses[:-1]).max()) <= 1e-12 * first
    assert float(losses[-1]) <= 1e-12 * first
    assert float((losses[:81] - first).abs().max()) <= 1e-12 * first  # A and B
    t = torch.linspace(0, 1, 41, dtype=F64)
    assert float((losses[80:] - (1 - t) ** 2 * losses[80]).abs().max()) <= 1e-10 * first
    assert road.length <= road.bound * (1 + 1e-9)
    assert road.certificate(10).holds


def test_a_road_on_repeated_inputs_ends_at_the_least_possible_loss():
    X = torch.cat([normal(6, 1), torch.ones(6, 1, dtype=F64)], 1)[[0, 0, 1, 2, 3, 3]]
    Y = normal(6, 1, seed=5)
    road = basins.descent_road([normal(2, 5), normal(5, 1, seed=1)], X, Y, "tanh")
    assert road.q == 4
    least = 0.25 * float((Y[0] - Y[1]) ** 2 + (Y[4] - Y[5]) ** 2)
    assert float(basins.road_losses(road, 5)[-1]) == pytest.approx(least, rel=1e-10)


def test_odd_activations_reach_fewer_dimensions():
    X = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]], dtype=F64)
    road = basins.descent_road([normal(1, 3), normal(3, 1)], X, torch.ones(4, 1, dtype=F64), "tanh")
    assert road.q == 2


def test_the_logistic_road_stops_at_the_lowest_point_of_its_last_piece():
    X = torch.cat([normal(5, 2), torch.ones(5, 1, dtype=F64)], 1)
    Y = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]], dtype=F64)
    target = 20 * (2 * Y - 1)
    road = basins.descent_road([normal(3, 6), 3 * normal(6, 1)], X, Y, "tanh", loss="logistic", target=target)
    losses = basins.road_losses(road, 60)
    assert float((losses[1:] - losses[:-1]).max()) <= 1e-12
    assert float(losses[-1]) < 1e-7
    overshoot = torch.where(Y > 0.5, 20.0, 20.0).double()  # aims at the wrong labels for half the points
    road = basins.descent_road([normal(3, 6), 0 * normal(6, 1)], X, Y, "tanh", loss="logistic", target=overshoot)
    losses = basins.road_losses(road, 200)
    assert float((losses[1:] - losses[:-1]).max()) <= 1e-12


def test_several_outputs_have_a_road():
    X = torch.cat([normal(8, 2), torch.ones(8, 1, dtype=F64)], 1)
    road = basins.descent_road([normal(3, 9), normal(9, 3, seed=1)], X, normal(8, 3, seed=2), "tanh")
    assert float(basins.road_losses(road, 5)[-1]) < 1e-20


def test_criterion_r_is_certified_at_one_point_of_a_deep_net():
    X = normal(4, 2)
    deep = [normal(2, 5, seed=1), normal(5, 6, seed=2), normal(6, 1, seed=3)]
    certificate = basins.full_rank_certificate(deep, X, "tanh")
    assert certificate.holds
    assert certificate.status == "certified"
    H = networks.features(deep, X, "tanh")[-1][0]
    assert certificate.quantities["sigma_N(H) >="] <= float(torch.linalg.svdvals(H)[-1]) * (1 + 1e-9)
    narrow = [normal(2, 5, seed=1), normal(5, 3, seed=2), normal(3, 1, seed=3)]
    assert "width" in basins.full_rank_certificate(narrow, X, "tanh").reason
    assert not basins.full_rank_certificate([0 * W for W in deep], X, "tanh")


# --- wider by one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5, 1.4, -0.2])
def test_the_eigenvalues_of_a_split(share):
    weights, X, Y = basins.example_e1().tensors()
    split = basins.split_neuron(weights, 0, (share, 1 - share))
    d = shallow.loss_derivatives(split, X, Y, "sin")
    assert float(d.gradient.abs().max()) < 1e-12
    expected = torch.tensor(sorted([0, 4, 24 * share, 24 * (1 - share)]), dtype=F64)
    torch.testing.assert_close(torch.linalg.eigvalsh(d.hessian[0]), expected, atol=1e-9, rtol=0)


def test_splitting_and_adding_keep_the_function():
    (W, V), X, _ = problem(2, 6, 3, 4)
    f = networks.forward([W, V], X, "tanh")
    torch.testing.assert_close(networks.forward(basins.split_neuron([W, V], 2, (0.2, 0.5, 0.3)), X, "tanh"), f)
    wider = basins.add_silent_neuron([W, V], torch.ones(3, dtype=F64))
    assert wider[0].shape == (2, 3, 5)
    torch.testing.assert_close(networks.forward(wider, X, "tanh"), f)


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "m"), [(6, 5), (8, 2)])
def test_every_end_point_of_the_trainer_is_what_it_says(N, m):
    (W, V), X, Y = problem(40, N, 2, m, bias=True)
    kept = [W.clone(), V.clone()]
    trained = basins.train_lm_newton([W, V], X, Y, "tanh", iters=150)
    torch.testing.assert_close([W, V], kept, rtol=0, atol=0)
    d = shallow.loss_derivatives(trained.weights, X, Y, "tanh")
    torch.testing.assert_close(trained.loss, d.loss, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(trained.gradient, torch.linalg.vector_norm(d.gradient, dim=1), rtol=1e-2, atol=1e-12)
    assert bool((trained.loss <= shallow.loss_derivatives(kept, X, Y, "tanh").loss * (1 + 1e-12)).all())
    if m == 5:
        assert bool(trained.converged.all())
        assert float(trained.loss.max()) < 1e-18


def test_the_two_linear_systems_give_the_same_step():
    (W, V), X, Y = problem(5, 4, 2, 3)
    at = shallow._Problem(X, Y[:, 0].expand(5, 4), networks.activation("tanh"), True)
    point = at.at(W.mT.contiguous(), V[..., 0])
    mu = torch.full((5,), 0.1, dtype=F64)
    for a, b in zip(
        shallow._dual_direction(at, point, mu), shallow._primal_direction(at, point, mu, False), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    d = shallow.loss_derivatives([W, V], X, Y, "tanh")
    torch.testing.assert_close(shallow._curvature(at, point), d.curvature)


@pytest.mark.parametrize("act", ["tanh", "sin", "relu", "exp"])
def test_flat_descent_takes_the_same_steps_as_the_closed_form_gradients(act):
    weights, X, _ = problem(7, 5, 2, 4)
    weights, Y = [0.5 * W for W in weights], normal(7, 5, 1, seed=8)
    slow = [W.clone() for W in weights]
    for _ in range(6):
        _, grads = networks.gradients(slow, X.expand(7, 5, 2), Y, act)
        slow = [W - 0.01 * g for W, g in zip(slow, grads, strict=True)]
    kept = [W.clone() for W in weights]
    torch.testing.assert_close(shallow.descend(weights, X, Y, act, 0.01, 6, chunk=3), slow, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights, kept, rtol=0, atol=0)


def test_shared_and_own_data_train_alike():
    (W, V), X, Y = problem(6, 5, 1, 3, bias=True)
    shared = basins.train_lm_newton([W, V], X, Y, "sin", iters=60)
    own = basins.train_lm_newton([W, V], X.expand(6, 5, 2), Y.expand(6, 5, 1), "sin", iters=60)
    both = shared.converged & own.converged
    assert int(both.sum()) >= 3
    torch.testing.assert_close(shared.loss[both], own.loss[both], rtol=1e-5, atol=1e-14)


@pytest.fixture(scope="module")
def sweep():
    """Sine nets, N = 8, 20 data sets, 25 starts each, at width 1 and 5."""
    out = {}
    for m in (1, 5):
        g = torch.Generator().manual_seed(7)
        u = torch.rand(20, 8, generator=g, dtype=F64)
        x = math.pi / 8 * (torch.arange(8, dtype=F64) + 0.5 + 0.6 * (u - 0.5))
        y = torch.randn(20, 8, generator=g, dtype=F64)
        X, Y = (t.repeat_interleave(25, 0)[..., None] for t in (x, y))
        W = 5.6 * torch.randn(500, 1, m, generator=g, dtype=F64)
        V = torch.randn(500, m, 1, generator=g, dtype=F64) / m**0.5
        trained = basins.train_lm_newton([W, V], X, Y, "sin")
        out[m] = trained, basins.classify_endpoints(trained, X, Y, "sin", starts=25)
    return out


def test_bad_minima_are_common_at_width_one_and_gone_at_width_five(sweep):
    assert sweep[1][1].fraction("strict, bad") == pytest.approx(0.75, abs=0.15)
    assert sweep[5][1].fraction("strict, bad") <= 0.01


def test_classes_are_disjoint_and_strict_ones_are_shown(sweep):
    trained, ends = sweep[1]
    assert sum(ends.fraction(c) for c in basins.CLASSES) == pytest.approx(1)
    strict = (ends.label == 1) | (ends.label == 2)
    assert float(ends.shown[strict].double().mean()) > 0.95
    assert bool((trained.loss[ends.label == 1] > ends.best[ends.label == 1]).all())


def test_a_point_at_rest_on_a_plateau_and_a_saddle_are_told_apart():
    weights, X, Y = basins.example_e1().tensors()
    nets = [
        basins.split_neuron(weights, 0, (0.5, 0.5)),
        basins.split_neuron(weights, 0, (1.5, -0.5)),
        basins.add_silent_neuron(e1(math.pi / 6, -4.0)[0], torch.tensor([0.1], dtype=F64)),
    ]
    nets = [[t.reshape(t.shape[-2:]) for t in net] for net in nets]
    stack = [torch.stack([net[i] for net in nets]) for i in (0, 1)]
    d = shallow.loss_derivatives(stack, X, Y, "sin")
    rest = torch.linalg.vector_norm(d.gradient, dim=1)
    trained = shallow.Trained(stack, d.loss, rest, torch.zeros(3).long(), rest < 1e-8, torch.full((3,), 9.0).double())
    ends = basins.classify_endpoints(trained, X, Y, "sin", starts=3)
    assert [basins.CLASSES[i] for i in ends.label] == ["degenerate", "saddle", "zero loss"]


# --- noisy descent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "tau"), [(0.4, 8.728), (0.25, 32.67), (0.2, 82.51), (0.15, 408.6)])
def test_the_pde_gives_the_known_exit_times(T, tau):
    assert basins.exit_time_pde(T) == pytest.approx(tau, rel=0.005)


def test_the_pde_solver_solves_its_equations():
    """One cell's balance on a coarse grid, and a strip against the closed form in one dimension."""
    loss = lambda x, y: 0.5 * x**2 + y**2 + 0.3 * x * y  # noqa: E731
    coarse = langevin.mean_exit_time(loss, 0.7, (0.5, 2.0, -1.0, 1.5), 0.4, per_unit=6)
    free = loss(coarse.x[None], coarse.y[:, None]) > 0.4
    h = float(coarse.x[1] - coarse.x[0])
    u, n_x = coarse.u, len(coarse.x)
    j, i = (int(t) for t in free.nonzero()[len(free.nonzero()) // 2])
    flow = 0.0
    for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        if 0 <= j + a < len(coarse.y) and 0 <= i + b < n_x:
            middle = loss(coarse.x[i] + b * h / 2, coarse.y[j] + a * float(coarse.y[1] - coarse.y[0]) / 2)
            step = h if b else float(coarse.y[1] - coarse.y[0])
            rate = 0.7 / step**2 * math.exp((float(loss(coarse.x[i], coarse.y[j])) - float(middle)) / 0.7)
            flow += rate * float(u[j + a, i + b] - u[j, i])
    assert flow == pytest.approx(-1, abs=1e-9)
    # no force, target x <= 0 at the left end, wall at x = 1: u = (x - x^2 / 2) / T
    strip = langevin.mean_exit_time(lambda x, y: torch.where(x > 0, 1.0, 0.0).double(), 1e3, (-0.1, 1.0, 0.0, 0.1), 0.5,
                                    per_unit=100)  # fmt: skip
    assert strip.at(1.0, 0.05) == pytest.approx(0.5 / 1e3, rel=0.03)


def test_eyring_kramers_for_e1():
    at_min = shallow.loss_derivatives(*e1(), "sin").hessian[0]
    saddle = shallow.loss_derivatives(*e1(math.asin(math.sqrt(7 / 8)), 0.0), "sin").hessian[0]
    tau = basins.eyring_kramers(at_min, saddle, 1.0, 0.2, 2)
    assert tau / math.exp(5) == pytest.approx(0.479191, abs=1e-5)
    assert basins.exit_time_pde(0.15) / basins.eyring_kramers(at_min, saddle, 1.0, 0.15, 2) == pytest.approx(
        1.085, abs=0.01
    )


def test_walkers_agree_with_the_pde_at_width_one():
    (W, V), X, Y = e1()
    start = [W.expand(400, 1, 1), V.expand(400, 1, 1)]
    times = basins.langevin_exit_times(start, X, Y, "sin", 0.4, level=4.5, generator=torch.Generator().manual_seed(0))
    assert float(times.mean()) == pytest.approx(basins.exit_time_pde(0.4), rel=0.15)


def test_walkers_leave_fast_at_width_two():
    g = torch.Generator().manual_seed(1)
    shares = torch.distributions.Dirichlet(torch.ones(2, dtype=F64))
    torch.manual_seed(0)
    v = shares.sample((400,))[..., None]
    W = torch.full((400, 1, 2), math.pi / 2, dtype=F64)
    _, X, Y = e1()
    times = basins.langevin_exit_times([W, v], X, Y, "sin", 0.2, level=4.5, generator=g)
    assert float(times.mean()) == pytest.approx(1.29, abs=0.2)


def test_a_walker_that_stays_has_no_exit_time_and_noise_does_not_depend_on_the_others():
    (W, V), X, Y = e1()
    two = [W.expand(2, 1, 1), V.expand(2, 1, 1)]
    T = torch.tensor([1e-6, 2.0], dtype=F64)
    times = basins.langevin_exit_times(two, X, Y, "sin", T, level=4.5, generator=torch.Generator().manual_seed(0),
                                       longest=30.0)  # fmt: skip
    assert math.isinf(float(times[0]))
    swapped = basins.langevin_exit_times(two, X, Y, "sin", torch.tensor([2.0, 2.0]).double(), level=4.5,
                                         generator=torch.Generator().manual_seed(0), longest=30.0)  # fmt: skip
    assert float(swapped[1]) == float(times[1])


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = problem(1, 4, 2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda w, X, Y: (w, X.float(), Y), TypeError, "float64 tensor is needed"),
        (lambda w, X, Y: (w, X, Y.long()), TypeError, "float64 tensor is needed"),
        (lambda w, X, Y: (w, X.numpy(), Y), TypeError, "float64 tensor is needed"),
        (lambda w, X, Y: (w, X * math.nan, Y), ValueError, "NaN or infinity"),
        (lambda w, X, Y: ([w[0] * math.inf, w[1]], X, Y), ValueError, "NaN or infinity"),
        (lambda w, X, Y: (w, X, Y[:, 0]), ValueError, "Y has shape"),
        (lambda w, X, Y: (w, X, Y[:2]), ValueError, "one target for each input"),
        (lambda w, X, Y: ([*w, w[1].mT], X, Y.expand(4, 3)), ValueError, "one hidden layer"),
        (lambda w, X, Y: (w, X.expand(2, 4, 2), Y), ValueError, "2 data sets for 1 networks"),
        (lambda w, X, Y: ([w[0], w[1].expand(1, 3, 2)], X, Y.expand(4, 2)), ValueError, "1 output is needed"),
    ],
)
def test_bad_data_are_refused(unchecked, change, error, words):
    weights, X, Y = change(*GOOD)
    with pytest.raises(error, match=words):
        basins.loss_derivatives(weights, X, Y, "tanh")


@pytest.mark.parametrize("act", ["relu", "step"])
@pytest.mark.parametrize("method", ["interval", "kantorovich"])
def test_kinks_and_jumps_have_no_hessian_certificate(act, method):
    weights, X, Y = GOOD
    with pytest.raises(ValueError, match="no second derivative"):
        basins.certify_strict_minimum(weights, X, Y, act, method)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w, X, Y: basins.loss_derivatives(w, X, Y, "tanh", loss="hinge"), ValueError, "loss is 'hinge'"),
        (lambda w, X, Y: basins.train_lm_newton(w, X, Y, "tanh", iters=0), ValueError, "iters"),
        (lambda w, X, Y: shallow.descend(w, X, Y, "tanh", -0.1, 5), ValueError, "a positive step"),
        (lambda w, X, Y: basins.no_basin(0, 1, "tanh"), ValueError, "at least one sample"),
        (lambda w, X, Y: basins.no_basin(4, 1, "tanh", "hinge"), ValueError, "loss is 'hinge'"),
        (lambda w, X, Y: basins.no_basin(5, 1, "tanh", X=X), ValueError, "one row a sample"),
        (lambda w, X, Y: basins.no_basin(4, 1, "tanh", X=X.float()), TypeError, "float64 tensor"),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh"), ValueError, "m is 3, below q = 4"),
        (
            lambda w, X, Y: basins.descent_road([t.expand(2, *t.shape[1:]) for t in w], X, Y, "tanh"),
            ValueError,
            "one net",
        ),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh", loss="hinge"), ValueError, "loss is 'hinge'"),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh", loss="logistic"), ValueError, "target is missing"),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh", target=Y[:2]), ValueError, "target has shape"),
        (lambda w, X, Y: basins.certify_strict_minimum(w, X, Y, "tanh", "guess"), ValueError, "method is 'guess'"),
        (lambda w, X, Y: basins.certify_strict_minimum(w, X, Y, "tanh", "exact"), TypeError, "ExactPoint is needed"),
        (lambda w, X, Y: basins.kantorovich(w, X, Y, "softplus"), ValueError, "needed for bounds"),
        (lambda w, X, Y: basins.split_neuron(w, 3, (1.0,)), ValueError, "j is 3"),
        (lambda w, X, Y: basins.split_neuron(w, 0, (0.5, 0.4)), ValueError, "sum 1"),
        (lambda w, X, Y: basins.add_silent_neuron(w, Y[:, 0]), ValueError, "w has 4 entries"),
        (lambda w, X, Y: basins.touching_points(X, 0, "tanh", 1, torch.Generator()), ValueError, "at least 1"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1.5, 2, 3), 2), ValueError, "integer inputs"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1, 2, 10**6), 2), ValueError, "beyond 10000"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1, 2), 2), ValueError, "2 m \\+ 1 = 3"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1, 1), (1, 2, 3), 2), ValueError, "different integers"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (0, 1, 2), 2), ValueError, "vanishes"),
        (lambda w, X, Y: basins.exact_bad_minimum("relu", (1,), (1, 2, 3), 2), ValueError, "has exact values"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1, 2, 3), -2), ValueError, "positive rational"),
        (lambda w, X, Y: basins.exact_bad_minimum("sin", (1,), (1, 2, 3), 2), ValueError, "on the circle"),
        (lambda w, X, Y: basins.full_rank_certificate(w, X, "relu"), ValueError, "analytic activation"),
        (lambda w, X, Y: basins.full_rank_certificate(w, X.float(), "tanh"), TypeError, "float64"),
        (lambda w, X, Y: basins.exit_time_pde(0.0), ValueError, "T > 0"),
        (lambda w, X, Y: langevin.mean_exit_time(lambda x, y: x + y, 1.0, (0, 1, 0, 1), -9.0), ValueError, "raise it"),
        (lambda w, X, Y: basins.eyring_kramers(-torch.eye(2), torch.eye(2), 1.0, 1.0), ValueError, "one negative"),
        (
            lambda w, X, Y: basins.eyring_kramers(torch.eye(2), torch.diag(torch.tensor([-1.0, 1.0])), 1.0, 0.0),
            ValueError,
            "T is 0",
        ),
        (
            lambda w, X, Y: basins.langevin_exit_times(w, X, Y, "tanh", -1.0, level=0.1, generator=torch.Generator()),
            ValueError,
            "positive temperature",
        ),
        (
            lambda w, X, Y: basins.langevin_exit_times(
                w, X, Y, "tanh", 1.0, level=0.1, generator=torch.Generator(), step=0.0
            ),
            ValueError,
            "positive times",
        ),
    ],
)
def test_bad_arguments_get_one_clear_sentence(unchecked, call, error, words):
    with pytest.raises(error, match=words):
        call(*GOOD)


def test_classify_needs_equal_groups():
    weights, X, Y = problem(3, 4, 2, 3)
    trained = basins.train_lm_newton(weights, X, Y, "tanh", iters=5)
    with pytest.raises(ValueError, match="divisor of the number 3"):
        basins.classify_endpoints(trained, X, Y, "tanh", starts=2)


def test_roads_refuse_too_few_points():
    X = torch.cat([normal(3, 1), torch.ones(3, 1, dtype=F64)], 1)
    road = roads.descent_road([normal(2, 4), normal(4, 1)], X, normal(3, 1), "tanh")
    with pytest.raises(ValueError, match="n is 0"):
        roads.road_losses(road, 0)


def test_shared_inputs_with_own_targets_are_accepted_everywhere():
    weights, X, _ = problem(4, 5, 2, 3)
    Y = normal(4, 5, 1, seed=8)
    trained = basins.train_lm_newton(weights, X, Y, "tanh", iters=5)
    ends = basins.classify_endpoints(trained, X, Y, "tanh", starts=2)
    alone = basins.loss_derivatives([W[3] for W in trained.weights], X, Y[3], "tanh")
    torch.testing.assert_close(basins.loss_derivatives(trained.weights, X, Y, "tanh").hessian[3], alone.hessian[0])
    assert ends.label.shape == (4,)
