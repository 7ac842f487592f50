"""Where a network's true outputs lie: the balls of its layers, strung together along a network of the user.

The true network is the one whose parameters are the stored floats and whose arithmetic is exact. `enclose` evaluates it
in float64, layer by layer, and carries beside each number a radius that holds everything the rounding can have done::

    |value - true| <= radius,   entry by entry

The network is read by `companion.networks.reading`, and what it does must be made of layers and functions with an
enclosure. Anything else raises `NoEnclosure`, which names it. BatchNorm and dropout are those of evaluation mode; the
model itself is copied and never touched. The arithmetic is that of `companion.rigor.balls`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from companion.networks.layers import Softplus
from companion.networks.reading import Network, NoEnclosure, ancestors, inputs, read
from companion.rigor import balls
from companion.rigor.balls import Ball
from companion.runs import count

BATCH = 256


# --- What each layer does to a ball ---------------------------------------------------------------------------------


def _same(module: nn.Module, h: Tensor, D: Tensor) -> Ball:
    return h, D


def _linear(module: nn.Linear, h: Tensor, D: Tensor) -> Ball:
    return balls.dense_ball(h, D, module.weight, module.bias)


def _conv2d(module: nn.Conv2d, h: Tensor, D: Tensor) -> Ball:
    padding = module.padding
    if module.padding_mode != "zeros":
        raise NoEnclosure(f"no enclosure for Conv2d with padding_mode {module.padding_mode!r}")
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if padding == "same" and any(t % 2 for t in total):
            raise NoEnclosure("no enclosure for Conv2d with padding 'same' and an even window")
        padding = tuple(t // 2 for t in total) if padding == "same" else 0
    return balls.conv2d_ball(
        h, D, module.weight, module.bias,
        stride=module.stride, padding=padding, dilation=module.dilation, groups=module.groups,
    )  # fmt: skip


def _batchnorm(module: nn.BatchNorm1d | nn.BatchNorm2d, h: Tensor, D: Tensor) -> Ball:
    if module.running_mean is None or module.running_var is None:
        raise NoEnclosure(f"no enclosure for {type(module).__name__} without stored statistics")
    return balls.batchnorm_ball(h, D, module.running_mean, module.running_var, module.weight, module.bias, module.eps)


def _window(size: int | tuple[int, ...]) -> int:
    return size * size if isinstance(size, int) else math.prod(size)


def _avgpool(module: nn.AvgPool2d, h: Tensor, D: Tensor) -> Ball:
    return balls.avgpool_ball(h, D, module, _window(module.kernel_size))


def _adaptive(module: nn.AdaptiveAvgPool2d, h: Tensor, D: Tensor) -> Ball:
    return balls.avgpool_ball(h, D, module, math.prod(h.shape[-2:]))


def _maxpool(module: nn.MaxPool2d, h: Tensor, D: Tensor) -> Ball:
    if module.return_indices:
        raise NoEnclosure("no enclosure for MaxPool2d with return_indices")
    return balls.maxpool_ball(h, D, module)


def _reshaped(reshape: Callable[[Tensor], Tensor], h: Tensor, D: Tensor) -> Ball:
    out = reshape(h)
    if out.ndim < 2 or len(out) != len(h):
        raise NoEnclosure(f"a reshape from {tuple(h.shape)} to {tuple(out.shape)} mixes samples")
    return out, reshape(D)


MODULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Ball]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batchnorm,
    nn.BatchNorm2d: _batchnorm,
    nn.AvgPool2d: _avgpool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.MaxPool2d: _maxpool,
    nn.Flatten: _reshaped,
    nn.Unflatten: _reshaped,
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Dropout1d: _same,
    nn.Dropout2d: _same,
    nn.ReLU: lambda module, h, D: balls.relu_ball(h, D),
    nn.Sigmoid: lambda module, h, D: balls.sigmoid_ball(h, D),
    nn.Tanh: lambda module, h, D: balls.tanh_ball(h, D),
    nn.Softplus: lambda module, h, D: balls.softplus_ball(h, D, module.beta, module.threshold),
    Softplus: lambda module, h, D: balls.softplus_ball(h, D, module.beta),
}


def _add(first: Any, second: Any) -> Ball:
    if not (_is_ball(first) and _is_ball(second)):
        raise NoEnclosure("no enclosure for a sum with a constant")
    return balls.add_ball(*first, *second)


def _unary(ball: Callable[..., Ball]) -> Callable[..., Ball]:
    return lambda x, inplace=False: ball(*x)


def _dropout(x: Ball, p: float = 0.5, training: bool = True, inplace: bool = False) -> Ball:
    if training:
        raise NoEnclosure("no enclosure for dropout in training mode")
    return x


def _flatten(x: Ball, start_dim: int = 0, end_dim: int = -1) -> Ball:
    return _reshaped(partial(torch.flatten, start_dim=start_dim, end_dim=end_dim), *x)


def _reshape(x: Ball, *shape: Any) -> Ball:
    return _reshaped(lambda A: A.reshape(*shape), *x)


def _pool_function(pool: Callable[..., Tensor], rule: Callable[..., Ball]) -> Callable[..., Ball]:
    """The rule of a pooling function, which has the arguments of the module; the module carries them out."""
    return lambda x, *args, **kwargs: rule(pool(*args, **kwargs), *x)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    F.relu: _unary(balls.relu_ball),
    torch.relu: _unary(balls.relu_ball),
    F.sigmoid: _unary(balls.sigmoid_ball),
    torch.sigmoid: _unary(balls.sigmoid_ball),
    F.tanh: _unary(balls.tanh_ball),
    torch.tanh: _unary(balls.tanh_ball),
    F.dropout: _dropout,
    torch.flatten: _flatten,
    F.adaptive_avg_pool2d: _pool_function(nn.AdaptiveAvgPool2d, _adaptive),
    F.avg_pool2d: _pool_function(nn.AvgPool2d, _avgpool),
    F.max_pool2d: _pool_function(nn.MaxPool2d, _maxpool),
    operator.getitem: lambda shape, i: _entry(shape, i),
    getattr: lambda x, name: _shape(x, name),
}
METHODS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "relu": _unary(balls.relu_ball),
    "sigmoid": _unary(balls.sigmoid_ball),
    "tanh": _unary(balls.tanh_ball),
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "size": lambda x, *i: x[0].size(*i),
}
_VIEW_FUNCTIONS = ("view", "reshape", "flatten", torch.flatten, F.dropout)
_VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def _shape(x: Any, name: str) -> Any:
    if name != "shape" or not _is_ball(x):
        raise NoEnclosure(f"no enclosure for the attribute {name}")
    return x[0].shape


def _entry(shape: Any, i: Any) -> Any:
    if not isinstance(shape, torch.Size):
        raise NoEnclosure("no enclosure for an index")
    return shape[i]


def _is_ball(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and all(isinstance(part, Tensor) for part in x)


# --- Evaluation -----------------------------------------------------------------------------------------------------


def _overwrites(network: Network, node: fx.Node) -> bool:
    """Whether `node` changes its input in place although someone else still reads it (or what it is a view of)."""
    layer = network.layer(node)
    marked = (node.op == "call_function" and node.target is operator.iadd) or any(a is True for a in node.args)
    if not (marked or node.kwargs.get("inplace") or getattr(layer, "inplace", False)):
        return False
    source = node.args[0]
    while isinstance(source, fx.Node):
        if len(source.users) > 1:
            return True
        layer = network.layer(source)
        view = isinstance(layer, _VIEWS) or source.target in _VIEW_FUNCTIONS
        if not (view or getattr(layer, "inplace", False) or any(a is True for a in source.args)):
            return False
        source = source.args[0]
    return False


def _evaluate(network: Network, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, known.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
    layer, what = network.layer(node), network.describe(node)
    if layer is not None:
        rule = MODULES.get(type(layer))
        rule = None if rule is None else partial(rule, layer)
        args = args[0] if len(args) == 1 and not kwargs and _is_ball(args[0]) else None
    else:
        rule = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op, {}).get(node.target)
    if rule is None or args is None:
        raise NoEnclosure(f"no enclosure for {what}")
    if _overwrites(network, node):
        raise NoEnclosure(f"no enclosure for {what}: it overwrites what another operation reads")
    try:
        return rule(*args, **kwargs)
    except NoEnclosure as error:
        raise NoEnclosure(f"{error}, at {what}") from error
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise NoEnclosure(f"no enclosure for {what}: {error}") from error


def _run(network: Network, X: Tensor, target: fx.Node) -> Ball:
    """The ball of one block of rows at `target`; what nobody reads any more is dropped."""
    known: dict[fx.Node, Any] = {}
    needed = ancestors(target)
    waiting = {node: sum(user in needed for user in node.users) for node in needed}
    for node in network.nodes:
        if node not in needed:
            continue
        known[node] = (X, torch.zeros_like(X)) if node.op == "placeholder" else _evaluate(network, node, known)
        for source in node.all_input_nodes:
            waiting[source] -= 1
            if not waiting[source] and source is not target:
                del known[source]
        if node is target:
            break
    if not _is_ball(known[target]):
        raise NoEnclosure(f"no enclosure for {network.describe(target)}: it is no tensor")
    value, radius = known[target]
    if not (bool(torch.isfinite(value).all()) and bool(torch.isfinite(radius).all())):
        raise NoEnclosure(f"no enclosure for {network.describe(target)}: its numbers overflow")
    return value, radius


def _output(network: Network) -> fx.Node:
    (result,) = network.nodes[-1].args
    if not isinstance(result, fx.Node):
        raise NoEnclosure(f"no enclosure for {type(network.module).__name__}: its output is not one tensor")
    return result


def blocks(
    model: nn.Module | Network, X: Float[Tensor, "N ..."], *, before: nn.Module | None = None, batch: int = BATCH
) -> Iterator[Ball]:
    """Yield the balls of `enclose` for one block of rows after the other.

    Args:
        model, X, before, batch: as in `enclose`.

    Returns:
        An iterator over pairs ``(value, radius)`` of at most `batch` rows.

    Raises:
        TypeError, ValueError, NoEnclosure: as `enclose`.
    """
    batch = count("batch", batch, 1)
    network, X = read(model), inputs(X)
    if before is None:
        target = _output(network)
    else:
        calls = network.calls(before)
        if len(calls) != 1 or not calls[0].args:
            raise NoEnclosure(f"no enclosure before {type(before).__name__}: it is called {len(calls)} times, not once")
        target = calls[0].args[0]
    forward = _forward(network, X[:2].clone(), before)  # it may work in place
    for i in range(0, len(X), batch):
        value, radius = _run(network, X[i : i + batch], target)
        if len(value) != len(X[i : i + batch]):
            raise NoEnclosure(f"no enclosure for {network.describe(target)}: its rows are not the samples")
        if i == 0:
            _check_against_forward(network, forward, value, radius)
        yield value, radius


def _forward(network: Network, X: Tensor, before: nn.Module | None) -> Any:
    """What the module's own forward computes for two rows, in float64: a second line of defence."""
    found = []
    part = None if before is None else network.module.get_submodule(network.names[id(before)])
    handle = part and part.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    try:
        with torch.no_grad():
            result = network.module(X)
    except Exception as error:  # the user's own forward
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"X has shape {tuple(X.shape[1:])} a sample, on which the model fails: {first}") from error
    finally:
        if handle:
            handle.remove()
    return result if part is None else found[0] if len(found) == 1 else None


def _check_against_forward(network: Network, found: Any, value: Tensor, radius: Tensor) -> None:
    """Refuse a network that was misread: two evaluations in float64 differ by little more than twice the radius."""
    value, slack = value[:2], 4 * radius[:2]
    found = found[: len(value)] if isinstance(found, Tensor) and found.ndim else None
    if found is not None and found.shape == value.shape and bool(((found - value).abs() <= slack).all()):
        return
    raise NoEnclosure(f"no enclosure for {type(network.module).__name__}: its forward computes something else")


def enclose(
    model: nn.Module | Network, X: Float[Tensor, "N ..."], *, before: nn.Module | None = None, batch: int = BATCH
) -> Ball:
    """Enclose a network: ``|value - f(X)| <= radius``, f with the stored parameters, in exact real arithmetic.

    Args:
        model: any module with one input, or what `read` made of it. It is evaluated in evaluation mode, and untouched.
        X: inputs ``(N, ...)``, float32 or float64; the floats are the inputs, no error is allowed for them.
        before: a part of the model, called once: enclose its input instead of the model's output.
        batch: rows in one block; the memory grows with it.

    Returns:
        ``(value, radius)``, float64 on the CPU.

    Raises:
        TypeError: a model that is not a module, or X not floating point.
        ValueError: X empty, NaN or infinite, `before` not a part of the model, or a bad batch.
        NoEnclosure: a layer or function without enclosure, which is named, or an overflow.

    Source: derived in lesson 3.
    """
    values, radii = zip(*blocks(model, X, before=before, batch=batch), strict=True)
    return torch.cat(values), torch.cat(radii)
