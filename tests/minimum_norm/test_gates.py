"""The counting argument against its definitions, neuron by neuron, and against what networks really do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion import rigor
from companion.minimum_norm import gates


def layer(N=5, d=3, m=60, S=2, seed=0, kappa=1.0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, generator=g, dtype=torch.float64)
    return X, kappa * torch.randn(S, d, m, generator=g, dtype=torch.float64)


@given(seed=st.integers(0, 500), Q=st.floats(0.01, 5))
def test_fragile_counts_are_the_sets_of_the_theorem(seed, Q):
    X, W = layer(seed=seed)
    p = gates.Problem.of(
        X, torch.zeros(2, 5).double(), W, torch.ones(2, 60).double(), torch.ones(2).double(), "measured"
    )
    counts = gates.fragile_counts(X, W, p.tau(torch.tensor([Q, 2 * Q], dtype=torch.float64)))
    for s, q in enumerate((Q, 2 * Q)):
        Z = X @ W[s]
        A, tau = Z > 0, torch.linalg.vector_norm(X @ X.T, dim=1) * q / math.sqrt(60)
        fragile = Z.abs() <= tau[:, None]
        for i in range(len(X)):
            for j in range(len(X)):
                three = (
                    (fragile[i] & ~fragile[j] & A[j]).sum()
                    + (fragile[j] & ~fragile[i] & A[i]).sum()
                    + (fragile[i] & fragile[j]).sum()
                )
                assert (counts.on - counts.off)[s, i, j] == three
                assert counts.both[s, i, j] == (fragile[i] & fragile[j]).sum()
                halves = (
                    (A[i] & A[j] & ~fragile[i] & ~fragile[j]).sum()
                    + 0.5 * (fragile[i] & ~fragile[j] & A[j]).sum()
                    + 0.5 * (fragile[j] & ~fragile[i] & A[i]).sum()
                    + 0.5 * (fragile[i] & fragile[j]).sum()
                )
                assert (counts.on + counts.off)[s, i, j] / 2 == halves


def test_the_edges_of_the_fragile_sets():
    X, W = layer(S=1)
    W[0, :, 7] = 0.0
    exact = gates.fragile_counts(X, W, torch.zeros(1, 5, dtype=torch.float64))  # |z| <= 0 counts
    assert torch.equal(exact.both[0], torch.ones(5, 5, dtype=torch.int64))
    everything = gates.fragile_counts(X, W, (X @ W).abs().amax(2))  # the largest one counts too
    assert bool((everything.both == 60).all())
    assert bool((everything.off == 0).all())


@given(seed=st.integers(0, 200), slow=st.floats(1e-4, 0.5))
def test_path_length_bounds_the_sum_tightly(seed, slow):
    g = torch.Generator().manual_seed(seed)
    values = torch.sort(slow + (1 - slow) * torch.rand(1, 4, generator=g, dtype=torch.float64)).values
    c, eta = torch.randn(1, 4, generator=g, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    k = torch.arange(int(40 / float(values[0, 0])) + 1)[:, None]
    exact = float(torch.linalg.vector_norm((1 - values) ** k * c, dim=1).sum())
    bound = float(gates._path_length(values, c, eta))
    assert exact * (1 - 1e-12) <= bound <= exact * 1.001


@pytest.mark.parametrize("reference", ["gate", "midpoint"])
@pytest.mark.parametrize("level", ["measured", "certified"])
def test_a_closed_loop_stays_closed_when_everything_is_rebuilt_from_its_q(reference, level):
    X, W = layer(N=4, m=200, S=1, kappa=300.0)
    W, signs = torch.cat([W, W], 2), torch.cat([torch.ones(1, 200), -torch.ones(1, 200)], 1).double()
    arguments = (X, torch.ones(1, 4).double(), W, signs, torch.full((1,), 0.01).double())
    loop = gates.close_loop(gates.Problem.of(*arguments, level), reference)
    assert bool(loop.closed)
    assert float(loop.Q_star) <= float(loop.Q)
    again = gates.fragile_counts(X, W, torch.linalg.vector_norm(X @ X.T, dim=1) * loop.Q_star[:, None] / 20)
    F = (X @ X.T).abs() * (again.on - again.off) / 400
    eps = float(torch.linalg.eigvalsh(F)[0, -1]) * (0.5 if reference == "midpoint" else 1)
    assert eps <= float(loop.eps) * (1 + 1e-9)
    # the certified loop is the weaker statement
    plain = gates.close_loop(gates.Problem.of(*arguments, "measured"), reference)
    assert float(plain.Q_star) <= float(loop.Q_star) * (1 + 1e-9)


def test_eigenvalues_and_norms_hold_for_every_matrix_in_an_interval():
    X, W = layer(N=2, S=1)
    p = gates.Problem.of(X, X.new_ones(1, 2), W, X.new_ones(1, 60), X.new_ones(1), "certified")
    G = rigor.Interval.around(torch.eye(2, dtype=torch.float64)[None], torch.full((1, 2, 2), 0.1, dtype=torch.float64))
    assert 0.79 < float(p.smallest(G)) <= 0.8  # (0.9, -0.1) twice
    assert 1.2 <= float(p.largest(G)) < 1.21
    assert 1.2 <= float(p.norm(G)) < 1.21
    hidden = G * torch.tensor([[[1.0, 10.0], [10.0, 100.0]]], dtype=torch.float64)
    assert float(p.norm(hidden)) >= 111  # the largest row sum, not the first


def test_a_measured_eigenvalue_of_rounding_size_is_zero():
    positive = 0
    for seed in range(20):
        X, W = layer(N=4, S=1, seed=seed)
        p = gates.Problem.of(X, X.new_ones(1, 4), W, X.new_ones(1, 60), X.new_ones(1), "measured")
        A = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        G = (A @ A.T)[None]  # of rank 2
        positive += bool(torch.linalg.eigvalsh(G)[0, 0] > 0)
        assert float(p.smallest(G)) == 0
        assert float(p.smallest(G + torch.eye(4, dtype=torch.float64))) == pytest.approx(1)
    assert positive >= 2
