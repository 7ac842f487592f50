"""The kernels against closed values, series, quadrature, Monte Carlo and autograd."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion import data, kernels, networks


def rows(N, d, seed):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plane(*angles):
    return torch.tensor([[math.cos(t), math.sin(t)] for t in angles], dtype=torch.float64)


def by_quadrature(t, values):
    """E over w in the plane: |w|^2 has mean 2, the direction is uniform; only the overlap of half planes counts."""
    n = 200_000
    lo, hi = t - math.pi / 2, math.pi / 2
    p = lo + (hi - lo) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return float(values(p).mean() * (hi - lo) / (2 * math.pi))


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 2.0, 3.0])
def test_closed_forms_against_quadrature(t):
    X = plane(0.0, t)
    kernel = by_quadrature(t, lambda p: 2 * torch.cos(p) * torch.cos(p - t))
    ntk = by_quadrature(t, lambda p: torch.full_like(p, math.cos(t)))
    assert float(kernels.relu_kernel(X)[0, 1]) == pytest.approx(kernel, abs=1e-10)
    assert float(kernels.relu_ntk(X)[0, 1]) == pytest.approx(ntk, abs=1e-10)


def test_closed_forms_against_monte_carlo():
    X, Z, n = rows(5, 3, 0), rows(4, 3, 1), 400_000
    w = rows(3, n, 2)
    A, B = X @ w, Z @ w
    kernel = A.relu() @ B.relu().T / n
    ntk = (X @ Z.T) * ((A > 0).double() @ (B > 0).double().T) / n
    assert torch.allclose(kernels.relu_kernel(X, Z), kernel, atol=0.03)
    assert torch.allclose(kernels.relu_ntk(X, Z), ntk, atol=0.02)


def test_seven_orthonormal_rows():
    c = 1 / (2 * math.pi)
    Q = torch.linalg.qr(rows(7, 7, 3)).Q
    for X in (torch.eye(7, dtype=torch.float64), Q):
        expected = (0.5 - c) * torch.eye(7, dtype=torch.float64) + c
        assert (kernels.relu_kernel(X) - expected).abs().max() < 1e-12
        assert (kernels.relu_ntk(X) - 0.5 * torch.eye(7, dtype=torch.float64)).abs().max() < 1e-12


def test_near_duplicates_keep_their_digits():
    K = kernels.relu_ntk(plane(0.3, 0.3 + 1e-9))
    assert float(0.5 - K[0, 1]) == pytest.approx(1.59155e-10, rel=1e-5)
    assert float(kernels.angles(plane(0.0, 1e-9))[0, 1]) == pytest.approx(1e-9, rel=1e-6)


def test_many_rows_keep_the_digits_of_their_near_duplicates():
    X = data.unit_rows(rows(40, 6, 9))  # so many that a library would go over to a Gram matrix
    t = kernels.angles(torch.cat([X, X + 1e-9 * rows(40, 6, 10)]))
    apart = torch.stack([t[i, 40 + i] for i in range(40)])
    assert (apart > 1e-10).all()
    assert (apart < 1e-8).all()
    assert (t.diagonal() == 0).all()


@pytest.mark.parametrize("s", [1e-12, 1e-9, 1e-5, 1e-2, 0.49, 0.51])
def test_near_antipodal_rows_keep_their_digits(s):
    X = torch.tensor([[1.0, 0.0], [-1.0, math.tan(s)]], dtype=torch.float64)
    exact_s, term, series = Fraction(s), Fraction(1), Fraction(0)
    for k in range(1, 15):
        term = Fraction((-1) ** (k + 1) * 2 * k, math.factorial(2 * k + 1)) * exact_s ** (2 * k + 1)
        series += term
    expected = float(series) / (2 * math.pi) / math.cos(s)
    assert float(kernels.relu_kernel(X)[0, 1]) == pytest.approx(expected, rel=1e-12, abs=0)
    assert float(kernels.relu_ntk(X)[0, 1]) == pytest.approx(-s / (2 * math.pi), rel=1e-12, abs=0)


def test_both_ends_exactly():
    X = torch.tensor([[3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)
    end = torch.tensor([[12.5, 0.0], [0.0, 12.5]], dtype=torch.float64)
    assert (kernels.relu_kernel(X) - end).abs().max() < 1e-12
    assert (kernels.relu_ntk(X) - end).abs().max() < 1e-12
    t = kernels.angles(X)
    assert (t - torch.tensor([[0.0, math.pi], [math.pi, 0.0]], dtype=torch.float64)).abs().max() < 1e-15


def test_hermite_coefficients():
    mu2 = kernels.relu_hermite(300)
    table = {0: 0.159155, 1: 0.25, 2: 0.079577, 3: 0.0, 4: 0.006631, 5: 0.0, 6: 0.001989, 8: 0.000888}
    for r, value in table.items():
        assert float(mu2[r]) == pytest.approx(value, abs=1e-6)
    assert 0.5 - float(mu2.sum()) == pytest.approx(8.13e-6, rel=1e-3)
    double_factorial = math.prod(range(1, 18, 2))
    assert float(mu2[20]) == pytest.approx(double_factorial**2 / (2 * math.pi * math.factorial(20)), rel=1e-13)
    assert kernels.relu_hermite(0).shape == (1,)


def test_hermite_series_sums_to_the_kernel():
    X = data.unit_rows(rows(6, 9, 4))
    C, mu2 = X @ X.T, kernels.relu_hermite(200)
    C = C - torch.diag(C.diagonal())  # the series converges slowly only on the diagonal
    K = sum(m * C**r for r, m in enumerate(mu2.tolist()))
    off = ~torch.eye(6, dtype=torch.bool)
    assert (K - kernels.relu_kernel(X))[off].abs().max() < 1e-12


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_kernels_are_homogeneous_symmetric_and_positive(seed, N, d, a, b):
    X, Z = rows(N, d, seed), rows(3, d, seed + 1)
    for kernel in (kernels.relu_kernel, kernels.relu_ntk):
        K, bound = kernel(X, Z), X.norm(dim=1)[:, None] * Z.norm(dim=1)
        assert torch.allclose(kernel(a * X, b * Z), a * b * K, rtol=1e-12, atol=1e-14 * a * b * float(bound.max()))
        assert torch.allclose(kernel(Z, X), K.T, rtol=1e-13, atol=1e-15)
        assert (K.abs() <= bound / 2 * (1 + 1e-14)).all()
        own = kernel(X)
        assert torch.linalg.eigvalsh(own)[0] > -1e-13 * own.trace()


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_extreme_norms(scale):
    X = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    for kernel in (kernels.relu_kernel, kernels.relu_ntk):
        expected = kernel(X)
        assert torch.allclose(kernel(X * scale, X) / scale, expected, rtol=1e-14)
        assert torch.allclose(kernel(X * scale, X / scale), expected, rtol=1e-14)
    far, near = torch.tensor([[[1e300, 0.0]], [[0.0, 1e-300]]], dtype=torch.float64)
    assert float(kernels.relu_kernel(far, near)) == pytest.approx(1 / (2 * math.pi), rel=1e-14)


def test_zero_rows_have_zero_kernel_but_no_angle():
    X = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    assert (kernels.relu_kernel(X)[0] == 0).all()
    assert (kernels.relu_ntk(X)[:, 0] == 0).all()
    with pytest.raises(ValueError, match=r"X\[0\] is a zero row"):
        kernels.angles(X)


@pytest.mark.parametrize(("centre", "smallest", "norm"), [(True, 5.907e-4, 16.390), (False, 1.206e-4, 35.227)])
def test_all_digits(centre, smallest, norm):
    X = data.digits(centre=centre).X
    K = kernels.relu_kernel(X)
    assert X.shape == (1797, 64)
    assert float(torch.linalg.eigvalsh(K)[0]) == pytest.approx(smallest, rel=1e-3)
    assert float(torch.linalg.matrix_norm(X, 2)) == pytest.approx(norm, rel=1e-3)


def test_dependent_antipodal_pairs_make_the_kernel_singular():
    V = rows(3, 2, 5)
    K = kernels.relu_kernel(torch.cat([V, -V]))
    assert torch.linalg.eigvalsh(K)[0].abs() < 1e-14
    assert torch.linalg.eigvalsh(kernels.relu_kernel(torch.cat([V[:2], -V[:2]])))[0] > 1e-3


def test_float32_follows_the_input():
    X = rows(4, 3, 6)
    K = kernels.relu_kernel(X.float())
    assert K.dtype == torch.float32
    assert torch.allclose(K.double(), kernels.relu_kernel(X), rtol=1e-6)


@pytest.mark.parametrize("name", ["relu", "tanh", "softplus", "sin"])
@pytest.mark.parametrize("widths", [(4, 2), (4, 5, 1), (4, 6, 5, 3)])
def test_ntk_gram_against_the_jacobian(name, widths):
    weights = networks.init_mlp(widths, S=2, generator=7)
    X = rows(3, 4, 8)
    gram = kernels.ntk_gram(weights, X, name)
    for s in range(2):
        member = tuple(W[s] for W in weights)
        J = torch.autograd.functional.jacobian(lambda *w: networks.forward(w, X, name)[0].reshape(-1), member)
        J = torch.cat([j.reshape(3 * widths[-1], -1) for j in J], dim=1)
        assert torch.allclose(gram[s], J @ J.T, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("X", "Z", "message"),
    [
        (torch.full((2, 2), float("nan"), dtype=torch.float64), None, r"X\[0, 0\] is nan"),
        (torch.ones(2, 2, dtype=torch.int64), None, "X has dtype torch.int64"),
        (torch.ones(2), None, r"X has shape \(2,\); \(N, d\) is needed"),
        (torch.ones(2, 2), torch.ones(2, 3), "with d = 2, as in X"),
        (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64), "make them equal"),
        (torch.ones(2, 2), torch.full((2, 2), math.inf), r"Z\[0, 0\] is inf"),
    ],
)
def test_bad_input(unchecked, X, Z, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.relu_kernel(X, Z)


def test_negative_degree():
    with pytest.raises(ValueError, match="r_max is -1"):
        kernels.relu_hermite(-1)
