"""The interval standard's own cases: every result holds the tight one, and is at most a few last places wider."""

import math
import operator
from pathlib import Path

import pytest
import torch

from companion.rigor.formulas import maximum, minimum
from companion.rigor.intervals import Interval

F64 = torch.float64
CASES = [
    line
    for line in (Path(__file__).parent / "itf1788" / "cases.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
ONE = {
    "neg": operator.neg,
    "abs": abs,
    "recip": lambda x: 1 / x,
    "sqr": lambda x: x.square(),
    "sqrt": lambda x: x.sqrt(),
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "tanh": lambda x: x.tanh(),
}
TWO = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "min": minimum,
    "max": maximum,
}


def interval(low, high):
    return Interval(torch.tensor(low, dtype=F64), torch.tensor(high, dtype=F64))


def read(line):
    """``(operation, operands, exponent, result)`` of one case."""
    left, right = line.split(" = ")
    name, *numbers = left.split()
    exponent = int(numbers.pop()) if name == "pown" else None
    ends = [float(n) for n in numbers]
    return name, [interval(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)], exponent, right.split()


def evaluate(name, operands, exponent):
    if name == "pown":
        return operands[0] ** exponent
    return (ONE | TWO)[name](*operands)


def undefined_somewhere(name, operands, exponent):
    divisor = operands[-1]
    divides = name in ("div", "recip") or (name == "pown" and exponent < 0)
    return divides and bool((divisor.lo <= 0) & (divisor.hi >= 0))


@pytest.mark.parametrize("name", sorted({line.split()[0] for line in CASES}))
def test_the_cases_of_the_standard(name):
    tried = 0
    for line in (line for line in CASES if line.split()[0] == name):
        _, operands, exponent, result = read(line)
        found = evaluate(name, operands, exponent)
        tried += 1
        low, high = float(found.lo), float(found.hi)
        if undefined_somewhere(name, operands, exponent):
            assert math.isnan(low), line
            assert math.isnan(high), line
            continue
        if result == ["empty"]:  # the root or logarithm of negative numbers alone
            assert not low <= high, line
            continue
        least, most = (float(end) for end in result)
        assert low <= least, line
        assert most <= high, line
        places = 4 * max(1, abs(exponent or 1)) + (8 if name in ("exp", "log", "tanh") else 0)
        assert least - low <= places * 2.0**-52 * abs(least) + 1e-300 or low == -math.inf or least == math.inf, line
        assert high - most <= places * 2.0**-52 * abs(most) + 1e-300 or high == math.inf or most == -math.inf, line
    assert tried >= 10


def test_most_cases_are_defined_and_bounded():
    cases = [read(line) for line in CASES]
    assert len(cases) == 773
    defined = [c for c in cases if not undefined_somewhere(*c[:3]) and c[3] != ["empty"]]
    assert len(defined) > 450


def test_an_undefined_quotient_is_never_a_number_again():
    lost = 1 / interval(-1.0, 1.0)
    later = [lost.tanh(), lost.exp(), lost.clamp(0.0, 1.0), lost.maximum(0), lost * 0, lost - lost, lost**2, lost**0]
    for found in (*later, abs(lost), 1 / lost, lost.sqrt(), lost.log()):
        assert math.isnan(float(found.lo)), found
        assert math.isnan(float(found.hi)), found
