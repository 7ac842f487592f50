"""How many gates of a wide ReLU layer may flip, and when that proves convergence: the counting argument.

If the residuals of gradient descent have ``sum_k eta ||e_k|| <= Q``, no pre-activation ``w_r.x_i`` moves by more than
``||X x_i|| Q / sqrt(m)``, and only the *fragile* gates, those with ``|w_r.x_i|`` up to that at the start, can flip.
Counting them bounds how far the Gram matrix can move, hence the residuals, hence Q: a Q that closes this loop is a
proof (the counting theorem of lesson 4).

Every formula stands once and is computed in the numbers of a level: tensors, whose values are measured, or
`rigor.Interval`, whose ends are certified. What is known from one side only (an eigenvalue from below, a norm from
above) is a tensor of bounds on that side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion import rigor
from companion.minimum_norm import first_layer
from companion.rigor.formulas import maximum, number, sqrt
from companion.rigor.rounding import up

Level = Literal["measured", "certified"]
Reference = Literal["gate", "midpoint"]
Number = Any  # a float64 tensor, or an interval

_ROUNDS = 100  # of the search for Q; it rises by at least _INFLATION in each
_INFLATION = 1e-3
_LARGE = 1e150  # a Q at which every gate is fragile


def lower(x: Number) -> Tensor:
    """The lower end of an interval, or the tensor itself."""
    return x.lo if isinstance(x, rigor.Interval) else x


def upper(x: Number) -> Tensor:
    """The upper end of an interval, or the tensor itself."""
    return x.hi if isinstance(x, rigor.Interval) else x


def largest_eigenvalue(A: Float[Tensor, "*S N N"]) -> Float[Tensor, "*S"]:
    """The largest eigenvalue of positive semidefinite (or symmetric nonnegative) matrices, never below 0."""
    return torch.linalg.eigvalsh(A)[..., -1].clamp_min(0)


# --- counts -----------------------------------------------------------------------------------------------------------


class Fragile(NamedTuple):
    """Counts over the neurons when every gate with ``|z_ri| <= tau_i`` may flip, each ``(S, N, N)``, int64.

    ``on``: both gates open with all fragile gates open; ``off``: with all of them closed; ``both``: both fragile. The
    matrices of the theorems are ``F = |X X^T| (on - off) / m``, ``B = |X X^T| both / m`` and the midpoint Gram matrix
    ``X X^T (on + off) / 2m``; ``|S_i|`` is the diagonal of ``both``.
    """

    on: Tensor
    off: Tensor
    both: Tensor

    @property
    def sizes(self) -> Int[Tensor, "S N"]:
        """``|S_i|``, the number of fragile gates of each input."""
        return self.both.diagonal(dim1=1, dim2=2)


def fragile_counts(X: Float[Tensor, "N d"], W: Float[Tensor, "S d m"], tau: Float[Tensor, "S N"]) -> Fragile:
    """Count the gates that a movement could flip, ``S_i = {r: |w_r.x_i| <= tau_i}``.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(S, d, m)``.
        tau: how far the pre-activations of each input may move ``(S, N)``.

    Returns:
        `Fragile`, exact integers for the computed pre-activations, streamed over the neurons.
    """
    (S, _, m), N = W.shape, len(X)
    counts = Fragile(*(torch.zeros(S, N, N, dtype=torch.int64, device=X.device) for _ in range(3)))
    for _, Z in first_layer.panels(X, W, first_layer.chunk_size(4 * S, N, m, X)):
        fragile, gate = Z.abs() <= tau[:, :, None], Z > 0
        for total, A in zip(counts, (gate | fragile, gate & ~fragile, fragile), strict=True):
            first_layer.add_counts(total, A.view(torch.int8), A.view(torch.int8))
    return counts


def enclosed_outputs(
    X: Float[Tensor, "N d"], W: Float[Tensor, "S d m"], signs: Float[Tensor, "S m"]
) -> tuple[rigor.Interval, Float[Tensor, "S N"]]:
    """Enclose ``f(x_i) = sum_r a_r relu(w_r.x_i) / sqrt(m)``, every rounding counted.

    Args:
        X: inputs ``(N, d)``, float64, on the CPU.
        W: weights ``(S, d, m)``.
        signs: ``(S, m)``.

    Returns:
        The outputs ``(S, N)``, and the largest rounding error ``|fl(w_r.x_i) - w_r.x_i|`` over r, ``(S, N)``.
    """
    zero = X.new_zeros(len(W), len(X))
    f, blur = rigor.point(zero), zero
    for part, Z in first_layer.panels(X, W):
        radius = torch.stack([rigor.product_radius(X, w) for w in W[:, :, part]])
        f = f + (rigor.Interval.around(Z, radius).maximum(0) * signs[:, None, part]).sum(-1)
        blur = torch.maximum(blur, radius.amax(-1))
    return f / sqrt(rigor.point(W.shape[2])), blur


# --- the problem, in the numbers of a level ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Gradient descent with step eta from the weights W, in the numbers of a level.

    The gates are those of the computed pre-activations. In certified numbers every sign that rounding leaves open
    belongs to a fragile gate (`blur` is part of `tau`), and the theorem allows any value of a fragile gate.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(S, d, m)``.
        level: ``"measured"`` or ``"certified"``.
        inner: ``x_i.x_j``, a number ``(N, N)``.
        e: the residual ``y - f(W)``, a number ``(S, N)``.
        eta: the step, a number ``(S,)``.
        blur: the largest rounding error of a pre-activation of each input ``(S, N)``; 0 when measured.
        gram: ``G(W)``, a number ``(S, N, N)``.
    """

    X: Tensor
    W: Tensor
    level: Level
    inner: Number
    e: Number
    eta: Number
    blur: Tensor
    gram: Number

    @staticmethod
    def of(X: Tensor, y: Tensor, W: Tensor, signs: Tensor, eta: Tensor, level: Level) -> Problem:
        """The problem of checked arguments."""
        product = X @ X.T
        if level == "measured":
            inner, blur = product, torch.zeros_like(y)
            e = y - first_layer.outputs(X, W, signs)
        else:
            inner = rigor.Interval.around(product, rigor.product_radius(X, X.T))
            f, blur = enclosed_outputs(X, W, signs)
            e = rigor.point(y) - f
        gram = inner * first_layer.gate_counts(X, W).double() / number(W.shape[2], level)
        return Problem(X, W, level, inner, e, number(eta, level), blur, gram)

    def number(self, x: Tensor | float | int) -> Number:
        """A tensor or float in the numbers of the level."""
        return number(x, self.level)

    @property
    def m(self) -> Number:
        """The number of neurons."""
        return self.number(self.W.shape[2])

    @property
    def reach(self) -> Number:
        """``||X x_i||``, ``(N,)``."""
        return rigor.norm(self.inner)

    @property
    def norm_e(self) -> Tensor:
        """``||e||`` or an upper bound, ``(S,)``."""
        return upper(rigor.norm(self.e))

    def tau(self, Q: Tensor) -> Tensor:
        """``tau_i = ||X x_i|| Q / sqrt(m)``, and room for the rounding of the pre-activations, ``(S, N)``."""
        return upper(self.reach * self.number(Q[:, None]) / sqrt(self.m) + self.number(self.blur))

    def smallest(self, G: Number) -> Tensor:
        """``lambda_min`` or a lower bound, ``(S,)``; 0 where nothing positive is shown."""
        if isinstance(G, rigor.Interval):
            return G.lo.new_tensor([rigor.eig_min_lower(g, r) for g, r in zip(*G.split(), strict=True)])
        values = torch.linalg.eigvalsh(G)
        floor = G.shape[-1] * torch.finfo(G.dtype).eps * values[..., -1]
        return torch.where(values[..., 0] > floor, values[..., 0], 0.0)

    def largest(self, G: Number) -> Tensor:
        """``lambda_max`` or an upper bound, ``(S,)``."""
        if not isinstance(G, rigor.Interval):
            return largest_eigenvalue(G)
        norms = [
            rigor.round_up(rigor.spectral_norm_upper(g) + rigor.frobenius_norm_upper(r))
            for g, r in zip(*G.split(), strict=True)
        ]
        return G.lo.new_tensor(norms)

    def norm(self, A: Number) -> Tensor:
        """``||A||_2`` of symmetric matrices with nonnegative entries, ``(S,)``, or the largest row sum above it."""
        return A.sum(-1).hi.amax(-1) if isinstance(A, rigor.Interval) else largest_eigenvalue(A)

    def budget(self, G: Number, lam: Tensor) -> Number:
        """``Q_lin = sum_k eta ||(I - eta G)^k e||``, or the bound ``||e|| / lambda``, ``(S,)``."""
        plain = self.number(self.norm_e) / self.number(lam)
        if isinstance(G, rigor.Interval):
            return plain
        values, U = torch.linalg.eigh(G)
        fine = _path_length(values, (U.mT @ self.e[..., None])[..., 0], self.eta)
        return torch.where((lam > 0) & (self.eta * values[:, -1] <= 1), fine, plain)


def _path_length(values: Tensor, c: Tensor, eta: Tensor) -> Tensor:
    """An upper bound on ``sum_k eta ||(I - eta G)^k e||`` from the eigenvalues of G and the coefficients of e.

    The norm is a convex function of k, so that chords on a coarse grid bound the sum from above; the rest is at most
    ``||(I - eta G)^K e|| / lambda``.
    """
    grid, k = list(range(257)), 256
    while k < 10**15:
        k += k // 64
        grid.append(k)
    k = torch.tensor(grid, dtype=torch.float64, device=c.device)
    log = torch.log1p(-(eta[:, None] * values).clamp(max=1 - 1e-16))
    r = rigor.norm(torch.exp(k[:, None, None] * log) * c)  # (grid, S)
    width = (k[1:] - k[:-1])[:, None]
    return eta * 0.5 * (width * (r[1:] + r[:-1]) + r[:-1] - r[1:]).sum(0) + r[-1] / values[:, 0]


# --- the theorem's formulas, on any numbers ---------------------------------------------------------------------------


def closed_path(Q_lin: Number, lam: Number, eps: Number) -> Number:
    """``Q_star = Q_lin lambda / (lambda - epsilon)``: a bound on ``sum_k eta ||e_k||``, for ``epsilon < lambda``."""
    return Q_lin * lam / (lam - eps)


def kink_error(length: Number, reach: Number, blur: Number, sets: Number, m: Number) -> Number:
    """``D = ||(tau_i |S_i| / sqrt(m))_i||``, ``tau_i = ||X x_i|| length / sqrt(m)``: what fragile gates do to outputs.

    Thrice the `blur` covers that a fragile gate's sign may be the wrong one, that its pre-activation may exceed
    ``tau_i`` by twice the blur, and that ``f_0`` is then not ``J_0 w_0``.
    """
    return rigor.norm((reach * length.unsqueeze(1) / sqrt(m) + 3 * blur) * sets / sqrt(m))


def limit_distance(perp: Number, parallel: Number) -> Number:
    """``||w_inf - w*|| = sqrt(V_perp + V_parallel)``, from bounds on the two roots."""
    return sqrt(perp * perp + parallel * parallel)


# --- the search -------------------------------------------------------------------------------------------------------


class ClosedLoop(NamedTuple):
    """What the counting argument finds for every network, each ``(S,)``; the counts are those at ``Q_star``."""

    lam: Tensor
    top: Tensor
    eps: Tensor
    first: Tensor  # epsilon / lambda at the first Q
    Q: Tensor
    Q_star: Tensor
    closed: Tensor
    counts: Fragile
    midpoint: bool


def close_loop(p: Problem, reference: Reference) -> ClosedLoop:
    """Find Q with ``Q_star(Q) <= Q``: start below every solution and replace Q by ``Q_star(Q)`` until it is one.

    For the gate reference ``Q_star`` grows with Q, so that the search decides; for the midpoint it only semi-decides.
    """
    midpoint, size, lam, matrix = reference == "midpoint", abs(p.inner), p.smallest(p.gram), p.gram
    start = p.norm_e / upper(size).diagonal().sum()
    Q = torch.where(lam > 0, upper(p.budget(p.gram, lam)), start)
    Q = (Q * (0.5 if midpoint else 1.0)).clamp(max=_LARGE)
    first = None
    for _ in range(_ROUNDS):
        counts = fragile_counts(p.X, p.W, p.tau(Q))
        eps = p.norm(size * (counts.on - counts.off).double() / p.m)
        if midpoint:
            matrix, eps = p.inner * (counts.on + counts.off).double() / (2 * p.m), eps / 2
            lam = p.smallest(matrix)
        Q_star = upper(closed_path(p.budget(matrix, lam), p.number(lam), p.number(eps)))
        Q_star = torch.where(eps < lam, Q_star, torch.inf)
        first = eps / lam if first is None else first
        closed = Q_star <= Q
        going = (Q_star < _LARGE) & ~closed
        if not bool(going.any()):
            break
        Q = torch.where(going, Q_star * (1 + _INFLATION), Q)
    final = fragile_counts(p.X, p.W, p.tau(torch.where(closed, Q_star, Q)))
    return ClosedLoop(lam, p.largest(matrix), eps, first, Q, Q_star, closed, final, midpoint)


# --- the distance to the minimum-norm solution ------------------------------------------------------------------------


class KernelSolution(NamedTuple):
    """An approximate ``alpha`` with ``G alpha = e`` ``(S, N)``, and what it says of the exact one, numbers ``(S,)``.

    ``norm`` bounds ``||alpha||``; ``length`` is ``||J^T alpha||`` of the approximate alpha, and ``spread`` bounds the
    distance of ``J^T alpha`` from the exact ``w* - w``.
    """

    alpha: Tensor
    norm: Number
    length: Number
    spread: Number


def solve_kernel(p: Problem, lam: Tensor) -> KernelSolution:
    """Solve ``G alpha = e`` and measure what is left, ``r = e - G alpha``: ``||J^T G^-1 r|| <= ||r|| / sqrt(lambda)``.

    Args:
        p: the problem.
        lam: lower bounds on ``lambda_min(G)``; where it is 0, the results are NaN or infinite.
    """
    G, e = (x.split()[0] if isinstance(x, rigor.Interval) else x for x in (p.gram, p.e))
    alpha = torch.linalg.solve_ex(G, e[..., None])[0][..., 0]
    alpha = torch.where((lam > 0)[:, None], alpha, 0.0).nan_to_num(0.0, 0.0, 0.0)
    image = (p.gram * alpha[:, None, :]).sum(-1)
    left, known = rigor.norm(p.e - image), p.number(lam)
    length = sqrt(maximum((image * alpha).sum(-1), 0))
    return KernelSolution(alpha, rigor.norm(p.number(alpha)) + left / known, length, left / sqrt(known))


def enclosed_distance(
    p: Problem, signs: Float[Tensor, "S m"], W: Float[Tensor, "S d m"], alpha: Float[Tensor, "S N"]
) -> rigor.Interval:
    """Enclose ``||W - (w_0 + J_0^T alpha)||``, ``(S,)``, certified, around ``w_0`` and for this alpha."""
    total = rigor.point(p.X.new_zeros(len(W)))
    weighted, radius = (rigor.point(p.X) * alpha[:, :, None]).split()  # (S, N, d)
    spare = rigor.point(radius).sum(1).hi[:, :, None]  # the gates are 0 or 1
    for part, Z in first_layer.panels(p.X, p.W):
        gates = (Z > 0).double()
        errors = torch.stack([rigor.product_radius(B.T, A) for B, A in zip(weighted, gates, strict=True)])
        pulled = rigor.Interval.around(weighted.mT @ gates, up(errors + spare))
        moved = rigor.point(W[:, :, part]) - p.W[:, :, part] - pulled * signs[:, None, part] / sqrt(p.m)
        total = total + (moved * moved).flatten(1).sum(1)
    return sqrt(maximum(total, 0))
