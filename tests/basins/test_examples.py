"""Lesson 5's exact examples, the numbers that can be checked by hand."""

import math
from fractions import Fraction

import pytest
import torch
from making import e1_at, gaussian

from companion import basins, networks
from companion.basins import shallow

F64 = torch.float64


def test_e1_is_a_strict_minimum_above_a_global_one():
    d = shallow.loss_derivatives(*e1_at(), "sin")
    assert float(d.loss) == pytest.approx(9, abs=1e-12)
    assert float(d.gradient.abs().max()) < 1e-12
    torch.testing.assert_close(d.hessian[0], torch.diag(torch.tensor([2.0, 24.0], dtype=F64)), atol=1e-12, rtol=0)
    assert float(shallow.loss_derivatives(*e1_at(math.pi / 6, -4.0), "sin").loss) < 1e-12


def test_e1s_saddles_and_barrier():
    saddle = shallow.loss_derivatives(*e1_at(math.asin(math.sqrt(7 / 8)), 0.0), "sin")
    assert float(saddle.loss) == pytest.approx(10, abs=1e-12)
    assert float(saddle.gradient.abs().max()) < 1e-12
    values = torch.linalg.eigvalsh(saddle.hessian[0])
    # s^2 = 7/8: sin 3w = -s/2, cos 3w = -5c/2, so the Hessian is [[35/32, -28 c], [-28 c, 0]] with c^2 = 1/8
    root = math.sqrt((35 / 32) ** 2 + 4 * 98)
    assert values.tolist() == pytest.approx([(35 / 32 - root) / 2, (35 / 32 + root) / 2], rel=1e-12)


def test_e1_with_soft_labels_and_cross_entropy():
    p = torch.tensor([[5 / 12], [1 / 12]], dtype=F64)
    weights, X, _ = e1_at(v=math.log(2))
    d = shallow.loss_derivatives(weights, X, p, "sin", loss="logistic")
    torch.testing.assert_close(
        d.hessian[0], torch.diag(torch.tensor([4 / 9, 2 * math.log(2)], dtype=F64)), atol=1e-12, rtol=0
    )
    assert float(d.loss) == pytest.approx(math.log(4.5) - math.log(2) / 3, abs=1e-12)  # f = (ln 2, -ln 2)
    lower, _, _ = e1_at(math.pi / 6, -2.0)
    at_lower = math.log1p(math.exp(-1)) + math.log1p(math.exp(-2)) + 5 / 12 + 2 / 12  # f = (-1, -2)
    assert float(shallow.loss_derivatives(lower, X, p, "sin", loss="logistic").loss) == pytest.approx(at_lower)
    assert at_lower < float(d.loss)


def test_e4_is_a_strict_minimum_with_an_indefinite_dual_hessian():
    weights, X, Y = basins.example_e4().tensors()
    d = shallow.loss_derivatives(weights, X, Y, "exp")
    assert float(d.loss) == pytest.approx(2673 / 512, abs=1e-12)
    e4 = basins.example_e4()
    (a, b, _), (_, c, _), (_, _, last) = e4.point.derivatives(
        e4.X, e4.y
    ).hessian  # the second input weight stands apart
    root = math.sqrt((a - c) ** 2 + 4 * b * b)
    assert last == Fraction(1, 2)
    expected = [0.5, (float(a + c) - root) / 2, (float(a + c) + root) / 2]
    assert torch.linalg.eigvalsh(d.hessian[0]).tolist() == pytest.approx(expected, rel=1e-12)
    _, _, hess = shallow.dual_function(d.e, X, "exp", weights[0])
    torch.testing.assert_close(hess[0, 0], torch.diag(torch.tensor([4.5, -1.5], dtype=F64)), atol=1e-10, rtol=0)
    certificate = basins.example_e4().certificate()
    assert certificate.status == "exact"
    assert certificate.quantities["L"] == Fraction(2673, 512)
    h = [64, 1, Fraction(1, 4), 1]  # the features of w = (ln 4, 0); v is at its best
    least = (
        sum(t * t for t in e4.y) - sum(s * t for s, t in zip(h, e4.y, strict=True)) ** 2 / sum(s * s for s in h)
    ) / 2
    assert certificate.quantities["L of the competitor"] == pytest.approx(float(least), rel=1e-14)


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
        W2 = gaussian(1, m, seed=3).abs()
        H = networks.features([torch.tensor([[w]], dtype=F64), W2, torch.ones(m, 1, dtype=F64)], X)[-1][0]
        return 0.5 * float(((H @ torch.linalg.pinv(H) @ Y - Y) ** 2).sum())

    assert least(1.0) == pytest.approx(2, abs=1e-12)
    assert least(-1.0) == pytest.approx(0.5, abs=1e-12)
    assert least(0.0) == pytest.approx(2.5, abs=1e-12)


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
