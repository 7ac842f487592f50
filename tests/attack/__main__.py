"""The command: search for a while, count, write what is false, and add the counts to those of earlier runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import attack
from attack import Tally, arithmetic, calls, certificates, enclosures

PARTS = {
    "arithmetic": arithmetic.CHECKS | enclosures.CHECKS,
    "certificates": certificates.CHECKS,
    "calls": calls.CHECKS,
}
STORED = 20  # violations of one kind that are written to files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m attack", description=attack.__doc__)
    parser.add_argument(
        "--only", choices=[*PARTS, ""], default="", help="one part; all three, in equal shares, without"
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="drawn from the clock, and printed, if not given")
    parser.add_argument("--replay", type=Path, default=None, help="run one stored violation again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.replay is not None:
        return replay(options.replay)
    seed = time.time_ns() % 10**9 if options.seed is None else options.seed
    parts = [options.only] if options.only else list(PARTS)
    print(f"SEED={seed}", flush=True)
    false = 0
    for part in parts:
        started = time.monotonic()
        rng = np.random.default_rng([seed, list(PARTS).index(part)])
        tally = attack.search(part, PARTS[part], rng, until(started + options.seconds / len(parts)))
        report(part, tally, time.monotonic() - started)
        keep(part, tally, seed, time.monotonic() - started)
        false += len(tally.violations)
    return int(false > 0)


def until(end: float) -> Iterator[None]:
    while time.monotonic() < end and calls.DRAW.cases != []:
        yield None


def replay(path: Path) -> int:
    """Run a stored case; the exit status says whether it is still false."""
    case = json.loads(path.read_text(encoding="utf-8"))
    check, tally = PARTS[case["part"]][case["check"]], Tally()
    wrong = attack.attempt(tally, case["part"], case["check"], check, attack.decode(case["arguments"]))
    print(*(wrong or [f"{sum(tally.trials.values())} trials, nothing is false"]), sep="\n")
    return int(bool(wrong))


def report(part: str, tally: Tally, seconds: float) -> None:
    """The table of one part."""
    if part == "calls":
        kinds = ("answer", "clear", "unnamed", "raw", "slow")
        print(f"\n{part:44}" + "".join(f"{k:>9}" for k in kinds))
        for name, row in sorted(calls.TABLE.items()):
            print(f"  {name:42}" + "".join(f"{row[k] or '':>9}" for k in kinds))
        print("  no argument is checked by companion.arguments:", ", ".join(calls.unchecked()) or "none")
        for (name, what), example in sorted(calls.EXAMPLES.items()):
            print(f"  {name}, {example}: {what}")
    else:
        print(f"\n{part:48}{'trials':>10}{'told':>10}{'false':>8}")
        for name in sorted(tally.trials):
            print(f"  {name:46}{tally.trials[name]:>10}{tally.told[name]:>10}{tally.false[name] or '':>8}")
    total, told, false = (sum(c.values()) for c in (tally.trials, tally.told, tally.false))
    print(f"{part}: {total} trials in {seconds:.0f} s, {told} said something, {false} are false", flush=True)


def keep(part: str, tally: Tally, seed: int, seconds: float) -> None:
    """Write some violations of each kind, and add the counts to those of all runs so far."""
    few: dict[str, int] = {}
    stored = []
    for case in tally.violations:
        kind = f"{case['check']} {case['wrong'][0].split(':')[0]}"
        few[kind] = few.get(kind, 0) + 1
        if few[kind] <= STORED:
            stored.append(case)
    for path in attack.write(stored, str(seed)):
        print(f"  {path}")
    path = attack.FOLDER / "counts.json"
    counts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entry = counts.setdefault(part, {"seconds": 0.0, "seeds": [], "trials": {}, "told": {}, "false": {}})
    entry["seconds"] += round(seconds, 1)
    entry["seeds"].append(seed)
    for kind in ("trials", "told", "false"):
        for name, n in getattr(tally, kind).items():
            entry[kind][name] = entry[kind].get(name, 0) + n
    path.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    totals = [sum(entry[kind].values()) for kind in ("trials", "told", "false")]
    print(
        f"  all runs: {totals[0]} trials in {entry['seconds']:.0f} s, {totals[1]} said something, {totals[2]} are false"
    )


if __name__ == "__main__":
    sys.exit(main())
