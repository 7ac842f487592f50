"""The bound on the third derivative and the balls."""

import pytest
import torch
from making import gaussian, shallow_problem

from companion.basins import critical_points, shallow
from companion.rigor import arbs


@pytest.mark.parametrize("act", ["sin", "tanh", "sigmoid", "gauss", "cos", "exp"])
def test_the_bound_on_the_third_derivative_holds(act):
    """||L''(theta + u) - L''(theta)|| <= M ||u|| inside the ball, for 200 points theta and directions u."""
    (W, V), X, Y = shallow_problem(200, 4, 2, 3)
    k = critical_points.kantorovich([W, V], X, Y, act)
    radius = k.radius.clamp(max=0.1)
    u = torch.nn.functional.normalize(gaussian(200, 9, seed=9), dim=1) * (0.99 * radius)[:, None]
    moved = [W + u[:, 3:].view(200, 3, 2).mT, V + u[:, :3, None]]
    change = shallow.loss_derivatives(moved, X, Y, act).hessian - shallow.loss_derivatives([W, V], X, Y, act).hessian
    ratio = torch.linalg.matrix_norm(change, 2) / (torch.linalg.vector_norm(u, dim=1) * k.M)
    inside = k.radius <= 0.1
    assert float(ratio[inside].max() if bool(inside.any()) else 0.0) <= 1
    assert float(ratio.median()) <= 1


def test_the_balls_enclose_the_floats():
    (W, V), X, Y = shallow_problem(1, 4, 2, 3)
    for act in arbs.BALL_ACTIVATIONS:
        d = shallow.loss_derivatives([W, V], X, Y, act)
        balls = critical_points.ball_derivatives(W[0].T.tolist(), V[0, :, 0].tolist(), X, Y[:, 0], act)
        for ball, number in zip(balls.gradient, d.gradient[0].tolist(), strict=True):
            assert abs(float(ball.mid()) - number) < 1e-10 * (1 + abs(number))
