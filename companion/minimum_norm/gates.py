"""How many gates of a wide ReLU layer may flip, and when that proves convergence: the counting argument.

If the residuals of gradient descent have ``sum_k eta ||e_k|| <= Q``, no pre-activation ``w_r.x_i`` moves by more than
``tau_i = ||X x_i|| Q / sqrt(m)``, and only the *fragile* gates, those with ``|w_r.x_i| <= tau_i`` at the start, can
flip. Counting them bounds how far the Gram matrix can move, hence the residuals, hence Q: a Q that closes this loop is
a proof (the counting theorem of lesson 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import rigor
from companion.minimum_norm import first_layer

ROUNDS = 100  # of the search for Q; it rises by at least INFLATION in each
INFLATION = 1e-3
SLACK = 1e-10  # certified level: covers the roundings of sums and norms of up to 10^5 nonnegative numbers
_UNIT = 2.0**-53


def largest_eigenvalue(A: Float[Tensor, "*S N N"]) -> Float[Tensor, "*S"]:
    """The largest eigenvalue of positive semidefinite (or symmetric nonnegative) matrices, never below 0."""
    return torch.linalg.eigvalsh(A)[..., -1].clamp_min(0)


class Fragile(NamedTuple):
    """Counts over the neurons when every gate with ``|z_ri| <= tau_i`` may flip, each ``(S, N, N)``, int64.

    ``on``: both gates open with all fragile gates open; ``off``: with all of them closed; ``both``: both fragile. The
    matrices of the theorems are ``F = |X X^T| (on - off) / m``, ``B = |X X^T| both / m`` and the midpoint Gram matrix
    ``X X^T (on + off) / 2m``; ``|S_i|`` is the diagonal of ``both``.
    """

    on: Tensor
    off: Tensor
    both: Tensor


def fragile_counts(
    X: Float[Tensor, "N d"],
    W: Float[Tensor, "S d m"],
    Q: Float[Tensor, " S"],
    *,
    reach: Float[Tensor, " N"] | None = None,
    rounding: float = 0.0,
) -> Fragile:
    """Count the gates that a movement of length Q could flip: ``S_i = {r: |w_r.x_i| <= ||X x_i|| Q / sqrt(m)}``.

    Args:
        X: inputs ``(N, d)``.
        W: weights ``(S, d, m)``.
        Q: the allowed ``sum_k eta ||e_k||`` of every network ``(S,)``.
        reach: ``||X x_i||`` or upper bounds on it; computed when omitted.
        rounding: put ``|z| <= tau + rounding |x|.|w|`` into the sets, so that rounded signs and sizes are covered.

    Returns:
        `Fragile`, exact integers, streamed over the neurons.
    """
    (S, _, m), N = W.shape, len(X)
    tau = (reach_of(X, False) if reach is None else reach) * Q[:, None] / math.sqrt(m)
    chunk = first_layer.default_chunk(4 * S, N, m, X)
    counts = Fragile(*(torch.zeros(S, N, N, dtype=torch.int64, device=X.device) for _ in range(3)))
    for part, Z in first_layer.panels(X, W, chunk):
        radius = tau[:, :, None]
        if rounding:
            radius = radius + rounding * (X.abs() @ W[:, :, part].abs())
        fragile, gate = Z.abs() <= radius, Z > 0
        for total, A in zip(counts, (gate | fragile, gate & ~fragile, fragile), strict=True):
            first_layer.add_counts(total, A.view(torch.int8), A.view(torch.int8))
    return counts


def sizes(X: Tensor, certified: bool) -> Tensor:
    """``|x_i.x_j|``, or upper bounds on the exact products."""
    size = (X @ X.T).abs()
    return (size + rigor.product_radius(X, X.T)) * (1 + SLACK) if certified else size


def reach_of(X: Tensor, certified: bool) -> Tensor:
    """``||X x_i||``, or upper bounds with room for the roundings of the threshold itself."""
    return torch.linalg.vector_norm(sizes(X, certified), dim=1) * (1 + SLACK if certified else 1)


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
    r = torch.linalg.vector_norm(torch.exp(k[:, None, None] * log) * c, dim=2)  # (grid, S)
    width = (k[1:] - k[:-1])[:, None]
    return eta * 0.5 * (width * (r[1:] + r[:-1]) + r[:-1] - r[1:]).sum(0) + r[-1] / values[:, 0]


class Problem(NamedTuple):
    """A checked problem around the weights W, at which the residual is e; tensors have the ensemble axis."""

    X: Tensor
    W: Tensor
    e: Tensor
    norm_e: Tensor  # with the certified level an upper bound
    eta: Tensor
    gram: Tensor
    certified: bool

    def smallest(self, gram: Tensor) -> Tensor:
        """``lambda_min``, or a rigorous lower bound for the Gram matrix of the exact products ``x_i.x_j``."""
        if not self.certified:
            values = torch.linalg.eigvalsh(gram)
            floor = gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., -1]
            return torch.where(values[..., 0] > floor, values[..., 0], 0.0)
        radius = rigor.product_radius(self.X, self.X.T) + 4 * _UNIT * gram[0].abs().amax()
        return torch.tensor([rigor.eig_min_lower(G, radius) for G in gram]).to(gram)

    def largest(self, gram: Tensor) -> Tensor:
        """``lambda_max``, or a rigorous upper bound."""
        if not self.certified:
            return largest_eigenvalue(gram)
        radius = rigor.product_radius(self.X, self.X.T) + 4 * _UNIT * gram[0].abs().amax()
        more = rigor.frobenius_norm_upper(radius)
        return torch.tensor([rigor.round_up(rigor.spectral_norm_upper(G) + more) for G in gram]).to(gram)

    def norm(self, A: Tensor) -> Tensor:
        """``||A||_2`` of a symmetric matrix with nonnegative entries, or its largest row sum, rounded up."""
        return A.sum(-1).amax(-1) * (1 + SLACK) if self.certified else largest_eigenvalue(A)

    def budget(self, gram: Tensor, lam: Tensor) -> Tensor:
        """``Q_lin = sum_k eta ||(I - eta G)^k e||``, or its bound ``||e|| / lambda``."""
        plain = self.norm_e / lam
        if self.certified:
            return plain * (1 + SLACK)
        values, U = torch.linalg.eigh(gram)
        fine = _path_length(values, (U.mT @ self.e[..., None])[..., 0], self.eta)
        return torch.where((lam > 0) & (self.eta * values[:, -1] <= 1), fine, plain)


class Loop(NamedTuple):
    """What the counting argument finds for every network, each ``(S,)``; the counts are those at ``Q_star``."""

    lam: Tensor
    top: Tensor
    eps: Tensor
    first: Tensor  # epsilon / lambda at the first Q
    Q: Tensor
    Q_star: Tensor
    closed: Tensor
    counts: Fragile


def close_loop(p: Problem, reference: str) -> Loop:
    """Find Q with ``Q_star(Q) <= Q``: start below every solution and replace Q by ``Q_star(Q)`` until it is one.

    For the gate reference ``Q_star`` grows with Q, so that the search decides; for the midpoint it only semi-decides.
    """
    m, size, reach = p.W.shape[2], sizes(p.X, p.certified), reach_of(p.X, p.certified)
    rounding = rigor.gamma(p.X.shape[1] + 2) if p.certified else 0.0
    lam = p.smallest(p.gram)
    Q = torch.where(lam > 0, p.budget(p.gram, lam), p.norm_e / size.diagonal().sum())
    Q = Q * (0.5 if reference == "midpoint" else 1.0)
    first = None
    for _ in range(ROUNDS):
        counts = fragile_counts(p.X, p.W, Q, reach=reach, rounding=rounding)
        eps, matrix = p.norm(size * (counts.on - counts.off) / m), p.gram
        if reference == "midpoint":
            matrix, eps = (p.X @ p.X.T) * (counts.on + counts.off) / (2 * m), eps / 2
            lam = p.smallest(matrix)
        Q_star = torch.where(eps < lam, p.budget(matrix, lam) * lam / (lam - eps), torch.inf)
        Q_star = Q_star * (1 + SLACK) if p.certified else Q_star
        first = eps / lam if first is None else first
        closed = Q_star <= Q
        going = (eps < lam) & ~closed
        if not bool(going.any()):
            break
        Q = torch.where(going, Q_star * (1 + INFLATION), Q)
    final = fragile_counts(p.X, p.W, torch.where(closed, Q_star, Q), reach=reach, rounding=rounding)
    return Loop(lam, p.largest(matrix), eps, first, Q, Q_star, closed, final)


def output_error(X: Tensor, W: Tensor, e: Tensor) -> Tensor:
    """A bound on ``||fl(e) - e||``: every output is a sum of products with at most ``gamma |x|.|w|`` of error each."""
    m, d = W.shape[2], X.shape[1]
    total = torch.zeros_like(e)
    for _, Z in first_layer.panels(X.abs(), W.abs()):
        total += Z.sum(-1)
    error = 1.01 * rigor.gamma(m + d + 8) * total / math.sqrt(m) + 4 * _UNIT * e.abs()
    return torch.linalg.vector_norm(error, dim=1) * (1 + SLACK)
