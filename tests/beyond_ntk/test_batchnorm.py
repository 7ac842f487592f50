"""BatchNorm's modes."""

import pytest
import torch
from making import seeded
from torch import nn

from companion.beyond_ntk import batchnorm, vision


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
        twin = batchnorm.switch_batchnorm(model, batchnorm.batchnorm_statistics(model, X))
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
        batchnorm.switch_batchnorm(model, {"linear1": (one, one)})
    norms = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).double()
    norms[1].weight = norms[0].weight
    with pytest.raises(ValueError, match="shares its parameters"):
        batchnorm.switch_batchnorm(norms, {"0": (one, one), "1": (one, one)})


def test_a_layer_that_is_called_twice_has_no_statistics():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            return self.norm(self.layer(self.norm(x)))

    with pytest.raises(ValueError, match="BatchNorm 'norm' is called twice"):
        batchnorm.batchnorm_statistics(Twice().double(), torch.ones(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("variance", [-1.0, float("nan")])
def test_variances_are_not_negative(variance):
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    statistics = {"0": (torch.zeros(2).double(), torch.full((2,), variance, dtype=torch.float64))}
    with pytest.raises(ValueError, match="variance below 0 or NaN"):
        batchnorm.switch_batchnorm(model, statistics)
