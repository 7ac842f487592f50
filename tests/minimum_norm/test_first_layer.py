"""The streamed wide layer against autograd, dense products and big integers of its own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import layer_jacobian

from companion import descent, kernels
from companion.minimum_norm import first_layer


def problem(S=2, N=7, d=3, m=50, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, generator=g, dtype=torch.float64)
    W = torch.randn(S, d, m, generator=g, dtype=torch.float64)
    signs = torch.randn(S, m, generator=g, dtype=torch.float64).sign()
    y = torch.randn(S, N, generator=g, dtype=torch.float64)
    return X.to(dtype), W.to(dtype), signs.to(dtype), y.to(dtype)


def outputs(X, W, signs):
    return (torch.relu(X @ W) * signs[:, None]).sum(-1) / math.sqrt(W.shape[2])


@given(
    S=st.integers(1, 3), N=st.integers(1, 6), m=st.integers(1, 40), chunk=st.integers(1, 45), seed=st.integers(0, 99)
)
def test_streamed_products_match_autograd(S, N, m, chunk, seed):
    X, W, signs, y = problem(S=S, N=N, m=m, seed=seed)
    V = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    J = torch.func.jacrev(lambda w: outputs(X, w, signs))(W)  # (S, N, S, d, m), block diagonal in S
    torch.testing.assert_close(first_layer.outputs(X, W, signs, chunk), outputs(X, W, signs))
    torch.testing.assert_close(first_layer.tangent(X, W, signs, V, chunk), torch.einsum("inkdm,kdm->in", J, V))
    torch.testing.assert_close(first_layer.pull_back(X, W, signs, y, chunk), torch.einsum("inkdm,in->kdm", J, y))


@pytest.mark.parametrize("gate_bytes", [0, 2**20])
@pytest.mark.parametrize("chunk", [None, 1, 17, 50])
def test_a_step_is_the_gradient_step_of_autograd(chunk, gate_bytes):
    X, W, signs, y = problem()
    eta = torch.tensor([0.1, 0.3], dtype=torch.float64)
    live = W.clone().requires_grad_()
    loss = 0.5 * (outputs(X, live, signs) - y).square().sum()
    (gradient,) = torch.autograd.grad(loss, live)
    step_ = first_layer.WideStep(X, y, signs, eta, chunk, gate_bytes)
    assert step_.keep == (gate_bytes > 0)
    moved = [W.clone()]
    norms = step_(moved, 0, True)
    torch.testing.assert_close(moved[0], W - eta[:, None, None] * gradient)
    torch.testing.assert_close(norms.square().sum() / 2, loss.detach())


def test_kept_and_recomputed_gates_give_the_same_run():
    X, W, signs, y = problem()
    eta = torch.full((2,), 0.05, dtype=torch.float64)
    runs = [descent.iterate([W], first_layer.WideStep(X, y, signs, eta, 16, b), 30) for b in (0, 2**20)]
    assert torch.equal(runs[0].weights[0], runs[1].weights[0])
    assert runs[0].residual[-1].max() < runs[0].residual[0].min()


def test_counts_are_exact_and_do_not_depend_on_the_panel():
    X, W, _, _ = problem(S=2, N=9, m=1000)
    W[:, :, 5] = 0  # a dead neuron is closed everywhere
    A = (X @ W > 0).long()
    for chunk in (None, 64, 333):
        assert torch.equal(first_layer.gate_counts(X, W, chunk), A @ A.mT)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("c", [1, 2, 15, 16, 17, 300])
def test_counts_of_signs_with_and_without_int8(monkeypatch, int8, c):
    if not int8:
        monkeypatch.setattr(first_layer, "_int8_products", lambda: False)
    A = torch.randint(-1, 2, (2, 5, c), dtype=torch.int8)
    B = torch.randint(-1, 2, (2, 4, c), dtype=torch.int8)
    total = torch.ones(2, 5, 4, dtype=torch.int64)
    first_layer.add_counts(total, A, B)
    assert torch.equal(total, 1 + A.long() @ B.long().mT)


def test_panels_cover_every_neuron_once_within_memory():
    X = torch.randn(500, 4, dtype=torch.float64)
    assert first_layer.chunk_size(1, 500, 10**6, X) * 500 * 8 <= 8 * 2**20
    assert first_layer.chunk_size(1, 500, 100, X) == 100
    W = torch.randn(1, 4, 5000, dtype=torch.float64)
    seen = torch.zeros(5000)
    for part, Z in first_layer.panels(X, W):
        seen[part] += 1
        torch.testing.assert_close(Z, X @ W[:, :, part])
    assert bool((seen == 1).all())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda X, W, a: (X, W.long(), a), TypeError, "W has dtype torch.int64; torch.float32 or torch.float64"),
        (lambda X, W, a: (X, W.tolist(), a), TypeError, "W is a list; a torch tensor is needed"),
        (lambda X, W, a: (X, W.float(), a), ValueError, "W is torch.float32 on cpu, X is torch.float64"),
        (lambda X, W, a: (X, W[:, :2], a), ValueError, r"W has shape \(2, 2, 50\); \(..., d, m\) with d = 3"),
        (lambda X, W, a: (X, W / 0, a), ValueError, "finite numbers are needed"),
        (lambda X, W, a: (X, W, a[:, :4]), ValueError, r"signs has shape \(2, 4\); \(..., m\) with m = 50"),
        (lambda X, W, a: (X, W, 2 * a), ValueError, "every sign must be"),
        (lambda X, W, a: (X, W, 0 * a), ValueError, r"signs holds -?0.0"),
        (lambda X, W, a: (X, W, a[:1].expand(3, -1)), ValueError, r"signs has shape \(3, 50\)"),
        (lambda X, W, a: (X, W[None], a), ValueError, r"W has shape \(1, 2, 3, 50\)"),
        (lambda X, W, a: (X, W, a, 0), ValueError, "chunk is 0; at least one neuron"),
    ],
)
def test_bad_layers_are_refused(unchecked, change, error, text):
    X, W, signs, _ = problem()
    with pytest.raises(error, match=text):
        first_layer.forward(*change(X, W, signs))


def test_one_network_gets_its_ensemble_axis():
    X, W, signs, _ = problem()
    shapes = [tuple(t.shape) for t in first_layer.check_layer(X, W[0], signs[0])]
    assert shapes == [(1, 3, 50), (1, 50)]
    assert first_layer.check_layer(X, W, signs[0])[1].shape == (2, 50)


def test_empirical_gram_is_that_of_the_jacobian_and_tends_to_the_kernel():
    g = torch.Generator().manual_seed(3)
    X = torch.randn(6, 4, generator=g, dtype=torch.float64)
    W = torch.randn(2, 4, 30, generator=g, dtype=torch.float64)
    signs = torch.ones(30, dtype=torch.float64)
    signs[::3] = -1
    for s in range(2):
        J = layer_jacobian(X, W[s], signs)
        torch.testing.assert_close(first_layer.empirical_gram(X, W[s]), J @ J.T)
    torch.testing.assert_close(first_layer.empirical_gram(X, W)[1], first_layer.empirical_gram(X, W[1]))
    wide = torch.randn(4, 400_000, generator=g, dtype=torch.float64)
    error = first_layer.empirical_gram(X, wide) - kernels.relu_ntk(X)
    # five standard deviations of a mean of 400,000 terms of size at most |x_i||x_j|
    assert error.abs().max() < 5 * X.square().sum(1).max() / 400_000**0.5


def test_empirical_gram_refuses_what_does_not_fit(unchecked):
    X, W = torch.randn(5, 3), torch.randn(3, 8)
    for bad, text in (
        (W.double(), "torch.float32"),
        (W[:2], r"\(\*S, d, m\) with d = 3"),
        (W / 0, "finite numbers are needed"),
    ):
        with pytest.raises(ValueError, match=text):
            first_layer.empirical_gram(X, bad)
