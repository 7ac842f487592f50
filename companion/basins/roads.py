"""Roads down: from any weights of one wide hidden layer, a path along which the loss never rises (Theorem Q, lesson 5).

With ``S = span{sigma(X w)}`` and ``q = dim S``, a layer of ``m >= q`` neurons has a road in three straight pieces:

- A: slide the output weights to a column basis of the features, ``H V' = H V``; the loss does not change;
- B: move the neurons that have fallen silent until the features span S; the loss does not change;
- C: go straight to ``V* = V' + H^+ (F* - F)``; for the square loss ``L(t) - L* = (1 - t)^2 (L_0 - L*)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion import networks
from companion.arguments import checked
from companion.basins.shallow import Loss, check_shallow, pointwise
from companion.certificate import Certificate, assumed, compare
from companion.data import equal_inputs
from companion.networks import Activation

_SAME = 1e-14  # a neuron whose part of the outputs outside a span is this small a fraction of all lies in the span
_NEW = 1e-9  # a candidate is new if this fraction of its norm is outside the span
_STRAIGHT = 1e-12  # what rounding may do to the loss along the road, as a fraction of the loss at the start
_END = 1e-9  # how far from the least loss the road may end, as a fraction of the loss at the start
_LARGE = 1e4  # root mean square beyond which a feature is not taken: it would drown the others


@dataclass(frozen=True)
class Road:
    """A path of straight pieces in the weights of one network, and what was measured along the way.

    Args:
        vertices: pairs ``(W, V)``: the start, the ends of A, of B and of C.
        q: the dimension of the span of reachable features that was found; the true one may be larger.
        sigma_q: the q-th singular value of the features at the end of B.
        target: the outputs ``F*`` aimed at, (N, K).
        silent: how many neurons were silent after A.
        X: inputs.
        Y: targets.
        act: the activation.
        loss: the loss.
    """

    vertices: tuple[tuple[Tensor, Tensor], ...]
    q: int
    sigma_q: float
    target: Tensor
    silent: int
    X: Tensor
    Y: Tensor
    act: Activation
    loss: Loss

    @property
    def lengths(self) -> tuple[float, float, float]:
        """The lengths of A, B and C in the space of all weights; C's is at most ``||F* - F|| / sigma_q``."""
        steps = itertools.pairwise(self.vertices)
        return tuple(math.hypot(float((a - c).norm()), float((b - d).norm())) for (a, b), (c, d) in steps)

    def at(self, piece: int, t: Float[Tensor, " n"]) -> tuple[Float[Tensor, "n D m"], Float[Tensor, "n m K"]]:
        """The weights at times t in [0, 1] of piece 0 (A), 1 (B) or 2 (C)."""
        (W, V), (W_, V_) = self.vertices[piece : piece + 2]
        t = t.view(-1, 1, 1)
        return W + t * (W_ - W), V + t * (V_ - V)

    def certificate(self, points: int = 50) -> Certificate:
        """Theorem Q on this road: constant on A and B, never rising on C, and at the end the least loss on the span.

        All losses are measured, at equally spaced points.  If q is the number of distinct inputs, no more dimensions
        are reachable; otherwise that is assumed.

        Args:
            points: points for each piece.

        Returns:
            The certificate.
        """
        losses = road_losses(self, points)
        first, last = float(losses[0]), float(losses[-1])
        scale = max(first, 1e-300)
        least = float(pointwise(self.target, self.Y, self.loss)[0].sum())
        every = self.q == int(equal_inputs(self.X).max()) + 1
        rows = (
            assumed("l is convex and continuous"),
            *(() if every else (assumed(f"no more than the {self.q} dimensions found are reachable"),)),
            compare("width m >= q", self.vertices[0][0].shape[1], ">=", self.q, "measured"),
            compare("sigma_q(H) at the end of B", self.sigma_q, ">", 0.0),
            compare("largest change of the loss on A and B, over L(start)",
                    float((losses[: 2 * points + 1] - first).abs().max()) / scale, "<=", _STRAIGHT),
            compare("largest rise of the loss on C, over L(start)",
                    float((losses[2 * points + 1 :] - losses[2 * points : -1]).max()) / scale, "<=", _STRAIGHT),
            compare("loss at the end, above l(F*), over L(start)", (last - least) / scale, "<=", _END),
        )  # fmt: skip
        failed = next((f"road: {r.name}" for r in rows if not r.holds), "")
        found = {"q": self.q, "lengths of A, B, C": list(self.lengths), "L(start)": first, "L(end)": last}
        return Certificate("Theorem Q: a road down", not failed, rows, found, failed)


@checked(double=True)
def descent_road(
    weights: Sequence[Tensor],
    X: Float[Tensor, "N D"],
    Y: Float[Tensor, "N K"],
    act: str | Activation,
    *,
    loss: Loss = "square",
    target: Float[Tensor, "N K"] | None = None,
    seed: int = 0,
) -> Road:
    """Theorem Q: if ``m >= q``, a road from these weights along which the loss never rises, down to the least on S.

    Any activation, also a step, and any start, also dead or collapsed neurons.  The square loss ends at
    ``F* = `` the projection of Y on S (zero loss if ``q = N``).  A loss whose infimum is not attained needs a `target`
    to aim at; piece C then stops at its lowest point.

    q is the dimension that a pool of candidates spans: a lower bound, see `Road.certificate`.

    Args:
        weights: ``[W, V]`` of one network, shapes (D, m), (m, K) or (1, D, m), (1, m, K).
        X: inputs, shape (N, D); a bias is a constant column.
        Y: targets, shape (N, K).
        act: name or `Activation`.
        loss: the loss.
        target: outputs F* to aim at, shape (N, K); needed for ``"logistic"``; None for the best on S.
        seed: of the pool of candidates for the silent neurons.

    Returns:
        The `Road`.

    Raises:
        TypeError: not float64.
        ValueError: more than one network, data that do not fit, no feature that is not zero, ``m < q``, or no target
            for the logistic loss.

    Source: Theorem Q, derived in lesson 5.
    """
    stacked, sigma = check_shallow(weights, X, Y, act, order=0, outputs=None)
    if len(stacked[0]) != 1:
        raise ValueError(f"weights holds {len(stacked[0])} networks; a road is drawn for one network on one data set")
    if loss == "logistic" and target is None:
        raise ValueError("target is missing; the logistic loss has no minimum, outputs F* to aim at are needed")
    (W,), (V,) = stacked
    N, m = len(X), W.shape[1]
    H = sigma.value(X @ W)
    pool, P = _candidates(X, sigma, torch.Generator().manual_seed(seed % 2**63))
    V_A, free, Q = _slide(H, V, Y)
    # B: the silent neurons take the candidates farthest from the span
    fresh, Q = _pivots(P, Q, _NEW, relative=True)
    q = Q.shape[1]
    if q == 0:
        raise ValueError(f"X gives only features that are 0 with {sigma.name}; no road leads anywhere")
    if m < q:
        raise ValueError(f"m is {m}, below q = {q}, the dimension of the reachable features; a road needs m >= q")
    places = free.nonzero()[:, 0]
    more = _repeat(P, fresh) if len(places) > len(fresh) else []
    chosen = list(itertools.islice(itertools.chain(fresh, *more), len(places)))
    W_B = W.clone()
    W_B[:, places[: len(chosen)]] = pool[:, chosen]
    H_B = sigma.value(X @ W_B)
    # C: straight to the outputs F*
    F = H_B @ V_A
    aim = Y if target is None else target
    aim = aim if q == N else Q @ (Q.mT @ aim)
    step = _solve(H_B, aim - F)
    end = 1.0 if loss == "square" and target is None else _line_minimum(F, H_B @ step, Y, loss)
    sigma_q = float(torch.linalg.svdvals(H_B)[q - 1])
    vertices = ((W, V), (W, V_A), (W_B, V_A), (W_B, V_A + end * step))
    return Road(vertices, q, sigma_q, aim, int(free.sum()), X, Y, sigma, loss)


def _slide(H: Tensor, V: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Piece A: the same outputs from a basis of the columns of H; the weights, who is silent, and the basis's span.

    A neuron counts by its part ``||h_j|| ||V_j||`` of the outputs, compared with the largest part and with Y: what is
    left out is as small as the rounding of the outputs.
    """
    size = torch.linalg.vector_norm(V, dim=1)
    parts = H * size
    scale = max(float(torch.linalg.vector_norm(parts, dim=0).max()), float(Y.norm()), 1e-300)
    basis, Q = _pivots(parts, H.new_zeros(len(H), 0), _SAME * scale, relative=False)
    silent = torch.ones(len(size), dtype=torch.bool, device=H.device)
    silent[basis] = False
    V_A = V.clone()
    if len(basis) < len(size):
        units = torch.linalg.vector_norm(H[:, basis], dim=0)
        V_A = torch.zeros_like(V)
        V_A[basis] = _solve(H[:, basis] / units, H @ V) / units[:, None]
    return V_A, silent, Q


@checked
def road_losses(road: Road, n: int = 50) -> Float[Tensor, " points"]:
    """The loss at n + 1 equally spaced points of each of the three pieces, ends shared: ``3 n + 1`` numbers.

    Args:
        road: the road.
        n: points for each piece.

    Returns:
        The losses, from the start to the end.
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least one point for each piece is needed")
    out = []
    for piece in range(3):
        times = torch.linspace(0, 1, n + 1, dtype=road.X.dtype, device=road.X.device)[int(piece > 0) :]
        chunk = max(1, 2**21 // (len(road.X) * road.vertices[0][0].shape[1]))
        for t in times.split(chunk):
            f = networks.forward(list(road.at(piece, t)), road.X, road.act)
            out.append(pointwise(f, road.Y, road.loss)[0].sum((1, 2)))
    return torch.cat(out)


def _line_minimum(F: Tensor, step: Tensor, Y: Tensor, loss: Loss) -> float:
    """Where the convex function ``t -> l(F + t step)`` is lowest on [0, 1], by bisection of its slope."""
    low, high = 0.0, 1.0

    def slope(t: float) -> float:
        return float((pointwise(F + t * step, Y, loss)[1] * step).sum())

    if slope(high) <= 0:
        return high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return low


def _solve(A: Tensor, B: Tensor) -> Tensor:
    """``A^+ B`` by a singular value decomposition, with two steps of refinement for ill-conditioned features."""
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    keep = s > 1e-15 * s[:1]
    U, s, Vh = U[:, keep], s[keep], Vh[keep]
    Z = Vh.mT @ ((U.mT @ B) / s[:, None])
    for _ in range(2):
        Z = Z + Vh.mT @ ((U.mT @ (B - A @ Z)) / s[:, None])
    return Z


def _pivots(A: Tensor, Q: Tensor, tolerance: float, *, relative: bool) -> tuple[list[int], Tensor]:
    """Columns of A, greedily the farthest from the span of Q and of those chosen before, and the enlarged basis Q.

    The distance is absolute, or relative to the column's norm; twice orthogonalized, so that Q stays orthonormal.
    """
    norms = torch.linalg.vector_norm(A, dim=0)
    unit = norms.clamp_min(1e-300) if relative else torch.ones_like(norms)
    R = A / unit
    R = R - Q @ (Q.mT @ R)
    R = R - Q @ (Q.mT @ R)
    squares = R.square().sum(0).mul_(norms > 0)
    chosen: list[int] = []
    while Q.shape[1] < len(A):
        farthest = float(squares.max()) if len(squares) else 0.0
        if not farthest > tolerance**2:
            break
        j = int((squares >= farthest * (1 - 1e-6)).nonzero()[0])  # the first of equals, whatever rounding does
        new = R[:, j] - Q @ (Q.mT @ R[:, j])
        new = new / torch.linalg.vector_norm(new)
        Q = torch.cat([Q, new[:, None]], 1)
        shadow = new @ R
        R.addr_(new, shadow, alpha=-1)
        # subtracting is cheap but loses digits: the true distances are taken anew now and then, and before the end
        squares = squares.sub_(shadow.square()).clamp_min_(0)
        if len(chosen) % 16 == 15 or float(squares.max()) < 1e-6 * float(shadow[j]) ** 2:
            squares = R.square().sum(0)
        chosen.append(j)
        squares[chosen] = 0
    return chosen, Q


def _repeat(P: Tensor, used: list[int]) -> list[list[int]]:
    """More candidates for the neurons left over: a second greedy basis, then all the rest."""
    left = [j for j in range(P.shape[1]) if j not in set(used)]
    second, _ = _pivots(P[:, left], P.new_zeros(len(P), 0), _NEW, relative=True)
    return [[left[j] for j in second], left]


def _candidates(X: Tensor, sigma: Activation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A pool of weights (D, P) and their features (N, P): Gaussian ones at several scales, and thresholds between data.

    On a pencil of hyperplanes ``w = u - t c`` sample n changes its side at ``t_n = u . x_n / c . x_n``, so thresholds
    between neighbours among the ``t_n`` give features that tell any two inputs apart that do not point the same way;
    for steps and ReLUs nothing else will do.  With a bias, c is its direction and ``t_n`` a projection of the data.
    """
    N, D = X.shape
    size = float(X.square().mean().sqrt()) * D**0.5 or 1.0
    draw = torch.randn(D, 2 * N + 60, generator=generator, dtype=torch.float64).to(X)
    scales = X.new_tensor([0.5, 1.0, 2.0, 5.0, 10.0, 30.0]).repeat(draw.shape[1] // 6 + 1)[: draw.shape[1]]
    pool = [draw * scales / size]
    constant = ((X[0] == X).all(0) & (X[0] != 0)).nonzero()[:, 0].tolist()
    if D > 1:
        for _ in range(max(2, min(2 * (D - 1), 600 // N + 1))):
            u, c = torch.randn(2, D, generator=generator, dtype=torch.float64).to(X)
            if constant:
                u[constant[0]] = 0.0
                c = torch.zeros_like(c)
                c[constant[0]] = 1.0
            pool += _thresholds(X, u, c)
    # the constant feature, where there is one, and the silent ones of an even activation
    pool = torch.cat([*pool, torch.eye(D, dtype=X.dtype, device=X.device)], 1)
    P = sigma.value(X @ pool)
    rms = P.square().mean(0).sqrt()  # NaN where a feature is infinite
    usable = rms <= _LARGE if bool((rms <= _LARGE).any()) else torch.isfinite(rms)
    return pool[:, usable], P[:, usable]


def _thresholds(X: Tensor, u: Tensor, c: Tensor) -> list[Tensor]:
    """Weights ``+-a (u - t c)``, t between neighbouring ``t_n``, steep enough to tell neighbours apart."""
    across, along = X @ u, X @ c
    t = (across / along)[along != 0].sort().values
    if len(t) < 2:
        return []
    gaps, between = t[1:] - t[:-1], 0.5 * (t[1:] + t[:-1])
    between = between[gaps > 1e-13 * t.abs().max()]
    w = u[:, None] - between * c[:, None]
    steep = len(X) / (X @ w).abs().amax(0).clamp_min(1e-300)
    return [a * steep * w for a in (1.0, -1.0, 4.0)]
