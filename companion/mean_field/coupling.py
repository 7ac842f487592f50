"""How far a finite ResNet may be from its limit: the numbers of the coupling theorem.

A finite net and the limit start from the same draws; D is the largest root-mean-square distance of a particle from the
particle that moves in the limit field, delta and q those of the states and of the unit adjoint states, R the
mean-square Lipschitz constant of the particles in depth. With the block's constants, ``rbar = sqrt(2 E)`` along the
limit, and ``nu = M^-1/2`` (one draw for all depths) or ``(L M)^-1/2`` (a draw for every layer)::

    delta = phi (B D + F nu + (A F + B R) / 2L)
    q     = chi (H_zz delta + H_zt D + A_F nu + (A^2 + H_zz F + H_zt R) / 2L)
    D'    = kappa^2 B e^A delta + kappa rbar (B (q + A e^A / L) + e^A (H_zt delta + H_tt D))
    R'    = kappa rbar e^A (H_tt R + H_zt F + A B)

where the output is ``v.z`` with ``|v| = kappa``, and ``phi, chi = (e^A - 1) / A, e^A`` for one draw for all depths,
``e^A, e^2A`` for a draw in every layer. Forward differences of step h bound gradient descent with that step against the
limit of gradient descent with that step. All is linear in nu and in 1/L, so that the sizes needed for a given error
have closed forms. Derived in lesson 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from companion import rigor
from companion.arguments import checked
from companion.certificate import Certificate, assumed, compare, show, silent
from companion.mean_field.blocks import BallBump, Block, Constants, check_fit, check_positive
from companion.mean_field.flow import limit_flow
from companion.mean_field.hypotheses import warn_order

_NAME = "Coupling theorem"
_ROUNDS = 500  # of the search for the radius that one particle cannot leave
_MOST_STEPS = 10**6


class Coupling(NamedTuple):
    """The bounds after training: distance of particles, states, adjoint states, Lipschitz constant in depth."""

    D: float
    delta: float
    q: float
    R: float

    def loss(self, rbar: float, kappa: float = 1.0) -> float:
        """The bound on the expected difference of the losses, ``rbar kappa delta + (kappa delta)^2 / 2``."""
        return (rbar + kappa * self.delta / 2) * kappa * self.delta


class Sizes(NamedTuple):
    """Sizes that suffice for ``P(|E_LM - E_rho| <= epsilon) >= 1 - eta``, and the two parts of epsilon."""

    L: int
    M: int
    depth_part: float
    width_part: float


def _propagators(A: float, draw: str) -> tuple[float, float]:
    if draw == "iid":
        return _exp(A), _exp(2 * A)
    return (_expm1(A) / A if A > 0 else 1.0), _exp(A)


def _noise(L: float | int, M: float | int, draw: str) -> float:
    if math.isinf(M):
        return 0.0
    return 1 / math.sqrt(M * L) if draw == "iid" and math.isfinite(L) else 1 / math.sqrt(M)


def _states(c: Constants, D: float, R: float, nu: float, over_L: float, draw: str) -> tuple[float, float]:
    phi, chi = _propagators(c.A, draw)
    delta = phi * (c.B * D + c.F * nu + (c.A * c.F + c.B * R) / 2 * over_L)
    bend = (c.A**2 + c.H_zz * c.F + c.H_ztheta * R) / 2 * over_L
    return delta, chi * (c.H_zz * delta + c.H_ztheta * D + c.A_F * nu + bend)


def _run(
    c: Constants, rbar: Sequence[float], h: float, nu: float, over_L: float, R: float, draw: str, kappa: float
) -> list[Coupling]:
    """The recursion from every step to the next; ``len(rbar)`` states, `rbar` at steps 0, 1, ..."""
    D, eA, made = 0.0, _exp(c.A), []
    for j, r in enumerate(rbar):
        delta, q = _states(c, D, R, nu, over_L, draw)
        made.append(Coupling(D, delta, q, R))
        if j + 1 < len(rbar):
            field = c.B * (q + c.A * eA * over_L) + eA * (c.H_ztheta * delta + c.H_thetatheta * D)
            D += h * kappa * (kappa * c.B * eA * delta + r * field)
            R += h * kappa * r * eA * (c.H_thetatheta * R + c.H_ztheta * c.F + c.A * c.B)
    return made


def stepwise(
    c: Constants,
    rbar: Sequence[float],
    h: float,
    L: float | int,
    M: float | int,
    *,
    R: float = 0.0,
    draw: str = "constant",
    kappa: float = 1.0,
) -> Coupling:
    """The recursion of the coupling theorem along ``len(rbar) - 1`` steps of size h.

    Args:
        c: the block's constants.
        rbar: ``sqrt(2 E)`` of the limit at steps 0, 1, ..., the last included.
        h: the step.
        L: depth, may be infinite.
        M: width, may be infinite.
        R: Lipschitz constant in depth of the initial particles.
        draw: ``"constant"`` (one draw for all depths; also a process in depth, with its R) or ``"iid"``.
        kappa: norm of the readout.

    Returns:
        The bounds after the last step.
    """
    return _run(c, rbar, h, _noise(L, M, draw), 1 / L, R, draw, kappa)[-1]


def closed_form(
    c: Constants, rbar_0: float, S: float, L: float | int, M: float | int, *, kappa: float = 1.0
) -> tuple[Coupling, float]:
    """The bound that needs no training: ``D(S) <= (N_M / sqrt(M) + N_L / L) (e^{K S} - 1) / K``.

    For one draw for all depths, ``R(0) = 0``, and a loss of the limit that does not rise above ``rbar_0^2 / 2``.

    Args:
        c: the block's constants.
        rbar_0: ``sqrt(2 E)`` of the limit at the start.
        S: training time.
        L: depth.
        M: width.
        kappa: norm of the readout.

    Returns:
        The bounds at S, and the exponent K.
    """
    A, B, eA, (phi, _) = c.A, c.B, _exp(c.A), _propagators(c.A, "constant")
    r, eA2 = kappa * rbar_0, kappa**2 * B * eA
    growth = _expm1(r * eA * c.H_thetatheta * S) / c.H_thetatheta if c.H_thetatheta > 0 else r * eA * S
    R = growth * (c.H_ztheta * c.F + A * B)
    bend, turn = (A * c.F + B * R) / 2, (A**2 + c.H_zz * c.F + c.H_ztheta * R) / 2
    inner = B * (c.H_zz * phi * B + c.H_ztheta) + c.H_ztheta * phi * B + c.H_thetatheta
    K = eA2 * B * phi + r * eA * inner
    N_M = eA2 * phi * c.F + r * eA * (B * (c.H_zz * phi * c.F + c.A_F) + c.H_ztheta * phi * c.F)
    N_L = eA2 * phi * bend + r * eA * (B * (c.H_zz * phi * bend + turn) + A * B + c.H_ztheta * phi * bend)
    nu, over_L = _noise(L, M, "constant"), 1 / L
    D = (N_M * nu + N_L * over_L) * (_expm1(K * S) / K if K > 0 else S)
    delta, q = _states(c, D, R, nu, over_L, "constant")
    return Coupling(D, delta, q, R), K


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf


def _root(r: float, part: float) -> float:
    """The positive a with ``r a + a^2 / 2 = part``."""
    return 2 * part / (r + math.sqrt(r * r + 2 * part))


def sizes(
    c: Constants,
    rbar: Sequence[float],
    h: float,
    epsilon: float,
    eta: float,
    *,
    R: float = 0.0,
    draw: str = "constant",
    kappa: float = 1.0,
) -> Sizes:
    """Depth and width that suffice for ``P(|E_LM - E_rho| <= epsilon) >= 1 - eta``, by the theorem used twice.

    The net of depth L and infinite width is within ``rbar delta_L + delta_L^2 / 2 <= epsilon / 2`` of the limit, which
    is deterministic; the finite net is within epsilon / 2 of that one outside an event of probability eta (Chebyshev).

    Args:
        c: the block's constants.
        rbar: as in `stepwise`.
        h: the step.
        epsilon: the error of the loss.
        eta: the probability of failure.
        R: as in `stepwise`.
        draw: as in `stepwise`.
        kappa: as in `stepwise`.

    Returns:
        `Sizes`: ``L ~ 1 / epsilon``, ``M ~ 1 / (epsilon^2 eta)`` (``L M`` of that order for a draw in every layer).
    """
    deep = [kappa * d.delta for d in _run(c, rbar, h, 0.0, 1.0, R, draw, kappa)]  # linear in 1/L
    L = _ceil(deep[-1] / _root(rbar[-1], epsilon / 2))
    shifted = [r + d / L for r, d in zip(rbar, deep, strict=True)]
    wide = kappa * _run(c, shifted, h, 1.0, 0.0, 0.0, draw, kappa)[-1].delta  # linear in nu
    need = (wide / _root(shifted[-1], epsilon / 2)) ** 2 / eta
    M = _ceil(need / L if draw == "iid" else need)
    return Sizes(L, M, (rbar[-1] + deep[-1] / L / 2) * deep[-1] / L, epsilon / 2)


def _ceil(x: float) -> int:
    if not math.isfinite(x):
        raise OverflowError("constants are too large: the sizes needed are not finite floats")
    return max(1, math.ceil(x))


def growth_bound(U_0: float, rms_0: float, S: float, E_0: float, kappa: float = 1.0) -> float:
    """How large ``|u|`` of `BallBump` can become: ``U_0 + S kappa sqrt(2 E_0) _exp(e^{-1/2} (rms_0 + sqrt(S E_0)))``.

    The energy bounds the mean square of u, hence ``int |d_z f|``, hence the adjoint states, hence the speed of every u.

    Args:
        U_0: the largest initial ``|u|``.
        rms_0: the root mean square of the initial u.
        S: training time.
        E_0: initial loss.
        kappa: norm of the readout.

    Returns:
        The bound, for the flow. Source: derived in lesson 2.
    """
    return U_0 + S * kappa * math.sqrt(2 * E_0) * _exp(math.exp(-0.5) * (rms_0 + math.sqrt(S * E_0)))


# --- the certificate --------------------------------------------------------------------------------------------------


def _law_constants(
    block: Block, X: Tensor, kappa: float, theta: Tensor, weights: Tensor, S: float, E_0: float, support: float
) -> tuple[Constants, str, str]:
    """Bounds along both systems up to time S, may be infinite; where they hold; what they assume of the law."""
    found = block.constants().largest()
    if found.finite():
        return found, "for all parameters", ""
    if type(block) is BallBump:
        u = theta[:, 0].abs() + support
        U = growth_bound(float(u.max()), math.sqrt(float(u.square() @ weights)), S, E_0, kappa)
        row = f"|u| <= {float(u.max()):.3g} in every draw of the law"
        return block.constants(radius=U).largest(), f"for |u| <= {U:.3g}", row
    row = f"every draw of the law is within {support:.3g} of a given particle"
    start = float(rigor.norm(X).max())
    radius, reach = 0.0, start
    for _ in range(_ROUNDS):
        found = block.constants(theta, support + radius, reach).spread(theta).largest()
        moved = S * found.B * kappa * _exp(found.A) * math.sqrt(2 * E_0)
        far = start + found.F
        if not (moved < 1e60 and far < 1e60):  # powers of it are still floats
            break
        if moved <= radius and far <= reach:
            return found, f"within {radius:.3g} of the law's support", row
        radius, reach = max(radius, moved * (1 + 1e-6)), max(reach, far * (1 + 1e-6))
    return Constants(*[math.inf] * 7), "nowhere: no radius found that no particle can leave", row


def _check_numbers(
    S: float, step: float, L: int, M: int, support: float | None, epsilon: float | None, eta: float
) -> None:
    for name, value in (("S", S), ("step", step), ("epsilon", epsilon)):
        if value is not None:
            check_positive(name, value)
    for name, size in (("L", L), ("M", M)):
        if not 1 <= size <= 2**53:
            raise ValueError(f"{name} is {size}; an integer >= 1 is needed, and at most 2^53")
    if not 0 < eta < 1 or (support is not None and support < 0):
        raise ValueError(f"eta and support are {eta} and {support}; 0 < eta < 1 and support >= 0 are needed")
    if S / step > _MOST_STEPS:
        raise ValueError(f"step is {step}; at most {_MOST_STEPS} steps up to S = {S} are possible")


@checked(double=True)
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
    depth: Literal["constant", "iid"] = "constant",
    support: float | None = None,
    epsilon: float | None = None,
    eta: float = 0.1,
) -> Certificate:
    """Bound ``E |E_LM - E_rho| <= rbar delta + delta^2 / 2`` after training time S, and the sizes for an error epsilon.

    The law is given by weighted particles. Its flow (gradient descent of the same step, infinitely deep and wide) gives
    ``rbar``; the recursion of the coupling theorem does the rest. The finite net draws from the law itself, whose draws
    may lie farther out than every particle of a quadrature rule: the block's constants must bound all of its support.

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
        depth: ``"constant"`` (one draw for all depths) or ``"iid"`` (a draw for every layer).
        support: how far a draw of the law can be from the nearest of `theta` (`BallBump`: how much larger its ``|u|``
            can be than the largest of `theta`, 0 for None). Needed where the block has no constants for all parameters.
        epsilon: error of the loss for which sizes are wanted; None for no sizes.
        eta: the probability of failure for those sizes.

    Returns:
        A `Certificate`, which holds when the bound is below the initial loss. Reasons: ``support_unknown``,
        ``radius_diverged``, ``vacuous``. ``quantities``: ``bound`` and
        ``bound_closed`` (without training, for constant depth), ``D``, ``D_closed`` (root-mean-square distance of
        coupled particles), ``delta``, ``exponent``, ``E_0``, ``E_S``, the constants A and B, and ``L_needed``,
        ``M_needed`` with ``P(|E_LM - E_rho| <= epsilon) >= 1 - eta``.

    Warns:
        UserWarning: ``d = 1`` and y not monotone along x.

    Raises:
        TypeError, ValueError: bad data, weights not summing to 1, or a number out of range.

    Source: the coupling theorem, derived in lesson 2.
    """
    weights = check_fit(block, theta, X, weights, y=y, v=v)
    _check_numbers(S, step, L, M, support, epsilon, eta)
    warn_order(block, X, y, v, None)
    if support is None and type(block) is not BallBump and not block.constants().largest().finite():
        row = compare("constants of the block for all parameters", math.inf, "<", math.inf)
        return silent(_NAME, [row], "support_unknown: say how far the law reaches (support), or take another block")
    steps = max(1, round(S / step))
    h, kappa = S / steps, float(rigor.norm(v))
    flow = limit_flow(block, X, y, v, theta, weights, times=[h * j for j in range(steps + 1)], step=h, method="gd")
    rbar, E_0, E_S = (2 * flow.loss).sqrt().tolist(), float(flow.loss[0]), float(flow.loss[-1])
    c, where, law = _law_constants(block, X, kappa, theta, weights, S, E_0, support or 0.0)
    rows = [
        compare(f"constants of the block {where}", c.B, "<", math.inf),
        assumed("particles drawn independently from the law, equal weights"),
        assumed("the quadrature of the law, its depth and the step in s are exact"),
    ]
    if law:
        rows += [assumed(law), assumed("steps small enough for the energy identity of the flow")]
        if float(block.f(X[:, None], theta[None]).abs().max()) > 0:
            rows.append(assumed("the finite net starts with a loss of at most E₀"))
    values = {"E_0": E_0, "E_S": E_S}
    if not c.finite():
        reason = "radius_diverged: no bound on the parameters up to time S; a smaller S may have one"
        return Certificate(_NAME, False, tuple(rows), values, reason)
    options = {"draw": depth, "kappa": kappa}
    end = stepwise(c, rbar, h, L, M, **options)
    bound = end.loss(rbar[-1], kappa)
    values |= {"bound": bound, "D": end.D, "delta": end.delta, "A": c.A, "B": c.B}
    if depth == "constant":
        closed, values["exponent"] = closed_form(c, max(rbar), S, L, M, kappa=kappa)
        values |= {"bound_closed": closed.loss(rbar[-1], kappa), "D_closed": closed.D}
    if epsilon is not None:
        values |= _sizes(c, rbar, h, epsilon, eta, options)
    rows.append(compare("bound on E |E_LM - E_ρ|, against E₀", bound, "<", E_0))
    reason = "" if rows[-1].holds else f"vacuous: the bound {bound:.3g} is not below E_0 = {E_0:.3g}"
    says = "" if reason else f"E |E_LM - E_ρ| <= {show(bound, side='up')} where E_0 = {E_0:.3g}"
    return Certificate(_NAME, not reason, tuple(rows), values, reason, says=says)


def _sizes(
    c: Constants, rbar: list[float], h: float, epsilon: float, eta: float, options: dict
) -> dict[str, float | int]:
    try:
        found = sizes(c, rbar, h, epsilon, eta, **options)
    except OverflowError:
        return {}
    # whole numbers where they can be counted
    return {name: n if n < 2**53 else float(n) for name, n in (("L_needed", found.L), ("M_needed", found.M))}
