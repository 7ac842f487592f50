"""The record of what was checked before a theorem was applied, and how it prints.

A `Certificate` lists the assumptions of one theorem, each with the number that was found, the number that is needed
and a status that says how far the comparison can be trusted:

- ``assumed``: cannot be checked from the data; said openly.
- ``measured``: compared in ordinary floating point.
- ``certified``: floating point with every rounding error bounded, a theorem about the stored floats.
- ``exact``: rational, modular or integer arithmetic, a proof.
"""

from __future__ import annotations

import decimal
import html
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

STATUSES = ("assumed", "measured", "certified", "exact")
_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "is": operator.eq,
}
SYMBOLS = {"<=": "≤", ">=": "≥"}


def plain(value: Any) -> Any:
    """Turn tensors, numpy scalars and containers into what JSON can hold (NaN and infinities become strings)."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def show(value: Any, digits: int = 3, side: str = "") -> str:
    """Print a number with `digits` significant digits, and everything else as it is.

    Few digits survive a change of processor: the lessons' stored outputs are compared as text.

    Args:
        value: what to print.
        digits: significant digits.
        side: ``"down"`` or ``"up"`` to print no more, or no less, than the value, so that a bound holds as it is
            printed; empty for the nearest.

    Returns:
        The text.
    """
    value = plain(value)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value}"
    if isinstance(value, float):
        return _rounded(value, digits, side)
    if isinstance(value, list):
        shown = [show(v, digits, side) for v in value[:8]]
        return "(" + ", ".join(shown + ["…"] * (len(value) > 8)) + ")"
    return str(value)


def _rounded(value: float, digits: int, side: str) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}".replace("-0", "0")
    text = f"{value:.{digits}g}"
    if (side == "down" and float(text) > value) or (side == "up" and float(text) < value):
        exact = decimal.Decimal(value)
        place = decimal.Decimal(1).scaleb(exact.adjusted() - digits + 1)
        toward = decimal.ROUND_FLOOR if side == "down" else decimal.ROUND_CEILING
        text = f"{exact.quantize(place, rounding=toward, context=_LONG):.{digits}g}"
    return f"{float(text):.{digits}g}"


_LONG = decimal.Context(prec=800)  # every float is a decimal of fewer digits


_AT_MOST = (
    "max_",
    "largest_R_0",
    "rate",
    "loss_lower",
    "floor",
    "distance_low",
    "lambda",
    "trivial",
    "sigma_min",
    "contraction",
)
_AT_LEAST = (
    "min_", "width", "gap", "bound", "distance", "loss_upper", "perp", "parallel", "movement", "Q_star", "e_0", "here",
    "E_0", "R_s", "ratio", "beta", "sigma_max", "smoothness", "linear_rate", "start", "ridge_gap", "gradient_norm",
    "largest_radius",
)  # fmt: skip


def _side(name: str) -> str:
    """The side on which a quantity still holds when it is printed: what is promised at most down, at least up."""
    return "down" if name.startswith(_AT_MOST) else "up" if name.startswith(_AT_LEAST) else ""


@dataclass(frozen=True)
class Assumption:
    """One line of a certificate: what was found, what is needed, and how far the comparison can be trusted.

    Args:
        name: what is compared, in the theorem's letters.
        measured: the number found (None for an assumption that has no number).
        relation: one of ``< <= > >= = is``.
        required: the number needed.
        status: one of `STATUSES`.
        holds: whether the assumption holds.
    """

    name: str
    measured: Any
    relation: str
    required: Any
    status: str
    holds: bool

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}; one of {', '.join(STATUSES)} is needed")
        if self.relation not in _RELATIONS:
            raise ValueError(f"relation is {self.relation!r}; one of {' '.join(_RELATIONS)} is needed")


def compare(name: str, measured: Any, relation: str, required: Any, status: str = "measured") -> Assumption:
    """Build an `Assumption` whose `holds` is the comparison itself; NaN never holds."""
    holds = relation in _RELATIONS and bool(_RELATIONS[relation](measured, required))
    return Assumption(name, measured, relation, required, status, holds)


def _compared(a: Assumption) -> tuple[str, str]:
    """What was found and what is needed, as text: with more digits where three would hide that the line holds."""
    if a.measured is None and a.required is None:
        return "", ""
    side = {"<": "down", ">": "up"}.get(a.relation[:1], "")
    for digits in range(3, 18):
        found, needed = show(a.measured, digits), show(a.required, digits, side)
        numbers = a.holds and side and all(isinstance(plain(v), float) for v in (a.measured, a.required))
        if not numbers or _RELATIONS[a.relation](float(found), float(needed)):
            break
    return found, f"{SYMBOLS.get(a.relation, a.relation)} {needed}"


def assumed(name: str) -> Assumption:
    """Build an `Assumption` that no data can check; it is listed as `assumed` and counts as holding."""
    return Assumption(name, None, "is", None, "assumed", True)


@dataclass(frozen=True)
class Certificate:
    """What was checked about one theorem on one network and data set, and what the theorem then predicts.

    ``holds=False`` means *not shown*, never *false*, and comes with a `reason`.

    Args:
        theorem: the theorem's name.
        holds: whether every assumption was shown.
        assumptions: the lines of the table.
        quantities: what the theorem predicts (rates, steps, radii), by name.
        reason: a short machine-readable reason, empty when the certificate holds, then optionally ``: detail``.
        members: for an ensemble, one certificate for each network; empty for a single network.
        says: what was gained, in a few words for the first line; a bound that says nothing is called vacuous here.
    """

    theorem: str
    holds: bool
    assumptions: tuple[Assumption, ...]
    quantities: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    members: tuple[Certificate, ...] = ()
    says: str = ""

    def __post_init__(self) -> None:
        if self.holds and not all(a.holds for a in self.assumptions):
            raise ValueError("holds is True although an assumption does not hold")
        if not self.holds and not self.reason:
            raise ValueError("reason is empty; a certificate that does not hold needs a reason")

    def __bool__(self) -> bool:
        return self.holds

    @property
    def status(self) -> str:
        """The weakest status among the assumptions that could be checked (``assumed`` lines are listed, not ranked)."""
        ranks = [STATUSES.index(a.status) for a in self.assumptions if a.status != "assumed"]
        return STATUSES[min(ranks)] if ranks else "assumed"

    def verdict(self) -> str:
        """One sentence: whether the theorem applies, and how far that statement can be trusted."""
        count = f" ({sum(m.holds for m in self.members)} of {len(self.members)} networks)" if self.members else ""
        if not self.holds:
            return f"not shown{count}: {self.reason}"
        words = {"measured": "holds in floating point", "certified": "certified", "exact": "exact"}
        verdict = words.get(self.status, "holds if the assumptions do") + count
        return f"{verdict}: {self.says}" if self.says else verdict

    def to_dict(self) -> dict[str, Any]:
        """The certificate as a dictionary that JSON can hold."""
        return plain(asdict(self)) | {"status": self.status}

    def to_json(self, **options: Any) -> str:
        """The certificate as JSON; `options` go to `json.dumps`."""
        return json.dumps(self.to_dict(), ensure_ascii=False, **options)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table's rows as text: assumption, found, needed, status, holds."""
        rows = []
        for a in self.assumptions:
            found, needed = _compared(a)
            mark = "NOT SHOWN" if not a.holds else "assumed" if a.status == "assumed" else "yes"
            rows.append((a.name, found, needed, a.status, mark))
        return rows

    def _quantities(self) -> list[tuple[str, str]]:
        return [(name, show(value, side=_side(name))) for name, value in self.quantities.items()]

    def __str__(self) -> str:
        rows = [("assumption", "found", "needed", "status", "holds"), *self.rows()]
        widths = [max(len(r[c]) for r in rows) for c in range(5)]
        lines = [f"{self.theorem}: {self.verdict()}"]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines += [f"  {name} = {text}" for name, text in self._quantities()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = html_row(("assumption", "found", "needed", "status", "holds"), "th")
        body = "".join(html_row(r, "td") for r in self.rows())
        rest = ", ".join(
            f"{html.escape(n)} = {html.escape(show(v, side=_side(n)))}" for n, v in self.quantities.items()
        )
        return (
            f'<table class="certificate"><caption><b>{html.escape(self.theorem)}</b>: {html.escape(self.verdict())}'
            f"</caption><thead>{head}</thead><tbody>{body}</tbody></table>"
            + (f'<p class="certificate-quantities">{rest}</p>' if rest else "")
        )


def silent(theorem: str, rows: Sequence[Assumption], reason: str) -> Certificate:
    """Build the certificate of a theorem that says nothing here, and why."""
    return Certificate(theorem, False, tuple(rows), {}, reason)


def gather(members: Sequence[Certificate], key: Callable[[Certificate], float] = lambda member: 0.0) -> Certificate:
    """Put one certificate in front of an ensemble's: it holds if and only if all of them do.

    Its lines are those of the first member that is not shown or, if all are, of the one with the smallest `key`. What
    it promises holds for every member: of a quantity whose name begins with ``max_`` the smallest, and of a ``rate``
    the smallest; the other quantities are those of the member in front.

    Args:
        members: one certificate for each network.
        key: says which of the members that hold is the weakest.

    Returns:
        The member itself if there is one only, else the certificate in front with all in `members`.
    """
    if len(members) == 1:
        return members[0]
    failing = [i for i, m in enumerate(members) if not m.holds]
    front = members[failing[0]] if failing else min(members, key=key)
    promised = dict(front.quantities)
    if not failing:
        for name in promised:
            if name.startswith("max_") or name == "rate":
                promised[name] = min(m.quantities[name] for m in members)
    reason = f"{front.reason} (network {failing[0]})" if failing else ""
    return replace(front, quantities=promised, reason=reason, members=tuple(members))


def html_row(cells: tuple[str, ...], tag: str) -> str:
    """A row of an HTML table, its cells escaped."""
    scope = ' scope="col"' if tag == "th" else ""
    return "<tr>" + "".join(f"<{tag}{scope}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"
