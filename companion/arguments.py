"""One check for what a public function is given: its annotations say what is needed, one sentence says what is wrong.

`checked` reads ``X: Float[Tensor, "N d"]``, ``steps: int``, ``weights: Sequence[Tensor]`` and the like.  It refuses
another kind of object, dtype, rank, size, NaN and infinity before the function runs, with the argument's name, what was
found, what is needed, and the obvious repair where there is one.  It hands over tensors that need no gradient, and runs
the function outside of inference mode, autocast and a default device, which would change what it computes.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Sizes = dict[str, tuple[int, str]]  # a named axis: its size, and the argument that fixed it


def checked(function: Callable[..., Any] | None = None, *, double: bool = False, infinite: Sequence[str] = ()) -> Any:
    """Check a function's arguments against its annotations whenever it is called.

    Args:
        function: the function.
        double: whether floating-point tensors must be float64, as in a certificate.
        infinite: names of arguments that may hold infinity; NaN never.

    Returns:
        The function with its check, or a decorator.
    """
    if function is None:
        return functools.partial(checked, double=double, infinite=infinite)
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not hints:
            hints.update(typing.get_type_hints(function))
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        sizes: Sizes = {}
        with _plain_torch():
            for name, value in given.arguments.items():
                parameter = signature.parameters[name]
                plain = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
                if plain and name in hints and value is not parameter.default:
                    wanted = _Wanted(name, double, name in infinite, sizes)
                    given.arguments[name] = _accept(value, hints[name], wanted)
            return function(*given.args, **given.kwargs)

    return call


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """Leave what changes results or makes tensors elsewhere; nothing is entered where nothing has to be left."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


class _Wanted(typing.NamedTuple):
    """What is known about an argument besides its annotation."""

    name: str
    double: bool
    infinite: bool
    sizes: Sizes


def _accept(value: Any, hint: Any, wanted: _Wanted) -> Any:
    """The value, made plain, or the sentence that refuses it."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, [h for h in typing.get_args(hint) if h is not type(None)], hint, wanted)
    if _is_array(hint) or hint is Tensor:
        return _tensor(value, hint, wanted)
    if hint in (int, float, bool, str):
        return _scalar(value, hint, wanted)
    if origin is typing.Literal:
        if not isinstance(value, str | int) or value not in typing.get_args(hint):
            raise ValueError(
                f"{wanted.name} is {_found(value)}; {' or '.join(map(repr, typing.get_args(hint)))} is needed"
            )
        return value
    if origin in (collections.abc.Sequence, list, tuple):
        hints = typing.get_args(hint)
        return _sequence(value, hints, origin is tuple and Ellipsis not in hints, wanted)
    if origin in (collections.abc.Callable, collections.abc.Mapping, dict):
        kind = Callable if origin is collections.abc.Callable else Mapping
        return _instance(value, kind, wanted)
    if isinstance(hint, type):
        return _instance(value, hint, wanted)
    return value


def _any_of(value: Any, hints: list[Any], whole: Any, wanted: _Wanted) -> Any:
    """The first alternative that takes the value; with a single one, its own sentence."""
    if value is None and type(None) in typing.get_args(whole):
        return None
    if isinstance(value, Tensor | np.ndarray) and value.ndim and any(_is_array(h) or h is Tensor for h in hints):
        hints = [h for h in hints if _is_array(h) or h is Tensor]
    elif isinstance(value, list | tuple) and any(typing.get_origin(h) is collections.abc.Sequence for h in hints):
        hints = [h for h in hints if typing.get_origin(h) is collections.abc.Sequence]
    refusals: list[Exception] = []
    for hint in hints:
        sizes = dict(wanted.sizes)
        try:
            accepted = _accept(value, hint, wanted._replace(sizes=sizes))
        except (TypeError, ValueError) as error:
            refusals.append(error)
        else:
            wanted.sizes.update(sizes)
            return accepted
    if len(refusals) == 1:
        raise refusals[0]
    needed = " or ".join(
        dict.fromkeys(str(r).partition("; ")[2].removesuffix(" is needed") or str(r) for r in refusals)
    )
    raise type(refusals[0])(f"{wanted.name} is {_found(value)}; {needed} is needed")


# --- numbers, words, sequences, objects -------------------------------------------------------------------------------


def _scalar(value: Any, hint: type, wanted: _Wanted) -> Any:
    name = wanted.name
    if isinstance(value, Tensor | np.generic | np.ndarray) and getattr(value, "ndim", 0) == 0 and hint is not str:
        value = value.item()
    if hint in (bool, str):
        if not isinstance(value, hint):
            raise TypeError(f"{name} is {_found(value)}; {'True or False' if hint is bool else 'a word'} is needed")
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {_found(value)}; {'a whole number' if hint is int else 'a number'} is needed")
    if hint is int:
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} is {value}; a whole number is needed")
        return operator.index(value)
    try:
        plain = float(value)
    except OverflowError:
        raise ValueError(f"{name} is {_found(value)}; a finite number is needed") from None
    if math.isnan(plain) or (math.isinf(plain) and not wanted.infinite):
        raise ValueError(f"{name} is {value}; a finite number is needed")
    return value if isinstance(value, int | float) else plain  # a fraction times a tensor is an error of torch's


def _sequence(value: Any, hints: tuple[Any, ...], pairs: bool, wanted: _Wanted) -> Any:
    name = wanted.name
    inner = hints[0] if hints else Any
    of_tensors = _is_array(inner) or inner is Tensor
    if isinstance(value, str | Mapping | set) or not isinstance(value, collections.abc.Sequence):
        if of_tensors:
            hint = f"; write [{name}]" if isinstance(value, Tensor) else ""
            raise TypeError(f"{name} is {_found(value)}; a list of tensors is needed{hint}")
        if not isinstance(value, collections.abc.Iterable):
            raise TypeError(f"{name} is {_found(value)}; a list is needed")
        value = list(value)
    if pairs and len(value) != len(hints):
        raise ValueError(f"{name} has {len(value)} entries; {len(hints)} are needed")
    items = [_accept(item, inner, wanted._replace(name=f"{name}[{i}]")) for i, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) and type(value) is tuple else items


def _instance(value: Any, hint: Any, wanted: _Wanted) -> Any:
    """Objects are recognized by their class; a class that cannot be asked is left to the function."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, hint):
            kind = {Callable: "a function", Mapping: "a dictionary", nn.Module: "a torch.nn.Module"}
            raise ValueError(f"{wanted.name} is {_found(value)}; {kind.get(hint, f'a {hint.__name__}')} is needed")
    return value


# --- tensors ----------------------------------------------------------------------------------------------------------


def _is_array(hint: Any) -> bool:
    return hasattr(hint, "dim_str") and hasattr(hint, "dtypes")


def _found(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 1023:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, int | float | str | bool) or value is None:
        return repr(value)
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiouAEIOU" or kind == "ndarray" else f"a {kind}"


def _tensor(value: Any, hint: Any, wanted: _Wanted) -> Tensor:
    """A strided tensor of the right kind, rank and sizes, finite, without a gradient."""
    name, axes = wanted.name, hint.dim_str.split() if _is_array(hint) else ["..."]
    floating = hint is not Tensor and any(d.startswith(("float", "bfloat")) for d in hint.dtypes)
    if not isinstance(value, Tensor):
        repair = f"; write torch.from_numpy({name})" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name} is {_found(value)}; a torch tensor is needed{repair}")
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise TypeError(f"{name} is {value.layout} on {value.device}; a dense tensor with numbers is needed")
    if floating:
        _check_floating(value, len(axes), wanted)
    elif hint is Tensor and (value.dtype == torch.bool or value.is_complex()):
        raise TypeError(f"{name} has dtype {value.dtype}; real numbers are needed")
    elif hint is not Tensor and str(value.dtype).removeprefix("torch.") not in hint.dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; {' or '.join(hint.dtypes[-1:])} is needed")
    _check_shape(value, axes, wanted)
    if value.is_floating_point():
        _check_finite(value, wanted)
    value = value.detach() if value.requires_grad else value
    value = value.resolve_neg()  # a view of negated bits cannot be read as bits
    return value.clone() if value.is_inference() else value


def _check_floating(value: Tensor, rank: int, wanted: _Wanted) -> None:
    name, needed = wanted.name, (torch.float64,) if wanted.double else (torch.float32, torch.float64)
    if value.dtype not in needed:
        words = " or ".join(map(str, needed))
        labels = rank == 2 and value.ndim == 1 and not value.is_floating_point()
        repair = f"torch.nn.functional.one_hot({name}).double() for classes" if labels else f"{name}.double()"
        raise TypeError(f"{name} has dtype {value.dtype}; {words} is needed; write {repair}")


def _check_finite(value: Tensor, wanted: _Wanted) -> None:
    good = ~torch.isnan(value) if wanted.infinite else torch.isfinite(value)
    if not bool(good.all()):
        place = (~good).nonzero()[0].tolist()
        raise ValueError(f"{wanted.name}{place} is {value[tuple(place)].item()}; finite numbers are needed")


def _check_shape(value: Tensor, axes: list[str], wanted: _Wanted) -> None:
    """Rank and named axes; an axis that an earlier argument fixed must agree with it."""
    name, many = wanted.name, [i for i, axis in enumerate(axes) if axis.startswith("*") or axis == "..."]
    words = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    fixed = len(axes) - len(many)
    if value.ndim < fixed or (not many and value.ndim > fixed):
        repair = f"; write {name}[:, None]" if value.ndim == 1 and fixed == 2 else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; {words} is needed{repair}")
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; at least one number in every axis is needed")
    before = many[0] if many else len(axes)
    after = fixed - before
    pairs = [*zip(axes[:before], value.shape, strict=False)]
    pairs += [*zip(axes[len(axes) - after :], value.shape[value.ndim - after :], strict=True)] if many else []
    for axis, size in pairs:
        if axis.isdigit() and size != int(axis):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; {words} is needed")
        if axis.isidentifier() and axis != "_":
            expected, first = wanted.sizes.setdefault(axis, (size, name))
            if size != expected:
                found = f"{name} has shape {tuple(value.shape)}"
                raise ValueError(f"{found}; {words} with {axis} = {expected}, as in {first}, is needed")
