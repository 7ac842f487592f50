"""End points of training fall into the right class."""

import math

import pytest
import torch
from making import e1_at, gaussian, shallow_problem

from companion import basins
from companion.basins import shallow

F64 = torch.float64


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
    assert bool((trained.loss[ends.label == 1] > ends.best[ends.label == 1]).all())


def test_a_point_at_rest_on_a_plateau_and_a_saddle_are_told_apart():
    weights, X, Y = basins.example_e1().tensors()
    nets = [
        basins.split_neuron(weights, 0, (0.5, 0.5)),
        basins.split_neuron(weights, 0, (1.5, -0.5)),
        [torch.cat([t, u], i) for t, u, i in zip(e1_at(math.pi / 6, -4.0)[0], e1_at(0.1, 0.0)[0], (2, 1), strict=True)],
    ]
    nets = [[t.reshape(t.shape[-2:]) for t in net] for net in nets]
    stack = [torch.stack([net[i] for net in nets]) for i in (0, 1)]
    d = shallow.loss_derivatives(stack, X, Y, "sin")
    rest = torch.linalg.vector_norm(d.gradient, dim=1)
    trained = shallow.Trained(stack, d.loss, rest, torch.zeros(3).long(), rest < 1e-8, torch.full((3,), 9.0).double())
    ends = basins.classify_endpoints(trained, X, Y, "sin", starts=3)
    assert [basins.CLASSES[i] for i in ends.label] == ["degenerate", "saddle", "zero loss"]


def test_classify_needs_equal_groups():
    weights, X, Y = shallow_problem(3, 4, 2, 3)
    trained = basins.train_lm_newton(weights, X, Y, "tanh", iters=5)
    with pytest.raises(ValueError, match="divisor of the number 3"):
        basins.classify_endpoints(trained, X, Y, "tanh", starts=2)


def test_shared_inputs_with_own_targets_are_accepted_everywhere():
    weights, X, _ = shallow_problem(4, 5, 2, 3)
    Y = gaussian(4, 5, 1, seed=8)
    trained = basins.train_lm_newton(weights, X, Y, "tanh", iters=5)
    ends = basins.classify_endpoints(trained, X, Y, "tanh", starts=2)
    alone = basins.loss_derivatives([W[3] for W in trained.weights], X, Y[3], "tanh")
    torch.testing.assert_close(basins.loss_derivatives(trained.weights, X, Y, "tanh").hessian[3], alone.hessian[0])
    assert ends.label.shape == (4,)
