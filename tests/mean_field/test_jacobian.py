"""The Jacobian of a network by automatic differentiation, and how far it moves, against its bounds."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import near_net, seeded

from companion.mean_field.blocks import RBF, BallBump, Bias, Block, Constants, GaussBump, Linear, TanhMLP, like
from companion.mean_field.jacobian import Centre, centre, gram_kernel, lipschitz_bound, local_region, uniform_region
from companion.mean_field.resnets import forward, rescaled_gradient
from companion.rigor import point
from companion.rigor.formulas import upper

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
LINE = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)
BLOCKS = [BallBump(1), BallBump(2), GaussBump(0.8), RBF(1), TanhMLP(2)]


def jacobian(block, theta, X, v):
    """Row i: the derivative of output i in scaled coordinates, by automatic differentiation; ``(n, L M k)``."""
    leaf = theta.clone().requires_grad_()
    z = X
    for layer in leaf:
        z = z + block.f(z[:, None], layer[None]).mean(1) / len(leaf)
    rows = [torch.autograd.grad(out, leaf, retain_graph=True)[0].flatten() for out in z @ v]
    return torch.stack(rows) * math.sqrt(theta.shape[0] * theta.shape[1])


def star(theta):
    return float(theta.square().sum(-1).mean().sqrt())


@pytest.mark.parametrize("block", [BallBump(2), GaussBump(1.0), TanhMLP(1), RBF(1)], ids=lambda b: b.name)
def test_gram_kernel_is_that_of_automatic_differentiation(block):
    theta, X, _, v = near_net(block, 3, 5, 4, 0.0, 1)
    J = jacobian(block, theta[0], X, v)
    assert torch.allclose(gram_kernel(block, theta, X, v)[0], J @ J.T, rtol=1e-12, atol=1e-14)
    split = theta.repeat(1, 1, 2, 1)
    weights = torch.cat([torch.full((5,), 0.05, dtype=F64), torch.full((5,), 0.15, dtype=F64)])
    assert torch.allclose(gram_kernel(block, split, X, v, weights)[0], J @ J.T, rtol=1e-12, atol=1e-14)


def test_bias_kernel_is_one():
    theta = torch.randn(2, 3, 4, 1, generator=seeded(), dtype=F64)
    assert torch.allclose(gram_kernel(Bias(1), theta, LINE, ONE), torch.ones(2, 4, 4, dtype=F64), atol=1e-14)


def test_loss_falls_as_the_kernel_says():
    block = BallBump(2)
    theta, X, y, v = near_net(block, 4, 6, 3, 0.5, 2)
    E, G = rescaled_gradient(block, theta, X, y, v)
    r = forward(block, theta, X)[-1, 0] @ v - y
    h = 1e-4
    ahead, behind = (float(rescaled_gradient(block, theta + s * h * G, X, y, v)[0][0]) for s in (-1, 1))
    K = gram_kernel(block, theta, X, v)[0]
    assert (ahead - behind) / (2 * h) == pytest.approx(-float(r @ K @ r) / 9, rel=1e-6)
    assert float(E[0]) == pytest.approx(0.5 * float(r.square().mean()), rel=1e-14)


def test_constants_of_the_lesson():
    found = lipschitz_bound(GaussBump(0.5), torch.zeros(3, 5, 1, dtype=F64), 4)
    A = B = 0.5 * math.sqrt(math.e)
    H = 0.5 * math.sqrt(6) * math.sqrt(3 - math.sqrt(6)) * math.exp((math.sqrt(6) - 2) / 2)
    phi = math.sqrt((math.exp(2 * A) - 1) / (2 * A))
    assert float(found.Lambda) == pytest.approx(2 * math.exp(A) * H * (phi * B**2 + B * (1 + phi) + 1), rel=1e-12)
    assert float(found.beta) == pytest.approx(2 * B * math.exp(A), rel=1e-12)
    assert float(found.Lambda) == pytest.approx(21.922, abs=1e-3)  # as the lesson prints it


@given(
    st.integers(0, 10_000),
    st.sampled_from([BallBump(1), BallBump(2), GaussBump(0.8), RBF(1), TanhMLP(1)]),
    st.floats(1e-3, 0.5),
)
@settings(max_examples=60)
def test_the_jacobian_moves_less_than_its_lipschitz_bound(seed, block, radius):
    generator = seeded(seed)
    theta, X, _, v = near_net(block, 3, 3, 3, 0.0, seed, scale=0.7)
    step = torch.randn(3, 3, block.k, generator=generator, dtype=F64)
    step *= radius / torch.linalg.vector_norm(step, dim=-1).max()
    bound = lipschitz_bound(block, theta[0], 3, float(v.norm()), radius=radius, reach=50.0)
    assert float(forward(block, theta, X).norm(dim=-1).max()) + radius * 40 < 60
    before, after = (jacobian(block, t, X, v) for t in (theta[0], theta[0] + step))
    moved = float(torch.linalg.matrix_norm(after - before))
    assert moved <= bound.Lambda * star(step)
    assert float(torch.linalg.matrix_norm(after)) <= bound.beta


def layer_jacobians(block, theta, X):
    """``I + (1/L) mean_m d_z f`` of every layer, sample by sample, by automatic differentiation."""
    z, made = X, []
    for layer in theta:

        def move(x, layer=layer):
            return x + block.f(x[None], layer).mean(0) / len(theta)

        made.append(torch.stack([torch.autograd.functional.jacobian(move, x) for x in z]))
        z = torch.stack([move(x) for x in z])
    return made


@pytest.mark.parametrize("certified", [False, True], ids=["measured", "certified"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.name}{b.d}")
def test_centre_measures_the_net(block, certified):
    theta, X, y, v = near_net(block, 4, 6, 3, 0.3, 5)
    counts = torch.tensor([1, 2, 1])
    at = centre(block, theta[0], X, y, v, counts=counts, local=True, certified=certified)
    root = counts.to(F64).sqrt()
    J = jacobian(block, theta[0], X, v) * root[:, None]
    values = torch.linalg.eigvalsh(J @ J.T)
    residual = (forward(block, theta, X)[-1, 0] @ v - y) * root
    layers = layer_jacobians(block, theta[0], X)
    largest, adjoint = 1.0, 1.0
    for a in range(4):
        product = torch.eye(block.d, dtype=F64).expand(3, -1, -1)
        for layer in layers[a:]:
            product = layer @ product
            largest = max(largest, float(torch.linalg.matrix_norm(product, 2).max()))
        adjoint = max(adjoint, float((v @ product).norm(dim=-1).max() / v.norm()))
    # the certified norm of a product is that of Frobenius at most
    loose = math.sqrt(block.d) if certified else 1.0
    expected = (residual.norm(), values[0], values[-1], forward(block, theta, X).norm(dim=-1).max(), adjoint)
    for found, value in zip(at[:5], map(float, expected), strict=True):
        assert found == pytest.approx(value, rel=1e-4 if certified else 1e-9)
    assert largest * (1 - 1e-12) <= at.propagator <= largest * loose * (1 + 1e-9)
    if certified:
        assert at.r >= float(residual.norm()) * (1 - 1e-14)
        assert at.lam <= float(values[0]) * (1 + 1e-12)
    z = forward(block, theta, X)[:, 0]
    for l, m in ((0, 0), (3, 5), (2, 1)):
        slopes = [
            torch.autograd.functional.jacobian(lambda t, i=i, l=l: block.f(z[l, i], t), theta[0, l, m]).norm()
            for i in range(3)
        ]
        assert float(at.B[l, m]) == pytest.approx(float(max(slopes)), rel=1e-9)


@given(st.integers(0, 10_000), st.sampled_from(BLOCKS), st.floats(1e-4, 0.3), st.floats(0.05, 1.0))
@settings(max_examples=30)
def test_the_jacobian_moves_less_than_the_bounds_of_both_balls(seed, block, rho, share):
    theta, X, _, v = near_net(block, 3, 4, 3, 0.0, seed, scale=0.6)
    kappa, generator = float(v.norm()), seeded(seed)
    at = centre(block, theta[0], X, forward(block, theta, X)[-1, 0] @ v, v, counts=torch.ones(3).long(), local=True)
    at = at._replace(lam=100.0, r=rho * 10 / 4)  # the balls of a residual for which the movement is rho
    base = jacobian(block, theta[0], X, v)
    for search in (local_region, uniform_region):
        region = search(block, theta[0], at, 3, kappa, factor=8)
        if not math.isfinite(region.radius):
            continue
        step = torch.randn(3, 4, block.k, generator=generator, dtype=F64)
        size = torch.linalg.vector_norm(step, dim=-1, keepdim=True)
        step *= (region.radius / size).clamp_max(share * region.radius)  # inside the ball of every particle
        step *= min(1.0, rho / star(step))
        moved = jacobian(block, theta[0] + step, X, v)
        assert float(torch.linalg.matrix_norm(moved - base)) <= region.Lambda * star(step)
        assert float(torch.linalg.matrix_norm(moved)) <= region.beta


def test_local_constants_are_smaller_and_fit_a_smaller_ball():
    block = BallBump(2)
    theta, X, y, v = near_net(block, 4, 16, 3, 1e-6, 3, scale=2.0)
    at = centre(block, theta[0], X, y, v, counts=torch.ones(3).long(), local=True)
    local, uniform = (f(block, theta[0], at, 3, float(v.norm()), factor=8) for f in (local_region, uniform_region))
    assert local.Lambda < uniform.Lambda / 3
    assert local.beta < uniform.beta
    assert local.radius < uniform.radius
    flow = local_region(block, theta[0], at, 3, float(v.norm()), factor=4)
    assert flow.radius < local.radius


def test_where_no_radius_holds_the_ball_is_infinite():
    block = BallBump(1)
    theta, X, y, v = near_net(block, 2, 4, 2, 50.0, 1)
    at = centre(block, theta[0], X, y, v, counts=torch.ones(2).long(), local=True)
    for search in (local_region, uniform_region):
        assert math.isinf(search(block, theta[0], at, 2, float(v.norm()), factor=8).radius)


def test_states_that_move_are_within_the_reach_of_unbounded_blocks():
    theta, X, y, v = near_net(Linear(1), 2, 4, 2, 1e-4, 1)
    at = centre(Linear(1), theta[0], X, y, v, counts=torch.ones(2).long(), local=True)
    at = at._replace(lam=max(at.lam, 0.1))
    for search in (local_region, uniform_region):
        assert math.isfinite(search(Linear(1), theta[0], at, 2, float(v.norm()), factor=8).Lambda)


# --- the formulas, written anew ---------------------------------------------------------------------------------------


class Given(Block):
    """A block of which only the constants are known: hand-made, and growing with the radius and the states."""

    d = k = 1

    def __init__(self, seed, L=2, M=3, size=1.0):
        g = seeded(seed)
        self.base = size * (0.1 + torch.rand(7, L, M, generator=g, dtype=F64))
        self.by_radius, self.by_reach = (size * 0.2 * torch.rand(7, generator=g, dtype=F64) for _ in range(2))
        self.weights = torch.rand(M, generator=g, dtype=F64) + 0.05
        self.weights /= self.weights.sum()

    def at(self, radius, reach):
        slopes = self.by_radius * radius + self.by_reach * reach
        return (self.base + slopes[:, None, None]).tolist()

    def constants(self, theta=None, radius=None, reach=math.inf):
        of = like(theta)
        parts = zip(self.base, self.by_radius, self.by_reach, strict=True)
        return Constants(*(of(b) + of(r) * of(radius) + of(t) * of(reach) for b, r, t in parts))


THETA = torch.zeros(2, 3, 1, dtype=F64)


def mean(values, w, power=1):
    return (sum(a * b**power for layer in values for a, b in zip(w, layer, strict=True)) / len(values)) ** (1 / power)


def top(values):
    return max(max(layer) for layer in values)


def lambda_of_the_lesson(block, n, kappa, radius, reach):
    """Lambda, beta, e^A, B and the largest B, from the text of the theorem."""
    _, A, _, B, zz, zt, tt = block.at(radius, reach)
    w, size, found = block.weights.tolist(), math.sqrt(n) * kappa, []
    phi = math.sqrt((math.exp(2 * top(A)) - 1) / (2 * top(A)))
    for a, b, c, d, f in (
        (mean(A, w), mean(B, w, 2), mean(zz, w), mean(zt, w, 2), math.exp(mean(A, w))),
        (top(A), top(B), top(zz), top(zt), phi),
    ):
        found.append((size * math.exp(a) * (c * f * b**2 + d * b * (1 + f) + top(tt)), size * b * math.exp(a)))
    return [min(x) for x in zip(*found, strict=True)], math.exp(mean(A, w)), mean(B, w, 2), top(B)


@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 2.5]), st.floats(0.1, 3), st.floats(0, 2), st.floats(0, 2))
@settings(max_examples=60)
def test_the_lipschitz_bound_is_that_of_the_theorem(seed, size, kappa, radius, reach):
    block = Given(seed, size=size)
    (Lambda, beta), growth, B, B_max = lambda_of_the_lesson(block, 5, kappa, radius, reach)
    expected = (Lambda, beta, growth, B, B_max)
    options = {"radius": radius, "reach": reach, "weights": block.weights}
    found = lipschitz_bound(block, THETA, 5, kappa, **options)
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-12)
    for x, value in zip(lipschitz_bound(block, point(THETA), 5, kappa, **options), expected, strict=True):
        assert float(x.lo) < value < float(x.hi)
        assert float(x.hi) < value * (1 + 1e-12)


def centred(r, lam, reach=0.7, B=None):
    return Centre(r, lam, 2.0, reach, 1.2, 1.6, B)


@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.floats(0.1, 2))
@settings(max_examples=20)
def test_the_uniform_region_is_the_smallest_fixed_point(seed, factor, kappa):
    block, at, n, R, reach = Given(seed, size=0.5), centred(1e-3, 0.9), 4, 0.0, 0.7
    for _ in range(400):  # the same from below, in the letters of the theorem
        (Lambda, beta), growth, B, B_max = lambda_of_the_lesson(block, n, kappa, R, reach)
        R, reach = factor * math.sqrt(n) * kappa * B_max * growth * at.r / at.lam, 0.7 + growth * B * R
    for theta in (THETA, point(THETA)):
        found = uniform_region(block, theta, at, n, kappa, factor=factor, weights=block.weights)
        numbers = (upper(found.Lambda), upper(found.beta), found.radius)
        for x, value in zip(numbers, (Lambda, beta, R), strict=True):
            assert 0 < value * (1 - 1e-12) <= x <= value * (1 + 1e-3) < math.inf


@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.floats(0.1, 2))
@settings(max_examples=20)
def test_the_local_region_is_the_smallest_fixed_point(seed, factor, kappa):
    block, n = Given(seed, size=0.5), 4
    b = 0.3 * torch.rand(2, 3, generator=seeded(seed), dtype=F64) + 0.02
    at = centred(1e-2, 0.9, B=b)
    w, r, G, g = block.weights.tolist(), at.r, at.propagator, at.adjoint
    rho, size = factor * r / (2 * math.sqrt(at.lam)), math.sqrt(n) * kappa
    R, wide, eta, reach = 0.0, G, 0.0, at.reach
    for _ in range(400):
        _, _, _, B_, zz, zt, tt = (torch.tensor(c, dtype=F64) for c in block.at(R, reach))
        each = torch.minimum(b + zt * eta * rho + tt * R, B_).tolist()
        bend = mean(zz.tolist(), w) * eta + mean(zt.tolist(), w, 2)
        grown = math.exp(G * bend * rho)
        B = mean(each, w, 2)
        Lambda = size * g * grown * (B * wide * bend + mean(zt.tolist(), w, 2) * eta + float(tt.max()))
        R, wide, eta, reach = factor * size * top(each) * g * grown * r / at.lam, G * grown, wide * B, 0.7 + eta * rho
    for theta in (THETA, point(THETA)):
        found = local_region(block, theta, at, n, kappa, factor=factor, weights=block.weights)
        numbers = (upper(found.Lambda), upper(found.beta), found.radius)
        for x, value in zip(numbers, (Lambda, size * g * grown * B, R), strict=True):
            assert 0 < value * (1 - 1e-12) <= x <= value * (1 + 1e-3) < math.inf


def test_weights_of_a_sum_above_one_count_as_they_are():
    # all constants equal: the maxima are attained, and ||J|| = sqrt(sum w) for the block theta and one sample
    w = torch.tensor([0.5, 0.5 + 1.5e-13], dtype=F64)
    found = lipschitz_bound(Bias(1), point(torch.zeros(1, 2, 1, dtype=F64)), 1, 1.0, weights=w)
    assert Fraction(float(found.beta.hi)) ** 2 >= sum(Fraction(x) for x in w.tolist()) > 1


def test_a_certified_bound_is_beyond_the_measured_one():
    for block in BLOCKS:
        theta, *_ = near_net(block, 2, 300, 2, 0.1, 6)
        exact, rounded = (lipschitz_bound(block, t, 3, 0.7, radius=0.1, reach=2.0) for t in (point(theta[0]), theta[0]))
        for a, b in zip(exact, rounded, strict=True):
            assert float(b) < float(a.hi) < float(b) * (1 + 1e-12)
            assert float(a.lo) < float(b)
