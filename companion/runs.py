"""What every long run needs: a bar, a held-back Ctrl-C, a digest of its input, a file that survives being killed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import operator
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm


def count(name: str, value: int, least: int) -> int:
    """Return a whole number that is not too small.

    Args:
        name: what the caller's argument is called.
        value: what was given for it.
        least: the smallest number that is allowed.

    Returns:
        The number as an int.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is too small.
    """
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; an integer is needed") from None
    if value < least:
        raise ValueError(f"{name} is {value}; an integer >= {least} is needed")
    return value


def progress_bar(progress: bool | None, done: int, total: int, unit: str = "step") -> tqdm:
    """Make a progress bar: by default only in a terminal, and on the standard output where there is none.

    Args:
        progress: whether to show it; None for only in a terminal.
        done: what an earlier run has done.
        total: what there is to do.
        unit: what is counted.

    Returns:
        The bar, a context manager.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    hidden = not (terminal if progress is None else progress)
    file = sys.stderr if terminal else sys.stdout
    return tqdm(total=total, initial=min(done, total), disable=hidden, file=file, leave=False, unit=unit)


@contextlib.contextmanager
def held_interrupt(active: bool) -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C until the caller asks whether there was one; a second one gets through.

    Args:
        active: whether to hold it back at all; outside the main thread it never is.

    Yields:
        A function that says whether Ctrl-C was pressed.
    """
    pending = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hold(*_: Any) -> None:
        if pending:
            raise KeyboardInterrupt
        pending.append(True)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: bool(pending)
    finally:
        signal.signal(signal.SIGINT, before)


def digest(value: Any) -> str:
    """SHA-256 of tensors (dtype, shape, kind of device, bytes), lists or mappings of them, or what JSON can hold."""
    sha = hashlib.sha256()
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype} {tuple(value.shape)} {value.device.type}".encode())
        flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
        for name in sorted(value):
            sha.update(f"{name} {digest(value[name])}".encode())
    elif isinstance(value, Iterable) and not isinstance(value, str | Mapping) and _has_tensors(value := list(value)):
        for v in value:
            sha.update(digest(v).encode())
    else:
        sha.update(json.dumps(value, sort_keys=True).encode())
    return sha.hexdigest()


def identity(function: Callable[..., Any]) -> list[Any]:
    """Describe a function so that another one of the same name is told apart: name, source, what it encloses and binds.

    Args:
        function: a function, a partial of one, or an object that can be called (known by its class).

    Returns:
        A list that `digest` and JSON can hold.
    """
    if isinstance(function, functools.partial):
        bound = [_describe(value) for value in function.args]
        bound += [[name, _describe(value)] for name, value in sorted(function.keywords.items())]
        return [*identity(function.func), bound]
    plain = function if hasattr(function, "__qualname__") else type(function)
    try:
        source = inspect.getsource(plain)
    except (OSError, TypeError):
        source = ""
    enclosed = [_describe(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    if plain.__qualname__.endswith("<lambda>"):  # several may stand in the same lines
        code = function.__code__
        enclosed += [code.co_code.hex(), [_describe(c) for c in code.co_consts], list(code.co_names)]
    return [f"{plain.__module__}.{plain.__qualname__}", source, enclosed]


def _describe(value: Any) -> Any:
    """A value's digest, or the kind of thing it is where it has none."""
    try:
        return digest(value)
    except (TypeError, ValueError):
        return identity(value) if inspect.isfunction(value) else type(value).__qualname__


def _has_tensors(values: list[Any]) -> bool:
    return any(isinstance(v, Tensor) for v in values)


# --- files that survive being killed ----------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file in one system call once its successor is on the disk: at every moment one of them is whole.

    Args:
        path: the file; its folder is made.
        write: writes the successor to the path that it is given, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # several processes may share a folder
    try:
        write(fresh)
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to one safetensors file, with a checksum over both.

    Args:
        path: the file.
        tensors: the tensors by name, on any device.
        header: what JSON can hold, by name.
    """
    # cloned: safetensors refuses tensors that share memory
    copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    header = {k: json.dumps(v) for k, v in header.items()}
    write_whole(path, lambda fresh: save_file(copies, fresh, metadata=header | {"sha256": _checksum(copies, header)}))


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Args:
        path: the file.
        what: what the file is to its reader, for the sentence that refuses it.

    Returns:
        The tensors by name, in memory that torch allocated (the alignment of a mapped file could change the bits of a
        product), and the header.

    Raises:
        ValueError: the file is damaged.
    """
    path.open("rb").close()  # a file that may not be read is no damaged file: the system's own sentence
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if header.pop("sha256", None) != _checksum(tensors, header):
            raise ValueError("its checksum does not fit")
        return tensors, {k: json.loads(v) for k, v in header.items()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{what} {path} cannot be read ({error}); delete it to start afresh") from error


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    return digest([[name, digest(tensors[name])] for name in sorted(tensors)] + [sorted(header.items())])
