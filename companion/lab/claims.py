"""The claims table of a lesson: prediction beside measurement."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from companion.certificate import SYMBOLS, compare, html_row, plain, show


class ClaimFailed(AssertionError):
    """A claim of a lesson did not come out."""


class Claims:
    """The claims table of a lesson: prediction beside measurement, slack and status; a failing claim raises.

    Args:
        lesson: the lesson's file name without its suffix, e.g. ``"01-width-bounds"``.
    """

    MIME = "application/vnd.wide-enough.claims+json"
    COLUMNS = ("claim", "predicted", "measured", "slack", "status")

    def __init__(self, lesson: str) -> None:
        self.lesson = lesson
        self.rows: list[dict[str, str]] = []

    def check(
        self, claim: str, measured: Any, relation: str, predicted: Any, status: str = "measured", digits: int = 2
    ) -> None:
        """Compare a measurement with its prediction, and keep the row.

        Args:
            claim: one sentence, what is claimed.
            measured: the number found.
            relation: one of ``< <= > >= = is``.
            predicted: the number that the theory gives.
            status: one of `STATUSES`.
            digits: significant digits in print.

        Raises:
            ClaimFailed: the comparison is false.
        """
        a = compare(claim, _comparable(measured), relation, _comparable(predicted), status)
        if not a.holds:
            raise ClaimFailed(f"{claim}: found {measured!r}, needed {relation} {predicted!r}")
        self.rows.append(
            {
                "claim": claim,
                "predicted": f"{SYMBOLS.get(relation, relation)} {show(predicted, digits)}",
                "measured": show(measured, digits),
                "slack": _slack(a.measured, relation, a.required),
                "status": status,
            }
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        head = html_row(self.COLUMNS, "th")
        body = "".join(html_row(tuple(r[c] for c in self.COLUMNS), "td") for r in self.rows)
        table = f'<table class="claims"><thead>{head}</thead><tbody>{body}</tbody></table>'
        return {
            "text/html": table,
            "text/plain": "\n".join(" | ".join(r[c] for c in self.COLUMNS) for r in self.rows),
            self.MIME: {"lesson": self.lesson, "rows": self.rows},
        }


def _comparable(value: Any) -> Any:
    """Like `plain`, but NaN and infinities stay numbers."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    return value if isinstance(value, float) else plain(value)


def _slack(measured: Any, relation: str, predicted: Any) -> str:
    """How many times the measurement could grow (or shrink) before the claim fails."""
    if isinstance(measured, bool) or relation in ("=", "is"):
        return "–"
    if not all(isinstance(v, int | float) and v > 0 for v in (measured, predicted)):
        return "–"
    return f"×{show(predicted / measured if relation[0] == '<' else measured / predicted, 2)}"
