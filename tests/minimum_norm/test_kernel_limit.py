"""The infinitely wide layer: closed forms, an integral done by hand, and bounds that must hold."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import sphere_example

from companion import data, kernels, minimum_norm
from companion.minimum_norm import first_layer, kernel_limit


def test_the_numbers_of_the_example():
    X, y = sphere_example()
    H, cosine = kernels.relu_ntk(X), (X @ X.T).clamp(-1, 1).fill_diagonal_(1)
    torch.testing.assert_close(H, cosine * (math.pi - torch.arccos(cosine)) / (2 * math.pi), atol=1e-9, rtol=0)
    # page 4 of the course's specification
    assert float(torch.linalg.eigvalsh(H)[0]) == pytest.approx(0.14483229978593, abs=1e-12)
    norm2 = float(torch.linalg.eigvalsh(X.T @ X)[-1])
    assert 1 / minimum_norm.safe_step(X) == pytest.approx(norm2, rel=1e-12)
    assert norm2 == pytest.approx(3.647, abs=5e-4)
    exact = np.linalg.inv(H.numpy())
    assert float(y.numpy() @ exact @ y.numpy()) == pytest.approx(62.93, abs=5e-3)


def test_the_pair_at_sixty_degrees():
    X = torch.tensor([[1, 0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    for y, norm2 in (((1.0, -1.0), 6.0), ((1.0, 1.0), 3.0)):
        found = kernel_limit.generalization_bound(X, torch.tensor(y, dtype=torch.float64))
        assert found.norm2 == pytest.approx(norm2, abs=1e-12)


def test_kernel_regression_interpolates_and_loses_its_variance_at_the_data():
    X, y = sphere_example()
    fit = kernel_limit.kernel_regression(X, y, X)
    torch.testing.assert_close(fit.prediction, y)
    assert float(fit.variance.max()) < 1e-12
    Z = data.sphere(6, 10, torch.Generator().manual_seed(1))
    b = torch.linalg.solve(kernels.relu_ntk(X), kernels.relu_ntk(X, Z))
    S = kernels.relu_kernel(torch.cat([X, Z]))
    coefficients = torch.cat([-b, torch.eye(6, dtype=torch.float64)])  # z minus its prediction from X
    torch.testing.assert_close(
        kernel_limit.kernel_regression(X, y, Z).variance, (coefficients.T @ S @ coefficients).diag()
    )


def test_constant_of_one_sample_against_its_simulation_and_its_integral():
    X, y = torch.tensor([[0.6, 0.9]], dtype=torch.float64), torch.tensor([1.7], dtype=torch.float64)
    rho = float(torch.linalg.vector_norm(X))
    for step in (0.05, 0.4, 1.2):
        exact = kernel_limit.perp_constant_n1(rho, 1.7, step=step, kappa=2.0)
        found = kernel_limit.perp_constant(X, y, step, kappa=2.0, draws=20_000)
        assert found.value == pytest.approx(exact, rel=0.02)
        assert abs(found.value - exact) < 5 * found.error + 1e-4 * exact
    # flow: neurons with a e_0 < 0 stop, after the path v / rho^2
    v = torch.linspace(0, 2 * 1.7, 200_001, dtype=torch.float64)
    integral = float(torch.trapezoid((2 * 1.7 - v) ** 2, v)) / rho**4 * rho / (2 * 2.0 * math.sqrt(2 * math.pi))
    assert kernel_limit.perp_constant_n1(rho, 1.7, kappa=2.0) == pytest.approx(integral, rel=1e-9)
    assert kernel_limit.perp_constant_n1(rho, 1.7, step=1e-7) == pytest.approx(
        kernel_limit.perp_constant_n1(rho, 1.7), rel=1e-6
    )


def test_constant_of_the_example():
    X, y = sphere_example()
    found = kernel_limit.perp_constant(X, y, 1 / float(torch.linalg.matrix_norm(X, 2)) ** 2, draws=6000)
    assert found.value == pytest.approx(84, rel=0.06)
    assert found.error < 3
    far = kernel_limit.perp_constant(X, y, 0.2, kappa=10.0, draws=500)
    near = kernel_limit.perp_constant(X, y, 0.2, kappa=1.0, draws=500)
    assert near.value == pytest.approx(10 * far.value)


@pytest.mark.parametrize("antisymmetric", [True, False])
def test_constant_after_a_number_of_steps_is_what_training_shows(antisymmetric):
    X, y = sphere_example()
    X, y = X[:5], y[:5]
    step, m = 0.8, 100_000
    W, signs = minimum_norm.initialize(10, m, S=6, antisymmetric=antisymmetric)
    first = y - first_layer.forward(X, W, signs)
    run = minimum_norm.train(X, y, W, signs, step, 8, every=4)
    for row, steps in ((1, 4), (2, 8)):
        found = [kernel_limit.perp_constant(X, e, step, steps=steps, draws=2000).value for e in first]
        measured = math.sqrt(m) * run.observed["V_perp"][row].mean()
        assert float(measured) == pytest.approx(sum(found) / 6, rel=0.06)
    assert kernel_limit.perp_constant(X, y, step, steps=1, draws=50).value == 0  # the range of J_0
    end = kernel_limit.perp_constant(X, y, step, draws=500).value
    assert kernel_limit.perp_constant(X, y, step, steps=1000, draws=500).value == pytest.approx(end, rel=1e-5)
    assert kernel_limit.perp_constant(X, y, step, steps=4, draws=500).value < 0.9 * end


@given(seed=st.integers(0, 300), N=st.integers(2, 8), d=st.integers(2, 12), radius=st.floats(0.1, 10))
def test_spectrum_bounds_enclose(seed, N, d, radius):
    X = data.sphere(N, d, torch.Generator().manual_seed(seed), radius=radius)
    low, high = kernel_limit.spectrum_bounds(X)
    true = float(torch.linalg.eigvalsh(kernels.relu_ntk(X))[0])
    assert low <= true * (1 + 1e-9) + 1e-12 * radius**2
    assert true <= high * (1 + 1e-9) + 1e-12 * radius**2


def test_spectrum_bounds_of_the_lifted_example_and_of_orthogonal_rows():
    X, _ = sphere_example()
    X = torch.cat([math.sqrt(10) * X, torch.ones(20, 1, dtype=torch.float64)], 1)
    low, high = kernel_limit.spectrum_bounds(X)
    cosine = (X @ X.T / 11).clamp(-1, 1)
    off = [[float(cosine[i, j]) for j in range(20) if j != i] for i in range(20)]
    gaps = [max(0.0, 1 - max(sum(abs(c) ** (2 * p) for c in row) for row in off)) for p in range(1, 300)]
    odd = lambda n: math.prod(range(n, 0, -2)) if n > 0 else 1  # n!!  # noqa: E731
    c = [Fraction(odd(2 * p - 3), odd(2 * p - 2) * (2 * p - 1)) for p in range(1, 300)]
    series = sum(float(share) / (2 * math.pi) * gap for share, gap in zip(c, gaps, strict=True))
    rest = 0.25 - sum(float(share) for share in c) / (2 * math.pi)  # all c_p add up to 1/4
    assert 0 < rest < 0.01
    assert low == pytest.approx(11 * (series + rest * gaps[-1]), rel=1e-4)
    assert high == pytest.approx(
        min(5.5 * (1 - v * (1 - math.acos(v) / math.pi)) for row in off for v in row), rel=1e-9
    )
    low, high = kernel_limit.spectrum_bounds(torch.eye(4, dtype=torch.float64))
    assert low == pytest.approx(0.25)  # the odd part of the kernel, another quarter, is not counted
    assert high == pytest.approx(0.5)


def test_the_lower_spectrum_bound_of_a_pair_is_its_even_series():
    X = torch.tensor([[1, 0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    # sum_p c_p (1 - cos^2p) = 1/4 - cos arcsin(cos) / (2 pi)
    assert kernel_limit.spectrum_bounds(X)[0] == pytest.approx(0.25 - 0.5 * (math.pi / 6) / (2 * math.pi), rel=1e-12)


def test_generalization_bound_by_hand():
    X = torch.eye(8, dtype=torch.float64)
    y = torch.ones(8, dtype=torch.float64)
    found = kernel_limit.generalization_bound(X, y, delta=0.1)
    assert found.norm2 == pytest.approx(16)
    assert found.B == 4
    assert found.leading == pytest.approx(math.sqrt(2) * 4 / math.sqrt(8))
    assert found.bound - found.leading == pytest.approx(3 * math.sqrt(math.log(400) / 16))
    assert kernel_limit.generalization_bound(X, 0 * y).B == 1


def test_bad_input_is_named(unchecked):
    X, y = sphere_example()
    for call, text in (
        (lambda: kernel_limit.spectrum_bounds(X * torch.arange(1, 21)[:, None]), "rows of equal norm are needed"),
        (lambda: kernel_limit.spectrum_bounds(X[:1]), "X has 1 row; at least 2"),
        (lambda: kernel_limit.generalization_bound(2 * X, y), "unit norm is needed"),
        (lambda: kernel_limit.generalization_bound(X, y, delta=1.0), "delta is 1"),
        (lambda: kernel_limit.generalization_bound(X, y * 1e155), "y has entries up to"),
        (lambda: kernel_limit.perp_constant(X, y, 9.0), "step is 9"),
        (lambda: kernel_limit.perp_constant(X, y, 1e-17), "not next to nothing"),
        (lambda: kernel_limit.perp_constant(X, y, 1e-9), r"steps is .*; 1 to 10000000 are needed"),
        (lambda: kernel_limit.perp_constant(X, y, 0.1, steps=0), "steps is 0; 1 to"),
        (lambda: kernel_limit.perp_constant(X, y, 0.1, kappa=0.0), "kappa, step, draws are 0"),
        (lambda: kernel_limit.perp_constant(X, y, 0.1, draws=1), "draws are"),
        (lambda: kernel_limit.perp_constant(X, y[:, None], 0.1), r"y has shape \(20, 1\)"),
        (lambda: kernel_limit.perp_constant(X, y.float(), 0.1), "y has dtype torch.float32"),
        (lambda: kernel_limit.perp_constant(X * 1e200, y, 0.1), "X has entries up to"),
        (lambda: kernel_limit.perp_constant_n1(1.0, 1.0, step=2.0), "0 < step < 2"),
        (lambda: kernel_limit.perp_constant_n1(1.0, 1.0, kappa=-1.0), "rho, kappa, e0 are"),
        (lambda: kernel_limit.kernel_regression(X[:2] * 0 + 1, y[:2], X), r"parallel rows \(0, 1\)"),
        (lambda: kernel_limit.kernel_regression(X, y / 0 * 0, X), r"y\[0\] is nan"),
        (lambda: kernel_limit.kernel_regression(X, y[:, None], X), r"y has shape \(20, 1\)"),
        (lambda: kernel_limit.kernel_regression(X, y, X * 1e200), "Z has entries up to"),
        (lambda: kernel_limit.kernel_regression(X, y[:19], X), r"y has shape \(19,\); .* N = 20, as in X"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            call()
