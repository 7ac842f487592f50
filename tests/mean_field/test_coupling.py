"""The numbers of the coupling theorem against its differential inequalities integrated by other means."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from companion.mean_field import coupling
from companion.mean_field.blocks import Constants, GaussBump
from companion.mean_field.coupling import closed_form, finite, growth_bound, sizes, stepwise

positive = st.floats(0.05, 1.2)


def constants(*values):
    F, A, B, *H = values
    return Constants(F, A, A, B, *H)


def continuous(c, r, S, L, M, kappa=1.0):
    """D, R at S of the theorem's differential inequalities, as equations, by an adaptive integrator."""
    eA, phi = math.exp(c.A), math.expm1(c.A) / c.A
    nu = 0 if math.isinf(M) else M**-0.5

    def rate(_, u):
        D, R = u
        delta = phi * (c.B * D + c.F * nu + (c.A * c.F + c.B * R) / (2 * L))
        bend = (c.A**2 + c.H_zz * c.F + c.H_ztheta * R) / (2 * L)
        q = eA * (c.H_zz * delta + c.H_ztheta * D + c.A_F * nu + bend)
        turn = c.B * (q + c.A * eA / L) + eA * (c.H_ztheta * delta + c.H_thetatheta * D)
        dD = kappa**2 * c.B * eA * delta + kappa * r * turn
        return [dD, kappa * r * eA * (c.H_thetatheta * R + c.H_ztheta * c.F + c.A * c.B)]

    return solve_ivp(rate, (0, S), [0, 0], rtol=1e-10, atol=1e-14).y[:, -1]


@given(positive, positive, positive, positive, positive, positive, positive, st.floats(0.3, 2.0))
def test_steps_approach_the_differential_inequalities_from_below_and_the_closed_form_is_above(
    F, A, B, a, b, c, r, kappa
):
    k, S, L, M = constants(F, A, B, a, b, c), 0.5, 16, 64
    D, R = continuous(k, r, S, L, M, kappa)
    coarse, fine = (stepwise(k, [r] * (steps + 1), S / steps, L, M, kappa=kappa) for steps in (50, 400))
    closed, exponent = closed_form(k, r, S, L, M, kappa=kappa)
    assert coarse.D <= fine.D <= D * (1 + 1e-8) <= closed.D * (1 + 1e-7)
    assert pytest.approx(D, rel=0.05 * (1 + exponent)) == fine.D
    assert fine.R <= R * (1 + 1e-8)
    assert pytest.approx(R, rel=1e-6) == closed.R
    assert closed.delta >= fine.delta
    assert closed.loss(r, kappa) == pytest.approx(r * kappa * closed.delta + (kappa * closed.delta) ** 2 / 2)


def test_the_exponent_and_the_closed_form_solve_a_linear_equation():
    # with the final R throughout, D' = K D + N_M / sqrt(M) + N_L / L; two times give K back
    c = constants(0.5, 0.4, 0.6, 0.3, 0.2, 1e-9)
    near, K = closed_form(c, 0.7, 1e-6, math.inf, 100)
    far, _ = closed_form(c, 0.7, 3.0, math.inf, 100)
    assert pytest.approx(math.expm1(3 * K) / math.expm1(1e-6 * K), rel=1e-4) == far.D / near.D


@pytest.mark.parametrize("draw", ["constant", "iid"])
def test_sizes_are_sufficient_nearly_necessary_and_scale_as_claimed(draw):
    c, rbar, h = GaussBump(0.2).constants(), [0.5, 0.45, 0.4, 0.38, 0.37], 0.1
    found = sizes(c, rbar, h, 0.02, 0.1, draw=draw, R=0.3)
    deep = stepwise(c, rbar, h, found.L, math.inf, R=0.3, draw=draw)
    assert deep.loss(rbar[-1]) == pytest.approx(found.depth_part, rel=1e-12)
    assert found.depth_part <= 0.01 <= stepwise(c, rbar, h, found.L - 1, math.inf, R=0.3, draw=draw).loss(rbar[-1])
    # Chebyshev for the second half: rbar_L a + a^2 / 2 = epsilon / 2 and delta_M^2 / a^2 <= eta
    shift = rbar[-1] + deep.delta
    a = -shift + math.sqrt(shift**2 + 0.02)
    path = [r + stepwise(c, rbar[: j + 1], h, found.L, math.inf, R=0.3, draw=draw).delta for j, r in enumerate(rbar)]
    M = found.M * (found.L if draw == "iid" else 1)
    wide = stepwise(c, path, h, math.inf, M, draw=draw).delta
    assert 0.1 * 0.9 < wide**2 / a**2 <= 0.1 * (1 + 1e-9)
    smaller = sizes(c, rbar, h, 0.001, 0.1, draw=draw, R=0.3)
    rarer = sizes(c, rbar, h, 0.001, 0.001, draw=draw, R=0.3)
    assert pytest.approx(20, rel=0.1) == smaller.L / found.L
    particles = (lambda s: s.M * s.L) if draw == "iid" else (lambda s: s.M)
    assert particles(smaller) / particles(found) == pytest.approx(400, rel=0.2)
    assert particles(rarer) / particles(smaller) == pytest.approx(100, rel=0.01)


def test_iid_depth_has_less_noise_when_wide_and_deep():
    c, rbar = GaussBump(0.2).constants(), [0.5] * 5
    same, iid = (stepwise(c, rbar, 0.1, 10_000, 100, draw=draw).delta for draw in ("constant", "iid"))
    assert iid < same / 10


def test_numbers_of_the_lesson():
    c = GaussBump(0.5).constants()
    assert c.H_zz == pytest.approx(1.1377, abs=1e-4)
    assert growth_bound(0.0, 0.0, 1.0, 1.0675) == pytest.approx(2.734, abs=1e-3)
    assert growth_bound(0.0, 0.0, 1.0, 1.0675, kappa=2.0) == pytest.approx(2 * 2.734, abs=2e-3)
    assert growth_bound(1.0, 1.0, 1e9, 1.0) == math.inf


def test_infinite_constants_are_noticed():
    assert finite(GaussBump(1.0).constants())
    assert not finite(constants(*[math.inf] * 6))
    assert coupling.exp(1000.0) == math.inf
    assert coupling.exp(1.0) == math.e
    with pytest.raises(OverflowError, match="sizes needed"):
        sizes(constants(1.0, 300.0, 1.0, 1.0, 1.0, 1.0), [1.0] * 20, 1.0, 0.1, 0.1)
