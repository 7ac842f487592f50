"""One formula on three kinds of numbers: the measured value and the exact one lie in the certified interval."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.rigor import formulas
from companion.rigor.formulas import lower, maximum, minimum, number, upper
from companion.rigor.intervals import Interval, point

F64 = torch.float64
positive = st.floats(1e-3, 1e3)


def theorem_c(w, phi, alpha_0, R_0, C, epsilon):
    """Theorem C: alpha, the rate, and how far the radii C are above those that are needed."""
    bar = [w_l + C_l for w_l, C_l in zip(w, C, strict=True)]
    d, phi_bar = 0, [phi[0]]
    for l in range(len(w) - 1):
        d = d * bar[l] + phi[l] * C[l]
        phi_bar.append(phi[l + 1] + d)
    g = [phi_bar[l] * math.prod(bar[l + 1 :]) for l in range(len(w) - 1)]
    alpha = alpha_0 - d
    rho = (1 - epsilon) * alpha**2 - sum(x**2 for x in g)
    T = [x * R_0 / rho for x in (*g, alpha)]
    return alpha, rho, [c - t for t, c in zip(T, C, strict=True)]


def holds(alpha, rho, room):
    return lower(alpha) > 0 and lower(rho) > 0 and min(map(lower, room)) >= 0


def at(level, *parts):
    return [[number(t, level) for t in part] if isinstance(part, list) else number(part, level) for part in parts]


@given(st.lists(positive, min_size=3, max_size=3), st.lists(positive, min_size=3, max_size=3), positive, positive)
def test_theorem_c_at_three_levels(w, phi, alpha_0, R_0):
    C = [t / 1000 for t in w]
    data = (w, phi, 10 * alpha_0, R_0 / 1e4, C, 0.25)
    measured, certified, exact = (theorem_c(*at(level, *data)) for level in ("measured", "certified", "exact"))
    flat = ([alpha, rho, *room] for alpha, rho, room in (measured, certified, exact))
    for m, c, e in zip(*flat, strict=True):
        if not math.isnan(lower(c)):  # a rate of unknown sign divides
            assert Fraction(lower(c)) <= e <= Fraction(upper(c))
            assert lower(c) <= upper(m) <= upper(c) or math.isinf(upper(m))
    assert holds(*exact) or not holds(*certified)


def test_theorem_c_holds_somewhere_and_is_sharp():
    data = ([1.0, 2.0], [1.0, 3.0], 100.0, 1.0, [0.01, 0.5], 0.25)
    measured, certified, exact = (theorem_c(*at(level, *data)) for level in ("measured", "certified", "exact"))
    assert holds(*measured)
    assert holds(*certified)
    assert holds(*exact)
    assert upper(certified[1]) / lower(certified[1]) - 1 < 1e-14
    touching = ([0.0], [1.0], 2.0, 1.0, [0.5 / 0.75], 0.25)  # T = 1 / (0.75 * 2), against C = 0.666...
    assert holds(*theorem_c(*at("exact", *touching))) is (Fraction(2, 3) <= Fraction(0.5 / 0.75))
    assert not holds(*theorem_c(*at("certified", *touching)))


def test_a_batch_is_answered_at_once():
    w = torch.tensor([1.0, 1.5], dtype=F64)
    batch = ([w, 2 * w], [w, 3 * w], 100 * w, w, [0.01 * w, 0.5 * w], 0.25)
    one = [[t[1] for t in part] if isinstance(part, list) else part for part in batch]
    one[2:4] = batch[2][1], batch[3][1]
    for level in ("measured", "certified"):
        rates, rate = theorem_c(*at(level, *batch))[1], theorem_c(*at(level, *one))[1]
        assert lower(rates[1]) == lower(rate) > 0
        assert lower(rates[0]) != lower(rate)


@given(st.fractions(0, 1000))
def test_roots_of_squares(x):
    assert formulas.sqrt(x * x) == x


def test_functions_agree_on_their_common_numbers():
    for name in ("exp", "expm1", "log", "sqrt"):
        function = getattr(formulas, name)
        exact = Fraction(1) if name in ("log", "sqrt") else Fraction(0)
        measured, certified = function(number(exact, "measured")), function(number(exact, "certified"))
        assert float(measured) == function(exact)
        assert lower(certified) <= float(measured) <= upper(certified)
        x = number(0.7, "measured")
        enclosed = function(number(0.7, "certified"))
        assert lower(enclosed) <= float(function(x)) <= upper(enclosed)
        with pytest.raises(TypeError, match="is no fraction"):
            function(Fraction(2, 3))
    with pytest.raises(ValueError, match="x is -1"):
        formulas.sqrt(Fraction(-1))


def test_larger_and_smaller():
    x, y = number(1.5, "measured"), number(2.5, "measured")
    assert float(maximum(x, y)) == 2.5
    assert float(minimum(x, 1)) == 1.0
    assert float(maximum(3, x)) == 3.0
    assert maximum(Fraction(1, 3), 0) == Fraction(1, 3)
    assert minimum(Fraction(1, 3), 0) == 0
    wide = Interval(torch.tensor(1.0, dtype=F64), torch.tensor(2.0, dtype=F64))
    assert float(maximum(wide, Fraction(3, 2)).lo) == 1.5
    assert float(minimum(3, wide).hi) == 2.0
    with pytest.raises(TypeError):
        wide < 3  # noqa: B015


def test_numbers_and_floats_outside_a_fraction(unchecked):
    third = Fraction(1, 3)
    assert Fraction(lower(third)) < third < Fraction(upper(third))
    assert upper(point(0.1)) == lower(point(0.1)) == 0.1
    with pytest.raises(ValueError, match="level is 'sure'"):
        number(1.0, "sure")
    with pytest.raises(ValueError, match="a finite number is needed"):
        number(math.inf, "certified")
