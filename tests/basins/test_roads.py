"""Roads: they never rise and end where they should."""

import dataclasses
import math

import pytest
import torch
from making import e1_at, gaussian, seeded

from companion import basins, networks
from companion.basins import roads

F64 = torch.float64


def start(kind, D, m):
    W, V = gaussian(D, m, seed=2), gaussian(m, 1, seed=3)
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
    X = torch.cat([gaussian(20, d), torch.ones(20, 1, dtype=F64)], 1)
    Y = gaussian(20, 1, seed=5)
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
    assert road.lengths[2] <= float(
        torch.linalg.matrix_norm(road.target - networks.forward(weights, X, act)[0])
    ) / road.sigma_q * (1 + 1e-9)
    assert road.certificate(10).holds


def test_a_road_on_repeated_inputs_ends_at_the_least_possible_loss():
    X = torch.cat([gaussian(6, 1), torch.ones(6, 1, dtype=F64)], 1)[[0, 0, 1, 2, 3, 3]]
    Y = gaussian(6, 1, seed=5)
    road = basins.descent_road([gaussian(2, 5), gaussian(5, 1, seed=1)], X, Y, "tanh")
    assert road.q == 4
    least = 0.25 * float((Y[0] - Y[1]) ** 2 + (Y[4] - Y[5]) ** 2)
    assert float(basins.road_losses(road, 5)[-1]) == pytest.approx(least, rel=1e-10)


def test_odd_activations_reach_fewer_dimensions():
    X = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]], dtype=F64)
    road = basins.descent_road([gaussian(1, 3), gaussian(3, 1)], X, torch.ones(4, 1, dtype=F64), "tanh")
    assert road.q == 2
    assert float(basins.road_losses(road, 5)[-1]) == pytest.approx(2)  # targets that are even in x: nothing is reached
    certificate = road.certificate(5)
    assert certificate.holds
    assert [r.name for r in certificate.assumptions if r.status == "assumed"][1:] == [
        "no more than the 2 dimensions found are reachable"
    ]


def test_the_logistic_road_stops_at_the_lowest_point_of_its_last_piece():
    X = torch.cat([gaussian(5, 2), torch.ones(5, 1, dtype=F64)], 1)
    Y = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]], dtype=F64)
    target = 20 * (2 * Y - 1)
    road = basins.descent_road([gaussian(3, 6), 3 * gaussian(6, 1)], X, Y, "tanh", loss="logistic", target=target)
    losses = basins.road_losses(road, 60)
    assert float((losses[1:] - losses[:-1]).max()) <= 1e-12
    assert float(losses[-1]) < 1e-7
    overshoot = torch.where(Y > 0.5, 20.0, 20.0).double()  # aims at the wrong labels for half the points
    road = basins.descent_road([gaussian(3, 6), 0 * gaussian(6, 1)], X, Y, "tanh", loss="logistic", target=overshoot)
    losses = basins.road_losses(road, 200)
    assert float((losses[1:] - losses[:-1]).max()) <= 1e-12


def test_a_road_to_other_outputs_stops_where_it_is_lowest():
    """The square loss, aimed at 3 Y from outputs 0: 0 a third of the way; at -Y: it never starts."""
    X, Y = torch.cat([gaussian(5, 2), torch.ones(5, 1, dtype=F64)], 1), gaussian(5, 1, seed=5)
    weights = [gaussian(3, 6, seed=1), torch.zeros(6, 1, dtype=F64)]
    for target, lowest in ((3 * Y, 0.0), (-Y, 0.5 * float(Y.square().sum()))):
        road = basins.descent_road(weights, X, Y, "tanh", target=target)
        assert float(basins.road_losses(road, 30)[-1]) == pytest.approx(lowest, abs=1e-20)
        assert road.certificate(30).holds


def test_several_outputs_have_a_road():
    X = torch.cat([gaussian(8, 2), torch.ones(8, 1, dtype=F64)], 1)
    road = basins.descent_road([gaussian(3, 9), gaussian(9, 3, seed=1)], X, gaussian(8, 3, seed=2), "tanh")
    assert float(basins.road_losses(road, 5)[-1]) < 1e-20


def test_roads_refuse_too_few_points():
    X = torch.cat([gaussian(3, 1), torch.ones(3, 1, dtype=F64)], 1)
    road = roads.descent_road([gaussian(2, 4), gaussian(4, 1)], X, gaussian(3, 1), "tanh")
    with pytest.raises(ValueError, match="n is 0"):
        roads.road_losses(road, 0)


def test_a_road_leads_out_of_e1_once_it_is_split():
    """Loss 9 on A and B, where one copy falls silent and moves, then (1 - t)^2 9."""
    weights, X, Y = e1_at()
    with pytest.raises(ValueError, match="m is 1, below q = 2"):
        basins.descent_road(weights, X, Y, "sin")
    road = basins.descent_road(basins.split_neuron(weights, 0, (0.5, 0.5)), X, Y, "sin")
    assert basins.road_losses(road, 1).tolist() == pytest.approx([9, 9, 9, 0], abs=1e-12)
    certificate = road.certificate()
    assert certificate.holds
    assert certificate.status == "measured"
    assert certificate.quantities["lengths of A, B, C"][0] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
def test_exponentials_have_roads_that_are_straight(scale):
    """Features of very different size: A must be constant, and the road must end at zero."""
    X = torch.cat([gaussian(6, 2), torch.ones(6, 1, dtype=F64)], 1)
    Y = scale * gaussian(6, 1, seed=5)
    weights = [gaussian(3, 8, seed=1), scale * gaussian(8, 1, seed=2)]
    road = basins.descent_road(weights, X, Y, "exp")
    assert road.q == 6
    assert road.silent == 2
    certificate = road.certificate(20)
    assert certificate.holds
    losses = basins.road_losses(road, 20)
    assert float((losses[:41] - losses[0]).abs().max()) <= 1e-13 * float(losses[0])
    assert float(losses[-1]) <= 1e-20 * float(losses[0])


def test_a_neuron_that_hardly_speaks_is_silent():
    """Its part of the outputs counts, in units of the largest part: features of 1e-20 are nothing, weights of 0 too."""
    X = torch.cat([gaussian(6, 2), torch.ones(6, 1, dtype=F64)], 1)
    W = gaussian(3, 8, seed=1)
    W[:, 3] = torch.tensor([0.0, 0.0, -50.0])
    V = gaussian(8, 1, seed=2)
    V[5] = 0
    road = basins.descent_road([W, V], X, gaussian(6, 1, seed=5), "exp")
    (_, V_A) = road.vertices[1]
    assert float(V_A[3]) == 0
    assert float(V_A[5]) == 0
    assert road.certificate(5).holds


def test_one_step_neuron_has_no_road_past_six_clustered_inputs():
    """Angles 0.3 + k 1e-3: six steps through the origin tell the six inputs apart, q = 6."""
    angle = 0.3 + 1e-3 * torch.arange(6, dtype=F64)
    X = torch.stack([angle.cos(), angle.sin()], 1)
    between = 0.3 + 1e-3 * (torch.arange(6, dtype=F64) - 0.5)
    steps = (X @ torch.stack([-between.sin(), between.cos()]) > 0).double()
    assert int(torch.linalg.matrix_rank(steps)) == 6
    with pytest.raises(ValueError, match="m is 1, below q = 6"):
        basins.descent_road([gaussian(2, 1, seed=3), gaussian(1, 1, seed=4)], X, gaussian(6, 1, seed=5), "step")
    road = basins.descent_road([gaussian(2, 6, seed=3), gaussian(6, 1, seed=4)], X, gaussian(6, 1, seed=5), "step")
    assert road.certificate(5).holds


@pytest.mark.parametrize("act", ["relu", "step", "tanh"])
@pytest.mark.parametrize("N", [50, 100])
def test_inputs_without_a_bias_column_are_all_told_apart(act, N):
    X = torch.cat([gaussian(N, 2), torch.ones(N, 1, dtype=F64)], 1)
    X = X / X.norm(dim=1, keepdim=True)
    road = basins.descent_road([gaussian(3, N, seed=1), gaussian(N, 1, seed=2)], X, gaussian(N, 1, seed=5), act)
    assert road.q == N
    assert road.certificate(5).holds


@pytest.mark.parametrize("size", [1e-6, 1e-13])
@pytest.mark.parametrize("act", ["step", "tanh", "sigmoid"])
def test_tiny_inputs_beside_a_bias_are_told_apart_and_the_end_is_checked(size, act):
    X = torch.cat([size * gaussian(6, 2), torch.ones(6, 1, dtype=F64)], 1)
    road = basins.descent_road([gaussian(3, 8, seed=1), gaussian(8, 1, seed=2)], X, gaussian(6, 1, seed=5), act)
    assert road.q == 6
    losses = basins.road_losses(road, 5)
    certificate = road.certificate(5)
    assert certificate.holds is (float(losses[-1] / losses[0]) <= 1e-9)
    assert certificate.holds or "loss at the end" in certificate.reason


def a_road():
    X = torch.cat([gaussian(5, 2), torch.ones(5, 1, dtype=F64)], 1)
    return basins.descent_road([gaussian(3, 7, seed=1), gaussian(7, 1, seed=2)], X, gaussian(5, 1, seed=5), "tanh")


def test_every_row_of_the_certificate_can_fail():
    """Roads made by hand: one bends, one rises, one stops short; too few neurons; features that are 0."""
    road = a_road()
    assert road.certificate(8).holds
    start, slid, moved, end = road.vertices
    bump = (moved[0], moved[1] + 1e-3)
    back = [start, slid, moved, (end[0], slid[1] + 1.5 * (end[1] - slid[1]))]
    short = [start, slid, moved, (end[0], slid[1] + (1 - 1e-4) * (end[1] - slid[1]))]
    nearly = [start, slid, moved, (end[0], slid[1] + (1 - 1e-5) * (end[1] - slid[1]))]
    for vertices, words in (
        ((start, bump, moved, end), "on A and B"),
        ((start, slid, bump, end), "on A and B"),
        (back, "rise of the loss on C"),
        (short, "loss at the end"),
        (nearly, ""),
    ):
        certificate = dataclasses.replace(road, vertices=tuple(vertices)).certificate(8)
        assert certificate.holds is (words == "")
        assert words in certificate.reason
    assert "width m >= q" in dataclasses.replace(road, q=8).certificate(8).reason
    assert "sigma_q" in dataclasses.replace(road, sigma_q=0.0).certificate(8).reason
    small = dataclasses.replace(road, vertices=(start, (start[0], start[1] * (1 + 1e-10)), *road.vertices[2:]))
    assert "on A and B" in small.certificate(8).reason


def test_the_lengths_are_those_of_the_pieces():
    road = a_road()
    for piece, length in enumerate(road.lengths):
        (W,), (V,) = road.at(piece, torch.tensor([1.0], dtype=F64))
        (W_0,), (V_0,) = road.at(piece, torch.tensor([0.0], dtype=F64))
        assert length == pytest.approx(float(torch.cat([(W - W_0).flatten(), (V - V_0).flatten()]).norm()))
    assert road.sigma_q == pytest.approx(
        float(torch.linalg.svdvals(networks.features(road.vertices[2], road.X, "tanh")[-1][0])[4])
    )


def test_losses_along_a_road_are_those_of_the_networks_on_it():
    road = a_road()
    losses = basins.road_losses(road, 4)
    assert len(losses) == 13
    for k, t in ((1, 0.25), (6, 0.5), (11, 0.75)):
        weights = [T[0] for T in road.at((k - 1) // 4, torch.tensor([t], dtype=F64))]
        f = networks.forward(weights, road.X, "tanh")[0]
        assert float(losses[k]) == pytest.approx(0.5 * float((f - road.Y).square().sum()), rel=1e-10)


def test_features_that_are_nearly_dependent_count():
    """tanh of five scalars: a candidate's new part is a small fraction of it, and no thresholds help."""
    X = torch.tensor([[1.0], [1.5], [2.0], [2.5], [3.0]], dtype=F64)
    weights = [gaussian(1, 1, seed=1).repeat(1, 6), gaussian(6, 1, seed=2)]
    road = basins.descent_road(weights, X, gaussian(5, 1, seed=3), "tanh")
    assert road.q == 5
    assert road.certificate(5).holds


def test_inputs_of_zero_have_no_road():
    weights, X, Y = e1_at()
    with pytest.raises(ValueError, match="only features that are 0"):
        basins.descent_road(weights, 0 * X, Y, "sin")


def test_greedy_columns_are_the_farthest_and_ties_take_the_first():
    A = torch.tensor([[1.0, 0, 3, 0, 0], [0, 2, 0, 2, 0], [0, 0, 0, 0, 1e-3]], dtype=F64)
    chosen, Q = roads._pivots(A, A.new_zeros(3, 0), 1e-9, relative=False)
    assert chosen == [2, 1, 4]
    chosen, _ = roads._pivots(A * (1 + 1e-12 * gaussian(3, 5)), A.new_zeros(3, 0), 1e-9, relative=True)
    assert chosen == [0, 1, 4]
    assert roads._pivots(A, A.new_zeros(3, 0), 0.1, relative=False)[0] == [2, 1]
    torch.testing.assert_close(Q.T @ Q, torch.eye(3, dtype=F64))


def test_the_pool_reaches_every_distinct_input():
    """Steps on the pencils alone: N + 1 sign patterns that differ one by one."""
    for X in (gaussian(30, 3), torch.cat([gaussian(30, 2), torch.full((30, 1), -2.0, dtype=F64)], 1)):
        u, c = gaussian(3, seed=7), torch.tensor([0.0, 0, 1], dtype=F64) if bool((X[:, 2] == -2).all()) else gaussian(3)
        w = roads._thresholds(X, u, c)[0]
        assert w.shape == (3, 29)
        patterns = (X @ w > 0).double()
        assert (patterns[:, 1:] - patterns[:, :-1]).abs().sum(0).tolist() == [1] * 28
        assert int(torch.linalg.matrix_rank(torch.cat([patterns, 1 - patterns[:, :1]], 1))) >= 29
    pool, P = roads._candidates(gaussian(8, 1), networks.activation("exp"), seeded())
    assert bool(torch.isfinite(P).all())
    assert float(P.square().mean(0).sqrt().max()) <= 1e4
    torch.testing.assert_close(P, torch.exp(gaussian(8, 1) @ pool))


@pytest.mark.parametrize("default", [torch.float16, torch.float32, torch.float64])
def test_roads_do_not_depend_on_torchs_default_type(default):
    expected = a_road()
    torch.set_default_dtype(default)
    try:
        road = a_road()
    finally:
        torch.set_default_dtype(torch.float32)
    for (W, V), (W_, V_) in zip(road.vertices, expected.vertices, strict=True):
        assert torch.equal(W, W_)
        assert torch.equal(V, V_)
