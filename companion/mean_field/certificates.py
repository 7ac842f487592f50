"""Result 2, mean-field ResNets (Ding, Chen, Li and Wright 2021): a deep wide net as a scheme for a flow of laws.

``z_{l+1} = z_l + (1/L) sum_m w_m f(z_l, theta_lm)``, loss ``E = (1/2n) sum_i r_i^2`` with ``r_i = v.z_L^i - y_i``,
trained by ``theta <- theta - h (L / w_m) grad E``. As L and M grow this follows the flow of a law of parameters
(`limit_flow`, `fv_flow`). `coupling_bound` says how far a net of given size can be from it, `certify_zero_loss` proves
at any moment of training that the loss goes to zero from there, `isotonic_floor` that it cannot, and `audit` says which
hypotheses of the paper's theorems a block satisfies. Particles are ``theta (S, L, M, k)``: S networks, L layers, M
particles.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from companion.certificate import Assumption, Certificate, assumed, compare
from companion.mean_field import coupling
from companion.mean_field.blocks import (
    BallBump,
    Block,
    Constants,
)
from companion.mean_field.flow import (
    check_data,
    limit_flow,
    unit_weights,
)
from companion.mean_field.jacobian import SLACK, Centre, centre, local_ball, uniform_ball

_ROUNDS = 500  # of the search for the radius that one particle cannot leave


# --- what the flow is made of -----------------------------------------------------------------------------------------


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
    """
    values = block.f(z[:, None], theta[:, :, None])
    return torch.einsum("sqnd,snd->sq", values.expand(len(z), -1, -1, -1), p) / z.shape[1]


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
    if not isinstance(block, BallBump):
        raise TypeError(f"block is {type(block).__name__}; the supremum has this form for BallBump alone")
    if block.d > 3:
        raise ValueError(f"block has d = {block.d}; a grid of centres needs d <= 3")
    axis = torch.linspace(-1, 1, points, dtype=z.dtype, device=z.device)
    c = torch.cartesian_prod(*[axis] * block.d).reshape(-1, block.d)
    room = (1 - c.square().sum(1)).clamp_min(0).sqrt()
    c, room = c[room > 0], room[room > 0]
    bumps = torch.exp(-0.5 * torch.cdist(z, (block.R * c).expand(len(z), -1, -1)).square())  # (S, n, Q)
    phi = torch.einsum("snq,snd->sqd", bumps, p) / z.shape[1]
    return (room * torch.linalg.vector_norm(phi, dim=-1)).amax(1)


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
    """
    S, L, M, _ = theta.shape
    if L == 1:
        return theta.new_zeros(S)
    share = theta.new_full((M,), 1 / M) if weights is None else weights
    return L * (theta.diff(dim=1).square().sum(-1) @ share).sqrt().amax(1)


# --- where the loss cannot go to zero ---------------------------------------------------------------------------------


def isotonic_floor(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Compute ``(1/2n) min { |y - q|^2 : q nondecreasing along x }``, a floor of the limit's loss on the line.

    For ``d = 1`` and ``g(z) = z`` the trajectories of the limit keep their order, whatever the law (lesson 2). Pool
    adjacent violators; equal inputs have equal outputs.

    Args:
        x: inputs ``(n,)``.
        y: targets ``(n,)``.

    Returns:
        The floor, 0.0 when y is nondecreasing along x.

    Raises:
        ValueError: x and y of different or no length, NaN or infinity.
    """
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; both (n,), n >= 1, are needed")
    if not bool((torch.isfinite(x) & torch.isfinite(y)).all()):
        raise ValueError("x or y holds NaN or infinity; finite numbers are needed")
    levels, place = torch.unique(x, return_inverse=True)
    counts = torch.bincount(place, minlength=len(levels))
    means = torch.zeros(len(levels), dtype=y.dtype, device=y.device).index_add_(0, place, y) / counts
    pools: list[tuple[float, int, int]] = []  # mean, samples, levels
    for mean, count in zip(means.tolist(), counts.tolist(), strict=True):
        wide = 1
        while pools and pools[-1][0] > mean:
            before, m, w = pools.pop()
            mean, count, wide = (before * m + mean * count) / (m + count), m + count, wide + w
        pools.append((mean, count, wide))
    fitted = torch.tensor([mean for mean, _, wide in pools for _ in range(wide)], dtype=y.dtype, device=y.device)
    return float((y - fitted[place]).square().sum()) / (2 * len(x))


def crossing_ratio(block: Block, theta: Float[Tensor, "S L M k"]) -> Float[Tensor, " S"]:
    """Compute ``max_l (1/L) mean_m sup_z |d_z f(z, theta_lm)|``; below 1, no two states on the line can cross.

    For `BallBump` it is ``max_l mean_m |u_lm| / (sqrt(e) L)``. Above 1 the Euler steps may jump over one another, and
    the floor of the limit no longer binds.

    Args:
        block: the block; one whose constants are unbounded in z gives infinity.
        theta: particles ``(S, L, M, k)``.

    Returns:
        ``(S,)``.
    """
    return block.constants(theta).A.mean(-1).amax(-1) / theta.shape[1]


def _warn_order(block: Block, X: Tensor, y: Tensor, v: Tensor, theta: Tensor | None, stacklevel: int = 3) -> None:
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
    warnings.warn(message, stacklevel=stacklevel)


# --- the audit --------------------------------------------------------------------------------------------------------


def audit(block: Block, **found: float) -> Certificate:
    """Compare a block with the hypotheses of the paper's theorems: yes, no, or not checkable, each with its reason.

    Convergence of the flow is a hypothesis too. It is never checkable from finitely many steps, and always `assumed`;
    the monitors that speak for or against it may be passed along.

    Args:
        block: the block.
        **found: monitors to print with it, such as ``u2=55.1, drift=1e-6, variation=4e-7``.

    Returns:
        A `Certificate`, whose answers "yes" and "no" are proved in lesson 2; its quantities are the reasons, then the
        monitors.
    """
    rows, why = [], {}
    for name, answer, reason in block.hypotheses():
        if answer == "not checkable":
            rows.append(assumed(f"{name}: not checkable"))
        else:
            rows.append(Assumption(name, answer, "is", "yes", "exact", answer == "yes"))
        why[name] = reason
    rows.append(assumed("the law converges as s grows"))
    missing = [a.name for a in rows if not a.holds]
    reason = f"hypotheses fail: {', '.join(missing)}" if missing else ""
    name = f"Hypotheses of the convergence theorem, {block.name}"
    return Certificate(name, not missing, tuple(rows), why | found, reason)


# --- how far a finite net is from the limit ---------------------------------------------------------------------------


def _law_constants(
    block: Block, X: Tensor, v: Tensor, theta: Tensor, weights: Tensor, S: float, E_0: float
) -> tuple[Constants, str]:
    """Bounds that hold along both systems up to time S, as numbers, and where they come from; may be infinite."""
    found = block.constants()
    if coupling.finite(found):
        return found, "for all parameters"
    if isinstance(block, BallBump):
        u = theta[:, 0].abs()
        kappa = float(torch.linalg.vector_norm(v))
        U = coupling.growth_bound(float(u.max()), math.sqrt(float(u.square() @ weights)), S, E_0, kappa)
        return block.constants(radius=U), f"for |u| <= {U:.3g}"
    kappa, start = float(torch.linalg.vector_norm(v)), float(torch.linalg.vector_norm(X, dim=1).max())
    radius, reach = 0.0, start
    for _ in range(_ROUNDS):
        found = _largest(block.constants(theta, radius, reach))
        moved = S * found.B * kappa * coupling.exp(found.A) * math.sqrt(2 * E_0)
        far = start + found.F
        if not max(moved, far) < 1e60:  # powers of it are still floats
            break
        if moved <= radius and far <= reach:
            return found, f"within {radius:.3g} of the initial particles"
        radius, reach = max(radius, moved * (1 + 1e-6)), max(reach, far * (1 + 1e-6))
    return Constants(*[math.inf] * 7), "nowhere: no radius found that no particle can leave"


def _largest(c: Constants) -> Constants:
    return Constants(*(float(value.max()) for value in vars(c).values()))


def coupling_bound(
    block: Block,
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    theta: Float[Tensor, "M k"],
    weights: Float[Tensor, " M"],
    *,
    S: float,
    step: float,
    L: int,
    M: int,
    depth: str = "constant",
    regularity: float = 0.0,
    epsilon: float | None = None,
    eta: float = 0.1,
) -> Certificate:
    """Bound ``E |E_LM - E_rho| <= rbar delta + delta^2 / 2`` after training time S, and the sizes for an error epsilon.

    The law is given by weighted particles. Its flow (gradient descent of the same step, infinitely deep and wide) gives
    ``rbar``; the recursion of `companion.coupling` does the rest.

    Args:
        block: the block.
        X: inputs ``(n, d)``.
        y: targets ``(n,)``.
        v: the readout.
        theta: particles of the law ``(m, k)``, from a quadrature rule.
        weights: ``(m,)``, sum 1.
        S: training time.
        step: h of gradient descent.
        L: depth of the net.
        M: width of the net.
        depth: ``"constant"`` (one draw for all depths), ``"process"`` (a curve in depth, with its `regularity`), or
            ``"iid"`` (a draw for every layer).
        regularity: mean-square Lipschitz constant in depth of the initial particles, for ``"process"``.
        epsilon: error of the loss for which sizes are wanted; None for no sizes.
        eta: the probability of failure for those sizes.

    Returns:
        A `Certificate`, which holds when the bound is below the initial loss. ``quantities``: ``bound`` and
        ``bound_closed`` (without training, for constant depth), ``D``, ``D_closed`` (root-mean-square distance of
        coupled particles), ``delta``, ``exponent``, ``E_0``, ``E_S``, the constants A and B, and ``L_needed``,
        ``M_needed`` with ``P(|E_LM - E_rho| <= epsilon) >= 1 - eta``.

    Warns:
        UserWarning: ``d = 1`` and y not monotone along x.

    Raises:
        TypeError, ValueError: bad data, weights not summing to 1, or a number out of range.

    Source: the coupling theorem, derived in lesson 2.
    """
    check_data(X, y, v)
    weights = unit_weights(weights, len(theta))
    if depth not in ("constant", "process", "iid"):
        raise ValueError(f"depth is {depth!r}; 'constant', 'process' or 'iid' is needed")
    if not (S > 0 and step > 0 and regularity >= 0 and math.isfinite(S + step + regularity)) or min(L, M) < 1:
        found = f"{S}, {step}, {regularity}, {L}, {M}"
        raise ValueError(f"S, step, regularity, L, M are {found}; positive finite numbers are needed")
    if epsilon is not None and not (epsilon > 0 and 0 < eta < 1):
        raise ValueError(f"epsilon and eta are {epsilon} and {eta}; epsilon > 0 and 0 < eta < 1 are needed")
    _warn_order(block, X, y, v, None)
    steps = max(1, round(S / step))
    h = S / steps
    flow = limit_flow(block, X, y, v, theta, weights, times=[h * j for j in range(steps + 1)], step=h, method="gd")
    kappa = float(torch.linalg.vector_norm(v))
    rbar, E_0, E_S = (2 * flow.loss).sqrt().tolist(), float(flow.loss[0]), float(flow.loss[-1])
    c, where = _law_constants(block, X, v, theta, weights, S, E_0)
    options = {"R": regularity, "draw": "iid" if depth == "iid" else "constant", "kappa": kappa}
    end = coupling.stepwise(c, rbar, h, L, M, **options)
    bound = end.loss(rbar[-1], kappa)
    values = {"bound": bound, "D": end.D, "delta": end.delta, "E_0": E_0, "E_S": E_S, "A": c.A, "B": c.B}
    if depth == "constant":
        closed, values["exponent"] = coupling.closed_form(c, max(rbar), S, L, M, kappa=kappa)
        values |= {"bound_closed": closed.loss(rbar[-1], kappa), "D_closed": closed.D}
    if epsilon is not None and coupling.finite(c):
        values |= _sizes(c, rbar, h, epsilon, eta, options)
    rows = [
        compare(f"constants of the block {where}", c.B, "<", math.inf),
        assumed("particles drawn independently from the law, equal weights"),
        assumed("the quadrature of the law, its depth and the step in s are exact"),
        compare("bound on E |E_LM - E_ρ|, against E₀", bound, "<", E_0),
    ]
    if where != "for all parameters":
        rows.insert(2, assumed("steps small enough for the energy identity of the flow"))
        if float(block.f(X[:, None], theta[None]).abs().max()) > 0:
            rows.insert(2, assumed("the finite net starts with a loss of at most E₀"))
    holds = all(a.holds for a in rows)
    reason = "" if holds else f"vacuous: the bound {bound:.3g} is not below E_0 = {E_0:.3g}"
    if not coupling.finite(c):
        reason = "radius_diverged: no bound on the parameters up to time S"
    return Certificate("Coupling theorem", holds, tuple(rows), values, reason)


def _sizes(
    c: Constants, rbar: list[float], h: float, epsilon: float, eta: float, options: dict
) -> dict[str, float | int]:
    try:
        found = coupling.sizes(c, rbar, h, epsilon, eta, **options)
    except OverflowError:
        return {}
    # whole numbers where they can be counted
    return {name: n if n < 2**53 else float(n) for name, n in (("L_needed", found.L), ("M_needed", found.M))}


# --- zero loss, proved at one moment of training ----------------------------------------------------------------------


def _distinct(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """Indices of the distinct inputs, how often each occurs, and the first equal pair with different targets."""
    first: dict[tuple[float, ...], int] = {}
    counts: dict[int, int] = {}
    for i, x in enumerate(X.tolist()):
        j = first.setdefault(tuple(a + 0.0 for a in x), i)
        if float(y[j]) != float(y[i]):
            return torch.tensor([]), torch.tensor([]), (j, i)
        counts[j] = counts.get(j, 0) + 1
    return torch.tensor(list(counts)), torch.tensor(list(counts.values())), None


def certify_zero_loss(
    block: Block,
    theta: Float[Tensor, "*S L M k"],
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    *,
    step: float | None = None,
    weights: Float[Tensor, " M"] | None = None,
    constants: str = "uniform",
    level: str = "measured",
) -> Certificate:
    """From these particles on, gradient descent brings the loss to zero: ``E_j <= (1 - h lambda / 4n)^j E_0``.

    Shown when ``8 Lambda |r| < lambda = lambda_min(K)`` and ``h <= n / (beta^2 + Lambda |r|)``; for the flow (`step`
    None) when ``4 Lambda |r| < lambda``, and then ``E <= E_0 e^{-lambda s / 2n}``. The constants hold within a radius
    ``R_s`` that no particle can leave, found as a fixed point. Applicable at any time of training; the index 0 means
    "at these particles".

    Args:
        block: the block.
        theta: particles ``(L, M, k)`` or ``(S, L, M, k)``, float64.
        X: inputs ``(n, d)``; equal inputs with equal targets are merged.
        y: targets ``(n,)``.
        v: the readout.
        step: h of gradient descent on the rescaled gradient; None for the flow.
        weights: ``(M,)``, sum 1; None for ``1/M``.
        constants: ``"uniform"``, the block's constants alone; ``"local"``, the propagators and derivatives of this net
            and how far they can move, which shows more and costs ``L^2`` products of ``d x d`` matrices.
        level: ``"measured"``, or ``"certified"``: states, adjoints and the Jacobian in interval arithmetic, every
            conversion rounded outward. The theorem is then one about gradient descent in exact arithmetic from these
            stored numbers.

    Returns:
        A `Certificate`; for an ensemble that of the first network that is not shown (else of the first), and all in
        ``members``. Reasons: ``duplicate_inputs (i,j)``, ``kernel_singular``, ``radius_diverged``,
        ``residual_too_large``, ``step_too_large``. ``quantities``: ``lambda``, ``Lambda``, ``ratio`` (8 or 4 times
        ``Lambda |r| / lambda``), ``rate`` (per step, or per unit of s), ``movement`` (bounds ``||Theta - Theta_0||_*``
        for ever), ``R_s``, ``h_max``, ``beta``, ``E_0``, ``residual``.

    Warns:
        UserWarning: ``d = 1`` and y not monotone along x.

    Raises:
        TypeError, ValueError: bad data (NaN, float32, wrong shapes), weights not summing to 1, a step that is not
            positive, an unknown level or choice of constants; ``"certified"`` for a block without interval formulas or
            a net too large.

    Source: the theorem on zero loss at finite size, derived in lesson 2.
    """
    theta = _checked(block, theta, X, y, v, step, weights, level)
    if constants not in ("uniform", "local"):
        raise ValueError(f"constants is {constants!r}; 'uniform' or 'local' is needed")
    kept, counts, clash = _distinct(X, y)
    if clash is not None:
        row = Assumption("equal inputs have equal targets", False, "is", True, "exact", False)
        return Certificate(_name(step), False, (row,), {}, f"duplicate_inputs ({clash[0]},{clash[1]})")
    _warn_order(block, X, y, v, theta)
    kappa = float(torch.linalg.vector_norm(v)) * (1 + (SLACK if level == "certified" else 0))
    made, options = [], {"local": constants == "local", "certified": level == "certified"}
    for net in theta:
        at = centre(block, net, X[kept], y[kept], v, counts=counts, weights=weights, **options)
        made.append(_certificate(block, net, at, len(X), kappa, step, weights, **options))
    if len(made) == 1:
        return made[0]
    front = next((c for c in made if not c.holds), made[0])
    return Certificate(front.theorem, front.holds, front.assumptions, front.quantities, front.reason, tuple(made))


def _name(step: float | None) -> str:
    return f"Zero loss at this size, {'flow' if step is None else 'gradient descent'}"


def _checked(
    block: Block, theta: Tensor, X: Tensor, y: Tensor, v: Tensor, step: float | None, weights: Tensor | None, level: str
) -> Tensor:
    """The particles as (S, L, M, k), or one clear sentence about what is wrong."""
    check_data(X, y, v)
    if level not in ("measured", "certified"):
        raise ValueError(f"level is {level!r}; 'measured' or 'certified' is needed")
    if step is not None and not (isinstance(step, float | int) and math.isfinite(step) and step > 0):
        raise ValueError(f"step is {step!r}; a positive finite number, or None for the flow, is needed")
    if not isinstance(theta, Tensor) or theta.dtype != torch.float64:
        found = theta.dtype if isinstance(theta, Tensor) else type(theta).__name__
        raise TypeError(f"theta is {found}; a certificate needs a float64 tensor (S, L, M, k)")
    theta = theta[None] if theta.ndim == 3 else theta
    if theta.ndim != 4 or theta.shape[3] != block.k or theta.numel() == 0 or X.shape[1] != block.d:
        raise ValueError(
            f"theta and X have shapes {tuple(theta.shape)} and {tuple(X.shape)}; (S, L, M, {block.k}) and "
            f"(n, {block.d}) are needed"
        )
    if not bool(torch.isfinite(theta).all()):
        raise ValueError("theta holds NaN or infinity; finite numbers are needed")
    if weights is not None:
        unit_weights(weights, theta.shape[2])
    return theta


def _certificate(
    block: Block,
    theta: Tensor,
    at: Centre,
    n: int,
    kappa: float,
    step: float | None,
    weights: Tensor | None,
    local: bool,
    certified: bool,
) -> Certificate:
    """The rows, the quantities and the reason for one network."""
    slack, factor, level = (
        SLACK if certified else 0.0,
        4 if step is None else 8,
        "certified" if certified else "measured",
    )
    up = 1 + slack
    values = {"lambda": at.lam, "E_0": at.r**2 / (2 * n), "residual": at.r}
    rows = [
        Assumption("inputs distinct, or merged with equal targets", True, "is", True, "exact", True),
        compare("λ = λ_min(K)", at.lam, ">", 0.0, level),
    ]
    if not rows[-1].holds:
        return Certificate(_name(step), False, tuple(rows), values, f"kernel_singular: λ = {at.lam:.3g}")
    search = local_ball if local else uniform_ball
    ball = search(block, theta, at, n, kappa, factor=factor, weights=weights, slack=slack)
    rows.append(compare("R_s, which no particle can leave", ball.radius, "<", math.inf, level))
    if not rows[-1].holds:
        reason = "radius_diverged: no radius found that no particle can leave"
        return Certificate(_name(step), False, tuple(rows), values, reason)
    beta = min(ball.beta, (math.sqrt(at.top) + math.sqrt(at.lam) / 2) * up)
    lead = factor * ball.Lambda * at.r * up
    h_max = n / (beta**2 + ball.Lambda * at.r) * (1 - slack)
    rows.append(compare(f"{factor} Λ|r|, against λ", lead, "<", at.lam, level))
    values |= {
        "Lambda": ball.Lambda,
        "ratio": lead / at.lam,
        "rate": (at.lam / (2 * n) if step is None else step * at.lam / (4 * n)) * (1 - slack),
        "movement": factor / 2 * at.r / math.sqrt(at.lam) * up,
        "R_s": ball.radius,
        "beta": beta,
    }
    if step is not None:
        rows.append(compare("h, against h_max", step, "<=", h_max, level))
        values["h_max"] = h_max
    rows.append(assumed("gradient descent in exact arithmetic" if step is not None else "the flow"))
    reason = ""
    if not lead < at.lam:
        reason = f"residual_too_large: {factor} Λ|r|/λ = {lead / at.lam:.3g}"
    elif step is not None and not step <= h_max:
        reason = f"step_too_large: h = {step:.3g}, h_max = {h_max:.3g}"
    return Certificate(_name(step), not reason, tuple(rows), values, reason)
