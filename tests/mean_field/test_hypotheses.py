"""What is asked of blocks, particles and data: against training, other programs, and hand computation."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import near_net, seeded
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from companion import mean_field as mf
from companion.mean_field.blocks import HYPOTHESES, RBF, BallBump, Bias, GaussBump, Linear, Squares, TanhMLP
from companion.mean_field.resnets import adjoint

F64 = torch.float64
PLANE = torch.tensor([[-1.2, 0.3], [-0.4, -0.5], [0.4, 0.6], [1.2, -0.2]], dtype=F64)
PLANE_Y = torch.tensor([0.8, -0.6, 0.7, -0.9], dtype=F64)
E1 = torch.tensor([1.0, 0.0], dtype=F64)
ONE = torch.ones(1, dtype=F64)
LINE = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)


# --- kernel, first variation, regularity ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [BallBump(2), GaussBump(1.3)], ids=lambda b: b.name)
def test_the_gradient_of_the_first_variation_moves_the_particles(block):
    theta, X, y, v = near_net(block, 3, 5, 4, 0.7, 3)
    r = mf.forward(block, theta, X)[-1, 0] @ v - y
    z, p = adjoint(block, theta, X, (r[:, None] * v)[None])
    leaf = theta[0].clone().requires_grad_()
    values = mf.first_variation.__wrapped__(block, z[:-1, 0], p[1:, 0], leaf)  # which keeps the gradient
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
    p, block = ((PLANE @ E1 - PLANE_Y)[:, None] * E1)[None], BallBump(2)

    def minus(omega):
        theta = torch.tensor([1.0, *omega], dtype=F64)
        return -abs(float((block.f(PLANE, theta) * p[0]).sum()) / 4)

    starts = torch.randn(8, 4, generator=seeded(1), dtype=F64).tolist()
    best = max(-minimize(minus, start, method="Nelder-Mead", options={"maxfev": 2000}).fun for start in starts)
    assert float(mf.first_variation_sup(block, PLANE[None], p)[0]) == pytest.approx(best, rel=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_of_the_small_functions():
    p = torch.zeros(1, 4, 2, dtype=F64)
    with pytest.raises(ValueError, match="block is a GaussBump; a BallBump is needed"):
        mf.first_variation_sup(GaussBump(1.0), PLANE[None, :, :1], p[:, :, :1])
    with pytest.raises(TypeError, match="BallBump alone"):
        mf.first_variation_sup(type("Mine", (BallBump,), {})(2), PLANE[None], p)
    with pytest.raises(ValueError, match="d <= 3"):
        mf.first_variation_sup(BallBump(4), torch.zeros(1, 2, 4, dtype=F64), torch.zeros(1, 2, 4, dtype=F64))
    with pytest.raises(ValueError, match=r"y has shape \(3,\); \(n,\) with n = 4, as in x"):
        mf.isotonic_floor(LINE[:, 0], PLANE_Y[:3])
    with pytest.raises(ValueError, match=r"x\[0\] is nan"):
        mf.isotonic_floor(torch.tensor([math.nan], dtype=F64), ONE)


def test_depth_regularity_tells_smooth_from_independent_layers():
    block = GaussBump(1.0)
    found = {
        (kind, L): float(mf.depth_regularity(mf.init_particles(block, L, 256, depth=kind, generator=seeded()))[0])
        for kind, L in itertools.product(("constant", "iid"), (16, 64))
    }
    assert found["constant", 16] == found["constant", 64] == 0
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
    mean_square = (0.8**2 + 0.6**2 + 0.7**2 + 0.9**2) / 4  # all targets fall to their mean, 0
    assert mf.isotonic_floor(PLANE[:, 0], PLANE_Y) == pytest.approx(mean_square / 2)
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
    assert good.status == "assumed"  # proved on paper; nothing was computed
    assert good.quantities["u2"] == 55.0
    assert [a.name for a in good.assumptions][: len(HYPOTHESES)] == list(HYPOTHESES)
    assert {a.status for a in good.assumptions} == {"assumed"}
    bad = mf.audit(GaussBump(1.0))
    assert not bad.holds
    assert bad.reason.startswith("hypotheses fail: universality")
    assert bad.reason.endswith("not checkable: Sard")
    for block in (RBF(1), TanhMLP(1), Linear(1), Bias(1), Squares(1)):
        assert not mf.audit(block).holds
    json.loads(good.to_json())


def test_audit_of_what_nobody_looked_at_shows_nothing():
    def relu_block(z, theta):
        return theta[..., :1] * torch.relu(theta[..., 1:2] * z + theta[..., 2:])

    class Mine(BallBump):
        def draw(self, shape, generator):
            return 100 * torch.randn(*shape, self.k, generator=generator, dtype=F64)

    for block in (mf.Custom(relu_block, 1, 3), mf.Custom(lambda z, theta: 0 * z * theta, 1, 1), Mine(2)):
        found = mf.audit(block)
        assert not found.holds
        assert found.reason == f"not checkable: {', '.join(HYPOTHESES)}"
        assert not any(row.holds for row in found.assumptions[: len(HYPOTHESES)])
