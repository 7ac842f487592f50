"""Every public function with one argument at a time replaced by something that does not belong there.

A call may *answer*, or be *clear*: a ValueError or TypeError raised by companion that names the argument (*unnamed*:
that does not).  Anything else is a violation: *raw*, an error from inside, or *slow*, no answer in `ALARM` seconds of
work.  A function that changes its input in place is one too.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import math
import os
import resource
import signal
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attack import Arguments, Check, Tally
from attack.baselines import BASELINES, LEFT_OUT, model

ALARM = 6.0
MEMORY = 8 * 2**30
FACES = (
    "width_bounds", "mean_field", "beyond_ntk", "minimum_norm", "basins", "networks", "rigor", "data", "kernels",
    "descent", "certificate", "lab",
)  # fmt: skip
TABLE: dict[str, Counter[str]] = defaultdict(Counter)
EXAMPLES: dict[tuple[str, str], str] = {}
Change = Callable[[], Any]


# --- What to put in place of an argument ------------------------------------------------------------------------------


def _with(a: Tensor, value: float) -> Change:
    def change() -> Tensor:
        b = a.clone(memory_format=torch.contiguous_format)
        b.view(-1)[0] = value
        return b

    return change


def _inference(a: Tensor) -> Tensor:
    with torch.inference_mode():
        return a.clone()


def of_tensor(a: Tensor) -> dict[str, Change]:
    changes: dict[str, Change] = {
        "empty": lambda: a[:0], "no columns": lambda: a[..., :0], "an axis more": lambda: a[None],
        "flat": lambda: a.reshape(-1), "0-d": lambda: a.reshape(-1)[0], "a row less": lambda: a[:-1],
        "a column less": lambda: a[..., :-1], "float16": a.half, "float32": a.float, "int64": a.long, "bool": a.bool,
        "complex": lambda: a.to(torch.complex128), "meta": lambda: a.to("meta"), "numpy": a.numpy, "list": a.tolist,
        "None": lambda: None, "word": lambda: "x", "sparse": a.to_sparse, "equal rows": lambda: a[:1].expand(a.shape),
        "transposed": lambda: a.mT if a.ndim > 1 else a, "inference": lambda: _inference(a), "module": nn.Tanh,
    }  # fmt: skip
    if not a.is_floating_point():
        return changes | {"negative": lambda: -a - 1, "large": lambda: a + 10**9}
    factors = {f"times {f:g}": (lambda f=f: a * f) for f in (0.0, 1e308, 1e200, 1e-200, 1e-320, -1.0)}
    entries = {f"one {v}": _with(a, v) for v in (math.nan, math.inf, -math.inf, 1e155, 1e300)}
    plain = {
        "requires grad": lambda: a.clone().requires_grad_(), "parameter": lambda: nn.Parameter(a.clone()),
        "strided": lambda: a.mT.contiguous().mT if a.ndim > 1 else a, "negative view": lambda: torch._neg_view(-a),
    }  # fmt: skip
    return changes | factors | entries | plain


def _each(values: dict[str, Any]) -> dict[str, Change]:
    return {name: (lambda v=v: v) for name, v in values.items()}


NUMBERS = _each({
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-1": -1, "0": 0, "1e-320": 1e-320, "1e308": 1e308,
    "1e-17": 1e-17, "1e17": 1e17, "10^400": 10**400, "word": "a", "None": None, "True": True, "complex": 1j,
    "tensor": torch.tensor(0.1), "vector": torch.ones(3), "fraction": Fraction(1, 3), "float32": np.float32(0.5),
    "list": [1.0],
})  # fmt: skip
WHOLE = _each({
    "0": 0, "-1": -1, "2.5": 2.5, "2.0": 2.0, "word": "3", "None": None, "True": True, "nan": math.nan,
    "int64": np.int64(3), "tensor": torch.tensor(3), "list": [3],
})  # fmt: skip
WORDS = _each({"other word": "zz", "None": None, "5": 5, "no word": "", "list": ["relu"], "bytes": b"tanh"})
OTHERS = _each({"None": None, "word": "x", "5": 5, "list": [], "tensor": torch.ones(2)})


def of_tensors(v: list[Tensor]) -> dict[str, Change]:
    changes: dict[str, Change] = {
        "empty": list, "None": lambda: None, "a tensor": lambda: v[0], "word": lambda: "x", "less": lambda: v[1:],
        "reversed": lambda: v[::-1], "tuple": lambda: tuple(v), "generator": lambda: (t for t in v),
        "numpy": lambda: [t.numpy() for t in v], "dictionary": lambda: dict(enumerate(v)),
    }  # fmt: skip
    for j, t in enumerate(v):
        for name, change in of_tensor(t).items():
            changes[f"[{j}] {name}"] = lambda j=j, change=change: [*v[:j], change(), *v[j + 1 :]]
    return changes


def of_sequence(v: Any) -> dict[str, Change]:
    return {
        "empty": list, "None": lambda: None, "zeros": lambda: [0 for _ in v], "negative": lambda: [-1 for _ in v],
        "nan": lambda: [math.nan for _ in v], "word": lambda: "ab", "longer": lambda: list(v) * 3, "5": lambda: 5,
        "halves": lambda: [0.5 for _ in v], "words": lambda: ["a" for _ in v],
        "Nones": lambda: [None for _ in v], "tensor": lambda: torch.tensor([1.5, 2.5]), "nested": lambda: [list(v)],
    }  # fmt: skip


def of_module(v: nn.Module) -> dict[str, Change]:
    def scaled(factor: float) -> nn.Module:
        made = model()
        made[0].weight.data.mul_(factor)
        return made

    return {
        "None": lambda: None, "class": lambda: nn.Linear, "empty": nn.Sequential, "nan": lambda: scaled(math.nan),
        "huge": lambda: scaled(1e300), "float32": lambda: model(False), "meta": lambda: model().to("meta"),
        "half": lambda: model().half(), "other width": lambda: nn.Sequential(nn.Linear(7, 3)).double(),
        "frozen": lambda: model().requires_grad_(False), "training": lambda: model().train(),
        "tuple out": lambda: nn.LSTM(4, 3).double(), "function": lambda: torch.relu, "tensor": lambda: torch.ones(2),
    }  # fmt: skip


def changes_of(value: Any) -> dict[str, Change]:
    """What a value of this kind is replaced by."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, bool):
        return _each({"None": None, "word": "x", "tensor": torch.ones(2)})
    for kind, changes in ((int, WHOLE), (float, NUMBERS), (str, WORDS)):
        if isinstance(value, kind):
            return changes
    if isinstance(value, list | tuple):
        return of_tensors(list(value)) if value and isinstance(value[0], Tensor) else of_sequence(value)
    return of_module(value) if isinstance(value, nn.Module) else OTHERS


# --- Calls ------------------------------------------------------------------------------------------------------------


def resolve(name: str) -> Callable[..., Any] | None:
    """The function behind ``wing.function#variant``, or None where the face does not have it."""
    wing, function = name.partition("#")[0].split(".")
    return getattr(importlib.import_module(f"companion.{wing}"), function, None)


def public() -> set[str]:
    """The functions on all faces, as wing.function; classes check what they are given when it is used."""
    found = set()
    for wing in FACES:
        module = importlib.import_module(f"companion.{wing}")
        for name, value in vars(module).items():
            here = name in module.__all__ if hasattr(module, "__all__") else _defined_in(value, module.__name__)
            if inspect.isfunction(value) and here and not name.startswith("_"):
                found.add(f"{wing}.{name}")
    return found


def _defined_in(value: Any, module: str) -> bool:
    return getattr(value, "__module__", "") == module


def unknown() -> set[str]:
    """Functions on a face that have no baseline."""
    return public() - {name.partition("#")[0] for name in BASELINES} - LEFT_OUT


def unchecked() -> list[str]:
    """Functions on a face without the shared check of their arguments."""
    return sorted(name for name in public() if not _is_checked(resolve(name)))


def _is_checked(function: Any) -> bool:
    """Whether `companion.arguments.checked` is among the wrappers."""
    while function is not None:
        if getattr(getattr(function, "__code__", None), "co_filename", "").endswith(f"companion{os.sep}arguments.py"):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


class TooSlow(BaseException):
    """No `Exception`, so that no function catches it."""


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise TooSlow


def call(function: Callable[..., Any], arguments: Arguments, changed: str) -> tuple[str, str]:
    """One call: what came of it, and the error's first line."""
    before, memory = signal.signal(signal.SIGPROF, _alarm), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, memory[1]))
    signal.setitimer(signal.ITIMER_PROF, ALARM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
        return "answer", ""
    except TooSlow:
        return "slow", f"no answer in {ALARM:g} s of work"
    except Exception as error:
        return _kind(error, changed), f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def _kind(error: Exception, changed: str) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = f"{os.sep}companion{os.sep}" in frame.filename
    raised = linecache.getline(frame.filename, frame.lineno or 0).strip().startswith("raise")
    if ours and raised and type(error).__module__.startswith("companion"):
        return "unnamed"  # an error of companion's own, as `descent.Diverged`
    if not (ours and raised and isinstance(error, ValueError | TypeError)):
        return "raw"
    return "clear" if changed in str(error) else "unnamed"


def _copies(arguments: Arguments) -> dict[str, Tensor]:
    plain = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.layout == torch.strided}
    return {k: v.clone() for k, v in plain.items() if v.device.type == "cpu"}


def see_call(tally: Tally, function: str, argument: str, change: str) -> None:
    """One changed argument of one function."""
    target, arguments = resolve(function), BASELINES[function]()
    if target is None:
        return
    given = arguments[argument]
    try:
        arguments[argument] = changes_of(given)[change]()
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        return  # there is no such change of this value, as a sparse tensor of a strided view
    before = _copies({k: v for k, v in arguments.items() if k != argument})
    kind, what = call(target, arguments, argument)
    TABLE[function][kind] += 1
    if kind in ("raw", "slow", "unnamed"):
        EXAMPLES.setdefault((function, what), f"{argument} {change}")
    right = kind not in ("raw", "slow")
    tally.see(function, right, kind != "answer", f"{argument} {change}: {what}")
    kept = all(torch.equal(arguments[k], v) or bool(v.isnan().any()) for k, v in before.items())
    tally.see("inputs untouched", kept, what=f"{function}, {argument} {change}")


def all_calls() -> list[Arguments]:
    """Every function, argument and change."""
    cases = []
    for name, make in BASELINES.items():
        if resolve(name) is not None:
            for argument, value in make().items():
                cases += [{"function": name, "argument": argument, "change": c} for c in changes_of(value)]
    return cases


class Draw:
    """Cases drawn without repetition, from all or from some functions."""

    def __init__(self, functions: set[str] | None = None) -> None:
        self.functions = functions
        self.cases: list[Arguments] | None = None

    def __call__(self, rng: np.random.Generator) -> Arguments | None:
        if self.cases is None:
            every = all_calls()
            chosen = [c for c in every if self.functions is None or c["function"] in self.functions]
            self.cases = [chosen[i] for i in rng.permutation(len(chosen))]
        return self.cases.pop() if self.cases else None


def baselines_that_fail() -> Iterator[str]:
    """Baselines that give no answer: they would test nothing."""
    for name, make in BASELINES.items():
        target = resolve(name)
        if target is not None:
            kind, what = call(target, make(), "")
            if kind != "answer":
                yield f"{name}: {kind} {what}"


# functions in which a wrong argument was seen to meet an error from inside; none of them is in the slice of make test
STILL_RAW = {
    "basins.certify_strict_minimum#measured", "basins.exit_times", "basins.split_neuron", "beyond_ntk.tie",
    "certificate.compare", "certificate.plain", "certificate.show", "data.equal_pairs", "data.load_idx",
    "descent.default_chunk", "descent.train", "kernels.ntk_gram", "lab.stored", "lab.sweep",
    "mean_field.certify_zero_loss", "mean_field.density_rule", "mean_field.fv_flow", "mean_field.limit_flow",
    "mean_field.train", "networks.activation", "networks.as_ensemble", "networks.check_weights",
    "networks.features", "networks.forward", "networks.gradients", "networks.inputs", "rigor.cat", "rigor.gamma",
    "rigor.gram", "rigor.norm", "rigor.null_space", "rigor.round_down", "rigor.round_up", "rigor.spectral_norm",
    "rigor.stack", "width_bounds.train",
}  # fmt: skip
DRAW = Draw()
CHECKS = {"call": Check(DRAW, see_call)}
