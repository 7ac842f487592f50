"""Phase 1 of the recipe: epochs of any optimizer on all parameters, resumable after any mini-batch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from companion import runs
from companion.beyond_ntk import last_layer

_F64 = torch.float64
_CHECKPOINT_SECONDS = 30.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every part is in the mode it was in."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def outputs(model: nn.Module, rows: Tensor) -> Tensor:
    """A model's outputs, on a copy of the rows, as its forward may work in place; or one sentence."""
    try:
        out = model(rows.clone())
    except Exception as error:  # whatever the user's own forward may raise
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"the model fails on X, {rows.dtype} {tuple(rows.shape)}: {first}") from error
    if not isinstance(out, Tensor):
        raise TypeError(f"the model returns a {type(out).__name__}; one tensor of outputs is needed")
    return out


@dataclass
class Phase1:
    """What phase 1 carries along: everything that a checkpoint has to hold."""

    model: nn.Module
    rule: torch.optim.Optimizer
    scheduler: Any
    observe: dict[str, Callable[[nn.Module], Any]]
    keep: set[int]
    epoch: int = 0
    place: int = 0  # mini-batches of this epoch that are done
    total: float = 0.0  # of their losses, sample by sample
    losses: list[float] = field(default_factory=list)
    observed: dict[str, list[Tensor]] = field(default_factory=dict)
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def look(self) -> None:
        """Record what is asked for after an epoch."""
        rng = torch.get_rng_state()
        with evaluating(self.model):
            for name, function in self.observe.items():
                value = function(self.model)
                plain = (
                    value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value, device="cpu", dtype=_F64)
                )
                self.observed.setdefault(name, []).append(plain.double())
        torch.set_rng_state(rng)
        if self.epoch in self.keep:
            state = self.model.state_dict()
            self.snapshots[self.epoch] = {name: t.detach().cpu().clone() for name, t in state.items()}

    def results(self) -> tuple[Tensor, dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        observed = {name: torch.stack(values) for name, values in self.observed.items()}
        return torch.tensor(self.losses, dtype=_F64, device="cpu"), observed, self.snapshots


def batches(order: Tensor, batch: int) -> list[Tensor]:
    """Cut an order into mini-batches; a single sample left over joins the last one, as BatchNorm cannot take it."""
    parts = list(order.split(batch))
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts) > 1 and len(parts[-1]) == 1 else parts


def run_phase1(
    state: Phase1,
    X: Tensor,
    y: Tensor,
    tau: int,
    loss: str,
    batch: int,
    augment: Callable[[Tensor], Tensor] | None,
    seed: int,
    store: Store | None,
    every: int | None,
    progress: bool | None,
) -> None:
    """tau epochs, resumable after any mini-batch."""
    count = len(batches(torch.arange(len(X), device="cpu"), batch))
    devices = [X.device] if X.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        fresh = not (store and store.load(state))
        if fresh:
            state.look()
        state.model.train()
        saved, done = time.monotonic(), 0
        with (
            runs.held_interrupt(store is not None) as interrupted,
            runs.progress_bar(progress, state.epoch * count + state.place, tau * count) as bar,
        ):
            while state.epoch < tau:
                order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed + state.epoch))
                for part in batches(order, batch)[state.place :]:
                    _one_batch(state, X, y, part.to(X.device), loss, augment)
                    bar.update(1)
                    done += 1
                    last = state.place == count
                    if last:
                        _close_epoch(state, len(X))
                    due = done % every == 0 if every else time.monotonic() - saved > _CHECKPOINT_SECONDS
                    if store and (due or interrupted() or (last and state.epoch == tau)):
                        store.save(state)
                        saved = time.monotonic()
                    if interrupted():
                        raise KeyboardInterrupt


def _one_batch(
    state: Phase1, X: Tensor, y: Tensor, part: Tensor, loss: str, augment: Callable[[Tensor], Tensor] | None
) -> None:
    rows = X[part] if augment is None else augment(X[part])

    def closure() -> Tensor:
        state.rule.zero_grad()
        value = last_layer.pointwise(state.model(rows.clone()), y[part], loss).mean()  # a forward may work in place
        value.backward()
        return value

    with torch.enable_grad():
        value = float(state.rule.step(closure).detach())
    if not math.isfinite(value):
        raise ValueError(
            f"the loss of phase 1 is {value} in epoch {state.epoch + 1}; a smaller learning rate is needed"
        )
    state.total += value * len(part)
    state.place += 1


def _close_epoch(state: Phase1, N: int) -> None:
    if state.scheduler is not None:
        state.scheduler.step()
    state.losses.append(state.total / N)
    state.epoch, state.place, state.total = state.epoch + 1, 0, 0.0
    state.look()


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def rules(rule: torch.optim.Optimizer) -> str:
    """The optimizer's numbers, learning rate and all, as text."""
    return repr([{k: v for k, v in sorted(group.items()) if k != "params"} for group in rule.param_groups])


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested lists and dictionaries into what JSON can hold; their tensors go aside, under a name."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[k, _pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_pack`, with lists for tuples."""
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _unpack(v, tensors) for k, v in value["pairs"]}
    return value


class Store:
    """One safetensors file for phase 1: model, optimizer, random state and history, with JSON in its header."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.settings = json.loads(json.dumps(settings))
        self.path = folder / "phase1.safetensors"

    def save(self, state: Phase1) -> None:
        tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
        for e, kept in state.snapshots.items():
            tensors |= {f"snapshot.{e}.{k}": v for k, v in kept.items()}
        for name, values in state.observed.items():
            tensors[f"observed.{name}"] = torch.stack(values)
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and next(state.model.parameters()).is_cuda:
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        header = {
            "settings": self.settings,
            "progress": [state.epoch, state.place, state.total, state.losses],
            "optimizer": _pack(state.rule.state_dict(), "optimizer", tensors),
            "scheduler": _pack(state.scheduler and state.scheduler.state_dict(), "scheduler", tensors),
        }
        runs.write_tensors(self.path, tensors, header)

    def load(self, state: Phase1) -> bool:
        """Fill the state from the file; false without one."""
        if not self.path.exists():
            return False
        tensors, header = runs.read_tensors(self.path, "checkpoint")
        found = header["settings"]
        other = [k for k in {**found, **self.settings} if found.get(k) != self.settings.get(k)]
        if other:
            raise ValueError(f"checkpoint {self.path} is of a run with another {', '.join(other)}; choose a new folder")

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        state.model.load_state_dict(under("model."))
        state.rule.load_state_dict(_unpack(header["optimizer"], tensors))
        if state.scheduler is not None:
            state.scheduler.load_state_dict(_unpack(header["scheduler"], tensors))
        state.epoch, state.place, state.total, state.losses = header["progress"]
        state.observed = {k: list(v) for k, v in under("observed.").items()}
        for key, value in under("snapshot.").items():
            e, _, name = key.partition(".")
            state.snapshots.setdefault(int(e), {})[name] = value
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return True
