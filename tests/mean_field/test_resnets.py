"""Mean-field ResNets against automatic differentiation, closed forms, and the numbers that two programs agree on."""

import math

import pytest
import torch

from companion.mean_field import resnets
from companion.mean_field.blocks import BallBump, Bias, Custom, GaussBump, Linear, ReluMLP, Squares, TanhMLP


def float64(x):
    return torch.tensor(x, dtype=torch.float64)


PLANE = float64([[-1.2, 0.3], [-0.4, -0.5], [0.4, 0.6], [1.2, -0.2]]), float64([0.8, -0.6, 0.7, -0.9]), float64([1, 0])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def example(block, S=2, L=3, M=4, n=5, seed=0):
    g = seeded(seed)
    randn = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((S, L, M, block.k), (n, block.d), (n,))]
    w = torch.rand(M, generator=g, dtype=torch.float64) + 0.1
    return (0.5 * randn[0], randn[1], randn[2], torch.ones(block.d, dtype=torch.float64), w / w.sum())


def energy(block, theta, X, y, v, w):
    z = X.expand(len(theta), *X.shape)
    for l in range(theta.shape[1]):
        z = z + torch.einsum("snmd,m->snd", block.f(z[:, :, None], theta[:, l, None]), w) / theta.shape[1]
    return 0.5 * (z @ v - y).square().mean(1)


@pytest.mark.parametrize("block", [BallBump(2), GaussBump(), TanhMLP(2), ReluMLP(2), Linear(), Squares(2)], ids=str)
@pytest.mark.parametrize("equal", [True, False])
def test_rescaled_gradient_equals_autograd(block, equal):
    theta, X, y, v, w = example(block)
    E, G = resnets.rescaled_gradient(block, theta, X, y, v, None if equal else w)
    w = torch.full_like(w, 0.25) if equal else w
    live = theta.clone().requires_grad_()
    slow = energy(block, live, X, y, v, w)
    (grad,) = torch.autograd.grad(slow.sum(), live)
    torch.testing.assert_close(E, slow.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(G, grad * 3 / w[:, None], rtol=1e-12, atol=1e-12)
    if equal:
        torch.testing.assert_close(G, 3 * 4 * grad, rtol=1e-12, atol=1e-12)  # L M times the gradient


def test_chunks_and_kept_panels_change_nothing(monkeypatch):
    block = BallBump(2)
    theta, X, y, v, w = example(block, S=5)
    E, G = resnets.rescaled_gradient(block, theta, X, y, v, w)
    monkeypatch.setattr(resnets, "_KEEP_BYTES", {"cpu": 0})
    monkeypatch.setattr(resnets, "_PANEL_BYTES", {"cpu": 400})
    assert resnets.default_chunk(5, 3, 4, X) == (2, False)
    memory = torch.full_like(G, math.nan)  # whatever stands there
    again = resnets.rescaled_gradient(block, theta, X, y, v, w, out=memory)
    assert again[1] is memory
    torch.testing.assert_close(again[0], E, rtol=1e-13, atol=0)
    torch.testing.assert_close(again[1], G, rtol=1e-12, atol=1e-14)


def test_forward_and_adjoint():
    block = BallBump(2)
    theta, X, y, v, w = example(block)
    z, p = resnets.adjoint(block, theta, X, v.expand(2, 5, 2), w)
    torch.testing.assert_close(z, resnets.forward(block, theta, X, w))
    assert z.shape == (4, 2, 5, 2)
    E = 0.5 * (z[-1] @ v - y).square().mean(1)
    torch.testing.assert_close(E, energy(block, theta, X, y, v, w), rtol=1e-13, atol=0)
    h, e = 1e-6, float64([0.3, -0.8])
    outputs = [resnets.forward(block, theta, X + s * h * e, w)[-1] @ v for s in (1, -1)]
    torch.testing.assert_close((outputs[0] - outputs[1]) / (2 * h), p[0] @ e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("L", "M"), [(1, 1), (3, 2), (5, 7)])
def test_bias_is_solved_by_hand(L, M):
    block, h = Bias(), 0.3
    theta = resnets.init_particles(block, L, M, S=2, depth="iid", generator=seeded(0))
    one = resnets.train(block, theta, float64([[0.7]]), float64([2.0]), float64([1]), h, 20)
    k = torch.arange(21, dtype=torch.float64)[:, None]
    torch.testing.assert_close(one.loss, one.loss[0] * (1 - h) ** (2 * k), rtol=1e-10, atol=0)
    X, y = float64([[0.7], [-0.2]]), float64([2.0, 0.5])
    two = resnets.train(block, theta, X, y, float64([1]), h, 200)
    torch.testing.assert_close(two.loss[-1], float64([0.5 * ((-1.3 + 0.7) / 2) ** 2] * 2), rtol=1e-10, atol=0)


def test_linear_cannot_change_the_sign():
    theta = torch.zeros(1, 4, 3, 1, dtype=torch.float64)
    run = resnets.train(Linear(), theta, float64([[1.0]]), float64([-1.0]), float64([1]), 0.02, 1500, every=1500)
    assert 0.5 < float(run.loss[-1]) < 0.56
    assert float(run.loss[0]) == 2.0


def test_squares_cannot_go_down():
    theta = resnets.init_particles(Squares(), 8, 16, generator=seeded(0))
    run = resnets.train(Squares(), theta, float64([[1.0]]), float64([0.0]), float64([1]), 0.2, 200, every=200)
    assert 0.5 <= float(run.loss[-1]) < 0.5 + 1e-3


@pytest.mark.slow
def test_plane_reaches_zero_loss():
    X, y, v = PLANE
    theta = resnets.init_particles(BallBump(2), 16, 64, S=3, generator=seeded(0))
    run = resnets.train(BallBump(2), theta, X, y, v, 0.2, 2500, every=250)
    torch.testing.assert_close(run.loss[0], float64([1.0675] * 3), rtol=1e-14, atol=0)
    s50, s100, s500 = run.loss[1], run.loss[2], run.loss[-1]
    assert (s50 > 0.028 / 1.5).all()
    assert (s50 < 0.074 * 1.5).all()
    assert (s100 > 0.0016 / 1.5).all()
    assert (s100 < 0.005 * 1.5).all()
    assert (s500 < 1e-9).all()
    assert not torch.equal(run.weights[0], theta)
    assert theta[..., 0].abs().max() == 0  # the caller's particles stay as they are


def test_initial_depths():
    block = BallBump(2)
    constant, iid = (
        resnets.init_particles(block, 6, 300, S=2, depth=depth, generator=seeded(3)) for depth in ("constant", "iid")
    )
    assert (constant == constant[:, :1]).all()
    assert (iid[:, 0] != iid[:, 1])[..., 1:].all()
    for theta in (constant, iid):
        assert theta.shape == (2, 6, 300, 5)
        assert theta[..., 1:].std(dim=2).mean() == pytest.approx(1, abs=0.05)
    alone = resnets.init_particles(block, 6, 300, depth="iid", generator=seeded(3))
    assert torch.equal(alone[0], iid[0])
    assert resnets.init_particles(block, 1, 2, generator=seeded(0), dtype=torch.float32).dtype == torch.float32


def test_weights_stand_for_copies():
    """Two equal particles are one of double weight, during all of training."""
    X, y, v = PLANE
    block = BallBump(2)
    few = resnets.init_particles(block, 4, 3, generator=seeded(0))
    w = float64([0.25, 0.25, 0.5])
    many = torch.cat([few, few[:, :, 2:]], 2)
    a = resnets.train(block, few, X, y, v, 0.2, 50, weights=w)
    b = resnets.train(block, many, X, y, v, 0.2, 50)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(a.weights[0], b.weights[0][:, :, :3], rtol=1e-9, atol=1e-12)


def test_tie_and_decay():
    X, y, v = PLANE
    block = BallBump(2)
    theta = resnets.init_particles(block, 3, 4, generator=seeded(0))

    def copy(particles):
        particles[:, :, 2:] = particles[:, :, :2]

    run = resnets.train(block, theta, X, y, v, 0.1, 5, tie=copy)
    assert torch.equal(run.weights[0][:, :, 2:], run.weights[0][:, :, :2])
    decayed = resnets.train(block, theta, X, y, v, 0.1, 1, decay=lambda s: 0.5 + s)
    _, G = resnets.rescaled_gradient(block, theta, X, y, v)
    torch.testing.assert_close(decayed.weights[0], theta - 0.1 * (G + theta))


def test_monitors():
    X, y, v = PLANE
    block = BallBump(2)
    theta = resnets.init_particles(block, 3, 4, S=2, generator=seeded(0))
    run = resnets.train(block, theta, X, y, v, 0.2, 6, every=3, observe=resnets.monitors(block, X, y, v))
    theta = run.weights[0]
    torch.testing.assert_close(run.observed["moment"][-1], theta.square().sum(-1).mean((1, 2)))
    torch.testing.assert_close(run.observed["u2"][-1], theta[..., 0].square().mean((1, 2)))
    assert run.observed["u2"][0].abs().max() == 0
    z, p = run.observed["z"], run.observed["p"]
    assert z.shape == p.shape == (3, 4, 2, 4, 2)
    torch.testing.assert_close(z[0], X.expand(4, 2, 4, 2))
    torch.testing.assert_close(p[:, -1], (z[:, -1] @ v - y)[..., None] * v)


def test_a_run_resumes_to_the_same_bits(tmp_path):
    X, y, v = PLANE
    block = GaussBump(1.5)
    X = X[:, :1].contiguous()
    theta = resnets.init_particles(block, 4, 8, S=3, generator=seeded(0))
    whole = resnets.train(block, theta, X, y, v[:1], 0.05, 40, every=5)

    class Killed(Exception):
        pass

    class Sum:
        """Two of them are one observable: an object that can be called is known by its class."""

        def __init__(self, until):
            self.until = until

        def __call__(self, state):
            if state.step == self.until:
                raise Killed
            return state.weights[0].sum((1, 2, 3))

    options = {"every": 5, "checkpoint": tmp_path / "run", "checkpoint_every": 10}
    with pytest.raises(Killed):
        resnets.train(block, theta, X, y, v[:1], 0.05, 40, observe={"sum": Sum(25)}, **options)
    total = {"sum": Sum(None)}
    resumed = resnets.train(block, theta, X, y, v[:1], 0.05, 40, observe=total, **options)
    assert torch.equal(resumed.weights[0], whole.weights[0])
    assert torch.equal(resumed.residual, whole.residual)
    with pytest.raises(ValueError, match="another block"):
        resnets.train(GaussBump(1.4), theta, X, y, v[:1], 0.05, 40, observe=total, **options)


def test_a_checkpoint_knows_functions_by_what_they_are(tmp_path):
    X, y, v = PLANE
    theta = 0.1 * torch.randn(1, 2, 3, 2, generator=seeded(0), dtype=torch.float64)

    def run(c, **options):
        def f(z, t):
            return t[..., :2] * torch.cos(c * z)

        return resnets.train(Custom(f, 2, 2), theta, X, y, v, 0.05, 6, checkpoint=tmp_path / "run", **options)

    done = run(1.0)
    assert torch.equal(run(1.0).weights[0], done.weights[0])  # another function object of the same source and value
    with pytest.raises(ValueError, match="another block"):
        run(2.0)
    with pytest.raises(ValueError, match="another decay"):
        run(1.0, decay=lambda s: 0.1)


def test_energy_identity():
    """E' = - int int |gradient|^2 along the flow; here for the discrete depth, by central differences in s."""
    X, y, v = PLANE
    block = BallBump(2)
    theta = 0.5 * torch.randn(1, 4, 6, 5, generator=seeded(0), dtype=torch.float64)
    _, G = resnets.rescaled_gradient(block, theta, X, y, v)
    speed = -G.square().sum(-1).mean((1, 2))
    gaps = []
    for h in (1e-2, 1e-3):
        ends = [resnets.rescaled_gradient(block, theta - s * h * G, X, y, v)[0] for s in (1, -1)]
        gaps.append(float((ends[0] - ends[1]) / (2 * h) - speed))
    assert abs(gaps[1]) < abs(gaps[0]) / 50


B = BallBump(2)
THETA = torch.zeros(1, 2, 3, 5, dtype=torch.float64)
X4, Y4, V = PLANE
NAN = float64([[math.nan, 0.0]])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: resnets.forward(B, THETA[0], X4), ValueError, r"theta has shape \(2, 3, 5\); \(S, L, M, k\) is"),
        (lambda: resnets.forward(B, THETA[..., :4], X4), ValueError, r"\(\.\.\., M, 5\) is needed for BallBump"),
        (
            lambda: resnets.forward(B, THETA.int(), X4),
            TypeError,
            "theta has dtype torch.int32; torch.float32 or torch.float64",
        ),
        (lambda: resnets.forward(B, THETA, X4[:, :1]), ValueError, r"X has shape \(4, 1\); \(n, 2\) is needed"),
        (lambda: resnets.forward(B, THETA, X4.float()), ValueError, "make them equal"),
        (lambda: resnets.forward(B, THETA, NAN), ValueError, r"X\[0, 0\] is nan"),
        (lambda: resnets.forward(B, THETA / 0, X4), ValueError, r"theta\[0, 0, 0, 0\] is nan"),
        (lambda: resnets.forward(B, THETA, X4, float64([0.5, 0.5])), ValueError, r"weights has shape \(2,\)"),
        (lambda: resnets.forward(B, THETA, X4, float64([0.5, 0.5, 0.5])), ValueError, "weights sum to 1.5"),
        (lambda: resnets.forward(B, THETA, X4, float64([1.5, -0.5, 0])), ValueError, "the smallest is -0.5"),
        (lambda: resnets.adjoint(B, THETA, X4, V), ValueError, r"p_L has shape \(2,\); \(S, n, d\)"),
        (
            lambda: resnets.rescaled_gradient(B, THETA, X4, Y4, V, out=THETA[0]),
            ValueError,
            r"out is \(2, 3, 5\) torch.float64 on cpu; \(1, 2, 3, 5\)",
        ),
        (lambda: resnets.train(B, THETA, X4, Y4, V, 0.0, 3), ValueError, "step is 0.0; a positive finite number"),
        (lambda: resnets.train(B, THETA, X4, Y4, V, True, 3), TypeError, "step is True"),
        (lambda: resnets.train(B, THETA, X4, Y4, V[:1], 0.1, 3), ValueError, r"v has shape \(1,\)"),
        (lambda: resnets.train(B, THETA, X4, Y4, 0 * V, 0.1, 3), ValueError, "a nonzero vector is needed"),
        (lambda: resnets.train(B, THETA, X4, Y4, "e1", 0.1, 3), TypeError, "v is 'e1'"),
        (
            lambda: resnets.train(B, THETA, X4, Y4[:, None], V, 0.1, 3),
            ValueError,
            r"y has shape \(4, 1\); \(n,\) is needed",
        ),
        (lambda: resnets.train(B, THETA, X4, [1.0], V, 0.1, 3), TypeError, "y is a list; a torch tensor is needed"),
        (
            lambda: resnets.rescaled_gradient(B, THETA, torch.cat([X4, X4[1:2]]), torch.cat([Y4, Y4[:1]]), V),
            ValueError,
            "X has equal rows 1 and 4 with targets -0.6 and 0.8; no network can fit both",
        ),
        (lambda: resnets.init_particles(B, 0, 3, generator=seeded(0)), ValueError, "L is 0; an integer >= 1"),
        (lambda: resnets.init_particles(B, 1, 3, depth="deep", generator=seeded(0)), ValueError, "depth is 'deep'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_holds_at_least_one_network(chunk):
    with pytest.raises(ValueError, match=f"chunk is {chunk}; an integer >= 1 is needed"):
        resnets.train(B, THETA, X4, Y4, V, 0.1, 2, chunk=chunk)


def test_equal_rows_with_equal_targets_are_accepted():
    assert resnets.clash(torch.cat([X4, X4[1:2]]), torch.cat([Y4, Y4[1:2]])) is None
    assert resnets.clash(torch.cat([0 * X4[:1], -0 * X4[:1]]), Y4[:2]) == (0, 1)
