"""End points of training fall into the right class."""

import math

import pytest
import torch
from making import e1_at, gaussian, shallow_problem

from companion import basins
from companion.basins import critical_points, shallow

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
    strict = (ends.label == 1) | (ends.label == 2)
    g = torch.Generator().manual_seed(7)
    u, y = torch.rand(20, 8, generator=g, dtype=F64), torch.randn(20, 8, generator=g, dtype=F64)
    x = math.pi / 8 * (torch.arange(8, dtype=F64) + 0.5 + 0.6 * (u - 0.5))
    X, Y = (t.repeat_interleave(25, 0)[..., None] for t in (x, y))
    k = critical_points.kantorovich(trained.weights, X, Y, "sin")
    assert float(k.holds[strict].double().mean()) > 0.95


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


def ended(points, *, gradient=None, halfway=None, loss=None):
    """`Trained` as if training had stopped at E1's points (w, v)."""
    weights = [torch.cat([e1_at(*point)[0][i] for point in points]) for i in (0, 1)]
    _, X, Y = e1_at()
    d, S = shallow.loss_derivatives(weights, X, Y, "sin"), len(points)
    gradient = d.gradient.norm(dim=1) if gradient is None else torch.tensor(gradient, dtype=F64)
    halfway = torch.full((S,), 9.0, dtype=F64) if halfway is None else torch.tensor(halfway, dtype=F64)
    loss = d.loss if loss is None else torch.tensor(loss, dtype=F64)
    return shallow.Trained(weights, loss, gradient, torch.zeros(S).long(), gradient < 1e-8, halfway)


def classes(trained, starts, **options):
    _, X, Y = e1_at()
    return [basins.CLASSES[i] for i in basins.classify_endpoints(trained, X, Y, "sin", starts=starts, **options).label]


BOTTOM, LOW, SADDLE = (math.pi / 2, 1.0), (math.pi / 6, -4.0), (math.asin(math.sqrt(7 / 8)), 0.0)


def test_a_strict_minimum_is_bad_only_beside_a_lower_one_on_the_same_data():
    assert classes(ended([BOTTOM, LOW]), 2) == ["strict, bad", "zero loss"]
    assert classes(ended([BOTTOM, LOW]), 1) == ["strict, best of its starts", "zero loss"]
    assert classes(ended([BOTTOM, SADDLE]), 2) == ["strict, best of its starts", "saddle"]
    # lower by less than 1e-6 of L, or than 1e-9 of ||y||^2 = 20, is the same minimum found again
    for lower, name in ((9 * (1 - 0.9e-6), "strict, best of its starts"), (9 * (1 - 1.2e-6), "strict, bad")):
        assert classes(ended([BOTTOM, BOTTOM], loss=[9.0, lower]), 2)[0] == name
    for loss, name in ((2.1e-8, "strict, bad"), (1.9e-8, "strict, best of its starts")):
        assert classes(ended([BOTTOM, BOTTOM], loss=[loss, 1e-13]), 2)[0] == name
    # a start that ended in NaN is not the lowest
    assert classes(ended([BOTTOM, BOTTOM], loss=[9.0, math.nan]), 2)[0] == "strict, best of its starts"


def test_zero_loss_is_relative_to_the_targets():
    assert classes(ended([BOTTOM, BOTTOM], loss=[1.9e-13, 2.1e-13]), 1) == ["zero loss", "strict, best of its starts"]
    assert classes(ended([BOTTOM], loss=[1e-3]), 1, zero=1e-4) == ["zero loss"]


def test_what_still_moves_is_drifting_only_if_it_grows():
    """Not at rest: large and grown by 2 % since half the time is drifting, otherwise unconverged."""
    far = (math.pi / 2, 9.0)
    assert classes(ended([far, far], halfway=[8.8, 8.9]), 1) == ["drifting", "unconverged"]
    assert classes(ended([(math.pi / 2, 7.9), BOTTOM], halfway=[1.0, 0.1]), 1) == [
        "unconverged",
        "strict, best of its starts",
    ]
    assert classes(ended([BOTTOM, BOTTOM], gradient=[0.9e-8, 1.1e-8]), 1) == [
        "strict, best of its starts",
        "unconverged",
    ]
    assert classes(ended([BOTTOM], gradient=[1e-5]), 1, tolerance=1e-4) == ["strict, best of its starts"]


def test_what_rests_far_out_is_drifting_and_what_is_flat_is_degenerate():
    """Multiples of the period: E1's minimum again, and too far out; at v = 1e-9 the Hessian is flat in w."""
    out = (math.pi / 2 + 2 * math.pi * 160, 1.0)
    assert classes(ended([out], gradient=[1e-9]), 1) == ["strict, best of its starts"]
    assert classes(ended([(math.pi / 2, 1e-9)], gradient=[1e-9]), 1) == ["degenerate"]
    assert classes(ended([(math.pi / 2, 2000.0)], gradient=[1e-9]), 1) == ["drifting"]
    flat = basins.split_neuron(e1_at(*out)[0], 0, (0.5, 0.5))
    trained = shallow.Trained(flat, *(torch.tensor([t], dtype=F64) for t in (9.0, 1e-9)), torch.zeros(1).long(),
                              torch.tensor([True]), torch.tensor([9.0], dtype=F64))  # fmt: skip
    assert classes(trained, 1) == ["drifting"]


def test_end_points_are_those_of_each_networks_own_data_in_parts():
    """More networks than are looked at together, half of them at E1's minimum and half at the saddle."""
    S = 1500
    trained = ended([BOTTOM, SADDLE] * (S // 2))
    _, X, Y = e1_at()
    for x, y in ((X, Y), (X.expand(S, 2, 1), Y.expand(S, 2, 1))):
        found = basins.classify_endpoints(trained, x, y, "sin", starts=2)
        assert found.fraction("saddle") == found.fraction("strict, best of its starts") == 0.5
        assert float(found.smallest[0]) == pytest.approx(2)
        assert float(found.smallest[1]) < -9
        assert found.best.tolist() == pytest.approx([9.0] * S)


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
