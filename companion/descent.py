"""Gradient descent on many networks at once: recorded, interruptible, and resumable to the same bits.

`iterate` runs any step function on stacked parameters and does the bookkeeping of a long run. `train` is its main user:
full-batch gradient descent on an ensemble of multilayer networks with closed-form gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, networks, runs
from companion.arguments import checked
from companion.networks import Activation

_BLOCK_SECONDS = 0.5  # how often a run looks at its clock, its losses and its progress bar
_CHECKPOINT_SECONDS = 30.0
_WORKSPACE_BYTES = {"cpu": 4 * 2**20}  # for train's buffers together: what stays in a core's cache is fastest
_WORKSPACE_BYTES_GPU = 2**30


@dataclass(frozen=True)
class State:
    """What an observable or an update rule sees.

    Args:
        step: the number k of the iterate.
        weights: the live parameters of iterate k; not to be changed.
        members: which members of the ensemble these are (all of them for an observable).
    """

    step: int
    weights: list[Tensor]
    members: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        weights: the last iterate, leading axis S.
        steps: the T recorded k: 0, every, 2 every, ..., and the last.
        residual: ``||R_k||_F`` of every member at the recorded k, ``(T, S)``; for `iterate` what its step function
            returns.
        observed: the observables at the recorded k, each ``(T, ...)``.
        step: the step size, None for `iterate`.
    """

    weights: list[Tensor]
    steps: Tensor
    residual: Tensor
    observed: dict[str, Tensor]
    step: float | Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """``Phi_k = 0.5 ||R_k||_F^2`` at the recorded k, ``(T, S)``."""
        return 0.5 * self.residual.square()


class Diverged(ValueError):
    """The loss became infinite or NaN.

    Args:
        step: the first k at which it is not finite.
        members: the members of the ensemble to which that happened.
        run: the run up to that step; its weights are those at hand when it was noticed, up to half a second later.
    """

    def __init__(self, step: int, members: list[int], run: Run) -> None:
        named = ", ".join(map(str, members[:5])) + (", ..." if len(members) > 5 else "")
        super().__init__(f"the loss of network {named} is not finite at step {step}; a smaller step size is needed")
        self.step, self.members, self.run = step, members, run


Step = Callable[[list[Tensor], int, bool], Tensor]
Observables = Mapping[str, Callable[[State], Tensor]]


def iterate(
    params: Sequence[Tensor],
    step_: Step,
    steps: int,
    *,
    every: int = 1,
    observe: Observables | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    config: Mapping[str, Any] | None = None,
    on_divergence: str = "raise",
    size: float | Tensor | None = None,
) -> Run:
    """Run ``theta_{k+1} = step_(theta_k)`` for ``k = 0, ..., steps - 1`` and record it.

    The step function is ``step_(params, k, move)``: it returns the quantity to follow (usually a loss of shape
    ``(S,)``) at `params`, and if `move` is true it then changes `params` in place to the next iterate. It must depend
    on nothing but `params` and k, so that a resumed run repeats it to the bit: keep momenta and dampings among the
    params, and seed random moves with k. Results stay on the device; the host looks at them about twice a second.

    Args:
        params: initial parameters (copied, the caller's stay as they are), leading axis S by convention.
        step_: the step function.
        steps: number of steps.
        every: record at k = 0, every, 2 every, ... and at the last k.
        observe: observables by name, each ``State -> Tensor`` of a fixed shape.
        progress: show a progress bar; None for only in a terminal.
        checkpoint: file (or folder) that makes the run resumable; it is loaded if it exists and fits. A run killed at
            any moment, called again, ends with the same bits as one that was not, on the same machine and with the same
            number of threads.
        checkpoint_every: steps between two checkpoints; None for about 30 seconds.
        config: what else defines the run (tensors or plain values); a checkpoint made with another one is refused.
        on_divergence: ``"raise"``, or ``"keep"`` to let the other members run on.
        size: the step size to store in the result.

    Returns:
        The run.

    Raises:
        Diverged: the followed quantity became infinite or NaN.
        ValueError: a number out of range, or a checkpoint that is damaged or belongs to another run.
        KeyboardInterrupt: after saving the checkpoint, if one was asked for.
    """
    steps, every = runs.count("steps", steps, 0), runs.count("every", every, 1)
    if checkpoint_every is not None:
        checkpoint_every = runs.count("checkpoint_every", checkpoint_every, 1)
    if on_divergence not in ("raise", "keep"):
        raise ValueError(f"on_divergence is {on_divergence!r}; 'raise' or 'keep' is needed")
    if not len(params):
        raise ValueError("params is empty; at least one tensor is needed")
    record = _Record(steps, every, dict(observe or {}))
    store = None
    if checkpoint is not None:
        observables = {name: runs.identity(f) for name, f in sorted(record.observe.items())}
        settings = {"steps": steps, "every": every, "observables": observables, "step function": runs.identity(step_)}
        store = _Checkpoint(Path(checkpoint), {**(config or {}), **settings, "initial parameters": list(params)})
    params = [p.detach().clone(memory_format=torch.contiguous_format) for p in params]
    k = store.load(params, record) if store else 0
    saved = time.monotonic()
    with (
        torch.no_grad(),
        runs.held_interrupt(store is not None) as interrupted,
        runs.progress_bar(progress, k, steps) as bar,
    ):
        while k <= steps:
            # One block of steps without any question to the device. At k = steps there is only a measurement left.
            begin, clock = k, time.monotonic()
            while k <= steps and not interrupted() and (k == begin or time.monotonic() - clock < _BLOCK_SECONDS):
                if k % every == 0 or k == steps:
                    record.look(State(k, params))
                full = record.put(k - begin, step_(params, k, k < steps))
                k += 1
                if full or (checkpoint_every and k % checkpoint_every == 0):
                    break
            bad = record.flush(begin, k)
            if bad is not None and on_divergence == "raise":
                raise Diverged(bad[0], bad[1], record.run(params, size, bad[0]))
            bar.update(min(k, steps) - min(begin, steps))
            due = k % checkpoint_every == 0 if checkpoint_every else time.monotonic() - saved > _CHECKPOINT_SECONDS
            if store and k > begin and (due or k > steps or interrupted()):
                store.save(params, record, k)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
    return record.run(params, size)


class _Record:
    """The history of a run, in arrays allocated once, on the parameters' device."""

    def __init__(self, steps: int, every: int, observe: dict[str, Callable[[State], Tensor]]) -> None:
        self.steps, self.every, self.observe = steps, every, observe
        self.at = torch.tensor(sorted({*range(0, steps + 1, every), steps}))
        self.history: dict[str, Tensor] = {}  # "residual", and "observed.NAME" for each observable
        self.block: Tensor | None = None  # the followed quantity at every step of the present block

    def row(self, k: int) -> int:
        """The number of recorded steps before k."""
        return len(self.at) if k > self.steps else -(-k // self.every)

    def rows_for(self, name: str, value: Tensor) -> Tensor:
        if name not in self.history:
            self.history[name] = value.new_full((len(self.at), *value.shape), 0)
        return self.history[name]

    def look(self, state: State) -> None:
        for name, observable in self.observe.items():
            value = observable(state)
            if not isinstance(value, Tensor):
                raise TypeError(f"observable {name!r} returned {type(value).__name__}; a tensor is needed")
            self.rows_for(f"observed.{name}", value)[self.row(state.step)] = value

    def put(self, i: int, value: Tensor) -> bool:
        """Keep the followed quantity of the block's step i; true when the block is full."""
        if self.block is None:
            capacity = 2**22 // max(1, value.numel() * value.element_size())
            self.block = value.new_empty(min(1024, max(1, capacity)), *value.shape)
            self.rows_for("residual", value)
        self.block[i] = value
        return i + 1 == len(self.block)

    def flush(self, begin: int, end: int) -> tuple[int, list[int]] | None:
        """Move steps begin..end-1 to the history; return the first step that is not finite, and the members."""
        if end == begin:
            return None
        block = self.block[: end - begin]
        first, last = self.row(begin), self.row(end)
        self.history["residual"][first:last] = block[(self.at[first:last] - begin).to(block.device)]
        finite = torch.isfinite(block)
        if bool(finite.all()):  # the one synchronization of a block
            return None
        wrong = (~finite.reshape(len(block), -1)).cpu()
        i = int(wrong.any(dim=1).nonzero()[0])
        return begin + i, wrong[i].nonzero()[:, 0].tolist()

    def run(self, params: list[Tensor], size: float | Tensor | None, before: int | None = None) -> Run:
        """The run, or what was recorded of it before a step."""
        rows = len(self.at) if before is None else self.row(before)
        kept = {name: h[:rows] for name, h in self.history.items()}
        residual = kept.pop("residual")
        return Run(params, self.at[:rows], residual, {n.removeprefix("observed."): h for n, h in kept.items()}, size)


class _Checkpoint:
    """One file: parameters, history so far, and in its header the step and digests of the configuration."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path / "run.safetensors" if path.is_dir() else path
        self.digests = {name: runs.digest(value) for name, value in config.items()}

    def save(self, params: list[Tensor], record: _Record, k: int) -> None:
        tensors = {f"params.{i}": p for i, p in enumerate(params)}
        tensors |= {name: h[: record.row(k)] for name, h in record.history.items()}
        runs.write_tensors(self.path, tensors, {"next_step": k, "config": self.digests})

    def load(self, params: list[Tensor], record: _Record) -> int:
        """Fill parameters and history from the file, and return the step to go on with; 0 without a file."""
        if not self.path.exists():
            return 0
        tensors, header = runs.read_tensors(self.path, "checkpoint")
        k, digests = header["next_step"], header["config"]
        other = [n for n in {**digests, **self.digests} if digests.get(n) != self.digests.get(n)]
        if other:
            raise ValueError(
                f"checkpoint {self.path} is of a run with another {', '.join(other)}; delete it or choose a new path"
            )
        for i, p in enumerate(params):
            p.copy_(tensors.pop(f"params.{i}"))
        for name, h in tensors.items():
            h = h.to(params[0].device)
            record.rows_for(name, h[0])[: len(h)] = h
        return k


Update = Callable[[State, Tensor, list[Tensor]], list[Tensor]]


@checked
def train(
    weights: Sequence[Tensor],
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"],
    step: float | Float[Tensor, " S"],
    steps: int,
    *,
    activation: str | Activation = "relu",
    observe: Observables | None = None,
    every: int = 1,
    update: Update | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    on_divergence: str = "raise",
) -> Run:
    """Full-batch gradient descent ``W_l <- W_l - eta grad_l Phi`` on ``Phi = 0.5 ||F_{L-1} W_L - Y||_F^2``.

    All layers of all S networks move together; gradients are closed form (see `networks.gradients`), products write
    into buffers allocated once, and the update is part of the last product. The caller's weights are not touched.

    Args:
        weights: L tensors ``(S, n_in, n_out)``, or ``(n_in, n_out)`` for one network, float32 or float64.
        X: inputs ``(N, d)``.
        Y: targets ``(N, K)``.
        step: the step ``eta > 0`` for this sum-of-squares loss, one for all networks or one for each ``(S,)``.
        steps: number of steps.
        activation: name or `Activation`.
        observe: observables by name, each ``State -> Tensor`` of a fixed shape.
        every: record at k = 0, every, 2 every, ... and at the last k.
        update: replaces the descent direction: ``(state, R, gradients) -> directions`` gets the residual ``(C, N, K)``
            and the gradients of the C networks ``state.members`` and returns L tensors of the gradients' shapes;
            ``W_l <- W_l - eta directions_l``. Random directions must be seeded with ``state.step``.
        chunk: networks handled at once; bits depend on it. None for a number that keeps all buffers together within
            4 MB on a CPU and 1 GB on a GPU, computed from the shapes alone.
        progress: see `iterate`.
        checkpoint: see `iterate`.
        checkpoint_every: see `iterate`.
        on_divergence: see `iterate`.

    Returns:
        The run; ``residual`` is ``||R_k||_F``, ``(T, S)``, and the weights have their leading axis S.

    Raises:
        Diverged: the loss became infinite or NaN; carries the step and the run up to it.
        ValueError: data or weights that do not fit, a step that is not positive and finite, a number out of range, or a
            checkpoint that is damaged or belongs to another run.
        TypeError: a wrong dtype or type.
    """
    data.check(X, Y, geometry=False)
    networks.check_weights(weights, X, Y)
    weights = networks.as_ensemble(weights)
    sigma = networks.activation(activation)
    eta = _step_sizes(step, weights[0])
    if chunk is None:
        chunk = default_chunk([W.shape for W in weights], X, keep_gradients=update is not None, two=sigma.pull is None)
    chunk = min(runs.count("chunk", chunk, 1), len(weights[0]))
    config = {
        "X": X,
        "Y": Y,
        "step": eta,
        "activation": sigma.name,
        "chunk": chunk,
        "update": update and runs.identity(update),
    }
    step_ = _Descent(X, Y, eta, sigma, chunk, update)
    return iterate(
        weights,
        step_,
        steps,
        every=every,
        observe=observe,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        config=config,
        on_divergence=on_divergence,
        size=step,
    )


def _step_sizes(step: float | Tensor, W: Tensor) -> Tensor:
    """The step of every network as (S, 1, 1), checked."""
    if not isinstance(step, Tensor | float | int):
        raise TypeError(f"step is {type(step).__name__}; a number, or a tensor with one for each network, is needed")
    eta = torch.as_tensor(step, dtype=torch.float64)
    if eta.ndim and eta.shape != W.shape[:1]:
        raise ValueError(f"step has shape {tuple(eta.shape)}; a number or ({len(W)},), one for each network, is needed")
    if not bool((torch.isfinite(eta) & (eta > 0)).all()):
        raise ValueError(f"step is {eta.tolist()}; positive finite numbers are needed")
    return eta.to(dtype=W.dtype, device=W.device).expand(len(W)).reshape(-1, 1, 1).contiguous()


@checked
def default_chunk(
    shapes: Sequence[Sequence[int]], X: Float[Tensor, "N d"], *, keep_gradients: bool = False, two: bool = False
) -> int:
    """The number of networks handled at once by `train`: all buffers within 4 MB (CPU) or 1 GB (GPU), equal chunks.

    Args:
        shapes: shapes ``(S, n_in, n_out)`` of the weights.
        X: inputs ``(N, d)``; gives N, the dtype and the kind of device.
        keep_gradients: whether all gradients are kept at once.
        two: whether pre-activations are kept beside the features.

    Returns:
        The chunk, from 1 to S.
    """
    S, N = shapes[0][0], len(X)
    numbers = N * (sum((3 if two else 2) * n_out for _, _, n_out in shapes[:-1]) + shapes[-1][2])
    if keep_gradients:
        numbers += sum(n_in * n_out for _, n_in, n_out in shapes)
    most = max(1, _WORKSPACE_BYTES.get(X.device.type, _WORKSPACE_BYTES_GPU) // (numbers * X.element_size()))
    return math.ceil(S / math.ceil(S / most))


class _Descent:
    """The step function of `train`: forward, residual norms, backward with the update inside, chunk by chunk."""

    def __init__(self, X: Tensor, Y: Tensor, eta: Tensor, sigma: Activation, chunk: int, update: Update | None) -> None:
        self.X, self.Y, self.eta, self.sigma, self.chunk, self.update = X, Y, eta, sigma, chunk, update
        self.params: list[Tensor] | None = None

    def bind(self, params: list[Tensor]) -> None:
        """Allocate the buffers and cut all views once; the loop then only multiplies."""
        self.params = params
        S, N, C = len(params[0]), len(self.X), self.chunk
        new = params[0].new_empty
        H, D = ([new(C, N, W.shape[2]) for W in params[:-1]] for _ in range(2))  # features; d Phi / d z_l
        Z = [] if self.sigma.pull else [torch.empty_like(h) for h in H]  # pre-activations, where they are needed
        R = new(C, N, params[-1].shape[2])
        self.norms = new(S)
        self.parts = []
        for a in range(0, S, C):
            members, c = slice(a, min(a + C, S)), min(C, S - a)
            F = [self.X.expand(c, *self.X.shape), *(h[:c] for h in H)]
            z = [t[:c] for t in Z] or F[1:]
            W, d = [P[members] for P in params], [t[:c] for t in D]
            self.parts.append((members, W, F, z, d, R[:c], self.eta[members], self.norms[members]))

    def __call__(self, params: list[Tensor], k: int, move: bool) -> Tensor:
        if self.params is not params:
            self.bind(params)
        for members, W, F, Z, D, R, eta, norms in self.parts:
            self.forward(W, F, Z, R)
            torch.linalg.vector_norm(R, dim=(1, 2), out=norms)
            if move and self.update is None:
                self.descend(W, F, Z, D, R.mul_(eta))
            elif move:
                self.follow(State(k, W, members), F, Z, D, R, eta)
        return self.norms

    def forward(self, W: list[Tensor], F: list[Tensor], Z: list[Tensor], R: Tensor) -> None:
        """F_l = sigma(F_{l-1} W_l) and R = F_{L-1} W_L - Y, into the buffers."""
        for l in range(len(Z)):
            torch.bmm(F[l], W[l], out=Z[l])
            if self.sigma.value_ is None:
                F[l + 1].copy_(self.sigma.value(Z[l]))
            else:
                self.sigma.value_(F[l + 1] if F[l + 1] is Z[l] else F[l + 1].copy_(Z[l]))
        # For one output the transposed product is the same numbers, read along the rows: several times faster.
        if R.shape[2] == 1:
            torch.baddbmm(self.Y.mT, W[-1].mT, F[-1].mT, beta=-1, out=R.mT)
        else:
            torch.baddbmm(self.Y, F[-1], W[-1], beta=-1, out=R)

    def backward(self, l: int, D: Tensor, W: list[Tensor], F: list[Tensor], Z: list[Tensor], out: Tensor) -> Tensor:
        """D_l = (D_{l+1} W_{l+1}^T) * sigma'(z_l); W is counted from 0, so W_{l+1} is W[l]."""
        torch.mul(D, W[l].mT, out=out) if D.shape[2] == 1 else torch.bmm(D, W[l].mT, out=out)
        if self.sigma.pull:
            return self.sigma.pull(out, F[l])
        return out.mul_(self.sigma.derivative(Z[l - 1]))

    def descend(self, W: list[Tensor], F: list[Tensor], Z: list[Tensor], D: list[Tensor], R: Tensor) -> None:
        """Given eta R: W_l <- W_l - F_{l-1}^T D_l from the last layer down, each after its transpose was used."""
        for l in range(len(W) - 1, -1, -1):
            below = self.backward(l, R, W, F, Z, D[l - 1]) if l else None
            if R.shape[2] == 1:
                W[l].mT.baddbmm_(R.mT, F[l], alpha=-1)
            else:
                W[l].baddbmm_(F[l].mT, R, alpha=-1)
            R = below

    def follow(self, state: State, F: list[Tensor], Z: list[Tensor], D: list[Tensor], R: Tensor, eta: Tensor) -> None:
        """The same with all gradients kept, and the caller's directions in their place."""
        W, grads, B = state.weights, [], R
        for l in range(len(W) - 1, -1, -1):
            grads.insert(0, torch.bmm(F[l].mT, B))
            B = self.backward(l, B, W, F, Z, D[l - 1]) if l else B
        directions = self.update(state, R, grads)
        found, needed = [[tuple(t.shape) for t in ts] for ts in (directions, W)]
        if found != needed:
            raise ValueError(f"update returned shapes {found}; {needed} is needed, one direction for each layer")
        for w, direction in zip(W, directions, strict=True):
            w.sub_(direction * eta)
