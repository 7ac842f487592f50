"""Rigorous bounds against exact rationals and against ball arithmetic: never on the wrong side, and never far off."""

import itertools
import math
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    conditioned,
    exact_product,
    flushing,
    fractions,
    frobenius_square,
    gaussian,
    gram,
    hilbert,
    matrix,
    norm_below,
    positive_definite,
    shifted,
    singular,
)

from companion import rigor
from companion.rigor import linear_algebra

try:
    import flint
except ImportError:  # the extra `certify`
    flint = None

needs_flint = pytest.mark.skipif(flint is None, reason="python-flint is not installed")
METHODS = ("auto", "shift", "inverse")


def assert_below(A, methods=METHODS):
    """Every bound is 0.0 or exactly below ``sigma_min(A)``; returns the bounds."""
    bounds = [rigor.sigma_min_lower(A, method=method) for method in methods]
    for method, bound in zip(methods, bounds, strict=True):
        assert bound >= 0
        assert bound == 0 or rigor.exact_sigma_min_exceeds(A, bound), (method, bound, A.tolist())
    return bounds


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
    assert rigor.exact_sigma_min_exceeds(A, 1e-18)
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
        assert rigor.sigma_min_lower(B, method=method) == 0.0


@pytest.mark.parametrize("scale", [1e-300, 1e300, 1e-308, 2.0**-1060, 2.0**1023, 1.0])
def test_extreme_scales(scale):
    for seed in range(4):
        A = gaussian(3, 5, seed)
        A = (A / A.abs().max() * 0.99) * scale
        bound = assert_below(A)[0]
        smallest = (0.9 * singular(A / scale)[-1] * 0.99) * scale
        assert bound > smallest or smallest < 2.0**-1022
        spectral, frobenius = rigor.spectral_norm_upper(A), rigor.frobenius_norm_upper(A)
        assert norm_below(
            A, spectral if math.isfinite(spectral) else 2**1000 * Fraction(rigor.spectral_norm_upper(A * 2.0**-1000))
        )
        assert frobenius == math.inf or Fraction(frobenius) ** 2 > frobenius_square(A)


def test_subnormal_matrix_and_smallest_float():
    tiny = 5e-324
    assert rigor.sigma_min_lower(matrix([tiny])) in (0.0,)  # nothing lies between 0 and the truth
    assert rigor.spectral_norm_upper(matrix([tiny])) >= tiny
    assert rigor.sigma_min_lower(matrix([4 * tiny, 0.0], [0.0, 8 * tiny])) == 0.0  # no subnormal number is a bound
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
        assert norm_below(A, rigor.spectral_norm_upper(A))
    assert 400 < positive < 1000


@needs_flint
def test_ball_arithmetic_agrees():
    with flint.ctx.workprec(800):
        for A in (hilbert(6), hilbert(8), hilbert(10), conditioned(9, 14, 1e7, 1), gaussian(12, 20, 2)):
            B = flint.arb_mat([[flint.arb(a) for a in row] for row in A.tolist()])
            values = [value.real for value in flint.acb_mat(B * B.transpose()).eig()]
            bounds = [rigor.sigma_min_lower(A, method=method) for method in METHODS]
            assert bounds[0] > 0
            for value in values:
                assert value.rad() < 1e-40
                assert all(flint.arb(bound) ** 2 < value for bound in bounds)
                assert value < flint.arb(rigor.spectral_norm_upper(A)) ** 2
            # the oracle would see a bound that is one part in a thousand too large
            sigma = Fraction(float(min(values, key=float).sqrt()))
            assert rigor.exact_sigma_min_exceeds(A, sigma * Fraction(999, 1000))
            assert not rigor.exact_sigma_min_exceeds(A, sigma * Fraction(1001, 1000))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (20, 40), (50, 400), (150, 400), (300, 900)])
@pytest.mark.parametrize("method", METHODS)
def test_tight_on_well_conditioned_matrices(shape, method):
    A = gaussian(*shape, 8)
    sigma = singular(A)[-1]
    assert 0.9 * sigma <= rigor.sigma_min_lower(A, method=method) < sigma


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_inverse_and_auto_reach_ten_digits(kappa):
    for n, m in ((6, 6), (20, 45), (60, 200)):
        A = conditioned(n, m, kappa, 9)
        for method in ("auto", "inverse"):
            assert 0.5 / kappa <= rigor.sigma_min_lower(A, method=method) <= (1 + 1e-5) / kappa


@given(st.integers(0, 500), st.integers(-400, 400))
def test_powers_of_two_are_exact(seed, k):
    A = conditioned(2 + seed % 4, 5 + seed % 3, 10.0 ** (seed % 9), seed)
    for bound in (rigor.sigma_min_lower, rigor.spectral_norm_upper, rigor.frobenius_norm_upper):
        assert bound(torch.ldexp(A, torch.tensor(k))) == math.ldexp(bound(A), k)
    B = gaussian(A.shape[1], 3, seed)
    assert rigor.product_error(A * 2.0**k, B) == math.ldexp(rigor.product_error(A, B), k)


@given(st.integers(0, 1000))
def test_row_order_hardly_matters(seed):
    A = conditioned(6, 9, 10.0 ** (seed % 5), seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert rigor.sigma_min_lower(A[order]) == pytest.approx(rigor.sigma_min_lower(A), rel=1e-5)
    assert rigor.spectral_norm_upper(A[order]) == pytest.approx(rigor.spectral_norm_upper(A), rel=1e-8)


def test_input_is_left_alone():
    A = gaussian(5, 8, 1).requires_grad_()
    before = A.detach().clone()
    for method in METHODS:
        rigor.sigma_min_lower(A, method=method)
    rigor.spectral_norm_upper(A)
    assert rigor.product_radius(A, A.T).requires_grad is False
    assert torch.equal(A.detach(), before)
    assert rigor.sigma_min_lower(A.T.detach().clone().T) == pytest.approx(rigor.sigma_min_lower(A), rel=1e-6)


# --- The guesses may be anything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 0.9, 1 - 1e-9, 1 + 1e-9, 1.1, 1e3])
def test_a_wrong_ritz_value_proves_nothing_false(monkeypatch, factor):
    honest = linear_algebra._largest_ritz

    def wrong(*arguments, **options):
        theta, error = honest(*arguments, **options)
        return factor * theta, error

    A = [conditioned(5, 8, 10.0**k, k) for k in range(9)]
    monkeypatch.setattr(linear_algebra, "_largest_ritz", wrong)
    bounds = [assert_below(B)[1] for B in A]
    assert (max(bounds) > 0) is (factor > 0.5)  # else c is too large for any factor to exist
    assert all(norm_below(B, rigor.spectral_norm_upper(B)) for B in A)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-6, 1e-3, 1.0])
def test_a_wrong_factor_proves_nothing_false(monkeypatch, size):
    A = [conditioned(5, 8, 10.0**k, k) for k in range(6)]
    cholesky, solve = torch.linalg.cholesky_ex, torch.linalg.solve_triangular

    def noise(L):
        return L * (1 + size * gaussian(*L.shape, 11))

    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda M: (noise(cholesky(M)[0]), torch.tensor(0)))
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *a, **k: noise(solve(*a, **k)))
    bounds = [assert_below(B) for B in A]
    assert all(norm_below(B, rigor.spectral_norm_upper(B)) for B in A)
    assert size == 1 or min(bounds[0]) > 0


@pytest.mark.parametrize("n", [100, 300])
def test_the_error_terms_are_what_stops_a_false_proof(monkeypatch, n):
    """A duplicated row does not stop the floating Cholesky factorization from succeeding."""
    A, lies = torch.relu(gaussian(n, n + n // 10, n)), []
    cholesky = torch.linalg.cholesky_ex
    for row in range(3, 13):
        A[n // 2] = A[row]
        assert all(rigor.sigma_min_lower(A, method=method) == 0 for method in METHODS)
        with monkeypatch.context() as trusting:
            trusting.setattr(linear_algebra, "_absolute_gram_norm", lambda M: 0.0)
            trusting.setattr(linear_algebra, "_cholesky_error", lambda M: math.inf if cholesky(M)[1] else 0.0)
            lies.append(rigor.sigma_min_lower(A, method="shift") > 0)
    assert any(lies)


def test_default_device_does_not_matter():
    A, B = gaussian(140, 200, 2), gaussian(200, 3, 3)
    here = rigor.sigma_min_lower(A), rigor.spectral_norm_upper(A), rigor.product_error(A, B)
    with torch.device("meta"):
        there = rigor.sigma_min_lower(A), rigor.spectral_norm_upper(A), rigor.product_error(A, B)
        assert rigor.sigma_min_lower(A, method="inverse") > 0
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
        assert norm_below(A, rigor.spectral_norm_upper(A))
        assert Fraction(rigor.frobenius_norm_upper(A)) ** 2 > frobenius_square(A)
    else:
        assert rigor.spectral_norm_upper(A) == rigor.frobenius_norm_upper(A) == 0
    assert rigor.spectral_norm_upper(A) <= rigor.frobenius_norm_upper(A)


def assert_encloses(A, B):
    exact, computed = exact_product(A, B), fractions(A @ B)
    radius = fractions(rigor.product_radius(A, B))
    total = Fraction(0)
    for i, j in itertools.product(range(len(exact)), range(len(exact[0]))):
        error = abs(computed[i][j] - exact[i][j])
        assert error <= radius[i][j]
        total += radius[i][j] ** 2
    assert Fraction(rigor.product_error(A, B)) ** 2 >= total


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
    radius = float(rigor.product_radius(a, torch.ones(k, 1, dtype=torch.float64)))
    assert lost == Fraction(k - 1, 2**53)
    assert lost <= Fraction(radius) <= 2 * lost


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (40, 60), (60, 40), (200, 500), (700, 300)])
def test_norms_are_close_to_floats(shape):
    A = gaussian(*shape, 12)
    spectral, frobenius = torch.linalg.matrix_norm(A, 2).item(), A.norm().item()
    # beyond 128 rows the largest eigenvalue is a guess, poorest where the spectrum is as crowded as here
    slack = 1e-8 if min(shape) <= 128 else 1e-5
    assert spectral * (1 - 1e-14) <= rigor.spectral_norm_upper(A) <= spectral * (1 + slack)
    assert frobenius * (1 - 1e-14) <= rigor.frobenius_norm_upper(A) <= frobenius * (1 + 1e-6)
    assert rigor.spectral_norm_upper(A) <= rigor.frobenius_norm_upper(A)
    B = gaussian(shape[1], 20, 13)
    error = rigor.product_error(A, B)
    model = rigor.gamma(shape[1]) * (A.abs() @ B.abs()).norm().item()
    assert model * (1 - 1e-9) <= error <= model * (1 + 6 / shape[1])
    assert error == pytest.approx(rigor.product_radius(A, B).norm().item(), rel=1e-6)


def test_frobenius_covers_squares_that_are_lost():
    A = torch.full((1, 4096), 2.0**-27, dtype=torch.float64)
    A[0, 0] = 1.0  # whatever is added to the partial sum that holds the 1 is lost: each square is a quarter ulp of it
    assert Fraction(float(A[0] @ A[0])) < frobenius_square(A)
    assert Fraction(rigor.frobenius_norm_upper(A)) ** 2 > frobenius_square(A)
    assert rigor.frobenius_norm_upper(A) < 1 + 1e-11


def test_many_small_squares_that_are_all_flushed():
    A = torch.full((1, 2**23), 2.0**-511 * (1 - 2.0**-53), dtype=torch.float64)
    with flushing():
        assert not (A @ A.T).any()
        found = linear_algebra._frobenius(A)
    assert Fraction(found) ** 2 >= 2**23 * Fraction(A[0, 0].item()) ** 2


def test_the_inverse_of_a_row_that_is_flushed_shows_nothing():
    """``I - A R`` loses ``2e-308 * 1e299`` where subnormal operands count as 0: rows are brought to size one first."""
    A = matrix([1.0, 0.0, 0.0], [0.0, 1e-299, 2e-308])
    with flushing():
        assert linear_algebra._inverse_bound(A) == 0
        bound = rigor.sigma_min_lower(A)
    assert bound > 0.5e-299
    assert rigor.exact_sigma_min_exceeds(A, bound)


def test_overflow_is_infinity():
    A = torch.full((2, 2), sys.float_info.max, dtype=torch.float64)
    assert rigor.frobenius_norm_upper(A) == math.inf
    assert rigor.spectral_norm_upper(A) == math.inf
    assert rigor.product_error(A, A) == math.inf
    assert torch.isinf(rigor.product_radius(A, A)).all()


# --- Bad input --------------------------------------------------------------------------------------------------------

ONE_ARGUMENT = (
    rigor.sigma_min_lower,
    rigor.spectral_norm_upper,
    rigor.frobenius_norm_upper,
    rigor.exact_rank,
    lambda A: rigor.exact_sigma_min_exceeds(A, 0.0),
    lambda A: rigor.product_radius(A, torch.ones(2, 2, dtype=torch.float64)),
    lambda A: rigor.product_error(A, torch.ones(2, 2, dtype=torch.float64)),
)
GOOD = matrix([1.0, 2.0], [0.0, 1.0])


@pytest.mark.parametrize("function", ONE_ARGUMENT)
@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (GOOD.long(), TypeError, "A is torch.int64; rigorous bounds need float64"),
        (GOOD.float(), TypeError, r"A is torch.float32; rigorous bounds need float64 \(cast with A.double\(\)"),
        (GOOD.numpy(), TypeError, "A is a ndarray; a torch.Tensor is needed"),
        (GOOD.to_sparse(), TypeError, "A is torch.sparse_coo on cpu; a dense tensor with numbers is needed"),
        (GOOD.to("meta"), TypeError, "A is torch.strided on meta; a dense tensor with numbers is needed"),
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
        rigor.sigma_min_lower(torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="method is 'qr'; one of 'auto', 'shift', 'inverse' is needed"):
        rigor.sigma_min_lower(GOOD, method="qr")
    for function in (rigor.product_radius, rigor.product_error):
        with pytest.raises(
            ValueError, match=r"A has shape \(2, 2\), B \(3, 2\); A needs as many columns as B has rows"
        ):
            function(GOOD, torch.ones(3, 2, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"B is torch\.float32"):
            function(GOOD, GOOD.float())
    for s in (-1.0, math.nan, math.inf, Fraction(-1, 2)):
        with pytest.raises(ValueError, match=r"s is .*; a finite number >= 0 is needed"):
            rigor.exact_sigma_min_exceeds(GOOD, s)
    with pytest.raises(TypeError, match=r"s is a Tensor; a number is needed"):
        rigor.exact_sigma_min_exceeds(GOOD, GOOD[0, 0])
    assert not rigor.exact_sigma_min_exceeds(GOOD, 10**400)
    for G, radius in ((GOOD[:1], GOOD[:1]), (GOOD, GOOD[:1]), (GOOD[:1], GOOD)):
        with pytest.raises(ValueError, match=r"G has shape \(.*\), radius \(.*\); both \(n, n\) are needed"):
            rigor.eig_min_lower(G, radius)


def test_bits_that_torch_only_negates_when_they_are_read():
    A = torch._neg_view(GOOD)
    assert rigor.frobenius_norm_upper(A) == rigor.frobenius_norm_upper(GOOD)
    assert rigor.product_radius(A, GOOD).equal(rigor.product_radius(GOOD, GOOD))


# --- Each error term, with a planted guess ----------------------------------------------------------------------------


def planted(monkeypatch, L):
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: (L.clone(), torch.tensor(0)))


def test_a_dense_residual_counts_both_halves(monkeypatch):
    n = 6
    M = torch.eye(n, dtype=torch.float64) + 0.1 * (1 - torch.eye(n, dtype=torch.float64))  # ||M - I|| = 0.5
    planted(monkeypatch, torch.eye(n, dtype=torch.float64))
    assert linear_algebra._cholesky_error(M) >= 0.5


def test_the_rounding_of_the_product_of_the_factor_counts(monkeypatch):
    g = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(20):
        a, b = torch.rand(2, dtype=torch.float64, generator=g).tolist()
        L = matrix([1.0, 0.0], [a, b])
        M = L @ L.T  # so that the computed residual is exactly 0
        exact = abs(Fraction(float(M[1, 1])) - Fraction(a) ** 2 - Fraction(b) ** 2)
        planted(monkeypatch, L)
        assert Fraction(linear_algebra._cholesky_error(M)) >= exact
        seen += exact > 0
    assert seen > 5


@given(
    st.integers(0, 200), st.integers(0, 9), st.sampled_from([0.0, 1e-9, 1e-3]), st.sampled_from([1.0, 1e-200, 1e200])
)
def test_eig_min_lower_is_proved_by_rationals_and_tight(seed, ill, size, scale):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(4, 4, generator=g, dtype=torch.float64)
    G = scale * (A @ torch.diag(torch.tensor([1, 1, 1, 10.0**-ill], dtype=torch.float64)) @ A.T)
    noise = (torch.rand(4, 4, generator=g, dtype=torch.float64) - 0.5).tril()
    truth = G.tril() + scale * size * noise  # some matrix within the radius
    bound = rigor.eig_min_lower(G, torch.full((4, 4), scale * size, dtype=torch.float64))
    M = [[Fraction(float(truth[max(i, j), min(i, j)])) for j in range(4)] for i in range(4)]
    assert bound == 0.0 or positive_definite(shifted(M, 1, -Fraction(bound)))
    if ill <= 5 and size == 0:
        assert bound > scale * (0.99 * float(torch.linalg.eigvalsh(G / scale)[0]) - 1e-13)


def test_nothing_is_shown_of_a_singular_matrix():
    A = gaussian(5, 3, 0)
    assert rigor.eig_min_lower(A @ A.T, rigor.product_radius(A, A.T)) == 0.0


def test_auto_takes_the_inverse_bound_where_the_shift_bound_loses_a_percent():
    gained = 0
    for seed in range(40):
        A = conditioned(4, 6, 10.0 ** (5 + seed % 3), seed)
        auto, shift, inverse = assert_below(A)
        assert auto >= 0.98 * max(shift, inverse)
        gained += auto > 1.01 * shift > 0
    assert gained > 0


# --- Where small numbers are flushed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-300, 1e-307, 1e-310, 1e-320, 1.0])
def test_bounds_hold_where_small_numbers_are_flushed(scale):
    for seed in range(6):
        A = gaussian(3, 5, seed) * scale
        with flushing():
            low, spectral = rigor.sigma_min_lower(A), rigor.spectral_norm_upper(A)
            frobenius = rigor.frobenius_norm_upper(A)
        assert low == 0 or rigor.exact_sigma_min_exceeds(A, low)
        assert norm_below(A, spectral)
        assert Fraction(frobenius) ** 2 >= frobenius_square(A)
        assert low > 0 or scale < 1e-306


@pytest.mark.parametrize(("left", "right"), [(1e-310, 1e300), (1e300, 1e-310), (1e-160, 1e-160), (1e-320, 1.0)])
def test_products_hold_where_small_numbers_are_flushed(left, right):
    lost = 0
    for seed in range(10):
        A, B = gaussian(2, 3, seed) * left, gaussian(3, 2, seed + 50) * right
        with flushing():
            product, radius, error = A @ B, rigor.product_radius(A, B), rigor.product_error(A, B)
        exact, computed, radius = exact_product(A, B), fractions(product), fractions(radius)
        total = Fraction(0)
        for i, j in itertools.product(range(2), range(2)):
            assert abs(computed[i][j] - exact[i][j]) <= radius[i][j]
            total += (computed[i][j] - exact[i][j]) ** 2
            lost += computed[i][j] == 0 != exact[i][j]
        assert Fraction(error) ** 2 >= total
    assert lost > 0


# --- Norms of any size ------------------------------------------------------------------------------------------------


def square_between(found, row, i):
    true = sum(Fraction(a) ** 2 for a in row)
    return Fraction(float(found.lo[i])) ** 2 <= true and (
        math.isinf(float(found.hi[i])) or true <= Fraction(float(found.hi[i])) ** 2
    )


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e-200, 1e-163, 1e155, 1e200, 1e300, 1e-310])
def test_norms_of_any_size(scale):
    A = gaussian(4, 7, 3) * scale
    A[2] = 0
    found = rigor.norm(rigor.point(A), -1)
    assert all(square_between(found, row, i) for i, row in enumerate(A.tolist()))
    measured = rigor.norm(A, -1)
    assert bool((found.lo <= measured).all())
    assert bool((measured <= found.hi).all())
    if scale > 1e-305:
        assert bool((found.hi - found.lo <= 1e-14 * measured + 1e-306).all())
        torch.testing.assert_close(measured, gaussian(4, 7, 3).index_fill(0, torch.tensor(2), 0).norm(dim=-1) * scale)
        torch.testing.assert_close(
            rigor.spectral_norm(A) / scale, torch.linalg.matrix_norm(A / scale, 2), rtol=1e-13, atol=0
        )
    assert rigor.norm(A.float(), -1).dtype == torch.float32
    both = rigor.norm(rigor.point(A), 0)
    assert all(square_between(both, column, i) for i, column in enumerate(A.T.tolist()))


def test_norms_of_wide_intervals_and_of_infinity():
    low, high = matrix([-1.0, 3.0])[0], matrix([2.0, 4.0])[0]
    found = rigor.norm(rigor.Interval(low, high), -1)
    assert 3 - 1e-14 < float(found.lo) <= 3
    assert math.sqrt(20) <= float(found.hi) < math.sqrt(20) + 1e-14
    assert float(rigor.norm(matrix([math.inf, 1.0])[0])) == math.inf
    assert float(rigor.norm(matrix([1e308, 1e308, 1e308, 1e308])[0])) == math.inf
    assert math.isnan(float(rigor.norm(matrix([math.nan, 1.0])[0])))
    large = rigor.norm(rigor.point(matrix([1e308, 1e308, 1e308, 1e308])[0]))
    assert float(large.lo) == sys.float_info.max
    assert float(large.hi) == math.inf


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_gram_matrices_of_any_size(scale):
    A = torch.stack([gaussian(3, 5, 1), 1e-90 * gaussian(3, 5, 2)]) * scale
    G, exponent = rigor.gram(A)
    assert G.shape == (2, 3, 3)
    for s in range(2):
        exact = gram(A[s])
        unit = Fraction(4) ** int(exponent[s])
        error = max(abs(Fraction(float(G[s, i, j])) * unit - exact[i][j]) for i in range(3) for j in range(3))
        assert error <= Fraction(1, 2**45) * max(exact[i][i] for i in range(3))
    assert bool((G.abs() <= 5).all())
    assert rigor.spectral_norm(torch.zeros(2, 3, dtype=torch.float64)) == 0
