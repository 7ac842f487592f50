"""The theorems of lesson 2 as tests: each certificate against training, each constant against perturbation."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from companion import mean_field as mf
from companion.mean_field.blocks import HYPOTHESES, RBF, BallBump, Bias, GaussBump, Linear, Squares, TanhMLP
from companion.mean_field.flow import Depth

F64 = torch.float64
PLANE = torch.tensor([[-1.2, 0.3], [-0.4, -0.5], [0.4, 0.6], [1.2, -0.2]], dtype=F64)
PLANE_Y = torch.tensor([0.8, -0.6, 0.7, -0.9], dtype=F64)
E1 = torch.tensor([1.0, 0.0], dtype=F64)
ONE = torch.ones(1, dtype=F64)
LINE = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def near_net(block, L, M, n, gap, seed, scale=1.0):
    """A random net, inputs, and targets within about `gap` of its outputs."""
    generator = seeded(seed)
    theta = torch.randn(1, L, M, block.k, generator=generator, dtype=F64) * scale
    X = torch.linspace(-1.5, 1.5, n, dtype=F64)[:, None] + 0.1 * torch.randn(n, block.d, generator=generator, dtype=F64)
    v = torch.randn(block.d, generator=generator, dtype=F64).abs() + 0.2
    outputs = mf.forward(block, theta, X)[-1, 0] @ v
    return theta, X, outputs + gap * torch.randn(n, generator=generator, dtype=F64), v


def star(theta):
    return float(theta.square().sum(-1).mean().sqrt())


# --- kernel, first variation, regularity ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [BallBump(2), GaussBump(1.3)], ids=lambda b: b.name)
def test_the_gradient_of_the_first_variation_moves_the_particles(block):
    theta, X, y, v = near_net(block, 3, 5, 4, 0.7, 3)
    r = mf.forward(block, theta, X)[-1, 0] @ v - y
    z, p = mf.adjoint(block, theta, X, (r[:, None] * v)[None])
    leaf = theta[0].clone().requires_grad_()
    values = mf.first_variation(block, z[:-1, 0], p[1:, 0], leaf)
    assert values.shape == (3, 5)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    _, G = mf.rescaled_gradient(block, theta, X, y, v)
    assert torch.allclose(gradient, G[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("d", [1, 2])
def test_supremum_of_the_first_variation_is_above_every_parameter_and_attained(d):
    block, generator = BallBump(d), seeded(4)
    z, p = (torch.randn(2, 3, d, generator=generator, dtype=F64) for _ in range(2))
    omega = torch.randn(1, 4000, 2 * d, generator=generator, dtype=F64) * 1.5
    theta = torch.cat([torch.ones(1, 4000, 1, dtype=F64), omega], dim=2)
    values = mf.first_variation(block, z, p, theta).abs().amax(1)
    top = mf.first_variation_sup(block, z, p, points=301)
    assert bool((values <= top * (1 + 1e-3)).all())
    assert bool((values >= 0.8 * top).all())


def test_supremum_on_the_plane_at_the_start():
    p = ((PLANE @ E1 - PLANE_Y)[:, None] * E1)[None]
    assert float(mf.first_variation_sup(BallBump(2), PLANE[None], p)[0]) == pytest.approx(0.4342, abs=2e-4)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_of_the_small_functions():
    p = torch.zeros(1, 4, 2, dtype=F64)
    with pytest.raises(TypeError, match="BallBump alone"):
        mf.first_variation_sup(GaussBump(1.0), PLANE[None, :, :1], p[:, :, :1])
    with pytest.raises(ValueError, match="d <= 3"):
        mf.first_variation_sup(BallBump(4), torch.zeros(1, 2, 4, dtype=F64), torch.zeros(1, 2, 4, dtype=F64))
    with pytest.raises(ValueError, match="both"):
        mf.isotonic_floor(LINE[:, 0], PLANE_Y[:3])
    with pytest.raises(ValueError, match="NaN"):
        mf.isotonic_floor(torch.tensor([math.nan], dtype=F64), ONE)


def test_depth_regularity_tells_smooth_from_independent_layers():
    block = GaussBump(1.0)
    found = {
        (kind, L): float(mf.depth_regularity(mf.init_particles(block, L, 256, depth=kind, generator=seeded()))[0])
        for kind, L in itertools.product(("constant", "process", "iid"), (16, 64))
    }
    assert found["constant", 16] == found["constant", 64] == 0
    assert found["process", 64] == pytest.approx(found["process", 16], rel=0.1)
    assert found["iid", 64] == pytest.approx(4 * found["iid", 16], rel=0.3)
    ramp = torch.arange(5, dtype=F64)[None, :, None, None].expand(1, 5, 2, 1) / 5
    assert mf.depth_regularity(ramp).tolist() == pytest.approx([1.0])
    assert mf.depth_regularity(ramp, torch.tensor([0.3, 0.7], dtype=F64)).tolist() == pytest.approx([1.0])
    assert mf.depth_regularity(ramp[:, :1]).tolist() == [0.0]


# --- order on the line ------------------------------------------------------------------------------------------------

short = st.lists(st.tuples(st.integers(-4, 4), st.floats(-3, 3)), min_size=1, max_size=12)


@given(short)
def test_isotonic_floor_is_that_of_scikit_learn(points):
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    fitted = IsotonicRegression().fit(x, y).predict(x)
    expected = 0.5 * np.mean((y - fitted) ** 2)
    assert mf.isotonic_floor(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, abs=1e-12)


def test_isotonic_floor_by_hand():
    assert mf.isotonic_floor(PLANE[:, 0], PLANE_Y) == pytest.approx(0.2875, abs=1e-15)
    assert mf.isotonic_floor(LINE[:, 0], torch.tensor([-2.2, -1.2, 0.4, 2.4], dtype=F64)) == 0.0
    assert mf.isotonic_floor(torch.tensor([0.5, -0.5], dtype=F64), torch.tensor([-0.5, 0.5], dtype=F64)) == 0.125


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 4.0))
@settings(max_examples=80)
def test_below_ratio_one_no_states_cross_and_the_floor_binds(seed, L, scale):
    block, generator = BallBump(1), seeded(seed)
    theta = torch.randn(1, L, 5, 3, generator=generator, dtype=F64) * torch.tensor([scale * L, 1.0, 1.0], dtype=F64)
    X = torch.randn(6, 1, generator=generator, dtype=F64).sort(0).values
    outputs = mf.forward(block, theta, X)[:, 0, :, 0]
    ratio = float(mf.crossing_ratio(block, theta)[0])
    expected = float(theta[0, ..., 0].abs().mean(1).max()) / math.sqrt(math.e) / L
    assert ratio == pytest.approx(expected, rel=1e-12)
    if ratio < 1:
        assert bool((outputs.diff(dim=1) > 0).all())
        y = torch.randn(6, generator=generator, dtype=F64)
        loss = 0.5 * float((outputs[-1] - y).square().mean())
        assert loss >= mf.isotonic_floor(X[:, 0], y) - 1e-14


def test_above_ratio_one_states_can_cross():
    theta = torch.tensor([40.0, 3.0, 0.0], dtype=F64).expand(1, 1, 1, 3)
    block, X = BallBump(1), torch.tensor([[-0.2], [0.8]], dtype=F64)
    assert float(mf.crossing_ratio(block, theta)[0]) > 1
    assert bool((mf.forward(block, theta, X)[-1, 0, :, 0].diff() < 0).all())


def test_a_mirrored_law_keeps_the_states_in_the_mirror():
    block, generator = BallBump(2), seeded(5)
    half = torch.randn(1, 3, 8, 5, generator=generator, dtype=F64)
    mirrored = half * torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0], dtype=F64)
    theta = torch.cat([half, mirrored], dim=2)
    X = torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=F64)
    y = torch.tensor([0.5, -0.5], dtype=F64)
    assert float(mf.forward(block, theta, X)[..., 1].abs().max()) < 1e-15
    _, G = mf.rescaled_gradient(block, theta, X, y, E1)
    assert torch.allclose(G[:, :, 8:], G[:, :, :8] * torch.tensor([1.0, 1, -1, 1, -1], dtype=F64), atol=1e-15)


# --- the audit --------------------------------------------------------------------------------------------------------


def test_audit_of_the_blocks():
    good = mf.audit(BallBump(2), u2=55.0)
    assert good.holds
    assert good.status == "exact"
    assert good.quantities["u2"] == 55.0
    assert [a.name for a in good.assumptions][: len(HYPOTHESES)] == list(HYPOTHESES)
    assert good.assumptions[-1].status == "assumed"
    bad = mf.audit(GaussBump(1.0))
    assert not bad.holds
    assert "universality" in bad.reason
    assert any("not checkable" in a.name for a in bad.assumptions)
    for block in (RBF(1), TanhMLP(1), Linear(1), Bias(1), Squares(1)):
        assert not mf.audit(block).holds
    json.loads(good.to_json())


# --- theorem A --------------------------------------------------------------------------------------------------------


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
    assert q["D_closed"] == pytest.approx(0.0765, abs=1e-4)
    assert q["D"] == pytest.approx(0.0679, abs=1e-4)
    D, _ = coupled(block, y, rule, 2.0, 0.1, 32, 1024, 4, "constant")
    assert 0.0005 < D < 0.004
    assert (q["L_needed"], q["M_needed"]) == (70, pytest.approx(474_160, rel=1e-3))
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
    assert errors[0] == pytest.approx(0.0123, abs=2e-4)
    exact = trained(theta.expand(1, 16, -1, -1).clone(), weights)
    for depth, at_16, at_64 in (("constant", 0.0945, 0.0464), ("iid", 0.0239, 0.0116)):
        rms = []
        for M in (16, 64):
            particles = mf.init_particles(block, 16, M, S=480, depth=depth, generator=seeded(1))
            rms.append(float((trained(particles) - exact).square().mean().sqrt()))
        assert rms == pytest.approx([at_16, at_64], rel=0.1)
        assert math.log2(rms[1] / rms[0]) / 2 == pytest.approx(-0.5, abs=0.07)


def test_the_regulariser_lifts_the_loss_of_a_net_before_it_fades():
    block, y = GaussBump(1.5), torch.tensor([-1.5, -1.0, 0.1, 1.5], dtype=F64)
    theta, weights = mf.density_rule(GaussBump.density, (-3.0, 3.0), 64)
    start = theta.expand(1, 16, -1, -1).clone()
    options = {"weights": weights, "every": 40, "decay": lambda s: math.exp(-s), "progress": False}
    loss = mf.train(block, start, LINE, y, ONE, 0.05, 800, **options).loss[:, 0]
    assert loss[[0, 1, 5, 20]].tolist() == pytest.approx([0.078, 0.087, 0.0040, 0.00056], rel=0.03)


def test_the_main_block_needs_other_theorems():
    rule = mf.normal_rule(4, 3)
    found = mf.coupling_bound(BallBump(2), PLANE, PLANE_Y, E1, *rule, S=1.0, step=0.25, L=32, M=1024, epsilon=0.1)
    assert found.quantities["exponent"] == pytest.approx(3.4e3, rel=0.01)
    assert found.quantities["A"] == pytest.approx(2.74 * math.exp(-0.5), abs=0.01)
    assert "|u| <= 2.73" in found.assumptions[0].name
    assert found.quantities["E_0"] == pytest.approx(1.0675, abs=1e-12)
    assert not found.holds
    short_time = mf.coupling_bound(BallBump(2), PLANE, PLANE_Y, E1, *rule, S=0.01, step=0.005, L=1000, M=10**6)
    assert short_time.holds


def test_constants_within_a_ball_and_where_there_is_none():
    block, generator = TanhMLP(1), seeded(8)
    theta = 0.2 * torch.randn(40, 3, generator=generator, dtype=F64)
    weights = torch.full((40,), 1 / 40, dtype=F64)
    y = LINE[:, 0] + torch.tensor([-0.1, 0.0, 0.05, 0.1], dtype=F64)
    found = mf.coupling_bound(
        block, LINE, y, ONE, theta, weights, S=0.5, step=0.1, L=64, M=10**6, depth="process", regularity=0.1
    )
    assert "within" in found.assumptions[0].name
    assert "bound_closed" not in found.quantities
    assert math.isfinite(found.quantities["bound"])
    assert any("at most E₀" in a.name for a in found.assumptions)
    far = mf.coupling_bound(block, LINE, y, ONE, theta, weights, S=30.0, step=0.5, L=64, M=100)
    assert not far.holds
    assert far.reason.startswith("radius_diverged")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"X": LINE.float()}, TypeError, "float64"),
        ({"y": torch.full((4,), math.nan, dtype=F64)}, ValueError, "NaN"),
        ({"weights": torch.full((2,), 0.4, dtype=F64)}, ValueError, "sum 1"),
        ({"depth": "deep"}, ValueError, "'constant', 'process' or 'iid'"),
        ({"S": 0.0}, ValueError, "positive finite"),
        ({"L": 0}, ValueError, "positive finite"),
        ({"epsilon": -1.0}, ValueError, "epsilon > 0"),
        ({"epsilon": 0.1, "eta": 1.0}, ValueError, "0 < eta < 1"),
    ],
)
def test_bad_input_of_the_coupling_bound(change, error, words):
    good = {"block": GaussBump(0.1), "X": LINE, "y": LINE[:, 0], "v": ONE, "theta": torch.zeros(2, 1, dtype=F64)}
    good |= {"weights": torch.full((2,), 0.5, dtype=F64), "S": 1.0, "step": 0.5, "L": 4, "M": 4}
    with pytest.raises(error, match=words):
        mf.coupling_bound(**(good | change))


# --- theorem B --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([BallBump(1), BallBump(2), GaussBump(0.5), TanhMLP(2)]), st.booleans())
@settings(max_examples=25)
def test_where_zero_loss_is_certified_descent_keeps_its_promises(seed, block, equal):
    theta, X, y, v = near_net(block, 2, 8, 3, 1e-7, seed, scale=0.5)
    if equal:
        X, y = torch.cat([X, X[1:2]]), torch.cat([y, y[1:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = mf.certify_zero_loss(block, theta, X, y, v, step=1e-9).quantities.get("h_max", 0.1) * 0.99
        found = mf.certify_zero_loss(block, theta, X, y, v, step=h)
        certain = mf.certify_zero_loss(block, theta, X, y, v, step=h, level="certified")
        flow = mf.certify_zero_loss(block, theta, X, y, v)
        local = mf.certify_zero_loss(block, theta, X, y, v, step=h, constants="local")
        local_certain = mf.certify_zero_loss(block, theta, X, y, v, step=h, constants="local", level="certified")
    q = found.quantities
    if not found.holds:
        assert found.reason.split(":")[0] in ("kernel_singular", "residual_too_large", "radius_diverged")
        assert not certain.holds
        return
    assert flow.holds
    assert flow.quantities["ratio"] < q["ratio"]
    assert local.holds
    assert local.quantities["ratio"] <= q["ratio"] * (1 + 1e-4)
    assert local_certain.quantities["ratio"] >= local.quantities["ratio"] * (1 - 1e-9)
    for name, upper in (("Lambda", True), ("ratio", True), ("movement", True), ("lambda", False), ("h_max", None)):
        a, b = q[name], certain.quantities[name]
        assert b == pytest.approx(a, rel=1e-3)
        if upper is not None:  # a smaller lambda is also a smaller ball, and may allow larger steps
            assert b >= a * (1 - 1e-9) if upper else b <= a * (1 + 1e-9)
    run = mf.train(block, theta, X, y, v, h, 40, progress=False)
    allowed = q["E_0"] * (1 - q["rate"]) ** torch.arange(41, dtype=F64)
    assert bool((run.loss[:, 0] <= allowed * (1 + 1e-9) + 1e-28).all())
    shift = run.weights[0] - theta
    assert star(shift[0]) <= q["movement"]
    assert float(torch.linalg.vector_norm(shift, dim=-1).max()) <= local.quantities["R_s"] <= q["R_s"]


@pytest.fixture(scope="module")
def trained_plane():
    block = BallBump(2)
    theta = mf.init_particles(block, 16, 64, generator=seeded())
    early = mf.train(block, theta, PLANE, PLANE_Y, E1, 0.2, 500, every=500, progress=False).weights[0]
    middle = mf.train(block, early, PLANE, PLANE_Y, E1, 0.2, 2300, every=2300, progress=False).weights[0]
    late = mf.train(block, middle, PLANE, PLANE_Y, E1, 0.2, 950, every=950, progress=False).weights[0]
    return block, early, middle, late


def test_zero_loss_on_the_plane_becomes_provable(trained_plane):
    block, early, middle, late = trained_plane
    assert mf.certify_zero_loss(block, early, PLANE, PLANE_Y, E1, step=0.14).reason.split(":")[0] in (
        "radius_diverged",
        "residual_too_large",
    )
    found = mf.certify_zero_loss(block, late, PLANE, PLANE_Y, E1, step=0.14)
    assert found.holds
    assert found.status == "measured"
    assert 0.11 < found.quantities["lambda"] < 0.125
    assert found.quantities["h_max"] == pytest.approx(0.147, abs=0.002)
    assert found.quantities["E_0"] < 1e-18
    certain = mf.certify_zero_loss(block, late, PLANE, PLANE_Y, E1, step=0.14, level="certified")
    assert certain.holds
    assert certain.status == "certified"
    h = certain.quantities["h_max"]
    run = mf.train(block, late, PLANE, PLANE_Y, E1, h, 300, progress=False)
    assert mf.certify_zero_loss(block, late, PLANE, PLANE_Y, E1, step=h, level="certified").holds
    allowed = found.quantities["E_0"] * (1 - h * found.quantities["lambda"] / 16) ** torch.arange(301, dtype=F64)
    assert bool((run.loss[:, 0] <= allowed + 1e-28).all())
    # the net's own propagators show it 150 units of time earlier
    assert not mf.certify_zero_loss(block, middle, PLANE, PLANE_Y, E1, step=0.14).holds
    for level in ("measured", "certified"):
        sooner = mf.certify_zero_loss(block, middle, PLANE, PLANE_Y, E1, step=0.14, constants="local", level=level)
        assert sooner.holds
        assert sooner.quantities["E_0"] > 1e-16
    large = mf.certify_zero_loss(block, late, PLANE, PLANE_Y, E1, step=0.2)
    assert large.reason.startswith("step_too_large: h = 0.2")


def test_an_ensemble_shows_its_first_failure(trained_plane):
    block, early, _, late = trained_plane
    found = mf.certify_zero_loss(block, torch.cat([late, early]), PLANE, PLANE_Y, E1, step=0.14)
    assert [m.holds for m in found.members] == [True, False]
    assert found.reason == found.members[1].reason
    assert mf.certify_zero_loss(block, torch.cat([late, late]), PLANE, PLANE_Y, E1, step=0.14).holds


def test_equal_inputs_are_merged_or_refused():
    block = BallBump(1)
    theta, X, y, v = near_net(block, 2, 8, 3, 1e-6, 1)
    twice = mf.certify_zero_loss(block, theta[0], torch.cat([X, X]), torch.cat([y, y]), v)
    once = mf.certify_zero_loss(block, theta[0], X, y, v)
    assert twice.holds
    for name, factor in (("E_0", 1), ("lambda", 2), ("rate", 1), ("movement", 1), ("R_s", 1)):
        assert twice.quantities[name] == pytest.approx(factor * once.quantities[name], rel=1e-3)
    clash = mf.certify_zero_loss(block, theta, torch.cat([X, X[1:2] * 1.0]), torch.cat([y, y[1:2] + 1]), v)
    assert not clash.holds
    assert clash.reason == "duplicate_inputs (1,3)"


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_a_singular_kernel_and_a_large_residual_are_named(level):
    theta = torch.zeros(2, 3, 1, dtype=F64)
    found = mf.certify_zero_loss(Bias(1), theta, LINE, LINE[:, 0], ONE, level=level)
    assert found.reason.startswith("kernel_singular")
    one = mf.certify_zero_loss(Bias(1), theta, LINE[:1], LINE[:1, 0] + 5, ONE, step=0.9, level=level)
    assert one.holds  # one input: the kernel is 1 and never moves
    assert one.quantities["rate"] == pytest.approx(0.9 / 4, rel=1e-6)
    assert mf.certify_zero_loss(Bias(1), theta, LINE[:1], ONE, ONE, step=1.1, level=level).reason.startswith("step")
    net, X, y, v = near_net(GaussBump(0.5), 2, 8, 2, 1.0, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        large = mf.certify_zero_loss(GaussBump(0.5), net, X, y, v, level=level)
    assert large.reason.startswith("residual_too_large")
    net, X, y, v = near_net(BallBump(1), 2, 8, 2, 0.5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mf.certify_zero_loss(BallBump(1), net, X, y, v, level=level).reason.startswith("radius_diverged")


def test_order_on_the_line_is_warned_of_with_floor_and_ratio():
    theta = mf.init_particles(BallBump(1), 4, 8, generator=seeded())
    with pytest.warns(UserWarning, match=r"not monotone .* E >= 0\.2875; .* here 0, stays below 1"):
        mf.certify_zero_loss(BallBump(1), theta, PLANE[:, :1], PLANE_Y, ONE)
    with pytest.warns(UserWarning, match="not monotone"):
        mf.certify_zero_loss(BallBump(1), theta, LINE, LINE[:, 0], -ONE)
    block, _, rule = bump_problem(0.1)
    with pytest.warns(UserWarning, match="not monotone"):
        mf.coupling_bound(block, LINE, -LINE[:, 0], ONE, *rule, S=0.1, step=0.1, L=4, M=4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"theta": torch.zeros(1, 2, 3, 3)}, TypeError, r"theta is torch\.float32; a certificate needs a float64"),
        ({"theta": [[1.0]]}, TypeError, "theta is list"),
        ({"theta": torch.zeros(2, 3, 2, dtype=F64)}, ValueError, r"\(S, L, M, 3\)"),
        ({"theta": torch.full((2, 3, 3), math.nan, dtype=F64)}, ValueError, "theta holds NaN"),
        ({"X": LINE.float()}, TypeError, r"X is torch\.float32"),
        ({"X": torch.full((4, 1), math.inf, dtype=F64)}, ValueError, "X holds NaN or infinity"),
        ({"X": torch.ones(4, 2, dtype=F64), "v": E1}, ValueError, r"\(n, 1\) are needed"),
        ({"y": LINE}, ValueError, "y has shape"),
        ({"weights": torch.full((3,), 0.5, dtype=F64)}, ValueError, "sum 1"),
        ({"step": -1.0}, ValueError, "step is -1.0"),
        ({"step": "h"}, ValueError, "step is 'h'"),
        ({"level": "exact"}, ValueError, "'measured' or 'certified'"),
        ({"constants": "best"}, ValueError, "'uniform' or 'local'"),
        (
            {"block": Squares(2), "theta": torch.zeros(1, 1, 6, dtype=F64), "X": PLANE, "v": E1, "level": "certified"},
            TypeError,
            "interval formulas",
        ),
    ],
)
def test_bad_input_of_the_certificate(change, error, words):
    good = {"block": BallBump(1), "theta": torch.zeros(2, 3, 3, dtype=F64), "X": LINE, "y": LINE[:, 0], "v": ONE}
    with pytest.raises(error, match=words):
        mf.certify_zero_loss(**(good | change))


def test_everything_a_reader_needs_is_in_one_module():
    assert set(mf.__all__) <= set(dir(mf))
    for name in (
        "forward",
        "adjoint",
        "rescaled_gradient",
        "init_particles",
        "BallBump",
        "limit_flow",
        "fv_flow",
        "train",
    ):
        assert name in mf.__all__
