"""Rigorous linear algebra in float64: bounds on singular values and on products that are theorems about the floats.

Notation: ``u = 2^-53``, ``gamma_k = k u / (1 - k u)``. The one thing assumed of the machine is the standard model of
IEEE float64 arithmetic: a computed inner product of length k obeys, in any order of summation, fused or not::

    |fl(a.b) - a.b| <= gamma_k |a|.|b| + k 2^-1022

(the last term covers underflow). That excludes Strassen's products, TF32 and emulated float64, so everything runs on
the CPU. Nothing is assumed of Cholesky, QR, eigenvalue or triangular solvers: their results are guesses, and the error
of a guess is measured afterwards. Every bound is then rounded outward. The full proofs are in the appendix of lesson 1.

Two bounds on ``sigma_min(F)``, the smallest singular value of the n rows of ``F`` (n, m):

- shift: for any ``c`` and any ``L``, with ``E = F F^T - c I - L L^T``: ``sigma_min^2 >= c - ||E||``, because
  ``||F^T x||^2 = c + ||L^T x||^2 + x^T E x`` for every unit ``x``. Works up to a condition number of about 1e6.
- inverse: for any ``R``, if ``||I - F R|| <= a < 1``, then ``sigma_min >= (1 - a) / ||R||``, because
  ``1 - a <= x^T F R x <= ||F^T x|| ||R||``. Works up to about 1e12, at two to three times the cost.

With the opposite sign, ``||F||^2 <= c + ||E||`` for ``E = c I - F F^T - L L^T``.

Balls enclose the layers of a network: a pair ``(value, radius)`` says that the true number is within `radius` of
`value`, entry by entry. `companion.enclosures` strings them together.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

UNIT = 2.0**-53
_ETA = 2.0**-1022  # what one product may lose to underflow, flushing to zero included
_DUST = 2.0**-500  # more than everything that underflow can do to a matrix whose largest entry is in [2^-64, 2^64]
_LOST = 2.0**-1000  # more than sqrt(n m) 2^-1074, what scaling down by a power of two may lose
_BLOCK = 256  # columns of a panel of a symmetric product, of which only the lower half is computed
_CHUNK = 2**21  # numbers in one temporary (16 MB)
_TINY = 2.0**-1070  # 16 times what one operation loses to gradual underflow
_GROW = 1 + 1e-9  # covers 2^22 roundings of a sum of nonnegative numbers, and what is done with it


# --- Scalars --------------------------------------------------------------------------------------------------------


def round_up(x: float, ulps: int = 1) -> float:
    """Return ``x + ulps`` units in the last place: an upper bound on any number that was rounded to nearest to `x`.

    Args:
        x: a float; infinity and NaN are returned unchanged.
        ulps: how many floats to step.

    Returns:
        The next float but ``ulps - 1`` above `x`.
    """
    for _ in range(ulps):
        x = math.nextafter(x, math.inf)
    return x


def round_down(x: float, ulps: int = 1) -> float:
    """Return ``x - ulps`` units in the last place: a lower bound on any number that was rounded to nearest to `x`.

    Args:
        x: a float; minus infinity and NaN are returned unchanged.
        ulps: how many floats to step.

    Returns:
        The next float but ``ulps - 1`` below `x`.
    """
    for _ in range(ulps):
        x = math.nextafter(x, -math.inf)
    return x


def gamma(k: int) -> float:
    """Compute ``gamma_k = k u / (1 - k u)``, ``u = 2^-53``, rounded up: the relative error of k roundings.

    Args:
        k: number of roundings, below 2^52.

    Returns:
        A float at least ``gamma_k``.
    """
    return round_up(k * UNIT / round_down(1 - k * UNIT))


def _sum_up(*terms: float) -> float:
    """An upper bound on the sum of nonnegative floats."""
    total = 0.0
    for term in terms:
        total = round_up(total + term)
    return total


def _scaled_down(x: float, exponent: int) -> float:
    """``x 2^exponent``, rounded down when it is not a float; x >= 0."""
    try:
        value = math.ldexp(x, exponent)
    except OverflowError:
        return sys.float_info.max
    return value if math.ldexp(value, -exponent) == x else max(0.0, round_down(value))


def _scaled_up(x: float, exponent: int) -> float:
    """``x 2^exponent``, rounded up when it is not a float; x >= 0."""
    try:
        value = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
    return value if math.ldexp(value, -exponent) == x else round_up(value)


# --- Input ----------------------------------------------------------------------------------------------------------


def _checked(A: Tensor, name: str = "A") -> Tensor:
    """The matrix on the CPU, outside autograd, or one sentence that says why it is refused."""
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} is a {type(A).__name__}; a torch.Tensor is needed")
    if A.dtype != torch.float64:
        raise TypeError(
            f"{name} is {A.dtype}; rigorous bounds need float64 (cast with {name}.double(), which is exact)"
        )
    if A.ndim != 2 or A.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(A.shape)}; a matrix (n, m) with n, m >= 1 is needed")
    _refuse_flushing()
    A = A.detach().cpu()
    if not all(math.isfinite(end) for end in A.aminmax()):
        raise ValueError(f"{name} holds NaN or infinity; finite numbers are needed")
    return A


def _refuse_flushing() -> None:
    if not float(torch.tensor(2.0**-1022, dtype=torch.float64, device="cpu") * 0.5):
        raise RuntimeError("denormal numbers are flushed to zero; rigorous bounds need torch.set_flush_denormal(False)")


def _largest(A: Tensor) -> float:
    """``max |A_ij|`` without a copy of `A`."""
    low, high = A.aminmax()
    return max(-float(low), float(high))


def _in_range(A: Tensor) -> tuple[Tensor, int]:
    """``(S, e)`` with ``A = 2^e S`` and ``max |S|`` in [2^-64, 2^64], so that no sum of products overflows.

    Scaling up is exact. Scaling down rounds numbers below 2^-1022, by at most 2^-1074 each: `_LOST` covers all of them.
    Most matrices are in range already, and are not copied.
    """
    top = _largest(A)
    if top == 0 or 2.0**-64 <= top <= 2.0**64:
        return A, 0
    exponent = math.frexp(top)[1]
    return torch.from_numpy(np.ldexp(A.numpy(), -exponent)), exponent


# --- Products and norms ---------------------------------------------------------------------------------------------


def _row_panels(A: Tensor, width: int = 0) -> Iterator[slice]:
    """Slices of rows, each holding at most `_CHUNK` numbers (but at least one row)."""
    rows = max(1, _CHUNK // max(A.shape[1], width))
    return (slice(i, i + rows) for i in range(0, len(A), rows))


def _check_product(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    A, B = _checked(A, "A"), _checked(B, "B")
    if A.shape[1] != B.shape[0]:
        raise ValueError(f"A has shape {tuple(A.shape)}, B {tuple(B.shape)}; A needs as many columns as B has rows")
    return A, B


def _radius(A: Tensor, abs_B: Tensor) -> Tensor:
    k = len(abs_B)
    # gamma_k / (1 - gamma_k) = k u / (1 - 2 k u), and 4 for the roundings of this line; underflow: k products, k sums
    factor = round_up((k + 4) * UNIT / round_down(1 - 2 * (k + 4) * UNIT))
    return (A.abs() @ abs_B).mul_(factor).add_((2 * k + 4) * _ETA)


def product_radius(A: Float[Tensor, "n k"], B: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """Bound the rounding error of a product, entry by entry: ``|fl(A B) - A B| <= gamma_k |A| |B| + k 2^-1022``.

    ``|A| |B|`` is itself computed in floats, ``|A| |B| <= (fl(|A| |B|) + k 2^-1022) / (1 - gamma_k)``, which the
    returned radius includes. It holds for any order of summation, with fused operations or without, for the classical
    product in float64 (not for TF32, Strassen's product or emulated float64).

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
    A, B = _check_product(A, B)
    abs_B = B.abs()
    out = A.new_empty(len(A), B.shape[1])
    for rows in _row_panels(A, B.shape[1]):
        out[rows] = _radius(A[rows], abs_B)
    return out


def product_error(A: Float[Tensor, "n k"], B: Float[Tensor, "k m"]) -> float:
    """Bound the rounding error of a product in the Frobenius norm, ``||fl(A B) - A B||_F``, rounded up.

    The norm of `product_radius`, without holding an (n, m) array.

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
    A, B = _check_product(A, B)
    abs_B, norms = B.abs(), []
    for rows in _row_panels(A, B.shape[1]):
        radius = _radius(A[rows], abs_B)
        if not math.isfinite(_largest(radius)):
            return math.inf
        norms.append(frobenius_norm_upper(radius))
    return frobenius_norm_upper(A.new_tensor([norms])) if math.isfinite(max(norms)) else math.inf


def _frobenius(S: Tensor) -> float:
    """Upper bound on ``||S||_F`` for entries up to 2^64: a sum of k squares errs by gamma_k, relatively."""
    total = 0.0
    for rows in _row_panels(S):
        panel = S[rows].reshape(-1)
        total += float(panel @ panel)
    # k squarings and additions of the dot products, at most as many additions of panels, and 4 for what follows
    return _sum_up(round_up(math.sqrt(round_up(total * (1 + gamma(2 * S.numel() + 4))))), _DUST)


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
    S, exponent = _in_range(_checked(A))
    if not S.any():
        return 0.0
    return _scaled_up(_sum_up(_frobenius(S), _LOST), exponent)


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
    return _sum_up(round_up(best * (1 + gamma(2 * (n + m) + 8))), _DUST)


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
    bound cover the computed difference and the rounding of ``L L^T``.
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
        squares = _sum_up(squares, _frobenius(H) ** 2 * (1 + 4 * UNIT))
    residual = math.sqrt(2 * squares)  # a symmetric matrix has at most twice the squares of its lower half
    return _sum_up(residual * (1 + 8 * UNIT), gamma(n + 1) * _absolute_gram_norm(L) * (1 + 4 * UNIT), _DUST)


def _smallest_guess(G: Tensor) -> tuple[float, float]:
    """A guess at the smallest eigenvalue of `G` and at its relative error; 0.0 where there is no Cholesky factor."""
    L, info = torch.linalg.cholesky_ex(G)
    if int(info):
        return 0.0, 0.0
    theta, rough = _largest_ritz(lambda V: torch.cholesky_solve(V, L), len(G), steps=12)
    return (1 / theta if theta > 0 else 0.0), rough


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
    diagonal = G.diagonal().clone()
    delta = max(1e-7, rough / 4, noise / (8 * guess))
    while delta < 1:
        c = (1 - delta) * guess
        torch.sub(diagonal, c, out=G.diagonal())
        error = _sum_up(_cholesky_error(G), noise, _DUST)
        if math.isfinite(error):
            square = round_down(c - error)
            return (round_down(math.sqrt(square)) if square > 0 else 0.0), math.sqrt(guess)
        delta *= 30
    return 0.0, 0.0


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
    S, exponent = _in_range(_checked(A))
    if not S.any():
        return 0.0
    if S.shape[0] > S.shape[1]:
        S = S.T
    best = _frobenius(S)
    G, noise = _gram(S), round_up(gamma(S.shape[1]) * _absolute_gram_norm(S))
    guess, rough = _largest_ritz(lambda V: G @ V, len(S), steps=16)
    diagonal = G.diagonal().clone()
    G.neg_()
    delta = max(1e-10, 4 * rough, noise / (8 * guess)) if guess > 0 else math.inf
    while delta < 1:
        c = (1 + delta) * guess
        torch.sub(c, diagonal, out=G.diagonal())
        error = _sum_up(_cholesky_error(G), noise, _DUST)
        if math.isfinite(error):
            best = min(best, round_up(math.sqrt(round_up(c + error))))
            break
        delta *= 30
    return _scaled_up(_sum_up(best, _LOST), exponent)


# --- The smallest singular value ------------------------------------------------------------------------------------


def _inverse_bound(S: Tensor) -> float:
    """The inverse bound on ``sigma_min(S)`` with ``R = Q T^-T`` from ``S^T = Q T``; 0.0 when nothing is shown."""
    m = S.shape[1]
    Q, T = torch.linalg.qr(S.T)
    Rt = torch.linalg.solve_triangular(T, Q.T, upper=True)  # R^T, (n, m)
    del Q, T
    if not math.isfinite(_largest(Rt)) or not Rt.any():
        return 0.0
    ones = S.new_ones(len(S))
    down, abs_R_ones = torch.zeros_like(ones), S.new_zeros(m)
    ones_abs_S, across = torch.zeros_like(abs_R_ones), []
    for rows in _row_panels(S, len(S)):
        residual = S[rows] @ Rt.T
        residual[:, rows].diagonal().sub_(1)
        residual.abs_()
        across.append(residual.sum(dim=1))
        down += residual.sum(dim=0)
        abs_R_ones += Rt[rows].abs().T @ ones[rows]
        ones_abs_S += S[rows].abs().sum(dim=0)
    rounding = gamma(m)  # of each entry of fl(S R), times |S| |R|
    row = torch.cat(across) + rounding * torch.cat([S[r].abs() @ abs_R_ones for r in _row_panels(S)])
    column = down + rounding * torch.cat([Rt[r].abs() @ ones_abs_S for r in _row_panels(Rt)])
    # sums of nonnegative numbers, at most n + m + 8 roundings each; ||B||_2^2 <= ||B||_1 ||B||_inf
    safety = 1 + gamma(2 * sum(S.shape) + 16)
    a = round_up(math.sqrt(float(row.max()) * safety + _DUST) * math.sqrt(float(column.max()) * safety + _DUST), 4)
    if not a < 1:
        return 0.0
    return max(0.0, round_down(round_down(1 - a) / spectral_norm_upper(Rt)))


def _equilibrated_bound(S: Tensor) -> float:
    """The inverse bound after dividing each row by a power of two: ``sigma_min(D B) >= min_i D_ii sigma_min(B)``."""
    tops = torch.maximum(S.amax(dim=1), -S.amin(dim=1)).numpy()
    exponents = np.frexp(tops)[1]
    if exponents.max() - exponents.min() < 8:
        return 0.0
    B = torch.from_numpy(np.ldexp(S.numpy(), -exponents[:, None]))
    return _scaled_down(max(0.0, round_down(_inverse_bound(B) - _LOST)), int(exponents.min()))


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
            ``"auto"``: shift, and where that shows nothing or loses more than half, the better of the two.

    Returns:
        A lower bound, 0.0 when it cannot be shown (which does not say that the rows are dependent).

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, n > m, NaN or infinity, or an unknown method.

    Source: derived in lesson 1, appendix.
    """
    if method not in ("auto", "shift", "inverse"):
        raise ValueError(f"method is {method!r}; one of 'auto', 'shift', 'inverse' is needed")
    A = _checked(A)
    if A.shape[0] > A.shape[1]:
        raise ValueError(
            f"A has {A.shape[0]} rows and {A.shape[1]} columns; n <= m is needed, more rows than columns are dependent"
        )
    S, exponent = _in_range(A)
    if not S.any(dim=1).all():
        return 0.0
    bound, guess = (0.0, 0.0) if method == "inverse" else _shift_bound(S)
    if method != "shift" and not bound > guess / 2:
        bound = max(bound, _inverse_bound(S) or _equilibrated_bound(S))
    return _scaled_down(max(0.0, round_down(bound - _LOST)), exponent)


# --- Balls: enclosures of a network's layers ------------------------------------------------------------------------

Ball = tuple[Tensor, Tensor]


def check_ball(value: Tensor, radius: Tensor, *ranks: int) -> None:
    """One sentence about what is wrong with a ball, or nothing; `ranks` are the numbers of axes that are allowed."""
    for name, A in (("value", value), ("radius", radius)):
        if not isinstance(A, Tensor):
            raise TypeError(f"{name} is a {type(A).__name__}; a torch.Tensor is needed")
        if A.dtype != torch.float64 or A.device.type != "cpu":
            raise TypeError(f"{name} is {A.dtype} on {A.device}; enclosures need float64 on the CPU")
        if A.numel() == 0 or A.shape != value.shape or (ranks and A.ndim not in ranks):
            axes = " or ".join(map(str, ranks)) or "any number of"
            raise ValueError(f"{name} has shape {tuple(A.shape)}; {axes} axes, no empty one, equal shapes are needed")
        low, high = (float(end) for end in A.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)) or (name == "radius" and low < 0):
            raise ValueError(f"{name} lies between {low} and {high}; finite numbers are needed, no radius below 0")
    _refuse_flushing()


def _parameters(k: int, **parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters of a layer as float64 on the CPU, which is exact."""
    if k >= 2**22:
        raise ValueError(f"the layer sums {k} terms; fewer than 2^22 are needed")
    out = []
    for name, A in parameters.items():
        if A is not None:
            if not A.is_floating_point() or not bool(torch.isfinite(A).all()):
                raise ValueError(f"{name} is {A.dtype} or holds NaN or infinity; finite floating point is needed")
            A = A.detach().cpu().double()
        out.append(A)
    return out


def _spread(value: Tensor, radius: Tensor, k: int) -> Tensor:
    """At least ``D + gamma_k |h|``, what a linear map with nonnegative weights takes to its own radius."""
    return value.abs().mul_(gamma(k) * _GROW).add_(radius).mul_(1 + 4 * UNIT).add_(_TINY)


def dense_ball(
    value: Float[Tensor, "N p"],
    radius: Float[Tensor, "N p"],
    weight: Float[Tensor, "m p"],
    bias: Float[Tensor, " m"] | None = None,
) -> Ball:
    """Enclose ``x W^T + b`` for every x with ``|x - h| <= D``: radius ``|W| D + gamma_(p+2) (|W| |h| + |b|)``.

    Args:
        value: ``h``, the middle, float64 ``(N, p)``.
        radius: ``D >= 0``, the same shape.
        weight: ``W``, ``(m, p)``; float32 is cast exactly.
        bias: ``b``, ``(m,)``, or None.

    Returns:
        The computed ``h W^T + b`` and its radius, underflow included, ``(N, m)``.

    Raises:
        TypeError, ValueError: a ball that is not float64, not finite, negative or empty, or bad parameters.

    Source: the standard model of floating-point arithmetic; derived in lesson 3.
    """
    check_ball(value, radius, 2)
    k = weight.shape[1]
    W, b = _parameters(k, weight=weight, bias=bias)
    out, spread = value @ W.T, _spread(value, radius, k + 2) @ W.abs().T
    if b is not None:
        out += b
        spread += gamma(k + 2) * b.abs()
    return out, spread.mul_(_GROW).add_((4 * k + 8) * _ETA)


def conv2d_ball(
    value: Float[Tensor, "N C H W"],
    radius: Float[Tensor, "N C H W"],
    weight: Float[Tensor, "out fan h w"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Ball:
    """Enclose a convolution as the product it is: unfold, multiply; the radius as in `dense_ball`.

    A library's convolution may use Winograd's or Fourier's algorithm, about whose rounding the model says nothing.

    Args:
        value: ``h``, float64 ``(N, C, H, W)``.
        radius: ``D >= 0``, the same shape.
        weight: ``(out, C / groups, h, w)``; float32 is cast exactly.
        bias: ``(out,)``, or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; zeros are padded.

    Returns:
        The computed convolution and its radius, ``(N, out, H', W')``.

    Raises:
        TypeError, ValueError: as `dense_ball`.

    Source: the standard model of floating-point arithmetic; derived in lesson 3.
    """
    check_ball(value, radius, 4)
    (n_out, fan, *window), (N, C, *size) = weight.shape, value.shape
    if fan * groups != C or n_out % groups:
        raise ValueError(f"weight has shape {tuple(weight.shape)} with groups {groups}; value has {C} channels")
    pair = [(a, a) if isinstance(a, int) else tuple(a) for a in (stride, padding, dilation)]
    H, W = ((size[a] + 2 * pair[1][a] - pair[2][a] * (window[a] - 1) - 1) // pair[0][a] + 1 for a in (0, 1))
    k = fan * math.prod(window)
    kernel, b = _parameters(k, weight=weight.reshape(groups, n_out // groups, k), bias=bias)
    unfold = partial(F.unfold, kernel_size=window, stride=pair[0], padding=pair[1], dilation=pair[2])
    out, spread = value.new_empty(N, n_out, H, W), value.new_empty(N, n_out, H, W)
    size_abs, h, D = kernel.abs(), value, _spread(value, radius, k + 2)
    rows = max(1, 2**18 // (C * math.prod(window) * H * W))  # 2 MB: the panel stays in the cache
    for r in (slice(i, i + rows) for i in range(0, N, rows)):
        for target, image, matrix in ((out, h, kernel), (spread, D, size_abs)):
            columns = unfold(image[r]).reshape(-1, groups, k, H * W)
            target[r] = (matrix @ columns).reshape(-1, n_out, H, W)
    if b is not None:
        out += b[:, None, None]
        spread += gamma(k + 2) * b.abs()[:, None, None]
    return out, spread.mul_(_GROW).add_((4 * k + 8) * _ETA)


def batchnorm_ball(
    value: Float[Tensor, "N C *rest"],
    radius: Float[Tensor, "N C *rest"],
    mean: Float[Tensor, " C"],
    var: Float[Tensor, " C"],
    weight: Float[Tensor, " C"] | None = None,
    bias: Float[Tensor, " C"] | None = None,
    eps: float = 1e-5,
) -> Ball:
    """Enclose BatchNorm in eval mode, ``gamma (x - mu) / sqrt(v + eps) + b``.

    With ``rho = |gamma| / sqrt(v + eps)`` the radius is ``rho D + 10 u (rho (|h| + |mu|) + |b|)`` and underflow.

    Args:
        value: ``h``, float64 ``(N, C, ...)``.
        radius: ``D >= 0``, the same shape.
        mean, var: the stored statistics ``mu``, ``v``, ``(C,)``.
        weight, bias: ``gamma``, ``b``, ``(C,)``, or None for 1 and 0.
        eps: added to the variance.

    Returns:
        The computed values and their radius.

    Raises:
        TypeError, ValueError: as `dense_ball`, or ``v + eps`` not positive.

    Source: derived in lesson 3.
    """
    check_ball(value, radius)
    mu, v, g, b = _parameters(1, mean=mean, var=var, weight=weight, bias=bias)
    if not bool((v + eps > 0).all()):
        raise ValueError(f"var + eps is {float((v + eps).min())} somewhere; a positive number is needed")
    g, b = torch.ones_like(v) if g is None else g, torch.zeros_like(v) if b is None else b
    scale, mu, b = (a.reshape(-1, *[1] * (value.ndim - 2)) for a in (g / torch.sqrt(v + eps), mu, b))
    out = (value - mu).mul_(scale).add_(b)
    size, rho = value.abs() + mu.abs(), scale.abs() * (1 + 8 * UNIT)
    spread = (size * rho).add_(b.abs()).mul_(10 * UNIT).add_(rho * radius)
    return out, spread.mul_(_GROW).add_(size.add_(radius).add_(1).mul_(_TINY))


def add_ball(
    value: Float[Tensor, "*s"],
    radius: Float[Tensor, "*s"],
    other: Float[Tensor, "*s"],
    other_radius: Float[Tensor, "*s"],
) -> Ball:
    """Enclose the sum of two branches: radius ``D_1 + D_2 + u |h_1 + h_2|``.

    Args:
        value, radius: the first ball, float64.
        other, other_radius: the second, of the same shape.

    Returns:
        The computed sum and its radius.

    Raises:
        TypeError, ValueError: as `dense_ball`, or two shapes.
    """
    check_ball(value, radius)
    check_ball(other, other_radius)
    if value.shape != other.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}, other {tuple(other.shape)}; equal shapes are needed")
    out = value + other
    return out, (radius + other_radius).add_(out.abs(), alpha=UNIT).mul_(_GROW).add_(_TINY)


def avgpool_ball(
    value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"], pool: Callable[[Tensor], Tensor], terms: int
) -> Ball:
    """Enclose means over windows: radius ``mean D + gamma_(k+2) mean |h|``.

    Args:
        value, radius: the ball, float64.
        pool: the pooling: sums of at most `terms` entries, each divided by a number. It is applied to both.
        terms: ``k``, the largest number of entries in a window.

    Returns:
        The computed means and their radius.

    Raises:
        TypeError, ValueError: as `dense_ball`.
    """
    check_ball(value, radius)
    _parameters(terms)
    return pool(value), pool(_spread(value, radius, terms + 2)).mul_(_GROW).add_((4 * terms + 8) * _ETA)


def maxpool_ball(value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"], pool: Callable[[Tensor], Tensor]) -> Ball:
    """Enclose maxima over windows: the largest radius in the window, since ``|max a - max b| <= max |a - b|``.

    Args:
        value, radius: the ball, float64.
        pool: the pooling; it is applied to both.

    Returns:
        The maxima, which are exact, and their radius.

    Raises:
        TypeError, ValueError: as `dense_ball`.
    """
    check_ball(value, radius)
    return pool(value), pool(radius)


def relu_ball(value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"]) -> Ball:
    """Enclose ``max(x, 0)``, which is exact and moves no two numbers apart; raises as `dense_ball`."""
    check_ball(value, radius)
    return value.clamp(min=0), radius.clone()


def tanh_ball(value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"]) -> Ball:
    """Enclose ``tanh x``: radius ``D + 8 u |h|``; 8 u for the library is assumed. Raises as `dense_ball`."""
    check_ball(value, radius)
    out = torch.tanh(value)
    return out, radius.add(out.abs(), alpha=8 * UNIT).mul_(_GROW).add_(_TINY)


def softplus_ball(
    value: Float[Tensor, "*s"], radius: Float[Tensor, "*s"], beta: float = 1.0, threshold: float | None = None
) -> Ball:
    """Enclose ``log(1 + exp(beta x)) / beta``: radius ``D + 2 u |x| + 8 u |h|``, where 8 u for the library is assumed.

    Args:
        value, radius: the ball, float64.
        beta: sharpness, positive.
        threshold: None for the analytic function; a number for PyTorch's ``F.softplus``, which is x where
            ``beta x`` exceeds it: the jump there, ``log(1 + exp(-threshold)) / beta``, joins the radius.

    Returns:
        The computed ``logaddexp(beta x, 0) / beta`` and its radius.

    Raises:
        TypeError, ValueError: as `dense_ball`, or a beta that is not positive and finite.
    """
    check_ball(value, radius)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; a positive finite number is needed")
    inner = value * beta
    out = torch.logaddexp(inner, inner.new_zeros(())).div_(beta)
    spread = radius.add(value.abs(), alpha=2 * UNIT).add_(out.abs(), alpha=8 * UNIT)
    if threshold is not None:
        jump = (max(0.0, -threshold) + math.log1p(math.exp(-abs(threshold)))) / beta * _GROW
        spread.add_(jump)
    return out, spread.mul_(_GROW).add_(_TINY * (1 + 1 / beta))


# --- Exact arithmetic -----------------------------------------------------------------------------------------------


def to_fractions(A: Float[Tensor, "n m"]) -> list[list[Fraction]]:
    """Write every float of `A` as the rational number it is.

    Args:
        A: float64 matrix ``(n, m)``, finite.

    Returns:
        n lists of m fractions.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity.
    """
    return [[Fraction(a) for a in row] for row in _checked(A).tolist()]


def _positive_definite(M: list[list[int]]) -> bool:
    """Whether a symmetric integer matrix is positive definite, by ``L D L^T`` without fractions (Bareiss).

    Pivot k is the leading principal minor of order k, all of them positive by Sylvester's criterion; every division is
    exact. Only the lower half of `M` is read; it is overwritten.
    """
    previous = 1
    for k in range(len(M)):
        pivot = M[k][k]
        if pivot <= 0:
            return False
        for i in range(k + 1, len(M)):
            for j in range(k + 1, i + 1):
                M[i][j] = (pivot * M[i][j] - M[i][k] * M[j][k]) // previous
        previous = pivot
    return True


def exact_sigma_min_exceeds(A: Float[Tensor, "n m"], s: float | Fraction) -> bool:
    """Decide ``sigma_min(A) > s`` exactly: ``A A^T - s^2 I`` has only positive pivots in ``L D L^T``.

    Both sides are multiplied by a common denominator, and the elimination runs in integers. The cost grows like n^3
    times the length of the numbers: for matrices of a few dozen rows.

    Args:
        A: float64 matrix ``(n, m)``, finite. With n > m the answer is always False.
        s: a nonnegative number; a float is taken as the rational it is.

    Returns:
        True exactly when ``sigma_min(A) > s``.

    Raises:
        TypeError: not a tensor, or not float64.
        ValueError: not 2-D, empty, NaN or infinity, or a negative or non-finite `s`.

    Source: Sylvester's criterion; Bareiss (1968), fraction-free elimination.
    """
    if not (isinstance(s, Fraction) or math.isfinite(s)) or s < 0:
        raise ValueError(f"s is {s}; a finite number >= 0 is needed")
    rows, threshold = to_fractions(A), Fraction(s)
    scale = math.lcm(threshold.denominator, *(a.denominator for row in rows for a in row))
    integers = [[int(a * scale) for a in row] for row in rows]
    square = int(threshold * scale) ** 2
    gram = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in integers[: i + 1]] for i, x in enumerate(integers)]
    for i, row in enumerate(gram):
        row[i] -= square
    return _positive_definite(gram)
