"""The mean-field PDE on a grid: an independent finite-volume solver in one parameter dimension.

At every depth t the density obeys ``d_s rho + d_theta (rho V) = 0`` with ``V = -d_theta (dE/drho)``; the depths know of
each other only through the states and adjoint states of the net (see `Depth`, whose integration in depth is used here
too; nothing moves with the particles). Cell averages move by fluxes through the faces, so that mass is kept to
round-off: fifth-order WENO-Z values at the faces, upwind, and the strong-stability Runge-Kutta scheme of order three in
s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import checked
from companion.mean_field.blocks import Block
from companion.mean_field.flow import Depth, check_times

_MOST_STEPS = 10**6


@dataclass(frozen=True)
class DensityFlow:
    """The density of the parameters along training: T snapshots, D depths, N cells.

    Args:
        times: training times s ``(T,)``.
        t: depths ``(D,)``, Chebyshev points of [0, 1].
        centres: of the cells ``(N,)``.
        rho: cell averages ``(T, D, N)``; their sum times the width of a cell is 1.
        loss: E ``(T,)``, without the regulariser.
        Z: states ``(T, D, n, 1)``.
    """

    times: Tensor
    t: Tensor
    centres: Tensor
    rho: Tensor
    loss: Tensor
    Z: Tensor

    def mass(self) -> Float[Tensor, "T D"]:
        """The mass at every snapshot and depth; 1 up to round-off."""
        return self.rho.sum(-1) * float(self.centres[1] - self.centres[0])


def _weno(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
    """The WENO-Z value at the face between the cells c and d, from the cell averages a, b, c, d, e, upwind from c."""
    p0, p1, p2 = (2 * a - 7 * b + 11 * c) / 6, (-b + 5 * c + 2 * d) / 6, (2 * c + 5 * d - e) / 6
    s0 = 13 / 12 * (a - 2 * b + c) ** 2 + (a - 4 * b + 3 * c) ** 2 / 4
    s1 = 13 / 12 * (b - 2 * c + d) ** 2 + (b - d) ** 2 / 4
    s2 = 13 / 12 * (c - 2 * d + e) ** 2 + (3 * c - 4 * d + e) ** 2 / 4
    tau = (s0 - s2).abs()
    w0, w1, w2 = ((k * (1 + (tau / (s + 1e-30)) ** 2)) for k, s in ((0.1, s0), (0.6, s1), (0.3, s2)))
    return (w0 * p0 + w1 * p1 + w2 * p2) / (w0 + w1 + w2)


class _Grid:
    """Everything on the grid: pointwise values of the block, the net at a density, the rate of change of a density."""

    def __init__(
        self, block: Block, X: Tensor, y: Tensor, v: Tensor, ends: tuple[float, float], N: int, D: int
    ) -> None:
        self.block, self.X, self.y, self.v = block, X, y, v
        self.depth = Depth.chebyshev(D, X)
        self.faces = torch.linspace(*ends, N + 1, dtype=X.dtype, device=X.device)
        self.width = (ends[1] - ends[0]) / N
        self.centres = (self.faces[1:] + self.faces[:-1]) / 2
        self.one = torch.ones(1, dtype=X.dtype, device=X.device)
        self.Z = X.expand(D, -1, -1)

    def averages(self, density: Callable[[Tensor], Tensor]) -> Tensor:
        """The cell averages of a density, by five Gauss points in every cell, scaled to mass 1."""
        nodes, weights = (torch.from_numpy(a).to(self.X) for a in np.polynomial.legendre.leggauss(5))
        values = density(self.centres[:, None] + self.width / 2 * nodes) @ weights / 2
        return (values / (values.sum() * self.width)).expand(len(self.depth.t), -1).contiguous()

    def net(self, rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States, adjoint states and residuals; the density at the centres is the average minus its curvature / 24."""
        padded = torch.nn.functional.pad(rho, (1, 1))
        mass = self.width * (rho - (padded[:, 2:] - 2 * rho + padded[:, :-2]) / 24)  # (D, N)
        cells = self.centres[:, None, None]

        def field(Z: Tensor) -> tuple[Tensor, Tensor]:
            z = Z.reshape(1, -1, 1).expand(len(cells), -1, -1)  # every state at every cell: (N, D n, 1)
            slope = self.block.pull(z, cells, self.one, torch.ones_like(z))[0]
            each = (g.reshape(len(cells), *Z.shape[:2]) for g in (self.block.f(z, cells), slope))
            F, J = (torch.einsum("jk,kji->ji", mass, g)[..., None] for g in each)
            return F, J[..., None]

        self.Z, J = self.depth.states(field, self.X, self.Z)
        r = self.Z[-1] @ self.v - self.y
        return self.Z, self.depth.adjoint(J, r[:, None] * self.v), r

    def speed(self, rho: Tensor, s: float, decay: float) -> Tensor:
        """``V`` at the inner faces, ``(D, N - 1)``."""
        Z, P, _ = self.net(rho)
        faces = self.faces[1:-1, None, None]
        z, p = (A.reshape(1, -1, 1).expand(len(faces), -1, -1) for A in (Z, P))
        rows = self.block.rows(z, faces, p).reshape(len(faces), *Z.shape[:2])
        V = -rows.mean(-1).T
        return V - 2 * decay * math.exp(-s) * self.faces[1:-1] if decay else V

    def rate(self, rho: Tensor, V: Tensor) -> Tensor:
        """``-(flux right - flux left) / width``, no flux through the two ends."""
        R = torch.nn.functional.pad(rho, (2, 2))
        N = rho.shape[1]
        a, b, c, d, e, f = (R[:, j : j + N - 1] for j in range(6))
        # the face between c and d, from the left (a..e) and from the right (f..b); R[:, j + 2] is cell j
        flux = V.clamp_min(0) * _weno(a, b, c, d, e) + V.clamp_max(0) * _weno(f, e, d, c, b)
        flux = torch.nn.functional.pad(flux, (1, 1))
        return (flux[:, :-1] - flux[:, 1:]) / self.width


@checked(double=True)
def fv_flow(
    block: Block,
    X: Float[Tensor, "n 1"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " 1"],
    density: Callable[[Tensor], Tensor],
    *,
    support: tuple[float, float],
    cells: int,
    times: Sequence[float] | Float[Tensor, " T"],
    depth: int = 13,
    cfl: float = 0.5,
    decay: float = 0.0,
) -> DensityFlow:
    """Solve ``d_s rho = d_theta (rho d_theta (dE/drho))`` at every depth on a grid of cells.

    Args:
        block: a block with one state and one parameter dimension, such as `GaussBump`.
        X: inputs ``(n, 1)``.
        y: targets ``(n,)``.
        v: the readout ``(1,)``.
        density: the initial density of theta, the same at every depth, up to a factor.
        support: the ends of the grid; no mass passes them.
        cells: number of cells, at least 8.
        times: increasing training times at which to keep the flow.
        depth: number of Chebyshev points in depth.
        cfl: the largest part of a cell that is crossed in one step.
        decay: as in `limit_flow`.

    Returns:
        A `DensityFlow`.

    Raises:
        TypeError, ValueError: bad data, a block of more dimensions, or a number out of range; mass that reaches the
            ends of the grid.

    Source: the mean-field PDE, lesson 2; WENO-Z is Borges, Carmona, Costa and Don (2008).
    """
    if block.k != 1 or X.shape[1] != 1:
        raise ValueError(f"block has k = {block.k} and X has {X.shape[1]} columns; the grid needs one of each")
    times = check_times(times)
    if not 8 <= cells <= 10**6 or not 1e-3 <= cfl <= 1 or len(support) != 2 or not support[0] < support[1]:
        found = f"cells, cfl, support are {cells}, {cfl}, {support}"
        raise ValueError(f"{found}; 8 to 10^6, 0.001 to 1, and two increasing numbers are needed")
    grid = _Grid(block, X, y, v, support, cells, depth)
    rho, s, kept = grid.averages(density), 0.0, []
    for target in times.tolist():
        while s < target - 1e-12:
            V = grid.speed(rho, s, decay)
            speed = max(float(V.abs().max()), 1e-12)
            h = min(target - s, cfl * grid.width / speed)
            if target - s > _MOST_STEPS * h:
                raise ValueError(f"X, y or v are too large: parameters move at {speed:.3g}, too fast for these cells")
            one = rho + h * grid.rate(rho, V)
            two = 0.75 * rho + 0.25 * (one + h * grid.rate(one, grid.speed(one, s + h, decay)))
            rho = (rho + 2 * (two + h * grid.rate(two, grid.speed(two, s + h / 2, decay)))) / 3
            s += h
        Z, _, r = grid.net(rho)
        if float(rho[:, [0, -1]].abs().max()) > 1e-3 * float(rho.max()):
            raise ValueError(f"support is {support}; the density reaches its ends at s = {target:.3g}, widen it")
        kept.append((rho, 0.5 * r.square().mean(), Z))
    rho, loss, Z = (torch.stack(column) for column in zip(*kept, strict=True))
    return DensityFlow(times.to(X), grid.depth.t, grid.centres, rho, loss, Z)
