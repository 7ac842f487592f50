"""The default methods of a block, by automatic differentiation, against closed forms."""

import math

import pytest
import torch

from companion.mean_field.blocks import base as block_base
from companion.mean_field.blocks.base import Block, Custom


def bump(z, theta):
    return theta[..., :2] * torch.cos(z - theta[..., 2:])


def example():
    g = torch.Generator().manual_seed(0)
    z, p = (torch.randn(2, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    theta = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    w = torch.rand(5, generator=g, dtype=torch.float64)
    return z, theta, w / w.sum(), p


def test_products_by_hand():
    block = Custom(bump, 2, 4)
    z, theta, w, p = example()
    u, angle = theta[:, None, :, :2], z[:, :, None] - theta[:, None, :, 2:]  # (S, n, M, d)
    slope = -u * angle.sin()
    torch.testing.assert_close(block.mean_field(z, theta, w), ((u * angle.cos()).mT @ w))
    back, grads = block.pull(z, theta, w, p)
    torch.testing.assert_close(back, p * (slope.mT @ w))
    rows = torch.cat([angle.cos() * p[:, :, None], -slope * p[:, :, None]], -1)
    torch.testing.assert_close(grads, rows.sum(1))
    torch.testing.assert_close(block.rows(z, theta, p), rows)


def test_names_laws_and_audit():
    block = Custom(bump, 2, 4)
    assert block.name == "bump"
    assert block.draw((3, 5), torch.Generator().manual_seed(0)).shape == (3, 5, 4)
    assert {row.answer for row in block.hypotheses()} == {"not checkable"}
    assert math.inf == block.constants().F
    assert block.constants().spread(torch.zeros(3, 4)).B.tolist() == [math.inf] * 3


def test_largest_value_of_a_form():
    a, c = torch.tensor(0.7), torch.tensor(1.3)
    matrix = torch.tensor([[0.0, 0.7], [0.7, 1.3]])
    torch.testing.assert_close(block_base.largest_form(a, c), torch.linalg.eigvalsh(matrix)[-1])


def test_the_radius_that_is_meant():
    theta = torch.tensor([[3.0, 4.0, 1.0]], dtype=torch.float64)
    assert block_base.largest_norm(None, None) == math.inf
    assert block_base.largest_norm(None, 2.0) == 2
    assert block_base.largest_norm(theta, None, slice(2)).tolist() == [5]
    assert block_base.largest_norm(theta, 0.5, slice(2)).tolist() == [5.5]
    assert block_base.largest_norm(1e-170 * theta, None, slice(2)).tolist() == pytest.approx([5e-170], rel=1e-12, abs=0)


def test_what_fits_a_block():
    block, theta, X = Custom(bump, 2, 4), torch.zeros(1, 2, 3, 4, dtype=torch.float64), torch.zeros(5, 2).double()
    assert block_base.check_fit(block, theta, X).tolist() == [1 / 3] * 3
    w = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert block_base.check_fit(block, theta, X, w) is w
    for call, words in (
        (lambda: block_base.check_fit(block, theta[..., :3], X), r"\(\.\.\., M, 4\) is needed for bump"),
        (lambda: block_base.check_fit(block, theta, X[:, :1]), r"X has shape \(5, 1\); \(n, 2\)"),
        (lambda: block_base.check_fit(block, theta, X, p=X.float()), "p is torch.float32 on cpu; make them equal"),
        (lambda: block_base.check_fit(block, theta, X, w * (1 + 1e-12)), r"weights sum to 1(\.0+\d)?, .* of sum 1"),
        (lambda: block_base.check_fit(block, theta, X, 6 * w - 5 / 3), "the smallest is -0.167"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_block_needs_a_function():
    with pytest.raises(NotImplementedError):
        Block().f(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Custom(bump, 2, 0), ValueError, "k is 0; an integer >= 1 is needed"),
        (lambda: Custom(bump, 0, 4), ValueError, "d is 0; an integer >= 1 is needed"),
        (lambda: Custom("bump", 2, 4), TypeError, "function is str; a function of z and theta is needed"),
        (lambda: Custom(lambda z, t: z, 2, 4), ValueError, r"function returned \(2, 1, 2\) for z"),
        (lambda: Custom(lambda z, t: 3.0, 2, 4), ValueError, "function returned float"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
