"""Rigorous bounds against exact rationals and against ball arithmetic: never on the wrong side, and never far off."""

import itertools
import math
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.rigor import linear_algebra as verified

try:
    import flint
except ImportError:  # the extra `certify`
    flint = None

needs_flint = pytest.mark.skipif(flint is None, reason="python-flint is not installed")
METHODS = ("auto", "shift", "inverse")


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def gaussian(n, m, seed):
    return torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conditioned(n, m, kappa, seed):
    """A matrix whose singular values run from 1 to 1/kappa, up to the rounding of its making."""
    U, V = torch.linalg.qr(gaussian(n, n, seed))[0], torch.linalg.qr(gaussian(m, n, seed + 1))[0]
    return (U * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64)) @ V.T


def hilbert(n, m=None):
    i, j = torch.arange(n, dtype=torch.float64), torch.arange(m or n, dtype=torch.float64)
    return 1 / (i[:, None] + j + 1)


def singular(A):
    return torch.linalg.svdvals(A).tolist()


# --- Exact oracles ----------------------------------------------------------------------------------------------------


def gram(A):
    rows = verified.to_fractions(A)
    return [[sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) for y in rows] for x in rows]


def positive_definite(M):
    """``L D L^T`` in fractions, column by column: the slow twin of the elimination in integers."""
    M = [list(row) for row in M]
    for k in range(len(M)):
        if M[k][k] <= 0:
            return False
        for i in range(k + 1, len(M)):
            factor = M[i][k] / M[k][k]
            M[i] = [a - factor * b for a, b in zip(M[i], M[k], strict=True)]
    return True


def shifted(M, sign, square):
    """``sign * M + square I``."""
    return [[sign * a + (square if i == j else 0) for j, a in enumerate(row)] for i, row in enumerate(M)]


def norm_below(A, s):
    """Whether ``||A||_2 < s``, exactly."""
    return positive_definite(shifted(gram(A), -1, Fraction(s) ** 2))


def frobenius_square(A):
    return sum((a * a for row in verified.to_fractions(A) for a in row), Fraction(0))


def exact_product(A, B):
    columns = list(zip(*verified.to_fractions(B), strict=True))
    return [
        [sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) for y in columns]
        for x in verified.to_fractions(A)
    ]


def assert_below(A, methods=METHODS):
    """Every bound is 0.0 or exactly below ``sigma_min(A)``; returns the bounds."""
    bounds = [verified.sigma_min_lower(A, method=method) for method in methods]
    for method, bound in zip(methods, bounds, strict=True):
        assert bound >= 0
        assert bound == 0 or verified.exact_sigma_min_exceeds(A, bound), (method, bound, A.tolist())
    return bounds


@pytest.mark.parametrize(
    ("A", "sigma"),
    [
        (torch.eye(4, dtype=torch.float64), Fraction(1)),
        (matrix([3.0, 0.0, 0.0], [0.0, -0.5, 0.0]), Fraction(1, 2)),
        (matrix([1.0, 2.0], [2.0, 1.0]), Fraction(1)),  # eigenvalues 3 and -1
        (matrix([3.0, 4.0]), Fraction(5)),
        (matrix([2.0, 0.0, 0.0], [0.0, 3.0, 4.0]), Fraction(2)),
        (torch.diag(matrix([1e-300, 1e300])[0]), Fraction(1e-300)),
        (matrix([5e-324, 0.0], [0.0, 1.0]), Fraction(5e-324)),
    ],
)
def test_exact_oracle_on_known_matrices(A, sigma):
    assert not verified.exact_sigma_min_exceeds(A, sigma)  # strict
    assert not verified.exact_sigma_min_exceeds(A, sigma * Fraction(1001, 1000))
    assert not verified.exact_sigma_min_exceeds(A, sigma * (1 + Fraction(1, 10**40)))
    assert verified.exact_sigma_min_exceeds(A, sigma * (1 - Fraction(1, 10**40)))
    assert verified.exact_sigma_min_exceeds(A, 0.0)
    assert_below(A)


def test_exact_oracle_sees_dependence():
    row = gaussian(1, 4, 0)
    for A in (torch.cat([row, row]), torch.cat([row, -4 * row]), torch.zeros(1, 3).double(), gaussian(3, 2, 0)):
        assert not verified.exact_sigma_min_exceeds(A, 0.0)
    nearly = torch.cat([row, torch.nextafter(row, row + 1)])
    assert verified.exact_sigma_min_exceeds(nearly, 0.0)


def test_exact_oracle_against_its_twin_and_svd():
    answers = set()
    for seed in range(40):
        A = gaussian(1 + seed % 5, 1 + seed % 5 + seed % 3, seed)
        sigma, M = singular(A)[-1], gram(A)
        for factor in (0.5, 0.999, 1.001, 2.0):
            s = Fraction(sigma * factor)
            answer = verified.exact_sigma_min_exceeds(A, s)
            assert answer is positive_definite(shifted(M, 1, -(s**2))) is (factor < 1)
            answers.add(answer)
    assert answers == {True, False}


def test_to_fractions_is_exact():
    A = matrix([0.1, -2.5, 5e-324], [sys.float_info.max, 0.0, 1 / 3])
    exact = verified.to_fractions(A)
    assert [[float(a) for a in row] for row in exact] == A.tolist()
    assert exact[0][0] == Fraction(3602879701896397, 2**55) != Fraction(1, 10)
    assert exact[0][2] == Fraction(1, 2**1074)


# --- The smallest singular value --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 16))
def test_hilbert(n):
    for A in (hilbert(n), hilbert(n, n + 3)):
        auto, shift, inverse = assert_below(A)
        assert auto >= max(shift, inverse) / 2
        if n <= 8:
            assert auto > 0.5 * singular(A)[-1]


@pytest.mark.parametrize("gap", [2.0**-52, 1e-14, 1e-8, 1e-4])
def test_near_duplicate_rows(gap):
    for seed in range(5):
        A = gaussian(4, 7, seed)
        A[3] = A[1] * (1 + gap)
        A[3, 0] = A[1, 0] * (1 + 2 * gap) if seed % 2 else torch.nextafter(A[1, 0], A[1, 0] + 1)
        bounds = assert_below(A)
        if gap >= 1e-8 and seed % 2:
            assert bounds[0] > 0


def test_rows_one_ulp_apart():
    row = gaussian(1, 6, 3)
    other = row.clone()
    other[0, 2] = torch.nextafter(other[0, 2], other[0, 2] + 1)
    A = torch.cat([row, other])
    assert verified.exact_sigma_min_exceeds(A, 1e-18)
    assert_below(A)


@pytest.mark.parametrize("method", METHODS)
def test_exact_dependence_gives_zero(method):
    A = gaussian(5, 9, 4)
    A[3] = A[1]
    twice, zero, summed = gaussian(5, 9, 5), gaussian(3, 4, 6), torch.round(gaussian(4, 8, 7) * 2**20)
    twice[0] = -2 * twice[4]
    zero[1] = 0
    summed[3] = summed[0] + summed[1] - summed[2]
    for B in (A, twice, zero, summed, torch.zeros(2, 3, dtype=torch.float64)):
        assert verified.sigma_min_lower(B, method=method) == 0.0


@pytest.mark.parametrize("scale", [1e-300, 1e300, 1e-308, 2.0**-1060, 2.0**1023, 1.0])
def test_extreme_scales(scale):
    for seed in range(4):
        A = gaussian(3, 5, seed)
        A = (A / A.abs().max() * 0.99) * scale
        bound = assert_below(A)[0]
        assert bound > (0.9 * singular(A / scale)[-1] * 0.99) * scale * (0.5 if scale < 1e-310 else 1)
        spectral, frobenius = verified.spectral_norm_upper(A), verified.frobenius_norm_upper(A)
        assert norm_below(
            A, spectral if math.isfinite(spectral) else 2**1000 * Fraction(verified.spectral_norm_upper(A * 2.0**-1000))
        )
        assert frobenius == math.inf or Fraction(frobenius) ** 2 > frobenius_square(A)


def test_subnormal_matrix_and_smallest_float():
    tiny = 5e-324
    assert verified.sigma_min_lower(matrix([tiny])) in (0.0,)  # nothing lies between 0 and the truth
    assert verified.spectral_norm_upper(matrix([tiny])) >= tiny
    assert 0 < verified.sigma_min_lower(matrix([4 * tiny, 0.0], [0.0, 8 * tiny])) < 4 * tiny
    assert_below(matrix([tiny, 1.0], [1.0, tiny]))
    assert_below(matrix([1e300, 1e-300], [1e300, 2e-300]))


@pytest.mark.parametrize("spread", [1e4, 1e8, 1e12, 1e100, 1e300])
def test_mixed_row_scales(spread):
    for seed in range(4):
        A = gaussian(3, 6, seed)
        base = singular(A)[-1]
        A[seed % 3] /= spread
        bound = assert_below(A)[0]
        assert bound > 0.01 * base / spread


def hostile(seed):
    """A small matrix that is nearly dependent, badly scaled, or both; `seed` chooses how."""
    g = torch.Generator().manual_seed(seed)
    n = 2 + seed % 4
    m = n + seed // 4 % 3
    A = conditioned(n, m, 10.0 ** (seed % 17), 10_000 + 2 * seed)
    kind = seed // 17 % 6
    if kind == 1:
        A[-1] = A[0] + 10.0 ** -(seed % 18) * A[-1]
    elif kind == 2:
        A = A * 10.0 ** torch.randint(-150, 150, (n, 1), generator=g).double()
    elif kind == 3:
        A = torch.round(A * 2**6)
    elif kind == 4:
        A = A * 10.0 ** torch.randint(-8, 8, (1, m), generator=g).double()
    elif kind == 5:
        A = A * 2.0 ** (seed % 2001 - 1000)
        A[-1] = -A[0]
        A[-1, 0] = torch.nextafter(A[-1, 0], 0 * A[-1, 0])
    return A


def test_thousand_hostile_matrices():
    positive = 0
    for seed in range(1000):
        A = hostile(seed)
        positive += assert_below(A, METHODS[seed % 2 :: 2])[0] > 0  # auto and inverse, or shift
        assert norm_below(A, verified.spectral_norm_upper(A))
    assert 400 < positive < 1000


@needs_flint
def test_ball_arithmetic_agrees():
    with flint.ctx.workprec(800):
        for A in (hilbert(6), hilbert(8), hilbert(10), conditioned(9, 14, 1e7, 1), gaussian(12, 20, 2)):
            B = flint.arb_mat([[flint.arb(a) for a in row] for row in A.tolist()])
            values = [value.real for value in flint.acb_mat(B * B.transpose()).eig()]
            bounds = [verified.sigma_min_lower(A, method=method) for method in METHODS]
            assert bounds[0] > 0
            for value in values:
                assert value.rad() < 1e-40
                assert all(flint.arb(bound) ** 2 < value for bound in bounds)
                assert value < flint.arb(verified.spectral_norm_upper(A)) ** 2
            # the oracle would see a bound that is one part in a thousand too large
            sigma = Fraction(float(min(values, key=float).sqrt()))
            assert verified.exact_sigma_min_exceeds(A, sigma * Fraction(999, 1000))
            assert not verified.exact_sigma_min_exceeds(A, sigma * Fraction(1001, 1000))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (20, 40), (50, 400), (150, 400), (300, 900)])
@pytest.mark.parametrize("method", METHODS)
def test_tight_on_well_conditioned_matrices(shape, method):
    A = gaussian(*shape, 8)
    sigma = singular(A)[-1]
    assert 0.9 * sigma <= verified.sigma_min_lower(A, method=method) < sigma


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_inverse_and_auto_reach_ten_digits(kappa):
    for n, m in ((6, 6), (20, 45), (60, 200)):
        A = conditioned(n, m, kappa, 9)
        for method in ("auto", "inverse"):
            assert 0.5 / kappa <= verified.sigma_min_lower(A, method=method) <= (1 + 1e-5) / kappa


@given(st.integers(0, 500), st.integers(-400, 400))
def test_powers_of_two_are_exact(seed, k):
    A = conditioned(2 + seed % 4, 5 + seed % 3, 10.0 ** (seed % 9), seed)
    for bound in (verified.sigma_min_lower, verified.spectral_norm_upper, verified.frobenius_norm_upper):
        assert bound(torch.ldexp(A, torch.tensor(k))) == math.ldexp(bound(A), k)
    B = gaussian(A.shape[1], 3, seed)
    assert verified.product_error(A * 2.0**k, B) == math.ldexp(verified.product_error(A, B), k)


@given(st.integers(0, 1000))
def test_row_order_hardly_matters(seed):
    A = conditioned(6, 9, 10.0 ** (seed % 5), seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert verified.sigma_min_lower(A[order]) == pytest.approx(verified.sigma_min_lower(A), rel=1e-5)
    assert verified.spectral_norm_upper(A[order]) == pytest.approx(verified.spectral_norm_upper(A), rel=1e-8)


def test_input_is_left_alone():
    A = gaussian(5, 8, 1).requires_grad_()
    before = A.detach().clone()
    for method in METHODS:
        verified.sigma_min_lower(A, method=method)
    verified.spectral_norm_upper(A)
    assert verified.product_radius(A, A.T).requires_grad is False
    assert torch.equal(A.detach(), before)
    assert verified.sigma_min_lower(A.T.detach().clone().T) == pytest.approx(verified.sigma_min_lower(A), rel=1e-6)


# --- The guesses may be anything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 0.9, 1 - 1e-9, 1 + 1e-9, 1.1, 1e3])
def test_a_wrong_ritz_value_proves_nothing_false(monkeypatch, factor):
    honest = verified._largest_ritz

    def wrong(*arguments, **options):
        theta, error = honest(*arguments, **options)
        return factor * theta, error

    A = [conditioned(5, 8, 10.0**k, k) for k in range(9)]
    monkeypatch.setattr(verified, "_largest_ritz", wrong)
    bounds = [assert_below(B)[1] for B in A]
    assert (max(bounds) > 0) is (factor > 0.5)  # else c is too large for any factor to exist
    assert all(norm_below(B, verified.spectral_norm_upper(B)) for B in A)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-6, 1e-3, 1.0])
def test_a_wrong_factor_proves_nothing_false(monkeypatch, size):
    A = [conditioned(5, 8, 10.0**k, k) for k in range(6)]
    cholesky, solve = torch.linalg.cholesky_ex, torch.linalg.solve_triangular

    def noise(L):
        return L * (1 + size * gaussian(*L.shape, 11))

    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda M: (noise(cholesky(M)[0]), torch.tensor(0)))
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *a, **k: noise(solve(*a, **k)))
    bounds = [assert_below(B) for B in A]
    assert all(norm_below(B, verified.spectral_norm_upper(B)) for B in A)
    assert size == 1 or min(bounds[0]) > 0


@pytest.mark.parametrize("n", [100, 300])
def test_the_error_terms_are_what_stops_a_false_proof(monkeypatch, n):
    """A duplicated row does not stop the floating Cholesky factorization from succeeding."""
    A, lies = torch.relu(gaussian(n, n + n // 10, n)), []
    cholesky = torch.linalg.cholesky_ex
    for row in range(3, 13):
        A[n // 2] = A[row]
        assert all(verified.sigma_min_lower(A, method=method) == 0 for method in METHODS)
        with monkeypatch.context() as trusting:
            trusting.setattr(verified, "_absolute_gram_norm", lambda M: 0.0)
            trusting.setattr(verified, "_cholesky_error", lambda M: math.inf if cholesky(M)[1] else 0.0)
            lies.append(verified.sigma_min_lower(A, method="shift") > 0)
    assert any(lies)


def test_default_device_does_not_matter():
    A, B = gaussian(140, 200, 2), gaussian(200, 3, 3)
    here = verified.sigma_min_lower(A), verified.spectral_norm_upper(A), verified.product_error(A, B)
    with torch.device("meta"):
        there = verified.sigma_min_lower(A), verified.spectral_norm_upper(A), verified.product_error(A, B)
        assert verified.sigma_min_lower(A, method="inverse") > 0
    assert here == there


# --- Norms and products -----------------------------------------------------------------------------------------------

entries = st.one_of(
    st.floats(-4, 4), st.sampled_from([0.0, 1.0, -1.0, 1 + 2.0**-52, 1e16, -1e16, 1e-160, 2.0**-1022, 5e-324])
)


def matrices(n, m):
    return st.lists(st.lists(entries, min_size=m, max_size=m), min_size=n, max_size=n).map(lambda rows: matrix(*rows))


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(lambda shape: matrices(*shape)))
def test_norms_are_never_below(A):
    if A.any():
        assert norm_below(A, verified.spectral_norm_upper(A))
        assert Fraction(verified.frobenius_norm_upper(A)) ** 2 > frobenius_square(A)
    else:
        assert verified.spectral_norm_upper(A) == verified.frobenius_norm_upper(A) == 0
    assert verified.spectral_norm_upper(A) <= verified.frobenius_norm_upper(A)


def assert_encloses(A, B):
    exact, computed = exact_product(A, B), verified.to_fractions(A @ B)
    radius = verified.to_fractions(verified.product_radius(A, B))
    total = Fraction(0)
    for i, j in itertools.product(range(len(exact)), range(len(exact[0]))):
        error = abs(computed[i][j] - exact[i][j])
        assert error <= radius[i][j]
        total += radius[i][j] ** 2
    assert Fraction(verified.product_error(A, B)) ** 2 >= total


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3)).flatmap(
        lambda s: st.tuples(matrices(s[0], s[1]), matrices(s[1], s[2]))
    )
)
def test_product_errors_are_never_below(pair):
    assert_encloses(*pair)


@pytest.mark.parametrize("k", [2, 7, 64, 300])
def test_products_that_cancel(k):
    A = gaussian(3, k, k) * 10.0 ** torch.randint(-12, 12, (1, k), generator=torch.Generator().manual_seed(k)).double()
    B = gaussian(k, 2, k + 1)
    cancel = torch.cat([A, A + 1e-9 * A.roll(1, 0)], dim=1), torch.cat([B, -B])
    for pair in ((A, B), cancel, (A * 1e-170, B * 1e-150), (A * 1e-310, B * 1e-300)):
        assert_encloses(*pair)
    exact = exact_product(*cancel)
    worst = max(abs(e - Fraction(c)) for x, y in zip(exact, (cancel[0] @ cancel[1]).tolist(), strict=True)
                for e, c in zip(x, y, strict=True))  # fmt: skip
    assert worst > 0  # there was an error to enclose


def test_radius_bounds_the_worst_case_but_not_wildly():
    # every rounding in one direction: 1 + u + u + ... is 1 when summed from the left
    k = 100
    a = torch.full((1, k), 2.0**-53, dtype=torch.float64)
    a[0, 0] = 1.0
    left = 0.0
    for term in a[0].tolist():
        left += term
    lost = sum(map(Fraction, a[0].tolist())) - Fraction(left)
    radius = float(verified.product_radius(a, torch.ones(k, 1, dtype=torch.float64)))
    assert lost == Fraction(k - 1, 2**53)
    assert lost <= Fraction(radius) <= 2 * lost


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (40, 60), (60, 40), (200, 500), (700, 300)])
def test_norms_are_close_to_floats(shape):
    A = gaussian(*shape, 12)
    spectral, frobenius = torch.linalg.matrix_norm(A, 2).item(), A.norm().item()
    # beyond 128 rows the largest eigenvalue is a guess, poorest where the spectrum is as crowded as here
    slack = 1e-8 if min(shape) <= 128 else 1e-5
    assert spectral * (1 - 1e-14) <= verified.spectral_norm_upper(A) <= spectral * (1 + slack)
    assert frobenius * (1 - 1e-14) <= verified.frobenius_norm_upper(A) <= frobenius * (1 + 1e-6)
    assert verified.spectral_norm_upper(A) <= verified.frobenius_norm_upper(A)
    B = gaussian(shape[1], 20, 13)
    error = verified.product_error(A, B)
    model = verified.gamma(shape[1]) * (A.abs() @ B.abs()).norm().item()
    assert model * (1 - 1e-9) <= error <= model * (1 + 6 / shape[1])
    assert error == pytest.approx(verified.product_radius(A, B).norm().item(), rel=1e-6)


def test_frobenius_covers_squares_that_are_lost():
    A = torch.full((1, 4096), 2.0**-27, dtype=torch.float64)
    A[0, 0] = 1.0  # whatever is added to the partial sum that holds the 1 is lost: each square is a quarter ulp of it
    assert Fraction(float(A[0] @ A[0])) < frobenius_square(A)
    assert Fraction(verified.frobenius_norm_upper(A)) ** 2 > frobenius_square(A)
    assert verified.frobenius_norm_upper(A) < 1 + 1e-11


def test_overflow_is_infinity():
    A = torch.full((2, 2), sys.float_info.max, dtype=torch.float64)
    assert verified.frobenius_norm_upper(A) == math.inf
    assert verified.spectral_norm_upper(A) == math.inf
    assert verified.product_error(A, A) == math.inf
    assert torch.isinf(verified.product_radius(A, A)).all()


# --- Scalars ----------------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 5))
def test_rounding_steps_by_ulps(x, ulps):
    up, down = verified.round_up(x, ulps), verified.round_down(x, ulps)
    assert down < x < up
    assert up == math.inf or verified.round_down(up, ulps) == x
    assert down == -math.inf or verified.round_up(down, ulps) == x
    if ulps == 1:
        assert (up, down) == (math.nextafter(x, math.inf), math.nextafter(x, -math.inf))


def test_rounding_at_the_ends():
    assert verified.round_up(0.0) == 5e-324 == -verified.round_down(0.0)
    assert verified.round_up(math.inf) == math.inf
    assert verified.round_down(math.inf) == sys.float_info.max
    assert verified.round_down(-math.inf) == -math.inf
    assert math.isnan(verified.round_up(math.nan))
    assert math.isnan(verified.round_down(math.nan))


@given(st.integers(1, 10**9))
def test_gamma_is_rounded_up(k):
    u = Fraction(1, 2**53)
    exact = k * u / (1 - k * u)
    assert exact <= Fraction(verified.gamma(k)) <= exact * (1 + 8 * u)


# --- Bad input --------------------------------------------------------------------------------------------------------

ONE_ARGUMENT = (
    verified.sigma_min_lower,
    verified.spectral_norm_upper,
    verified.frobenius_norm_upper,
    verified.to_fractions,
    lambda A: verified.exact_sigma_min_exceeds(A, 0.0),
    lambda A: verified.product_radius(A, torch.ones(2, 2, dtype=torch.float64)),
    lambda A: verified.product_error(A, torch.ones(2, 2, dtype=torch.float64)),
)
GOOD = matrix([1.0, 2.0], [0.0, 1.0])


@pytest.mark.parametrize("function", ONE_ARGUMENT)
@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (GOOD.long(), TypeError, "A is torch.int64; rigorous bounds need float64"),
        (GOOD.float(), TypeError, r"A is torch.float32; rigorous bounds need float64 \(cast with A.double\(\)"),
        (GOOD.numpy(), TypeError, "A is a ndarray; a torch.Tensor is needed"),
        (GOOD * matrix([1.0, math.nan]), ValueError, "A holds NaN or infinity; finite numbers are needed"),
        (GOOD + matrix([0.0, -math.inf]), ValueError, "A holds NaN or infinity"),
        (GOOD[0], ValueError, r"A has shape \(2,\); a matrix \(n, m\) with n, m >= 1 is needed"),
        (GOOD[None], ValueError, r"A has shape \(1, 2, 2\); a matrix"),
        (GOOD[:0], ValueError, r"A has shape \(0, 2\); a matrix"),
        (GOOD[:, :0], ValueError, r"A has shape \(2, 0\); a matrix"),
    ],
)
def test_bad_matrix(unchecked, function, A, error, message):
    with pytest.raises(error, match=message):
        function(A)


def test_bad_arguments(unchecked):
    with pytest.raises(ValueError, match="A has 3 rows and 2 columns; n <= m is needed"):
        verified.sigma_min_lower(torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="method is 'qr'; one of 'auto', 'shift', 'inverse' is needed"):
        verified.sigma_min_lower(GOOD, method="qr")
    for function in (verified.product_radius, verified.product_error):
        with pytest.raises(
            ValueError, match=r"A has shape \(2, 2\), B \(3, 2\); A needs as many columns as B has rows"
        ):
            function(GOOD, torch.ones(3, 2, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"B is torch\.float32"):
            function(GOOD, GOOD.float())
    for s in (-1.0, math.nan, math.inf, Fraction(-1, 2)):
        with pytest.raises(ValueError, match=r"s is .*; a finite number >= 0 is needed"):
            verified.exact_sigma_min_exceeds(GOOD, s)


def test_flushed_denormals_are_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        with pytest.raises(RuntimeError, match="denormal numbers are flushed to zero"):
            verified.sigma_min_lower(GOOD)
    finally:
        torch.set_flush_denormal(False)


# --- Balls ------------------------------------------------------------------------------------------------------------


def arb(value):
    """A float, exactly."""
    return flint.arb(value)


def hostile_numbers(shape, g, kind):
    """Numbers of moderate, tiny, huge, subnormal or mixed size, some of them zero."""
    scales = {"plain": (0, 1), "wide": (-12, 13), "tiny": (-320, -290), "huge": (60, 100), "mixed": (-160, 100)}
    low, high = scales[kind]
    size = torch.randint(low, high, shape, generator=g).double()
    numbers = torch.randn(*shape, dtype=torch.float64, generator=g) * 10.0 ** (size / 2) * 10.0 ** (size / 2)
    return numbers * (torch.rand(*shape, generator=g) > 0.1)


def hostile_ball(shape, g, kind):
    """A ball, and a point of it (as exact numbers): middle, corner, or in between."""
    value = hostile_numbers(shape, g, kind)
    relative = 10.0 ** torch.randint(-18, 2, shape, generator=g).double()
    radius = (value.abs() * relative) * (torch.rand(*shape, generator=g) > 0.3)
    where = torch.randint(-1, 2, shape, generator=g).double() * 2.0 ** -torch.randint(0, 3, shape, generator=g).double()

    def point(v, r, w):
        if isinstance(v, list):
            return [point(*each) for each in zip(v, r, w, strict=True)]
        return arb(v) + arb(r) * arb(w)

    return value, radius, point(value.tolist(), radius.tolist(), where.tolist())


def dense_case(g, kind):
    k, m = (int(torch.randint(1, 6, (), generator=g)) for _ in range(2))
    h, D, x = hostile_ball((1, k), g, kind)
    weight_kind = "plain" if kind == "huge" else "huge" if kind == "tiny" else kind
    W, b = hostile_numbers((m, k), g, weight_kind), hostile_numbers((m,), g, kind)
    if int(torch.randint(0, 3, (), generator=g)) == 0 and k > 1:  # cancellation
        W[:, 1] = W[:, 0] * (1 + 1e-15)
        h[:, 1], D[:, 1] = -h[:, 0], D[:, 0]
        x[0][1] = -x[0][0]
    exact = [
        sum((arb(w) * v for w, v in zip(row, x[0], strict=True)), arb(c))
        for row, c in zip(W.tolist(), b.tolist(), strict=True)
    ]
    return verified.dense_ball(h, D, W, b), exact


def conv_case(g, kind):
    groups, stride, padding, dilation = (int(n) for n in torch.randint(1, 3, (4,), generator=g))
    h, D, x = hostile_ball((1, 2, 4, 3), g, kind)
    W = hostile_numbers((2, 2 // groups, 2, 2), g, "plain" if kind == "huge" else kind)
    b = hostile_numbers((2,), g, kind)
    ball = verified.conv2d_ball(h, D, W, b, stride=stride, padding=padding, dilation=dilation, groups=groups)
    rows, columns = ball[0].shape[2:]
    exact = []
    for out, i, j in itertools.product(range(2), range(rows), range(columns)):
        total = arb(float(b[out]))
        for c, p, q in itertools.product(range(2 // groups), range(2), range(2)):
            a, e = i * stride - padding + p * dilation, j * stride - padding + q * dilation
            if 0 <= a < 4 and 0 <= e < 3:
                total += arb(float(W[out, c, p, q])) * x[0][out // (2 // groups) * (2 // groups) + c][a][e]
        exact.append(total)
    return ball, exact


def batchnorm_case(g, kind):
    h, D, x = hostile_ball((1, 3), g, kind)
    mu, gain, b = (hostile_numbers((3,), g, kind) for _ in range(3))
    gain = gain if kind in ("plain", "tiny") else hostile_numbers((3,), g, "plain")
    mu = torch.where(torch.rand(3, generator=g) < 0.4, h[0] * (1 + 1e-15), mu)
    v, eps = hostile_numbers((3,), g, "wide").abs(), 10.0 ** -float(torch.randint(2, 12, (), generator=g))
    columns = zip(x[0], mu.tolist(), v.tolist(), gain.tolist(), b.tolist(), strict=True)
    exact = [arb(a) * (y - arb(m)) / (arb(w) + arb(eps)).sqrt() + arb(c) for y, m, w, a, c in columns]
    return verified.batchnorm_ball(h, D, mu, v, gain, b, eps), exact


def add_case(g, kind):
    (h, D, x), (k, E, y) = hostile_ball((1, 4), g, kind), hostile_ball((1, 4), g, kind)
    return verified.add_ball(h, D, k, E), [a + b for a, b in zip(x[0], y[0], strict=True)]


def avgpool_case(g, kind):
    h, D, x = hostile_ball((1, 1, 2, 3), g, kind)
    flat = [v for row in x[0][0] for v in row]
    return verified.avgpool_ball(h, D, torch.nn.AdaptiveAvgPool2d(1), 6), [sum(flat, arb(0.0)) / 6]


def pointwise_case(ball, exact):
    def case(g, kind):
        h, D, x = hostile_ball((1, 4), g, "wide" if kind in ("huge", "mixed") else kind)
        return ball(h, D), [exact(v) for v in x[0]]

    return case


def true_max(a, b):
    return a if a >= b else b


def maxpool_case(g, kind):
    h, D, x = hostile_ball((1, 1, 2, 2), g, kind)
    (a, b), (c, d) = x[0][0]
    return verified.maxpool_ball(h, D, torch.nn.MaxPool2d(2)), [true_max(true_max(a, b), true_max(c, d))]


def softplus_case(g, kind):
    beta = 10.0 ** float(torch.randint(-2, 3, (), generator=g))
    case = pointwise_case(
        lambda h, D: verified.softplus_ball(h, D, beta), lambda v: (1 + (arb(beta) * v).exp()).log() / arb(beta)
    )
    return case(g, "plain" if kind in ("wide", "mixed", "huge") else kind)


CASES = {
    "dense": dense_case,
    "conv2d": conv_case,
    "batchnorm": batchnorm_case,
    "add": add_case,
    "avgpool": avgpool_case,
    "maxpool": maxpool_case,
    "relu": pointwise_case(verified.relu_ball, lambda v: true_max(v, arb(0.0))),
    "tanh": pointwise_case(verified.tanh_ball, lambda v: v.tanh()),
    "softplus": softplus_case,
}
EXACT_LAYERS = ("relu", "maxpool")  # no rounding: only the input's radius can be forgotten
KINDS = ("plain", "wide", "tiny", "huge", "mixed")


def violations(case, seeds, factor=1.0):
    """How many of the trials have an entry outside the ball with its radius multiplied by `factor`."""
    found = 0
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        kind = KINDS[seed % len(KINDS)]
        with flint.ctx.workprec(2400):  # 10^-320 beside 10^200 is still exact
            (value, radius), exact = case(g, kind)
            if not (torch.isfinite(value).all() and torch.isfinite(radius).all()):
                continue  # the next layer refuses it
            entries = zip(value.flatten().tolist(), radius.flatten().tolist(), exact, strict=True)
            found += not all(abs(arb(v) - e) <= arb(r) * arb(factor) for v, r, e in entries)
    return found


@needs_flint
@pytest.mark.parametrize("name", CASES)
def test_balls_enclose(name):
    assert violations(CASES[name], range(1200)) == 0


@needs_flint
@pytest.mark.parametrize("name", CASES)
def test_a_radius_of_zero_is_caught(name):
    assert violations(CASES[name], range(100), factor=0.0) > 10


@needs_flint
@pytest.mark.parametrize("name", [n for n in CASES if n not in EXACT_LAYERS])
def test_a_ball_without_its_own_rounding_is_caught(monkeypatch, name):
    for constant in ("UNIT", "_TINY", "_ETA"):
        monkeypatch.setattr(verified, constant, 0.0)
    monkeypatch.setattr(verified, "gamma", lambda k: 0.0)
    assert violations(CASES[name], range(200)) > 0


@needs_flint
@pytest.mark.parametrize(("constant", "layer"), [("_TINY", "dense"), ("_TINY", "batchnorm"), ("_ETA", "conv2d")])
def test_a_ball_without_underflow_is_caught(monkeypatch, constant, layer):
    monkeypatch.setattr(verified, constant, 0.0)
    assert violations(CASES[layer], range(300)) > 0


def test_balls_are_not_far_larger_than_needed():
    h, W, b = gaussian(50, 30, 1), gaussian(20, 30, 2), gaussian(1, 20, 3)[0]
    D = torch.full_like(h, 1e-6)
    value, radius = verified.dense_ball(h, D, W, b)
    assert torch.equal(value, h @ W.T + b)
    assert (radius <= 1e-6 * W.abs().sum(dim=1) * (1 + 1e-5)).all()  # a corner of the box reaches it
    corner = (h[:, None, :] + D[0] * W.sign()) * W
    assert ((corner.sum(dim=2) + b - value) >= radius * (1 - 1e-5)).all()
    value, radius = verified.dense_ball(h, 0 * D, W)
    assert radius.max() < 33 * 2.0**-53 * (h.abs() @ W.abs().T).max()


def test_convolution_is_the_library_s():
    h, W = gaussian(3 * 4 * 7, 5, 1).reshape(3, 4, 7, 5), gaussian(6, 2 * 3 * 2, 2).reshape(6, 2, 3, 2)
    b, zero = gaussian(1, 6, 3)[0], torch.zeros_like(h)
    for options in ({}, {"stride": (2, 1), "padding": (1, 2)}, {"dilation": 2, "padding": 2}):
        value, radius = verified.conv2d_ball(h, zero, W, b, groups=2, **options)
        library = torch.nn.functional.conv2d(h, W, b, groups=2, **options)
        torch.testing.assert_close(value, library, rtol=1e-13, atol=1e-13)
        assert (radius < 1e-13).all()
        single = verified.conv2d_ball(h, zero, W.float(), b.float(), groups=2, **options)
        double = verified.conv2d_ball(h, zero, W.float().double(), b.float().double(), groups=2, **options)
        assert torch.equal(single[0], double[0])


@pytest.mark.parametrize("threshold", [20.0, 5.0, 0.0, -3.0])
def test_clipped_softplus_and_its_jump(threshold):
    x = torch.linspace(-80, 80, 4001, dtype=torch.float64)
    for beta in (0.5, 1.0, 10.0):
        value, radius = verified.softplus_ball(x, torch.zeros_like(x), beta, threshold)
        clipped = torch.nn.functional.softplus(x, beta, threshold)
        assert ((value - clipped).abs() <= radius).all()
        jump = math.log1p(math.exp(-threshold)) / beta
        assert radius.max() <= jump * (1 + 1e-6) + 1e-13
        analytic = verified.softplus_ball(x, torch.zeros_like(x), beta)[1]
        assert not ((value - clipped).abs() <= analytic).all()  # the jump is real
    if threshold == 20.0:
        assert math.log1p(math.exp(-20.0)) == pytest.approx(2.06e-9, rel=1e-3)


FOUR = torch.ones(1, 2, 2, 2, dtype=torch.float64)
LAYERS = (
    lambda h, D: verified.dense_ball(h, D, GOOD),
    lambda h, D: verified.batchnorm_ball(h, D, torch.zeros(2), torch.ones(2)),
    lambda h, D: verified.add_ball(h, D, GOOD, GOOD),
    lambda h, D: verified.add_ball(GOOD, GOOD, h, D),
    lambda h, D: verified.avgpool_ball(h, D, torch.nn.Identity(), 1),
    lambda h, D: verified.maxpool_ball(h, D, torch.nn.Identity()),
    verified.relu_ball,
    verified.tanh_ball,
    verified.softplus_ball,
)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("h", "D", "error", "message"),
    [
        ([1.0], GOOD, TypeError, "value is a list; a torch.Tensor is needed"),
        (GOOD, 0.0, TypeError, "radius is a float; a torch.Tensor is needed"),
        (GOOD.float(), GOOD, TypeError, "value is torch.float32 on cpu; enclosures need float64 on the CPU"),
        (GOOD, GOOD.to("meta"), TypeError, "radius is torch.float64 on meta; enclosures need float64 on the CPU"),
        (GOOD[:0], GOOD[:0], ValueError, r"value has shape \(0, 2\)"),
        (GOOD, GOOD[:, :1], ValueError, r"radius has shape \(2, 1\)"),
        (GOOD * math.nan, GOOD, ValueError, "value lies between nan and nan; finite numbers are needed"),
        (GOOD, GOOD * math.inf, ValueError, "radius lies between"),
        (GOOD, -GOOD, ValueError, "radius lies between -2.0 and -?0.0; finite numbers are needed, no radius below 0"),
    ],
)
def test_bad_balls(unchecked, layer, h, D, error, message):
    with pytest.raises(error, match=message):
        layer(h, D)


def test_bad_layers(unchecked):
    zero = torch.zeros_like(GOOD)
    with pytest.raises(ValueError, match=r"weight is torch.int64 or holds NaN or infinity"):
        verified.dense_ball(GOOD, zero, GOOD.long())
    with pytest.raises(ValueError, match=r"bias is torch.float64 or holds NaN or infinity"):
        verified.dense_ball(GOOD, zero, GOOD, GOOD[0] * math.inf)
    with pytest.raises(ValueError, match=r"value has shape \(1, 2, 2, 2\); 2 axes"):
        verified.dense_ball(FOUR, 0 * FOUR, GOOD)
    with pytest.raises(ValueError, match=r"value has shape \(2, 2\); 4 axes"):
        verified.conv2d_ball(GOOD, zero, FOUR)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 2, 2, 2\) with groups 2; value has 2 channels"):
        verified.conv2d_ball(FOUR, 0 * FOUR, FOUR, groups=2)
    with pytest.raises(ValueError, match=r"var \+ eps is -1.0 somewhere; a positive number is needed"):
        verified.batchnorm_ball(GOOD, zero, GOOD[0], torch.tensor([-1.0, 1.0]).double(), eps=0.0)
    with pytest.raises(ValueError, match=r"value has shape \(2, 2\), other \(2, 1\); equal shapes are needed"):
        verified.add_ball(GOOD, zero, GOOD[:, :1], zero[:, :1])
    with pytest.raises(ValueError, match="the layer sums 4194304 terms; fewer than 2\\^22 are needed"):
        verified.avgpool_ball(GOOD, zero, torch.nn.Identity(), 2**22)
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"beta is .*; a positive finite number is needed"):
            verified.softplus_ball(GOOD, zero, beta)
