"""Exact jets and elimination."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import networks
from companion.basins import exact

F64 = torch.float64


@given(st.integers(-6, 6), st.integers(2, 5))
@settings(max_examples=30)
def test_exact_jets_are_the_activations(k, b):
    angle = (Fraction(3, 5), Fraction(4, 5))
    for act in exact.EXACT_ACTIVATIONS:
        base, u = (angle, math.atan2(4, 3)) if act == "sin" else (Fraction(b, 3), math.log(b / 3))
        if base == 1:
            continue
        z, sigma = torch.tensor(k * u, dtype=F64), networks.activation(act)
        jet = exact.exact_jet(act, base, k)
        for stored, close in zip(jet, (sigma.value(z), sigma.derivative(z), sigma.second(z)), strict=True):
            assert float(stored) == pytest.approx(float(close), rel=1e-9, abs=1e-12)


def test_ldl_pivots():
    A = [[Fraction(2), Fraction(1)], [Fraction(1), Fraction(1)]]
    assert exact.ldl_pivots(A) == [2, Fraction(1, 2)]
    assert exact.ldl_pivots([[Fraction(1), Fraction(2)], [Fraction(2), Fraction(1)]]) == [1, -3]
