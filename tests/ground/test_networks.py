"""Stacked networks against plain matrix products and autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion import data, networks

SMOOTH = ["tanh", "softplus", "sigmoid", "sin", "exp", "identity"]


def problem(widths, S, N, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    X = data.sphere(N, widths[0], generator)
    Y = torch.randn(N, widths[-1], generator=generator, dtype=torch.float64)
    return networks.init_mlp(widths, S=S, generator=seed, **options), X, Y


@pytest.mark.parametrize("name", [*SMOOTH, "relu"])
def test_derivatives_of_activations(name):
    sigma = networks.activation(name)
    z = torch.linspace(-30, 30, 241, dtype=torch.float64).add(1e-3).requires_grad_()
    if name == "exp":
        z = (z.detach() / 10).requires_grad_()
    (first,) = torch.autograd.grad(sigma.value(z).sum(), z, create_graph=True)
    assert torch.allclose(sigma.derivative(z), first, rtol=1e-9, atol=1e-15)
    second = torch.autograd.grad(first.sum(), z)[0] if first.requires_grad else torch.zeros_like(z)
    assert torch.allclose(sigma.second(z), second, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", list(networks.ACTIVATIONS))
def test_in_place_forms(name):
    sigma = networks.activation(name)
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    D = torch.linspace(1, 2, 101, dtype=torch.float64)
    h = sigma.value(z)
    assert sigma.value(z) is not z
    if sigma.value_:
        assert torch.allclose(sigma.value_(z.clone()), h, rtol=1e-14)
    if sigma.pull:
        pulled = D.clone()
        assert sigma.pull(pulled, h).data_ptr() == pulled.data_ptr()
        assert torch.allclose(pulled, D * sigma.derivative(z), rtol=1e-12, atol=1e-15)
    assert h.sum() != 0


def test_kinks_have_derivative_zero_and_softplus_is_accurate():
    zero = torch.zeros(1, dtype=torch.float64)
    assert networks.activation("relu").derivative(zero).item() == 0
    assert networks.activation("step").value(zero).item() == 0
    z = torch.tensor([21.0, -40.0], dtype=torch.float64)
    expected = [21 + math.log1p(math.exp(-21)), math.log1p(math.exp(-40))]
    assert networks.activation("softplus").value(z).tolist() == pytest.approx(expected, rel=1e-15)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(1, 3), st.integers(1, 4))
def test_forward_and_gradients_against_autograd(seed, widths, S, N):
    weights, X, Y = problem(tuple(widths), S, N, seed)
    name = [*SMOOTH, "relu"][seed % 7]
    leaves = [W.requires_grad_() for W in weights]
    value = networks.activation(name).value
    f = X
    for W in leaves[:-1]:
        f = value(f @ W)
    f = f @ leaves[-1]
    expected = torch.autograd.grad(0.5 * ((f - Y) ** 2).sum(), leaves)
    R, grads = networks.gradients(weights, X, Y, name)
    assert torch.allclose(networks.forward(weights, X, name), f.expand(S, N, widths[-1]), rtol=1e-13)
    assert torch.allclose(R, f - Y, rtol=1e-12, atol=1e-14)
    for W, g, e in zip(weights, grads, expected, strict=True):
        assert g.shape == W.shape
        assert torch.allclose(g, e, rtol=1e-10, atol=1e-12)


def test_features_and_own_data_of_each_member():
    weights, X, Y = problem((3, 4, 5, 2), 2, 6, 1)
    F = networks.features(weights, X)
    assert [tuple(f.shape) for f in F] == [(2, 6, 3), (2, 6, 4), (2, 6, 5)]
    assert torch.equal(F[0][1], X)
    assert torch.allclose(F[2], torch.relu(F[1] @ weights[1]))
    stacked_X, stacked_Y = torch.stack([X, 2 * X]), torch.stack([Y, -Y])
    R, grads = networks.gradients(weights, stacked_X, stacked_Y)
    for s in range(2):
        alone_R, alone = networks.gradients([W[s] for W in weights], stacked_X[s], stacked_Y[s])
        assert torch.allclose(R[s], alone_R[0])
        assert all(torch.allclose(g[s], a[0]) for g, a in zip(grads, alone, strict=True))


def test_gradients_in_float32():
    weights, X, Y = problem((8, 64, 3), 2, 10, 2)
    _, double = networks.gradients(weights, X, Y)
    _, single = networks.gradients([W.float() for W in weights], X.float(), Y.float())
    for d, s in zip(double, single, strict=True):
        assert s.dtype == torch.float32
        assert (s.double() - d).norm() < 1e-5 * d.norm()


def test_init_scales():
    n = 400
    for scheme, std in (("lecun", n**-0.5), ("he", (2 / n) ** 0.5), ("gaussian", 1.0)):
        (W,) = networks.init_mlp((n, n), scheme=scheme)
        assert W.shape == (1, n, n)
        assert float(W.std()) == pytest.approx(std, rel=0.01)
        assert abs(float(W.mean())) < 4 * std / n
    weights = networks.init_mlp((n, n, n, 1), scheme=["gaussian", "lecun", "he"], beta=3.0, zero_last=True)
    assert float(weights[0].std()) == pytest.approx(1, rel=0.01)
    assert float(weights[1].std()) == pytest.approx(3 / n**0.5, rel=0.01)
    assert torch.equal(weights[2], torch.zeros(1, n, 1, dtype=torch.float64))


def test_a_member_does_not_depend_on_the_ensemble():
    widths = (3, 4, 2)
    by_seed = networks.init_mlp(widths, generator=[7, 8, 9])
    alone = networks.init_mlp(widths, generator=[9])
    shared = [networks.init_mlp(widths, S=S, generator=torch.Generator().manual_seed(7)) for S in (1, 3)]
    for l in range(2):
        assert by_seed[l].shape[0] == 3
        assert torch.equal(by_seed[l][2], alone[l][0])
        assert torch.equal(shared[0][l][0], shared[1][l][0])
        assert not torch.equal(shared[1][l][0], shared[1][l][1])
        assert torch.equal(by_seed[l][0], networks.init_mlp(widths, S=3, generator=7)[l][0])


def test_init_casts_the_same_draws_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    double, single = (networks.init_mlp((3, 4, 2), generator=1, dtype=t) for t in (torch.float64, torch.float32))
    assert torch.equal(double[0].float(), single[0])
    assert torch.equal(torch.get_rng_state(), state)
    plain, scaled = networks.init_mlp((3, 4, 2), generator=1), networks.init_mlp((3, 4, 2), generator=1, beta=0.5)
    assert torch.equal(0.5 * plain[0], scaled[0])
    assert torch.equal(plain[1], scaled[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"widths": (3,)}, ValueError, r"widths is \(3,\)"),
        ({"widths": (3, 0, 1)}, ValueError, "every width >= 1"),
        ({"scheme": "xavier"}, ValueError, "scheme is 'xavier'"),
        ({"scheme": ["he"]}, ValueError, "a list of 2 of them"),
        ({"beta": math.nan}, ValueError, "beta is nan"),
        ({"widths": (3, 1), "beta": 2.0}, ValueError, "no hidden layer"),
        ({"S": 0}, ValueError, "S is 0"),
        ({"S": 2, "generator": [1, 2, 3]}, ValueError, "generator holds 3 seeds; 2 needed"),
        ({"generator": []}, ValueError, "generator holds 0 seeds"),
        ({"dtype": torch.float16}, TypeError, "dtype is torch.float16"),
    ],
)
def test_bad_init(arguments, error, message):
    with pytest.raises(error, match=message):
        networks.init_mlp(**({"widths": (3, 4, 1)} | arguments))


X = torch.ones(4, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], ValueError, "weights is empty"),
        (torch.ones(3, 2, dtype=torch.float64), ValueError, "weights is a single tensor"),
        ([[1.0]], TypeError, "W_1 is list"),
        ([X.T.int()], TypeError, "W_1 is torch.int32"),
        ([torch.ones(3, dtype=torch.float64)], ValueError, r"shapes \(3,\)"),
        ([torch.ones(2, 3, 4).double(), torch.ones(3, 4, 1).double()], ValueError, "all"),
        ([torch.ones(3, 0).double()], ValueError, r"shapes \(3, 0\)"),
        ([torch.ones(3, 4).double(), torch.ones(5, 2).double()], ValueError, "W_2 takes 5 inputs but W_1 gives 4"),
        ([torch.ones(2, 2).double()], ValueError, "W_1 takes 2 inputs but X has 3"),
        ([torch.ones(3, 2)], ValueError, "W_1 is torch.float32 on cpu, X is torch.float64 on cpu"),
        ([torch.full((3, 2), math.inf).double()], ValueError, "W_1 holds NaN or infinity"),
        ([torch.full((3, 2), math.nan).double()], ValueError, "W_1 holds NaN or infinity"),
        ([torch.ones(3, 5).double()], ValueError, "Y has 2 columns but the network has 5 outputs"),
    ],
)
def test_bad_weights(unchecked, weights, error, message):
    with pytest.raises(error, match=message):
        networks.check_weights(weights, X, torch.ones(4, 2, dtype=torch.float64))


def test_weights_on_another_device_or_targets_of_another_dtype():
    good = [torch.ones(3, 2, dtype=torch.float64)]
    networks.check_weights(good, X, torch.ones(4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="on meta, X is"):
        networks.check_weights([good[0].to("meta")], X)
    with pytest.raises(ValueError, match=r"Y is torch.float32 on cpu, X is torch.float64 on cpu"):
        networks.check_weights(good, X, torch.ones(4, 2))


def test_unknown_activation_and_empty_weights():
    with pytest.raises(ValueError, match="activation is 'gelu'; one of relu"):
        networks.activation("gelu")
    with pytest.raises(ValueError, match="weights is empty"):
        networks.forward([], X)
