"""Roads: they never rise and end where they should."""

import pytest
import torch
from making import gaussian

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


def test_several_outputs_have_a_road():
    X = torch.cat([gaussian(8, 2), torch.ones(8, 1, dtype=F64)], 1)
    road = basins.descent_road([gaussian(3, 9), gaussian(9, 3, seed=1)], X, gaussian(8, 3, seed=2), "tanh")
    assert float(basins.road_losses(road, 5)[-1]) < 1e-20


def test_roads_refuse_too_few_points():
    X = torch.cat([gaussian(3, 1), torch.ones(3, 1, dtype=F64)], 1)
    road = roads.descent_road([gaussian(2, 4), gaussian(4, 1)], X, gaussian(3, 1), "tanh")
    with pytest.raises(ValueError, match="n is 0"):
        roads.road_losses(road, 0)
