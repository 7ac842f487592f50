"""Interval arithmetic against rationals, mpmath and python-flint: the true value is never outside, and never far."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.rigor import intervals
from companion.rigor.intervals import Interval, cat, point

F64 = torch.float64
numbers = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=True)


def interval(a, b):
    return Interval(torch.tensor(min(a, b), dtype=F64), torch.tensor(max(a, b), dtype=F64))


def holds(found, true):
    return Fraction(found.lo.item()) <= true <= Fraction(found.hi.item())


@given(numbers, numbers, numbers, numbers, st.floats(0, 1), st.floats(0, 1))
def test_ring_operations_contain_every_result(a, b, c, d, s, t):
    x, y = interval(a, b), interval(c, d)
    p = min(
        max(Fraction(a) + Fraction(s) * (Fraction(b) - Fraction(a)), min(Fraction(a), Fraction(b))),
        max(Fraction(a), Fraction(b)),
    )
    q = min(
        max(Fraction(c) + Fraction(t) * (Fraction(d) - Fraction(c)), min(Fraction(c), Fraction(d))),
        max(Fraction(c), Fraction(d)),
    )
    assert holds(x + y, p + q)
    assert holds(x - y, p - q)
    assert holds(x * y, p * q)
    assert holds(-x, -p)
    assert holds(x.square(), p * p)
    assert holds(2.5 - x, Fraction(5, 2) - p)
    assert x.square().lo.item() >= 0


@given(st.floats(1e-6, 1e6), st.floats(1.0, 1.5))
def test_reciprocal_and_root_contain_every_result(a, grow):
    x = interval(a, a * grow)
    for end in (x.lo.item(), x.hi.item()):
        assert holds(x.reciprocal(), 1 / Fraction(end))
        root = x.sqrt()
        assert Fraction(root.lo.item()) ** 2 <= Fraction(end) <= Fraction(root.hi.item()) ** 2


@given(st.floats(-745, 705) | st.floats(-1e-300, 1e-300) | st.floats(-3, 3))
def test_exp_contains_the_exponential_and_is_sharp(x):
    mpmath.mp.prec = 300
    found = point(torch.tensor([x], dtype=F64)).exp()
    true = mpmath.exp(mpmath.mpf(x))
    assert mpmath.mpf(found.lo.item()) <= true <= mpmath.mpf(found.hi.item())
    if abs(x) < 700:
        assert found.hi.item() / found.lo.item() - 1 < 1e-14


def test_the_split_of_log_two_is_right():
    mpmath.mp.prec = 300
    rest = mpmath.log(2) - mpmath.mpf(intervals.LN2)
    assert mpmath.mpf(intervals.LN2_REST[0]) < rest < mpmath.mpf(intervals.LN2_REST[1])
    assert (Fraction(intervals.LN2) * 2**32).denominator == 1


@given(st.floats(-60, 60), st.floats(0, 1e-3))
def test_tanh_contains_every_result(x, wide):
    mpmath.mp.prec = 300
    found = interval(x, x + wide).tanh()
    for end in (x, x + wide):
        assert mpmath.mpf(found.lo.item()) <= mpmath.tanh(mpmath.mpf(end)) <= mpmath.mpf(found.hi.item())
    assert found.hi.item() - found.lo.item() < 1e-3 + 1e-13


@given(st.lists(numbers, min_size=1, max_size=40))
def test_sums_contain_the_exact_sum(values):
    found = point(torch.tensor(values, dtype=F64)).sum(0)
    true = sum(Fraction(v) for v in values)
    assert holds(found, true)
    assert found.hi.item() - found.lo.item() <= 1e-12 * sum(abs(v) for v in values) + 1e-300


def test_a_long_formula_agrees_with_balls():
    flint = pytest.importorskip("flint")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator, dtype=F64)
    found = ((0.5 - point(x).square()) * point(x).exp() + point(0.3) * point(x)).tanh() * (
        point(x).square() + 1.0
    ).sqrt()
    flint.ctx.prec = 200
    for i, a in enumerate(x.tolist()):
        t = flint.arb(a)
        true = ((flint.arb(0.5) - t * t) * t.exp() + flint.arb(0.3) * t).tanh() * (t * t + 1).sqrt()
        assert flint.arb(found.lo[i].item()) <= true <= flint.arb(found.hi[i].item())
    assert float((found.hi - found.lo).max()) < 1e-13


def test_fractions_midpoints_and_shapes():
    third = point(Fraction(1, 3))
    assert holds(third, Fraction(1, 3))
    assert third.lo < third.hi
    assert point(Fraction(1, 4)).lo == point(Fraction(1, 4)).hi
    x = Interval(torch.tensor([[1.0, -3.0]], dtype=F64), torch.tensor([[1.5, 2.0]], dtype=F64))
    mid, radius = x.split()
    assert bool(((mid - radius <= x.lo) & (mid + radius >= x.hi)).all())
    assert x.magnitude().tolist() == [[1.5, 3.0]]
    assert cat([x, x], 0).shape == (2, 2)
    assert x[0].shape == (2,)
    assert x.unsqueeze(0).flatten(0).expand(2).shape == (2,)
    assert x.clamp(-1.0, 1.0).lo.tolist() == [[1.0, -1.0]]
    assert math.isinf(point(torch.tensor([710.0], dtype=F64)).exp().hi.item())


def test_reciprocal_of_zero_is_refused():
    with pytest.raises(ZeroDivisionError, match="not positive"):
        interval(-1.0, 1.0).reciprocal()
