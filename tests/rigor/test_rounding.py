"""Rounding outward, with and without numbers below 2^-1022."""

import math
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import flushing

from companion import rigor
from companion.rigor import rounding

SMALLEST = 2.0**-1022


def number(x):
    return torch.tensor(x, dtype=torch.float64)


# --- Scalars ----------------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 5))
def test_rounding_steps_by_ulps_and_past_what_is_flushed(x, ulps):
    up, down = rigor.round_up(x, ulps), rigor.round_down(x, ulps)
    assert down < x < up
    assert up >= x + SMALLEST
    assert down <= x - SMALLEST
    if abs(x) > 1e-290:
        assert up == math.inf or rigor.round_down(up, ulps) == x
        assert down == -math.inf or rigor.round_up(down, ulps) == x
        if ulps == 1:
            assert (up, down) == (math.nextafter(x, math.inf), math.nextafter(x, -math.inf))
    assert (float(rounding.up(number(x))), float(rounding.down(number(x)))) == (rigor.round_up(x), rigor.round_down(x))


def test_rounding_at_the_ends():
    assert rigor.round_up(0.0) == rounding.TINY == -rigor.round_down(0.0)
    assert rigor.round_up(math.inf) == math.inf
    assert rigor.round_down(math.inf) == sys.float_info.max
    assert rigor.round_down(-math.inf) == -math.inf
    assert math.isnan(rigor.round_up(math.nan))
    assert math.isnan(rigor.round_down(math.nan))


@given(st.floats(0, 1e308), st.integers(-2000, 2000))
def test_scaling_a_bound_keeps_its_side(x, k):
    exact = Fraction(x) * Fraction(2) ** k
    low, high = rounding.scaled_down(x, k), rounding.scaled_up(x, k)
    assert Fraction(low) <= exact
    assert math.isinf(high) or exact <= Fraction(high)
    assert low == 0 or low >= SMALLEST
    assert high == 0 or high >= SMALLEST
    if SMALLEST <= exact <= sys.float_info.max and x >= SMALLEST:
        assert low == high == math.ldexp(x, k)


@given(st.integers(1, 10**9))
def test_gamma_is_rounded_up(k):
    u = Fraction(1, 2**53)
    exact = k * u / (1 - k * u)
    assert exact <= Fraction(rigor.gamma(k)) <= exact * (1 + 8 * u)


@given(st.lists(st.floats(0, 1e300), max_size=9))
def test_sums_are_rounded_up(terms):
    exact = sum(map(Fraction, terms), Fraction(0))
    found = Fraction(rounding.sum_up(*terms))
    assert exact <= found <= exact * (1 + Fraction(4 * len(terms), 2**53)) + len(terms) * Fraction(2) ** -1018


def test_the_constants_of_the_model():
    assert math.ulp(1.0) / 2 == rounding.UNIT
    assert rounding.TINY == 4 * SMALLEST == 4 * sys.float_info.min
    assert rounding.scaled_down(1.0, -1022) == rounding.scaled_up(1.0, -1022) == SMALLEST
    assert (rounding.scaled_down(1.9, -1023), rounding.scaled_up(0.5, -1023)) == (0.0, SMALLEST)
    assert (rounding.scaled_down(0.0, 9), rounding.scaled_up(0.0, 9)) == (0.0, 0.0)
    assert rounding.scaled_down(1.0, 1024) == sys.float_info.max
    assert rounding.scaled_up(1.0, 1024) == math.inf
    k = torch.arange(-1022, 1024)
    assert rounding.power_of_two(k).tolist() == [2.0**j for j in k.tolist()]


# --- Tensors ----------------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-2044, 2046))
def test_scaled_is_exact_where_it_can_be(x, k):
    exact = Fraction(x) * Fraction(2) ** k
    found = float(rounding.scaled(number(x), k))
    if abs(exact) > Fraction(sys.float_info.max):
        assert found in (math.inf, -math.inf)
    elif abs(exact) >= SMALLEST:
        assert Fraction(found) == exact
    else:
        assert abs(Fraction(found) - exact) <= SMALLEST


def test_scaled_is_exact_where_operands_are_flushed():
    x = torch.tensor([5e-324, -3e-310, 0.0, -0.0, 2.0**-1022, 1.0, -1e300], dtype=torch.float64)
    k = torch.tensor([1074, 1500, 3, 3, 1022, -1022, 4])
    expected = rounding.scaled(x, k)
    with flushing():
        found = rounding.scaled(x, k)
        tiny = rounding.has_subnormal(x), rounding.has_subnormal(x[2:])
    assert torch.equal(found, expected)
    assert found[0] == 1.0
    assert tiny == (True, False)


def test_widened_ends_hold_and_are_normal():
    x = torch.tensor([5e-324, -3e-310, 0.0, 2.0**-1022, -1.0], dtype=torch.float64)
    with flushing():
        low, high = rounding.widened(x)
    assert low.tolist() == [0.0, -SMALLEST, 0.0, SMALLEST, -1.0]
    assert high.tolist() == [SMALLEST, 0.0, 0.0, SMALLEST, -1.0]


def test_zeros_and_normal_numbers_are_not_subnormal():
    x = torch.tensor([0.0, -0.0, SMALLEST, -SMALLEST, 1.0, math.inf], dtype=torch.float64)
    assert not rounding.has_subnormal(x)
    low, high = rounding.widened(x)
    assert low is high is x
    for tiny in (5e-324, -5e-324, SMALLEST - 5e-324, 5e-324 - SMALLEST):
        assert rounding.has_subnormal(torch.cat([x, number([tiny])]))
    low, high = rounding.widened(torch.cat([x, number([5e-324])]))
    assert torch.equal(low[:-1], x)
    assert torch.equal(high[:-1], x)


def test_subnormal_numbers_are_scaled_beside_others():
    x = torch.tensor([5e-324, -1e-310, 3.0, 0.0], dtype=torch.float64)
    for k in (-2044, -1, 0, 1, 500, 2046):
        exact = [Fraction(t) * Fraction(2) ** k for t in x.tolist()]
        for found, true in zip(rounding.scaled(x, k).tolist(), exact, strict=True):
            if math.isinf(found):
                assert abs(true) > Fraction(sys.float_info.max)
            elif abs(true) >= SMALLEST:
                assert Fraction(found) == true
            else:
                assert abs(Fraction(found) - true) < SMALLEST


# --- Input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        ([[1.0]], TypeError, "B is a list; a torch.Tensor is needed"),
        *(
            (torch.ones(2, 2, dtype=dtype), TypeError, rf"B is {dtype}; .* \(cast with B.double\(\)")
            for dtype in (torch.float16, torch.float32, torch.int64, torch.complex128)
        ),
        (torch.ones(3, dtype=torch.float64), ValueError, r"B has shape \(3,\); a matrix \(n, m\)"),
        (torch.ones(1, 2, 3, dtype=torch.float64), ValueError, r"B has shape \(1, 2, 3\)"),
        (torch.ones(0, 2, dtype=torch.float64), ValueError, r"B has shape \(0, 2\)"),
        (torch.ones(2, 0, dtype=torch.float64), ValueError, r"B has shape \(2, 0\)"),
        *(
            (torch.tensor([[1.0, bad]], dtype=torch.float64), ValueError, "B holds NaN or infinity")
            for bad in (math.nan, math.inf, -math.inf)
        ),
    ],
)
def test_what_is_no_matrix_is_refused(unchecked, A, error, message):
    with pytest.raises(error, match=message):
        rounding.checked(A, "B")


def test_a_matrix_comes_back_outside_autograd():
    A = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    assert not rounding.checked(A).requires_grad
    assert torch.equal(rounding.checked(A), A.detach())
