"""Touching points and the minima planted on them."""

import math

import pytest
import torch
from making import e1_at, gaussian, seeded, shallow_problem

from companion import basins, networks
from companion.basins import planted, shallow

F64 = torch.float64


def test_exponentials_touch_only_below_half_the_width():
    X = torch.linspace(0.2, 2, 6, dtype=F64)[:, None]
    reached = [
        float(basins.touching_points(X, m, "exp", 300, torch.Generator().manual_seed(1)).definite.double().mean())
        for m in range(1, 6)
    ]
    assert reached[0] > 0.5  # 2 m <= N - 1 = 5
    assert reached[1] > 0.05
    assert reached[2:] == [0, 0, 0]


def test_sines_touch_beyond_half_the_width():
    X = torch.linspace(0.2, 2, 6, dtype=F64)[:, None] + 0.05 * gaussian(6, 1)
    t = basins.touching_points(X, 4, "sin", 400, torch.Generator().manual_seed(1), spread=20.0)
    assert int(t.definite.sum()) > 5


@pytest.mark.parametrize(("act", "m"), [("sin", 3), ("exp", 2), ("tanh", 2)])
def test_planted_minima_are_strict_and_bad(act, m):
    X = torch.linspace(0.3, 2, 6, dtype=F64)[:, None] + 0.05 * gaussian(6, 1)
    t = basins.touching_points(X, m, act, 200, torch.Generator().manual_seed(2), spread=20.0 if act == "sin" else 3.0)
    assert bool(t.definite.any())
    s = int(t.definite.nonzero()[0])
    found = basins.plant_bad_minimum(t.W[s], t.e[s], X, act, 0.5)
    d = shallow.loss_derivatives(found.weights, X, found.Y, act)
    assert float(d.loss) == pytest.approx(found.loss, rel=1e-9)
    assert float(d.gradient.abs().max()) < 1e-8
    assert float(torch.linalg.eigvalsh(d.hessian)[0, 0]) > 0
    lower = shallow.loss_derivatives(found.competitor, X, found.Y, act).loss
    assert float(lower) == pytest.approx(found.competitor_loss, rel=1e-9)
    assert float(lower) < float(d.loss)
    certificate = basins.certify_strict_minimum(
        found.weights, X, found.Y, act, "certified", competitor=found.competitor
    )
    assert certificate.holds, certificate
    assert certificate.status == "certified"


def test_planting_refuses_what_the_theorem_does_not_cover(unchecked):
    X = torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64)
    W = torch.tensor([[0.5]], dtype=F64)
    with pytest.raises(ValueError, match="orthogonal to every feature of X"):
        basins.plant_bad_minimum(W, torch.tensor([1.0, 1.0, 0.0], dtype=F64), X, "tanh")  # odd: g = 0 identically
    with pytest.raises(ValueError, match="both must vanish"):
        basins.plant_bad_minimum(W, torch.tensor([1.0, 0.0, 0.0], dtype=F64), X, "tanh")
    with pytest.raises(ValueError, match="e is zero"):
        basins.plant_bad_minimum(W, torch.zeros(3, dtype=F64), X, "tanh")
    with pytest.raises(ValueError, match="tau is -1"):
        basins.plant_bad_minimum(W, torch.ones(3, dtype=F64), X, "tanh", -1.0)
    weights, X4, Y4 = basins.example_e4().tensors()
    e = shallow.loss_derivatives(weights, X4, Y4, "exp").e[0]
    with pytest.raises(ValueError, match="definite ones are needed"):
        basins.plant_bad_minimum(weights[0], e, X4, "exp")


@pytest.mark.parametrize("share", [0.3, 0.5, 1.4, -0.2])
def test_the_eigenvalues_of_a_split(share):
    weights, X, Y = basins.example_e1().tensors()
    split = basins.split_neuron(weights, 0, (share, 1 - share))
    d = shallow.loss_derivatives(split, X, Y, "sin")
    assert float(d.gradient.abs().max()) < 1e-12
    expected = torch.tensor(sorted([0, 4, 24 * share, 24 * (1 - share)]), dtype=F64)
    torch.testing.assert_close(torch.linalg.eigvalsh(d.hessian[0]), expected, atol=1e-9, rtol=0)


def test_splitting_keeps_the_function():
    (W, V), X, _ = shallow_problem(2, 6, 3, 4)
    f = networks.forward([W, V], X, "tanh")
    torch.testing.assert_close(networks.forward(basins.split_neuron([W, V], 2, (0.2, 0.5, 0.3)), X, "tanh"), f)


@pytest.mark.parametrize("w", [0.3, 0.5, 0.7])
def test_a_function_that_crosses_zero_does_not_touch_it(w):
    """g_e = (e^w - z)^3: value, slope and curvature vanish at ln z, up to rounding that once counted as definite."""
    X, z = torch.arange(4, dtype=F64)[:, None], math.exp(w)
    e = torch.tensor([-(z**3), 3 * z**2, -3 * z, 1.0], dtype=F64)
    with pytest.raises(ValueError, match="definite ones are needed"):
        basins.plant_bad_minimum(torch.tensor([[w]], dtype=F64), e, X, "exp")


@pytest.mark.parametrize(("N", "m"), [(30, 3), (60, 3), (100, 10)])
def test_ill_conditioned_touches_are_refused(N, m):
    """tanh, two inputs and a bias: 2-jets so nearly dependent that e has a norm of 1e6 to 1e11."""
    X = torch.cat([gaussian(N, 2), torch.ones(N, 1, dtype=F64)], 1)
    W = gaussian(3, m, seed=1)
    with pytest.raises(ValueError, match="less ill-conditioned are needed"):
        basins.plant_bad_minimum(W, normal_at(W, X, "tanh"), X, "tanh")


def test_what_is_planted_is_a_minimum():
    """The last check by itself: a point far from critical, a saddle, a plateau; Newton's step measured by hand."""
    sine = networks.activation("sin")
    for weights, words in (
        (e1_at(v=1.0)[0], ""),
        (e1_at(v=1.00001)[0], ""),
        (e1_at(w=math.pi / 2 + 1e-2)[0], "changes by"),
        (e1_at(w=math.asin(math.sqrt(7 / 8)), v=0.0)[0], "changes by inf"),
        (basins.split_neuron(e1_at()[0], 0, (1.5, -0.5)), "changes by inf"),
    ):
        _, X, Y = e1_at()
        single = [T[0] for T in weights]
        if words:
            with pytest.raises(ValueError, match=words):
                planted._check_minimum(single, X, Y, sine)
        else:
            planted._check_minimum(single, X, Y, sine)
    # H = diag(2, (1 + d) (24 - 10 d)) at v = 1 + d, the Newton step is d: 28 d / (24 + 14 d) of itself
    with pytest.raises(ValueError, match=r"changes by 0\.012"):
        planted._check_minimum([T[0] for T in e1_at(v=1.01)[0]], X, Y, sine)


def normal_at(W, X, act):
    """e with g_e = 0, grad g_e = 0 and Hess g_e = I at every column of W, by least squares."""
    sigma, Z = networks.activation(act), X @ W
    rows, right = [sigma.value(Z).T], [torch.zeros(W.shape[1], dtype=F64)]
    for j in range(W.shape[1]):
        rows.append((sigma.derivative(Z[:, j])[:, None] * X).T)
        rows.append((sigma.second(Z[:, j])[:, None] * (X[:, :, None] * X[:, None]).flatten(1)).T)
        right += [torch.zeros(len(W), dtype=F64), torch.eye(len(W), dtype=F64).flatten()]
    A = torch.cat(rows)
    return torch.linalg.pinv(A) @ torch.cat(right)


@pytest.mark.parametrize(("N", "m", "seed"), [(10, 1, 1), (60, 1, 1), (20, 2, 1), (100, 5, 1)])
def test_any_two_jets_that_are_independent_give_a_bad_minimum(N, m, seed):
    """tanh with two inputs and a bias: at any W with independent 2-jets, as long as m (1 + D + D (D + 1) / 2) <= N."""
    X = torch.cat([gaussian(N, 2), torch.ones(N, 1, dtype=F64)], 1)
    W = gaussian(3, m, seed=seed)
    found = basins.plant_bad_minimum(W, normal_at(W, X, "tanh"), X, "tanh")
    assert basins.certify_strict_minimum(found.weights, X, found.Y, "tanh", competitor=found.competitor)
    assert not basins.certify_no_basin(N, m, "tanh", X=X)
    assert basins.certify_no_basin(N, N, "tanh", X=X)


def test_the_planted_point_is_what_theorem_n_says():
    X = torch.linspace(0.3, 2, 6, dtype=F64)[:, None]
    t = basins.touching_points(X, 2, "exp", 100, seeded(2))
    s = int(t.definite.nonzero()[0])
    assert float(t.e[s].norm()) == pytest.approx(1, abs=1e-10)
    for tau in (0.25, 2.0):
        found = basins.plant_bad_minimum(t.W[s], t.e[s], X, "exp", tau)
        assert found.loss == pytest.approx(tau**2 * float(t.e[s] @ t.e[s]) / 2, rel=1e-12)
        residual = torch.exp(X @ found.weights[0]) @ found.weights[1] - found.Y
        torch.testing.assert_close(residual[:, 0], tau * t.e[s], rtol=1e-9, atol=1e-12)
        (curvature,) = basins.dual_function(t.e[s], X, "exp", t.W[s])[2]
        assert bool((found.weights[1][:, 0] * curvature[:, 0, 0] > 0).all())
        # the competitor is the best multiple of its feature
        h = torch.exp(X @ found.competitor[0])
        slope = h.T @ (h @ found.competitor[1] - found.Y)
        assert float(slope.abs()) < 1e-12 * float(h.T @ h * found.competitor[1].abs() + h.T @ found.Y.abs())
        assert found.competitor_loss < found.loss * (1 - 1e-6)


def test_touching_points_touch():
    """Residuals, independence and definiteness as they are reported, evaluated anew."""
    X = torch.linspace(0.3, 2, 5, dtype=F64)[:, None]
    t = basins.touching_points(X, 2, "exp", 60, seeded(3))
    assert bool(t.definite.any())
    assert bool((t.touches | ~t.definite).all())
    for s in t.touches.nonzero()[:, 0].tolist():
        g, grad, hess = basins.dual_function(t.e[s], X, "exp", t.W[s])
        H = torch.exp(X @ t.W[s])
        size = H.norm(dim=0)
        assert float((g[0] / size).abs().max()) < 1e-11
        assert float((grad[0, :, 0] / size).abs().max()) < 1e-11
        assert float(torch.linalg.svdvals(H / size)[-1]) > 1e-3
        if bool(t.definite[s]):
            assert float(hess.abs().min()) > 0


def test_two_neurons_on_one_plane_touch_only_once():
    """Dependent features are refused, in planting and in the search."""
    X = torch.linspace(0.3, 2, 5, dtype=F64)[:, None]
    t = basins.touching_points(X, 1, "exp", 40, seeded(3))
    s = int(t.definite.nonzero()[0])
    with pytest.raises(ValueError, match="independent ones are needed"):
        basins.plant_bad_minimum(t.W[s].repeat(1, 2), t.e[s], X, "exp")


@pytest.mark.parametrize("default", [torch.float16, torch.float32, torch.float64])
def test_planting_does_not_depend_on_torchs_default_type(default):
    X = torch.linspace(0.3, 2, 6, dtype=F64)[:, None]
    expected = basins.touching_points(X, 2, "exp", 50, seeded(2))
    s = int(expected.definite.nonzero()[0])
    minimum = basins.plant_bad_minimum(expected.W[s], expected.e[s], X, "exp", 0.3)
    torch.set_default_dtype(default)
    try:
        again = basins.touching_points(X, 2, "exp", 50, seeded(2))
        found = basins.plant_bad_minimum(expected.W[s], expected.e[s], X, "exp", 0.3)
        halves = basins.split_neuron(e1_at()[0], 0, (0.1, 0.9))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.W, expected.W)
    assert torch.equal(found.Y, minimum.Y)
    assert halves[1].flatten().tolist() == [0.1, 0.9]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([torch.ones(2, 3).double()], "weights have shapes"),
        ([torch.ones(2, 3).double(), torch.ones(4, 1).double()], "weights have shapes"),
        ([torch.ones(2).double(), torch.ones(2).double()], r"weights\[0\] has shape"),
        ([torch.ones(2, 2, 3).double(), torch.ones(3, 1).double()], "weights have shapes"),
    ],
)
def test_only_two_matrices_that_fit_are_split(unchecked, weights, words):
    with pytest.raises(ValueError, match=words):
        basins.split_neuron(weights, 0, (0.5, 0.5))
