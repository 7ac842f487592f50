"""The infinitely wide ReLU layer with only its input weights trained: kernel regression, and what follows from it.

Everything here reads the kernel ``H_ij = x_i.x_j (pi - t_ij) / (2 pi)`` of `kernels.relu_ntk` and no network.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, kernels
from companion.arguments import checked


def check_scale(name: str, A: Tensor, smallest: float = 1e-100) -> None:
    """Refuse numbers whose squares and products would overflow or vanish: a ValueError naming `A`.

    Args:
        name: what the caller calls it.
        A: numbers; all of them may be 0.
        smallest: the least size that the largest of them may have.
    """
    top, largest = float(A.abs().max()), 1e100 if A.dtype == torch.float64 else 1e12
    if top and not smallest <= top <= largest:
        raise ValueError(f"{name} has entries up to {top:.1e}; {smallest:.0e} to {largest:.0e} is needed: rescale it")


def check_inputs(X: Tensor, *, geometry: bool = True) -> None:
    """Refuse inputs ``(N, d)`` on which a kernel is singular (with `geometry`), or rows whose squares are no floats."""
    data.check(X, geometry=geometry)
    norms = data.row_norms(X)
    for size in (norms[norms > 0].amin(), norms.amax()) if bool(X.any()) else ():
        check_scale("X", size)


_MOST_STEPS = 10**7  # of the Monte Carlo prediction, whose path is held in memory


class KernelFit(NamedTuple):
    """Kernel regression at new inputs: ``prediction`` ``(M,)``, and the ``variance`` ``(M,)`` of f_0 per kappa^2."""

    prediction: Tensor
    variance: Tensor


@checked(double=True)
def kernel_regression(X: Float[Tensor, "N d"], y: Float[Tensor, " N"], Z: Float[Tensor, "M d"]) -> KernelFit:
    """Compute ``f_KR(z) = K(z, X) H^-1 y``, and what a random ``f_0`` adds to ``f_L(z, w*)`` as m grows.

    With independent signs ``f_L(z, w*)`` tends to ``f_KR(z)`` plus a Gaussian of variance ``kappa^2 [Sigma(z, z) - 2
    b.Sigma(X, z) + b.Sigma(X, X) b]``, ``b = H^-1 K(X, z)``, Sigma the ReLU kernel; with mirrored pairs to ``f_KR(z)``.

    Args:
        X: inputs ``(N, d)``.
        y: targets ``(N,)``.
        Z: new inputs ``(M, d)``.

    Returns:
        `KernelFit`, the variance at ``kappa = 1``.

    Source: derived in lesson 4.
    """
    check_inputs(X)
    for name, A in (("y", y), ("Z", Z)):
        check_scale(name, A)
    b = torch.linalg.solve(kernels.relu_ntk(X), kernels.relu_ntk(X, Z))  # (N, M)
    cross = kernels.relu_kernel(X, Z)
    own = 0.5 * Z.square().sum(1)  # Sigma(z, z) = |z|^2 / 2
    variance = own - 2 * (b * cross).sum(0) + (b * (kernels.relu_kernel(X) @ b)).sum(0)
    return KernelFit(b.T @ y, variance.clamp_min(0))


def equal_norm(X: Tensor) -> float:
    """The common norm of the rows of X ``(N, d)``; a ValueError if they differ by more than 1e-9 relatively."""
    norms = data.row_norms(X)
    if float(norms.max()) > float(norms.min()) * (1 + 1e-9):
        low, high = float(norms.min()), float(norms.max())
        raise ValueError(f"X has row norms from {low:.3g} to {high:.3g}; rows of equal norm are needed")
    return float(norms.mean())


class Constant(NamedTuple):
    """A Monte Carlo value with its standard error."""

    value: float
    error: float


@checked(double=True)
def perp_constant(
    X: Float[Tensor, "N d"],
    y: Float[Tensor, " N"],
    step: float,
    *,
    kappa: float = 1.0,
    steps: int | None = None,
    draws: int = 30_000,
    generator: torch.Generator | None = None,
) -> Constant:
    """Predict ``C^2 = lim sqrt(m) V_perp(inf)`` for mirrored pairs, without training: ``sqrt(V_perp) ~ C m^(-1/4)``.

    ``C^2 = sum_j rho_j / (kappa sqrt(2 pi)) int E[phi_j(v)^2] dv``; ``phi_j`` sums ``eta e_kj`` while the gate of a
    neuron that starts at ``sqrt(m) z = v`` differs from its initial one, and the neuron drifts by ``a [sum_{i != j}
    1{w.x_i > 0} x_i.x_j e_i + 1{v > 0} rho_j^2 e_j]``, ``e_k = (I - eta H)^k y``. To leading order in ``1/m``; a proof
    for ``n = 1`` only.

    Args:
        X: inputs ``(N, d)``.
        y: the first residual ``(N,)``: the targets for mirrored pairs, else ``y - f_0``.
        step: eta, with ``eta lambda_max(H) < 2``.
        kappa: standard deviation of the initial weights.
        steps: predict ``V_perp`` after so many steps; None for the limit.
        draws: neurons drawn for each input.
        generator: CPU generator; None for seed 0.

    Returns:
        ``C^2`` and its standard error.

    Source: the sharp constant, derived in lesson 4.
    """
    check_inputs(X)
    check_scale("y", y)
    if not (min(kappa, step) >= 1e-100 and draws >= 2):
        raise ValueError(f"kappa, step, draws are {kappa}, {step}, {draws}; positive numbers and 2 draws are needed")
    generator = torch.Generator("cpu").manual_seed(0) if generator is None else generator
    values, U = torch.linalg.eigh(kernels.relu_ntk(X))
    slowest = float((1 - step * values).abs().max())
    if not slowest < 1:
        most = 2 / float(values[-1])
        raise ValueError(f"step is {step}; less than 2/lambda_max = {most:.3g}, and not next to nothing, is needed")
    if steps is None:
        steps = max(1, math.ceil(math.log(1e-6) / math.log(slowest))) if slowest > 0 else 1
    if not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"steps is {steps:.3g}; 1 to {_MOST_STEPS} are needed: give them, or a larger step")
    k = torch.arange(steps, dtype=torch.float64, device=X.device)
    E = step * (((1 - step * values) ** k[:, None]) * (U.T @ y)) @ U.T  # (steps, N), eta e_k
    gram, parts = X @ X.T, []
    for j in range(len(X)):
        w = torch.randn(draws, X.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(X)
        w -= (w @ X[j] / gram[j, j])[:, None] * X[j]
        a = torch.randint(0, 2, (draws,), generator=generator, dtype=torch.int64, device="cpu").to(X) * 2 - 1
        # stratified: one v in each of `draws` equal cells of [-R, R]
        cell = torch.rand(draws, generator=generator, dtype=torch.float64, device="cpu").to(X)
        cell = (torch.arange(draws, dtype=X.dtype, device=X.device) + cell) / draws
        R = float((E.abs() @ gram[j].abs()).sum())
        others = (w @ X.T > 0).to(X)
        others[:, j] = 0
        phi = _drift(R * (2 * cell - 1), a, others * gram[j], float(gram[j, j]), E, j)
        parts.append(2 * R * math.sqrt(float(gram[j, j])) / (kappa * math.sqrt(2 * math.pi)) * phi**2)
    return Constant(float(sum(p.mean() for p in parts)), float(sum(p.var() / draws for p in parts)) ** 0.5)


def _drift(v: Tensor, a: Tensor, push: Tensor, own: float, E: Tensor, j: int) -> Tensor:
    """``phi_j`` of every drawn neuron: Euler steps of its pre-activation v, in blocks of steps."""
    start, phi = (v > 0).to(v), torch.zeros_like(v)
    for block in E.split(64):
        outer = (block @ push.T) * a  # (steps, draws): what the other inputs push
        for pushed, mine in zip(outer, block[:, j].tolist(), strict=True):
            gate = (v > 0).to(v)
            phi.add_(gate - start, alpha=mine)
            v = v + pushed + (own * mine) * gate * a
    return phi


@checked(double=True)
def perp_constant_n1(rho: float, e0: float, *, step: float | None = None, kappa: float = 1.0) -> float:
    """``C^2 = 2 eta |e_0|^3 s^2 / (kappa sqrt(2 pi) rho (1 - s^3))``, ``s = 1 - eta rho^2 / 2``, for one sample.

    Args:
        rho: norm of the input.
        e0: initial residual.
        step: eta with s in (0, 1); None for gradient flow, ``4 |e_0|^3 / (3 sqrt(2 pi) kappa rho^3)``.
        kappa: standard deviation of the initial weights.

    Returns:
        ``C^2``.

    Raises:
        ValueError: a norm, kappa or step out of range.

    Source: the sharp constant, derived in lesson 4.
    """
    if not (min(rho, kappa) >= 1e-40 and max(rho, kappa, abs(e0)) <= 1e40):
        raise ValueError(
            f"rho, kappa, e0 are {rho}, {kappa}, {e0}; positive rho and kappa, all up to 1e+40, are needed"
        )
    if step is None:
        return 4 * abs(e0) ** 3 / (3 * math.sqrt(2 * math.pi) * kappa * rho**3)
    s = 1 - step * rho**2 / 2
    if not 0 < s < 1:
        raise ValueError(f"step is {step}; 0 < step < {2 / rho**2:.3g} is needed")
    return 2 * step * abs(e0) ** 3 * s**2 / (kappa * math.sqrt(2 * math.pi) * rho * (1 - s**3))


@checked(double=True)
def spectrum_bounds(X: Float[Tensor, "N d"]) -> tuple[float, float]:
    """Bound ``lambda_min(H)`` from the angles alone, for rows of equal norm rho.

    ``rho^2 sum_p c_p max(0, 1 - max_i sum_{j != i} |cos t_ij|^(2p)) <= lambda_min(H) <= min_{i != j} rho^2 / 2
    [1 - cos t_ij (1 - t_ij / pi)]``, ``c_p = (2p-3)!! / (2 pi (2p-2)!! (2p-1))``.

    Args:
        X: inputs ``(N, d)`` of equal norm, N >= 2.

    Returns:
        The lower and the upper bound.

    Source: bounds on the spectrum, derived in lesson 4.
    """
    check_inputs(X)
    if len(X) < 2:
        raise ValueError(f"X has {len(X)} row; at least 2 are needed, as the bounds come from angles between rows")
    rho = equal_norm(X)
    t = kernels.angles(X)
    cosine = torch.cos(t).abs().fill_diagonal_(0)
    off = ~torch.eye(len(X), dtype=torch.bool, device=X.device)
    upper = float((0.5 * (1 - torch.cos(t) * (1 - t / math.pi)))[off].min())
    lower, rest, c, power = 0.0, 0.25, 1 / (2 * math.pi), cosine.square()
    even = power.clone()
    for p in range(1, 400):
        gap = max(0.0, 1 - float(even.sum(1).max()))
        lower, rest = lower + c * gap, rest - c
        c *= (2 * p - 1) ** 2 / (2 * p * (2 * p + 1))
        even *= power
    return rho**2 * (lower + rest * gap), rho**2 * upper


class Generalization(NamedTuple):
    """``norm2 = y.H^-1 y``, ``B = max(1, ceil(sqrt(norm2)))``, the ``leading`` term and the full ``bound``."""

    norm2: float
    B: int
    leading: float
    bound: float


@checked(double=True)
def generalization_bound(X: Float[Tensor, "N d"], y: Float[Tensor, " N"], *, delta: float = 0.05) -> Generalization:
    """Bound ``E min(1, |f_KR(x) - y|) <= sqrt(2) B / sqrt(n) + 3 sqrt(log(2 B (B + 1) / delta) / 2n)``.

    With probability ``1 - delta`` over n independent pairs with inputs of unit norm; preprocessing must not have seen
    them. Random labels have ``E y.H^-1 y = trace H^-1``.

    Args:
        X: inputs ``(N, d)`` of unit norm.
        y: targets ``(N,)``.
        delta: probability of failure.

    Returns:
        `Generalization`; a bound of 1 or more says nothing.

    Raises:
        ValueError: rows that are not of unit norm, delta outside (0, 1), or data that `data.check` refuses.

    Source: the generalization bound, derived in lesson 4.
    """
    check_inputs(X)
    check_scale("y", y)
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; a probability strictly between 0 and 1 is needed")
    if abs(equal_norm(X) - 1) > 1e-9:
        raise ValueError(f"X has rows of norm {equal_norm(X):.3g}; unit norm is needed")
    n, norm2 = len(X), float(y @ torch.linalg.solve(kernels.relu_ntk(X), y))
    B = max(1, math.ceil(math.sqrt(norm2)))
    leading = math.sqrt(2) * B / math.sqrt(n)
    return Generalization(norm2, B, leading, leading + 3 * math.sqrt(math.log(2 * B * (B + 1) / delta) / (2 * n)))
