"""Widths by proxies and by a Chernoff bound."""

import math

import oracles
import pytest
import torch
from making import relu_problem

from companion import data, kernels, networks
from companion import width_bounds as wb
from companion.width_bounds import fixed_points


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


@pytest.mark.parametrize(("theorem", "radius"), [("C", None), ("P", None), ("P", 1.0)])
def test_a_proxy_width_is_where_the_stated_theorem_starts_to_hold(theorem, radius):
    """N = 64, d = 8, rows of norm sqrt(8), LeCun everywhere; radii from the package, the theorems as stated."""
    X, Y, _ = relu_problem(64, 8, (8, 1), 64, radius=math.sqrt(8))
    K = kernels.relu_kernel(X)
    small, large = (float(v) for v in torch.linalg.eigvalsh(K)[[0, -1]])
    R_0 = math.sqrt(64 + float(K.trace()) / 8)  # ||Y||^2 = 64, and K entries of variance 1/n times ||F_1||_F^2
    width = wb.proxy_width(X, Y, theorem=theorem, scale=8**-0.5, last="lecun", radius=radius)
    for n, holds in ((1.001 * width, True), (0.999 * width, False)):
        w = [(math.sqrt(n) + math.sqrt(8)) / math.sqrt(8), 1 + 1 / math.sqrt(n)]
        phi = [float(torch.linalg.svdvals(X)[0]), math.sqrt(n * large / 8)]
        alpha_0, X_F = math.sqrt(n * small / 8), math.sqrt(64 * 8)
        s = wb.proxy_spectra(X, Y, [], n, scale=8**-0.5, last="lecun")
        for found, stated in ((s.w, w), (s.phi, phi), (s.alpha_0, alpha_0), (s.R_0, R_0), (s.X_F, X_F)):
            assert found.tolist() == pytest.approx(stated, rel=1e-9)
        if theorem == "C":
            C = wb.ball_fixed_point(s).C.tolist()
            stated = oracles.theorem_c(w, phi, alpha_0, R_0, C, 0.25)
            found = stated["rho"] > 0 and all(t <= c for t, c in zip(stated["T"], C, strict=True))
        else:
            C = [radius] * 2 if radius else fixed_points.paper_fixed_point(s).C.tolist()
            found = all(C) and min(oracles.theorem_p(w, X_F, alpha_0, R_0, C)[0]) >= 1
        assert found is holds


def test_a_proxy_of_three_layers_reads_the_features_below():
    X, Y, (below, *_) = relu_problem(6, 4, (4, 9, 30, 2), 3)
    F = torch.relu(X @ below[0])
    s = wb.proxy_spectra(X, Y.expand(-1, 2).contiguous(), [below], 50.0, scale=0.5)
    values = torch.linalg.eigvalsh(kernels.relu_kernel(F))
    assert s.phi.tolist() == pytest.approx(
        [float(torch.linalg.svdvals(A)[0]) for A in (X, F)] + [0.5 * math.sqrt(50 * float(values[-1]))]
    )
    assert s.w.tolist() == pytest.approx([float(torch.linalg.svdvals(below[0])[0]), 0.5 * (math.sqrt(50) + 3), 0])
    assert float(s.R_0) == pytest.approx(math.sqrt(12))
    assert float(s.alpha_0) == pytest.approx(0.5 * math.sqrt(50 * float(values[0])))


def test_equal_rows_have_no_width():
    found = []
    for seed in range(8):
        X, Y, _ = relu_problem(12, 6, (6, 1), seed)
        X[5] = X[4]
        found.append(float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0]))
        assert wb.chernoff_width(X, Y) == math.inf
        assert wb.proxy_width(X, Y) == math.inf
        assert float(wb.proxy_spectra(X, Y, [], 1e6).alpha_0) == 0
    assert min(found) < 0 < max(found)  # rounding, of either sign


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("entry", [wb.proxy_width, wb.chernoff_width])
def test_widths_of_bad_data_are_refused(entry):
    X, Y, _ = relu_problem(12, 6, (6, 1), 2)
    labels = torch.arange(12) % 3
    for error, words, arguments in (
        (TypeError, "X has dtype torch.float32; torch.float64 is needed", (X.float(), Y.float())),
        (ValueError, r"Y has shape \(12,\)", (X, Y[:, 0])),
        (TypeError, "Y has dtype torch.int64", (X, labels)),
        (ValueError, "N = 12, as in X", (X, Y[1:])),
        (ValueError, r"Y\[0, 0\] is nan", (X, Y * math.nan)),
    ):
        with pytest.raises(error, match=words):
            entry(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_options_of_widths_out_of_range_are_refused():
    X, Y, _ = relu_problem(12, 6, (6, 1), 2)
    for words, call in (
        ("n is 0", lambda: wb.proxy_spectra(X, Y, [], 0)),
        ("scale is -1", lambda: wb.proxy_width(X, Y, scale=-1)),
        ("W_1 takes 5 inputs but X has 6", lambda: wb.proxy_width(X, Y, lower=[X.new_ones(5, 3)])),
        ("epsilon is 1", lambda: wb.proxy_width(X, Y, epsilon=1)),
        ("radius is 1.0 for Theorem C", lambda: wb.proxy_width(X, Y, radius=1.0)),
        ("radius is 0", lambda: wb.proxy_width(X, Y, theorem="P", radius=0)),
        ("p is 1", lambda: wb.chernoff_width(X, Y, 1)),
        ("row norms from 2 to 2; unit rows", lambda: wb.hermite_lower_bound(2 * X, 3)),
        ("r_max is -1", lambda: wb.hermite_lower_bound(X, -1)),
        ("r_max is 1000000000000", lambda: wb.hermite_lower_bound(X, 10**12)),
        ("its kernel overflows; scale X down", lambda: wb.proxy_width(1e200 * X, Y)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


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


def test_hermite_bounds_of_two_rows():
    """``lambda_min`` of the 2 x 2 partial sums is the diagonal less the other entry: mu_0^2 drops out."""
    c = 0.6
    X = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c**2)]], dtype=torch.float64)
    mu = kernels.relu_hermite(6).tolist()
    stated = [sum(mu[r] * (1 - c**r) for r in range(R + 1)) for R in range(7)]
    assert wb.hermite_lower_bound(X, 6).tolist() == pytest.approx(stated, abs=1e-14)


@pytest.mark.parametrize(("N", "p"), [(16, 0.01), (16, 0.5), (64, 1e-6)])
def test_chernoff_width_is_the_corollary_as_stated(N, p):
    """The least t by a walk along a fine grid."""
    X, Y, _ = relu_problem(N, N, (N, 1), 18)
    smallest = float(torch.linalg.eigvalsh(kernels.relu_kernel(X))[0])
    s, half = float(torch.linalg.svdvals(X)[0]), math.sqrt(N / 2)
    t = torch.linspace(1e-3, 30, 1_000_000, dtype=torch.float64)
    small = torch.exp(-(t**2) / (2 * s**2)) * ((half + t) ** 2 + 2 * s**2 + 2 * half * s**2 / t) <= smallest / 4
    R_t = (half + float(t[small][0])) ** 2
    stated = max(24 * R_t * math.log(N / p), 12 * s * float(Y.square().sum().sqrt())) / smallest
    assert wb.chernoff_width(X, Y, p) == pytest.approx(stated, rel=1e-4)
    # a residual so large that the second term decides
    assert wb.chernoff_width(X, 1e9 * Y, p) == pytest.approx(12e9 * s * math.sqrt(N) / smallest, rel=1e-9)


def test_chernoff_width_is_loose_but_safe():
    X, Y, _ = relu_problem(128, 128, (128, 1), 17)
    assert wb.chernoff_width(X, Y, 0.01) > 100 * wb.proxy_width(X, Y)
    X, Y, _ = relu_problem(8, 8, (8, 1), 18)
    n = math.ceil(wb.chernoff_width(X, Y, 0.01))
    assert wb.certify(X, Y, networks.init_mlp((8, n, 1), scheme="gaussian", zero_last=True)).holds
