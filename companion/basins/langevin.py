"""Noisy descent ``d theta = -grad L dt + sqrt(2 T) dW`` and how long it takes to leave a basin.

Three answers to one question: simulated walkers (`exit_times`), the exact mean by a partial differential equation in
two dimensions (`mean_exit_time`), and the asymptotic law of Eyring and Kramers (`eyring_kramers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import checked
from companion.basins.shallow import check_shallow
from companion.networks import Activation

_BLOCK = 64  # steps whose noise is drawn together; finished walkers leave after each block


@checked(double=True)
def exit_times(
    weights: Sequence[Tensor],
    X: Float[Tensor, "N D"],
    Y: Float[Tensor, "N 1"],
    act: str | Activation,
    T: float | Float[Tensor, " S"],
    *,
    level: float,
    generator: torch.Generator,
    step: float = 0.005,
    longest: float = 1e4,
) -> Float[Tensor, " S"]:
    """Simulate ``theta <- theta - step grad L + sqrt(2 T step) xi`` until ``L < level``, one walker for each network.

    ``L = 0.5 ||f - Y||^2`` is looked at after every step (Euler-Maruyama).  Each walker has its own noise, drawn on the
    CPU in float64, which does not depend on when the others stop.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, 1): where the S walkers start; not changed.
        X: inputs, shape (N, D).
        Y: targets, shape (N, 1).
        act: name or `Activation`.
        T: the temperature, one for all walkers or one for each, in units of the loss.
        level: a walker has left when its loss is below this.
        generator: a CPU generator for the noise.
        step: the step in time.
        longest: time after which a walker is given up.

    Returns:
        The time at which each walker left, infinity if it did not, shape (S,).

    Raises:
        TypeError: not float64.
        ValueError: see `companion.shallow.check_shallow`; a temperature, step or time that is not positive.
    """
    (W, V), sigma = check_shallow(weights, X, Y, act, order=1)
    S, D, m = W.shape
    T = torch.as_tensor(T, dtype=torch.float64)
    if T.ndim > 1 or T.numel() not in (1, S) or not bool(((T > 0) & torch.isfinite(T)).all()):
        raise ValueError(f"T has shape {tuple(T.shape)}; one positive temperature, or one for each of {S}, is needed")
    if not (step > 0 and 0 < longest < step * 1e15):
        raise ValueError(
            f"step, longest, level are {step}, {longest}, {level}; positive times, at most 10^15 steps are needed"
        )
    scale = (2 * T * step).sqrt().expand(S).to(W.device)
    alive = torch.arange(S, device=W.device)
    W, v, y = W.mT.clone(), V[..., 0].clone(), Y[:, 0]  # W (S, m, D), v (S, m)
    times = W.new_full((S,), math.inf)
    for block in range(math.ceil(longest / step / _BLOCK)):
        # the noise of all walkers is drawn, also of those that have left, so that nobody's depends on the others
        noise = torch.randn(_BLOCK, S, m * (1 + D), generator=generator, dtype=torch.float64).to(W.device)
        noise = (noise if len(alive) == S else noise[:, alive]) * scale[alive, None]
        dv, dW = noise[..., :m], noise[..., m:].unflatten(-1, (m, D))
        left = torch.full_like(alive, _BLOCK + 1)
        for k in range(_BLOCK + 1):
            Z = W @ X.mT  # (alive, m, N)
            H = sigma.value(Z)
            r = torch.bmm(v[:, None], H)[:, 0].sub_(y)
            below = 0.5 * r.square().sum(1) < level
            left = torch.where(below & (left > k), k, left)
            if k == _BLOCK:
                break
            A = sigma.derivative(Z).mul_(r[:, None]).mul_(v[..., None])
            v = (v + dv[k]).sub_(torch.bmm(H, r[..., None])[..., 0], alpha=step)
            W = (W + dW[k]).sub_(A @ X, alpha=step)
        out = left <= _BLOCK
        times[alive[out]] = (block * _BLOCK + left[out]).double() * step
        keep = ~out
        alive, W, v = alive[keep], W[keep], v[keep]
        if not len(alive):
            break
    return times


class ExitMap(NamedTuple):
    """The mean exit time ``u`` at the centres of a grid: ``x`` (n_x,), ``y`` (n_y,), ``u`` (n_y, n_x)."""

    x: Tensor
    y: Tensor
    u: Tensor

    def at(self, x: float, y: float) -> float:
        """``u`` at a point, bilinear between the centres (constant beyond the outermost ones)."""
        (i, a), (j, b) = (_between(c, t) for c, t in ((self.x, x), (self.y, y)))
        low, high = ((1 - a) * row[i] + a * row[i + 1] for row in (self.u[j], self.u[j + 1]))
        return float((1 - b) * low + b * high)


def _between(centres: Tensor, t: float) -> tuple[int, float]:
    h = float(centres[1] - centres[0])
    place = min(max((t - float(centres[0])) / h, 0.0), len(centres) - 1.0)
    i = min(int(place), len(centres) - 2)
    return i, place - i


def mean_exit_time(
    loss: Callable[[Tensor, Tensor], Tensor],
    T: float,
    box: tuple[float, float, float, float],
    level: float,
    *,
    per_unit: int = 40,
) -> ExitMap:
    """Solve ``T Lap u - grad L . grad u = -1``, ``u = 0`` where ``L <= level``, reflecting at the walls of a box.

    Symmetric finite volumes: an edge between two cells has weight ``T exp(-L_mid / T) / h^2``, a cell the mass
    ``exp(-L / T)``.  Dividing each row by its mass leaves an M-matrix with entries of moderate size, which a block
    elimination from row to row of the grid solves directly.

    Args:
        loss: ``L(x, y)`` on tensors.
        T: temperature, in units of the loss.
        box: ``(x_0, x_1, y_0, y_1)``; the x side is best the shorter one.
        level: the target is ``{L <= level}``.
        per_unit: cells for a unit of length.

    Returns:
        The `ExitMap`: ``u`` is the mean time to reach the target.

    Raises:
        ValueError: a temperature that is not positive, an empty box, or a target that the grid does not meet.
    """
    x_0, x_1, y_0, y_1 = box
    if not (T > 0 and x_1 > x_0 and y_1 > y_0 and per_unit >= 1):
        raise ValueError(f"T, box, per_unit are {T}, {box}, {per_unit}; T > 0, a nonempty box, per_unit >= 1 needed")
    n_x, n_y = (max(3, round((b - a) * per_unit)) for a, b in ((x_0, x_1), (y_0, y_1)))
    h_x, h_y = (x_1 - x_0) / n_x, (y_1 - y_0) / n_y
    x = x_0 + h_x * (torch.arange(n_x, dtype=torch.float64) + 0.5)
    y = y_0 + h_y * (torch.arange(n_y, dtype=torch.float64) + 0.5)
    L = loss(x[None, :].expand(n_y, n_x), y[:, None].expand(n_y, n_x))
    across = loss((x[:-1] + h_x / 2)[None].expand(n_y, -1), y[:, None].expand(n_y, n_x - 1))
    along = loss(x[None].expand(n_y - 1, -1), (y[:-1] + h_y / 2)[:, None].expand(-1, n_x))
    free = (level < L).double()
    if bool(free.all()):
        raise ValueError(f"level is {level}, below the loss {float(L.min()):.3g} everywhere on the grid; raise it")
    # rates to the right, left, next and previous cell, each divided by the mass of the cell it leaves
    right = T / h_x**2 * torch.exp((L[:, :-1] - across) / T) * free[:, :-1]
    left = T / h_x**2 * torch.exp((L[:, 1:] - across) / T) * free[:, 1:]
    up = T / h_y**2 * torch.exp((L[:-1] - along) / T) * free[:-1]
    down = T / h_y**2 * torch.exp((L[1:] - along) / T) * free[1:]
    diagonal = 1 - free
    diagonal[:, :-1] += right
    diagonal[:, 1:] += left
    diagonal[:-1] += up
    diagonal[1:] += down
    return ExitMap(x, y, _block_solve(diagonal, left, right, down, up, free))


def _block_solve(diagonal: Tensor, left: Tensor, right: Tensor, down: Tensor, up: Tensor, b: Tensor) -> Tensor:
    """Eliminate the rows of the grid one after the other: ``S_i = B_i - down_i S_{i-1}^{-1} up_{i-1}``."""
    n = len(diagonal)
    inverse: list[Tensor] = []
    c: list[Tensor] = []
    for i in range(n):
        B = torch.diag(diagonal[i]) - torch.diag(right[i], 1) - torch.diag(left[i], -1)
        rhs = b[i]
        if i:
            B = B - down[i - 1][:, None] * inverse[-1] * up[i - 1]
            rhs = rhs + down[i - 1] * c[-1]
        inverse.append(torch.linalg.inv(B))
        c.append(inverse[-1] @ rhs)
    u = [c[-1]]
    for i in range(n - 2, -1, -1):
        u.append(c[i] + inverse[i] @ (up[i] * u[-1]))
    return torch.stack(u[::-1])


@checked
def eyring_kramers(
    H_min: Float[Tensor, "p p"], H_saddle: Float[Tensor, "p p"], barrier: float, T: float, n_saddles: int = 1
) -> float:
    """``tau = 2 pi / (n |lambda_s|) sqrt(|det H_saddle| / det H_min) exp(barrier / T)``, the mean exit time as T -> 0.

    Args:
        H_min: Hessian at the minimum.
        H_saddle: Hessian at a saddle; exactly one negative eigenvalue ``lambda_s``.
        barrier: loss at the saddle minus loss at the minimum.
        T: temperature, in units of the loss.
        n_saddles: number n of equal saddles.

    Returns:
        The mean exit time of ``d theta = -grad L dt + sqrt(2 T) dW``.

    Raises:
        ValueError: a Hessian of the wrong signature, or a temperature or number that is not positive.
    """
    at_min, at_saddle = torch.linalg.eigvalsh(H_min), torch.linalg.eigvalsh(H_saddle)
    if not bool((at_min > 0).all()) or int((at_saddle < 0).sum()) != 1 or bool((at_saddle == 0).any()):
        raise ValueError(
            f"H_min, H_saddle have eigenvalues {at_min.tolist()}, {at_saddle.tolist()}; all positive, and one negative "
            "with the others positive, is needed"
        )
    if not T > 0 or n_saddles < 1:
        raise ValueError(f"T is {T}, n_saddles {n_saddles}; positive numbers are needed")
    ratio = float((at_saddle.abs().log().sum() - at_min.log().sum()).exp().sqrt())
    return (
        2
        * math.pi
        / (n_saddles * abs(float(at_saddle[0])))
        * ratio
        * (math.exp(barrier / T) if barrier / T < 709 else math.inf)
    )
