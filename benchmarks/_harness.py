"""What every benchmark needs: alternating runs in one process, memory in a fresh process, a record of the machine.

Times are CPU time (other people's work on the machine does not count) or, on a GPU, wall time after synchronization.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT))  # the package next door, installed or not

import torch  # noqa: E402


def machine(threads: int, device: str = "cpu", packages: Sequence[str] = ()) -> dict[str, Any]:
    """Describe what the numbers were taken on: processor, threads, versions; nothing that names the computer."""
    versions = {}
    for name in ("torch", "numpy", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found = {
        "cpu": _cpu_model(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines) if v}
    return (
        f"{named.get('model name', platform.machine())} (family {named.get('cpu family')}, model {named.get('model')})"
    )


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """Time one call: process CPU time, or wall time between two synchronizations of the GPU."""
    if device == "cpu":
        begin = time.process_time()
        function()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(variants: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Run all variants once to warm up, then `rounds` times in turn: A B C, C B A, A B C, ..."""
    names = list(variants)
    for name in names:
        variants[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            times[name].append(seconds(variants[name], device))
    return times


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """The median over the rounds of time(a) / time(b): a slow minute touches both."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def peak_memory(script: str, arguments: Sequence[str]) -> float | None:
    """Run ``python script --memory ARGUMENTS`` in a fresh process and return the megabytes it prints; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, script, "--memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout.strip().splitlines()[-1])


def growth(function: Callable[[], Any]) -> float:
    """Megabytes by which the resident memory of this process peaks during one call (VmHWM, reset before)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    function()
    return (_high_water() - before) / 1e6


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def target(name: str, reached: float, relation: str, goal: float) -> dict[str, Any]:
    """One line of the list of targets: met or not, and by which factor it was missed."""
    met = reached <= goal if relation == "<=" else reached >= goal
    missed = None if met else round(reached / goal if relation == "<=" else goal / reached, 3)
    return {"target": f"{name} {relation} {goal}", "reached": round(reached, 3), "met": met, "missed_by_factor": missed}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as text."""

    def text(value: Any) -> str:
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([text(v) for v in r.values()] for r in rows)]
    widths = [max(len(r[c]) for r in cells) for c in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells)


def write(name: str, result: Mapping[str, Any]) -> Path:
    """Store a result as ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return path
