"""Exact jets and elimination."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import shallow_problem

from companion import networks
from companion.basins import exact, shallow

F64 = torch.float64


@given(st.integers(-6, 6), st.integers(2, 5))
@settings(max_examples=30)
def test_exact_jets_are_the_activations(k, b):
    angle = (Fraction(3, 5), Fraction(4, 5))
    for act in exact._ACTIVATIONS:
        base, u = (angle, math.atan2(4, 3)) if act == "sin" else (Fraction(b, 3), math.log(b / 3))
        if base == 1:
            continue
        z, sigma = torch.tensor(k * u, dtype=F64), networks.activation(act)
        jet = exact._jet(act, base, k)
        for stored, close in zip(jet, (sigma.value(z), sigma.derivative(z), sigma.second(z)), strict=True):
            assert float(stored) == pytest.approx(float(close), rel=1e-9, abs=1e-12)


def minor(A, k):
    """The leading minor of order k, by permutations."""
    total = 0
    for order in itertools.permutations(range(k)):
        sign = math.prod(1 if order[i] < order[j] else -1 for i in range(k) for j in range(i + 1, k))
        total += sign * math.prod(A[i][order[i]] for i in range(k))
    return total


@given(st.lists(st.integers(-4, 4), min_size=16, max_size=16), st.integers(0, 6))
def test_pivots_are_quotients_of_leading_minors(entries, shift):
    B = [entries[4 * i : 4 * i + 4] for i in range(4)]
    A = [
        [Fraction(sum(B[i][k] * B[j][k] for k in range(4)) + (i == j) * (shift - 3)) for j in range(4)]
        for i in range(4)
    ]
    minors = [1, *(minor(A, k) for k in range(1, 5))]
    expected = []
    for k in range(4):
        expected.append(Fraction(minors[k + 1]) / minors[k])
        if expected[-1] <= 0:
            break
    assert exact.ldl_pivots(A) == expected


def test_pivots_are_those_of_definite_and_indefinite_matrices():
    A = [[Fraction(2), Fraction(1)], [Fraction(1), Fraction(1)]]
    assert exact.ldl_pivots(A) == [2, Fraction(1, 2)]
    assert exact.ldl_pivots([[Fraction(1), Fraction(2)], [Fraction(2), Fraction(1)]]) == [1, -3]
    assert exact.ldl_pivots([[Fraction(0)]]) == [0]


def test_derivatives_in_any_number_are_those_in_tensors():
    """The same lines on floats, against the closed form that is checked by automatic differentiation."""
    (W, V), X, Y = shallow_problem(1, 4, 2, 3)
    sigma = networks.activation("tanh")
    Z = X @ W[0]
    values = [f(Z).tolist() for f in (sigma.value, sigma.derivative, sigma.second)]
    jets = [[tuple(t[n][j] for t in values) for j in range(3)] for n in range(4)]
    found = exact.derivatives(jets, V[0, :, 0].tolist(), X.tolist(), Y[:, 0].tolist())
    d = shallow.loss_derivatives([W, V], X, Y, "tanh")
    assert found.loss == pytest.approx(float(d.loss), rel=1e-12)
    assert found.e == pytest.approx(d.e[0].tolist(), rel=1e-12)
    assert found.gradient == pytest.approx(d.gradient[0].tolist(), rel=1e-11, abs=1e-12)
    for row, expected in zip(found.hessian, d.hessian[0].tolist(), strict=True):
        assert row == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_a_point_in_fractions_is_the_network_of_its_weights():
    point = exact.ExactPoint("tanh", 2, ((1, -2), (0, 3)), (Fraction(1, 3), Fraction(-2)))
    X, y = ((1, 2), (-1, 0), (3, 1)), (Fraction(1), Fraction(1, 7), Fraction(-2))
    W, V = point.weights()
    torch.testing.assert_close(W, math.log(2) * torch.tensor([[1.0, 0], [-2, 3]]).double())
    Y = torch.tensor([[float(t)] for t in y], dtype=F64)
    d = shallow.loss_derivatives([W, V], torch.tensor(X, dtype=F64), Y, "tanh")
    found = point.derivatives(X, y)
    assert float(found.loss) == pytest.approx(float(d.loss), rel=1e-12)
    assert [float(t) for t in found.gradient] == pytest.approx(d.gradient[0].tolist(), rel=1e-10, abs=1e-13)
    turned = exact.ExactPoint("sin", (Fraction(3, 5), Fraction(4, 5)), ((2,),), (Fraction(1),))
    assert float(turned.weights()[0]) == pytest.approx(2 * math.atan2(4, 3))


def test_the_best_neuron_is_the_best_of_a_grid():
    X, y = ((1, 0), (2, 1), (-1, 3)), (Fraction(1), Fraction(-2), Fraction(1, 2))
    for act, base in (("tanh", 3), ("exp", Fraction(3, 2)), ("sin", (Fraction(3, 5), Fraction(4, 5)))):
        point, loss = exact.best_exact_neuron(act, base, X, y, reach=2)
        assert point.derivatives(X, y).loss == loss
        assert point.derivatives(X, y).gradient[0] == 0  # c is at its best
        others = []
        for a in itertools.product((-2, -1, 0, 1, 2), repeat=2):
            h = [t[0][0] for t in exact.ExactPoint(act, base, (a,), (Fraction(1),)).jets(X)]
            if any(h):
                c = sum(s * t for s, t in zip(h, y, strict=True)) / sum(t * t for t in h)
                others.append(sum((c * t - s) ** 2 for t, s in zip(h, y, strict=True)) / 2)
        assert loss == min(others)
    with pytest.raises(ValueError, match="raise reach"):
        exact.best_exact_neuron("tanh", 2, X, y, reach=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("relu", 2, ((1,),), (1,)), "has exact values"),
        (("exp", 1, ((1,),), (1,)), "positive rational other than 1"),
        (("exp", -2, ((1,),), (1,)), "positive rational other than 1"),
        (("sin", 2, ((1,),), (1,)), "on the circle"),
        (("sin", (1, 1), ((1,),), (1,)), "on the circle"),
        (("exp", 2, ((1,), (1, 2)), (1, 1)), "multiples hold 2 neurons"),
        (("exp", 2, ((1,),), (1, 1)), "v 2 numbers"),
        (("exp", 2, (), ()), "multiples hold 0 neurons"),
        (("exp", 2, None, (1,)), "tuples of integers"),
        (("exp", 2, ((1.5,),), (1,)), "tuples of integers"),
        (("exp", 2, ((1,),), 1), "tuples of integers"),
        (("exp", 2, ((1,),), (float("nan"),)), "tuples of integers"),
        (("exp", float("inf"), ((1,),), (1,)), "rational numbers are needed"),
        (("sin", (None, 1), ((1,),), (1,)), "rational numbers are needed"),
        ((None, 2, ((1,),), (1,)), "has exact values"),
    ],
)
def test_points_without_exact_features_are_refused(unchecked, arguments, words):
    with pytest.raises(ValueError, match=words):
        exact.ExactPoint(*arguments)


def test_exact_data_are_whole_numbers_and_fractions():
    assert exact.integers(torch.tensor([[1.0, -2.0], [10_000.0, 0.0]])) == ((1, -2), (10_000, 0))
    assert exact.integers([3, Fraction(4)]) == ((3,), (4,))
    assert exact.targets(torch.tensor([[0.5], [2.0]])) == [Fraction(1, 2), 2]
    assert exact.targets(["1/3", 2]) == [Fraction(1, 3), 2]
    for data, words in (
        ([[1], [1, 2]], "one length"), ([], "one length"), ([[1.5]], "integer inputs"), ([10_001], "beyond 10000"),
        ([math.inf], "finite rational"), (None, "finite rational"), ([None], "finite rational"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            exact.integers(data)
    with pytest.raises(ValueError, match="Y has 2 columns"):
        exact.targets([[1, 2], [3, 4]])
