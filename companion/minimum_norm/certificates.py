"""Three certificates of the distance to the minimum-norm solution, and what the first says about functions.

`certify_width` asks the kernel alone, `certify` the initial weights, `certify_after` any later ones; the last two are
the counting argument of `companion.minimum_norm.gates`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, kernels, rigor
from companion.certificate import Assumption, Certificate, assumed, compare
from companion.minimum_norm import first_layer, gates
from companion.minimum_norm.gates import SLACK, Loop, Problem, largest_eigenvalue
from companion.minimum_norm.kernel_limit import equal_norm
from companion.minimum_norm.solution import MinimumNorm, check_problem, check_steps, solve, warn_of_large_steps


def _prepare(
    X: Tensor, y: Tensor, W0: Tensor, signs: Tensor, W: Tensor, step: float | Tensor, reference: str, level: str
) -> tuple[Problem, Tensor, Tensor, Tensor, Certificate | None]:
    """The checked problem around W, targets, initial weights and signs, and a refusal if the kernel is singular."""
    if reference not in ("gate", "midpoint"):
        raise ValueError(f"reference is {reference!r}; 'gate' or 'midpoint' is needed")
    if level not in ("measured", "certified"):
        raise ValueError(f"level is {level!r}; 'measured' or 'certified' is needed")
    y, W0, signs = check_problem(X, y, W0, signs, precise=True, geometry=False)
    W = W[None] if isinstance(W, Tensor) and W.ndim == 2 else W
    if isinstance(W, Tensor) and W.shape != W0.shape:
        raise ValueError(f"W has shape {tuple(W.shape)}, W0 has {tuple(W0.shape)}; they must be equal")
    W, _ = first_layer.check_layer(X, W, signs)
    eta, certified = check_steps(step, len(W), X), level == "certified"
    found = data.degeneracies(X)
    bad = [*found.parallel_pairs, *(found.antipodal_pairs if found.antipodal_dependent else [])]
    bad = [(i, i) for i in found.zero_rows] + bad
    line = Assumption("directions of the inputs distinct", not bad, "is", True, "measured", not bad)
    refusal = None
    if bad:
        reason = f"kernel singular: inputs {bad[0][0]}, {bad[0][1]}"
        refusal = Certificate("Counting theorem", False, (line,), {}, reason)
    e = y - first_layer.forward(X, W, signs)
    norm_e = torch.linalg.vector_norm(e, dim=1)
    if certified:
        norm_e = norm_e * (1 + SLACK) + gates.output_error(X, W, e)
    problem = Problem(X, W, e, norm_e, eta, first_layer.empirical_gram(X, W), certified)
    if refusal is None:
        warn_of_large_steps(eta * largest_eigenvalue(problem.gram))
    return problem, y, W0, signs, refusal


def certify(
    X: Float[Tensor, "N d"],
    y: Tensor,
    W0: Tensor,
    signs: Tensor,
    *,
    step: float | Float[Tensor, " S"],
    reference: str = "midpoint",
    level: str = "measured",
) -> Certificate:
    """Before training: does the counting theorem hold, and how far from ``w*`` can gradient descent end?

    Args:
        X: inputs ``(N, d)``, float64.
        y: targets ``(N,)`` or ``(S, N)``.
        W0: initial weights ``(d, m)`` or ``(S, d, m)``.
        signs: ``(m,)`` or ``(S, m)``.
        step: eta.
        reference: ``"gate"`` (around ``G_0``) or ``"midpoint"`` (around a mean of two, which closes earlier).
        level: ``"measured"``, or ``"certified"`` with every rounding error bounded; the theorem is then one about
            gradient descent in exact arithmetic from these stored numbers.

    Returns:
        A `Certificate`; for an ensemble that of the first network that is not shown (else of the first), and all in
        ``members``. ``quantities``: ``rate`` (``||e_k|| <= (1 - rate)^k ||e_0||``), ``Q_star``, ``lambda``,
        ``epsilon``, ``perp`` (bounds ``sqrt(V_perp)`` at every k), ``parallel`` and ``distance`` (in the limit),
        ``movement`` (bounds ``||w_k - w_0||``), ``b`` (bounds ``||b_k||``), ``fragile`` (fraction of gates),
        ``e_0``, and ``trivial = ||w_0 - w*||``, the distance of not training at all.

    Raises:
        TypeError, ValueError: as `solve`, except that a singular kernel gives ``holds=False``.

    Source: the counting theorem and its midpoint variant, derived in lesson 4.
    """
    p, _, W0, _, refusal = _prepare(X, y, W0, signs, W0, step, reference, level)
    if refusal is not None:
        return refusal
    loop, lam0 = gates.close_loop(p, reference), p.smallest(p.gram)
    m, up, size = p.W.shape[2], 1 + (SLACK if p.certified else 0), gates.sizes(X, p.certified)
    reached = torch.where(loop.closed, loop.Q_star, torch.nan)
    beta = p.norm(size * loop.counts.both / m).sqrt() * up
    sets = loop.counts.both.diagonal(dim1=1, dim2=2)
    D = torch.linalg.vector_norm(gates.reach_of(X, p.certified) * reached[:, None] * sets / m, dim=1) * up
    perp, parallel = beta * reached * up, D / lam0.sqrt() * up
    alpha = torch.linalg.solve(p.gram, p.e[..., None])[..., 0] if bool((lam0 > 0).all()) else p.e * torch.inf
    norm_alpha = p.norm_e / lam0 if p.certified else torch.linalg.vector_norm(alpha, dim=1)
    values = _rates(p, loop) | {
        "perp": perp,
        "parallel": parallel,
        "distance": torch.hypot(perp, parallel) * up,
        "b": (1 + norm_alpha / reached) * D * up,
        "fragile": sets.double().mean(1) / m,
        "trivial": (p.e * alpha).sum(-1).clamp_min(0).sqrt(),
    }
    name = f"Counting theorem ({reference}), before training"
    return _assemble(name, p, loop, lam0, reference, values)


def certify_after(
    X: Float[Tensor, "N d"],
    y: Tensor,
    W0: Tensor,
    signs: Tensor,
    W: Tensor,
    *,
    step: float | Float[Tensor, " S"],
    reference: str = "midpoint",
    level: str = "measured",
    solution: MinimumNorm | None = None,
) -> Certificate:
    """After K steps: gradient descent from W converges, and ``| ||w_inf - w*|| - ||W - w*|| | <= ||X|| Q_star``.

    The same inequalities as in `certify`, around W instead of ``w_0``; ``w*`` still belongs to ``w_0``.

    Args:
        X: inputs ``(N, d)``, float64.
        y: targets.
        W0: initial weights.
        signs: signs.
        W: the weights reached, the shape of `W0`.
        step: eta.
        reference: as in `certify`.
        level: as in `certify`; the distance of W to ``w*`` itself stays measured.
        solution: what `solve` returned for `W0`, to save its repetition.

    Returns:
        A `Certificate` with ``rate``, ``Q_star``, ``lambda``, ``epsilon``, ``e_0`` (the residual at W), ``movement``
        (from W on), ``here = ||W - w*||``, and ``distance_low``, ``distance_high`` around ``||w_inf - w*||``.

    Raises:
        TypeError, ValueError: as `certify`.

    Source: the counting theorem (a), (b), (f), derived in lesson 4.
    """
    p, y, W0, signs, refusal = _prepare(X, y, W0, signs, W, step, reference, level)
    if refusal is not None:
        return refusal
    solution = solve(X, y, W0, signs) if solution is None else solution
    loop = gates.close_loop(p, reference)
    values = _rates(p, loop)
    here = torch.linalg.vector_norm(p.W - solution.W, dim=(1, 2))
    values |= {
        "here": here,
        "distance_low": (here - values["movement"]).clamp_min(0),
        "distance_high": here + values["movement"],
    }
    name = f"Counting theorem ({reference}), after training"
    return _assemble(name, p, loop, p.smallest(p.gram), reference, values)


def _rates(p: Problem, loop: Loop) -> dict[str, Tensor]:
    norm_X = rigor.spectral_norm_upper(p.X) if p.certified else float(torch.linalg.matrix_norm(p.X, 2))
    reached = torch.where(loop.closed, loop.Q_star, torch.nan)
    return {
        "lambda": loop.lam,
        "epsilon": loop.eps,
        "rate": p.eta * (loop.lam - loop.eps) * (1 - SLACK if p.certified else 1),
        "Q_star": reached,
        "movement": norm_X * reached * (1 + (SLACK if p.certified else 0)),
        "e_0": p.norm_e,
    }


def _assemble(
    name: str, p: Problem, loop: Loop, lam0: Tensor, reference: str, values: dict[str, Tensor]
) -> Certificate:
    """One certificate for each network, and the first that is not shown in front."""
    status, (S, d, m) = "certified" if p.certified else "measured", p.W.shape
    made = []
    for s in range(S):
        lam, eps = float(loop.lam[s]), float(loop.eps[s])
        rows = [
            Assumption("directions of the inputs distinct", True, "is", True, status if lam > 0 else "measured", True),
            compare("m d, against N", m * d, ">=", len(p.X), "exact"),
            compare("λ = λ_min(G₀)", float(lam0[s]), ">", 0.0, status),
        ]
        if reference == "midpoint":
            rows.append(compare("λ = λ_min of the midpoint Gram matrix", lam, ">", 0.0, status))
        product = float(p.eta[s] * loop.top[s]) * (1 + (SLACK if p.certified else 0))
        rows += [
            compare("η λ_max", product, "<=", 1.0, status),
            compare("ε (fragile gates), against λ", eps, "<", lam, status),
            compare("Q*, against Q", float(loop.Q_star[s]), "<=", float(loop.Q[s]), status),
            assumed("full-batch gradient descent in exact arithmetic"),
        ]
        holds = all(a.holds for a in rows)
        reason = ""
        if not holds and product > 1:
            reason = f"step too large: η λ_max = {product:.3g}"
        elif not holds and not float(lam0[s]) > 0:
            reason = f"kernel singular: λ = {float(lam0[s]):.3g}"
        elif not holds and not float(loop.first[s]) < 1:
            reason = f"too many fragile gates: ε/λ = {float(loop.first[s]):.3g}"
        elif not holds:
            reason = "no Q closes the loop"
        kept = {key: float(v[s]) for key, v in values.items() if holds or math.isfinite(float(v[s]))}
        made.append(Certificate(name, holds, tuple(rows), kept, reason))
    if S == 1:
        return made[0]
    front = next((c for c in made if not c.holds), made[0])
    return Certificate(front.theorem, front.holds, front.assumptions, front.quantities, front.reason, tuple(made))


def function_bound(
    solution: MinimumNorm, Z: Float[Tensor, "M d"], Q: Float[Tensor, " S"], residual: float | Tensor = 0.0
) -> Float[Tensor, "S M"]:
    """Bound ``|f(z, w_k) - f_L(z, w*)|`` at new inputs z.

    The bound is ``tau_z |S_z| / sqrt(m) + Q ||h_z|| + ||alpha_z|| (||e_k|| + D + Q ||M||)`` with
    ``h_{z,j} = |z.x_j| #{r in S_j: A_r(z) = 1} / m``, ``M_ij = |x_i.x_j| #{r in S_j: A_ri = 1} / m`` and ``alpha_z =
    G_0^-1 J_0 grad f_0(z)``.

    Args:
        solution: from `solve`.
        Z: new inputs ``(M, d)``.
        Q: ``Q_star`` of a certificate from `certify` that holds, for every network ``(S,)``.
        residual: ``||e_k||``; 0 bounds the limit.

    Returns:
        ``(S, M)``. Source: the theorem on functions, derived in lesson 4.
    """
    X, W, m = solution.X, solution.W0, solution.W0.shape[2]
    N, both = len(X), torch.cat([solution.X, Z])
    inner = both @ X.T  # (N + M, N)
    tau = torch.linalg.vector_norm(inner, dim=1) * Q[:, None] / math.sqrt(m)  # (S, N + M)
    near = torch.zeros(len(W), len(both), dtype=torch.int64, device=X.device)
    open_near, open_open = (torch.zeros(len(W), len(both), N, dtype=torch.int64, device=X.device) for _ in range(2))
    for _, P in first_layer.panels(both, W, first_layer.default_chunk(4 * len(W), len(both), m, X)):
        fragile, gate = (P.abs() <= tau[:, :, None]).to(torch.int8), (P > 0).to(torch.int8)
        near += fragile.sum(-1)
        first_layer.add_counts(open_near, gate, fragile[:, :N].contiguous())
        first_layer.add_counts(open_open, gate, gate[:, :N].contiguous())
    flips = inner.abs() * open_near / m
    D = torch.linalg.vector_norm((tau * near)[:, :N] / math.sqrt(m), dim=1)
    h, M = torch.linalg.vector_norm(flips[:, N:], dim=2), torch.linalg.matrix_norm(flips[:, :N], 2)
    alpha = torch.cholesky_solve((inner * open_open / m)[:, N:].mT.contiguous(), solution.factor)
    spread = torch.linalg.vector_norm(alpha, dim=1)
    rest = (torch.as_tensor(residual).to(X) + D + Q * M)[:, None]
    return (tau * near)[:, N:] / math.sqrt(m) + Q[:, None] * h + spread * rest


def certify_width(
    X: Float[Tensor, "N d"],
    y: Float[Tensor, " N"],
    m: int,
    *,
    step: float,
    kappa: float = 1.0,
    delta: float = 0.05,
    antisymmetric: bool = True,
) -> Certificate:
    """Before drawing the network: the explicit width ``sqrt(m) >= 51.1 n rho^2 ||X|| E / (kappa lambda_0^2)``.

    Then with probability ``1 - 3 delta`` (mirrored pairs: ``1 - 2 delta``) the residual is at most
    ``(1 - eta lambda_0 / 4)^k ||e_0||``, and the limit lies within
    ``31.7 sqrt(n) rho ||X||^(1/2) E^(3/2) / (kappa^(1/2) lambda_0^(3/2) m^(1/4))`` of ``w*``.

    Args:
        X: inputs ``(N, d)`` of equal norm rho.
        y: targets ``(N,)``.
        m: neurons.
        step: eta.
        kappa: standard deviation of the initial weights.
        delta: the probability of each of the three ways to fail.
        antisymmetric: mirrored pairs, ``E = ||y||``; else ``E^2 = (||y||^2 + n kappa^2 rho^2 / 2) / delta``.

    Returns:
        A `Certificate` with ``width`` (the smallest m), ``distance``, ``rate``, ``trivial`` (``sqrt(y.H^-1 y)``) and
        ``informative``, the m at which the bound falls below that.

    Raises:
        ValueError: inputs of unequal norm, or a number out of range.

    Source: the explicit width, derived in lesson 4.
    """
    data.check(X)
    rho, n = equal_norm(X), len(X)
    if not (0 < delta < 1 and kappa > 0 and m >= 1 and step > 0):
        raise ValueError(f"delta, kappa, m, step are {delta}, {kappa}, {m}, {step}; 0 < delta < 1, the rest positive")
    H, norm_X = kernels.relu_ntk(X), float(torch.linalg.matrix_norm(X, 2))
    lam0 = float(torch.linalg.eigvalsh(H)[0])
    E = float(torch.linalg.vector_norm(y))
    if not antisymmetric:
        E = math.sqrt((E**2 + n * (kappa * rho) ** 2 / 2) / delta)
    need = (51.1 * n * rho**2 * norm_X * E / (kappa * lam0**2)) ** 2
    constant = 31.7 * math.sqrt(n) * rho * math.sqrt(norm_X) * E**1.5 / (math.sqrt(kappa) * lam0**1.5)
    trivial = math.sqrt(float(y @ torch.linalg.solve(H, y)))
    rows = [
        compare("λ₀ = λ_min(H)", lam0, ">", 0.0),
        compare("η ‖X‖²", step * norm_X**2, "<=", 1 + 1e-12),
        compare("m", m, ">=", need),
        assumed(f"w_r ~ N(0, κ²I) independent, {'mirrored pairs' if antisymmetric else 'independent signs'}"),
        assumed(f"one of the draws of probability at least {1 - (2 if antisymmetric else 3) * delta:.3g}"),
    ]
    if antisymmetric:
        log = math.log(n / delta)
        rows.insert(3, compare("m/2", m / 2, ">=", 8 * norm_X**2 / lam0 * log))
        rows.insert(
            4, compare("1.59 √m ‖X‖ E/(κ λ₀)", 1.59 * math.sqrt(m) * norm_X * E / (kappa * lam0), ">=", 3 * log)
        )
    holds = all(a.holds for a in rows)
    values = {"width": need, "rate": step * lam0 / 4, "distance": constant * m**-0.25}
    values |= {"trivial": trivial, "informative": max(need, (constant / trivial) ** 4)}
    return Certificate(
        "Explicit width (formula)", holds, tuple(rows), values, "" if holds else f"m is below {need:.3g}"
    )
