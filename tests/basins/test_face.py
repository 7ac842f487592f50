"""Bad input to every function on the face gets one clear sentence."""

import math

import pytest
import torch
from making import shallow_problem

from companion import basins
from companion.basins import critical_points, langevin

GOOD = shallow_problem(1, 4, 2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda w, X, Y: (w, X.float(), Y), TypeError, "X has dtype torch.float32; torch.float64 is needed"),
        (lambda w, X, Y: (w, X, Y.long()), TypeError, "Y has dtype torch.int64; torch.float64 is needed"),
        (lambda w, X, Y: (w, X.numpy(), Y), TypeError, r"write torch.from_numpy\(X\)"),
        (lambda w, X, Y: (w, X * math.nan, Y), ValueError, r"X\[0, 0\] is nan"),
        (lambda w, X, Y: ([w[0] * math.inf, w[1]], X, Y), ValueError, r"weights\[0\]\[0, 0, 0\] is -?inf"),
        (lambda w, X, Y: (w, X, Y[:, 0]), ValueError, "Y has shape"),
        (lambda w, X, Y: (w, X, Y[:2]), ValueError, "with N = 4, as in X"),
        (lambda w, X, Y: ([*w, torch.ones(1, 1, 1).double()], X, Y), ValueError, "one hidden layer"),
        (lambda w, X, Y: (w, X.expand(2, 4, 2), Y), ValueError, "2 data sets for 1 networks"),
        (lambda w, X, Y: (w, X[None, None], Y), ValueError, "X has shape"),
        (lambda w, X, Y: ([w[0], w[1].expand(1, 3, 2)], X, Y), ValueError, "Y has 1 columns but the network has 2"),
    ],
)
def test_bad_data_are_refused(unchecked, change, error, words):
    weights, X, Y = change(*GOOD)
    with pytest.raises(error, match=words):
        basins.loss_derivatives(weights, X, Y, "tanh")


@pytest.mark.parametrize("act", ["relu", "step"])
@pytest.mark.parametrize("level", ["certified", "measured"])
def test_kinks_and_jumps_have_no_hessian_certificate(act, level):
    weights, X, Y = GOOD
    with pytest.raises(ValueError, match="no second derivative"):
        basins.certify_strict_minimum(weights, X, Y, act, level)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w, X, Y: basins.loss_derivatives(w, X, Y, "tanh", loss="hinge"), ValueError, "loss is 'hinge'"),
        (lambda w, X, Y: basins.train_lm_newton(w, X, Y, "tanh", iters=0), ValueError, "iters"),
        (lambda w, X, Y: basins.certify_no_basin(0, 1, "tanh"), ValueError, "at least one sample"),
        (lambda w, X, Y: basins.certify_no_basin(4, 1, "tanh", "hinge"), ValueError, "loss is 'hinge'"),
        (lambda w, X, Y: basins.certify_no_basin(5, 1, "tanh", X=X), ValueError, "N is 5, X has shape"),
        (lambda w, X, Y: basins.certify_no_basin(4, 1, "tanh", X=X.float()), TypeError, "X has dtype torch.float32"),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh"), ValueError, "m is 3, below q = 4"),
        (
            lambda w, X, Y: basins.descent_road([t.expand(2, *t.shape[1:]) for t in w], X, Y, "tanh"),
            ValueError,
            "one net",
        ),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh", loss="hinge"), ValueError, "loss is 'hinge'"),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh", loss="logistic"), ValueError, "target is missing"),
        (lambda w, X, Y: basins.descent_road(w, X, Y, "tanh", target=Y[:2]), ValueError, "target has shape"),
        (lambda w, X, Y: basins.certify_strict_minimum(w, X, Y, "tanh", "guess"), ValueError, "level is 'guess'"),
        (lambda w, X, Y: basins.certify_strict_minimum(w, X, Y, "tanh", "exact"), TypeError, "ExactPoint is needed"),
        (lambda w, X, Y: critical_points.kantorovich(w, X, Y, "softplus"), ValueError, "needed for bounds"),
        (lambda w, X, Y: basins.split_neuron(w, 3, (1.0,)), ValueError, "j is 3"),
        (lambda w, X, Y: basins.split_neuron(w, 0, (0.5, 0.4)), ValueError, "sum 1"),
        (lambda w, X, Y: basins.touching_points(X, 0, "tanh", 1, torch.Generator()), ValueError, "at least 1"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1.5, 2, 3), 2), TypeError, "a whole number is needed"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1, 2, 10**6), 2), ValueError, "beyond 10000"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1, 2), 2), ValueError, "2 m \\+ 1 = 3"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1, 1), (1, 2, 3), 2), ValueError, "different integers"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (0, 1, 2), 2), ValueError, "vanishes"),
        (lambda w, X, Y: basins.exact_bad_minimum("relu", (1,), (1, 2, 3), 2), ValueError, "has exact values"),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (1, 2, 3), -2), ValueError, "positive rational"),
        (lambda w, X, Y: basins.exact_bad_minimum("sin", (1,), (1, 2, 3), 2), ValueError, "on the circle"),
        (lambda w, X, Y: basins.certify_full_rank(w, X, "relu"), ValueError, "analytic activation"),
        (lambda w, X, Y: basins.certify_full_rank(w, X.float(), "tanh"), TypeError, "float64"),
        (lambda w, X, Y: basins.certify_no_basin(4, 5.5, "tanh"), TypeError, "m is 5.5; a whole number is needed"),
        (lambda w, X, Y: basins.certify_no_basin(True, True, "tanh"), TypeError, "N is True; a whole number is needed"),
        (lambda w, X, Y: basins.certify_no_basin(4, 3, "tanh", K=0), ValueError, "K is 0"),
        (lambda w, X, Y: basins.certify_strict_minimum(w, None, Y, "tanh"), TypeError, "X is None"),
        (lambda w, X, Y: basins.certify_strict_minimum(w, X, Y.to_sparse(), "tanh"), TypeError, "a dense tensor"),
        (lambda w, X, Y: basins.touching_points(0 * X, 1, "tanh", 1, torch.Generator()), ValueError, "not all zero"),
        (lambda w, X, Y: basins.dual_function(Y[:, 0], X.float(), "tanh", w[0]), TypeError, "X has dtype"),
        (lambda w, X, Y: basins.split_neuron([w[0], w[1] > 0], 0, (0.5, 0.5)), TypeError, r"weights\[1\] has dtype"),
        (
            lambda w, X, Y: basins.certify_strict_minimum(w, X, Y, "tanh", competitor=[w[1], w[0]]),
            ValueError,
            "competitor: weights",
        ),
        (
            lambda w, X, Y: basins.exit_times(
                w, X, Y, "tanh", 1.0, level=0.1, generator=torch.Generator(), step=1e-320
            ),
            ValueError,
            "at most 10",
        ),
        (lambda w, X, Y: basins.exact_bad_minimum("tanh", (1,), (), 2), ValueError, "x holds 0 inputs"),
        (lambda w, X, Y: basins.exit_time_of_e1(0.0), ValueError, "T > 0"),
        (lambda w, X, Y: langevin.mean_exit_time(lambda x, y: x + y, 1.0, (0, 1, 0, 1), -9.0), ValueError, "raise it"),
        (lambda w, X, Y: basins.eyring_kramers(-torch.eye(2), torch.eye(2), 1.0, 1.0), ValueError, "one negative"),
        (
            lambda w, X, Y: basins.eyring_kramers(torch.eye(2), torch.diag(torch.tensor([-1.0, 1.0])), 1.0, 0.0),
            ValueError,
            "T is 0",
        ),
        (
            lambda w, X, Y: basins.exit_times(w, X, Y, "tanh", -1.0, level=0.1, generator=torch.Generator()),
            ValueError,
            "positive temperature",
        ),
        (
            lambda w, X, Y: basins.exit_times(w, X, Y, "tanh", 1.0, level=0.1, generator=torch.Generator(), step=0.0),
            ValueError,
            "positive times",
        ),
    ],
)
def test_bad_arguments_get_one_clear_sentence(unchecked, call, error, words):
    with pytest.raises(error, match=words):
        call(*GOOD)
