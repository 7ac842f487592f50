"""Reading a network of the user: its operations in order, and the layers it ends in.

The network is copied to float64, which is exact, to evaluation mode and to the CPU, and read with ``torch.fx``:
containers, `Residual` and modules of the user's own are walked through, down to the layers of torch and of this
package. The model itself is never touched. What cannot be read raises `NoEnclosure`, which names it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from companion.networks.layers import Residual, Sine, Softplus

ANALYTIC: tuple[Any, ...] = (
    Softplus, Sine, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU,
    torch.tanh, torch.sigmoid, torch.erf, torch.sin, F.tanh, F.sigmoid, F.gelu, F.silu,
    "tanh", "sigmoid", "erf", "sin",
)  # fmt: skip


class NoEnclosure(ValueError):
    """A part of the network has no enclosure; the message names it."""


def exact_double(A: Tensor) -> Tensor:
    """Cast floating point to float64, exactly, also where the processor takes float32 below ``2^-126`` for zero."""
    if A.dtype != torch.float32:
        return A.double() if A.is_floating_point() else A
    bits = A.contiguous().view(torch.int32)
    size = (bits & 0x7FFFFF).double() * 2.0**-149  # of a number with the exponent's field 0
    return torch.where(bits & 0x7F800000 == 0, torch.where(bits < 0, -size, size), A.double())


# --- Reading a network ----------------------------------------------------------------------------------------------


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one operation: it is torch's or ours, and no container."""
    container = isinstance(module, nn.Sequential) or type(module) is Residual
    return not container and type(module).__module__.startswith(("torch.nn", "companion."))


class _Tracer(fx.Tracer):
    """Stops at layers; walks through containers, `Residual` and modules of the user's own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return _is_layer(module)

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if type(module) is Residual:
            forward = partial(lambda m, x: m.body(x) + m.shortcut(x), module)
        return super().call_module(module, forward, args, kwargs)


@dataclass(frozen=True)
class Network:
    """A model that was read: a float64 copy in evaluation mode on the CPU, and its operations in order.

    Args:
        module: the copy.
        nodes: the operations, from the input to the output.
        names: the path of each module of the original, by identity.
        original: the model itself, kept so that no other module takes its parts' identities.
    """

    module: nn.Module
    nodes: tuple[fx.Node, ...]
    names: dict[int, str]
    original: nn.Module

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The module that `node` calls, or None."""
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """The operations that call `module`, a part of the original model or of the copy.

        Raises:
            ValueError: the model has no such part.
        """
        name = self.names.get(id(module))
        if name is None:
            raise ValueError(f"{type(module).__name__} is not a part of the model; one of its own modules is needed")
        part = self.module.get_submodule(name)
        return [node for node in self.nodes if self.layer(node) is part]

    def shared(self, layer: nn.Module) -> bool:
        """Whether a layer is called twice or another module holds its parameters."""
        owners = Counter(id(p) for _, p in self.module.named_parameters(remove_duplicate=False))
        return len(self.calls(layer)) != 1 or any(owners[id(p)] > 1 for p in layer.parameters())

    def describe(self, node: fx.Node) -> str:
        """What `node` does, for a message: the class and path of a layer, or the function and its caller's class."""
        layer = self.layer(node)
        if layer is not None:
            return f"{type(layer).__name__} ({node.target})"
        if node.op == "get_attr":
            what = f"the tensor {node.target} outside a layer"
        else:
            what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        stack = node.meta.get("nn_module_stack") or {}
        owner = list(stack.values())[-1][1] if stack else type(self.module)
        return f"{what} in {getattr(owner, '__name__', str(owner).rsplit('.', 1)[-1])}"


def read(model: nn.Module | Network) -> Network:
    """Copy `model` to float64 (which is exact), evaluation mode and the CPU, and list its operations.

    Args:
        model: any module with one input, untouched; a network that was read already is returned as it is.

    Returns:
        The network that was read.

    Raises:
        TypeError: not a module.
        NoEnclosure: a module with hooks or a replaced forward, complex parameters, or a forward that cannot be traced.
    """
    if isinstance(model, Network):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    for name, part in model.named_modules():
        where = f"{type(part).__name__} ({name})" if name else type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):  # noqa: SLF001
            raise NoEnclosure(f"no enclosure for {where}: it has forward hooks or a replaced forward")
    if any(p.is_complex() for p in model.parameters()):
        raise NoEnclosure(f"no enclosure for {type(model).__name__}: it has complex parameters")
    bare = _is_layer(model) and not list(model.children())  # give the tracer something to walk through
    try:
        module = copy.deepcopy(model).cpu()._apply(exact_double).eval().requires_grad_(False)  # noqa: SLF001
        module = nn.Sequential(module) if bare else module
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a user's forward may raise when it meets a symbol instead of a tensor
        first = str(error).strip().split("\n")[0]
        raise NoEnclosure(f"no enclosure for {type(model).__name__}: it cannot be traced ({first})") from error
    names = {id(part): name for name, part in (nn.Sequential(model) if bare else model).named_modules()}
    names |= {id(part): name for name, part in module.named_modules()}
    network = Network(module, tuple(graph.nodes), names, model)
    inputs = [node for node in network.nodes if node.op == "placeholder" and (node.users or not node.args)]
    if len(inputs) != 1:
        raise NoEnclosure(f"no enclosure for {type(model).__name__}: it has {len(inputs)} inputs instead of one")
    return network


def ancestors(target: fx.Node) -> set[fx.Node]:
    """The nodes that `target` is computed from, itself included."""
    found, todo = {target}, [target]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def inputs(X: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
    """Check the inputs of a network and cast them to float64 on the CPU, which is exact.

    Args:
        X: one sample a row, ``(N, ...)``, float32 or float64.

    Returns:
        The same numbers.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: no rows, no columns, NaN or infinity.
    """
    if not isinstance(X, Tensor):
        raise TypeError(f"X is a {type(X).__name__}; a torch.Tensor is needed")
    if X.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"X is {X.dtype}; torch.float32 or torch.float64 is needed")
    if X.ndim < 2 or X.numel() == 0:
        raise ValueError(f"X has shape {tuple(X.shape)}; (N, ...) with at least one sample and one feature is needed")
    if not all(math.isfinite(end) for end in X.detach().aminmax()):
        raise ValueError("X holds NaN or infinity; finite numbers are needed")
    return exact_double(X.detach().cpu())


# --- The end of a network -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """The last layers of a network that was read.

    Args:
        network: the network.
        last: the last layer, in the copy.
        wide: the dense layer before the activation, in the copy, or None.
        activation: what stands between them, by name.
        analytic: whether it is listed as analytic and not a polynomial.
        problem: why the theorems' architecture was not recognized, or "".
    """

    network: Network
    last: nn.Linear
    wide: nn.Linear | None
    activation: str
    analytic: bool
    problem: str


def head(model: nn.Module | Network, last: nn.Module | None = None) -> Head:
    """Find ``h = sigma(A xi + a)``, ``q = V^T [h, 1]`` at the end of a network.

    Args:
        model: any module with one input.
        last: its last layer; None for the last ``nn.Linear`` that it calls.

    Returns:
        What was found; `problem` says what is missing.

    Raises:
        TypeError: `last` is not an ``nn.Linear``, or `model` not a module.
        ValueError: `last` is not a part of the model, or no ``nn.Linear`` is called.
        NoEnclosure: the model cannot be read.
    """
    if last is not None and not isinstance(last, nn.Linear):
        raise TypeError(f"last is a {type(last).__name__}; a torch.nn.Linear is needed")
    network = read(model)
    dense = [node for node in network.nodes if type(network.layer(node)) is nn.Linear]
    calls = dense[-1:] if last is None else network.calls(last)
    if not calls:
        raise ValueError("model calls no torch.nn.Linear as its last layer; one is needed")
    node = calls[-1]
    layer, problem = network.layer(node), ""
    if type(layer) is not nn.Linear or network.nodes[-1].args != (node,):
        problem = "architecture: the last layer must be a plain nn.Linear whose result is the model's output"
    elif network.shared(layer):
        problem = "architecture: the last layer is used twice or shares its parameters"
    middle = node.args[0] if node.args else None
    if not isinstance(middle, fx.Node):
        return Head(network, layer, None, "nothing", False, problem)
    below = middle.args[0] if len(middle.all_input_nodes) == 1 and middle.args else None
    wide = network.layer(below) if isinstance(below, fx.Node) else None
    kind = middle.target if network.layer(middle) is None else type(network.layer(middle))
    analytic = any(kind is a or kind == a for a in ANALYTIC)
    return Head(network, layer, wide if type(wide) is nn.Linear else None, network.describe(middle), analytic, problem)
