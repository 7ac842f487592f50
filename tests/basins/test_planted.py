"""Touching points and the minima planted on them."""

import pytest
import torch
from making import gaussian, shallow_problem

from companion import basins, networks
from companion.basins import shallow

F64 = torch.float64


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
    X = torch.linspace(0.2, 2, 6, dtype=F64)[:, None] + 0.05 * gaussian(6, 1)
    t = basins.touching_points(X, 4, "sin", 400, torch.Generator().manual_seed(1), spread=20.0)
    assert int(t.definite.sum()) > 5


@pytest.mark.parametrize(("act", "m"), [("sin", 3), ("exp", 2), ("tanh", 2)])
def test_planted_minima_are_strict_and_bad(act, m):
    X = torch.linspace(0.3, 2, 6, dtype=F64)[:, None] + 0.05 * gaussian(6, 1)
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
        planted.weights, X, planted.Y, act, "certified", competitor=planted.competitor
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
    with pytest.raises(ValueError, match="e is zero"):
        basins.plant_bad_minimum(W, torch.zeros(3, dtype=F64), X, "tanh")
    with pytest.raises(ValueError, match="tau is -1"):
        basins.plant_bad_minimum(W, torch.ones(3, dtype=F64), X, "tanh", -1.0)
    weights, X4, Y4 = basins.example_e4().tensors()
    e = shallow.loss_derivatives(weights, X4, Y4, "exp").e[0]
    with pytest.raises(ValueError, match="definite ones are needed"):
        basins.plant_bad_minimum(weights[0], e, X4, "exp")


@pytest.mark.parametrize("share", [0.3, 0.5, 1.4, -0.2])
def test_the_eigenvalues_of_a_split(share):
    weights, X, Y = basins.example_e1().tensors()
    split = basins.split_neuron(weights, 0, (share, 1 - share))
    d = shallow.loss_derivatives(split, X, Y, "sin")
    assert float(d.gradient.abs().max()) < 1e-12
    expected = torch.tensor(sorted([0, 4, 24 * share, 24 * (1 - share)]), dtype=F64)
    torch.testing.assert_close(torch.linalg.eigvalsh(d.hessian[0]), expected, atol=1e-9, rtol=0)


def test_splitting_keeps_the_function():
    (W, V), X, _ = shallow_problem(2, 6, 3, 4)
    f = networks.forward([W, V], X, "tanh")
    torch.testing.assert_close(networks.forward(basins.split_neuron([W, V], 2, (0.2, 0.5, 0.3)), X, "tanh"), f)
