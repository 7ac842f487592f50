"""Exact arithmetic against its slow twin in fractions."""

import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import flushing, fractions, gaussian, gram, matrix, positive_definite, shifted, singular

from companion import rigor
from companion.rigor import rationals


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
    assert not rigor.exact_sigma_min_exceeds(A, sigma)  # strict
    assert not rigor.exact_sigma_min_exceeds(A, sigma * Fraction(1001, 1000))
    assert not rigor.exact_sigma_min_exceeds(A, sigma * (1 + Fraction(1, 10**40)))
    assert rigor.exact_sigma_min_exceeds(A, sigma * (1 - Fraction(1, 10**40)))
    assert rigor.exact_sigma_min_exceeds(A, 0.0)


def test_exact_oracle_sees_dependence():
    row = gaussian(1, 4, 0)
    for A in (torch.cat([row, row]), torch.cat([row, -4 * row]), torch.zeros(1, 3).double(), gaussian(3, 2, 0)):
        assert not rigor.exact_sigma_min_exceeds(A, 0.0)
    nearly = torch.cat([row, torch.nextafter(row, row + 1)])
    assert rigor.exact_sigma_min_exceeds(nearly, 0.0)


def test_exact_oracle_against_its_twin_and_svd():
    answers = set()
    for seed in range(40):
        A = gaussian(1 + seed % 5, 1 + seed % 5 + seed % 3, seed)
        sigma, M = singular(A)[-1], gram(A)
        for factor in (0.5, 0.999, 1.001, 2.0):
            s = Fraction(sigma * factor)
            answer = rigor.exact_sigma_min_exceeds(A, s)
            assert answer is positive_definite(shifted(M, 1, -(s**2))) is (factor < 1)
            answers.add(answer)
    assert answers == {True, False}


def test_whole_numbers_are_the_floats():
    A = matrix([0.1, -2.5, 5e-324], [sys.float_info.max, 0.0, 1 / 3])
    rows, exponent = rationals.whole_numbers(A)
    exact = [[m * Fraction(2) ** exponent for m in row] for row in rows]
    assert exact == fractions(A)
    assert exact[0][0] == Fraction(3602879701896397, 2**55) != Fraction(1, 10)
    assert exact[0][2] == Fraction(1, 2**1074)


def test_whole_numbers_are_the_floats_where_operands_are_flushed():
    A = matrix([5e-324, -3.5, 0.0], [2.0**-1022, 1e300, -0.0])
    with flushing():
        rows, exponent = rationals.whole_numbers(A)
    assert exponent == -1074
    assert [[Fraction(m) * Fraction(2) ** exponent for m in row] for row in rows] == [
        [Fraction(a) for a in row] for row in A.tolist()
    ]
    assert rationals.whole_numbers(torch.zeros(1, 2, dtype=torch.float64)) == ([[0, 0]], 0)


@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 20), st.integers(0, 1000))
def test_exact_rank_and_null_space(rank, columns, rows, seed):
    g = torch.Generator().manual_seed(seed)
    A = (
        torch.randint(-3, 4, (rows, rank), generator=g).double()
        @ torch.randint(-3, 4, (rank, columns), generator=g).double()
    )
    A = A * 2.0 ** torch.randint(-300, 300, (columns,), generator=g).double()
    reduced = rows_reduced(fractions(A))
    assert rigor.exact_rank(A) == reduced
    basis = rigor.null_space(fractions(A))
    assert len(basis) == columns - reduced
    assert all(sum(a * z for a, z in zip(row, vector, strict=True)) == 0 for row in fractions(A) for vector in basis)
    assert len(basis) == 0 or rows_reduced(basis) == len(basis)


def rows_reduced(rows):
    """The rank by elimination in fractions, the slow twin."""
    rows, rank = [list(row) for row in rows], 0
    for column in range(len(rows[0])):
        found = next((r for r in range(rank, len(rows)) if rows[r][column] != 0), None)
        if found is None:
            continue
        rows[rank], rows[found] = rows[found], rows[rank]
        for r in range(rank + 1, len(rows)):
            factor = rows[r][column] / rows[rank][column]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[rank], strict=True)]
        rank += 1
    return rank


def test_a_few_rows_are_enough_where_they_have_full_rank(monkeypatch):
    A, sizes = gaussian(50, 3, 1), []
    honest = rationals._eliminate

    def counted(M, above=False):
        sizes.append(len(M))
        return honest(M, above)

    monkeypatch.setattr(rationals, "_eliminate", counted)
    assert rigor.exact_rank(A) == 3
    assert rigor.exact_rank(A[:9]) == 3
    A[:9] = A[0]
    assert rigor.exact_rank(A) == 3  # not among the first nine rows
    A[:, 1] = 0
    assert rigor.exact_rank(A[9:]) == 2
    assert sizes == [9, 9, 9, 50, 9]


def test_null_space_of_fractions():
    (z,) = rigor.null_space([[Fraction(1, 3), Fraction(2, 3), 0], [0, 0, Fraction(1, 7)]])
    assert z == [-2, 1, 0]


@pytest.mark.parametrize(
    ("M", "positive"),
    [
        ([[2, 1], [1, 1]], True),
        ([[1, 1], [1, 1]], False),
        ([[1, 2], [2, 1]], False),
        ([[0, 1], [1, 0]], False),  # a zero on the diagonal, and rows could be exchanged
        ([[-1, 0], [0, -1]], False),
        ([[1, 0, 0], [0, 0, 0], [0, 0, 1]], False),
    ],
)
def test_a_shifted_square_root_is_decided_by_minors(M, positive):
    """``A A^T - s^2 I = M`` for ``A`` triangular, where that is possible; else the minors of M itself."""
    M = [[Fraction(a) for a in row] for row in M]
    assert positive_definite(M) is positive
    lift = Fraction(9)  # A A^T = M + 9 I, s = 3
    A = torch.linalg.cholesky(
        matrix(*[[float(a + (lift if i == j else 0)) for j, a in enumerate(r)] for i, r in enumerate(M)])
    )
    exact = [[sum(x * y for x, y in zip(p, q, strict=True)) for q in fractions(A)] for p in fractions(A)]
    truth = positive_definite([[a - (lift if i == j else 0) for j, a in enumerate(r)] for i, r in enumerate(exact)])
    assert rigor.exact_sigma_min_exceeds(A, 3.0) is truth
