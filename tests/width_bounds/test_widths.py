"""Widths by proxies and by a Chernoff bound."""

import math

import pytest
import torch
from making import relu_problem

from companion import data, kernels, networks
from companion import width_bounds as wb


def test_proxy_width_of_corollary_d_in_closed_form():
    X, Y, _ = relu_problem(40, 40, (40, 1), 12)
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    expected = wb.two_layer_threshold() * float(torch.linalg.matrix_norm(X, 2) * torch.linalg.matrix_norm(Y)) / smallest
    assert wb.proxy_width(X, Y) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "power", "theory"),
    [
        ({"theorem": "P", "radius": 1.0, "last": "lecun"}, 2.0, 2.0),
        ({"theorem": "P"}, 1.5, 1.5),
    ],
)
def test_proxy_exponents_with_lambda_divided_out(options, power, theory):
    sizes, widths, smallest = (64, 256), [], []
    for N in sizes:
        X, Y, _ = relu_problem(N, N, (N, 1), 13)
        widths.append(math.log(wb.proxy_width(X, Y, **options)))
        smallest.append(math.log(float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])))
    run = math.log(sizes[1] / sizes[0])
    slope, fall = (widths[1] - widths[0]) / run, (smallest[1] - smallest[0]) / run
    assert slope + power * fall == pytest.approx(theory, abs=0.05)


def test_proxies_of_the_true_width_setting():
    """N = 64, d = 8, rows of norm sqrt(8), LeCun everywhere."""
    X, Y, _ = relu_problem(64, 8, (8, 1), 64, radius=math.sqrt(8))
    options = {"scale": 8**-0.5, "last": "lecun"}
    assert 0.5 < wb.proxy_width(X, Y, **options) / 2.8e5 < 2
    assert 0.5 < wb.proxy_width(X, Y, theorem="P", **options) / 4.3e8 < 2
    assert 0.5 < wb.proxy_width(X, Y, theorem="P", radius=1.0, **options) / 8.3e10 < 2


def test_deep_lecun_is_infeasible_at_every_width():
    X, Y, _ = relu_problem(64, 64, (64, 1), 14)
    below = torch.randn(64, 64, generator=torch.Generator().manual_seed(15), dtype=torch.float64)
    assert wb.proxy_width(X, Y, theorem="P", lower=[below], scale=1 / 8, last="lecun") == math.inf


def test_drawn_networks_concentrate_near_the_proxy():
    X, Y, _ = relu_problem(128, 128, (128, 1), 16)
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    ratios = []
    for seed in range(6):
        weights = networks.init_mlp((128, 16 * 128, 1), scheme="gaussian", zero_last=True, generator=seed)
        ratios.append(float(wb.spectra(X, Y, weights).alpha_0[0]) / math.sqrt(16 * 128 * smallest))
    assert 0.88 < sum(ratios) / 6 < 0.94


def test_hermite_bounds_rise_to_lambda():
    X = data.digits(n=60).X
    bounds = wb.hermite_lower_bound(X, 40)
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    assert bool((bounds[1:] >= bounds[:-1] - 1e-13).all())
    assert float(bounds[-1]) <= smallest + 1e-13
    assert float(bounds[-1]) > 0.3 * smallest


def test_chernoff_width_is_loose_but_safe():
    X, Y, _ = relu_problem(128, 128, (128, 1), 17)
    assert wb.chernoff_width(X, Y, 0.01) == pytest.approx(7.4e5, rel=0.3)
    assert wb.proxy_width(X, Y) == pytest.approx(1500, rel=0.3)
    X, Y, _ = relu_problem(8, 8, (8, 1), 18)
    n = math.ceil(wb.chernoff_width(X, Y, 0.01))
    assert wb.certify(X, Y, networks.init_mlp((8, n, 1), scheme="gaussian", zero_last=True)).holds
