"""What can be asked of a block, its particles and its data before a theorem is applied.

`audit` says which hypotheses of the paper's theorems a block satisfies, `first_variation` and `depth_regularity`
measure what the convergence theorem wants to vanish and what an error of 1/L needs, and on the line `isotonic_floor`
says how low the loss of the limit can be, while `crossing_ratio` stays below 1.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from companion import rigor
from companion.arguments import checked
from companion.certificate import Assumption, Certificate, assumed
from companion.mean_field.blocks import BallBump, Block, check_fit

# --- what the flow is made of -----------------------------------------------------------------------------------------


@checked
def first_variation(
    block: Block, z: Float[Tensor, "S n d"], p: Float[Tensor, "S n d"], theta: Float[Tensor, "T Q k"]
) -> Float[Tensor, "S Q"]:
    """Compute ``(dE/drho)(theta) = (1/n) sum_i p_i.f(z_i, theta)``, whose gradient moves the particles.

    Args:
        block: the block.
        z: states at S depths (or of S networks) ``(S, n, d)``.
        p: adjoint states of the loss there, ``p(1) = r v``; for a layer l of a net, ``z_l`` and ``p_{l+1}``.
        theta: where to evaluate, ``(S, Q, k)`` or ``(1, Q, k)``.

    Returns:
        ``(S, Q)``.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit.
    """
    check_fit(block, theta, z[0], p=p)
    if len(theta) not in (1, len(z)):
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (1, Q, k) or ({len(z)}, Q, k) is needed")
    values = block.f(z[:, None], theta[:, :, None])
    return torch.einsum("sqnd,snd->sq", values.expand(len(z), -1, -1, -1), p) / z.shape[1]


@checked
def first_variation_sup(
    block: BallBump, z: Float[Tensor, "S n d"], p: Float[Tensor, "S n d"], *, points: int = 101
) -> Float[Tensor, " S"]:
    """Compute ``sup_omega |(dE/drho)(1, omega)| = max_c sqrt(1 - |c|^2) |phi(c)|`` for `BallBump`, on a grid of c.

    Here ``phi(c) = (1/n) sum_i p_i exp(-|z_i - R c|^2 / 2)``; the best b is ``sqrt(1 - |c|^2) phi / |phi|``. It is zero
    exactly when every adjoint state is, if the states are distinct.

    Args:
        block: a `BallBump` with ``d <= 3``.
        z: states ``(S, n, d)``.
        p: adjoint states of the loss.
        points: of the grid in each coordinate of [-1, 1].

    Returns:
        ``(S,)``, a lower bound on the supremum that tends to it with `points`.

    Raises:
        TypeError, ValueError: another block, or too many dimensions for a grid.
    """
    if type(block) is not BallBump:
        raise TypeError(f"block is {type(block).__name__}; the supremum has this form for BallBump alone")
    if block.d > 3:
        raise ValueError(f"block has d = {block.d}; a grid of centres needs d <= 3")
    if not 2 <= points <= 10**4 or points**block.d > 10**8:
        raise ValueError(f"points is {points}; at least 2, and at most 10^8 in all of the grid, are needed")
    check_fit(block, z.new_zeros(1, block.k), z[0], p=p)
    axis = torch.linspace(-1, 1, points, dtype=z.dtype, device=z.device)
    c = torch.cartesian_prod(*[axis] * block.d).reshape(-1, block.d)
    room = (1 - c.square().sum(1)).clamp_min(0).sqrt()
    c, room = c[room > 0], room[room > 0]
    bumps = torch.exp(-0.5 * torch.cdist(z, (block.R * c).expand(len(z), -1, -1)).square())  # (S, n, Q)
    phi = torch.einsum("snq,snd->sqd", bumps, p) / z.shape[1]
    return (room * torch.linalg.vector_norm(phi, dim=-1)).amax(1)


@checked
def depth_regularity(
    theta: Float[Tensor, "S L M k"], weights: Float[Tensor, " M"] | None = None
) -> Float[Tensor, " S"]:
    """Compute ``R = max_l L sqrt(sum_m w_m |theta_{l+1,m} - theta_lm|^2)``, the Lipschitz constant in depth.

    Bounded as L grows, it is what an error of 1/L needs; for independent layers it grows like L.

    Args:
        theta: particles ``(S, L, M, k)``.
        weights: ``(M,)``, sum 1; None for ``1/M``.

    Returns:
        ``(S,)``; 0 for a single layer.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit.
    """
    S, L, M, _ = theta.shape
    if L == 1:
        return theta.new_zeros(S)
    share = theta.new_full((M,), 1 / M) if weights is None else weights.to(theta)
    return L * rigor.norm(rigor.norm(theta.diff(dim=1)) * share.sqrt()).amax(1)


# --- where the loss cannot go to zero ---------------------------------------------------------------------------------


@checked
def isotonic_floor(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Compute ``(1/2n) min { |y - q|^2 : q nondecreasing along x }``, a floor of the limit's loss on the line.

    For ``d = 1`` the trajectories of the limit keep their order, whatever the law (lesson 2). Pool adjacent violators;
    equal inputs have equal outputs.

    Args:
        x: inputs times the readout, ``v x_i``, ``(n,)``: with ``v < 0`` the outputs are in the opposite order.
        y: targets ``(n,)``.

    Returns:
        The floor, 0.0 when y is nondecreasing along x.

    Raises:
        TypeError, ValueError: x and y of different or no length, NaN or infinity.
    """
    levels, place = torch.unique(x, return_inverse=True)
    counts = torch.bincount(place, minlength=len(levels))
    means = torch.zeros(len(levels), dtype=y.dtype, device=y.device).index_add_(0, place, y) / counts
    pools: list[tuple[float, int, int]] = []  # mean, samples, levels
    for mean, many in zip(means.tolist(), counts.tolist(), strict=True):
        wide = 1
        while pools and pools[-1][0] > mean:
            before, m, w = pools.pop()
            mean, many, wide = (before * m + mean * many) / (m + many), m + many, wide + w
        pools.append((mean, many, wide))
    fitted = torch.tensor([mean for mean, _, wide in pools for _ in range(wide)], dtype=y.dtype, device=y.device)
    return float((y - fitted[place]).square().sum()) / (2 * len(x))


@checked
def crossing_ratio(block: Block, theta: Float[Tensor, "S L M k"]) -> Float[Tensor, " S"]:
    """Compute ``max_l (1/L) mean_m sup_z |d_z f(z, theta_lm)|``; below 1, no two states on the line can cross.

    For `BallBump` it is ``max_l mean_m |u_lm| / (sqrt(e) L)``. Above 1 the Euler steps may jump over one another, and
    the floor of the limit no longer binds.

    Args:
        block: the block; one whose constants are unbounded in z gives infinity.
        theta: particles ``(S, L, M, k)``.

    Returns:
        ``(S,)``.

    Raises:
        TypeError, ValueError: theta of another shape than the block's.
    """
    check_fit(block, theta, theta.new_zeros(1, block.d))
    return block.constants(theta).spread(theta).A.mean(-1).amax(-1) / theta.shape[1]


def warn_order(block: Block, X: Tensor, y: Tensor, v: Tensor, theta: Tensor | None) -> None:
    """Say that on the line the limit cannot reorder the inputs, with the floor and the ratio of `crossing_ratio`."""
    if X.shape[1] != 1 or float(v[0]) == 0:
        return
    floor = isotonic_floor(X[:, 0] * float(v[0]), y)
    if floor <= 1e-14 * float(y.square().mean()):
        return
    message = f"y is not monotone along x and d = 1: the limit keeps the order of the inputs and E >= {floor:.4g}"
    if theta is not None:
        ratio = float(crossing_ratio(block, theta).max())
        message += f"; so does this depth while max_l mean |d_z f| / L, here {ratio:.3g}, stays below 1"
    warnings.warn(message, stacklevel=4)  # of whoever called the function that was asked


# --- the audit --------------------------------------------------------------------------------------------------------


@checked
def audit(block: Block, **found: float) -> Certificate:
    """Compare a block with the hypotheses of the paper's theorems: yes, no, or not checkable, each with its reason.

    The answers are proved in lesson 2, on paper and for the blocks of this package alone: nothing is computed here, so
    that every line is `assumed`, and what nobody has proved is not shown. Convergence of the flow is a hypothesis too.
    It is never checkable from finitely many steps; the monitors that speak for or against it may be passed along.

    Args:
        block: the block; a subclass gives answers of its own or none.
        **found: monitors to print with it, such as ``u2=55.1, drift=1e-6, variation=4e-7``.

    Returns:
        A `Certificate`, which holds if every answer is "yes"; its quantities are the reasons, then the monitors.

    Raises:
        ValueError: what is no block.

    Source: lesson 2.
    """
    answers = block.hypotheses()
    rows = [Assumption(a.name, a.answer, "is", "yes", "assumed", a.answer == "yes") for a in answers]
    rows.append(assumed("the law converges as s grows"))
    reasons = []
    for words, answer in (("hypotheses fail", "no"), ("not checkable", "not checkable")):
        if names := [a.name for a in answers if a.answer == answer]:
            reasons.append(f"{words}: {', '.join(names)}")
    why = {a.name: a.why for a in answers}
    name = f"Hypotheses of the convergence theorem, {block.name}"
    return Certificate(name, not reasons, tuple(rows), why | found, "; ".join(reasons))
