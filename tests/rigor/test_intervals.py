"""Interval arithmetic against rationals, mpmath and python-flint: the true value is never outside, and never far."""

import math
import subprocess
import sys
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import flushing

from companion.rigor import rounding
from companion.rigor.intervals import Interval, cat, point

F64 = torch.float64
numbers = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=True)


def interval(a, b):
    return Interval(torch.tensor(min(a, b), dtype=F64), torch.tensor(max(a, b), dtype=F64))


def holds(found, true):
    low, high = found.lo.item(), found.hi.item()
    return (low == -math.inf or Fraction(low) <= true) and (high == math.inf or true <= Fraction(high))


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


# --- Quotients, powers, comparisons -----------------------------------------------------------------------------------


@st.composite
def points_of_intervals(draw, low=-1e6, high=1e6):
    """Interval ends and an exact number between them."""
    ends = st.floats(low, high, allow_nan=False)
    a, b = sorted((draw(ends), draw(ends)))
    share = Fraction(draw(st.sampled_from([0.0, 1.0, 0.5, 0.3, 1e-9])))
    return a, b, Fraction(a) + share * (Fraction(b) - Fraction(a))


@given(points_of_intervals(), points_of_intervals(), st.integers(-4, 7))
def test_quotients_powers_and_choices_contain_every_result(first, second, n):
    (a, b, p), (c, d, q) = first, second
    x, y = interval(a, b), interval(c, d)
    if c > 0 or d < 0:
        assert holds(x / y, p / q)
        assert holds(1 / y, 1 / q)
    else:
        assert math.isnan((x / y).lo.item())
        assert math.isnan((x / y).hi.item())
    if n >= 0 or a > 0 or b < 0:
        assert holds(x**n, p**n)
        assert n % 2 or (x**n).lo.item() >= 0
    assert holds(abs(x), abs(p))
    assert holds(x.maximum(y), max(p, q))


@given(points_of_intervals(1e-3, 1e3), st.integers(1, 6))
def test_powers_and_quotients_are_sharp(first, n):
    a = first[0]
    for found, true in ((interval(a, a) ** n, Fraction(a) ** n), (1 / interval(a, a), 1 / Fraction(a))):
        assert Fraction(found.hi.item()) - Fraction(found.lo.item()) <= 4 * n * true / 2**52


def test_powers_of_an_interval_around_zero_are_tight(unchecked):
    x = interval(-1.0, 2.0)
    assert -1e-300 <= (x**2).lo.item() <= 0 <= 4 <= (x**2).hi.item() < 4 + 1e-14
    assert -1 - 1e-14 < (x**3).lo.item() <= -1
    assert 8 <= (x**3).hi.item() < 8 + 1e-13
    for wrong in (0.5, True, "2"):
        with pytest.raises(TypeError, match="a whole number is needed"):
            x**wrong


@given(numbers, st.floats(0, 1e6))
def test_around_is_the_inverse_of_split(value, radius):
    found = Interval.around(torch.tensor(value, dtype=F64), torch.tensor(radius, dtype=F64))
    assert holds(found, Fraction(value) - Fraction(radius))
    assert holds(found, Fraction(value) + Fraction(radius))
    mid, again = found.split()
    assert Fraction(mid.item()) - Fraction(again.item()) <= Fraction(found.lo.item())
    assert Fraction(found.hi.item()) <= Fraction(mid.item()) + Fraction(again.item())
    assert again.item() <= radius * (1 + 1e-14) + 1e-15 * abs(value) + 1e-300


@given(
    st.fractions(-(10**6), 10**6) | st.sampled_from([Fraction(1, 10**400), Fraction(10**400), Fraction(-3, 2**1080)])
)
def test_fractions_of_any_size_lie_in_their_point(value):
    found = point(value)
    assert holds(found, value)
    assert found.lo.item() < math.inf
    assert found.hi.item() > -math.inf


def test_numbers_beside_an_interval():
    x = interval(1.0, 1.0)
    for exact in (3, -0.75, 2.5, Fraction(1, 3), torch.tensor([0.1, 7.0], dtype=F64)):
        assert bool(((x * exact).hi < 1e6).all())
    assert holds(x * Fraction(1, 10), Fraction(1, 10))
    assert (torch.tensor(2.0, dtype=F64) * x).hi.item() >= 2
    for wrong in (0.1, 1e-3, math.pi):
        with pytest.raises(TypeError, match="no short binary fraction"):
            x * wrong
        assert holds(x * point(wrong), Fraction(wrong))


def test_points_that_are_none(unchecked):
    with pytest.raises(TypeError, match=r"value is torch\.float32"):
        point(torch.ones(2))
    for bad in (math.nan, math.inf, torch.tensor([1.0, -math.inf], dtype=F64)):
        with pytest.raises(ValueError, match="needed"):
            point(bad)


@given(st.floats(-700, 700), st.floats(0, 1))
def test_logarithms_and_exponentials_less_one_contain_every_result(x, wide):
    mpmath.mp.prec = 300
    found = interval(x, x + wide).expm1()
    for end in (x, x + wide):
        assert mpmath.mpf(found.lo.item()) <= mpmath.expm1(mpmath.mpf(end)) <= mpmath.mpf(found.hi.item())
    positive = interval(abs(x), abs(x) + wide)
    for function, true in ((Interval.log, mpmath.log), (Interval.log1p, mpmath.log1p)):
        found = function(positive)
        for end in (abs(x), abs(x) + wide):
            if end > 0:
                assert mpmath.mpf(found.lo.item()) <= true(mpmath.mpf(end)) <= mpmath.mpf(found.hi.item())


# --- How far outward --------------------------------------------------------------------------------------------------


def ends_of(x):
    return x.lo.item(), x.hi.item()


@pytest.mark.parametrize(("a", "b", "c", "d"), [(1.0, 3.0, -2.0, 5.0), (-3.0, -1.0, 0.5, 7.0), (-1.0, 4.0, -6.0, -5.0)])
def test_one_operation_moves_each_end_by_one_step(a, b, c, d):
    x, y = interval(a, b), interval(c, d)
    down, up = rounding.round_down, rounding.round_up
    assert ends_of(x + y) == (down(a + c), up(b + d))
    assert ends_of(x - y) == (down(a - d), up(b - c))
    assert ends_of(5 - y) == (down(5 - d), up(5 - c))
    products = a * c, a * d, b * c, b * d
    assert ends_of(x * y) == (down(min(products)), up(max(products)))
    assert ends_of(-x) == (-b, -a)
    assert ends_of(abs(x)) == (max(a, -b, 0.0), max(b, -a))
    assert ends_of(x.maximum(y)) == (max(a, c), max(b, d))
    assert ends_of(x.clamp(-0.5, 2.0)) == (min(max(a, -0.5), 2.0), min(max(b, -0.5), 2.0))
    assert x.magnitude().item() == max(abs(a), abs(b))
    assert ends_of(Interval.around(number(a), number(b - a))) == (down(2 * a - b), up(b))
    if a > 0 or b < 0:
        assert ends_of(x.reciprocal()) == (down(1 / b), up(1 / a))
        assert ends_of(y / x) == ends_of(y * x.reciprocal())
        assert ends_of(1 / x) == (down(down(1 / b)), up(up(1 / a)))
        assert ends_of(x**-1) == (down(1 / b), up(1 / a))
    assert ends_of(x**0) == (1.0, 1.0)
    assert ends_of(x**1) == (a, b)
    least, most = ends_of(abs(x))
    assert ends_of(x**2) == (max(0.0, down(least * least)), up(most * most))
    if b > 0:
        root = interval(max(a, 0.0), b).sqrt()
        assert ends_of(x.sqrt()) == ends_of(root) == (max(0.0, down(math.sqrt(max(a, 0.0)))), up(math.sqrt(b)))
        assert ends_of(x**3)[1] == up(up(b * b) * b)
    else:
        assert math.isnan(x.sqrt().lo.item())
        assert math.isnan(x.log().lo.item())
        assert ends_of(x**3)[1] == -down(down(b * b) * -b)


def number(x):
    return torch.tensor(x, dtype=F64)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_a_sum_moves_its_ends_by_gamma(n):
    g = torch.Generator().manual_seed(n)
    x, wide = torch.randn(n, generator=g, dtype=F64), torch.rand(n, generator=g, dtype=F64)
    found = Interval(x, x + wide).sum(0)
    for end, side, got in ((x, -1, found.lo), (x + wide, 1, found.hi)):
        error = (n + 4) * 2.0**-53 * end.abs().sum().item()
        exact = sum(map(Fraction, end.tolist()))
        assert side * (Fraction(got.item()) - exact) == pytest.approx(error, rel=0.1 + 2 / (n + 4), abs=0)
    zero = point(torch.zeros(2, n, dtype=F64)).sum(1)
    assert (zero.hi / rounding.TINY).tolist() == (-zero.lo / rounding.TINY).tolist() == pytest.approx([n + 3.0] * 2)


def test_points_are_as_narrow_as_floats_allow():
    for value in (Fraction(1, 3), Fraction(-2, 7), Fraction(10**30 + 1), Fraction(1, 10**200)):
        low, high = ends_of(point(value))
        assert math.nextafter(low, math.inf) == high
        assert Fraction(low) < value < Fraction(high)
    for value in (0.1, 3, -7, Fraction(5, 8), 0, 2.0**-1022, 1e308):
        assert ends_of(point(value)) == (float(value), float(value))
    assert ends_of(point(10**400)) == (sys.float_info.max, math.inf)
    assert ends_of(point(-(10**400))) == (-math.inf, -sys.float_info.max)
    assert ends_of(point(5e-324)) == (0.0, 2.0**-1022)
    assert ends_of(point(-5e-324)) == (-(2.0**-1022), 0.0)
    assert ends_of(interval(1.0, 1.0) * 2.0**-20) == (rounding.round_down(2.0**-20), rounding.round_up(2.0**-20))
    with pytest.raises(TypeError, match="no short binary fraction"):
        interval(1.0, 1.0) * 2.0**-21


def test_a_midpoint_and_a_radius():
    for low, high in ((1.0, 2.0), (-4.0, 10.0), (sys.float_info.max / 2, sys.float_info.max)):
        mid, radius = interval(low, high).split()
        assert mid.item() == low / 2 + high / 2
        assert radius.item() == rounding.round_up(max(mid.item() - low, high - mid.item()))


def test_infinite_ends_of_products():
    everything = interval(-math.inf, math.inf)
    assert ends_of(everything * 0) == (rounding.round_down(0.0), rounding.round_up(0.0))
    assert ends_of(interval(0.0, math.inf) * interval(0.0, 2.0)) == (rounding.round_down(0.0), math.inf)
    assert ends_of(interval(-math.inf, 1.0) ** 2) == (0.0, math.inf)


# --- Where small numbers are flushed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-307, 1e-310, 1e-323, 1e-160, 1.0])
def test_intervals_hold_where_small_numbers_are_flushed(size):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, generator=g, dtype=F64) * size for _ in range(2))
    c = torch.randn(500, generator=g, dtype=F64) / max(size, 1e-300)
    with flushing():
        x, y, z = point(a), point(b), point(c)
        found = [x + y, x - y, x * y, x * z, x / z, x.square(), abs(x), x**3, x.maximum(y), x.sum(0)]
    p, q, r = ([Fraction(t) for t in part.tolist()] for part in (a, b, c))
    exact = [
        [s + t for s, t in zip(p, q, strict=True)], [s - t for s, t in zip(p, q, strict=True)],
        [s * t for s, t in zip(p, q, strict=True)], [s * t for s, t in zip(p, r, strict=True)],
        [s / t for s, t in zip(p, r, strict=True)], [s * s for s in p], [abs(s) for s in p], [s**3 for s in p],
        [max(s, t) for s, t in zip(p, q, strict=True)], [sum(p)],
    ]  # fmt: skip
    for enclosed, true in zip(found, exact, strict=True):
        ends = zip(enclosed.lo.reshape(-1).tolist(), enclosed.hi.reshape(-1).tolist(), true, strict=True)
        assert all(Fraction(low) <= t <= Fraction(high) for low, high, t in ends)


def test_threads_that_flush_unseen_are_covered():
    """The workers keep the setting of the call that started them; this thread's own is another."""
    script = """
import torch
torch.set_num_threads(2)
if torch.set_flush_denormal(True):
    torch.ones(100_000).mul(2)  # the workers start flushing
    torch.set_flush_denormal(False)
    from companion.rigor import balls, point
    v, w, z = (torch.full((100_000,), t, dtype=torch.float64) for t in (1.5 * 2.0**-1022, -(2.0**-1022), 0.0))
    value, radius = balls.add_ball(v, z, w, z)  # the truth is 2^-1023
    assert bool((value - 2.0**-1023 <= radius).all() and (2.0**-1023 - value <= radius).all())
    both = point(v) + point(w)
    assert bool((both.lo <= 2.0**-1023).all() and (both.hi >= 2.0**-1023).all())
    print("flushed", int((value == 0).sum()) > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
