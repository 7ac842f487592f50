"""Roads down: from any weights of one wide hidden layer, a path along which the loss never rises (Theorem Q, lesson 5).

With ``S = span{sigma(X w)}`` and ``q = dim S``, a layer of ``m >= q`` neurons has a road in three straight pieces:

- A: slide the output weights to a column basis of the features, ``H V' = H V``; the loss does not change;
- B: move the neurons that have fallen silent until the features span S; the loss does not change;
- C: go straight to ``V* = V' + H^+ (F* - F)``; for the square loss ``L(t) - L* = (1 - t)^2 (L_0 - L*)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion import networks, rigor
from companion.basins.shallow import LOSSES, check_shallow, pointwise
from companion.certificate import Certificate, assumed, compare
from companion.networks import Activation

_SAME = 1e-13  # a feature closer to a span than this fraction of the largest reachable feature lies in it
_NEW = 1e-9  # a candidate is new if this fraction of its norm is outside the span


@dataclass(frozen=True)
class Road:
    """A path of straight pieces in the weights of one network, and what was measured along the way.

    Args:
        vertices: pairs ``(W, V)``: the start, the ends of A, of B and of C.
        q: the dimension of the span of reachable features that was found.
        sigma_q: the q-th singular value of the features at the end of B.
        length: ``||V* - V'||_F``, the length of C.
        bound: ``||F* - F||_F / sigma_q``, which the length cannot exceed.
        target: the outputs ``F*`` aimed at, (N, K).
        silent: how many neurons were silent after A.
        X: inputs.
        Y: targets.
        act: the activation.
        loss: ``"square"`` or ``"logistic"``.
    """

    vertices: tuple[tuple[Tensor, Tensor], ...]
    q: int
    sigma_q: float
    length: float
    bound: float
    target: Tensor
    silent: int
    X: Tensor
    Y: Tensor
    act: Activation
    loss: str

    def at(self, piece: int, t: Float[Tensor, " n"]) -> tuple[Float[Tensor, "n D m"], Float[Tensor, "n m K"]]:
        """The weights at times t in [0, 1] of piece 0 (A), 1 (B) or 2 (C)."""
        (W, V), (W_, V_) = self.vertices[piece : piece + 2]
        t = t.view(-1, 1, 1)
        return W + t * (W_ - W), V + t * (V_ - V)

    def certificate(self, points: int = 50) -> Certificate:
        """Theorem Q on this road: the features span, the loss never rises, and it ends where it should.

        ``sigma_q`` is certified for the stored features when ``q = N = m`` or wider; the losses are measured.
        """
        losses = road_losses(self, points)
        W, _ = self.vertices[-1]
        full = self.q == len(self.X)
        floor = rigor.sigma_min_lower(self.act.value(self.X @ W)) if full else self.sigma_q
        scale = max(float(losses[0]), 1e-300)
        rise = float((losses[1:] - losses[:-1]).max())
        rows = (
            assumed("l is convex and continuous"),
            compare("width m >= q", W.shape[1], ">=", self.q, "measured"),
            compare("sigma_q(H) at the end of B", floor, ">", 0.0, "certified" if full else "measured"),
            compare("largest rise of the loss, over L(start)", rise / scale, "<=", 1e-12),
        )
        holds = all(r.holds for r in rows)
        reason = "" if holds else next(f"road: {r.name}" for r in rows if not r.holds)
        found = {"q": self.q, "length of C": self.length, "L(start)": float(losses[0]), "L(end)": float(losses[-1])}
        return Certificate("Theorem Q: a road down", holds, rows, found, reason)


def descent_road(
    weights: Sequence[Tensor],
    X: Float[Tensor, "N D"],
    Y: Float[Tensor, "N K"],
    act: str | Activation,
    *,
    loss: str = "square",
    target: Float[Tensor, "N K"] | None = None,
    seed: int = 0,
) -> Road:
    """Theorem Q: if ``m >= q``, a road from these weights along which the loss never rises, down to the least on S.

    Any activation, also a step, and any start, also dead or collapsed neurons.  The square loss ends at
    ``F* = `` the projection of Y on S (zero loss if ``q = N``).  A loss whose infimum is not attained needs a `target`
    to aim at; piece C then stops at its lowest point.

    Args:
        weights: ``[W, V]`` of one network, shapes (D, m), (m, K) or (1, D, m), (1, m, K).
        X: inputs, shape (N, D); a bias is a constant column.
        Y: targets, shape (N, K).
        act: name or `Activation`.
        loss: ``"square"`` or ``"logistic"``.
        target: outputs F* to aim at, shape (N, K); needed for ``"logistic"``.
        seed: of the pool of candidates for the silent neurons.

    Returns:
        The `Road`.

    Raises:
        TypeError: not float64.
        ValueError: more than one network, data that do not fit, ``m < q``, or no target for the logistic loss.
            Source: Theorem Q, derived in lesson 5.
    """
    stacked, sigma = check_shallow(weights, X, Y, act, order=0, outputs=None)
    if len(stacked[0]) != 1 or X.ndim != 2 or Y.ndim != 2:
        raise ValueError(f"weights holds {len(stacked[0])} networks; a road is drawn for one network on one data set")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; one of {', '.join(LOSSES)} is needed")
    if loss == "logistic" and target is None:
        raise ValueError("target is missing; the logistic loss has no minimum, outputs F* to aim at are needed")
    if target is not None and target.shape != Y.shape:
        raise ValueError(f"target has shape {tuple(target.shape)}; {tuple(Y.shape)}, as Y, is needed")
    (W,), (V,) = stacked
    N, m = len(X), W.shape[1]
    H = sigma.value(X @ W)
    pool = _candidates(X, sigma, torch.Generator().manual_seed(seed))
    P = sigma.value(X @ pool)
    scale = max(float(torch.linalg.vector_norm(torch.cat([H, P], 1), dim=0).max()), 1e-300)
    # A: a column basis of H, and the same outputs from it alone
    basis, Q = _pivots(H, torch.zeros(N, 0, dtype=H.dtype), _SAME * scale, relative=False)
    V_A, free = V.clone(), torch.zeros(m, dtype=torch.bool)
    if len(basis) < m:
        V_A = torch.zeros_like(V)
        V_A[basis] = _solve(H[:, basis], H @ V)
        free = torch.ones(m, dtype=torch.bool)
        free[basis] = False
    # B: the silent neurons take the candidates farthest from the span
    fresh, Q = _pivots(P, Q, _NEW, relative=True)
    q = Q.shape[1]
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
    end = 1.0 if loss == "square" else _line_minimum(F, H_B @ step, Y, loss)
    sigma_q = float(torch.linalg.svdvals(H_B)[q - 1])
    bound = float(torch.linalg.matrix_norm(aim - F)) / sigma_q if sigma_q else float("inf")
    vertices = ((W, V), (W, V_A), (W_B, V_A), (W_B, V_A + end * step))
    length = float(torch.linalg.matrix_norm(end * step))
    return Road(vertices, q, sigma_q, length, bound, aim, int(free.sum()), X, Y, sigma, loss)


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
        times = torch.linspace(0, 1, n + 1, dtype=road.X.dtype)[int(piece > 0) :]
        chunk = max(1, 2**21 // (len(road.X) * road.vertices[0][0].shape[1]))
        for t in times.split(chunk):
            f = networks.forward(list(road.at(piece, t)), road.X, road.act)
            out.append(pointwise(f, road.Y, road.loss)[0].sum((1, 2)))
    return torch.cat(out)


def _line_minimum(F: Tensor, step: Tensor, Y: Tensor, loss: str) -> float:
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
        j = int(squares.argmax())
        if not float(squares[j]) > tolerance**2:
            break
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


def _candidates(X: Tensor, sigma: Activation, generator: torch.Generator) -> Tensor:
    """A pool of weights (D, P): Gaussian ones at several scales, and steps placed between the data points.

    With a constant column in X, a direction u and two neighbours among the sorted numbers ``u . x_n``, the threshold
    between them gives a feature that tells the two sides apart; for steps and ReLUs nothing else will do.
    """
    N, D = X.shape
    size = float(X.square().mean().sqrt()) * D**0.5 or 1.0
    draw = torch.randn(D, 2 * N + 60, generator=generator, dtype=torch.float64).to(X)
    scales = torch.tensor([0.5, 1.0, 2.0, 5.0, 10.0, 30.0]).to(X).repeat(draw.shape[1] // 6 + 1)[: draw.shape[1]]
    pool = [draw * scales / size]
    constant = ((X[0] == X).all(0) & (X[0] != 0)).nonzero()[:, 0].tolist()
    others = [d for d in range(D) if d not in constant[:1]]
    if constant and others:
        bias = constant[0]
        directions = torch.randn(len(others), max(2, min(2 * len(others), 600 // N + 1)), generator=generator)
        for u in directions.double().to(X).T:
            z = (X[:, others] @ u).sort().values
            gaps = z[1:] - z[:-1]
            between = (0.5 * (z[1:] + z[:-1]))[gaps > 1e-12]
            for sharpness, sign in ((1.0, 1.0), (1.0, -1.0), (4.0, 1.0)):
                slope = sign * sharpness * N / float((z[-1] - z[0]).clamp_min(1e-12)) * torch.ones_like(between)
                w = torch.zeros(D, len(between), dtype=X.dtype, device=X.device)
                w[others] = u[:, None] * slope
                w[bias] = -slope * between / X[0, bias]
                pool.append(w)
    # the constant feature, where there is one, and the silent ones of an even activation
    return torch.cat([*pool, torch.eye(D, dtype=X.dtype, device=X.device)], 1)
