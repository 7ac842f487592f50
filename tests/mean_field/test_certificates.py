"""The theorem on zero loss: each certificate against training, each refusal for its own reason."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import near_net, seeded

from companion import mean_field as mf
from companion.mean_field.blocks import BallBump, Bias, GaussBump, Linear, Squares, TanhMLP
from companion.mean_field.jacobian import centre, local_region, uniform_region

F64 = torch.float64
PLANE = torch.tensor([[-1.2, 0.3], [-0.4, -0.5], [0.4, 0.6], [1.2, -0.2]], dtype=F64)
PLANE_Y = torch.tensor([0.8, -0.6, 0.7, -0.9], dtype=F64)
E1 = torch.tensor([1.0, 0.0], dtype=F64)
ONE = torch.ones(1, dtype=F64)
LINE = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)


def star(theta):
    return float(theta.square().sum(-1).mean().sqrt())


# --- theorem B --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from([BallBump(1), BallBump(2), GaussBump(0.5), TanhMLP(2)]), st.booleans())
@settings(max_examples=25)
def test_where_zero_loss_is_certified_descent_keeps_its_promises(seed, block, equal):
    theta, X, y, v = near_net(block, 2, 8, 3, 1e-7, seed, scale=0.5)
    if equal:
        X, y = torch.cat([X, X[1:2]]), torch.cat([y, y[1:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = mf.certify_zero_loss(block, theta, X, y, v, step=1e-9).quantities.get("max_step", 0.1) * 0.99
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
    # uniform constants may take phi_2 for e^A, which local ones may not
    assert local.quantities["ratio"] <= 1.5 * q["ratio"]
    assert local_certain.quantities["ratio"] >= local.quantities["ratio"] * (1 - 1e-9)
    for name, upper in (("Lambda", True), ("ratio", True), ("movement", True), ("lambda", False), ("max_step", None)):
        a, b = q[name], certain.quantities[name]
        assert b == pytest.approx(a, rel=1e-3)
        if upper is not None:  # a smaller lambda is also a smaller ball, and may allow larger steps
            assert b >= a * (1 - 1e-9) if upper else b <= a * (1 + 1e-9)
    run = mf.train(block, theta, X, y, v, h, 40, progress=False)
    allowed = q["E_0"] * (1 - q["rate"]) ** torch.arange(41, dtype=F64)
    assert bool((run.loss[:, 0] <= allowed * (1 + 1e-9) + 1e-28).all())
    shift = run.weights[0] - theta
    assert star(shift[0]) <= q["movement"]
    assert float(torch.linalg.vector_norm(shift, dim=-1).max()) <= min(local.quantities["R_s"], q["R_s"])


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
    assert 0.14 < found.quantities["max_step"] < 0.2
    assert found.quantities["E_0"] < 1e-18
    certain = mf.certify_zero_loss(block, late, PLANE, PLANE_Y, E1, step=0.14, level="certified")
    assert certain.holds
    assert certain.status == "certified"
    h = certain.quantities["max_step"]
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
        ({"v": 1e200 * ONE, "theta": torch.ones(2, 3, 3, dtype=F64), "level": "certified"}, ValueError, "too large"),
        ({"v": 1e200 * ONE, "theta": torch.ones(2, 3, 3, dtype=F64)}, ValueError, "too large"),
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


# --- the numbers, written anew ----------------------------------------------------------------------------------------

CASES = [GaussBump(0.5), BallBump(2), TanhMLP(2), mf.Bias(2)]


@pytest.mark.parametrize("constants", ["uniform", "local"])
@pytest.mark.parametrize("step", [None, 0.05])
@pytest.mark.parametrize("block", CASES, ids=lambda b: b.name)
@pytest.mark.filterwarnings("ignore:y is not monotone")
def test_the_quantities_are_those_of_the_theorem(block, step, constants):
    samples = 1 if block.name == "Bias" else 3  # its kernel has rank one
    theta, X, y, v = near_net(block, 2, 16, samples, 1e-6, 5, scale=0.5)
    found = mf.certify_zero_loss(block, theta, X, y, v, step=step, constants=constants)
    certain = mf.certify_zero_loss(block, theta, X, y, v, step=step, constants=constants, level="certified")
    assert found.holds
    assert certain.holds
    q, n, factor = found.quantities, samples, 4 if step is None else 8
    r = float((mf.forward(block, theta, X)[-1, 0] @ v - y).norm())
    eigenvalues = torch.linalg.eigvalsh(mf.gram_kernel(block, theta, X, v)[0])
    lam, top = float(eigenvalues[0]), float(eigenvalues[-1])
    at = centre(block, theta[0], X, y, v, counts=torch.ones(n).long(), local=True)
    search = local_region if constants == "local" else uniform_region
    region = search(block, theta[0], at, n, float(v.norm()), factor=factor)
    Lambda, beta = float(region.Lambda), min(float(region.beta), math.sqrt(top) + math.sqrt(lam) / 2)
    expected = {
        "lambda": lam,
        "E_0": r**2 / (2 * n),
        "residual": r,
        "Lambda": Lambda,
        "ratio": factor * Lambda * r / lam,
        "rate": lam / (2 * n) if step is None else step * lam / (4 * n),
        "movement": factor / 2 * r / math.sqrt(lam),
        "R_s": region.radius,
        "beta": beta,
    } | ({} if step is None else {"max_step": n / (beta**2 + Lambda * r)})
    assert set(q) == set(expected)
    for name, value in expected.items():
        assert q[name] == pytest.approx(value, rel=1e-8, abs=0), name
    for name in set(q) - {"max_step", "beta"}:  # certified is strictly on the safe side; a smaller lambda allows these
        low, high = (certain, found) if name in ("lambda", "rate") else (found, certain)
        assert low.quantities[name] < high.quantities[name], name


@pytest.mark.parametrize("level", ["measured", "certified"])
@pytest.mark.parametrize("constants", ["uniform", "local"])
def test_the_largest_step_counts_both_terms_and_a_residual_beyond_the_theorem_is_refused(level, constants):
    # one sample, one particle that moves a number: K = kappa^2 for ever, so that h <= n / (beta^2 + Lambda |r|) is all
    theta, y = torch.zeros(1, 1, 1, dtype=F64), torch.tensor([0.3], dtype=F64)
    options = {"level": level, "constants": constants}
    bias = mf.certify_zero_loss(Bias(1), theta, ONE[None], y, 2 * ONE, step=0.2, **options).quantities
    assert bias["max_step"] == pytest.approx(1 / 4, rel=1e-9)
    assert bias["Lambda"] == pytest.approx(0, abs=1e-150)
    # f = theta z: beta and Lambda |r| both count
    X, y = torch.tensor([[1.0]], dtype=F64), torch.tensor([0.99], dtype=F64)
    line = mf.certify_zero_loss(Linear(1), theta, X, y, ONE, step=0.2, **options)
    q = line.quantities
    assert line.holds
    assert q["Lambda"] * q["residual"] > 0.01
    assert q["max_step"] == pytest.approx(1 / (q["beta"] ** 2 + q["Lambda"] * q["residual"]), rel=1e-12)
    far = mf.certify_zero_loss(Linear(1), theta, X, X[:, 0] + 0.05, ONE, step=1e-3, **options)
    assert far.reason.startswith("radius_diverged" if constants == "uniform" else "residual_too_large")
    assert far.quantities.get("ratio", 2) > 1


# --- numbers of any size, and what nobody gave ------------------------------------------------------------------------


@pytest.mark.parametrize("constants", ["uniform", "local"])
@pytest.mark.parametrize("level", ["measured", "certified"])
def test_a_readout_of_any_size_gives_the_same_answer(level, constants):
    block, theta = Linear(2), torch.full((2, 3, 1), 0.1, dtype=F64)
    X = torch.tensor([[1e10, 0.0]], dtype=F64)

    def asked(size, relative):
        v = torch.tensor([size, 0.0], dtype=F64)
        y = mf.forward(block, theta[None], X)[-1, 0] @ v * (1 + relative)
        return mf.certify_zero_loss(block, theta, X, y, v, level=level, constants=constants)

    ratios = {s: asked(s, 1e-3).quantities.get("ratio") for s in (1.0, 1e-100, 1e100)}
    assert ratios[1e-100] == pytest.approx(ratios[1.0], rel=1e-6) == pytest.approx(ratios[1e100], rel=1e-6)
    for size in (2.7e-162, 1.5e-162, 1e-200, 1e-308):  # the kernel's square root is a float, the kernel soon is not
        found = asked(size, 1e-3)
        assert not found.holds or found.quantities["ratio"] >= ratios[1.0] * (1 - 1e-9)
        if found.holds:
            assert found.quantities["beta"] >= math.sqrt(found.quantities["lambda"])


def test_weights_must_sum_to_one_up_to_rounding():
    w = torch.tensor([1 + 9.9e-10], dtype=F64)
    with pytest.raises(ValueError, match="of sum 1 are needed"):
        mf.certify_zero_loss(
            Bias(1), torch.zeros(1, 1, 1, dtype=F64), ONE[None], ONE, ONE, weights=w, level="certified"
        )


def test_a_block_without_constants_says_so():
    def relu_block(z, theta):
        return theta[..., :1] * torch.relu(theta[..., 1:2] * z + theta[..., 2:])

    theta = torch.randn(2, 4, 3, generator=seeded(), dtype=F64)
    for block in (mf.Custom(relu_block, 1, 3), mf.ReluMLP(1)):
        found = mf.certify_zero_loss(block, theta, 0.3 * ONE[None], ONE, ONE)
        assert found.reason.startswith("no_constants")
        assert not found.quantities


def test_a_block_of_ones_own_with_constants_gets_a_certificate():
    class Mine(mf.Block):
        d = k = 1

        def f(self, z, theta):
            return torch.sin(theta) + 0 * z

        def constants(self, theta=None, radius=None, reach=math.inf):
            return mf.Constants(1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0)

    theta = torch.zeros(2, 3, 1, dtype=F64)
    found = mf.certify_zero_loss(Mine(), theta, ONE[None], 1.05 * ONE, ONE, step=0.5)
    assert found.holds
    assert found.quantities["Lambda"] == pytest.approx(1.0)
    run = mf.train(Mine(), theta[None], ONE[None], 1.05 * ONE, ONE, 0.5, 20, progress=False)
    assert float(run.loss[-1]) <= found.quantities["E_0"] * (1 - found.quantities["rate"]) ** 20
    with pytest.raises(TypeError, match="interval formulas exist for"):
        mf.certify_zero_loss(Mine(), theta, ONE[None], 1.05 * ONE, ONE, level="certified")


def test_what_an_ensemble_promises_holds_for_every_member():
    block = GaussBump(0.3)
    nets = [near_net(block, 2, 16, 1, 0.0, 5, scale=c) for c in (0.5, 0.501, 0.498)]
    _, X, _, v = nets[0]
    theta = torch.cat([net[0] for net in nets])
    y = mf.forward(block, theta, X)[-1].mean(0) @ v
    found = mf.certify_zero_loss(block, theta, X, y, v, step=0.01)
    assert found.holds
    assert len(found.members) == 3
    for name, value in found.quantities.items():
        each = [m.quantities[name] for m in found.members]
        assert value == (min(each) if name in ("lambda", "rate", "max_step") else max(each))
    h = found.quantities["max_step"]
    assert all(m.holds for m in mf.certify_zero_loss(block, theta, X, y, v, step=h).members)


def test_a_refused_step_names_one_that_passes():
    block = BallBump(2)
    for seed in range(8):
        theta, X, y, v = near_net(block, 2, 16, 2, 1e-6, seed, scale=0.5)
        refused = mf.certify_zero_loss(block, theta, X, y, v, step=1e6)
        assert refused.reason.startswith("step_too_large: h = 1e+06, h_max = ")
        named = float(refused.reason.split("= ")[-1])
        assert mf.certify_zero_loss(block, theta, X, y, v, step=named).holds
        assert named > 0.98 * refused.quantities["max_step"]


# --- torch's own settings ---------------------------------------------------------------------------------------------


def everything(grad=False):
    """One call of each function of the face that takes tensors, as numbers."""
    block = BallBump(1)
    theta, X, y, v = (t.requires_grad_(grad) for t in near_net(block, 2, 4, 2, 0.3, 2))
    nodes, weights = mf.normal_rule(2, 2)
    p = torch.ones(1, 2, 1, dtype=F64).requires_grad_(grad)
    own = mf.Custom(lambda z, t: t[..., :1] * torch.tanh(z + t[..., 1:]), 1, 2)
    rest = {"times": [0.0, 0.1], "step": 0.1}
    made = {
        "forward": mf.forward(block, theta, X),
        "gradient": mf.rescaled_gradient(block, theta, X, y, v)[1],
        "own": mf.rescaled_gradient(own, theta[..., :2], X, y, v)[1],
        "train": mf.train(own, theta[..., :2], X, y, v, 0.1, 2, progress=False).loss,
        "gram": mf.gram_kernel(own, theta[..., :2], X, v),
        "variation": mf.first_variation(block, X[None], p, theta[:, 0]),
        "sup": mf.first_variation_sup(block, X[None], p),
        "regularity": mf.depth_regularity(theta),
        "crossing": mf.crossing_ratio(block, theta),
        "floor": mf.isotonic_floor(X[:, 0], y),
        "limit": mf.limit_flow(block, X, y, v, nodes, weights, **rest).loss,
        "density": mf.fv_flow(
            GaussBump(1.0), X, y, v, GaussBump.density, support=(-4.5, 4.5), cells=12, times=[0.1]
        ).loss,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for level in ("measured", "certified"):
            found = mf.certify_zero_loss(block, theta, X, y, v, step=0.1, level=level, constants="local")
            made[level] = [found.quantities["lambda"], found.quantities["residual"]]
        made["coupling"] = mf.coupling_bound(block, X, y, v, nodes, weights, S=0.1, step=0.1, L=4, M=4).quantities[
            "E_S"
        ]
    return {name: torch.as_tensor(value, dtype=F64) for name, value in made.items()}


@pytest.mark.parametrize("setting", ["requires_grad", "inference_mode", "float16", "bfloat16", "float64", "no_grad"])
def test_no_setting_of_torch_changes_an_answer(setting):
    expected = everything()
    before = torch.get_default_dtype()
    try:
        if setting == "requires_grad":
            found = everything(grad=True)
        elif setting in ("inference_mode", "no_grad"):
            with getattr(torch, setting)():
                found = everything()
        else:
            torch.set_default_dtype(getattr(torch, setting))
            found = everything()
    finally:
        torch.set_default_dtype(before)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
