"""The two-phase recipe for any torch module that ends in a linear layer.

Phase 1: any optimizer, all parameters, tau epochs. Then a little noise on the hidden parameters. Phase 2: only the last
layer, on frozen features, a convex problem (see `last_layer`). The guarantee is for this modified algorithm, never for
the unmodified one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion import runs
from companion.arguments import checked
from companion.beyond_ntk import last_layer
from companion.beyond_ntk.phase1 import Phase1, Store, evaluating, outputs, rules, run_phase1
from companion.beyond_ntk.phase2 import (
    Phase2,
    phase2_gd,
    phase2_lbfgs,
    phase2_least_squares,
    phase2_momentum_sgd,
    phase2_nesterov,
)

METHODS: dict[str, Callable[..., Phase2]] = {
    "gd": phase2_gd,
    "nesterov": phase2_nesterov,
    "least_squares": phase2_least_squares,
    "lbfgs": phase2_lbfgs,
    "momentum_sgd": phase2_momentum_sgd,
}
_Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_Observables = Mapping[str, Callable[[nn.Module], Any]]


@dataclass(frozen=True)
class TwoPhaseRun:
    """A finished run of the recipe.

    Args:
        tau: the number of epochs of phase 1.
        phase1: the mean mini-batch loss of every epoch, ``(tau,)``, in train mode.
        observed: the observables after epochs 0, ..., tau, each ``(tau + 1, ...)``.
        snapshots: the model's state after the epochs asked for, on the CPU.
        before: the loss at ``theta^tau``, in eval mode.
        noisy: the loss after the noise.
        M: the frozen features ``[h, 1]`` after the noise, ``(N, m+1)``; without the 1 if the last layer has no bias.
        after: the model's loss on the data at the end, in eval mode.
        phase2: the run of phase 2; None if there was none.
    """

    tau: int
    phase1: Tensor
    observed: dict[str, Tensor]
    snapshots: dict[int, dict[str, Tensor]]
    before: float
    noisy: float
    M: Tensor
    after: float
    phase2: Phase2 | None = None

    @property
    def loss(self) -> float:
        """`after`: an upper bound on the distance to the global minimum, whatever the rank, up to rounding."""
        return self.after


# --- Features and parameters ------------------------------------------------------------------------------------------


@checked
def last_layer_features(
    model: nn.Module, last: nn.Linear, X: Float[Tensor, "N ..."], batch: int = 256
) -> Float[Tensor, "N m"]:
    """Compute ``h_i``, the inputs of the last layer, in eval mode: no dropout, BatchNorm with its buffers.

    Args:
        model: any module; its modes are restored, nothing in it changes.
        last: its final linear layer; what it returns is the model's output.
        X: inputs, one sample a row.
        batch: rows at once.

    Returns:
        The features ``(N, m)``.

    Raises:
        ValueError: `last` is no part of `model`, is not run exactly once, or is not final; empty data, NaN or infinity.
        TypeError: `last` is no linear layer, or X has no floating-point dtype.
    """
    _check_model(model, last)
    if batch < 1:
        raise ValueError(f"batch is {batch}; a number >= 1 is needed")
    return _features(model, last, X, min(batch, len(X)), constant=False)


def _features(model: nn.Module, last: nn.Linear, X: Tensor, batch: int, constant: bool) -> Tensor:
    """The features, written into one array that may have the constant column already: no second copy is made."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = last.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    m = last.in_features
    M = None
    try:
        with evaluating(model):
            for i, rows in enumerate(X.split(batch)):
                seen.clear()
                out = outputs(model, rows)
                if len(seen) != 1:
                    raise ValueError(f"last ran {len(seen)} times in one pass; exactly once is needed")
                h, own = seen[0]
                if out.shape != (len(rows), last.out_features):
                    raise ValueError(
                        f"the model's outputs for {len(rows)} rows have shape {tuple(out.shape)}; "
                        f"({len(rows)}, {last.out_features}), as last gives for vectors, is needed"
                    )
                if not bool(torch.isfinite(h).all()):
                    raise ValueError("the features hold NaN or infinity; a smaller learning rate in phase 1 may help")
                if not torch.equal(own, out):
                    raise ValueError("last is not the model's output; a final linear layer is needed")
                if M is None:
                    M = h.new_empty(len(X), m + constant)
                M[i * batch : i * batch + len(rows), :m] = h.reshape(len(rows), m)
    finally:
        handle.remove()
    if constant:
        M[:, m] = 1
    return M


def _check_model(model: nn.Module, last: nn.Linear) -> None:
    """Refuse a `last` that is no linear layer of `model`, or whose numbers another layer uses, too."""
    if not isinstance(last, nn.Linear):
        raise TypeError(f"last is {type(last).__name__}; a torch.nn.Linear is needed")
    if not any(part is last for part in model.modules()):
        raise ValueError("last is no part of model; pass the model's own final layer")
    others = (
        t for part in model.modules() if part is not last for t in (*part.parameters(False), *part.buffers(False))
    )
    memory = {t.untyped_storage().data_ptr() for t in others if t.numel()}
    if any(p.untyped_storage().data_ptr() in memory for p in last.parameters()):
        raise ValueError("last shares its parameters with another layer, which phase 2 would move, too; untie it first")


@checked
def with_constant(h: Float[Tensor, "... N m"]) -> Float[Tensor, "... N p"]:
    """Append the constant column: ``M = [h, 1]``."""
    return torch.cat([h, h.new_ones(*h.shape[:-1], 1)], -1)


@checked
def last_weights(last: nn.Linear) -> Float[Tensor, "p K"]:
    """The last layer as ``V``: weights transposed, then the bias as the last row, if there is one."""
    W = last.weight.detach().mT
    return W.clone() if last.bias is None else torch.cat([W, last.bias.detach()[None]])


def _set_last_weights(last: nn.Linear, V: Float[Tensor, "p K"]) -> None:
    """Write ``V`` into the last layer; nothing else in the model changes."""
    m = last.in_features
    with torch.no_grad():
        last.weight.copy_(V[:m].mT)
        if last.bias is not None:
            last.bias.copy_(V[m])


def hidden_parameters(
    model: nn.Module, last: nn.Linear, where: str = "all", wide: nn.Module | None = None
) -> list[nn.Parameter]:
    """The trainable parameters that get noise: all but the last layer's, or the wide layer's only; never a buffer.

    Args:
        model: any module.
        last: its final linear layer.
        where: ``"all"`` or ``"wide"``.
        wide: the wide layer; None for the linear layer defined before `last`.

    Returns:
        The parameters, in the model's order.

    Raises:
        ValueError: an unknown `where`, no wide layer or one of another model, or no trainable parameter.
    """
    _check_model(model, last)
    if where not in ("all", "wide"):
        raise ValueError(f"where is {where!r}; 'all' or 'wide' is needed")
    if where == "wide":
        if wide is None:
            linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
            place = next(i for i, part in enumerate(linear) if part is last)
            if place == 0:
                raise ValueError("model has no linear layer before last; name the wide layer")
            wide = linear[place - 1]
        if wide is last or not any(part is wide for part in model.modules()):
            raise ValueError("wide is no hidden layer of model; pass the model's own wide layer")
    own = {id(p) for p in last.parameters()}
    found = [p for p in (model if where == "all" else wide).parameters() if p.requires_grad and id(p) not in own]
    if not found:
        raise ValueError(
            "model has no trainable parameter for the noise; with noise=None it runs, without a promise of rank"
        )
    return found


def relative_noise(
    params: Iterable[Tensor], rel: float = 1e-3, floor: float = 1e-6, *, generator: torch.Generator
) -> float:
    """Add ``N(0, s^2)`` to every entry of every tensor, ``s = max(rel * rms, floor)``, in place.

    The scale is a root mean square, not a standard deviation: that is 0 for a constant tensor and NaN for a single
    number. With a floor above 0 the noise has a density on every parameter, which is what the theorem needs.

    Args:
        params: tensors, changed in place.
        rel: size relative to the tensor's root mean square.
        floor: least size, positive.
        generator: CPU generator; numbers are drawn in float64 and cast.

    Returns:
        The norm of the noise over the norm of the parameters.

    Raises:
        ValueError: `rel` negative, or `floor` not positive.
    """
    if not (math.isfinite(rel) and rel >= 0 and math.isfinite(floor) and floor > 0):
        raise ValueError(f"rel is {rel} and floor is {floor}; rel >= 0 and floor > 0 are needed")
    moved = size = 0.0
    with torch.no_grad():
        for p in params:
            scale = max(rel * float(p.double().square().mean().sqrt()), floor)
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
            size += float(p.double().square().sum())
            moved += float(draw.square().sum())
            p.add_(draw.to(p))
    return math.sqrt(moved / size) if size else math.inf


# --- The recipe -------------------------------------------------------------------------------------------------------


@checked
def two_phase(
    model: nn.Module,
    last: nn.Linear,
    X: Float[Tensor, "N ..."],
    y: Tensor,
    optimizer: torch.optim.Optimizer | _Make,
    tau: int,
    *,
    loss: str = "cross_entropy",
    batch: int = 64,
    augment: Callable[[Tensor], Tensor] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    noise: float | None = 1e-3,
    floor: float = 1e-6,
    where: str = "all",
    wide: nn.Module | None = None,
    phase2: str | None = "nesterov",
    options: Mapping[str, Any] | None = None,
    double: bool = True,
    generator: torch.Generator,
    observe: _Observables | None = None,
    snapshots: Sequence[int] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool | None = None,
) -> TwoPhaseRun:
    """Run the recipe: tau epochs of any optimizer on all parameters, noise, then the last layer on frozen features.

    The model is trained in place. Phase 2 changes nothing but the last layer's numbers: every other parameter and every
    buffer keeps its bits. The model is left in eval mode, in which the result holds. ``tau = T`` epochs with
    ``noise=None, phase2=None`` is the plain run; ``tau = 0`` is regression on random features.

    Args:
        model: any module that takes rows of X.
        last: its final linear layer.
        X: inputs, one sample a row.
        y: int64 labels ``(N,)`` for cross-entropy, targets ``(N, K)`` for the squared loss.
        optimizer: an optimizer of the model's parameters, or a function that makes one from them.
        tau: epochs of phase 1.
        loss: ``"cross_entropy"`` or ``"squared"`` (``|q - y|^2 / 2``), averaged over the samples.
        batch: mini-batch size in phase 1; the samples are shuffled anew in every epoch.
        augment: a function of a mini-batch of inputs, phase 1 only. It may draw from torch's global generator, which is
            seeded here and put back afterwards; so does dropout.
        scheduler: makes a learning-rate scheduler from the optimizer, stepped after every epoch.
        noise: relative size, see `relative_noise`; None for no noise (then the rank is not guaranteed).
        floor: least size of the noise.
        where: ``"all"`` hidden parameters, or the ``"wide"`` layer's only (enough if its inputs are distinct). What
            does not require a gradient is frozen and gets none.
        wide: the wide layer; None for the linear layer before `last`.
        phase2: one of `METHODS`, or None.
        options: arguments of the phase-2 function. `momentum_sgd` continues with the optimizer's learning rate,
            momentum and velocity, and with the mini-batch size of phase 1, if nothing else is given.
        double: cast the model to float64 at tau, exactly, so that noise, phase 2 and its certificate speak of the same
            numbers.
        generator: CPU generator for shuffling, dropout, augmentation and noise.
        observe: observables by name, functions of the model called in eval mode after epochs 0, ..., tau.
        snapshots: epochs after which the model's state is kept.
        checkpoint: folder that makes the run resumable (safetensors and JSON). Killed at any moment and called again
            with the same arguments and a fresh model, it ends with the same bits.
        checkpoint_every: mini-batches between two checkpoints; None for about 30 seconds.
        progress: show a bar; None for only in a terminal.

    Returns:
        The run. With `double`, the model has become float64 and asks for float64 inputs from then on.

    Raises:
        ValueError: an argument out of range; a model, an optimizer, data or a checkpoint that do not belong together
            (before anything is changed: two rows are tried on a copy); a loss that is not finite.
        TypeError: a wrong type or dtype.
        KeyboardInterrupt: after saving, if a checkpoint was asked for.
    """
    y = _check(model, last, X, y, tau, loss, batch, phase2, snapshots)
    if noise is not None:
        hidden_parameters(model, last, where, wide)
    _rehearse(model, last, X[:2], y[:2], loss, tau)
    rule = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
    if not isinstance(rule, torch.optim.Optimizer):
        raise TypeError(f"optimizer made {type(rule).__name__}; a torch.optim.Optimizer is needed")
    own = {id(p) for p in model.parameters()}
    if any(id(p) not in own for group in rule.param_groups for p in group["params"]):
        raise ValueError("optimizer holds parameters that are not the model's; make it from model.parameters()")
    schedule = scheduler(rule) if scheduler else None
    seed = int(torch.randint(2**62, (), generator=generator))
    settings = {"tau": tau, "loss": loss, "batch": batch, "seed": seed, "snapshots": sorted(snapshots)}
    settings |= {"observables": {name: runs.identity(f) for name, f in sorted((observe or {}).items())}}
    settings |= {"augmentation": augment and runs.identity(augment), "X": runs.digest(X), "y": runs.digest(y)}
    settings |= {"model": runs.digest(model.state_dict()), "optimizer": [type(rule).__name__, rules(rule)]}
    settings |= {"scheduler": [type(schedule).__name__, repr(schedule and schedule.state_dict())]}
    state = Phase1(model, rule, schedule, dict(observe or {}), set(snapshots))
    store = Store(Path(checkpoint), settings) if checkpoint is not None else None
    run_phase1(state, X, y, tau, loss, batch, augment, seed, store, checkpoint_every, progress)
    before = _loss(model, X, y, loss, batch)
    if double and phase2 is not None:
        model.double()
        X, y = X.double(), y.double() if loss == "squared" else y
    if noise is not None:
        g = torch.Generator().manual_seed((seed + 1) % 2**62)
        relative_noise(hidden_parameters(model, last, where, wide), noise, floor, generator=g)
    M = _features(model, last, X, max(batch, 256), constant=last.bias is not None)
    noisy = after = _loss(model, X, y, loss, batch)
    result = None
    if phase2 is not None:
        chosen = _options(phase2, dict(options or {}), last, rule, batch, seed, loss, progress, store)
        result = METHODS[phase2](M, last_weights(last), y, **chosen)
        _set_last_weights(last, result.V)
        after = _loss(model, X, y, loss, batch)
    model.eval()
    return TwoPhaseRun(tau, *state.results(), before, noisy, M, after, result)


def _check(
    model: nn.Module,
    last: nn.Linear,
    X: Tensor,
    y: Tensor,
    tau: int,
    loss: str,
    batch: int,
    phase2: str | None,
    snapshots: Sequence[int],
) -> Tensor:
    """Refuse what does not fit; the targets, labels as int64."""
    _check_model(model, last)
    if X.ndim < 2:
        raise ValueError(f"X has shape {tuple(X.shape)}; one sample a row, (N, ...), is needed")
    if phase2 is not None and phase2 not in METHODS:
        raise ValueError(f"phase2 is {phase2!r}; one of {', '.join(METHODS)}, or None, is needed")
    if tau < 0 or batch < 1:
        raise ValueError(f"tau is {tau} and batch is {batch}; tau >= 0 and batch >= 1 are needed")
    if not all(0 <= epoch <= tau for epoch in snapshots):
        raise ValueError(f"snapshots is {sorted(snapshots)}; epochs from 0 to tau = {tau} are needed")
    return last_layer.check_targets("y", y, len(X), loss, last.out_features)[0]


def _rehearse(model: nn.Module, last: nn.Linear, X: Tensor, y: Tensor, loss: str, tau: int) -> None:
    """Two rows through a copy, in eval mode and in train mode: what would fail later fails before anything changed."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # a parameter that is no leaf, a lock, an open file
        raise ValueError(
            f"model cannot be copied ({str(error).strip()}); two rows are tried on a copy first"
        ) from error
    place = next(i for i, part in enumerate(model.modules()) if part is last)
    with torch.random.fork_rng(devices=[X.device] if X.device.type == "cuda" else []):
        _features(twin, list(twin.modules())[place], X, 2, constant=False)
        if tau:
            with torch.no_grad():
                last_layer.pointwise(outputs(twin.train(), X), y, loss)


def _options(
    phase2: str,
    options: dict[str, Any],
    last: nn.Linear,
    rule: torch.optim.Optimizer,
    batch: int,
    seed: int,
    loss: str,
    progress: bool | None,
    store: Store | None,
) -> dict[str, Any]:
    """The arguments of the phase-2 function, with what follows from phase 1."""
    options = {"loss": loss, **options}
    if phase2 in ("gd", "nesterov", "momentum_sgd"):
        options.setdefault("progress", progress)
        if store is not None:
            options.setdefault("checkpoint", store.path.with_name("phase2.safetensors"))
    if last.bias is None and phase2 in ("gd", "nesterov", "lbfgs"):
        options["centred"] = False
    if phase2 == "momentum_sgd":
        group = rule.param_groups[0]
        options.setdefault("step", group["lr"])
        options.setdefault("momentum", group.get("momentum", 0.9))
        options.setdefault("batch", batch)
        options.setdefault("generator", torch.Generator().manual_seed((seed + 2) % 2**62))
        buffers = [rule.state.get(p, {}).get("momentum_buffer") for p in last.parameters()]
        if all(b is not None for b in buffers):
            velocity = torch.cat([b.mT if b.ndim == 2 else b[None] for b in buffers])
            options.setdefault("velocity", velocity.to(last.weight))
    return options


def _loss(model: nn.Module, X: Tensor, y: Tensor, loss: str, batch: int) -> float:
    """The loss in eval mode."""
    total = 0.0
    with evaluating(model):
        for rows, targets in zip(X.split(max(batch, 256)), y.split(max(batch, 256)), strict=True):
            total += float(last_layer.pointwise(outputs(model, rows).double(), _double(targets), loss).sum())
    return total / len(X)


def _double(y: Tensor) -> Tensor:
    return y.double() if y.is_floating_point() else y
