"""Three certificates of the distance to the minimum-norm solution, and what the second says about functions.

`certify_width` asks the kernel alone, `certify` the initial weights, `certify_after` any later ones; the last two are
the counting argument of `companion.minimum_norm.gates`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, kernels, rigor
from companion.arguments import checked
from companion.certificate import Assumption, Certificate, assumed, compare, gather, show, silent
from companion.minimum_norm import first_layer, gates
from companion.minimum_norm.gates import ClosedLoop, Level, Problem, Reference, largest_eigenvalue, lower, upper
from companion.minimum_norm.kernel_limit import check_inputs, check_scale, equal_norm
from companion.minimum_norm.solution import (
    MinimumNorm,
    check_belongs,
    check_problem,
    check_steps,
    solve,
    warn_of_large_steps,
)
from companion.rigor.formulas import sqrt

_BEFORE, _AFTER = "Counting theorem ({}), before training", "Counting theorem ({}), after training"


@checked(double=True)
def certify(
    X: Float[Tensor, "N d"],
    y: Float[Tensor, "*targets"],
    W0: Float[Tensor, "... d m"],
    signs: Float[Tensor, "... m"],
    *,
    step: float | Float[Tensor, " S"],
    reference: Reference = "midpoint",
    level: Level = "measured",
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
            gradient descent in exact arithmetic from these stored numbers. (Where rounding leaves the sign of a
            pre-activation at ``w_0`` open, ``w*`` is that of the gates as computed.)

    Returns:
        A `Certificate`; for an ensemble that of the first network that is not shown (else of the one with the largest
        ``distance``), and all in ``members``. ``quantities``: ``rate`` (``||e_k|| <= (1 - rate)^k ||e_0||``),
        ``Q_star``, ``lambda``, ``epsilon``, ``perp`` (bounds ``sqrt(V_perp)`` at every k), ``parallel`` and
        ``distance`` (in the limit), ``movement`` (bounds ``||w_k - w_0||``), ``b`` (bounds ``||b_k||``), ``fragile``
        (fraction of gates), ``e_0``, and ``trivial = ||w_0 - w*||`` (certified: a lower bound), the distance of not
        training at all. A certificate that is not shown keeps ``e_0`` and ``trivial`` only.

    Raises:
        TypeError, ValueError: as `solve`, except that a singular kernel gives ``holds=False``.

    Source: the counting theorem and its midpoint variant, derived in lesson 4.
    """
    y, W0, signs = check_problem(X, y, W0, signs)
    refused = _same_directions(X, _BEFORE.format(reference))
    if refused is not None:
        return refused
    p = _problem(X, y, W0, signs, check_steps(step, len(W0), X), level)
    lam0, loop = p.smallest(p.gram), gates.close_loop(p, reference)
    known, sets = gates.solve_kernel(p, lam0), loop.counts.sizes.double()
    Q, limits = p.number(_reached(loop)), (p.reach, p.number(p.blur), sets, p.m)
    beta = p.number(p.norm(abs(p.inner) * loop.counts.both.double() / p.m))
    perp = sqrt(beta) * Q
    parallel = gates.kink_error(Q, *limits) / sqrt(p.number(lam0))
    values = _rates(p, loop) | {
        "perp": upper(perp),
        "parallel": upper(parallel),
        "distance": upper(gates.limit_distance(perp, parallel)),
        "b": upper(gates.kink_error(Q + known.norm, *limits)),
        "fragile": sets.mean(1) / W0.shape[2],
    }
    facts = {"e_0": p.norm_e, "trivial": lower(known.length - known.spread).clamp_min(0)}
    return _assemble(_BEFORE.format(reference), p, loop, {"λ = λ_min(G₀)": lam0}, values, facts)


@checked(double=True)
def certify_after(
    X: Float[Tensor, "N d"],
    y: Float[Tensor, "*targets"],
    W0: Float[Tensor, "... d m"],
    signs: Float[Tensor, "... m"],
    W: Float[Tensor, "... d m"],
    *,
    step: float | Float[Tensor, " S"],
    reference: Reference = "midpoint",
    level: Level = "measured",
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
        level: as in `certify`; ``||W - w*||`` is then enclosed too.
        solution: what `solve` returned for these data and initial weights, to save its repetition when measured.

    Returns:
        A `Certificate` with ``rate``, ``Q_star``, ``lambda``, ``epsilon``, ``e_0`` (the residual at W), ``movement``
        (from W on), ``here = ||W - w*||`` (certified: an upper bound), and ``distance_low``, ``distance_high`` around
        ``||w_inf - w*||``. A certificate that is not shown keeps ``e_0`` and ``here`` only.

    Raises:
        TypeError, ValueError: as `certify`; a `solution` of another problem.

    Source: the counting theorem (a), (b), (f), derived in lesson 4.
    """
    y, W0, signs = check_problem(X, y, W0, signs)
    W = W[None] if W.ndim == 2 else W
    if W.shape != W0.shape:
        raise ValueError(f"W has shape {tuple(W.shape)}, W0 has {tuple(W0.shape)}; they must be equal")
    check_scale("W", W, smallest=0.0)
    check_belongs(solution, X, y, W0, signs)
    refused = _same_directions(X, _AFTER.format(reference))
    if refused is not None:
        return refused
    eta = check_steps(step, len(W), X)
    p = _problem(X, y, W, signs, eta, level)
    loop = gates.close_loop(p, reference)
    if level == "measured":
        solution = solve(X, y, W0, signs) if solution is None else solution
        near = far = rigor.norm((W - solution.W).flatten(1))
        lam0 = p.smallest(solution.gram)
    else:
        start = Problem.of(X, y, W0, signs, eta, level)
        lam0 = start.smallest(start.gram)
        known = gates.solve_kernel(start, lam0)
        here = gates.enclosed_distance(start, signs, W, known.alpha)
        near, far = here - known.spread, here + known.spread
    values = _rates(p, loop)
    movement = p.number(values["movement"].nan_to_num(0.0))  # of a loop that is not closed, nothing is reported
    values |= {"distance_low": lower(near - movement).clamp_min(0), "distance_high": upper(far + movement)}
    facts = {"e_0": p.norm_e, "here": upper(far)}
    eigenvalues = {"λ = λ_min(G) at W": p.smallest(p.gram), "λ_min(G₀), so that w* exists": lam0}
    return _assemble(_AFTER.format(reference), p, loop, eigenvalues, values, facts)


def _problem(X: Tensor, y: Tensor, W: Tensor, signs: Tensor, eta: Tensor, level: Level) -> Problem:
    if level == "certified" and X.device.type != "cpu":
        raise ValueError(f"X is on {X.device}; level 'certified' needs the CPU, whose roundings are known")
    p = Problem.of(X, y, W, signs, eta, level)
    warn_of_large_steps(eta * largest_eigenvalue(upper(p.gram)), 5)
    return p


def _same_directions(X: Tensor, name: str) -> Certificate | None:
    """The refusal, if two inputs span one line so that the kernel is singular."""
    found = data.degeneracies(X)
    bad = [(i, i) for i in found.zero_rows] + found.parallel_pairs
    bad += found.antipodal_pairs if found.antipodal_dependent else []
    if not bad:
        return None
    line = Assumption("directions of the inputs distinct", False, "is", True, "measured", False)
    return silent(name, (line,), f"kernel singular: inputs {bad[0][0]}, {bad[0][1]}")


def _reached(loop: ClosedLoop) -> Tensor:
    """``Q_star`` where the loop closes, else 0: a number for formulas whose results are then left out."""
    return torch.where(loop.closed, loop.Q_star, 0.0)


def _rates(p: Problem, loop: ClosedLoop) -> dict[str, Tensor]:
    """What holds around any weights: bounds (a), (b) and (f)."""
    norm_X = rigor.spectral_norm_upper(p.X) if p.level == "certified" else float(rigor.spectral_norm(p.X))
    return {
        "lambda": loop.lam,
        "epsilon": loop.eps,
        "rate": lower(p.eta * (p.number(loop.lam) - p.number(loop.eps))),
        "Q_star": _reached(loop),
        "movement": upper(p.number(norm_X) * p.number(_reached(loop))),
    }


def _assemble(
    name: str,
    p: Problem,
    loop: ClosedLoop,
    eigenvalues: dict[str, Tensor],
    values: dict[str, Tensor],
    facts: dict[str, Tensor],
) -> Certificate:
    """One certificate for each network, gathered; one that is not shown keeps the facts only."""
    members, products = [], upper(p.eta * p.number(loop.top))
    for s in range(len(p.W)):
        found = {key: float(lam[s]) for key, lam in eigenvalues.items()}
        rows = _rows(p, loop, s, found, float(products[s]))
        reason = _reason(rows, loop, s, min(found.values()), float(products[s]))
        kept = {key: float(v[s]) for key, v in (facts if reason else values | facts).items()}
        kept = {key: value for key, value in kept.items() if not reason or math.isfinite(value)}
        members.append(Certificate(name, not reason, tuple(rows), kept, reason, says="" if reason else _says(kept)))
    return gather(members, lambda c: -c.quantities.get("distance", c.quantities["movement"]))


def _says(kept: dict[str, float]) -> str:
    """What was gained: the bound on the distance of the limit, beside that of not training."""
    if "here" in kept:
        low, high = show(kept["distance_low"], side="down"), show(kept["distance_high"], side="up")
        return f"the limit is {low} to {high} from w*"
    found = f"the limit is within {show(kept['distance'], side='up')} of w*, the start {show(kept['trivial'])} from it"
    return f"{found}: vacuous" if kept["distance"] >= kept["trivial"] > 0 else found


def _rows(p: Problem, loop: ClosedLoop, s: int, eigenvalues: dict[str, float], product: float) -> list[Assumption]:
    status, lam = p.level, float(loop.lam[s])
    distinct = status if min(eigenvalues.values()) > 0 else "measured"  # a positive eigenvalue proves it
    rows = [
        Assumption("directions of the inputs distinct", True, "is", True, distinct, True),
        compare("m d, against N", p.W.shape[1] * p.W.shape[2], ">=", len(p.X), "exact"),
        *(compare(name, value, ">", 0.0, status) for name, value in eigenvalues.items()),
    ]
    if loop.midpoint:
        rows.append(compare("λ = λ_min of the midpoint Gram matrix", lam, ">", 0.0, status))
    return [
        *rows,
        compare("η λ_max", product, "<=", 1.0, status),
        compare("ε (fragile gates), against λ", float(loop.eps[s]), "<", lam, status),
        compare("Q*, against Q", float(loop.Q_star[s]), "<=", float(loop.Q[s]), status),
        assumed("full-batch gradient descent in exact arithmetic"),
    ]


def _reason(rows: list[Assumption], loop: ClosedLoop, s: int, lam0: float, product: float) -> str:
    """Why the theorem is not shown, with the cheapest repair; empty if every row holds."""
    if all(row.holds for row in rows):
        return ""
    if product > 1:
        return f"step too large: η λ_max = {product:.3g}; safe_step(X) is small enough"
    if not lam0 > 0:
        return f"kernel singular: λ = {lam0:.3g}"
    if not float(loop.first[s]) < 1:
        return (
            f"too many fragile gates: ε/λ = {float(loop.first[s]):.3g}; certify_after may show it after more training"
        )
    return "no Q closes the loop: certify_after may show it after more training"


@checked(double=True)
def function_bound(
    solution: MinimumNorm,
    Z: Float[Tensor, "M d"],
    certificate: Certificate,
    residual: float | Float[Tensor, " S"] = 0.0,
) -> Float[Tensor, "S M"]:
    """Bound ``|f(z, w_k) - f_L(z, w*)|`` at new inputs z, in ordinary floating point.

    The bound is ``tau_z |S_z| / sqrt(m) + Q ||h_z|| + ||alpha_z|| (||e_k|| + D + Q ||M||)`` with
    ``h_{z,j} = |z.x_j| #{r in S_j: A_r(z) = 1} / m``, ``M_ij = |x_i.x_j| #{r in S_j: A_ri = 1} / m`` and ``alpha_z =
    G_0^-1 J_0 grad f_0(z)``.

    Args:
        solution: from `solve`.
        Z: new inputs ``(M, d)``.
        certificate: from `certify` for the same data and weights, and it holds.
        residual: ``||e_k||``, one number or ``(S,)``; 0 bounds the limit.

    Returns:
        ``(S, M)``.

    Raises:
        ValueError: a certificate that does not hold, of another theorem, or of another problem.

    Source: the theorem on functions, derived in lesson 4.
    """
    Q = _certified_path(certificate, solution)
    check_scale("Z", Z, smallest=0.0)
    k = torch.as_tensor(residual, dtype=Z.dtype, device=Z.device)
    if Z.shape[1] != solution.X.shape[1] or k.shape not in ((), Q.shape) or bool((k < 0).any()):
        found = f"Z has {Z.shape[1]} columns, residual is {k.tolist()}"
        raise ValueError(f"{found}; {solution.X.shape[1]} columns and norms, one or {len(Q)}, are needed")
    X, W, m = solution.X, solution.W0, solution.W0.shape[2]
    N, both = len(X), torch.cat([solution.X, Z])
    inner = both @ X.T  # (N + M, N)
    tau = rigor.norm(inner) * Q[:, None] / math.sqrt(m)  # (S, N + M)
    near = torch.zeros(len(W), len(both), dtype=torch.int64, device=X.device)
    open_near, open_open = (torch.zeros(len(W), len(both), N, dtype=torch.int64, device=X.device) for _ in range(2))
    for _, P in first_layer.panels(both, W, first_layer.chunk_size(4 * len(W), len(both), m, X)):
        fragile, gate = (P.abs() <= tau[:, :, None]).to(torch.int8), (P > 0).to(torch.int8)
        near += fragile.sum(-1)
        first_layer.add_counts(open_near, gate, fragile[:, :N].contiguous())
        first_layer.add_counts(open_open, gate, gate[:, :N].contiguous())
    flips, kinks = inner.abs() * open_near / m, tau * near / math.sqrt(m)
    D = rigor.norm(kinks[:, :N])
    h, M = rigor.norm(flips[:, N:]), rigor.spectral_norm(flips[:, :N])
    alpha = torch.cholesky_solve((inner * open_open / m)[:, N:].mT.contiguous(), solution.factor)
    spread = rigor.norm(alpha, 1)
    return kinks[:, N:] + Q[:, None] * h + spread * (k + D + Q * M)[:, None]


def _certified_path(certificate: Certificate, solution: MinimumNorm) -> Tensor:
    """``Q_star`` of every network ``(S,)``, from a certificate that is shown to be one of this solution."""
    members = certificate.members or (certificate,)
    if not all(
        m.theorem.startswith(_BEFORE.partition("(")[0]) and {"trivial", "e_0"} <= set(m.quantities) for m in members
    ):
        raise ValueError(f"certificate is one of {certificate.theorem!r}; one from certify is needed")
    if not certificate.holds:
        raise ValueError(f"certificate is not shown ({certificate.reason}); one that holds is needed")
    trivial = solution.norm2.new_tensor([m.quantities["trivial"] for m in members])
    if len(members) != len(solution.W0) or not torch.allclose(trivial, solution.norm2.sqrt(), rtol=1e-5, atol=0.0):
        raise ValueError("certificate and solution belong to different data or weights; the same ones are needed")
    return solution.norm2.new_tensor([m.quantities["Q_star"] for m in members])


@checked(double=True)
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
        A `Certificate` with ``width`` (the smallest m), ``distance``, ``rate``, ``trivial`` (``||w_0 - w*||`` as m
        grows: ``sqrt(y.H^-1 y)``, with independent signs ``sqrt(y.H^-1 y + kappa^2 trace(Sigma H^-1))``, Sigma the
        ReLU kernel) and ``informative``, the m at which the bound falls below that. Numbers are measured.

    Raises:
        ValueError: inputs of unequal norm, or a number out of range.

    Source: the explicit width, derived in lesson 4.
    """
    check_inputs(X)
    check_scale("y", y)
    rho, n = equal_norm(X), len(X)
    sizes = min(kappa, step) >= 1e-100 and max(kappa, step, m) <= 1e100
    if not (0 < delta < 1 and m >= 1 and sizes and not (antisymmetric and m % 2)):
        needed = "0 < delta < 1, the rest positive (1e-100 to 1e+100), and an even m for mirrored pairs are needed"
        raise ValueError(f"delta, kappa, m, step are {delta}, {kappa}, {m}, {step}; {needed}")
    H, norm_X = kernels.relu_ntk(X), float(rigor.spectral_norm(X))
    lam0, E = float(torch.linalg.eigvalsh(H)[0]), float(rigor.norm(y))
    if not lam0 > 0:
        row = compare("λ₀ = λ_min(H)", lam0, ">", 0.0)
        return silent("Explicit width (formula)", (row,), f"kernel singular: λ₀ = {lam0:.3g}")
    E = E if antisymmetric else math.sqrt((E**2 + n * (kappa * rho) ** 2 / 2) / delta)
    need, constant = _explicit_width(n, rho, norm_X, E, kappa, lam0)
    start = float(y @ torch.linalg.solve(H, y))
    if not antisymmetric:  # the mean of what a random f_0 adds
        start += kappa**2 * float(torch.linalg.solve(H, kernels.relu_kernel(X)).trace())
    trivial = math.sqrt(max(0.0, start))
    log, chance = math.log(n / delta), 1 - (2 if antisymmetric else 3) * delta
    rows = [
        compare("λ₀ = λ_min(H)", lam0, ">", 0.0),
        compare("η ‖X‖²", step * norm_X**2, "<=", 1 + 4 * rigor.UNIT),  # safe_step and this line round three times
        compare("m", m, ">=", need),
        assumed(f"w_r ~ N(0, κ²I) independent, {'mirrored pairs' if antisymmetric else 'independent signs'}"),
        assumed(f"one of the draws of probability at least {chance:.3g}"),
    ]
    if antisymmetric:  # for independent signs the width implies both
        gate = 1.59 * math.sqrt(m) * norm_X * E / (kappa * lam0)
        rows.insert(3, compare("m/2", m / 2, ">=", 8 * norm_X**2 / lam0 * log))
        rows.insert(4, compare("1.59 √m ‖X‖ E/(κ λ₀)", gate, ">=", 3 * log))
    distance = constant * m**-0.25
    values = {"width": need, "rate": step * lam0 / 4, "distance": distance, "trivial": trivial}
    ratio = constant / trivial if trivial else 0.0
    values["informative"] = max(need, ratio * ratio * ratio * ratio)
    failed = next((row for row in rows if not row.holds), None)
    if failed is None:
        return Certificate("Explicit width (formula)", True, tuple(rows), values, says=_says(values))
    reason = f"m is below {show(need, side='up')}" if failed.name == "m" else f"{failed.name} is {failed.measured:.3g}"
    kept = {key: values[key] for key in ("width", "trivial", "informative")}
    return Certificate("Explicit width (formula)", False, tuple(rows), kept, reason)


def _explicit_width(n: int, rho: float, norm_X: float, E: float, kappa: float, lam0: float) -> tuple[float, float]:
    """The smallest m, and the constant of the bound ``constant m^(-1/4)``, in an order that does not overflow early."""
    root = 51.1 * n * (rho / lam0) * (rho / lam0) * norm_X * (E / kappa)
    return root * root, 31.7 * math.sqrt(n) * (rho / lam0) * math.sqrt(norm_X / lam0) * math.sqrt(E / kappa) * E
