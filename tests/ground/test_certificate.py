"""The certificate never claims more than was shown, and its three printed forms say the same."""

import html.parser
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.certificate import (
    STATUSES,
    Assumption,
    Certificate,
    assumed,
    compare,
    plain,
    show,
)
from companion.lab.claims import ClaimFailed, Claims

numbers = st.floats(allow_nan=True, allow_infinity=True)


def example(**changes):
    assumptions = (compare("alpha_0 > 0", 0.5, ">", 0, "certified"), compare("n >= N", 100, ">=", 20), assumed("GD"))
    fields = {"theorem": "Theorem C", "holds": True, "assumptions": assumptions, "quantities": {"rho": 0.125}}
    return Certificate(**(fields | changes))


class Balanced(html.parser.HTMLParser):
    """Every tag opened is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@given(numbers, st.sampled_from(["<", "<=", ">", ">=", "=", "is"]), numbers)
def test_compare_is_the_comparison_and_nan_never_holds(a, relation, b):
    expected = {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "=": a == b, "is": a == b}[relation]
    line = compare("x", a, relation, b)
    assert line.holds is expected
    assert not compare("x", math.nan, relation, b).holds
    assert not compare("x", a, relation, math.nan).holds
    assert not compare("x", torch.tensor(math.nan), relation, b).holds


def test_a_certificate_with_a_failed_assumption_cannot_hold():
    with pytest.raises(ValueError, match="although an assumption does not hold"):
        example(assumptions=(compare("a", math.nan, "<", 1),))
    with pytest.raises(ValueError, match="needs a reason"):
        example(holds=False)
    refused = example(holds=False, reason="too_narrow: n is 5", assumptions=(compare("n >= N", 5, ">=", 20),))
    assert not refused
    assert refused.verdict() == "not shown: too_narrow: n is 5"
    assert "NOT SHOWN" in str(refused)
    assert "NOT SHOWN" in refused._repr_html_()


def test_status_is_the_weakest_that_could_be_checked():
    assert example().status == "measured"
    assert example().verdict() == "holds in floating point"
    lines = {s: compare(s, 1, "=", 1, s) for s in STATUSES[1:]}
    assert example(assumptions=(lines["exact"], lines["certified"], assumed("GD"))).verdict() == "certified"
    assert example(assumptions=(lines["exact"],)).verdict() == "exact"
    assert example(assumptions=(assumed("GD"),)).verdict() == "holds if the assumptions do"
    with pytest.raises(ValueError, match="status is 'proved'"):
        Assumption("a", 1, "<", 2, "proved", True)
    with pytest.raises(ValueError, match="relation is '!='"):
        compare("a", 1, "!=", 2)


def test_print_shows_every_line_once():
    text = str(example())
    assert text.splitlines()[0] == "Theorem C: holds in floating point"
    assert text.count("alpha_0 > 0") == text.count("rho = 0.125") == 1
    assert len({line.index("  ", 4) > 0 for line in text.splitlines()[1:4]}) == 1
    assert "≥ 20" in text
    assert repr(example()) == text
    table = Balanced(example()._repr_html_())
    assert table.tags.count("tr") == 4
    assert "≥ 20" in table.text


def test_html_escapes_everything():
    evil = "<script>alert('&')</script>"
    line = compare(evil, evil, "is", evil)
    page = example(theorem=evil, assumptions=(line,), quantities={evil: evil})._repr_html_()
    page += example(holds=False, reason=evil)._repr_html_()
    table = Balanced(page)
    assert "<script" not in page
    assert "script" not in table.tags
    assert table.text.count(evil) == 7
    claims = Claims("x")
    claims.check(evil, 1, "<", 2)
    bundle = claims._repr_mimebundle_()
    assert "<script" not in bundle["text/html"]
    assert evil in Balanced(bundle["text/html"]).text


@given(numbers, numbers)
def test_json_is_strict_and_keeps_every_field(a, b):
    quantities = {"t": torch.tensor([a, b], dtype=torch.float64), "n": np.float64(a), "m": (1, None, True), "r": b}
    certificate = example(quantities=quantities, members=(example(),))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads(certificate.to_json(), parse_constant=refuse)
    assert stored == certificate.to_dict()
    assert stored["holds"] is True
    assert stored["status"] == "measured"
    assert stored["theorem"] == "Theorem C"
    assert [line["name"] for line in stored["assumptions"]] == ["alpha_0 > 0", "n >= N", "GD"]
    assert stored["members"][0]["quantities"] == {"rho": 0.125}
    assert stored["quantities"]["m"] == [1, None, True]
    assert stored["quantities"]["r"] == (b if math.isfinite(b) else str(b))
    assert stored["quantities"]["t"][0] == (a if math.isfinite(a) else str(a))


def test_members_are_counted():
    bad = example(holds=False, reason="too_narrow")
    both = example(holds=False, reason="1 of 2", members=(example(), bad))
    assert both.verdict() == "not shown (1 of 2 networks): 1 of 2"
    assert example(members=(example(), example())).verdict() == "holds in floating point (2 of 2 networks)"


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 5))
def test_a_bound_holds_as_it_is_printed(value, digits):
    down, near, up = (float(show(value, digits, side)) for side in ("down", "", "up"))
    assert down <= value <= up
    assert near in (down, up)
    assert up - down <= 10.0 ** (1 - digits) * abs(value) * (1 + 1e-9) or not math.isfinite(up)


def test_what_a_certificate_promises_is_printed_on_the_safe_side():
    rows = (compare("η", 2.2355e-06, "<=", 2.23999e-06), compare("n", 1000.5, ">=", 1000.2))
    cert = Certificate("T", True, rows, {"max_step": 2.23999e-06, "width": 1000.2, "other": 1.9999})
    assert "2.236e-06  ≤ 2.239e-06" in str(cert)
    assert "1000.5     ≥ 1000.2" in str(cert)
    assert "max_step = 2.23e-06" in str(cert)
    assert "width = 1.01e+03" in str(cert)
    assert "other = 2" in str(cert)


def test_a_line_that_holds_reads_as_one_that_holds():
    cert = Certificate("T", True, (compare("Q*", 18.4632, "<=", 18.4671), compare("x", 1.0, "<", 1.0 + 2.0**-52)))
    (_, found, needed, *_), (_, one, more, *_) = cert.rows()
    assert (found, needed) == ("18.46", "≤ 18.46")
    assert float(one) < float(more[2:])
    assert Certificate("T", False, (compare("Q*", 18.468, "<=", 18.4671),), {}, "x").rows()[0][1:3] == (
        "18.5",
        "≤ 18.4",
    )


def test_the_first_line_says_what_was_gained():
    cert = Certificate("T", True, (compare("a", 1, "<", 2, "certified"),), says="within 2.3 of the infimum")
    assert str(cert).startswith("T: certified: within 2.3 of the infimum")


def test_show():
    assert show(None) == "–"
    assert (show(True), show(False)) == ("yes", "no")
    assert show(1234567) == "1234567"
    assert show(0.0) == show(-0.0) == "0"
    assert show(1 / 3) == "0.333"
    assert show(1 / 3, digits=5) == "0.33333"
    assert show(math.inf) == "inf"
    assert show(torch.tensor([1.0, 2.5])) == "(1, 2.5)"
    assert show(np.arange(10)) == "(0, 1, 2, 3, 4, 5, 6, 7, …)"
    assert show("text") == "text"
    assert plain({1: torch.tensor(2)}) == {"1": 2}
    assert plain(torch.float64) == "torch.float64"


def test_claims_keep_passing_rows_and_raise_on_failing_ones():
    claims = Claims("01-width-bounds")
    claims.check("the curve lies below", torch.tensor(0.5), "<=", 2.0, "certified")
    claims.check("the step is exact", 3, "=", 3, "exact")
    claims.check("the signs agree", torch.tensor([1, -1]), "=", (1, -1))
    with pytest.raises(ClaimFailed, match="too large: found 3, needed < 2"):
        claims.check("too large", 3, "<", 2)
    with pytest.raises(ClaimFailed):
        claims.check("not a number", math.nan, "<", 2)
    with pytest.raises(AssertionError):
        claims.check("infinite", math.inf, "<", math.inf)
    assert [r["claim"] for r in claims.rows] == ["the curve lies below", "the step is exact", "the signs agree"]
    assert claims.rows[0] == {
        "claim": "the curve lies below",
        "predicted": "≤ 2",
        "measured": "0.5",
        "slack": "×4",
        "status": "certified",
    }
    bundle = claims._repr_mimebundle_()
    assert bundle[Claims.MIME] == {"lesson": "01-width-bounds", "rows": claims.rows}
    assert Balanced(bundle["text/html"]).tags.count("tr") == 4
    assert bundle["text/plain"].splitlines()[0] == "the curve lies below | ≤ 2 | 0.5 | ×4 | certified"


def test_slack_says_how_far_the_measurement_may_go():
    claims = Claims("x")
    claims.check("at least", 10.0, ">=", 2.0)
    claims.check("no ratio of signs", -1.0, "<", 2.0)
    claims.check("no ratio of equals", 2.0, "=", 2.0)
    claims.check("no ratio of truths", True, "is", True)
    assert [r["slack"] for r in claims.rows] == ["×5", "–", "–", "–"]
