"""Reading networks of any kind: what is one operation, what is walked through, what the last layers are."""

import copy

import pytest
import torch
from oracles import flushing
from torch import nn

from companion import networks
from companion.networks import reading


def perceptron(*between, bias=True):
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 2, bias=bias))


# --- Casting ----------------------------------------------------------------------------------------------------------


def test_casting_is_exact_where_small_numbers_are_flushed():
    values = [0.0, -0.0, 1e-40, -1e-45, 1.1754942e-38, 1.1754944e-38, -3.5, 3e38]
    single = torch.tensor(values, dtype=torch.float32)
    exact = [float(v) for v in single.numpy()]
    with flushing():
        cast = reading.exact_double(single)
        strided = reading.exact_double(torch.stack([single, single], dim=1)[:, 0])
    assert cast.tolist() == strided.tolist() == exact
    assert torch.equal(torch.signbit(cast), torch.tensor([v < 0 or i == 1 for i, v in enumerate(values)]))
    assert cast[2] != 0


def test_a_network_of_small_numbers_is_cast_exactly():
    model = nn.Linear(1, 1)
    for p in model.parameters():
        nn.init.constant_(p, -1e-40)
    X = torch.full((1, 1), 1e-42)
    exact = model.weight.item(), X.item()
    with flushing():
        weight, bias = networks.read(model).module[0].parameters()
        assert (weight.item(), networks.inputs(X).item()) == exact
    assert bias.item() == exact[0] != 0


# --- Operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.GELU(), nn.Identity(), networks.Sine()])
def test_a_single_layer_is_one_operation(layer):
    network = networks.read(layer)
    (node,) = network.calls(layer)
    assert type(network.layer(node)) is type(layer)
    assert network.describe(node).startswith(type(layer).__name__)


def test_containers_residuals_and_own_modules_are_walked_through():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), networks.Residual(nn.Tanh(), nn.Identity()))

        def forward(self, x):
            return torch.relu(self.inner(x))

    model = Own().float().train()
    state = copy.deepcopy(model.state_dict())
    network = networks.read(model)
    kinds = [type(network.layer(n)) for n in network.nodes if network.layer(n) is not None]
    assert kinds == [nn.Linear, nn.Tanh, nn.Identity]
    assert network.describe(network.nodes[-2]) == "relu in Own"
    assert networks.read(network) is network
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in network.module.parameters())
    assert not any(part.training for part in network.module.modules())
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    found = networks.ancestors(network.nodes[-1])
    assert found == set(network.nodes)
    assert networks.ancestors(network.nodes[0]) == {network.nodes[0]}


def test_a_module_of_two_inputs_or_none_is_refused():
    for forward, found in ((lambda self, x, y: x + y, 2), (lambda self: torch.zeros(1), 0)):
        with pytest.raises(networks.NoEnclosure, match=f"it has {found} inputs instead of one"):
            networks.read(type("Mine", (nn.Module,), {"forward": forward})())
    optional = type("Mine", (nn.Module,), {"forward": lambda self, x, mask=None: x})()
    assert networks.read(optional).nodes


# --- The last layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "analytic"),
    [
        (nn.Tanh(), True),
        (networks.Softplus(), True),
        (nn.Softplus(), False),
        (nn.ReLU(), False),
        (networks.Square(), False),
    ],
)
def test_the_last_layers_of_a_perceptron(between, analytic):
    model = perceptron(between)
    found = networks.head(model)
    assert (found.last.in_features, found.wide.in_features) == (4, 3)
    assert found.analytic is analytic
    assert found.activation.startswith(type(between).__name__)
    assert found.problem == ""
    assert networks.head(model, model[-1]).last is not model[-1]  # of the copy


def test_what_is_no_wide_layer_and_last_layer():
    assert networks.head(perceptron(nn.LayerNorm(4), nn.Tanh())).wide is None
    assert networks.head(nn.Linear(3, 2)).wide is None
    assert "whose result is the model's output" in networks.head(perceptron(nn.Tanh()).append(nn.Tanh())).problem
    square = nn.Linear(3, 3)
    assert "used twice" in networks.head(nn.Sequential(square, nn.Tanh(), square)).problem
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    assert "shares its parameters" in networks.head(tied).problem
    own = type("Mine", (nn.Linear,), {"forward": lambda self, x: super(type(self), self).forward(x)})
    with pytest.raises(ValueError, match="calls no"):
        networks.head(nn.Sequential(nn.Tanh(), own(3, 3)))
    with pytest.raises(TypeError, match="last is a Tanh"):
        networks.head(perceptron(nn.Tanh()), nn.Tanh())
