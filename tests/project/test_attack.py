"""A short slice of make attack, always the same one: nothing is false, and enough was looked at to say so."""

import itertools
import json

import attack
import numpy as np
import pytest
from attack import arithmetic, calls, certificates, enclosures

from companion import certificate


def slice_of(part, checks, cases, seed):
    """Run so many cases of each kind."""
    tally = attack.Tally()
    for i, (name, count) in enumerate(cases.items()):
        made = attack.search(
            part, {name: checks[name]}, np.random.default_rng([seed, i]), itertools.repeat(None, count)
        )
        for kind in ("trials", "told", "false"):
            getattr(tally, kind).update(getattr(made, kind))
        tally.violations += made.violations
    return tally


def nothing_false(tally):
    assert not tally.violations, json.dumps(tally.violations[0], indent=1)
    assert not +tally.false


ARITHMETIC = {"matrix": 60, "product": 60, "symmetric": 150, "layer": 40, "curved": 40, "image": 8, "intervals": 8,
              "functions": 12, "number": 10, "network": 12}  # fmt: skip


def test_every_bound_of_the_arithmetic_is_true():
    tally = slice_of("arithmetic", arithmetic.CHECKS | enclosures.CHECKS, ARITHMETIC, seed=1)
    nothing_false(tally)
    assert set(ARITHMETIC) == set(arithmetic.CHECKS | enclosures.CHECKS)
    assert sum(tally.told.values()) > 20_000
    idle = [name for name in tally.trials if tally.told[name] < max(3, tally.trials[name] / 4)]
    assert not idle  # of every kind of bound, at least a quarter said something


CERTIFICATES = {"theorem-c": 20, "counting": 60, "zero-loss": 20, "module": 60, "no-basin": 150, "full-rank": 30,
                "minimum": 30, "road": 15}  # fmt: skip


def test_what_every_certificate_promises_is_true():
    tally = slice_of("certificates", certificates.CHECKS, CERTIFICATES, seed=1)
    nothing_false(tally)
    assert set(CERTIFICATES) == set(certificates.CHECKS)
    held = {name: n for name, n in tally.told.items() if name.endswith(": held")}
    assert len(held) == 11
    assert min(held.values()) >= 3
    assert all(tally.told[name] >= 2 for name in tally.trials)  # and of every promise


@pytest.mark.usefixtures("unchecked")
def test_bad_input_never_meets_an_error_from_inside():
    functions = set(calls.BASELINES) - calls.STILL_RAW
    draw = attack.Check(calls.Draw(functions), calls.see_call)
    tally = attack.search("calls", {"call": draw}, np.random.default_rng(1), itertools.repeat(None, 300))
    nothing_false(tally)
    assert sum(tally.trials.values()) > 500  # each call, and its inputs afterwards
    assert sum(tally.told.values()) > 400


@pytest.mark.usefixtures("unchecked")
def test_every_public_function_is_called_with_arguments_that_it_takes():
    assert not calls.unknown()
    assert not [name for name in calls.BASELINES if calls.resolve(name) is None]
    assert not list(calls.baselines_that_fail())


# --- The search itself finds what is false ----------------------------------------------------------------------------


def test_a_bound_that_is_false_is_found_cut_down_stored_and_replayed(monkeypatch, tmp_path):
    monkeypatch.setattr(attack, "FOLDER", tmp_path)
    true = arithmetic.rigor.Interval.exp

    def too_narrow(x):
        middle, _ = true(x).split()
        return arithmetic.rigor.Interval(middle, middle)

    check = {"functions": arithmetic.CHECKS["functions"]}
    with monkeypatch.context() as patch:
        patch.setattr(arithmetic.rigor.Interval, "exp", too_narrow)
        tally = attack.search("arithmetic", check, np.random.default_rng(0), itertools.repeat(None, 1))
        (path,) = attack.write(tally.violations, "test")
        case = json.loads(path.read_text(encoding="utf-8"))
        arguments = attack.decode(case["arguments"])
        assert len(arguments["a"]) == 1
        assert attack.attempt(attack.Tally(), "arithmetic", "functions", check["functions"], arguments)
    assert not attack.attempt(attack.Tally(), "arithmetic", "functions", check["functions"], arguments)


def test_a_certificate_that_promises_too_much_is_found(monkeypatch):
    certify = certificates.training.width_bounds.certify

    def generous(*args, **kwargs):
        found = certify(*args, **kwargs)
        quantities = {k: 1.01 * v if k == "rho" else v for k, v in found.quantities.items()}
        return certificate.replace(found, quantities=quantities, members=()) if found.holds else found

    monkeypatch.setattr(certificates.training.width_bounds, "certify", generous)
    check = {"theorem-c": certificates.CHECKS["theorem-c"]}
    tally = attack.search("certificates", check, np.random.default_rng(0), itertools.repeat(None, 12))
    assert tally.false["Theorem C: rho"] > 0


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda X: 1, "answer"),
        (lambda X: 1 / 0, "raw"),
        (lambda X: attack.decode({"tensor": "no such dtype", "shape": [], "numbers": []}), "raw"),
        (lambda X: certificate.compare("x", 1, "<", 2, status="X"), "clear"),
        (lambda X: certificate.compare("x", 1, "<", 2, status="other"), "unnamed"),
    ],
)
def test_a_call_is_told_from_its_error(function, kind):
    assert calls.call(function, {"X": 1}, "X")[0] == kind


def test_a_call_that_never_ends_is_slow(monkeypatch):
    monkeypatch.setattr(calls, "ALARM", 0.05)
    assert calls.call(lambda X: [None for _ in itertools.count() if False], {"X": 1}, "X")[0] == "slow"


def test_numbers_survive_a_file():
    arguments = {"A": arithmetic.numbers(np.random.default_rng(0), 3, 4, kind="subnormal"), "k": [1, 0.1], "s": None}
    back = attack.decode(json.loads(json.dumps(attack.encode(arguments))))
    assert back["A"].equal(arguments["A"])
    assert back["k"] == [1, 0.1]
    assert back["s"] is None
