"""The check of arguments: what is right passes unchanged, what is wrong is named in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.arguments import checked

X = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)


@checked
def example(
    X: Float[Tensor, "N d"],
    Y: Float[Tensor, "N K"] | None = None,
    *,
    labels: Int[Tensor, " N"] | None = None,
    theta: Float[Tensor, "*S d m"] | None = None,
    weights: Sequence[Tensor] = (),
    widths: Sequence[int] = (),
    ends: tuple[float, float] = (0.0, 1.0),
    step: float | Float[Tensor, " S"] = 1.0,
    steps: int = 1,
    flag: bool = False,
    level: Literal["measured", "certified"] = "measured",
    name: str = "relu",
    model: nn.Module | None = None,
    observe: Callable | None = None,
    options: Mapping[str, int] | None = None,
) -> dict:
    """Return what it was given."""
    return dict(locals())


def test_what_is_right_passes():
    model, f = nn.Linear(2, 1), math.sin
    given = example(
        X, X, labels=torch.arange(3), theta=torch.ones(4, 2, 5), weights=[X, X], widths=range(3), step=torch.ones(4),
        steps=np.int64(3), flag=True, level="certified", model=model, observe=f, options={"a": 1},
    )  # fmt: skip
    assert given["X"] is X
    assert given["widths"] == [0, 1, 2]
    assert (given["steps"], type(given["steps"])) == (3, int)
    assert given["model"] is model
    assert example(X, step=torch.tensor(0.5))["step"] == 0.5
    assert example(X, Y=None)["Y"] is None
    assert example(X, theta=X.T)["theta"].shape == (2, 3)


@pytest.mark.parametrize(
    ("kwargs", "error", "sentence"),
    [
        ({"X": [[1.0]]}, TypeError, "X is a list; a torch tensor is needed"),
        ({"X": X.numpy()}, TypeError, "X is an ndarray; a torch tensor is needed; write torch.from_numpy(X)"),
        ({"X": X[:, 0]}, ValueError, "X has shape (3,); (N, d) is needed; write X[:, None]"),
        ({"X": X[None]}, ValueError, "X has shape (1, 3, 2); (N, d) is needed"),
        ({"X": X[:0]}, ValueError, "X has shape (0, 2); at least one number in every axis is needed"),
        (
            {"X": X.long()},
            TypeError,
            "X has dtype torch.int64; torch.float32 or torch.float64 is needed; write X.d",
        ),
        ({"X": X.half()}, TypeError, "X has dtype torch.float16; torch.float32 or torch.float64"),
        ({"X": X.to(torch.complex128)}, TypeError, "X has dtype torch.complex128"),
        ({"X": X.to_sparse()}, TypeError, "X is torch.sparse_coo on cpu; a dense tensor"),
        ({"X": X.to("meta")}, TypeError, "X is torch.strided on meta; a dense tensor"),
        ({"X": X / 0}, ValueError, "X[0, 0] is nan; finite numbers are needed"),
        ({"Y": X[:2]}, ValueError, "Y has shape (2, 2); (N, K) with N = 3, as in X, is needed"),
        ({"Y": torch.arange(3)}, TypeError, "write torch.nn.functional.one_hot(Y).double() for classes"),
        ({"labels": X[:, 0]}, TypeError, "labels has dtype torch.float64; int64 is needed"),
        ({"theta": X[0]}, ValueError, "theta has shape (2,); (*S, d, m) is needed"),
        ({"theta": X}, ValueError, "theta has shape (3, 2); (*S, d, m) with d = 2, as in X, is needed"),
        (
            {"weights": X},
            TypeError,
            "weights is a tensor of shape (3, 2); a list of tensors is needed; write [w",
        ),
        ({"weights": [X, None]}, TypeError, "weights[1] is None; a torch tensor is needed"),
        ({"weights": [X, X * math.inf]}, ValueError, "weights[1][0, 0] is nan; finite"),
        ({"weights": [X > 0]}, TypeError, "weights[0] has dtype torch.bool; real numbers are needed"),
        ({"ends": (1.0,)}, ValueError, "ends has 1 entries; 2 are needed"),
        ({"ends": (1.0, "a")}, TypeError, "ends[1] is 'a'; a number is needed"),
        ({"widths": 3}, TypeError, "widths is 3; a list is needed"),
        ({"widths": [3, 2.5]}, TypeError, "widths[1] is 2.5; a whole number is needed"),
        ({"step": "a"}, TypeError, "step is 'a'; a number or a torch tensor is needed"),
        ({"step": math.nan}, ValueError, "step is nan; "),
        ({"step": math.inf}, ValueError, "step is inf; "),
        ({"steps": 2.0}, TypeError, "steps is 2.0; a whole number is needed"),
        ({"steps": True}, TypeError, "steps is True; a whole number is needed"),
        ({"steps": "3"}, TypeError, "steps is '3'; a whole number is needed"),
        ({"step": 10**400}, ValueError, "step is a whole number of 1329 bits; a finite number or a torch tensor is"),
        ({"flag": 1}, TypeError, "flag is 1; True or False is needed"),
        ({"level": "proved"}, ValueError, "level is 'proved'; 'measured' or 'certified' is needed"),
        ({"name": 3}, TypeError, "name is 3; a word is needed"),
        ({"model": math.sin}, ValueError, "model is a builtin_function_or_method; a torch.nn.Module is needed"),
        ({"observe": 3}, ValueError, "observe is 3; a function is needed"),
        ({"options": [1]}, ValueError, "options is a list; a dictionary is needed"),
        ({"stepz": 1}, TypeError, "example: got an unexpected keyword argument 'stepz'"),
    ],
)
def test_what_is_wrong_is_named(kwargs, error, sentence):
    with pytest.raises(error) as caught:
        example(**{"X": X, **kwargs})
    assert sentence in str(caught.value)


def test_a_fraction_becomes_a_float_and_negated_bits_are_written_out():
    step = example(X, step=Fraction(1, 4))["step"]
    assert (step, type(step)) == (0.25, float)
    assert not example(torch._neg_view(X))["X"].is_neg()
    assert example(torch._neg_view(X))["X"].equal(-X)


def test_certificates_need_float64_and_infinity_may_be_allowed():
    @checked(double=True, infinite=("bound",))
    def certify(X: Float[Tensor, "N d"], bound: float = 1.0) -> float:
        return bound

    assert certify(X, math.inf) == math.inf
    with pytest.raises(ValueError, match="bound is nan"):
        certify(X, math.nan)
    with pytest.raises(TypeError, match=r"X has dtype torch.float32; torch.float64 is needed; write X.double\(\)"):
        certify(X.float())


def test_gradients_inference_and_global_settings_do_not_reach_the_function():
    @checked
    def square(X: Float[Tensor, "N d"]) -> Tensor:
        assert not X.requires_grad
        W = torch.ones(2, 2, dtype=torch.float64).requires_grad_()
        return torch.autograd.grad((X @ W).square().sum(), W)[0]

    expected = square(X)
    assert torch.equal(square(X.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(square(X * 1), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(square(X), expected)
    with torch.device("meta"):
        assert torch.equal(square(X), expected)
