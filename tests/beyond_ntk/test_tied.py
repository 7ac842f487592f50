"""The tied trap: floor, dynamics, rank."""

import numpy as np
import pytest
import torch
from making import seeded
from torch import nn

from companion import data, networks
from companion.beyond_ntk import tied, vision


def tied_problem():
    order = torch.as_tensor(np.random.default_rng(3).permutation(1797))
    everything = data.digits(centre=False, normalize=False)
    keep = order[:20]
    return everything.X[keep], everything.Y[keep]


def test_floor_of_twenty_digits():
    """Of one-hot classes with counts c the Gram matrix off the constants is ``diag(c) - c c^T / N``."""
    _, Y = tied_problem()
    c = Y.sum(0)
    squares = torch.linalg.eigvalsh(torch.diag(c) - torch.outer(c, c) / 20)
    assert tied.tied_floor(Y) == pytest.approx(float(squares[:-1].sum()) / 40, rel=1e-12)


def test_floor_by_hand():
    two = torch.eye(2, dtype=torch.float64).repeat(3, 1)
    assert tied.tied_floor(two) == pytest.approx(0.0, abs=1e-15)
    for K in (3, 5):
        balanced = torch.eye(K, dtype=torch.float64).repeat(4, 1)
        assert tied.tied_floor(balanced) == pytest.approx((K - 2) / (2 * K))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.01, momentum=0.5), lambda p: torch.optim.Adam(p, 1e-3)]
)
def test_tied_net_moves_as_the_full_one(make):
    X, Y = tied_problem()
    model = tied.tie(vision.mlp((64, 4, 7, 10), generator=seeded(1)))
    net, losses = tied.tied_train(model, X, Y, make, 15)
    rule = make(model.parameters())
    for k in range(15):
        rule.zero_grad()
        loss = 0.5 * (model(X) - Y).square().sum(1).mean()
        assert float(loss.detach()) == pytest.approx(float(losses[k]), rel=1e-9)
        loss.backward()
        rule.step()
    spread = model.wide.weight - model.wide.weight[:1]
    assert float(spread.detach().abs().max()) < 1e-12
    torch.testing.assert_close(tied.untie(net, model)(X), net(X))
    torch.testing.assert_close(tied.untie(net, model)(X), model(X), rtol=1e-7, atol=1e-7)


def test_tied_losses_stay_above_the_floor():
    X, Y = tied_problem()
    model = vision.mlp((64, 8, 61, 10), activation=lambda: networks.Softplus(10.0), generator=seeded(2))
    _, losses = tied.tied_train(model, X, Y, lambda p: torch.optim.Adam(p, 1e-2), 600)
    assert float(losses.min()) >= tied.tied_floor(Y) * (1 - 1e-12)
    assert float(losses[-1]) < 0.5 * float(losses[0])


def test_tied_features_have_rank_two():
    model = tied.tie(vision.mlp((64, 8, 61, 10), generator=seeded(2)))
    X, _ = tied_problem()
    h = model.wide_activation(model.wide(model[:2](X))).detach()
    M = torch.cat([h, torch.ones(20, 1, dtype=torch.float64)], 1)
    assert float(torch.linalg.svdvals(M)[2]) < 1e-12


def test_tied_training_refuses():
    X, Y = tied_problem()
    model = vision.mlp((64, 4, 7, 10), generator=seeded())
    with pytest.raises(ValueError, match="steps is -1"):
        tied.tied_train(model, X, Y, lambda p: torch.optim.SGD(p, 0.1), -1)
    with pytest.raises(ValueError, match="wide, wide_activation, last is needed"):
        tied.TiedNet(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="wide, wide_activation, last is needed"):
        tied.tie(nn.Sequential(nn.Linear(3, 2)))
