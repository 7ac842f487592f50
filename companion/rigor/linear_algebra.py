"""Rigorous linear algebra in float64: bounds on singular values and on products that are theorems about the floats.

Notation: ``u = 2^-53``, ``gamma_k = k u / (1 - k u)``. What is assumed of the machine stands in
`companion.rigor.rounding`. Nothing is assumed of Cholesky, QR, eigenvalue or triangular solvers: their results are
guesses, and the error of a guess is measured afterwards. Every bound is then rounded outward. The full proofs are in
the appendix of lesson 1.

Two bounds on ``sigma_min(F)``, the smallest singular value of the n rows of ``F`` (n, m):

- shift: for a symmetric A, any ``c`` and any ``L``, with ``E = A - c I - L L^T``: ``lambda_min(A) >= c - ||E||``,
  because ``x^T A x = c + ||L^T x||^2 + x^T E x`` for every unit ``x``. For ``A = F F^T`` it works up to a condition
  number of about 1e6; for ``A = -F F^T`` it bounds ``||F||^2 = -lambda_min(A)``.
- inverse: for any ``R``, if ``||I - F R|| <= a < 1``, then ``sigma_min >= (1 - a) / ||R||``, because
  ``1 - a <= x^T F R x <= ||F^T x|| ||R||``. Works up to about 1e12, at two to three times the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion.rigor.intervals import Interval
from companion.rigor.rounding import (
    MAGNITUDE,
    UNIT,
    checked,
    down,
    gamma,
    has_subnormal,
    round_down,
    round_up,
    scaled,
    scaled_down,
    scaled_up,
    sum_up,
    up,
)

_ETA = 2.0**-1022  # what one product may lose to underflow, flushing to zero included
_DUST = 2.0**-400  # more than underflow can do where no number is above 2^500, also in the root of a sum of squares
_LOST = 2.0**-1000  # more than sqrt(n m) 2^-1022, what scaling down by a power of two may lose
_BLOCK = 256  # columns of a panel of a symmetric product, of which only the lower half is computed
_CHUNK = 2**21  # numbers in one temporary (16 MB)


# --- Input ----------------------------------------------------------------------------------------------------------


def _largest(A: Tensor) -> float:
    """``max |A_ij|`` without a copy of `A`."""
    low, high = A.aminmax()
    return max(-float(low), float(high))


def _in_range(A: Tensor) -> tuple[Tensor, int]:
    """``(S, e)`` with ``A = 2^e S`` and ``max |S|`` in [2^-64, 2^64], so that no sum of products overflows.

    Scaling up is exact. Scaling down moves numbers below 2^-1022, by at most that: `_LOST` covers all of them. Most
    matrices are in range already, and are not copied.
    """
    if 2.0**-64 <= _largest(A) <= 2.0**64:
        return A, 0
    bits = int((A.contiguous().view(torch.int64) & MAGNITUDE).max())
    exponent = (bits >> 52) - 1022 if bits >= 2**52 else bits.bit_length() - 1074
    return (scaled(A.contiguous(), -exponent), exponent) if bits else (A, 0)


# --- Products and norms ---------------------------------------------------------------------------------------------


def _row_panels(A: Tensor, width: int = 0) -> Iterator[slice]:
    """Slices of rows, each holding at most `_CHUNK` numbers (but at least one row)."""
    rows = max(1, _CHUNK // max(A.shape[1], width))
    return (slice(i, i + rows) for i in range(0, len(A), rows))


def _lost(A: Tensor, B: Tensor) -> float:
    """What a product loses where subnormal entries count as 0, in ``A B`` and in ``|A| |B|``."""
    small = (_largest(B) if has_subnormal(A) else 0.0) + (_largest(A) if has_subnormal(B) else 0.0)
    return round_up(2 * len(B) * _ETA * small) if small else 0.0


def product_radius(A: Float[Tensor, "n k"], B: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """Bound the rounding error of a product, entry by entry: ``|fl(A B) - A B| <= gamma_k |A| |B| + k 2^-1022``.

    ``|A| |B|`` is itself computed in floats, ``|A| |B| <= (fl(|A| |B|) + k 2^-1022) / (1 - gamma_k)``, which the
    returned radius includes. It holds for any order of summation, with fused operations or without, for the classical
    product in float64 (not for TF32, Strassen's product or emulated float64), and where subnormal numbers count as 0.

    Args:
        A: float64 matrix ``(n, k)``, finite.
        B: float64 matrix ``(k, m)``, finite.

    Returns:
        The radius ``(n, m)``, on the CPU; infinite where ``|A| |B|`` overflows.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity, or shapes that do not fit.

    Source: the standard model of floating-point arithmetic; lesson 1, appendix.
    """
    A, B = checked(A, "A"), checked(B, "B")
    if A.shape[1] != B.shape[0]:
        raise ValueError(f"A has shape {tuple(A.shape)}, B {tuple(B.shape)}; A needs as many columns as B has rows")
    k = len(B)
    # gamma_k / (1 - gamma_k) = k u / (1 - 2 k u), and 4 for the roundings of this line; underflow: k products, k sums
    factor = round_up((k + 4) * UNIT / round_down(1 - 2 * (k + 4) * UNIT))
    return (A.abs() @ B.abs()).mul_(factor).add_((2 * k + 4) * _ETA + _lost(A, B))


def product_error(A: Float[Tensor, "n k"], B: Float[Tensor, "k m"]) -> float:
    """Bound the rounding error of a product in the Frobenius norm, ``||fl(A B) - A B||_F``: that of `product_radius`.

    Args:
        A: float64 matrix ``(n, k)``, finite.
        B: float64 matrix ``(k, m)``, finite.

    Returns:
        The bound; infinity when ``|A| |B|`` overflows.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity, or shapes that do not fit.

    Source: lesson 1, appendix.
    """
    radius = product_radius(A, B)
    return frobenius_norm_upper(radius) if math.isfinite(_largest(radius)) else math.inf


def _frobenius(S: Tensor) -> float:
    """Upper bound on ``||S||_F`` for entries up to 2^64: a sum of k squares errs by gamma_k, relatively."""
    total = 0.0
    for rows in _row_panels(S):
        panel = S[rows].reshape(-1)
        total += float(panel @ panel)
    # k squarings and additions of the dot products, at most as many additions of panels, and 4 for what follows
    return sum_up(round_up(math.sqrt(round_up(total * (1 + gamma(2 * S.numel() + 4))))), _DUST)


def frobenius_norm_upper(A: Float[Tensor, "n m"]) -> float:
    """Bound ``||A||_F = sqrt(sum_ij A_ij^2)`` from above, all rounding included.

    Args:
        A: float64 matrix ``(n, m)``, finite, of any scale.

    Returns:
        An upper bound, within about ``n m 2^-53`` of the norm, relatively; infinity when the norm overflows.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity.

    Source: lesson 1, appendix.
    """
    S, exponent = _in_range(checked(A))
    if not S.any():
        return 0.0
    return scaled_up(sum_up(_frobenius(S), _LOST), exponent)


def norm(A: Tensor | Interval, dim: int = -1) -> Any:
    """Compute Euclidean norms along an axis, of numbers of any size: no square overflows or underflows.

    The entries are divided by a power of two near the largest of them first, so that a norm that is a float is found.

    Args:
        A: float32 or float64 tensor (a measured norm), or an `Interval` (a certified one).
        dim: the axis.

    Returns:
        The norms, the same kind of number without that axis.
    """
    if isinstance(A, Interval):
        share = gamma(A.shape[dim] + 8)  # n + 2 roundings, and what is lost to scaling: n 2^-1022 beside 1/4
        low, high = (norm(end, dim) for end in (abs(A).lo, A.magnitude()))
        return Interval(down(low * (1 - share)).clamp(min=0.0), up(high * (1 + share)))
    S, exponent = _scaled_along(A, dim)
    return scaled((S * S).sum(dim).sqrt(), exponent.squeeze(dim)).to(A.dtype)


def _scaled_along(A: Tensor, *dims: int) -> tuple[Tensor, Tensor]:
    """``(S, e)`` with ``A = 2^e S`` and the largest entry of S along `dims` in [1/2, 1), where that is a number."""
    A = A.double()
    top = A.abs().amax(dims, keepdim=True)
    exponent = torch.where(torch.isfinite(top), torch.frexp(top)[1], 0)
    return scaled(A.contiguous(), -exponent), exponent


def gram(A: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Gram matrices of rows of any size: ``A A^T = 4^e G`` with entries of G at most m.

    Args:
        A: float64 ``(..., n, m)``.

    Returns:
        G, ``(..., n, n)``, in ordinary floating point, and the whole numbers e, ``(..., 1, 1)``.
    """
    S, exponent = _scaled_along(A, -2, -1)
    return S @ S.mT, exponent


def spectral_norm(A: Tensor) -> Tensor:
    """Compute ``||A||_2`` of matrices of any size in ordinary floating point, through the smaller Gram matrix.

    Args:
        A: float32 or float64 ``(..., n, m)``.

    Returns:
        The norms, ``(...)``; the largest singular value loses nothing by squaring.
    """
    G, exponent = gram(A if A.shape[-2] <= A.shape[-1] else A.mT)
    return scaled(torch.linalg.eigvalsh(G)[..., -1].clamp_min(0).sqrt(), exponent[..., 0, 0]).to(A.dtype)


def _gram(S: Tensor) -> Tensor:
    """``fl(S S^T)``, exactly symmetric: the lower half is computed, in column panels, and mirrored."""
    n = len(S)
    G = S.new_empty(n, n)
    for j in range(0, n, _BLOCK):
        k = min(j + _BLOCK, n)
        panel = S[j:] @ S[j:k].T
        G[j:, j:k] = panel
        G[j:k, k:] = panel[k - j :].T
        corner = panel[: k - j]
        G[j:k, j:k] = corner.tril() + corner.tril(-1).T
    return G


def _absolute_gram_norm(M: Tensor) -> float:
    """Upper bound on ``|| |M| |M|^T ||_2``, at the cost of a few passes over `M`.

    Collatz and Wielandt: for a symmetric nonnegative matrix P and any positive x, ``||P|| <= max_i (P x)_i / x_i``.
    The sums have nonnegative terms only, so they err by ``gamma_(n+m)`` relatively. ``x >= 2^-60`` keeps what
    underflow takes from ``(P x)_i / x_i`` below ``_DUST``.
    """
    n, m = M.shape
    x, best = M.new_ones(n), math.inf
    for _ in range(3):
        z = M.new_zeros(m)
        for rows in _row_panels(M):
            z += M[rows].abs().T @ x[rows]
        y = torch.cat([M[rows].abs() @ z for rows in _row_panels(M)])
        best = min(best, float((y / x).max()))
        x = (y / y.max()).clamp_(min=2.0**-60)
    return sum_up(round_up(best * (1 + gamma(2 * (n + m) + 8))), _DUST)


# --- One identity for both ends of the spectrum ---------------------------------------------------------------------


def _largest_ritz(apply: Callable[[Tensor], Tensor], n: int, steps: int, block: int = 4) -> tuple[float, float]:
    """A guess at the largest eigenvalue of a symmetric operator, and at the guess's relative error.

    Block Krylov with full orthogonalization; no bound rests on it, a poor guess only loosens one.
    """
    if n <= 128:
        V = torch.eye(n, dtype=torch.float64, device="cpu")
        AV = apply(V)
    else:
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(n, block, dtype=torch.float64, device="cpu", generator=generator)
        V = torch.linalg.qr(start)[0]
        AV = W = apply(V)
        for _ in range(steps - 1):
            for _ in range(3):  # the second pass restores what cancels in the first, the third an empty block
                W = torch.linalg.qr(W - V @ (V.T @ W))[0]
            V = torch.cat([V, W], dim=1)
            W = apply(W)
            AV = torch.cat([AV, W], dim=1)
    T = V.T @ AV
    if not torch.isfinite(T).all():
        return math.nan, math.nan
    try:
        values, vectors = torch.linalg.eigh((T + T.T) / 2)
    except torch.linalg.LinAlgError:
        return math.nan, math.nan
    theta, y = float(values[-1]), vectors[:, -1]
    error = float((AV @ y - theta * (V @ y)).norm())
    if n > 1 and float(values[-1] - values[-2]) > error:
        error = error**2 / float(values[-1] - values[-2])
    return theta, error / abs(theta) if theta else math.inf


def _cholesky_error(M: Tensor) -> float:
    """Upper bound on ``||M - L L^T|| + gamma_(n+1) || |L| |L|^T ||`` for a guess L at a Cholesky factor of `M`.

    Infinity when the library finds none. ``M - L L^T`` is formed panel by panel, lower half only; the two parts of the
    bound cover the computed difference, the rounding of ``L L^T``, and that of a shift that made the diagonal of `M`.
    """
    n = len(M)
    L, info = torch.linalg.cholesky_ex(M)
    if int(info) or not _largest(L) <= 2.0**100:
        return math.inf
    L = L.tril()
    squares = 0.0
    for j in range(0, n, _BLOCK):
        k = min(j + _BLOCK, n)
        H = (L[j:, :k] @ L[j:k, :k].T).sub_(M[j:, j:k])  # columns beyond k of the rows j..k of L are zero
        H[: k - j].tril_()
        squares = sum_up(squares, _frobenius(H) ** 2 * (1 + 4 * UNIT))
    residual = math.sqrt(2 * squares)  # a symmetric matrix has at most twice the squares of its lower half
    return sum_up(residual * (1 + 8 * UNIT), gamma(n + 1) * _absolute_gram_norm(L) * (1 + 4 * UNIT), _DUST)


def _below_spectrum(G: Tensor, guess: float, delta: float, noise: float) -> float:
    """A number below all eigenvalues of every symmetric matrix within `noise` of `G`, which is overwritten.

    For any c and L: ``lambda_min >= c - ||G - c I - L L^T|| - noise``. Here c is below a guess at ``lambda_min`` by a
    share, `delta` or more, at which a Cholesky factor is found; minus infinity when there is none.
    """
    diagonal = G.diagonal().clone()
    while delta < 1:
        c = guess - delta * abs(guess)
        torch.sub(diagonal, c, out=G.diagonal())
        error = sum_up(_cholesky_error(G), noise, _LOST, _DUST)
        if math.isfinite(error):
            return round_down(c - error)
        delta *= 30
    return -math.inf


def _shift_bound(S: Tensor) -> tuple[float, float]:
    """The shift bound on ``sigma_min(S)``, 0.0 when nothing is shown, and the guess at ``sigma_min`` it aimed at."""
    m = S.shape[1]
    G, noise = _gram(S), round_up(gamma(m) * _absolute_gram_norm(S))
    L, info = torch.linalg.cholesky_ex(G)
    if int(info):
        return 0.0, 0.0
    theta, rough = _largest_ritz(lambda V, L=L: torch.cholesky_solve(V, L), len(S), steps=12)
    del L
    guess = 1 / theta if theta > 0 else 0.0
    if not guess > noise:
        return 0.0, 0.0
    square = _below_spectrum(G, guess, max(1e-7, rough / 4, noise / (8 * guess)), noise)
    return (round_down(math.sqrt(square)) if square > 0 else 0.0), math.sqrt(guess)


def spectral_norm_upper(A: Float[Tensor, "n m"]) -> float:
    """Bound ``||A||_2`` from above: ``||A||^2 <= c + ||c I - A A^T - L L^T||`` for any ``c`` and any ``L``.

    For a unit x, ``||A^T x||^2 = c - ||L^T x||^2 - x^T E x <= c + ||E||``. Here c is a little above a Ritz value and L
    the computed Cholesky factor of ``c I - A A^T`` (of ``A^T A`` when that is smaller). ``E`` is bounded as in
    `sigma_min_lower`. Never above `frobenius_norm_upper`.

    Args:
        A: float64 matrix ``(n, m)``, finite, of any scale and shape.

    Returns:
        An upper bound on the largest singular value, usually within 1e-5 of it relatively (much closer for small
        matrices); infinity when it overflows.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity.

    Source: derived in lesson 1, appendix.
    """
    S, exponent = _in_range(checked(A))
    if not S.any():
        return 0.0
    if S.shape[0] > S.shape[1]:
        S = S.T
    best = _frobenius(S)
    G, noise = _gram(S), round_up(gamma(S.shape[1]) * _absolute_gram_norm(S))
    guess, rough = _largest_ritz(lambda V: G @ V, len(S), steps=16)
    if guess > 0:
        square = -_below_spectrum(G.neg_(), -guess, max(1e-10, 4 * rough, noise / (8 * guess)), noise)
        best = min(best, round_up(math.sqrt(square)))
    return scaled_up(sum_up(best, _LOST), exponent)


# --- The smallest singular value ------------------------------------------------------------------------------------


def _inverse_bound(S: Tensor) -> float:
    """The inverse bound on ``sigma_min(S)`` with ``R = Q T^-T`` from ``S^T = Q T``; 0.0 when nothing is shown."""
    m = S.shape[1]
    Q, T = torch.linalg.qr(S.T)
    Rt = torch.linalg.solve_triangular(T, Q.T, upper=True)  # R^T, (n, m)
    del Q, T
    if not _largest(Rt) <= 2.0**500 or not Rt.any():
        return 0.0
    ones = S.new_ones(len(S))
    along, abs_R_ones = torch.zeros_like(ones), S.new_zeros(m)
    ones_abs_S, across = torch.zeros_like(abs_R_ones), []
    for rows in _row_panels(S, len(S)):
        residual = S[rows] @ Rt.T
        residual[:, rows].diagonal().sub_(1)
        residual.abs_()
        across.append(residual.sum(dim=1))
        along += residual.sum(dim=0)
        abs_R_ones += Rt[rows].abs().T @ ones[rows]
        ones_abs_S += S[rows].abs().sum(dim=0)
    rounding = gamma(m)  # of each entry of fl(S R), times |S| |R|
    row = torch.cat(across) + rounding * torch.cat([S[r].abs() @ abs_R_ones for r in _row_panels(S)])
    column = along + rounding * torch.cat([Rt[r].abs() @ ones_abs_S for r in _row_panels(Rt)])
    # sums of nonnegative numbers, at most n + m + 8 roundings each; ||B||_2^2 <= ||B||_1 ||B||_inf
    safety = 1 + gamma(2 * sum(S.shape) + 16)
    a = round_up(math.sqrt(float(row.max()) * safety + _DUST) * math.sqrt(float(column.max()) * safety + _DUST), 4)
    if not a < 1:
        return 0.0
    return max(0.0, round_down(round_down(1 - a) / spectral_norm_upper(Rt)))


def _equilibrated_bound(S: Tensor) -> float:
    """The inverse bound after dividing each row by a power of two: ``sigma_min(D B) >= min_i D_ii sigma_min(B)``."""
    exponents = torch.frexp(torch.maximum(S.amax(dim=1), -S.amin(dim=1)))[1]
    if int(exponents.max() - exponents.min()) < 8:
        return 0.0
    B = scaled(S.contiguous(), -exponents[:, None])
    return scaled_down(max(0.0, round_down(_inverse_bound(B) - _LOST)), int(exponents.min()))


def sigma_min_lower(A: Float[Tensor, "n m"], *, method: Literal["auto", "shift", "inverse"] = "auto") -> float:
    """Bound ``sigma_min(A) = min ||A^T x||`` over unit x from below: a theorem about the floats in `A`, or 0.0.

    *Shift.* For any c and L, ``E = A A^T - c I - L L^T``, ``sigma_min^2 >= c - ||E||``. Here c is a little below an
    estimate of ``sigma_min^2``, and L the computed Cholesky factor of ``G - c I``, ``G = fl(A A^T)``. With
    ``H = fl(fl(G - c I) - fl(L L^T))``, entry by entry::

        |E| <= (1 + 3u) |H| + gamma_m |A| |A|^T + gamma_(n+1) |L| |L|^T + underflow

    so that ``||E||`` is at most ``(1 + 3u) ||H||_F`` plus the norms of two nonnegative matrices (Collatz-Wielandt).

    *Inverse.* For any R with ``||I - A R|| <= a < 1``: ``sigma_min >= (1 - a) / ||R||``. Here R comes from a QR
    factorization, ``a^2`` is the product of the largest row and column sums of
    ``(1 + u) |I - fl(A R)| + gamma_m |A| |R| + underflow``, and ``||R||`` is `spectral_norm_upper`. Rows of very
    different size are divided by powers of two if need be, ``sigma_min(D B) >= min_i D_ii sigma_min(B)``.

    Args:
        A: float64 matrix ``(n, m)`` with n <= m, finite, of any scale.
        method: ``"shift"`` (cheap, up to a condition number of about 1e6), ``"inverse"`` (up to about 1e12), or
            ``"auto"``: shift, and where that shows nothing or loses more than 1 percent, the better of the two.

    Returns:
        A lower bound, 0.0 when it cannot be shown (which does not say that the rows are dependent).

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, n > m, NaN or infinity, or an unknown method.

    Source: derived in lesson 1, appendix.
    """
    if method not in ("auto", "shift", "inverse"):
        raise ValueError(f"method is {method!r}; one of 'auto', 'shift', 'inverse' is needed")
    A = checked(A)
    if A.shape[0] > A.shape[1]:
        raise ValueError(
            f"A has {A.shape[0]} rows and {A.shape[1]} columns; n <= m is needed, more rows than columns are dependent"
        )
    S, exponent = _in_range(A)
    if not S.any(dim=1).all():
        return 0.0
    bound, guess = (0.0, 0.0) if method == "inverse" else _shift_bound(S)
    if method != "shift" and not bound > 0.99 * guess:
        bound = max(bound, _inverse_bound(S) or _equilibrated_bound(S))
    return scaled_down(max(0.0, round_down(bound - _LOST)), exponent)


def eig_min_lower(G: Float[Tensor, "n n"], radius: Float[Tensor, "n n"]) -> float:
    """Bound ``lambda_min`` of every symmetric matrix within `radius` of G from below, rounding errors included.

    For any c and L, ``lambda_min >= c - ||G - c I - L L^T|| - ||radius||``; c is a little below the computed eigenvalue
    and L the computed Cholesky factor, which need not be trusted.

    Args:
        G: float64 matrix, its lower triangle is read.
        radius: nonnegative entries.

    Returns:
        The bound, 0.0 when nothing positive is shown.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity.
    """
    G, radius = checked(G, "G"), checked(radius, "radius")
    if not G.shape == radius.shape == (len(G), len(G)):
        raise ValueError(f"G has shape {tuple(G.shape)}, radius {tuple(radius.shape)}; both (n, n) are needed")
    G, radius = (A.tril() + A.tril(-1).T for A in (G, radius))
    S, exponent = _in_range(G)
    noise = scaled_up(frobenius_norm_upper(radius), -exponent)
    bound = _below_spectrum(S, float(torch.linalg.eigvalsh(S)[0]), 1e-6, noise)
    return scaled_down(max(0.0, bound), exponent)
