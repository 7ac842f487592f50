"""Kernels of modules against the closed form for networks, and what alignment must ignore."""

import pytest
import torch
from making import seeded
from torch import nn

from companion import kernels
from companion.beyond_ntk import features, vision


def test_empirical_ntk_is_the_closed_form():
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)
    ).double()
    vision.initialize(model, seeded())
    X = torch.randn(7, 4, generator=seeded(1), dtype=torch.float64)
    weights = [model[i].weight.detach().T.contiguous() for i in (0, 2, 4)]
    full = kernels.ntk_gram(weights, X, "tanh")[0].reshape(7, 3, 7, 3)
    torch.testing.assert_close(features.empirical_ntk(model, X), torch.einsum("iaja->ij", full))


def test_empirical_ntk_of_a_resnet_against_plain_autograd():
    model = vision.conv_resnet((1, 4, 4), (2, 3), 5, 2, generator=seeded()).train()
    X = torch.randn(4, 16, generator=seeded(1), dtype=torch.float64)
    found = features.empirical_ntk(model, X)
    assert model.training
    model.eval()
    rows = []
    for x in X:
        for a in range(2):
            model.zero_grad()
            model(x[None])[0, a].backward()
            rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    J = torch.stack(rows).reshape(4, 2, -1)
    torch.testing.assert_close(found, torch.einsum("iap,jap->ij", J, J))


def test_frozen_parameters_do_not_count():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    vision.initialize(model, seeded())
    model[0].requires_grad_(False)
    X = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    h = torch.cat([model[:2](X), torch.ones(5, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(features.empirical_ntk(model, X), h @ h.T)


def test_alignment(unchecked):
    A = torch.randn(8, 3, generator=seeded(2), dtype=torch.float64)
    K = A @ A.T
    assert features.cka(K, 7 * K + 5) == pytest.approx(1)
    B = torch.randn(8, 3, generator=seeded(3), dtype=torch.float64)
    A, B = A - A.mean(0), B - B.mean(0)
    norms = torch.linalg.matrix_norm(A.T @ A) * torch.linalg.matrix_norm(B.T @ B)
    assert features.cka(K, B @ B.T) == pytest.approx(float((A.T @ B).square().sum() / norms))
    with pytest.raises(ValueError, match="constant"):
        features.cka(K, torch.ones_like(K))
    with pytest.raises(ValueError, match="N = 8, as in K"):
        features.cka(K, K[:2, :2])


def test_models_without_one_vector_a_sample_are_refused(unchecked):
    class Odd(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.layer, self.answer = nn.Linear(3, 2).double(), answer

        def forward(self, x):
            return self.answer(self.layer(x))

    X = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    for answer, error, words in (
        (lambda q: {"q": q}, TypeError, "the model returns a dict"),
        (lambda q: q[:, None], ValueError, "a vector is needed"),
        (lambda q: q @ q, ValueError, "the model fails on X"),
    ):
        with pytest.raises(error, match=words):
            features.empirical_ntk(Odd(answer), X)
    kept = X.clone()
    found = features.empirical_ntk(Odd(lambda q: q), X)
    assert torch.equal(X, kept)
    torch.testing.assert_close(found, 2 * (X @ X.T + 1))
