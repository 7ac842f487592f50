"""Two networks on which Theorem C holds."""

import pytest
from making import relu_problem

from companion import width_bounds as wb


@pytest.fixture(scope="session")
def envelope_net():
    """N = d = 50, n = 1600: the first network of lesson 1."""
    return relu_problem(50, 50, (50, 1600, 1), 0)


@pytest.fixture(scope="session")
def deep_net():
    """16-64-64-1 with the middle matrix at 1.3 times the smallest beta."""
    X, Y, weights = relu_problem(16, 16, (16, 64, 64, 1), 2)
    weights[1] *= 1.3 * float(wb.smallest_beta(wb.spectra(X, Y, weights)))
    return X, Y, weights
