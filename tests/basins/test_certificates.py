"""What is certified about basins, and what must not be."""

import math

import pytest
import torch
from making import e1_at, gaussian, shallow_problem

from companion import basins, data, networks


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
    empty = (X == 0).all(0).nonzero()[:, 0].tolist()
    assert empty == [0, 32, 39]
    certificate = basins.certify_no_basin(len(X), 1, "tanh", X=X)
    assert certificate.holds
    assert certificate.assumptions[-1].measured == 61


def test_a_relu_ray_keeps_the_loss():
    (W, V), X, _ = shallow_problem(1, 6, 3, 2)
    f = networks.forward([W, V], X, "relu")
    for scale in (2.0, 1e3):
        torch.testing.assert_close(networks.forward([scale * W, V / scale], X, "relu"), f)


@pytest.mark.parametrize("level", ["certified", "measured"])
def test_e1_is_certified_in_floats_too(level):
    weights, X, Y = basins.example_e1().tensors()
    certificate = basins.certify_strict_minimum(weights, X, Y, "sin", level)
    assert certificate.holds, certificate
    assert certificate.status == level


@pytest.mark.parametrize("level", ["certified", "measured"])
def test_what_is_no_strict_minimum_is_not_certified(level):
    weights, X, Y = basins.example_e1().tensors()
    plateau = basins.split_neuron(weights, 0, (0.3, 0.7))  # a bad local minimum, not strict
    assert not basins.certify_strict_minimum(plateau, X, Y, "sin", level, competitor=e1_at(math.pi / 6, -4.0)[0])
    best = e1_at(math.pi / 6, -4.0)[0]  # strict, but nothing is lower
    assert not basins.certify_strict_minimum(best, X, Y, "sin", level, competitor=weights)
    off = [weights[0] + 0.3, weights[1]]
    assert not basins.certify_strict_minimum(off, X, Y, "sin", level, competitor=best)


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
