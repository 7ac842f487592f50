"""The numbers of the coupling theorem against its differential inequalities integrated by other means."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import seeded
from scipy.integrate import solve_ivp

from companion import mean_field as mf
from companion.mean_field.blocks import BallBump, Constants, GaussBump, Linear, TanhMLP
from companion.mean_field.coupling import closed_form, growth_bound, sizes, stepwise
from companion.mean_field.flow import Depth

F64 = torch.float64
PLANE = torch.tensor([[-1.2, 0.3], [-0.4, -0.5], [0.4, 0.6], [1.2, -0.2]], dtype=F64)
PLANE_Y = torch.tensor([0.8, -0.6, 0.7, -0.9], dtype=F64)
E1 = torch.tensor([1.0, 0.0], dtype=F64)
ONE = torch.ones(1, dtype=F64)
LINE = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)
positive = st.floats(0.05, 1.2)
seven = st.lists(positive, min_size=7, max_size=7)


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


def transcribed(F, A, A_F, B, zz, zt, tt, rbar, h, L, M, R, draw, kappa):
    """The recursion as lesson 2 writes it."""
    e, D, iid = math.exp(A), 0.0, draw == "iid"
    phi, chi, nu = (e, e * e, (L * M) ** -0.5) if iid else ((e - 1) / A, e, M**-0.5)
    for k, r in enumerate(rbar):
        delta = phi * (B * D + F * nu + (A * F + B * R) / (2 * L))
        q = chi * (zz * delta + zt * D + A_F * nu + (A**2 + zz * F + zt * R) / (2 * L))
        if k + 1 < len(rbar):
            D1 = kappa**2 * B * e * delta + kappa * r * (B * (q + A * e / L) + e * (zt * delta + tt * D))
            D, R = D + h * D1, R + h * kappa * r * e * (tt * R + zt * F + A * B)
    return D, delta, q, R


@given(seven, st.lists(positive, min_size=1, max_size=6), st.floats(0, 2), positive)
@pytest.mark.parametrize("draw", ["constant", "iid"])
def test_steps_are_those_of_the_theorem(draw, values, rbar, R, kappa):
    found = stepwise(Constants(*values), rbar, 0.07, 5, 11, R=R, draw=draw, kappa=kappa)
    assert list(found) == pytest.approx(transcribed(*values, rbar, 0.07, 5, 11, R, draw, kappa), rel=1e-12)


def transcribed_closed_form(F, A, A_F, B, zz, zt, tt, r, S, L, M):
    """K, D and R of the closed form as lesson 2 writes it, for a readout of norm 1."""
    e = math.exp(A)
    phi, lead = (e - 1) / A, B * e
    R = (math.exp(r * e * tt * S) - 1) * (zt * F + A * B) / tt
    c, turn = (A * F + B * R) / 2, (A**2 + zz * F + zt * R) / 2
    K = lead * B * phi + r * e * (B * (zz * phi * B + zt) + zt * phi * B + tt)
    N_M = lead * phi * F + r * e * (B * (zz * phi * F + A_F) + zt * phi * F)
    N_L = lead * phi * c + r * e * (B * (zz * phi * c + turn) + A * B + zt * phi * c)
    return K, (N_M / math.sqrt(M) + N_L / L) * (math.exp(K * S) - 1) / K, R


@given(seven, positive)
def test_the_closed_form_is_that_of_the_theorem(values, r):
    found, exponent = closed_form(Constants(*values), r, 0.8, 6, 9)
    assert (exponent, found.D, found.R) == pytest.approx(transcribed_closed_form(*values, r, 0.8, 6, 9), rel=1e-12)


@given(seven, positive, st.floats(0.3, 3))
def test_a_longer_readout_is_a_longer_time(values, r, kappa):
    # D and R with |v| = kappa and r are those with |v| = 1, r / kappa and kappa^2 S: v -> v / kappa, y -> y / kappa
    found, _ = closed_form(Constants(*values), r, 0.3, 6, 9, kappa=kappa)
    other, _ = closed_form(Constants(*values), r / kappa, 0.3 * kappa**2, 6, 9)
    assert pytest.approx((other.D, other.R), rel=1e-9) == (found.D, found.R)


def test_the_exponent_and_the_closed_form_solve_a_linear_equation():
    # with the final R throughout, D' = K D + N_M / sqrt(M) + N_L / L; two times give K back
    c = constants(0.5, 0.4, 0.6, 0.3, 0.2, 1e-9)
    near, K = closed_form(c, 0.7, 1e-6, math.inf, 100)
    far, _ = closed_form(c, 0.7, 3.0, math.inf, 100)
    assert pytest.approx(math.expm1(3 * K) / math.expm1(1e-6 * K), rel=1e-4) == far.D / near.D


@pytest.mark.parametrize("draw", ["constant", "iid"])
def test_sizes_are_sufficient_nearly_necessary_and_scale_as_claimed(draw):
    c, rbar, h = GaussBump(0.2).constants().largest(), [0.5, 0.45, 0.4, 0.38, 0.37], 0.1
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
    c, rbar = GaussBump(0.2).constants().largest(), [0.5] * 5
    same, iid = (stepwise(c, rbar, 0.1, 10_000, 100, draw=draw).delta for draw in ("constant", "iid"))
    assert iid < same / 10


def test_growth_bound_is_that_of_the_theorem():
    for U_0, rms_0, S, E_0, kappa in ((0.0, 0.0, 1.0, 1.0675, 1.0), (0.3, 0.2, 2.0, 0.7, 2.0)):
        speed = kappa * math.sqrt(2 * E_0) * math.exp((rms_0 + math.sqrt(S * E_0)) / math.sqrt(math.e))
        assert growth_bound(U_0, rms_0, S, E_0, kappa) == pytest.approx(U_0 + S * speed, rel=1e-12)
    assert growth_bound(1.0, 1.0, 1e9, 1.0) == math.inf


def test_infinite_constants_are_noticed():
    assert not constants(*[math.inf] * 6).finite()
    assert math.inf == stepwise(constants(1.0, 1000.0, 1.0, 1.0, 1.0, 1.0), [1.0, 1.0], 1.0, 4, 4).D
    with pytest.raises(OverflowError, match="sizes needed"):
        sizes(constants(1.0, 300.0, 1.0, 1.0, 1.0, 1.0), [1.0] * 20, 1.0, 0.1, 0.1)


# --- the certificate against training ---------------------------------------------------------------------------------


def bump_problem(alpha, generator=None):
    noise = torch.tensor([-0.6, -1.0, -0.5, 0.7], dtype=F64)
    if generator is not None:
        noise = torch.rand(4, generator=generator, dtype=F64).sort().values - 0.5
    return GaussBump(alpha), LINE[:, 0] + 0.4 * alpha * noise, mf.density_rule(GaussBump.density, (-3.0, 3.0), 48)


def coupled(block, y, rule, S, h, L, M, seeds, depth):
    """D, and the mean of |E_LM - E_rho|, of finite nets whose particles also ride, without mass, in the limit."""
    rule_theta, rule_weights = rule
    theta = mf.init_particles(block, L, M, S=seeds, depth=depth, generator=seeded(7))
    run = mf.train(block, theta, LINE, y, ONE, h, round(S / h), every=round(S / h), progress=False)
    layers = torch.arange(L, dtype=F64) / L
    riders = theta.permute(1, 0, 2, 3).reshape(L, seeds * M, 1)
    points = Depth.chebyshev(13).t
    # a rider of layer l stays at depth l / L; others of its layer start from the same place
    flat = riders[0] if depth == "constant" else riders.reshape(L * seeds * M, 1)
    start = torch.cat([rule_theta, flat])
    weights = torch.cat([rule_weights, torch.zeros(len(flat), dtype=F64)])
    flow = mf.limit_flow(block, LINE, y, ONE, start, weights, times=[0.0, S], step=h, method="gd")
    assert torch.allclose(points, flow.t)
    rode = flow.particles_at(layers)[1, :, len(rule_theta) :]
    rode = rode if depth == "constant" else torch.stack([rode[l].reshape(L, -1, 1)[l] for l in range(L)])
    moved = run.weights[0].permute(1, 0, 2, 3).reshape(L, seeds * M, 1)
    D = float((moved - rode).square().sum(-1).mean(1).sqrt().max())
    return D, float((run.loss[-1] - flow.loss[-1]).abs().mean())


@pytest.mark.parametrize("depth", ["constant", "iid"])
@pytest.mark.parametrize(("alpha", "L", "M"), [(0.1, 4, 16), (0.25, 8, 32)])
def test_the_coupling_bound_is_above_what_is_measured(depth, alpha, L, M):
    block, y, rule = bump_problem(alpha, seeded(L))
    found = mf.coupling_bound(block, LINE, y, ONE, *rule, S=1.0, step=0.1, L=L, M=M, depth=depth)
    D, error = coupled(block, y, rule, 1.0, 0.1, L, M, 32, depth)
    assert 0 < D <= found.quantities["D"]
    assert 0 < error <= found.quantities["bound"]
    if depth == "constant":
        assert found.quantities["D"] <= found.quantities["D_closed"]
        assert found.quantities["bound"] <= found.quantities["bound_closed"]


def test_the_coupling_bound_of_the_lesson():
    block, y, rule = bump_problem(0.3)
    found = mf.coupling_bound(block, LINE, y, ONE, *rule, S=2.0, step=0.1, L=32, M=1024, epsilon=1e-3)
    q = found.quantities
    times = [0.1 * j for j in range(21)]
    rbar = (2 * mf.limit_flow(block, LINE, y, ONE, *rule, times=times, step=0.1, method="gd").loss).sqrt().tolist()
    c = [float(x) for x in vars(block.constants()).values()]
    assert q["D_closed"] == pytest.approx(transcribed_closed_form(*c, rbar[0], 2.0, 32, 1024)[1], rel=1e-9)
    assert q["D"] == pytest.approx(transcribed(*c, rbar, 0.1, 32, 1024, 0.0, "constant", 1.0)[0], rel=1e-9)
    D, _ = coupled(block, y, rule, 2.0, 0.1, 32, 1024, 4, "constant")
    assert 0.0005 < D < 0.004
    assert (q["L_needed"], q["M_needed"]) == sizes(Constants(*c), rbar, 0.1, 1e-3, 0.1)[:2]
    assert not found.holds
    assert found.reason.startswith("vacuous")
    smaller = mf.coupling_bound(
        *(bump_problem(0.1)[0], LINE, bump_problem(0.1)[1], ONE), *rule, S=2.0, step=0.1, L=32, M=1024
    )
    assert smaller.holds
    assert smaller.status == "measured"
    worse = mf.coupling_bound(
        *(bump_problem(0.5)[0], LINE, bump_problem(0.5)[1], ONE), *rule, S=4.0, step=0.1, L=32, M=1024
    )
    assert 1e3 < worse.quantities["D"] < 1e4
    assert not worse.holds


def test_the_sizes_needed_are_enough():
    block, y, rule = bump_problem(0.1)
    needed = mf.coupling_bound(block, LINE, y, ONE, *rule, S=1.0, step=0.1, L=8, M=8, epsilon=3e-4, eta=0.2).quantities
    _, error = coupled(block, y, rule, 1.0, 0.1, needed["L_needed"], needed["M_needed"], 8, "constant")
    assert error < 3e-4


def test_errors_fall_like_one_over_depth_and_one_over_the_root_of_width():
    block, y = GaussBump(1.5), torch.tensor([-1.5, -1.0, 0.1, 1.5], dtype=F64)
    theta, weights = mf.density_rule(GaussBump.density, (-3.0, 3.0), 48)
    flow = mf.limit_flow(block, LINE, y, ONE, theta, weights, times=[2.0], step=0.05, method="gd")

    def trained(particles, w=None):
        run = mf.train(block, particles, LINE, y, ONE, 0.05, 40, weights=w, every=40, progress=False)
        return mf.forward(block, run.weights[0], LINE, w)[-1]

    depths = (4, 8, 16, 32, 64, 128)
    errors = [float((trained(theta.expand(1, L, -1, -1).clone(), weights) - flow.Z[0, -1]).norm()) for L in depths]
    slopes = np.diff(np.log2(errors))
    assert np.all(np.abs(slopes + 1) < 0.05)
    exact = trained(theta.expand(1, 16, -1, -1).clone(), weights)
    rms = {}
    for depth in ("constant", "iid"):
        for M in (16, 64):
            particles = mf.init_particles(block, 16, M, S=480, depth=depth, generator=seeded(1))
            rms[depth, M] = float((trained(particles) - exact).square().mean().sqrt())
        assert math.log2(rms[depth, 64] / rms[depth, 16]) / 2 == pytest.approx(-0.5, abs=0.07)
    for M in (16, 64):  # the noise of sixteen layers averages out
        assert rms["constant", M] / rms["iid", M] == pytest.approx(math.sqrt(16), rel=0.1)


def test_the_regulariser_lifts_the_loss_of_a_net_before_it_fades():
    block, y = GaussBump(1.5), torch.tensor([-1.5, -1.0, 0.1, 1.5], dtype=F64)
    theta, weights = mf.density_rule(GaussBump.density, (-3.0, 3.0), 64)
    start = theta.expand(1, 16, -1, -1).clone()
    options = {"weights": weights, "every": 40, "decay": lambda s: math.exp(-s), "progress": False}
    loss = mf.train(block, start, LINE, y, ONE, 0.05, 800, **options).loss[:, 0]
    options = {"times": [0.0, 2.0, 10.0, 40.0], "step": 0.05, "method": "gd", "decay": 1.0}
    limit = mf.limit_flow(block, LINE, y, ONE, theta, weights, **options).loss
    assert limit[1] > limit[0] > limit[2] > limit[3]
    assert loss[[0, 1, 5, 20]].tolist() == pytest.approx(limit.tolist(), rel=0.2)  # of depth 16 and of infinite depth


def test_the_main_block_needs_other_theorems():
    rule = mf.normal_rule(4, 3)
    found = mf.coupling_bound(BallBump(2), PLANE, PLANE_Y, E1, *rule, S=1.0, step=0.25, L=32, M=1024, epsilon=0.1)
    E_0 = float((PLANE[:, 0] - PLANE_Y).square().mean()) / 2  # the first network is the identity
    U = math.sqrt(2 * E_0) * math.exp(math.exp(-0.5) * math.sqrt(E_0))
    c = [float(x) for x in vars(BallBump(2).constants(radius=U)).values()]
    K = transcribed_closed_form(*c, math.sqrt(2 * E_0), 1e-3, 32, 1024)[0]
    assert found.quantities["E_0"] == pytest.approx(E_0, rel=1e-12)
    assert found.quantities["A"] == pytest.approx(U * math.exp(-0.5), rel=1e-9)
    assert found.quantities["exponent"] == pytest.approx(K, rel=1e-9)
    assert f"|u| <= {U:.3g}" in found.assumptions[0].name
    assert not found.holds
    short_time = mf.coupling_bound(BallBump(2), PLANE, PLANE_Y, E1, *rule, S=0.01, step=0.005, L=1000, M=10**6)
    assert short_time.holds


def tanh_problem():
    theta = 0.2 * torch.randn(40, 3, generator=seeded(8), dtype=F64)
    y = LINE[:, 0] + torch.tensor([-0.1, 0.0, 0.05, 0.1], dtype=F64)
    return TanhMLP(1), LINE, y, ONE, theta, torch.full((40,), 1 / 40, dtype=F64)


def test_constants_within_the_support_of_a_law_and_where_there_are_none():
    problem = tanh_problem()
    found = mf.coupling_bound(*problem, S=0.5, step=0.1, L=64, M=10**6, support=0.0)
    assert "of the law's support" in found.assumptions[0].name
    assert "every draw of the law is within 0 of a given particle" in [a.name for a in found.assumptions]
    assert any("at most E₀" in a.name for a in found.assumptions)
    wider = mf.coupling_bound(*problem, S=0.5, step=0.1, L=64, M=10**6, support=0.1).quantities
    assert wider["bound"] > found.quantities["bound"]
    assert wider["A"] > found.quantities["A"]
    far = mf.coupling_bound(*problem, S=30.0, step=0.5, L=64, M=100, support=0.0)
    assert not far.holds
    assert far.reason.startswith("radius_diverged")
    assert set(far.quantities) == {"E_0", "E_S"}  # nothing of the search that did not end


def test_particles_of_a_rule_say_nothing_about_the_law_they_stand_for():
    # theta ~ Laplace(0, 0.6): the limit of a linear block depends on the mean alone, so that two nodes are an exact
    # rule; but E |E_LM - E_rho| of one particle in each of 400 layers is 4.9 million, by integration
    b, L, y = 0.6, 400, 25.0
    theta = torch.linspace(-60, 400, 1_000_001, dtype=F64)
    error = (0.5 * ((1 + theta / L) ** L - y).square() - 0.5 * (1 - y) ** 2).abs()
    truth = float(torch.trapezoid(error * torch.exp(-theta.abs() / b) / (2 * b), theta))
    assert truth > 4.8e6
    nodes, weights = torch.tensor([[-b * 2**0.5], [b * 2**0.5]], dtype=F64), torch.full((2,), 0.5, dtype=F64)
    problem = (Linear(1), ONE[None], torch.tensor([y], dtype=F64), ONE, nodes, weights)
    size = {"S": 1e-6, "step": 1e-6, "L": L, "M": 1}
    found = mf.coupling_bound(*problem, **size)
    assert not found.holds
    assert found.reason.startswith("support_unknown")
    wide = mf.coupling_bound(*problem, **size, support=50.0)
    assert wide.reason.startswith("radius_diverged")


def test_a_longer_readout_scales_the_bound():
    block, X, y, v, *rule = tanh_problem()
    one = mf.coupling_bound(block, X, y, v, *rule, S=0.5, step=0.1, L=64, M=10**6, support=0.0).quantities
    # v -> 3 v, y -> 3 y, s -> s / 9 is the same flow
    found = mf.coupling_bound(block, X, 3 * y, 3 * v, *rule, S=0.5 / 9, step=0.1 / 9, L=64, M=10**6, support=0.0)
    assert found.quantities["bound"] == pytest.approx(9 * one["bound"], rel=1e-6)
    assert found.quantities["A"] == pytest.approx(one["A"], rel=1e-4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"X": LINE.float()}, TypeError, "X has dtype torch.float32"),
        ({"y": torch.full((4,), math.nan, dtype=F64)}, ValueError, r"y\[0\] is nan"),
        ({"weights": torch.full((2,), 0.4, dtype=F64)}, ValueError, "of sum 1"),
        ({"depth": "deep"}, ValueError, "'constant' or 'iid'"),
        ({"S": 0.0}, ValueError, "S is 0.0; a positive finite number"),
        ({"step": 1e-320}, ValueError, "step is 1e-320; at most"),
        ({"support": -1.0}, ValueError, "support >= 0"),
        ({"block": 3}, ValueError, "block is 3"),
        ({"L": 0}, ValueError, "L is 0; an integer >= 1"),
        ({"M": 2.5}, TypeError, "M is 2.5"),
        ({"epsilon": -1.0}, ValueError, "epsilon is -1.0"),
        ({"epsilon": 0.1, "eta": 1.0}, ValueError, "0 < eta < 1"),
    ],
)
def test_bad_input_of_the_coupling_bound(change, error, words):
    good = {"block": GaussBump(0.1), "X": LINE, "y": LINE[:, 0], "v": ONE, "theta": torch.zeros(2, 1, dtype=F64)}
    good |= {"weights": torch.full((2,), 0.5, dtype=F64), "S": 1.0, "step": 0.5, "L": 4, "M": 4}
    with pytest.raises(error, match=words):
        mf.coupling_bound(**(good | change))


def test_order_on_the_line_is_warned_of():
    block, _, rule = bump_problem(0.1)
    with pytest.warns(UserWarning, match="not monotone"):
        mf.coupling_bound(block, LINE, -LINE[:, 0], ONE, *rule, S=0.1, step=0.1, L=4, M=4)
