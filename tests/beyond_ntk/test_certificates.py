"""The gap and the rate: enclosed losses against ball arithmetic, rates against runs, and bad input."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
import torch.nn.functional as F
from making import gaussian
from torch import nn

from companion import data, networks, rigor
from companion.beyond_ntk import vision
from companion.beyond_ntk.bounds import duplicate_floor
from companion.beyond_ntk.certificates import certify_gap, certify_rate, loss_bounds
from companion.beyond_ntk.last_layer import LAMBDA, centre
from companion.beyond_ntk.phase2 import phase2_gd, phase2_nesterov
from companion.rigor import modules

try:
    import flint
except ImportError:  # the extra `certify`
    flint = None

needs_flint = pytest.mark.skipif(flint is None, reason="python-flint is not installed")


def mlp(widths, seed=0, **options):
    return vision.mlp(widths, generator=torch.Generator().manual_seed(seed), **options)


def labels(N, K, seed=0):
    y = torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(seed))
    y[0], y[1] = 0, 1
    return y


def fit(model, X, Y):
    """Least squares in the last layer."""
    h, _ = modules.enclose(model, X, before=model.last)
    M = torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], dim=1)
    V = torch.linalg.lstsq(M, Y, driver="gelsd").solution
    with torch.no_grad():
        model.last.weight.copy_(V[:-1].T)
        model.last.bias.copy_(V[-1])
    return M


# --- The loss ---------------------------------------------------------------------------------------------------------


def true_loss(q, y, loss):
    """The averaged loss of exact outputs, in ball arithmetic."""
    total = flint.arb(0)
    for row, target in zip(q, y.tolist(), strict=True):
        if loss == "squared":
            total += sum(((a - flint.arb(b)) ** 2 for a, b in zip(row, target, strict=True)), flint.arb(0)) / 2
        else:
            total += sum(((a - row[target]).exp() for a in row), flint.arb(0)).log()
    return total / len(q)


def loss_trials(seeds, shrink=1.0, spread=1.0):
    """How many enclosures miss the loss of a point of the ball, and how many trials there were."""
    missed, count = 0, 0
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        N, K = (int(n) for n in torch.randint(2, 5, (2,), generator=g))
        loss = [*LAMBDA][seed % 2]
        size = 10.0 ** float(torch.randint(-3, 3, (), generator=g))
        q = torch.randn(N, K, dtype=torch.float64, generator=g) * size
        y = labels(N, K, seed)
        if loss == "squared":
            y = torch.randn(N, K, dtype=torch.float64, generator=g) * size
            if seed % 3 == 0:
                y = q * (1 + 1e-14 * torch.randn(N, K, dtype=torch.float64, generator=g))
        elif seed % 3 == 0:
            q[torch.arange(N), y] += 40  # nearly fitted
        D = (
            torch.rand(N, K, dtype=torch.float64, generator=g)
            * size
            * 10.0 ** -float(torch.randint(4, 20, (), generator=g))
        )
        D = D * spread
        corner = torch.randint(-1, 2, (N, K), generator=g).double()
        with flint.ctx.workprec(500):
            point = [
                [flint.arb(a) + flint.arb(b) * flint.arb(c) for a, b, c in zip(*rows, strict=True)]
                for rows in zip(q.tolist(), D.tolist(), corner.tolist(), strict=True)
            ]
            truth = true_loss(point, y, loss)
            low, high = loss_bounds(q, D * shrink, y, loss)
            missed += not (flint.arb(low) <= truth <= flint.arb(high))
        count += 1
    return missed, count


@needs_flint
def test_losses_are_enclosed():
    assert loss_trials(range(1000)) == (0, 1000)
    assert loss_trials(range(300), spread=0.0) == (0, 300)


@needs_flint
def test_a_forgotten_radius_is_caught():
    assert loss_trials(range(300), shrink=0.0)[0] > 50


def test_losses_are_tight():
    q, y, Y = gaussian(50, 4), labels(50, 4), gaussian(50, 4, seed=1)
    zero = torch.zeros_like(q)
    for target, loss, plain in (
        (y, "cross_entropy", F.cross_entropy(q, y)),
        (Y, "squared", 0.5 * (q - Y).square().sum() / 50),
    ):
        low, high = loss_bounds(q, zero, target, loss)
        assert low <= float(plain) <= high <= low * (1 + 1e-7)
    assert loss_bounds(q, zero, q.clone()) == (0.0, pytest.approx(0.0, abs=1e-300))


def exact_cross_entropy(q, y):
    """The averaged loss with 60 digits and exponents without limit."""
    with mpmath.workdps(60):
        rows = [[mpmath.mpf(v) for v in row] for row in q.tolist()]
        shifted = [[v - row[k] for v in row] for row, k in zip(rows, y.tolist(), strict=True)]
        rest = [[mpmath.exp(v - max(r)) for i, v in enumerate(r) if i != r.index(max(r))] for r in shifted]
        return sum(max(r) + mpmath.log1p(sum(others)) for r, others in zip(shifted, rest, strict=True)) / len(rows)


def test_extreme_outputs():
    y = torch.tensor([0, 1])
    outputs = torch.tensor([[1.0, -1.0, 0.5], [1.0, 3.0, 2.0]], dtype=torch.float64)
    wrong = torch.tensor([[0.0, 1000.0], [1000.0, 0.0]], dtype=torch.float64)
    huge = torch.tensor([[1e308, -1e308], [0.0, 0.0]], dtype=torch.float64)
    for q in (outputs * 1e3, outputs * 1e150, outputs * 1e-300, wrong, huge):
        low, high = loss_bounds(q, torch.zeros_like(q), y, "cross_entropy")
        assert low <= exact_cross_entropy(q, y) <= high
        assert high <= low * (1 + 1e-7) + 1e-300
    low, high = loss_bounds(-huge, torch.zeros_like(huge), y, "cross_entropy")
    assert high == math.inf  # beyond the largest float
    assert low <= exact_cross_entropy(-huge, y)
    assert loss_bounds(huge, torch.zeros_like(huge), -huge)[1] == math.inf


def test_squares_beyond_half_of_the_exponents_keep_a_true_lower_bound():
    zero = torch.zeros(1, 1, dtype=torch.float64)
    low, high = loss_bounds(zero + 1e152, zero, zero)
    assert Fraction(low) <= Fraction(1e152) ** 2 / 2 <= Fraction(high)
    assert high <= low * (1 + 1e-14)
    low, high = loss_bounds(zero + 1e200, zero, zero)  # the loss itself is no float
    assert (low < math.inf, high) == (True, math.inf)


@pytest.mark.parametrize("size", [1e4, 1e9, 1e15])
def test_large_logits(size):
    for seed in range(20):
        q, y = size * gaussian(6, 4, seed=seed), labels(6, 4, seed)
        q[0] = q[0, 0]  # all equal
        low, high = loss_bounds(q, torch.zeros_like(q), y)
        assert low <= exact_cross_entropy(q, y) <= high
        assert high - low <= 1e-14 * size


# --- Equal inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_floor_of_equal_inputs_squared(seed):
    groups = torch.randint(0, 4, (11,), generator=torch.Generator().manual_seed(seed))
    groups = torch.unique(groups, return_inverse=True)[1]
    Y = gaussian(11, 2, seed=seed)
    best = sum(
        (Y[groups == k] - Y[groups == k].mean(dim=0)).square().sum() / 2 for k in range(int(groups.max()) + 1)
    ) / 11  # fmt: skip
    floor = duplicate_floor(groups, Y)
    assert floor == pytest.approx(float(best), rel=1e-12)
    exact = Fraction(0)
    for k in groups.unique().tolist():
        for column in Y[groups == k].T.tolist():
            mean = sum(map(Fraction, column)) / len(column)
            exact += sum((Fraction(v) - mean) ** 2 for v in column) / 2
    assert 0 <= exact / 11 - Fraction(floor) <= exact / 10**13 + Fraction(10) ** -300


@pytest.mark.parametrize("seed", range(10))
def test_floor_of_equal_inputs_cross_entropy(seed):
    groups = torch.unique(
        torch.randint(0, 4, (15,), generator=torch.Generator().manual_seed(seed)), return_inverse=True
    )[1]
    y = labels(15, 3, seed)
    floor = duplicate_floor(groups, y, "cross_entropy")
    entropy = 0.0
    for k in groups.unique().tolist():
        p = torch.bincount(y[groups == k]).double()
        p = p / p.sum()
        entropy += float(torch.special.entr(p).sum()) * int((groups == k).sum())
    assert floor == pytest.approx(entropy / 15, rel=1e-13)
    with mpmath.workdps(40):
        counts = [torch.bincount(y[groups == k]).tolist() for k in groups.unique().tolist()]
        terms = [c * mpmath.log(mpmath.mpf(sum(row)) / c) for row in counts for c in row if c]
        assert floor <= sum(terms) / 15


def test_floor_is_zero_without_conflict():
    groups = torch.tensor([0, 1, 0, 2])
    assert duplicate_floor(groups, torch.tensor([1, 0, 1, 0]), "cross_entropy") == 0.0
    assert duplicate_floor(groups, gaussian(4, 2)[groups]) == 0.0
    assert duplicate_floor(torch.arange(4), gaussian(4, 2)) == 0.0


def test_equal_inputs_with_different_targets_are_subtracted():
    X, Y = gaussian(12, 3), gaussian(12, 2, seed=1)
    X[7] = X[2]
    model = mlp((3, 8, 20, 2), activation=networks.Softplus)
    averaged = Y.clone()
    averaged[2] = averaged[7] = (Y[2] + Y[7]) / 2
    fit(model, X, averaged)
    found = certify_gap(model, X, Y).quantities
    assert found["floor"] == pytest.approx(float((Y[2] - Y[7]).square().sum()) / 4 / 12, rel=1e-12)
    assert found["loss_upper"] > found["floor"] > 0.01
    assert 0 < found["gap"] < 1e-8


# --- G: the gap -------------------------------------------------------------------------------------------------------


@needs_flint
@pytest.mark.parametrize("loss", [*LAMBDA])
def test_gap_bounds_the_true_network_s_loss(loss):
    """Networks in ball arithmetic: Linear and ReLU are rational, so the truth is exact."""
    held = 0
    for seed in range(40):
        X, model = gaussian(4, 2, seed=seed), mlp((2, 3, 6, 2), seed=seed, activation=nn.ReLU)
        y = gaussian(4, 2, seed=seed + 1) if loss == "squared" else labels(4, 2, seed)
        if loss == "squared" and seed % 2:
            fit(model, X, y)
        found = certify_gap(model, X, y)
        dense = [part for part in model if isinstance(part, nn.Linear)]
        with flint.ctx.workprec(600):
            outputs = []
            for x in X.tolist():
                h = [flint.arb(v) for v in x]
                for part in dense:
                    rows = zip(part.weight.tolist(), part.bias.tolist(), strict=True)
                    h = [sum((flint.arb(w) * v for w, v in zip(r, h, strict=True)), flint.arb(b)) for r, b in rows]
                    h = h if part is dense[-1] else [v if v >= 0 else flint.arb(0) for v in h]
                outputs.append(h)
            truth = true_loss(outputs, y, loss)
            assert flint.arb(found.quantities["loss_lower"]) <= truth <= flint.arb(found.quantities["loss_upper"])
            assert truth <= flint.arb(found.quantities["gap"])  # the infimum is 0, distinct inputs
        held += found.holds
        assert found.quantities["gap"] < 1e3
    assert 5 <= held <= 35  # fitted ones, and untrained ones, of which nothing is claimed


def test_headline_least_squares_reaches_the_global_minimum():
    digits = data.digits(n=150, normalize=False)
    model = mlp((64, 16, 200, 10), activation=lambda: networks.Softplus(10.0))
    before = certify_gap(model, digits.X, digits.Y)
    fit(model, digits.X, digits.Y)
    after = certify_gap(model, digits.X, digits.Y)
    assert before.quantities["gap"] > 0.1
    assert after.holds
    assert after.quantities["gap"] < 1e-15
    assert after.status == "certified"
    assert "L - inf L <= " in after.verdict()


@pytest.mark.parametrize("loss", [*LAMBDA])
def test_a_gap_that_constants_beat_is_called_vacuous(loss):
    """Zero weights and the best biases are the best constant outputs; only what is surely below them holds."""
    X = gaussian(30, 3)
    y = gaussian(30, 2, seed=1) if loss == "squared" else labels(30, 2)
    model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    vision.initialize(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model[2].weight.zero_()
        best = y.mean(0) if loss == "squared" else torch.bincount(y).double().log()
        model[2].bias.copy_(best)
    found = certify_gap(model, X, y)
    assert not found.holds
    assert found.reason.startswith("vacuous: L <= ")
    assert found.assumptions[0].required == pytest.approx(found.quantities["loss_lower"], rel=1e-12)
    downhill = -1e-3 * gradient_of(model, X, y, loss)
    with torch.no_grad():
        model[2].weight.copy_(downhill)
    better = certify_gap(model, X, y)
    assert better.holds
    assert better.quantities["gap"] < found.quantities["gap"]


def gradient_of(model, X, y, loss):
    q = model(X)
    value = 0.5 * (q - y).square().sum() / len(X) if loss == "squared" else F.cross_entropy(q, y)
    return torch.autograd.grad(value, model[2].weight)[0]


def test_the_model_need_not_end_in_a_linear_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    X = gaussian(5, 3)
    with torch.no_grad():
        Y = model(X) + 0.01
    assert certify_gap(model, X, Y).holds


def test_nothing_is_assumed():
    X, Y, y = gaussian(6, 3), gaussian(6, 2), labels(6, 2)
    for model in (mlp((3, 4, 2), activation=nn.ReLU), mlp((3, 4, 2), activation=nn.Tanh), mlp((3, 4, 2))):
        for certificate in (certify_gap(model, X, Y), certify_gap(model, X, y), certify_rate(model, X[:5])):
            assert {a.status for a in certificate.assumptions} <= {"certified", "exact"}


def test_float32_networks_have_a_gap_too():
    model = mlp((3, 8, 2), dtype=torch.float32)
    X, y = gaussian(9, 3).float(), labels(9, 2)
    found = certify_gap(model, X, y).quantities
    assert found["loss_lower"] == pytest.approx(float(F.cross_entropy(model(X), y).detach()), rel=1e-5)
    assert found["loss_upper"] - found["loss_lower"] < 1e-8
    with torch.no_grad():
        targets = model(X) + 0.01
    assert certify_gap(model, X, targets).holds


@pytest.mark.parametrize("loss", [*LAMBDA])
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_gap_against_the_optimum(loss, bias):
    """The optimum of the regularized last layer, found by Newton's method, is never below what the gap allows."""
    X, model = gaussian(20, 3), mlp((3, 5, 3), activation=nn.Tanh)
    if not bias:
        model.last = nn.Linear(5, 3, bias=False).double()
    y = gaussian(20, 3, seed=2) if loss == "squared" else labels(20, 3)
    h = modules.enclose(model, X, before=model.last)[0]
    M = torch.cat([h, torch.ones(20, 1).double()], dim=1) if bias else h

    def objective(V):
        q = M @ V
        fitted = 0.5 * (q - y).square().sum() / 20 if loss == "squared" else F.cross_entropy(q, y)
        return fitted + ridge / 2 * V.square().sum()

    for ridge in (1e-3, 1e-1, 10.0):
        weight = model.last.weight.detach()
        V0 = torch.cat([weight, model.last.bias.detach()[:, None]], dim=1).T if bias else weight.T
        V = V0.clone()
        for _ in range(60):
            gradient = torch.func.grad(objective)(V)
            H = torch.autograd.functional.hessian(objective, V).reshape(V.numel(), V.numel())
            V = V - torch.linalg.solve(H, gradient.reshape(-1)).reshape(V.shape)
        assert torch.func.grad(objective)(V).norm() < 1e-10
        found = certify_gap(model, X, y, ridge=ridge).quantities
        gap = float(objective(V0) - objective(V))
        gradient = torch.func.grad(objective)(V0)
        assert gap <= found["ridge_gap"] * (1 + 1e-9) + 1e-12
        assert found["ridge_gap"] == pytest.approx(float(gradient.square().sum()) / (2 * ridge), rel=1e-9)
        plain = torch.func.grad(lambda V, r=ridge: objective(V) - r / 2 * V.square().sum())(V0)
        assert found["gradient_norm"] == pytest.approx(float(plain.norm()), rel=1e-9)


def test_ridge_quantities_bound_the_exact_gradient():
    """At the optimum the gradient is rounding noise: the exact one, in fractions, stays below what is certified."""
    X, model = gaussian(6, 2), mlp((2, 9, 2), activation=nn.ReLU)
    Y = gaussian(6, 2, seed=3)
    fit(model, X, Y)
    found = certify_gap(model, X, Y, ridge=1e-3).quantities
    W, a, V, b = ([[Fraction(x) for x in row] for row in t.tolist()] for t in
                  (model[0].weight, model[0].bias[:, None], model[2].weight, model[2].bias[:, None]))  # fmt: skip
    gradient = [[Fraction(0)] * 10 for _ in range(2)]
    for x, y in zip(X.tolist(), Y.tolist(), strict=True):
        h = [max(Fraction(0), sum(w * Fraction(v) for w, v in zip(row, x, strict=True)) + c[0])
             for row, c in zip(W, a, strict=True)]  # fmt: skip
        for k in range(2):
            r = sum(v * u for v, u in zip(V[k], h, strict=True)) + b[k][0] - Fraction(y[k])
            gradient[k] = [g + r * u / 6 for g, u in zip(gradient[k], [*h, Fraction(1)], strict=True)]
    norm = sum(g**2 for row in gradient for g in row)
    assert 0 < norm <= Fraction(found["gradient_norm"]) ** 2
    assert found["gradient_norm"] < 1e-12
    total = sum((g + Fraction(1e-3) * v) ** 2 for row, v_row, c in zip(gradient, V, b, strict=True)
                for g, v in zip(row, [*v_row, c[0]], strict=True))  # fmt: skip
    assert total / (2 * Fraction(1e-3)) <= Fraction(found["ridge_gap"])
    assert found["ridge_gap"] == pytest.approx(float(total / (2 * Fraction(1e-3))), rel=1e-9)


@pytest.mark.parametrize("default", [torch.float16, torch.float32])
def test_the_default_dtype_changes_nothing(default):
    X, y = gaussian(8, 3), gaussian(8, 2, seed=1)
    model = mlp((3, 5, 20, 2))
    fit(model, X, y)

    def everything():
        found = [
            certify_gap(model, X, y, ridge=0.1),
            certify_rate(model, X, y=y),
            certify_rate(model, X, y=labels(8, 2)),
        ]
        return [c.quantities for c in found]

    expected = everything()
    torch.set_default_dtype(default)
    try:
        assert everything() == expected
    finally:
        torch.set_default_dtype(torch.float32)


# --- R: the rate ------------------------------------------------------------------------------------------------------


def features(model, X):
    h = modules.enclose(model, X, before=model.last)[0]
    return torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], dim=1)


def in_coordinates(model, X, centred):
    """The features and the last layer in the coordinates of the steps."""
    M, V0 = features(model, X), torch.cat([model.last.weight.detach().T, model.last.bias.detach()[None]])
    frame = centre(M)
    return (frame.features(M), frame.to(V0)) if centred else (M, V0)


@pytest.mark.parametrize("centred", [True, False])
def test_rate_brackets_the_spectrum(centred):
    X, model = gaussian(20, 4), mlp((4, 6, 61, 3), activation=lambda: networks.Softplus(3.0))
    found = certify_rate(model, X, centred=centred).quantities
    values = torch.linalg.svdvals(in_coordinates(model, X, centred)[0])
    assert 0.5 * float(values[-1]) < found["sigma_min"] < float(values[-1])
    assert float(values[0]) < found["sigma_max"] < float(values[0]) * (1 + 1e-6)
    assert found["sigma_min"] <= found["sigma_min_floats"] - found["radius"]
    assert found["max_step"] == pytest.approx(20 / float(values[0]) ** 2, rel=1e-6)


def transcribed(found, loss, N, K, residual, V0_norm, t):
    """The docstring's formulas, in exact fractions and 60 digits, from the two singular values that were shown."""
    with mpmath.workdps(60):
        s, top, r, size = (mpmath.mpf(x) for x in (found["sigma_min"], found["sigma_max"], residual, V0_norm))
        L_H = (1 if loss == "squared" else mpmath.mpf(1) / 2) * top**2 / N
        eta = mpmath.mpf(found["max_step"])
        if loss == "cross_entropy":
            slow = mpmath.mpf(K - 1) / t + (size + mpmath.sqrt(N) * mpmath.log(t) / s) ** 2 / (2 * eta * t)
            return {"smoothness": L_H, "bound": slow}
        c, R = eta * s**2 / N, r / s
        bound = (1 - c) ** t * r**2 / (2 * N)
        return {"smoothness": L_H, "contraction": c, "linear_rate": 1 - c, "distance": R, "bound": bound,
                "nesterov_bound": 2 * R**2 / (eta * (t + 1) ** 2)}  # fmt: skip


@pytest.mark.parametrize("loss", [*LAMBDA])
@pytest.mark.parametrize("centred", [True, False])
def test_rates_are_the_theorems_formulas_rounded_to_the_safe_side(loss, centred):
    vacuous, count = 0, 0
    for seed in range(6):
        X, model = gaussian(8, 4, seed=seed), mlp((4, 12 + 8 * seed, 3), seed=seed, activation=nn.Tanh)
        y = gaussian(8, 3, seed=1) if loss == "squared" else labels(8, 3)
        A, V0 = in_coordinates(model, X, centred)
        residual = float((A @ V0 - y).norm()) if loss == "squared" else 0.0
        for t in (1, 3, 50, 10**6):
            certificate = certify_rate(model, X, y=y, steps=t, centred=centred)
            found = certificate.quantities
            exact = transcribed(found, loss, 8, 3, residual, float(V0.norm()), t)
            assert 0 <= 1 - mpmath.mpf(found["max_step"]) * exact["smoothness"] < 1e-14
            for name in ("smoothness", "linear_rate"):
                if name in exact:
                    assert exact[name] <= found[name] <= exact[name] * (1 + 1e-14)
            if loss == "squared":
                assert exact["contraction"] * (1 - 1e-14) <= found["contraction"] <= exact["contraction"]
                for name in ("distance", "nesterov_bound"):  # the residual here is a rounded one
                    assert found[name] == pytest.approx(float(exact[name]), rel=1e-11)
            count += 1
            vacuous += found["bound"] == found["start"]
            assert ("vacuous" in certificate.verdict()) == (found["bound"] == found["start"])
            if found["bound"] == found["start"]:
                assert exact["bound"] >= found["start"] * (1 - 1e-12)
            else:
                assert found["bound"] == pytest.approx(float(exact["bound"]), rel=1e-9)
    assert (vacuous == 0) if loss == "squared" else (0 < vacuous < count)


@pytest.mark.parametrize("loss", [*LAMBDA])
@pytest.mark.parametrize("centred", [True, False])
def test_gradient_descent_obeys_the_rate(loss, centred):
    X, model = gaussian(12, 4), mlp((4, 30, 3), activation=nn.Tanh)
    y = gaussian(12, 3, seed=1) if loss == "squared" else labels(12, 3)
    M, V0 = in_coordinates(model, X, centred)

    def value(V):
        q = M @ V
        return 0.5 * (q - y).square().sum() / 12 if loss == "squared" else F.cross_entropy(q, y)

    for steps in (1, 10, 200):
        found = certify_rate(model, X, y=y, loss=loss, steps=steps, centred=centred).quantities
        start = centre(features(model, X)).back(V0) if centred else V0
        options = {"loss": loss, "step": found["max_step"], "steps": steps, "centred": centred}
        run = phase2_gd(features(model, X), start, y, **options)
        assert run.covered
        assert float(run.losses[-1]) <= found["bound"]
        if loss == "squared":
            run = phase2_nesterov(features(model, X), start, y, **options)
            assert float(run.losses[-1]) <= found["nesterov_bound"]
        assert float(value(V0)) <= found["start"] <= float(value(V0)) * (1 + 1e-9)
        if loss == "squared":
            assert found["distance"] >= float(torch.linalg.lstsq(M, y - M @ V0, driver="gelsd").solution.norm())


@pytest.mark.parametrize("centred", [True, False])
def test_the_radius_of_the_features_counts_at_both_ends_of_the_spectrum(monkeypatch, centred):
    """With features known up to 1e-3 only, every matrix within obeys what is certified, and some nearly attain it."""
    X, model, y = gaussian(8, 4), mlp((4, 30, 3), activation=nn.Tanh), gaussian(8, 3, seed=1)
    enclose = modules.enclose

    def coarse(network, X, *, before=None, batch=256):
        h, D = enclose(network, X, before=before, batch=batch)
        return h, torch.full_like(D, 1e-3)

    monkeypatch.setattr(modules, "enclose", coarse)
    found = certify_rate(model, X, y=y, steps=40, centred=centred).quantities
    A, V0 = in_coordinates(model, X, centred)
    U, s, Wt = torch.linalg.svd(A, full_matrices=False)
    assert found["radius"] == pytest.approx(1e-3 * math.sqrt(8 * 30), rel=1e-6)
    outward = 1e-3 * torch.sign(U[:, :1] @ Wt[:1])
    inward = -1e-3 * torch.sign(U[:, -1:] @ Wt[-1:])
    seen = []
    for moved in (outward, inward, *(1e-3 * torch.sign(gaussian(8, 31, seed=k)) for k in range(10))):
        moved[:, -1] = 0
        true = A + moved
        values = torch.linalg.svdvals(true)
        seen.append((float(values[0]), float(values[-1])))
        assert found["sigma_min"] <= values[-1]
        assert values[0] <= found["sigma_max"]
        assert found["max_step"] * values[0] ** 2 / 8 <= 1
        run = phase2_gd(true, V0, y, step=found["max_step"], steps=40, centred=False)
        assert run.losses[0] <= found["start"]
        assert run.losses[-1] <= found["bound"]
    assert max(top for top, _ in seen) > s[0] + 0.5 * found["radius"]  # so a radius left out at the top is seen
    assert min(low for _, low in seen) < s[-1] - 0.2 * found["radius"]


def test_order_of_samples_and_neurons_hardly_matters():
    X, model = gaussian(25, 4), mlp((4, 40, 3), activation=lambda: networks.Softplus(3.0))
    sigma = certify_rate(model, X).quantities["sigma_min"]
    order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    assert certify_rate(model, X[order]).quantities["sigma_min"] == pytest.approx(sigma, rel=1e-6)
    neurons = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for t in (model.wide.weight, model.wide.bias):
            t.copy_(t[neurons])
    assert certify_rate(model, X).quantities["sigma_min"] == pytest.approx(sigma, rel=1e-6)


def test_powers_of_two_are_exact():
    """Without the constant column the whole matrix scales with the inputs of a ReLU network, bit for bit."""
    model = nn.Sequential(nn.Linear(4, 40, bias=False), nn.ReLU(), nn.Linear(40, 2, bias=False)).double()
    nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(0))
    one = certify_rate(model, gaussian(20, 4)).quantities
    for k in (-30, 7):
        scaled = certify_rate(model, gaussian(20, 4) * 2.0**k).quantities
        assert scaled["sigma_min_floats"] == one["sigma_min_floats"] * 2.0**k


def test_silence_of_the_rate():
    X = gaussian(20, 4)
    narrow = certify_rate(mlp((4, 18, 2)), X)
    assert narrow.reason == "width: M has 19 columns; at least N = 20 are needed"
    twice = X.clone()
    twice[3] = twice[5]
    assert certify_rate(mlp((4, 40, 2)), twice).reason.startswith("sigma_min: 0.00e+00 was shown")
    model = nn.Sequential(nn.Linear(4, 40), nn.GELU(), nn.Linear(40, 2)).double()
    assert certify_rate(model, X).reason == "no_enclosure: no enclosure for GELU (1)"
    assert certify_rate(nn.Sequential(*model, nn.Tanh()), X).reason.startswith("architecture: the last layer must be")
    assert certify_gap(model, X, gaussian(20, 2)).reason == "no_enclosure: no enclosure for GELU (1)"


def test_radius_larger_than_sigma_is_silence():
    """sigma_N of the floats is positive, of the true features it is not shown: the rate must not speak."""
    model = nn.Sequential(nn.Linear(2, 30), nn.Softplus(), nn.Linear(30, 2)).double()
    nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(0))
    X = gaussian(12, 2)
    certificate = certify_rate(model, X)
    found = certificate.quantities
    assert found["radius"] > 2e-9  # the jump of PyTorch's softplus, in every entry
    assert found["sigma_min_floats"] > 0
    if found["sigma_min_floats"] <= found["radius"]:
        assert not certificate.holds
        assert found["sigma_min"] == 0.0
    assert certificate.holds == (found["sigma_min_floats"] > found["radius"])
    close = X.clone()
    close[4] = close[9] + 1e-10
    silent = certify_rate(model, close)
    assert not silent.holds
    assert silent.reason.startswith("sigma_min: ")


# --- Bad input --------------------------------------------------------------------------------------------------------

MODEL, X = mlp((3, 20, 2)), gaussian(10, 3)
Y, y = gaussian(10, 2, seed=1), labels(10, 2)


@pytest.mark.parametrize("certify", [certify_gap, lambda model, X, y, **o: certify_rate(model, X, y=y, **o)])
@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        ([1, 0], {}, TypeError, "y is a list; a torch tensor is needed"),
        (Y, {"loss": "hinge"}, ValueError, "loss is 'hinge'; 'squared' or 'cross_entropy' is needed"),
        (
            Y,
            {"loss": "cross_entropy"},
            TypeError,
            r"y is torch.float64; loss 'cross_entropy' needs integer labels \(N,\)",
        ),
        (y, {"loss": "squared"}, TypeError, r"y is torch.int64; loss 'squared' needs floating-point targets \(N, K\)"),
        (y > 0, {}, TypeError, "y has dtype torch.bool; real numbers are needed"),
        (Y[:9], {}, ValueError, r"y has shape \(9, 2\); \(N, K\) with N = 10 is needed"),
        (Y[:, 0], {}, ValueError, r"y has shape \(10,\); \(N, K\) with N = 10 is needed; write y\[:, None\]"),
        (y[:, None], {}, ValueError, r"y has shape \(10, 1\); \(N,\) with N = 10 is needed; write y\[:, 0\]"),
        (Y * math.nan, {}, ValueError, r"y\[0, 0\] is nan; finite numbers are needed"),
        (y * 0 + 1, {}, ValueError, "y holds one class only; at least two classes are needed"),
        (y - 1, {}, ValueError, "y holds labels -1 to 0; 0 to K - 1 is needed"),
        (y * 2, {}, ValueError, "y holds labels 0 to 2; 0 to 1 is needed"),
        (Y[:, :1], {}, ValueError, "y has 1 columns, but there are 2 outputs; they must be equal"),
    ],
)
def test_bad_targets(unchecked, certify, target, options, error, message):
    with pytest.raises(error, match=message):
        certify(MODEL, X, target, **options)


def test_bad_arguments(unchecked):
    for ridge in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"ridge is .*; a (positive|finite) number is needed"):
            certify_gap(MODEL, X, Y, ridge=ridge)
    with pytest.raises(ValueError, match="steps is 0; a positive number is needed"):
        certify_rate(MODEL, X, steps=0)
    with pytest.raises(ValueError, match=r"loss is 'hinge'"):
        certify_rate(MODEL, X, loss="hinge")
    for certify in (lambda X: certify_gap(MODEL, X, Y), lambda X: certify_rate(MODEL, X)):
        with pytest.raises(TypeError, match=r"X has dtype torch\.int64"):
            certify(X.long())
        with pytest.raises(ValueError, match=r"X\[0, 0\] is nan"):
            certify(X * math.nan)
        with pytest.raises(ValueError, match=r"X has shape \(0, 3\)"):
            certify(X[:0])
    assert certify_gap(nn.Sequential(MODEL, nn.ReLU()), X, Y, ridge=1.0).reason.startswith("architecture")
    with pytest.raises(ValueError, match="method is 'qr'"):
        certify_rate(MODEL, X, method="qr")


def test_verified_is_the_only_arithmetic(monkeypatch):
    """A dishonest sigma bound shows: the rate rests on `rigor.sigma_min_lower` and nothing else."""
    monkeypatch.setattr(rigor, "sigma_min_lower", lambda M, method: 0.0)
    assert not certify_rate(MODEL, X).holds
