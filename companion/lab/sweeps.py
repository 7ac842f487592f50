"""Grids of runs: one function, many configurations, any executor, and one file for each finished configuration.

A phase diagram is a sweep.  `sweep` calls a plain function on every configuration, here or on any
`concurrent.futures.Executor` (threads, processes, dask.distributed's ``client.get_executor()``, MPI pools), keeps each
result in a file of its own, written atomically and named by a hash of function and configuration, and so repeats only
what is missing.  The bits of a result do not depend on the executor as long as the function does not.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion import runs

Result = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A configuration that raised: its place, the configuration and the error."""

    index: int
    configuration: Mapping[str, Any]
    error: BaseException

    def __str__(self) -> str:
        return f"configuration {self.index} {dict(self.configuration)}: {type(self.error).__name__}: {self.error}"


class SweepFailed(RuntimeError):
    """Some configurations raised; all others are done and stored.

    Args:
        failures: the failures, in the order of the configurations.
        results: the results, None where it failed.
    """

    def __init__(self, failures: list[Failure], results: list[Result | None]) -> None:
        shown = "; ".join(str(f) for f in failures[:3]) + ("; ..." if len(failures) > 3 else "")
        super().__init__(f"{len(failures)} of {len(results)} configurations failed: {shown}")
        self.failures, self.results = failures, results


def sweep(
    function: Callable[..., Mapping[str, Any]],
    configurations: Sequence[Mapping[str, Any]],
    *,
    executor: Executor | None = None,
    store: str | Path | None = None,
    progress: bool | None = None,
    on_failure: str = "raise",
) -> list[Result | None]:
    """Compute ``[function(**c) for c in configurations]``, in parallel, resumable, and with failures collected.

    Args:
        function: a plain function (importable, for processes) that takes a configuration as keyword arguments and
            returns a mapping of names to tensors, numbers, strings, booleans, None or lists of these.
        configurations: mappings of names to values that JSON can hold (numbers, strings, booleans, None, lists).
        executor: any `concurrent.futures.Executor`; None to compute here, one after the other.
        store: a folder for one file a configuration; finished ones are read instead of computed.  The name of a file is
            a hash of the configuration, the function's name and its source, so a changed function is computed anew;
            what the function itself calls is not looked at.
        progress: show a progress bar; None for only in a terminal.
        on_failure: ``"raise"`` to raise `SweepFailed` once all the others are done, or ``"keep"`` to return None for
            those that failed.

    Returns:
        The results, in the order of the configurations; tensors on the CPU.

    Raises:
        SweepFailed: a configuration raised (or its worker died), after the others were finished and stored.
        TypeError: configurations that JSON cannot hold, or a result that cannot be stored.
        ValueError: two equal configurations, an unknown `on_failure`, or a damaged file.
    """
    if on_failure not in ("raise", "keep"):
        raise ValueError(f"on_failure is {on_failure!r}; 'raise' or 'keep' is needed")
    keys = _keys(function, configurations)
    folder = None if store is None else Path(store)
    results: list[Result | None] = [None] * len(keys)
    files = [folder / f"{key}.safetensors" if folder else None for key in keys]
    missing = []
    for i, file in enumerate(files):
        if file is not None and file.exists():
            results[i] = _read(file)[1]
        else:
            missing.append(i)
    failures: list[Failure] = []
    with runs.progress_bar(progress, len(keys) - len(missing), len(keys), "configuration") as bar:
        for i, outcome in _run(function, configurations, missing, executor):
            try:
                results[i] = _checked(outcome(), configurations[i])
            except Exception as error:
                failures.append(Failure(i, configurations[i], error))
            else:
                if files[i] is not None:
                    _write(files[i], results[i], configurations[i])
            bar.update(1)
    failures.sort(key=lambda f: f.index)
    if failures and on_failure == "raise":
        raise SweepFailed(failures, results)
    return results


def _run(
    function: Callable[..., Any],
    configurations: Sequence[Mapping[str, Any]],
    which: list[int],
    executor: Executor | None,
) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Pairs of a configuration's place and a call that returns its result or raises its error, as they finish."""
    if executor is None:
        for i in which:
            yield i, functools.partial(function, **configurations[i])
        return
    futures: dict[Any, int] = {}
    refused: list[tuple[int, BaseException]] = []
    for i in which:
        try:
            futures[executor.submit(function, **configurations[i])] = i
        except RuntimeError as error:  # the pool broke while it was being fed: what is done stays done
            refused.append((i, error))
    for future in as_completed(futures):
        yield futures[future], future.result
    for i, error in refused:
        yield i, functools.partial(_raise, error)


def _raise(error: BaseException) -> None:
    raise error


def _keys(function: Callable[..., Any], configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """One SHA-256 for each configuration, of the function's name and source and of the configuration in JSON."""
    if not callable(function):
        raise TypeError(f"function is {type(function).__name__}; a function is needed")
    who = runs.identity(function)
    keys: dict[str, int] = {}
    for i, configuration in enumerate(configurations):
        if not isinstance(configuration, Mapping):
            raise TypeError(
                f"configuration {i} is {type(configuration).__name__}; a mapping of names to values is needed"
            )
        try:
            text = json.dumps([who, dict(configuration)], sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"configuration {i} is not plain ({error}); finite numbers, strings and lists needed"
            ) from None
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in keys:
            raise ValueError(f"configurations {keys[key]} and {i} are equal; each is needed once")
        keys[key] = i
    return list(keys)


def _checked(result: Any, configuration: Mapping[str, Any]) -> Result:
    """A result with its tensors on the CPU; refused when it could not be stored."""
    if not isinstance(result, Mapping):
        raise TypeError(f"function returned {type(result).__name__} for {dict(configuration)}; a mapping is needed")
    out: Result = {}
    for name, value in result.items():
        if isinstance(value, Tensor):
            out[str(name)] = value.detach().cpu().contiguous()
            continue
        try:
            # through JSON also where nothing is stored: a result is the same whether computed or read
            out[str(name)] = json.loads(json.dumps(value))
        except TypeError:
            raise TypeError(f"result {name!r} is {type(value).__name__}; a tensor or plain value is needed") from None
    return out


def _write(file: Path, result: Result, configuration: Mapping[str, Any]) -> None:
    tensors = {k: v for k, v in result.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in result.items() if not isinstance(v, Tensor)}
    header = {"plain": plain, "names": list(result), "configuration": dict(configuration)}
    runs.write_tensors(file, tensors, header)


def _read(file: Path) -> tuple[dict[str, Any], Result]:
    """The configuration and its result."""
    tensors, header = runs.read_tensors(file, "store holds")
    values = tensors | header["plain"]
    return header["configuration"], {name: values[name] for name in header["names"]}


def stored(store: str | Path) -> list[tuple[dict[str, Any], Result]]:
    """All finished configurations of a folder with their results, ordered by file name.

    Args:
        store: the folder given to `sweep`.

    Returns:
        Pairs ``(configuration, result)``.

    Raises:
        ValueError: a damaged file.
    """
    return [_read(file) for file in sorted(Path(store).glob("*.safetensors"))]


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of the axes' values as configurations, the last axis running fastest.

    Args:
        **axes: a sequence of values for each name.

    Returns:
        The configurations.

    Raises:
        ValueError: an empty axis.
    """
    out: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        if not len(values):
            raise ValueError(f"axis {name!r} is empty; at least one value is needed")
        out = [{**c, name: value} for c in out for value in values]
    return out


def one_thread() -> None:
    """Use one thread for torch in this process: the initializer of a pool that has a process for each core."""
    torch.set_num_threads(1)
