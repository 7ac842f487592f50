"""Losses and gradients against autograd, and the features' geometry."""

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import phase2_problem as problem
from making import seeded

from companion.beyond_ntk import last_layer as ll


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_loss_and_slope_against_torch(loss):
    M, V, Y = problem(loss=loss)
    V.requires_grad_()
    q = M @ V
    oracle = (
        torch.nn.functional.cross_entropy(q, Y) if loss == "cross_entropy" else 0.5 * (q - Y).square().sum() / len(M)
    )
    (gradient,) = torch.autograd.grad(oracle, V)
    V = V.detach()
    torch.testing.assert_close(ll.average_loss(M, V, Y, loss), oracle.detach())
    torch.testing.assert_close(M.T @ ll.slope(M @ V, Y, loss) / len(M), gradient)


def test_cross_entropy_keeps_its_digits_where_it_is_tiny_or_huge():
    q = torch.tensor([[60.0, 0.0, -5.0], [0.0, 800.0, 0.0]], dtype=torch.float64)
    found = ll.pointwise(q, torch.tensor([0, 2]), "cross_entropy")
    with mpmath.workdps(60):
        exact = [mpmath.log(1 + mpmath.exp(-60) + mpmath.exp(-65)), mpmath.log(mpmath.exp(800) + 2)]
    torch.testing.assert_close(found, torch.tensor([float(e) for e in exact], dtype=torch.float64), rtol=1e-12, atol=0)


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_softmax_hessian_is_at_most_one_half(K, seed):
    p = torch.softmax(3 * torch.randn(K, generator=seeded(seed), dtype=torch.float64), 0)
    largest = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p))[-1]
    assert float(largest) <= ll.LAMBDA["cross_entropy"] + 1e-15


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 12))
def test_curvature_is_an_upper_bound(seed, N, m):
    M = torch.randn(2, N, m, generator=seeded(seed), dtype=torch.float64)
    exact = torch.linalg.matrix_norm(M, 2).square() / N
    found = ll.curvature(M)
    assert bool((found >= exact * (1 - 1e-14)).all())
    assert bool((found <= exact * 1.01).all())


def test_curvature_in_single_precision_is_measured():
    M, _, _ = problem(30, 40)
    exact = float(torch.linalg.matrix_norm(M, 2)) ** 2 / 30
    assert 1.0 <= float(ll.curvature(M.float())) / exact <= 1.05
    assert float(ll.curvature(M.float(), "cross_entropy")) == pytest.approx(0.5 * float(ll.curvature(M.float())))


def test_centring_changes_neither_outputs_nor_optimum():
    M, V, Y = problem(12, 8)
    frame = ll.centre(M)
    A = frame.features(M)
    torch.testing.assert_close(A @ frame.to(V), M @ V)
    torch.testing.assert_close(A @ V, M @ frame.back(V))
    torch.testing.assert_close(A.T @ Y, frame.pull(M.T @ Y))
    torch.testing.assert_close(frame.back(frame.to(V)), V)
    assert float(torch.linalg.matrix_norm(A, 2)) < float(torch.linalg.matrix_norm(M, 2))
    best = [torch.linalg.lstsq(A, Y).solution for A in (M, frame.features(M))]
    torch.testing.assert_close(
        ll.average_loss(M, best[0], Y), ll.average_loss(M, frame.back(best[1]), Y), rtol=1e-10, atol=0
    )
    # the constant column is as large as the features are, so that it neither rules nor vanishes
    assert float(torch.linalg.vector_norm(A[:, -1])) == pytest.approx(
        float(torch.linalg.matrix_norm(A[:, :-1], 2)), rel=1e-3
    )


def test_centring_of_constant_features_is_finite():
    M = torch.ones(5, 3, dtype=torch.float64)
    assert bool(torch.isfinite(ll.centre(M).features(M)).all())
