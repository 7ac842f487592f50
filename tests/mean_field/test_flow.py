"""The limit flow against finite nets, closed forms and quadrature by other means."""

import itertools
import math

import numpy as np
import pytest
import torch

from companion.mean_field import flow as particles
from companion.mean_field.blocks import BallBump, Bias, GaussBump, Linear, TanhMLP
from companion.mean_field.flow import Depth, limit_flow

F64 = torch.float64
X = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)
Y = torch.tensor([-1.5, -1.0, 0.1, 1.5], dtype=F64)
ONE = torch.ones(1, dtype=F64)


def bump_rule(m=48):
    return particles.density_rule(GaussBump.density, (-3.0, 3.0), m)


def layered(block, X, y, v, theta, weights, L, steps, h):
    """Gradient descent on L Euler layers of weighted particles, by automatic differentiation: the slow twin."""
    theta = theta.expand(L, -1, -1).clone()
    losses = []
    for j in range(steps + 1):
        leaf = theta.clone().requires_grad_()
        z = X
        for layer in leaf:
            z = z + torch.einsum("nmd,m->nd", block.f(z[:, None], layer[None]), weights) / L
        loss = 0.5 * (z @ v - y).square().mean()
        losses.append(loss.item())
        if j < steps:
            (g,) = torch.autograd.grad(loss, leaf)
            theta = theta - h * L * g / weights[:, None]
    return losses, theta


# --- quadrature -------------------------------------------------------------------------------------------------------


def test_density_rule_has_the_moments_of_the_law():
    nodes, weights = bump_rule(12)
    for power, moment in ((0, 1.0), (2, 9 / 7), (4, 81 * 3 / (7 * 9))):  # of Beta(3, 3) on [-3, 3]
        assert float((weights * nodes[:, 0] ** power).sum()) == pytest.approx(moment, rel=1e-13)
    assert float((weights * nodes[:, 0]).sum()) == pytest.approx(0, abs=1e-15)


def test_normal_rule_agrees_with_a_rule_in_polar_coordinates_and_with_a_large_sample():
    block = BallBump(1)

    def value(theta, weights):
        _, b, c, _ = block.chart(theta)
        return float((weights * (b * b * torch.exp(-((0.7 - 3 * c) ** 2)) + c.cos())[:, 0]).sum())

    # omega = r (cos a, sin a): Gauss-Laguerre in r^2 / 2, trapezoids in a
    half, w = (torch.from_numpy(v) for v in np.polynomial.laguerre.laggauss(40))
    angle = 2 * math.pi * torch.arange(40, dtype=F64) / 40
    circle = torch.stack([0 * angle, angle.cos(), angle.sin()], dim=1)
    fine = value(((2 * half).sqrt()[:, None, None] * circle).flatten(0, 1), w.repeat_interleave(40) / 40)
    assert value(*particles.normal_rule(2, 60)) == pytest.approx(fine, abs=1e-4)
    sample = block.draw((200_000,), torch.Generator().manual_seed(0))
    assert value(sample, torch.full((len(sample),), 1 / len(sample), dtype=F64)) == pytest.approx(fine, abs=4e-3)


def test_normal_rule_has_the_moments_of_the_normal_law():
    theta, weights = particles.normal_rule(4, 5)
    assert theta.shape == (625, 5)
    assert bool((theta[:, 0] == 0).all())
    omega = theta[:, 1:]
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
    assert float((weights * omega.square().sum(1).square()).sum()) == pytest.approx(4 * 6, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: particles.density_rule(torch.cos, (1.0, -1.0), 4), "a < b"),
        (lambda: particles.density_rule(torch.sin, (-1.0, 1.0), 4), "a density is needed"),
        (lambda: particles.density_rule(torch.zeros_like, (-1.0, 1.0), 4), "a density is needed"),
        (lambda: particles.normal_rule(8, 100), "10\\^7"),
        (lambda: Depth.chebyshev(1), "at least 2"),
    ],
)
def test_bad_rules_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- depth ------------------------------------------------------------------------------------------------------------


def test_depth_integrates_and_interpolates_polynomials_exactly():
    rule = Depth.chebyshev(9)
    for power in range(9):
        values = rule.t**power
        assert torch.allclose(rule.Q @ values, rule.t ** (power + 1) / (power + 1), atol=1e-15)
        at = torch.tensor([0.0, 0.123, 0.5, 0.987, 1.0], dtype=F64)
        assert torch.allclose(rule.interpolate(values, at), at**power, atol=1e-14)


def test_states_and_adjoint_of_a_linear_field_are_exponentials():
    rule = Depth.chebyshev(15)
    G = torch.tensor([[0.3, -1.1], [0.8, 0.2]], dtype=F64)
    start = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.1, 0.1]], dtype=F64)
    rate = 1 + rule.t[:, None, None]  # dZ/dt = (1 + t) G Z

    def field(Z):
        return rate * (Z @ G.T), (rate[..., None] * G).expand(len(rule.t), 3, 2, 2)

    Z, J = rule.states(field, start, start.expand(len(rule.t), -1, -1))
    P = rule.adjoint(J, start)
    for j, t in enumerate(rule.t.tolist()):
        through = torch.linalg.matrix_exp((t + t * t / 2) * G)
        onward = torch.linalg.matrix_exp((1.5 - t - t * t / 2) * G)
        assert torch.allclose(Z[j], start @ through.T, atol=1e-12)
        assert torch.allclose(P[j], start @ onward, atol=1e-12)


def test_states_that_do_not_settle_are_refused():
    rule = Depth.chebyshev(3)
    with pytest.raises(ValueError, match="too few for this field, or X, y or v are too large"):
        rule.states(lambda Z: (Z**2 * 50, torch.diag_embed(Z * 100)), X, X.expand(3, -1, -1) * 1.0)


# --- the flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [GaussBump(1.5), TanhMLP(1), BallBump(1)], ids=lambda b: b.name)
def test_limit_of_gradient_descent_is_what_deep_nets_approach(block):
    theta = block.draw((6,), torch.Generator().manual_seed(1)) * 0.7 + 0.1
    weights = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.15, 0.1], dtype=F64)
    flow = limit_flow(block, X, Y, ONE, theta, weights, times=[0.0, 0.4], step=0.1, method="gd")
    errors = {}
    for L in (16, 32, 64):
        losses, _ = layered(block, X, Y, ONE, theta, weights, L, 4, 0.1)
        errors[L] = np.abs(np.array([losses[0], losses[-1]]) - flow.loss.numpy())
    richardson = [abs(2 * b - a) for a, b in zip(errors[32], errors[64], strict=True)]
    assert np.all(errors[64] < 0.6 * errors[32])
    assert np.all(errors[32] < 0.6 * errors[16])
    assert max(richardson) < 0.2 * max(errors[64])


def test_flow_has_converged_in_depth_in_time_and_in_particles():
    def final(m=32, **options):
        defaults = {"times": [1.0], "step": 0.1, "depth": 13}
        return limit_flow(GaussBump(1.5), X, Y, ONE, *bump_rule(m), **(defaults | options)).loss.item()

    base = final()
    theta, weights = bump_rule(32)  # a finite net of the same particles, extrapolated twice in its depth
    deep = [layered(GaussBump(1.5), X, Y, ONE, theta, weights, L, 100, 0.01)[0][-1] for L in (8, 16, 32)]
    once = [2 * b - a for a, b in itertools.pairwise(deep)]
    by_descent = limit_flow(GaussBump(1.5), X, Y, ONE, theta, weights, times=[1.0], step=0.01, method="gd").loss.item()
    assert (4 * once[1] - once[0]) / 3 == pytest.approx(by_descent, abs=1e-6)
    assert by_descent == pytest.approx(base, rel=0.02)
    assert final(depth=19) == pytest.approx(base, abs=1e-10)
    assert final(m=96) == pytest.approx(base, abs=1e-7)
    assert final(step=0.05) == pytest.approx(base, abs=1e-7)
    # the fourth order of Runge-Kutta
    coarse, fine = (abs(final(step=h) - final(step=0.02)) for h in (0.2, 0.1))
    assert 10 < coarse / fine < 25


def test_energy_identity_along_the_flow():
    block, (theta, weights) = GaussBump(1.5), bump_rule()
    h = 1e-3
    flow = limit_flow(block, X, Y, ONE, theta, weights, times=[0.5 - h, 0.5, 0.5 + h], step=0.05)
    slope = (flow.loss[2] - flow.loss[0]) / (2 * h)
    gradient = block.pull(flow.Z[1], flow.theta[1], weights, flow.P[1])[1] / len(Y)
    dissipated = (gradient.square().sum(-1) @ weights) @ Depth.chebyshev(13).Q[-1]
    assert float(slope) == pytest.approx(-float(dissipated), rel=1e-5)


def test_bias_and_linear_blocks_have_their_closed_forms():
    theta, weights = torch.zeros(1, 1, dtype=F64), ONE
    bias = limit_flow(Bias(1), X, Y, ONE, theta, weights, times=[1.0, 12.0], step=0.2)
    r = X[:, 0] - Y
    spread = 0.5 * float(r.var(unbiased=False))
    expected = [spread + 0.5 * float(r.mean()) ** 2 * math.exp(-2 * s) for s in (1.0, 12.0)]
    assert bias.loss.tolist() == pytest.approx(expected, abs=1e-5)
    # linear, x = 1, y = -1: z = e^c with dc/ds = -(z + 1) z; 1/z - log(1 + 1/z) = s + 1 - log 2
    line = limit_flow(Linear(), ONE[None], -ONE, ONE, theta, weights, times=[1.0, 20.0], step=0.1)
    for s, z in zip((1.0, 20.0), line.Z[:, -1, 0, 0].tolist(), strict=True):
        assert 1 / z - math.log1p(1 / z) == pytest.approx(s + 1 - math.log(2), rel=1e-5)
    assert 0.5 < line.loss[1].item() < 0.56


def test_regulariser_lifts_the_loss_before_it_fades():
    flow = limit_flow(GaussBump(1.5), X, Y, ONE, *bump_rule(), times=[0.0, 2.0, 10.0, 40.0], step=0.2, decay=1.0)
    assert flow.loss[1] > flow.loss[0] > flow.loss[2] > flow.loss[3] > 0
    energy = [
        e + math.exp(-s) * float((t.square().sum(-1) @ flow.weights) @ Depth.chebyshev(13).Q[-1])
        for e, s, t in zip(flow.loss.tolist(), flow.times.tolist(), flow.theta, strict=True)
    ]
    assert energy == sorted(energy, reverse=True)


def test_order_on_the_line_is_kept_and_the_flow_interpolates():
    flow = limit_flow(GaussBump(1.5), X, -Y, ONE, *bump_rule(), times=[0.0, 5.0], step=0.1)
    between = Depth.chebyshev(13).interpolate(flow.Z.transpose(0, 1), torch.linspace(0, 1, 50, dtype=F64))
    assert bool((between[..., 0].diff(dim=-1) > 0).all())
    assert torch.allclose(flow.particles_at(flow.t), flow.theta, atol=1e-14)
    assert flow.particles_at(torch.tensor([0.25], dtype=F64)).shape == (2, 1, 48, 1)


def test_particles_may_differ_in_depth_and_weights_may_be_split():
    block, (theta, weights) = GaussBump(1.0), bump_rule(8)
    same = limit_flow(block, X, Y, ONE, theta.expand(13, -1, -1), weights, times=[0.5], step=0.1)
    twice = torch.cat([theta, theta]), torch.cat([weights / 4, 0.75 * weights])
    split = limit_flow(block, X, Y, ONE, *twice, times=[0.5], step=0.1)
    assert split.loss.item() == pytest.approx(same.loss.item(), abs=1e-14)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"X": X.float()}, TypeError, "X has dtype torch.float32; torch.float64 is needed"),
        ({"y": [1.0]}, TypeError, "y is a list"),
        ({"y": Y[:, None]}, ValueError, "y has shape"),
        ({"y": torch.full_like(Y, math.nan)}, ValueError, r"y\[0\] is nan"),
        ({"v": torch.ones(2, dtype=F64)}, ValueError, "v has shape"),
        ({"weights": torch.full((4,), 0.3, dtype=F64)}, ValueError, "weights sum to 1.2, .* of sum 1 are needed"),
        ({"weights": torch.tensor([1.5, -0.5, 0, 0], dtype=F64)}, ValueError, "the smallest is -0.5"),
        ({"weights": torch.ones(1, dtype=F64)}, ValueError, r"\(M,\) with M = 4, as in theta"),
        ({"weights": [0.25] * 4}, TypeError, "weights is a list"),
        ({"weights": torch.full((4,), 0.25)}, TypeError, "weights has dtype torch.float32"),
        ({"theta": torch.zeros(7, 4, 1, dtype=F64)}, ValueError, r"\(M, k\) or \(13, M, k\)"),
        ({"times": [1.0, 1.0]}, ValueError, "increasing"),
        ({"times": [-1.0]}, ValueError, "increasing"),
        ({"step": 0.0}, ValueError, "step is 0.0"),
        ({"step": 1e-300, "times": [1.0]}, ValueError, "step is 1e-300; at most"),
        ({"method": "sgd"}, ValueError, "'rk4' or 'gd'"),
        ({"depth": 1}, ValueError, "at least 2"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    good = {"X": X, "y": Y, "v": ONE, "theta": torch.zeros(4, 1, dtype=F64)}
    good |= {"weights": torch.full((4,), 0.25, dtype=F64), "times": [0.0], "step": 0.1}
    with pytest.raises(error, match=words):
        limit_flow(GaussBump(1.0), **(good | change))
