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
from typing import NamedTuple

from companion.mean_field.blocks import Constants

__all__ = ["Coupling", "Sizes", "closed_form", "exp", "finite", "growth_bound", "sizes", "stepwise"]


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
        return exp(A), exp(2 * A)
    return (_expm1(A) / A if A > 0 else 1.0), exp(A)


def _noise(L: float | int, M: float | int, draw: str) -> float:
    if math.isinf(M):
        return 0.0
    return 1 / math.sqrt(M * L) if draw == "iid" and math.isfinite(L) else 1 / math.sqrt(M)


def _states(c: Constants, D: float, R: float, nu: float, over_L: float, draw: str) -> tuple[float, float]:
    phi, chi = _propagators(c.A, draw)
    delta = phi * (c.B * D + c.F * nu + (c.A * c.F + c.B * R) / 2 * over_L)
    bend = (c.A**2 + c.H_zz * c.F + c.H_ztheta * R) / 2 * over_L
    return delta, chi * (c.H_zz * delta + c.H_ztheta * D + c.A_F * nu + bend)


def finite(c: Constants) -> bool:
    """Whether every bound is a finite number."""
    return all(math.isfinite(x) for x in vars(c).values())


def _run(
    c: Constants, rbar: Sequence[float], h: float, nu: float, over_L: float, R: float, draw: str, kappa: float
) -> list[Coupling]:
    """The recursion from every step to the next; ``len(rbar)`` states, `rbar` at steps 0, 1, ..."""
    D, eA, made = 0.0, exp(c.A), []
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
    A, B, eA, (phi, _) = c.A, c.B, exp(c.A), _propagators(c.A, "constant")
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


def exp(x: float) -> float:
    """``e^x``, infinity where it overflows."""
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
    """How large ``|u|`` of `BallBump` can become: ``U_0 + S kappa sqrt(2 E_0) exp(e^{-1/2} (rms_0 + sqrt(S E_0)))``.

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
    return U_0 + S * kappa * math.sqrt(2 * E_0) * exp(math.exp(-0.5) * (rms_0 + math.sqrt(S * E_0)))
