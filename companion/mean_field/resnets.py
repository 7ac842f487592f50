"""Mean-field ResNets ``z_{l+1} = z_l + (1/L) sum_m w_m f(z_l, theta_lm)``, many at once: forward, adjoint, descent.

The loss is ``E = (1/2n) sum_i r_i^2`` with ``r_i = v . z_L^i - y_i``, and its gradient is taken with respect to the law
of the particles: for equal weights that is L M times the gradient, so that nothing freezes as the network grows.
Parameters are ``theta (S, L, M, k)``: S networks, L layers, M particles; the block says what they mean (`blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, descent, runs
from companion.arguments import checked
from companion.descent import Observables, Run, State
from companion.mean_field import loops
from companion.mean_field.blocks import Block, check_fit, check_positive

_KEEP_BYTES = {"cpu": 2**21}  # the panels of all layers together: kept while they stay in a core's cache
_KEEP_BYTES_GPU = 2**32
_PANEL_BYTES = {"cpu": 2**20}  # one panel, where they are computed twice
_PANEL_BYTES_GPU = 2**26


def clash(X: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> tuple[int, int] | None:
    """The first two equal inputs with different targets, which no network can fit both; None if there are none."""
    pairs = data.equal_pairs(data.equal_inputs(X))
    return next(((i, j) for i, j in pairs if float(y[i]) != float(y[j])), None)


def _check_task(X: Tensor, y: Tensor, v: Tensor) -> None:
    """Refuse targets that contradict each other, and an output that is always zero."""
    if (pair := clash(X, y)) is not None:
        i, j = pair
        raise ValueError(
            f"X has equal rows {i} and {j} with targets {float(y[i])} and {float(y[j])}; no network can fit both"
        )
    if not bool(v.any()):
        raise ValueError(f"v is {v.tolist()}; a nonzero vector is needed")


@checked
def init_particles(
    block: Block,
    L: int,
    M: int,
    *,
    S: int = 1,
    depth: Literal["constant", "iid"] = "constant",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Float[Tensor, "S L M k"]:
    """Draw ``theta_lm(0)`` from the block's law: one draw for all depths, or one for each.

    Numbers are drawn on the CPU in float64, network after network: network s does not depend on S.

    Args:
        block: the block, whose `draw` is the law.
        L: layers.
        M: particles in a layer.
        S: networks.
        depth: ``"constant"``, ``theta_lm = theta_m``; ``"iid"``, independent layers.
        generator: CPU generator.
        dtype: of the result.
        device: of the result.

    Returns:
        Particles ``(S, L, M, k)``.

    Raises:
        TypeError, ValueError: a number below 1, or another name for `depth`.
    """
    for name, value in (("L", L), ("M", M), ("S", S)):
        if not 1 <= value <= 2**40:
            raise ValueError(f"{name} is {value}; an integer >= 1 is needed, and at most 2^40")
    theta = torch.empty(S, L, M, block.k, dtype=dtype, device=device or "cpu")
    for network in theta:
        network.copy_(block.draw((M,) if depth == "constant" else (L, M), generator))
    return theta


@checked
def forward(
    block: Block, theta: Float[Tensor, "S L M k"], X: Float[Tensor, "n d"], weights: Float[Tensor, " M"] | None = None
) -> Float[Tensor, "T S n d"]:
    """Compute ``z_{l+1} = z_l + (1/L) sum_m w_m f(z_l, theta_lm)`` from ``z_0 = x``.

    Args:
        block: the block.
        theta: particles ``(S, L, M, k)``.
        X: inputs ``(n, d)``.
        weights: ``(M,)``, of sum 1; None for equal ones.

    Returns:
        The ``T = L + 1`` states of every network, ``(L + 1, S, n, d)``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, NaN or infinity, weights not of sum 1.
    """
    w = check_fit(block, theta, X, weights)
    S, L, M, _ = theta.shape
    run = loops.loop(block, (S, L, M, len(X)), w, False)
    run.load(theta)
    return run.forward(X).contiguous()


@checked
def adjoint(
    block: Block,
    theta: Float[Tensor, "S L M k"],
    X: Float[Tensor, "n d"],
    p_L: Float[Tensor, "S n d"],
    weights: Float[Tensor, " M"] | None = None,
) -> tuple[Float[Tensor, "T S n d"], Float[Tensor, "T S n d"]]:
    """Compute ``p_l = p_{l+1} + (1/L) p_{l+1}^T sum_m w_m d_z f(z_l, theta_lm)`` down from ``p_L``.

    Args:
        block: the block.
        theta: particles ``(S, L, M, k)``.
        X: inputs ``(n, d)``.
        p_L: adjoint of the last state ``(S, n, d)``: ``v`` for the derivative of the output, ``r_i v`` for the loss.
        weights: see `forward`.

    Returns:
        States and adjoints of all layers, each ``(L + 1, S, n, d)``.

    Raises:
        TypeError, ValueError: see `forward`; also a `p_L` that does not fit.
    """
    w = check_fit(block, theta, X, weights, p_L=p_L)
    S, L, M, _ = theta.shape
    run = loops.loop(block, (S, L, M, len(X)), w, False)
    run.load(theta)
    z = run.forward(X).contiguous()
    p = torch.empty_like(z)
    run.backward(p_L, torch.empty_like(theta), p)
    return z, p


@checked
def rescaled_gradient(
    block: Block,
    theta: Float[Tensor, "S L M k"],
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    weights: Float[Tensor, " M"] | None = None,
    out: Any = None,
) -> tuple[Float[Tensor, " S"], Float[Tensor, "S L M k"]]:
    """Compute E and ``(1/n) sum_i p_{l+1}^i . d_theta f(z_l^i, theta_lm)``: the gradient divided by ``w_m / L``.

    Memory beyond the gradient is the states and two panels ``(S, n, M)``.

    Args:
        block: the block.
        theta: particles ``(S, L, M, k)``.
        X: inputs ``(n, d)``.
        y: targets ``(n,)``.
        v: the output is ``v . z_L``, ``(d,)``.
        weights: see `forward`.
        out: memory for the gradient, ``(S, L, M, k)`` with any contents; None for new memory, which costs time where
            the gradient is large.

    Returns:
        The loss ``(S,)`` and the rescaled gradient ``(S, L, M, k)``.

    Raises:
        TypeError, ValueError: see `forward`; also equal inputs with different targets, or v = 0.
    """
    w = check_fit(block, theta, X, weights, y=y, v=v)
    _check_task(X, y, v)
    step = _Gradient(block, tuple(theta.shape), X, y, v, w)
    if out is not None:
        _check_memory(out, theta)
    G = torch.empty_like(theta) if out is None else out
    E = theta.new_empty(len(theta))
    for members in step.members(len(theta)):
        rms = step(theta[members], G[members])
        E[members] = 0.5 * rms.square()
    return E, G


def _check_memory(out: Any, theta: Tensor) -> None:
    if not isinstance(out, Tensor) or out.layout != torch.strided or out.requires_grad:
        raise TypeError(f"out is {type(out).__name__}; a dense tensor without a gradient is needed")
    if (out.shape, out.dtype, out.device) != (theta.shape, theta.dtype, theta.device):
        found = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise ValueError(f"out is {found}; {tuple(theta.shape)} {theta.dtype} on {theta.device} is needed")


class _Gradient:
    """Loss and rescaled gradient of a few networks at a time, in memory allocated once for each number of networks."""

    def __init__(
        self, block: Block, shape: tuple[int, ...], X: Tensor, y: Tensor, v: Tensor, w: Tensor, chunk: int | None = None
    ) -> None:
        self.block, self.X, self.y, self.v, self.w = block, X, y, v, w
        S, self.L, self.M, _ = shape
        self.chunk, self.keep = default_chunk(S, self.L, self.M, X)
        self.chunk = self.chunk if chunk is None else min(runs.count("chunk", chunk, 1), S)
        self.loops: dict[int, loops.Loop] = {}

    def members(self, S: int) -> list[slice]:
        return [slice(a, min(a + self.chunk, S)) for a in range(0, S, self.chunk)]

    def __call__(self, theta: Tensor, G: Tensor | None) -> Tensor:
        """The rms residual ``sqrt(2 E)`` of each network; the gradient goes to G."""
        S, n = len(theta), len(self.X)
        if S not in self.loops:
            self.loops[S] = loops.loop(self.block, (S, self.L, self.M, n), self.w, self.keep)
        loop = self.loops[S]
        loop.load(theta)
        r = loop.forward(self.X)[-1] @ self.v - self.y
        if G is not None:
            loop.backward((r / n)[..., None] * self.v, G)
        return torch.linalg.vector_norm(r, dim=1) / math.sqrt(n)


def default_chunk(S: int, L: int, M: int, X: Float[Tensor, "n d"]) -> tuple[int, bool]:
    """How many networks are handled at once, and whether their panels are kept, from the shapes alone.

    Args:
        S: networks.
        L: layers.
        M: particles.
        X: inputs; gives n, dtype and the kind of device.

    Returns:
        The chunk, from 1 to S, and whether panels of all layers are kept rather than computed twice.
    """
    panel = len(X) * M * X.element_size()
    kept = _KEEP_BYTES.get(X.device.type, _KEEP_BYTES_GPU) // (L * panel)
    most = kept or max(1, _PANEL_BYTES.get(X.device.type, _PANEL_BYTES_GPU) // panel)
    return math.ceil(S / math.ceil(S / most)), bool(kept)


Tie = Callable[[Tensor], None]
Decay = Callable[[float], float]


class _Step:
    """One step of gradient descent on all networks, a few at a time."""

    def __init__(self, gradient: _Gradient, theta: Tensor, step: float, tie: Tie | None, decay: Decay | None) -> None:
        self.gradient, self.step, self.tie, self.decay = gradient, step, tie, decay
        self.parts = gradient.members(len(theta))
        self.G = theta.new_empty(gradient.chunk, *theta.shape[1:])
        self.rms = theta.new_empty(len(theta))

    def __call__(self, params: list[Tensor], k: int, move: bool) -> Tensor:
        (particles,) = params
        for members in self.parts:
            now = particles[members]
            part = self.G[: len(now)]
            self.rms[members] = self.gradient(now, part if move else None)
            if move:
                if self.decay is not None:
                    part.add_(now, alpha=2 * self.decay(k * self.step))
                now.sub_(part, alpha=self.step)
        if move and self.tie is not None:
            self.tie(particles)
        return self.rms


@checked
def train(
    block: Block,
    theta: Float[Tensor, "S L M k"],
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    step: float,
    steps: int,
    *,
    weights: Float[Tensor, " M"] | None = None,
    every: int = 1,
    observe: Observables | None = None,
    tie: Tie | None = None,
    decay: Decay | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    on_divergence: str = "raise",
) -> Run:
    """Gradient descent ``theta <- theta - h (rescaled gradient)``; the time of the limit flow is ``s = h k``.

    Args:
        block: the block.
        theta: initial particles ``(S, L, M, k)``; not touched.
        X: inputs ``(n, d)``.
        y: targets ``(n,)``.
        v: the output is ``v . z_L``, ``(d,)``.
        step: the step ``h > 0``.
        steps: number of steps.
        weights: see `forward`.
        every: record at k = 0, every, 2 every, ... and at the last k.
        observe: observables by name, each ``State -> Tensor``; see `monitors`.
        tie: called with all particles after each step, to change them in place: for particles that copy others.
        decay: ``s -> lambda(s)``: descent on ``E + lambda(s) int int |theta|^2`` instead.
        chunk: networks handled at once; bits depend on it. None for `default_chunk`.
        progress, checkpoint, checkpoint_every, on_divergence: see `descent.iterate`.

    Returns:
        The run: ``loss`` is E, ``(T, S)``; ``weights[0]`` the last particles.

    Raises:
        Diverged: the loss became infinite or NaN.
        TypeError, ValueError: see `rescaled_gradient`; also a step that is not positive and finite.
    """
    w = check_fit(block, theta, X, weights, y=y, v=v)
    _check_task(X, y, v)
    check_positive("step", step)
    step = float(step)
    gradient = _Gradient(block, tuple(theta.shape), X, y, v, w, chunk)
    config = {"X": X, "y": y, "v": v, "weights": w, "step": step, "chunk": gradient.chunk}
    config["block"] = [
        runs.identity(type(block)),
        {name: runs.identity(value) if callable(value) else repr(value) for name, value in vars(block).items()},
    ]
    config |= {name: f and runs.identity(f) for name, f in (("tie", tie), ("decay", decay))}
    return descent.iterate(
        [theta],
        _Step(gradient, theta, step, tie, decay),
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


@checked
def monitors(
    block: Block,
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    weights: Float[Tensor, " M"] | None = None,
) -> dict[str, Callable[[State], Tensor]]:
    """Observables for `train`: what the convergence theorem asks to stay bounded, and to converge.

    Args:
        block: the block.
        X: inputs.
        y: targets.
        v: the output functional.
        weights: see `forward`.

    Returns:
        ``moment``: ``int int |theta|^2``, ``(S,)``; ``u2``: the same for the first coordinate alone; ``z`` and ``p``:
        the states and the loss' adjoints ``p_L = r v`` of all layers, ``(L + 1, S, n, d)``.
    """

    def average(state: State, take: slice) -> Tensor:
        theta = state.weights[0]
        return theta[..., take].square().sum(-1).mean(1) @ check_fit(block, theta, X, weights)

    def states(state: State) -> Tensor:
        return forward(block, state.weights[0], X, weights)

    def adjoints(state: State) -> Tensor:
        p_L = (states(state)[-1] @ v - y)[..., None] * v
        return adjoint(block, state.weights[0], X, p_L, weights)[1]

    return {
        "moment": lambda state: average(state, slice(None)),
        "u2": lambda state: average(state, slice(0, 1)),
        "z": states,
        "p": adjoints,
    }
