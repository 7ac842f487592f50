"""Results that take too long for a lesson, stored with the package, and with what is needed to take them again.

A record is a JSON file: the results, the settings they were taken with, and the machine, versions and day.  Those that
come with the package lie in ``companion/lab/stored``; `names` lists them and `read` opens one.  A lesson shows a record
beside a small part of the same run done live, so that a record that no longer fits its code is found.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from companion.certificate import plain
from companion.runs import write_whole

_FOLDER = resources.files("companion.lab") / "stored"


def names() -> list[str]:
    """List the records that come with the package."""
    if not _FOLDER.is_dir():
        return []
    return sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))


def read(name: str) -> dict[str, Any]:
    """Open a record that comes with the package.

    Args:
        name: one of `names`.

    Returns:
        ``{"results", "settings", "machine", "versions", "date"}``.

    Raises:
        ValueError: there is no such record.
    """
    if name not in names():
        raise ValueError(f"name is {name!r}; one of {', '.join(names()) or '(no record is stored)'} is needed")
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf8"))


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Describe the device that computes, without naming the computer."""
    device = torch.device(device)
    found = {"system": platform.system(), "processor": _processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {"device": device.type}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def write(
    path: str | Path, results: Mapping[str, Any], *, settings: Mapping[str, Any], device: str | torch.device = "cpu"
) -> Path:
    """Store results with everything that is needed to take them again; an interrupted write leaves the old file.

    Args:
        path: where to, ending in ``.json``.
        results: what was found: numbers, lists, tensors, by name.
        settings: what it was found with: sizes, seeds, steps.
        device: where it was computed.

    Returns:
        The path.

    Raises:
        ValueError: `path` does not end in ``.json``.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path is {str(path)!r}; a file that ends in .json is needed")
    record = {
        "results": plain(results),
        "settings": plain(settings),
        "machine": machine(device),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
    write_whole(path, lambda fresh: fresh.write_text(text, encoding="utf8"))
    return path
