"""The bound on the third derivative, Kantorovich's and Krawczyk's conditions, the balls."""

import itertools
import math

import pytest
import torch
from making import e1_at, gaussian, shallow_problem

from companion import basins, networks
from companion.basins import critical_points, shallow
from companion.rigor import arbs

F64 = torch.float64
BOUNDED = ["sin", "tanh", "sigmoid", "gauss", "cos", "exp"]


def test_the_table_of_bounds():
    """b_k = max |sigma^(k)| in closed form, rounded up in the fourth digit."""
    t = 3 - math.sqrt(6)
    exact = {
        "sin": (1, 1, 1, 1),
        "cos": (1, 1, 1, 1),
        "tanh": (1, 1, 4 / 27**0.5, 2),
        "sigmoid": (1, 1 / 4, 3**0.5 / 18, 1 / 8),
        "gauss": (1, math.exp(-0.5), 1, math.sqrt(t) * (3 - t) * math.exp(-t / 2)),
    }
    assert critical_points._BOUNDS.keys() == exact.keys()
    for act, bounds in critical_points._BOUNDS.items():
        for b, least in zip(bounds, exact[act], strict=True):
            assert least <= b <= least * (1 + 2e-4)


@pytest.mark.parametrize("act", BOUNDED)
def test_the_bound_is_the_formula(act):
    """A plain transcription, sample by sample, at random weights and radii."""
    (W, V), X, Y = shallow_problem(3, 4, 2, 3)
    for r in (1e-3, 0.2, 3.0):
        k = critical_points.kantorovich([W, V], X, Y, act, r)
        assert k.radius.tolist() == [r] * 3
        for s in range(3):
            v, m = V[s, :, 0].tolist(), 3
            top = max(float(x @ w) + r * float(x.norm()) for x in X for w in W[s].T)
            b = [math.exp(top)] * 4 if act == "exp" else critical_points._BOUNDS[act]
            size, largest, M = math.hypot(*v) + r, max(map(abs, v)) + r, 0.0
            for x, e in zip(X, k_residual(W[s], V[s], X, Y, act), strict=True):
                x = float(x.norm())
                G_1 = math.sqrt(m * b[0] ** 2 + b[1] ** 2 * size**2 * x**2)
                G_2 = b[1] * x + b[2] * largest * x**2
                G_3 = 3 * b[2] * x**2 + b[3] * largest * x**3
                M += 3 * G_1 * G_2 + (abs(e) + r * G_1) * G_3
            assert float(k.M[s]) == pytest.approx(M, rel=1e-12)


def k_residual(W, V, X, Y, act):
    return (networks.forward([W, V], X, act)[0] - Y)[:, 0].tolist()


@pytest.mark.parametrize("act", BOUNDED)
def test_the_bound_on_the_third_derivative_holds(act):
    """||L''(theta + u) - L''(theta)|| <= M ||u|| for every u in the ball of radius 0.1."""
    (W, V), X, Y = shallow_problem(200, 4, 2, 3)
    k = critical_points.kantorovich([W, V], X, Y, act, 0.1)
    u = 0.1 * torch.nn.functional.normalize(gaussian(200, 9, seed=9), dim=1)
    moved = [W + u[:, 3:].view(200, 3, 2).mT, V + u[:, :3, None]]
    change = shallow.loss_derivatives(moved, X, Y, act).hessian - shallow.loss_derivatives([W, V], X, Y, act).hessian
    ratio = torch.linalg.matrix_norm(change, 2) / (0.1 * k.M)
    assert float(ratio.max()) <= 1
    assert float(ratio.max()) > 0.005  # the bound is not idle


@pytest.mark.parametrize(("act", "w"), [("sin", 0.0), ("cos", math.pi / 6), ("tanh", 0.0), ("sigmoid", 0.0)])
def test_the_bound_is_nearly_attained(act, w):
    """One neuron, a large residual and a large v, where the third derivative of the activation is at its largest."""
    weights = [torch.tensor([[[t]]], dtype=F64) for t in (w, 1e3)]
    X, Y = torch.tensor([[3.0]], dtype=F64), torch.tensor([[-1e9]], dtype=F64)
    moved = [weights[0] + 1e-4, weights[1]]
    ends = [shallow.loss_derivatives(theta, X, Y, act).hessian for theta in (moved, weights)]
    M = float(critical_points.kantorovich(weights, X, Y, act, 1e-4).M)
    assert 0.98 < float(torch.linalg.matrix_norm(ends[0] - ends[1], 2)) / (1e-4 * M) <= 1


def offsets():
    """Points near E1's minimum, from where everything is proved to where nothing is."""
    for size in torch.logspace(-6, -0.5, 40, dtype=F64).tolist():
        for a, b in ((1, 0), (0, 1), (0.7, -0.7)):
            yield math.pi / 2 + size * a, 1 + size * b


def test_kantorovichs_condition():
    """M gamma <= lambda^2 / 4 with M for the radius 3 gamma / lambda, and the minimum is where it says."""
    held, between = [], 0
    for w, v in offsets():
        weights, X, Y = e1_at(w, v)
        k = critical_points.kantorovich(weights, X, Y, "sin")
        d = shallow.loss_derivatives(weights, X, Y, "sin")
        eigenvalues = torch.linalg.eigvalsh(d.hessian[0])
        gamma, smallest = float(d.gradient.norm()), float(eigenvalues[0])
        assert float(k.largest) == pytest.approx(float(eigenvalues[1]))
        if smallest <= 0:
            assert not bool(k.holds)
            continue
        assert float(k.radius) == pytest.approx(3 * gamma / smallest, rel=1e-9)
        M = float(critical_points.kantorovich(weights, X, Y, "sin", 3 * gamma / smallest).M)
        ratio = M * gamma / smallest**2
        assert bool(k.holds) is (ratio <= 0.25)
        between += 0.25 < ratio <= 1
        if bool(k.holds):
            assert math.hypot(w - math.pi / 2, v - 1) <= 2 * gamma / smallest * (1 + 1e-9) + 1e-15
            held.append(ratio)
    assert len(held) >= 30
    assert max(held) > 0.1
    assert between >= 5
    # a ball that does not reach 2 gamma / lambda proves nothing
    weights, X, Y = e1_at(v=1.001)
    assert bool(critical_points.kantorovich(weights, X, Y, "sin").holds)
    assert not bool(critical_points.kantorovich(weights, X, Y, "sin", 1.9 * 2e-3 / 2).holds)
    assert bool(critical_points.kantorovich(weights, X, Y, "sin", 2.1 * 2e-3 / 2).holds)


def inclusion(w, v, r):
    """max_i (|Y grad| + |I - Y Hess(box)| r)_i / r for E1 by hand, and whether the Hessian is positive on the box."""
    arb = arbs.flint().arb

    def parts(w, v):
        s, c, S, C = w.sin(), w.cos(), (3 * w).sin(), (3 * w).cos()
        f, F = v * s + 2, v * S + 4
        gradient = f * s + F * S, v * (f * c + 3 * F * C)
        mixed = f * c + v * s * c + 3 * F * C + 3 * v * S * C
        return gradient, (s * s + S * S, mixed, v * v * (c * c + 9 * C * C) - v * (f * s + 9 * F * S))

    (g, h), (a, b, d) = parts(arb(w), arb(v))
    a, b, d = (float(t.mid()) for t in (a, b, d))
    Y = torch.linalg.inv(torch.tensor([[a, b], [b, d]], dtype=F64)).tolist()
    _, (a, b, d) = parts(arb(w, r), arb(v, r))
    H, newton = ((a, b), (b, d)), [abs(y[0] * g + y[1] * h) for y in Y]
    spread = [
        sum((abs((1 if i == k else 0) - Y[i][0] * H[0][k] - Y[i][1] * H[1][k]) for k in (0, 1)), arb(0)) for i in (0, 1)
    ]
    positive = a > 0 and d - b * b / a > 0
    return [float((n / r + t).upper()) for n, t in zip(newton, spread, strict=True)], positive


def test_krawczyks_condition():
    """The first box of radius 2, 10, 100, 10^4 Newton steps that is mapped into itself with a positive Hessian."""
    shown = refused = 0
    for w, v in offsets():
        weights, X, Y = e1_at(w, v)
        d = shallow.loss_derivatives(weights, X, Y, "sin")
        step = float(torch.linalg.solve(d.hessian[0], d.gradient[0]).abs().max())
        found = critical_points.krawczyk(weights[0][0], weights[1][0, :, 0], X, Y[:, 0], "sin")
        expected = None
        for factor in (2.0, 10.0, 100.0, 1e4):
            sizes, positive = inclusion(w, v, factor * step)
            if max(sizes) < 1 and positive:
                expected = factor * step
                break
        if expected is None:
            assert found.radius is None
            refused += 1
        else:
            assert found.radius == pytest.approx(expected, rel=1e-6)
            assert max(abs(w - math.pi / 2), abs(v - 1)) <= found.radius
            assert found.smallest_pivot > 0
            assert found.loss_low <= 9 <= found.loss_high
            shown += 1
    assert shown >= 30
    assert refused >= 5


def test_a_saddle_and_a_plateau_are_critical_but_not_shown():
    for weights in (e1_at(math.asin(math.sqrt(7 / 8)), 0.0)[0], basins.split_neuron(e1_at()[0], 0, (0.4, 0.6))):
        _, X, Y = e1_at()
        found = critical_points.krawczyk(weights[0][0], weights[1][0, :, 0], X, Y[:, 0], "sin")
        assert found.radius is None
        assert found.smallest_pivot <= 0


def test_the_balls_enclose_the_floats():
    (W, V), X, Y = shallow_problem(1, 4, 2, 3)
    for act in arbs.BALL_ACTIVATIONS:
        d = shallow.loss_derivatives([W, V], X, Y, act)
        balls = critical_points.ball_derivatives(W[0].T.tolist(), V[0, :, 0].tolist(), X, Y[:, 0], act)
        for ball, number in zip(balls.gradient, d.gradient[0].tolist(), strict=True):
            assert abs(float(ball.mid()) - number) < 1e-10 * (1 + abs(number))
            assert float(ball.rad()) < 1e-12 * (1 + abs(number))


def test_the_balls_enclose_what_they_should():
    """Every entry at random points of a box lies in the enclosure of the box."""
    (W, V), X, Y = shallow_problem(1, 3, 2, 2)
    arb, r = arbs.flint().arb, 1e-2
    for act in arbs.BALL_ACTIVATIONS:
        box = critical_points.ball_derivatives(
            [[arb(t, r) for t in w] for w in W[0].T.tolist()], [arb(t, r) for t in V[0, :, 0].tolist()], X, Y[:, 0], act
        )
        u = r * (2 * torch.rand(20, 6, generator=torch.Generator().manual_seed(0), dtype=F64) - 1)
        d = shallow.loss_derivatives([W + u[:, 2:].view(20, 2, 2).mT, V + u[:, :2, None]], X, Y, act)
        numbers = [d.loss, *d.gradient.T, *d.hessian.flatten(1).T]
        for ball, values in zip([box.loss, *box.gradient, *itertools.chain(*box.hessian)], numbers, strict=True):
            assert float(ball.lower()) <= float(values.min()) <= float(values.max()) <= float(ball.upper())
