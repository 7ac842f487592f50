"""The witness, BatchNorm's modes and the tied trap."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion import data, networks
from companion.beyond_ntk import constructions as co
from companion.beyond_ntk import vision


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the witness


@settings(max_examples=20)
@given(st.integers(2, 7), st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 10.0]))
def test_witness_bound_is_below_the_true_singular_value(N, seed, beta):
    z = torch.rand(N, generator=seeded(seed), dtype=torch.float64) + torch.arange(N)
    z = z[torch.randperm(N, generator=seeded(seed + 1))]
    w = co.spline_witness(z, beta)
    assert 0 < w.bound <= float(torch.linalg.svdvals(w.M)[-1]) * (1 + 1e-9)
    # the features are the network's own: softplus of an affine function of z, then the constant
    h = networks.Softplus(beta)(z[:, None] * w.weight + w.bias)
    torch.testing.assert_close(w.M[:, :-1], h, rtol=1e-9, atol=1e-9)


def test_more_neurons_only_raise_the_singular_value():
    w = co.spline_witness(torch.tensor([0.0, 0.4, 1.5], dtype=torch.float64), 1.0)
    more = torch.cat([w.M, torch.randn(3, 5, generator=seeded(), dtype=torch.float64)], 1)
    assert float(torch.linalg.svdvals(more)[2]) >= float(torch.linalg.svdvals(w.M)[2])


def test_the_exercise_with_three_points():
    z = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    for s, expected in ((100.0, 0.97925), (200.0, 0.98961)):
        with mpmath.workdps(40):
            rows = [[mpmath.log(1 + mpmath.exp(s * (a - b))) / s for b in (0, 1)] + [1] for a in (0, 1, 2)]
            exact = float(mpmath.det(mpmath.matrix(rows)))
        assert exact == pytest.approx(expected, abs=5e-6)
        w = co.spline_witness(z, 1.0, s)
        assert float(torch.linalg.det(w.M)) / s**2 == pytest.approx(exact, rel=1e-10)


def test_hinge_matrix_inverse_is_bounded_by_F():
    z = torch.tensor([0.0, 0.3, 0.35, 2.0, 7.0], dtype=torch.float64)
    T = torch.cat([torch.ones(5, 1, dtype=torch.float64), torch.relu(z[:, None] - z[:-1])], 1)
    g = float(z.diff().min())
    assert float(torch.linalg.matrix_norm(torch.linalg.inv(T))) ** 2 <= 1 + (6 * 5 - 10) / g**2 * (1 + 1e-12)


def test_witness_refuses():
    z = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"z\[0\] and z\[2\] are equal"):
        co.spline_witness(z, 1.0)
    with pytest.raises(ValueError, match="s is 1"):
        co.spline_witness(z[:2], 1.0, 1.0)
    with pytest.raises(ValueError, match="z holds 1"):
        co.spline_witness(z[:1], 1.0)


# --- BatchNorm


def test_other_statistics_same_function_in_both_modes():
    X = torch.randn(30, 16, generator=seeded(1), dtype=torch.float64)
    model = vision.conv_resnet((1, 4, 4), (3, 3, 5), 9, 2, activation=nn.Tanh, generator=seeded())
    model.train()(X)  # the buffers now hold something
    model.eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 2.0, generator=seeded(2))
                part.bias.normal_(generator=seeded(3))
        wanted = model(X)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        twin = co.switch_batchnorm(model, co.batchnorm_statistics(model, X))
        torch.testing.assert_close(twin(X), wanted)
        torch.testing.assert_close(twin.train()(X), wanted)
        assert not torch.allclose(model.train()(X), wanted)  # the original differs between its modes
    model.load_state_dict(state)
    assert all(
        not torch.equal(p, q) for p, q in zip(twin.stem[1].parameters(), model.stem[1].parameters(), strict=True)
    )


def test_switching_refuses():
    model = vision.mlp((3, 4, 5, 2), generator=seeded())
    one = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="statistics names 'linear1'"):
        co.switch_batchnorm(model, {"linear1": (one, one)})
    norms = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).double()
    norms[1].weight = norms[0].weight
    with pytest.raises(ValueError, match="shares its parameters"):
        co.switch_batchnorm(norms, {"0": (one, one), "1": (one, one)})


# --- the tied trap


def tied_problem():
    order = torch.as_tensor(np.random.default_rng(3).permutation(1797))
    everything = data.digits(centre=False, normalize=False)
    keep = order[:20]
    return everything.X[keep], everything.Y[keep]


def test_floor_of_twenty_digits():
    _, Y = tied_problem()
    assert co.tied_floor(Y) == pytest.approx(0.3225, abs=5e-5)


def test_floor_by_hand():
    two = torch.eye(2, dtype=torch.float64).repeat(3, 1)
    assert co.tied_floor(two) == pytest.approx(0.0, abs=1e-15)
    for K in (3, 5):
        balanced = torch.eye(K, dtype=torch.float64).repeat(4, 1)
        assert co.tied_floor(balanced) == pytest.approx((K - 2) / (2 * K))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.01, momentum=0.5), lambda p: torch.optim.Adam(p, 1e-3)]
)
def test_tied_net_moves_as_the_full_one(make):
    X, Y = tied_problem()
    model = co.tie(vision.mlp((64, 4, 7, 10), generator=seeded(1)))
    net, losses = co.tied_train(model, X, Y, make, 15)
    rule = make(model.parameters())
    for k in range(15):
        rule.zero_grad()
        loss = 0.5 * (model(X) - Y).square().sum(1).mean()
        assert float(loss.detach()) == pytest.approx(float(losses[k]), rel=1e-9)
        loss.backward()
        rule.step()
    spread = model.wide.weight - model.wide.weight[:1]
    assert float(spread.detach().abs().max()) < 1e-12
    torch.testing.assert_close(co.untie(net, model)(X), net(X))
    torch.testing.assert_close(co.untie(net, model)(X), model(X), rtol=1e-7, atol=1e-7)


def test_tied_losses_stay_above_the_floor():
    X, Y = tied_problem()
    model = vision.mlp((64, 8, 61, 10), activation=lambda: networks.Softplus(10.0), generator=seeded(2))
    _, losses = co.tied_train(model, X, Y, lambda p: torch.optim.Adam(p, 1e-2), 600)
    assert float(losses.min()) >= co.tied_floor(Y) * (1 - 1e-12)
    assert float(losses[-1]) < 0.5 * float(losses[0])


def test_tied_features_have_rank_two():
    model = co.tie(vision.mlp((64, 8, 61, 10), generator=seeded(2)))
    X, _ = tied_problem()
    h = model.wide_activation(model.wide(model[:2](X))).detach()
    M = torch.cat([h, torch.ones(20, 1, dtype=torch.float64)], 1)
    assert float(torch.linalg.svdvals(M)[2]) < 1e-12


def test_tied_training_refuses():
    X, Y = tied_problem()
    model = vision.mlp((64, 4, 7, 10), generator=seeded())
    with pytest.raises(ValueError, match="steps is -1"):
        co.tied_train(model, X, Y, lambda p: torch.optim.SGD(p, 0.1), -1)
    with pytest.raises(ValueError, match="wide, wide_activation, last is needed"):
        co.TiedNet(nn.Sequential(nn.Linear(3, 2)))


# --- probabilities that need no network


def test_relu_loses_a_quarter():
    draws = torch.randn(2, 10**6, generator=seeded(5), dtype=torch.float64)
    A, a = draws
    equal = torch.relu(A + a) == torch.relu(-A + a)
    assert float(equal.double().mean()) == pytest.approx(0.25, abs=0.002)


def test_noise_alone_bounds_no_singular_value():
    s, gap, eps = 1e-3, 2.0, 2e-4
    A, a = s * torch.randn(2, 400_000, generator=seeded(6), dtype=torch.float64)
    h = networks.Softplus()(A * gap / 2 + a), networks.Softplus()(-A * gap / 2 + a)
    measured = float(((h[0] - h[1]).abs() <= eps).double().mean())
    assert measured == pytest.approx(math.erf(math.sqrt(2) * eps / (s * gap)), abs=0.005)
