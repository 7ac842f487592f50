"""Kernels of wide networks: the two ReLU kernels in closed form, and the empirical NTK of a finite network.

Both closed forms depend on the angle ``t`` between two inputs. With ``s = pi - t`` and ``w ~ N(0, I)``::

    E[relu(w.x) relu(w.z)]       = |x| |z| (sin s - s cos s) / (2 pi)
    E[x.z 1{w.x > 0} 1{w.z > 0}] = x.z s / (2 pi)

Angles come from ``2 atan2(|u - v|, |u + v|)`` of the normalized rows, whose differences are formed directly: arccos, or
distances out of a Gram matrix, lose every angle below 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import checked
from companion.data import row_norms, unit_rows
from companion.networks import Activation, as_ensemble, check_weights
from companion.networks import activation as find_activation


def _half_chords(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``|u - v|`` and ``|u + v|`` for all pairs, without a Gram matrix and without an (N, M, d) array."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(U, V, compute_mode=mode), torch.cdist(U, -V, compute_mode=mode)


@checked
def angles(X: Float[Tensor, "N d"], Z: Float[Tensor, "M d"] | None = None) -> Float[Tensor, "N M"]:
    """Compute the angles ``t_ij = 2 atan2(|u_i - v_j|, |u_i + v_j|)`` in [0, pi], ``u = x/|x|``, ``v = z/|z|``.

    Args:
        X: nonzero rows ``(N, d)`` of any norm.
        Z: nonzero rows ``(M, d)``; None for `X` itself.

    Returns:
        Angles in radians, ``(N, M)``, absolute error about 1e-16 in float64.

    Raises:
        ValueError: a zero row, which has no direction, NaN or infinity, or shapes that do not fit.
    """
    if Z is not None and (X.dtype != Z.dtype or X.device != Z.device):
        raise ValueError(f"X is {X.dtype} on {X.device}, Z is {Z.dtype} on {Z.device}; make them equal")
    for name, A in (("X", X), ("Z", Z)):
        if A is not None and not A.any(dim=1).all():
            raise ValueError(f"{name}[{(~A.any(dim=1)).nonzero()[0].item()}] is a zero row; it has no direction")
    U = unit_rows(X)
    minus, plus = _half_chords(U, U if Z is None else unit_rows(Z))
    return (2 * torch.atan2(minus, plus)).to(X.dtype)


def _pairs(X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Norms and unit rows of both sides in float64, and ``s = pi - t``, accurate at both ends."""
    if Z is not None and (X.dtype != Z.dtype or X.device != Z.device):
        raise ValueError(f"X is {X.dtype} on {X.device}, Z is {Z.dtype} on {Z.device}; make them equal")
    a, U = row_norms(X), unit_rows(X)
    b, V = (a, U) if Z is None else (row_norms(Z), unit_rows(Z))
    minus, plus = _half_chords(U, V)
    return a, U, b, V, torch.atan2(plus, minus).mul_(2)


def _sin_minus_s_cos(s: Tensor) -> Tensor:
    """``sin s - s cos s``, to full relative accuracy also near 0, where it is ``s^3/3`` and the terms cancel."""
    value = torch.sin(s) - s * torch.cos(s)
    small = s < 0.5
    x = s[small]
    # sum_{k>=1} (-1)^(k+1) 2k/(2k+1)! s^(2k+1); the ninth term is below 1e-20 of the first at s = 1/2.
    series = torch.zeros_like(x)
    for k in range(8, 0, -1):
        series = series * x**2 + (-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1)
    value[small] = series * x**3
    return value


@checked
def relu_kernel(X: Float[Tensor, "N d"], Z: Float[Tensor, "M d"] | None = None) -> Float[Tensor, "N M"]:
    """Compute ``K_ij = E[relu(w.x_i) relu(w.z_j)] = |x_i| |z_j| (sin t + (pi - t) cos t) / (2 pi)``, ``w ~ N(0, I)``.

    This is ``lim F_1 F_1^T / n`` for a first layer of n Gaussian neurons (the arc-cosine kernel of degree 1, Cho and
    Saul 2009, halved).

    Args:
        X: rows ``(N, d)`` of any norm, zero rows included.
        Z: rows ``(M, d)``; None for `X` itself.

    Returns:
        ``(N, M)``, in the dtype of `X`, computed in float64: relative error about 1e-15 while ``t`` is away from pi,
        where ``K`` falls like ``(pi - t)^3`` and inherits three times the relative error of ``pi - t``.

    Raises:
        ValueError: NaN or infinity, or shapes that do not fit.
    """
    a, _, b, _, s = _pairs(X, Z)
    return ((_sin_minus_s_cos(s) / (2 * math.pi) * a[:, None]) * b).to(X.dtype)


@checked
def relu_ntk(X: Float[Tensor, "N d"], Z: Float[Tensor, "M d"] | None = None) -> Float[Tensor, "N M"]:
    """Compute ``H_ij = E[x_i.z_j 1{w.x_i > 0} 1{w.z_j > 0}] = x_i.z_j (pi - t) / (2 pi)``, ``w ~ N(0, I)``.

    This is the limit NTK of ``f(x) = sum_r a_r relu(w_r.x) / sqrt(m)``, ``a_r = +-1``, with only the ``w_r`` trained.

    Args:
        X: rows ``(N, d)`` of any norm, zero rows included.
        Z: rows ``(M, d)``; None for `X` itself.

    Returns:
        ``(N, M)``, in the dtype of `X`, computed in float64 with an error about ``1e-16 |x_i| |z_j|``.

    Raises:
        ValueError: NaN or infinity, or shapes that do not fit.
    """
    a, U, b, V, s = _pairs(X, Z)
    return ((U @ V.T * s / (2 * math.pi) * a[:, None]) * b).to(X.dtype)


@checked
def relu_hermite(r_max: int) -> Float[Tensor, " r"]:
    """Compute the squared Hermite coefficients ``mu_0^2, ..., mu_{r_max}^2`` of ReLU.

    For unit rows ``relu_kernel(X) = sum_r mu_r^2 (X X^T)^{o r}`` (entrywise powers), with ``mu_0^2 = 1/(2 pi)``,
    ``mu_1^2 = 1/4``, ``mu_r^2 = ((r-3)!!)^2 / (2 pi r!)`` for even r and 0 for odd ``r >= 3``. Every partial sum is a
    lower bound in the positive semidefinite order.

    Args:
        r_max: the largest degree, at least 0.

    Returns:
        ``(r_max + 1,)``, float64, on the CPU.
    """
    if r_max < 0:
        raise ValueError(f"r_max is {r_max}; a degree >= 0 is needed")
    mu2 = [0.0] * (r_max + 1)
    term = 1 / (2 * math.pi)
    for r in range(0, r_max + 1, 2):
        mu2[r] = term
        term *= (r - 1) ** 2 / ((r + 1) * (r + 2))
    if r_max >= 1:
        mu2[1] = 0.25
    return torch.tensor(mu2, dtype=torch.float64)


@checked
def ntk_gram(
    weights: Sequence[Tensor], X: Float[Tensor, "N d"], activation: str | Activation = "relu"
) -> Float[Tensor, "S NK NK"]:
    """Compute the empirical NTK ``J J^T`` of every network, all layers trained, without forming the Jacobian J.

    ``(J J^T)_{ia,jb} = sum_l (F_{l-1} F_{l-1}^T)_ij (B_l B_l^T)_{ia,jb}`` with ``B_l[i, a] = d f_a(x_i) / d z_l``,
    ``B_L = I``, ``B_l = (B_{l+1} W_{l+1}^T) * sigma'(z_l)``. Its largest eigenvalue sets the step of gradient descent.

    Args:
        weights: L tensors ``(S, n_in, n_out)`` or ``(n_in, n_out)``.
        X: inputs ``(N, d)``.
        activation: name or `Activation`.

    Returns:
        ``(S, N K, N K)``, sample-major: row ``i K + a`` is output a on sample i.
    """
    sigma = find_activation(activation)
    check_weights(weights, X)
    weights = as_ensemble(weights)
    S, _, K = weights[-1].shape
    N = len(X)
    F, Z = [X.expand(S, N, -1)], []
    for W in weights[:-1]:
        Z.append(F[-1] @ W)
        F.append(sigma.value(Z[-1]))
    B = torch.eye(K, dtype=X.dtype, device=X.device).expand(S, N, K, K)
    gram = X.new_zeros(S, N, K, N, K)
    for l in range(len(weights) - 1, -1, -1):
        flat = B.reshape(S, N * K, -1)
        inner = (F[l] @ F[l].mT)[:, :, None, :, None]
        gram += inner * (flat @ flat.mT).view(S, N, K, N, K)
        if l:
            B = (B @ weights[l].mT[:, None]) * sigma.derivative(Z[l - 1])[:, :, None]
    return gram.view(S, N * K, N * K)
