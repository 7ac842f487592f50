"""Derivatives and the trainer of one hidden layer, against autograd and slow twins."""

import pytest
import torch
from making import gaussian, shallow_problem

from companion import basins, networks
from companion.basins import shallow

F64 = torch.float64
SMOOTH = ["tanh", "softplus", "sigmoid", "sin", "exp", "cos", "gauss"]


def by_autograd(weights, X, Y, act, loss):
    """Loss, gradient and Hessian of one network in theta = (v, w_1, ..., w_m), the slow way."""
    W, V = weights
    D, m = W.shape
    sigma = networks.activation(act)

    def value(theta):
        f = sigma.value(X @ theta[m:].view(m, D).T) @ theta[:m]
        y = Y[:, 0]
        if loss == "square":
            return 0.5 * ((f - y) ** 2).sum()
        return (torch.nn.functional.softplus(f) - y * f).sum()

    theta = torch.cat([V[:, 0], W.T.reshape(-1)]).clone()
    gradient = torch.autograd.functional.jacobian(value, theta)
    return value(theta), gradient, torch.autograd.functional.hessian(value, theta)


@pytest.mark.parametrize("loss", ["square", "logistic"])
@pytest.mark.parametrize("act", SMOOTH)
def test_the_closed_form_hessian_is_autograds(act, loss):
    (W, V), X, Y = shallow_problem(3, 5, 2, 4)
    W, Y = 0.7 * W, Y if loss == "square" else torch.sigmoid(Y)
    d = shallow.loss_derivatives([W, V], X, Y, act, loss=loss)
    for s in range(3):
        value, gradient, hessian = by_autograd([W[s], V[s]], X, Y, act, loss)
        torch.testing.assert_close(d.loss[s], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d.gradient[s], gradient, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d.hessian[s], hessian, rtol=1e-12, atol=1e-12)


def test_gradient_and_curvature_are_the_dual_function():
    (W, V), X, Y = shallow_problem(2, 6, 3, 4)
    d = shallow.loss_derivatives([W, V], X, Y, "tanh")
    g, grad, hess = shallow.dual_function(d.e, X, "tanh", W)
    torch.testing.assert_close(d.gradient, torch.cat([g, (V * grad).flatten(1)], 1))
    torch.testing.assert_close(d.curvature[:, 4:7, 4:7], V[:, 0, :, None] * hess[:, 0])
    torch.testing.assert_close(d.gram, d.J.mT @ d.J)


def test_own_data_for_each_network_agree_with_one_at_a_time():
    weights = [gaussian(3, 2, 4, seed=1), gaussian(3, 4, 1, seed=2)]
    X, Y = gaussian(3, 5, 2, seed=3), gaussian(3, 5, 1, seed=4)
    together = shallow.loss_derivatives(weights, X, Y, "tanh")
    for s in range(3):
        alone = shallow.loss_derivatives([W[s] for W in weights], X[s], Y[s], "tanh")
        torch.testing.assert_close(together.hessian[s], alone.hessian[0])


@pytest.mark.parametrize(("N", "m"), [(6, 5), (8, 2)])
def test_every_end_point_of_the_trainer_is_what_it_says(N, m):
    (W, V), X, Y = shallow_problem(40, N, 2, m, bias=True)
    kept = [W.clone(), V.clone()]
    trained = basins.train_lm_newton([W, V], X, Y, "tanh", iters=150)
    torch.testing.assert_close([W, V], kept, rtol=0, atol=0)
    d = shallow.loss_derivatives(trained.weights, X, Y, "tanh")
    torch.testing.assert_close(trained.loss, d.loss, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(trained.gradient, torch.linalg.vector_norm(d.gradient, dim=1), rtol=1e-2, atol=1e-12)
    assert bool((trained.loss <= shallow.loss_derivatives(kept, X, Y, "tanh").loss * (1 + 1e-12)).all())
    if m == 5:
        assert bool(trained.converged.all())
        assert float(trained.loss.max()) < 1e-18


def test_the_two_linear_systems_give_the_same_step():
    (W, V), X, Y = shallow_problem(5, 4, 2, 3)
    at = shallow._Problem(X, Y[:, 0].expand(5, 4), networks.activation("tanh"), True)
    point = at.at(W.mT.contiguous(), V[..., 0])
    mu = torch.full((5,), 0.1, dtype=F64)
    for a, b in zip(
        shallow._dual_direction(at, point, mu), shallow._primal_direction(at, point, mu, False), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    d = shallow.loss_derivatives([W, V], X, Y, "tanh")
    torch.testing.assert_close(shallow._curvature(at, point), d.curvature)


def test_shared_and_own_data_train_alike():
    (W, V), X, Y = shallow_problem(6, 5, 1, 3, bias=True)
    shared = basins.train_lm_newton([W, V], X, Y, "sin", iters=60)
    own = basins.train_lm_newton([W, V], X.expand(6, 5, 2), Y.expand(6, 5, 1), "sin", iters=60)
    both = shared.converged & own.converged
    assert int(both.sum()) >= 3
    torch.testing.assert_close(shared.loss[both], own.loss[both], rtol=1e-5, atol=1e-14)
