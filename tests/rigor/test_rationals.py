"""Exact arithmetic against its slow twin in fractions."""

import sys
from fractions import Fraction

import pytest
import torch
from oracles import gaussian, gram, matrix, positive_definite, shifted, singular

from companion import rigor


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


def test_to_fractions_is_exact():
    A = matrix([0.1, -2.5, 5e-324], [sys.float_info.max, 0.0, 1 / 3])
    exact = rigor.to_fractions(A)
    assert [[float(a) for a in row] for row in exact] == A.tolist()
    assert exact[0][0] == Fraction(3602879701896397, 2**55) != Fraction(1, 10)
    assert exact[0][2] == Fraction(1, 2**1074)
