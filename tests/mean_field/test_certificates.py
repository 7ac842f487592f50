"""The theorem on zero loss: each certificate against training, each refusal for its own reason."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import near_net, seeded

from companion import mean_field as mf
from companion.mean_field.blocks import BallBump, Bias, GaussBump, Squares, TanhMLP

F64 = torch.float64
PLANE = torch.tensor([[-1.2, 0.3], [-0.4, -0.5], [0.4, 0.6], [1.2, -0.2]], dtype=F64)
PLANE_Y = torch.tensor([0.8, -0.6, 0.7, -0.9], dtype=F64)
E1 = torch.tensor([1.0, 0.0], dtype=F64)
ONE = torch.ones(1, dtype=F64)
LINE = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)


def star(theta):
    return float(theta.square().sum(-1).mean().sqrt())


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
    assert found.reason == f"{found.members[1].reason} (network 1)"
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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"theta": torch.zeros(1, 2, 3, 3)}, TypeError, r"theta has dtype torch\.float32; torch\.float64 is needed"),
        ({"theta": [[1.0]]}, TypeError, "theta is a list"),
        ({"theta": torch.zeros(2, 3, 2, dtype=F64)}, ValueError, r"\(\.\.\., M, 3\)"),
        ({"theta": torch.full((2, 3, 3), math.nan, dtype=F64)}, ValueError, r"theta\[0, 0, 0\] is nan"),
        ({"X": LINE.float()}, TypeError, r"X has dtype torch\.float32"),
        ({"X": torch.full((4, 1), math.inf, dtype=F64)}, ValueError, r"X\[0, 0\] is inf"),
        ({"X": torch.ones(4, 2, dtype=F64), "v": E1}, ValueError, r"X has shape \(4, 2\); \(n, 1\)"),
        ({"y": LINE}, ValueError, "y has shape"),
        ({"weights": torch.full((3,), 0.5, dtype=F64)}, ValueError, "sum 1"),
        ({"step": -1.0}, ValueError, "step is -1.0"),
        ({"step": "h"}, TypeError, "step is 'h'"),
        ({"block": torch.nn.Linear(1, 1)}, ValueError, "block is a Linear; a Block is needed"),
        ({"theta": torch.zeros(1, 1, 2, 3, 3, dtype=F64)}, ValueError, r"\(S, L, M, k\) is needed"),
        ({"y": LINE[:3, 0]}, ValueError, r"y has shape \(3,\); \(n,\) with n = 4, as in X"),
        ({"X": 1e200 * LINE, "block": mf.Linear(1), "theta": torch.ones(2, 3, 1, dtype=F64)}, ValueError, "too large"),
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
