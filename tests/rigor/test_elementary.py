"""The elementary functions against ball arithmetic of 200 bits, and the numbers of their proofs in exact rationals."""

import math
from fractions import Fraction

import pytest
import torch
from oracles import flushing

from companion.rigor import elementary
from companion.rigor.elementary import ERROR, ends
from companion.rigor.rounding import LARGEST, TINY, UNIT

flint = pytest.importorskip("flint")

F64 = torch.float64
U = Fraction(1, 2**53)
R = Fraction(3466, 10_000)
SOFT = {
    "exp": lambda x: x.exp(),
    "expm1": lambda x: x.expm1(),
    "tanh": lambda x: x.tanh(),
    "log": lambda x: x.log(),
    "log1p": lambda x: x.log1p(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softplus": lambda x: x.exp().log1p(),
}
LIMITS = {
    "exp": (-1000.0, 1000.0),
    "expm1": (-40.0, 1000.0),
    "tanh": (-40.0, 40.0),
    "sigmoid": (-1000.0, 40.0),
    "softplus": (-1000.0, math.inf),
}
FUNCTIONS = list(ERROR)
names = pytest.mark.parametrize("function", FUNCTIONS, ids=[f.__name__ for f in FUNCTIONS])


@pytest.fixture(autouse=True)
def bits():
    before, flint.ctx.prec = flint.ctx.prec, 200
    yield
    flint.ctx.prec = before


def true(function, x):
    """The ball of 200 bits around ``f(x)``; beyond its `LIMITS` it is within ``0.05 u`` of its value there."""
    if function.__name__ == "softplus" and x > 700:
        return flint.arb(x) + (-flint.arb(x)).exp()  # log1p(e^-x) is e^-x to the last of 200 bits
    least, most = LIMITS.get(function.__name__, (-math.inf, math.inf))
    return SOFT[function.__name__](flint.arb(min(max(x, least), most)))


def arguments(function, count=40_000):
    """Numbers of all sizes in the domain: any exponent, next to 0, to 1, to multiples of log(2)/2, and the edges."""
    g = torch.Generator().manual_seed(7)

    def uniform(n, low, high):
        return low + (high - low) * torch.rand(n, generator=g, dtype=F64)

    n = count // 6
    any_size = (1 + uniform(n, 0, 1)) * torch.ldexp(
        torch.ones(n, dtype=F64), torch.randint(-1074, 1024, (n,), generator=g)
    )
    halves = torch.round(uniform(n, -1080, 1030)) * math.log(2) / 2
    near_half = halves + halves.abs() * torch.randint(-4, 5, (n,), generator=g) * 2.0**-53
    edges = [
        0.0,
        -0.0,
        5e-324,
        2.0**-1022,
        1.0,
        709.0,
        709.7,
        709.78,
        709.79,
        710.0,
        745.13,
        745.2,
        746.0,
        1e300,
        LARGEST,
    ]
    edges = torch.tensor(edges, dtype=F64)
    if function.__name__ in ("log", "log1p"):
        near_one = 1 + uniform(n, -1, 1) * 2.0 ** torch.randint(-52, 0, (n,), generator=g)
        parts = [any_size, uniform(2 * n, 0, 3), near_one, edges, 2.0 ** torch.round(uniform(200, -1022, 1023))]
        x = torch.cat([*parts, uniform(n, 1, 1e5)])
        if function.__name__ == "log":
            return x[x > 0]
        small = any_size * uniform(n, -1, 1).sign()
        near_edges = torch.tensor([-0.2928, -0.29279, 0.4142, 0.41419], dtype=F64)
        x = torch.cat([x, small, uniform(2 * n, -1, 1), near_edges, x - 1])
        return x[x > -1]
    sign = uniform(n, -1, 1).sign()
    return torch.cat(
        [any_size * sign, near_half, uniform(n, -750, 712), uniform(2 * n, -2, 2), uniform(n, -30, 30), edges, -edges]
    )


def largest_error(function, x, values):
    """The largest error in units of u, less TINY, after a check of every value against its bound."""
    worst = 0.0
    bound = Fraction(ERROR[function])
    limit = flint.arb(flint.fmpq(bound.numerator, bound.denominator))
    for a, v in zip(x.tolist(), values.tolist(), strict=True):
        exact = true(function, a)
        if math.isinf(v):
            assert v > 0
            assert exact * (1 + limit) >= flint.arb(LARGEST), a
            continue
        error = abs(flint.arb(v) - exact)
        assert error <= limit * abs(exact) + flint.arb(TINY), (a, v)
        if abs(exact) > flint.arb(2.0**-900):
            worst = max(worst, float((error / abs(exact)).upper()) / UNIT)
    return worst


@names
def test_the_proved_error_holds_and_is_not_far_off(function):
    x = arguments(function)
    worst = largest_error(function, x, function(x))
    assert len(x) > 30_000
    assert ERROR[function] / UNIT / 3 < worst  # the proof loses less than a factor 3


@names
def test_the_error_holds_where_small_numbers_are_flushed(function):
    x = arguments(function, 3000)
    with flushing():
        values = function(x)
    largest_error(function, x, values)


@names
def test_intervals_hold_the_values_at_both_ends(function):
    lo = arguments(function, 3000)
    hi = lo + lo.abs() * 1e-9
    low, high = ends(function, lo, hi)
    for a, b, f, g in zip(lo.tolist(), hi.tolist(), low.tolist(), high.tolist(), strict=True):
        assert flint.arb(f) <= true(function, a), a
        if math.isfinite(b) and math.isfinite(g):
            assert true(function, b) <= flint.arb(g), b
    finite = (lo.abs() < 700) & (hi.abs() > 1e-300)
    low, high = ends(function, lo[finite], lo[finite])
    assert bool((high - low <= (2 * ERROR[function] + 8 * UNIT) * torch.maximum(low.abs(), high.abs()) + 1e-300).all())


@names
def test_unbounded_intervals_and_numbers_outside_the_domain(function):
    infinite = torch.tensor([math.inf], dtype=F64)
    positive = function.__name__ in ("log", "log1p")
    low, high = ends(function, torch.tensor([0.0], dtype=F64) if positive else -infinite, infinite)
    limits = {
        "exp": (0, math.inf),
        "expm1": (-1, math.inf),
        "tanh": (-1, 1),
        "sigmoid": (0, 1),
        "softplus": (0, math.inf),
    }
    least, most = limits.get(function.__name__, (0 if function.__name__ == "log1p" else -math.inf, math.inf))
    assert least - 1e-300 <= float(low) <= least + 1e-16
    assert float(high) == most
    assert math.isnan(float(function(torch.tensor([math.nan], dtype=F64))))
    if positive:
        edge = 0.0 if function.__name__ == "log" else -1.0
        found = function(torch.tensor([edge, edge - 0.5, -math.inf, math.inf], dtype=F64)).tolist()
        assert found[0] == -math.inf
        assert math.isnan(found[1])
        assert math.isnan(found[2])
        assert found[3] == math.inf


def test_a_lower_end_is_never_infinite():
    x = torch.tensor([709.79, 1e4], dtype=F64)
    low, high = ends(elementary.exp, x, x)
    assert bool((low <= LARGEST).all())
    assert bool((high == math.inf).all())
    low, high = ends(elementary.log, torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64))
    assert float(low) == -math.inf
    assert -LARGEST <= float(high) <= -LARGEST * (1 - 1e-14)


# --- The numbers of the proofs ----------------------------------------------------------------------------------------


def rational(end):
    mantissa, exponent = end.man_exp()
    return Fraction(int(mantissa)) * Fraction(2) ** int(exponent)


def at_least(ball):
    return rational(ball.upper())


def at_most(ball):
    return rational(ball.lower())


def test_log_two_is_split_as_the_proof_says():
    high = Fraction(elementary.LN2_HI)
    assert (high * 2**32).denominator == 1
    assert (high * 2**32) < 2**32
    rest = flint.arb.const_log2() - flint.arb(elementary.LN2_HI)
    low = Fraction(elementary.LN2_LO)
    assert max(abs(low - at_least(rest)), abs(low - at_most(rest))) <= U * low
    assert 1077 * (low * 3 * U) < Fraction(7, 10**7) * U
    # x / log 2 is computed within 1e-12 for |x| <= 746, so that |r| is below log(2)/2 + 1e-12
    assert at_least(flint.arb.const_log2() / 2) + Fraction(1, 10**12) < R


def terms():
    """The polynomial of exp, with exact coefficients, and the bound on its evaluation in units of u."""
    exact = [Fraction(1, math.factorial(j + 2)) for j in range(13)]
    assert all(abs(Fraction(c) - e) <= U * e for c, e in zip(elementary._EXP, exact, strict=True))
    q = sum(c * R**j for j, c in enumerate(exact))
    horner = Fraction(1, 2) + sum((2 * j + 2) * c * R**j for j, c in enumerate(exact) if j)
    return q, horner, R**2 * (2 * q + horner)


def test_the_polynomial_of_exp_is_as_near_as_the_proof_says():
    remainder = R**15 / math.factorial(15) / (1 - R / 16)
    assert remainder < U / 1000
    q, horner, error = terms()
    assert q < Fraction(5632, 10_000)
    assert horner < Fraction(765, 1000)
    assert error < Fraction(2274, 10_000)
    # the remainder, seen from outside: e^r - 1 less the exact polynomial, at rationals
    for i in range(-20, 21):
        r = R * i / 20
        p = r + r**2 * sum(Fraction(1, math.factorial(j + 2)) * r**j for j in range(13))
        ball = flint.arb(flint.fmpq(r.numerator, r.denominator)).expm1()
        assert max(abs(at_least(ball) - p), abs(at_most(ball) - p)) <= remainder


def errors_of_exp(r):
    """What the proof allows s and r to err by, ``|e^r - 1| + A + e^r |r|`` in u, at a rational r, and ``e^r``."""
    e = at_least(flint.arb(flint.fmpq(r.numerator, r.denominator)).exp())
    return abs(e - 1) + Fraction(2274, 10_000) * (abs(r) / R) ** 2 + e * abs(r), e


def test_the_constants_of_exp_expm1_and_tanh():
    slack = Fraction(1, 100)  # the remainder and everything of first order
    grid = [R * i / 50 for i in range(-50, 51)]
    exp = max(1 + errors_of_exp(r)[0] / errors_of_exp(r)[1] for r in grid)
    assert exp + slack < Fraction(ERROR[elementary.exp]) / U
    near = max(
        1 + Fraction(2274, 10_000) * (abs(r) / R) ** 2 / abs(errors_of_exp(r)[1] - 1) for r in grid if r
    )  # k = 0, where r = x
    expm1, tanh = near, Fraction(0)
    for k in range(-60, 60):
        for r in grid:
            D, e = errors_of_exp(r)
            H = Fraction(2) ** k
            T = H * e - 1
            if k == 0:
                continue
            rounded = Fraction(float(H - 1))
            error = (H * D + abs(rounded - (H - 1)) / U) / abs(T) + 1
            expm1 = max(expm1, error)
            if k < 0:
                tanh = max(tanh, 2 / (2 + T) * error + 2)
    edge = at_most((-flint.arb(flint.fmpq(R.numerator, R.denominator))).exp()) - 1
    tanh = max(tanh, 2 / (2 + edge) * near + 2)
    assert expm1 + slack < Fraction(ERROR[elementary.expm1]) / U < expm1 + 1
    assert tanh + slack < Fraction(ERROR[elementary.tanh]) / U < tanh + 1
    beyond = at_least((flint.arb(-40)).exp()) * 2  # 1 - tanh(20)
    assert 2 * Fraction(3, 2) + 2 + beyond / U < Fraction(ERROR[elementary.tanh]) / U


def test_the_polynomial_and_the_constant_of_log():
    S = Fraction(17158, 100_000)  # |f| / (2 + f) for 1 + f between the roots of 1/2 and 2
    assert at_least((flint.arb(2).sqrt() - 1) / (flint.arb(2).sqrt() + 1)) < S
    exact = [Fraction(2, 2 * j + 3) for j in range(10)]
    assert all(abs(Fraction(c) - e) <= U * e for c, e in zip(elementary._LOG, exact, strict=True))
    z = S**2
    remainder = S * 2 * z**11 / 23 / (1 - z)
    assert remainder < Fraction(2, 1000) * U
    P = sum(c * z ** (j + 1) for j, c in enumerate(exact))
    P_error = sum((7 * (j + 1) + 2) * c * z ** (j + 1) for j, c in enumerate(exact))
    f = at_least(flint.arb(2).sqrt() - 1)
    h = f**2 / 2
    inner = h + P_error + (h + P)  # of h + P
    product = S * (inner + 3 * (h + P))
    outer = h + product + S * (h + P) + h
    assert P_error < Fraction(94, 10) * P
    assert outer < Fraction(31, 100)
    half = at_most(flint.arb(2).log() / 2)
    slack = Fraction(2, 100)  # the remainder, k LO + rest, and everything of first order
    assert 1 + (outer + half) / half + slack < Fraction(ERROR[elementary.log]) / U
    assert 1 + outer / half + slack < Fraction(ERROR[elementary.log]) / U
    # the identity behind it: log(1 + f) = f - (h - s (h + P)), as power series are compared at a rational
    for t in (Fraction(1, 3), Fraction(-1, 4)):
        s, h = t / (2 + t), t**2 / 2
        P = sum(Fraction(2, 2 * j + 1) * s ** (2 * j) for j in range(1, 40))
        ball = flint.arb(flint.fmpq(t.numerator, t.denominator)).log1p()
        assert abs(t - (h - s * (h + P)) - at_least(ball)) < Fraction(1, 10**40)


def test_no_function_of_the_library_is_called(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a library function was called")

    for name in ("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "pow", "logaddexp"):
        monkeypatch.setattr(torch, name, refuse)
        monkeypatch.setattr(torch.Tensor, name, refuse)
    x = torch.linspace(0.1, 3, 50, dtype=F64)
    for function in FUNCTIONS:
        assert bool(torch.isfinite(function(x)).all())
