"""Runs beside what Theorem C promises of them."""

import warnings
from fractions import Fraction

import pytest
import torch
from making import relu_problem

from companion import data, descent, networks
from companion import width_bounds as wb
from companion.width_bounds import training


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_runs_obey_every_line_of_theorem_c(deep_net, fraction):
    X, Y, weights = deep_net
    cert = wb.certify(X, Y, weights)
    step = fraction * cert.quantities["max_step"]
    run = wb.train(X, Y, weights, step, 3000, every=100, certificate=cert)
    assert bool((run.residual[:, 0] <= wb.envelope(cert, step, run.steps) * (1 + 1e-10)).all())
    assert bool((run.observed["sigma_min"] >= cert.quantities["alpha"]).all())
    assert bool((run.observed["moves"][:, 0] <= torch.tensor(cert.quantities["radii"]).double()).all())
    assert bool((run.observed["drift"] <= cert.quantities["d"]).all())
    assert 0.8e-3 < cert.quantities["rho"] * cert.quantities["max_step"] < 4e-3


def test_the_envelope_at_a_smaller_step_has_the_better_rate(envelope_net):
    cert = wb.certify(*envelope_net)
    k = torch.tensor([0, 1000])
    half = cert.quantities["max_step"] / 2
    curve = wb.envelope(cert, half, k)
    assert float(curve[0]) == pytest.approx(cert.quantities["R_0"])
    assert float(curve[1]) < cert.quantities["R_0"] * (1 - half * cert.quantities["rho"]) ** 1000


def test_train_warns_when_the_step_leaves_the_theorem():
    X, Y, weights = relu_problem(8, 8, (8, 200, 1), 11, beta=3.0)
    cert = wb.certify(X, Y, weights)
    assert cert.holds
    step = cert.quantities["max_step"]
    with pytest.warns(UserWarning, match="not covered"):
        wb.train(X, Y, weights, 1.001 * step, 10, certificate=cert)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wb.train(X, Y, weights, step, 10, certificate=cert)
        wb.train(X, Y, weights, 1.5 * step, 10)  # covered with a larger epsilon
    with pytest.warns(UserWarning, match="not covered"):
        wb.train(X, Y, weights, 5 * step, 10)
    with pytest.raises(ValueError, match="step"):
        wb.train(X, Y, weights, 0.0, 10)


def two_networks():
    """Two networks on which Theorem C holds, the second with a largest step that is four times smaller."""
    X, Y, weights = relu_problem(8, 8, (8, 100, 1), 3, S=2)
    weights[0] *= torch.tensor([4.0, 8.0], dtype=torch.float64)[:, None, None]
    return X, Y, weights


def test_the_step_of_an_ensemble_covers_every_member():
    X, Y, weights = two_networks()
    cert = wb.certify(X, Y, weights)
    step = cert.quantities["max_step"]
    run = wb.train(X, Y, weights, step, 40, every=10, certificate=cert)
    curves = wb.envelope(cert, run.step, run.steps)
    assert curves.shape == run.residual.shape
    assert bool((run.residual <= curves * (1 + 1e-10)).all())
    each = torch.tensor([m.quantities["max_step"] for m in cert.members], dtype=torch.float64)
    assert float(each[0] / each[1]) == pytest.approx(4, rel=0.2)
    run = wb.train(X, Y, weights, each, 40, every=10, certificate=cert)
    curves = wb.envelope(cert, each, run.steps)
    assert bool((run.residual <= curves * (1 + 1e-10)).all())
    for s in range(2):
        assert torch.equal(curves[:, s], wb.envelope(cert.members[s], float(each[s]), run.steps))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wb.train(X, Y, weights, 1.5 * each, 5)  # each is covered, with a larger epsilon
    with pytest.warns(UserWarning, match=f"allows at most {float(each[1]):.3g}, so"):
        wb.train(X, Y, weights, float(each[0]), 5, certificate=cert)
    for beyond in (float(each[0]), 1.001 * step, 0.0):
        with pytest.raises(ValueError, match="step is"):
            wb.envelope(cert, beyond, run.steps)


def test_a_certificate_of_another_network_is_refused():
    X, Y, weights = two_networks()
    first, both = wb.certify(X, Y, [W[0] for W in weights]), wb.certify(X, Y, weights)
    step = both.quantities["max_step"]
    with pytest.raises(ValueError, match="of 1 networks, weights hold 2"):
        wb.train(X, Y, weights, step, 5, certificate=first)
    with pytest.raises(ValueError, match="certificate says"):
        wb.train(X, Y, [0.9 * weights[0], weights[1]], step, 5, certificate=both)  # alpha_0
    with pytest.raises(ValueError, match="certificate says"):
        wb.train(X, 1.1 * Y, weights, step, 5, certificate=both)  # R_0
    with pytest.raises(ValueError, match="one for each of 2 networks"):
        wb.envelope(both, torch.tensor([step] * 3, dtype=torch.float64), torch.arange(3))


@pytest.mark.parametrize("level", ["measured", "certified"])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
def test_the_envelope_is_the_theorems_curve_rounded_up(level, fraction):
    """``eps' = fraction eps`` is what the step leaves (fact 2); the exact power in rationals."""
    cert = wb.certify(*relu_problem(8, 8, (8, 200, 1), 1, beta=3.0), level=level)
    q = {name: value if name == "radii" else Fraction(value) for name, value in cert.quantities.items()}
    step = fraction * cert.quantities["max_step"]
    k = torch.tensor([[0, 1, 7, 2000], [*range(1020, 1024)], [*range(1500, 1504)]])
    curve = wb.envelope(cert, step, k)
    assert curve.shape == k.shape
    rho = (1 - Fraction(step) * q["phi"] ** 2 / 2) * q["alpha"] ** 2 - q["B"]
    assert float(rho) == pytest.approx((1 - fraction * 0.25) * float(q["alpha"]) ** 2 - float(q["B"]), rel=1e-12)
    if fraction == 1:
        assert float(rho) == pytest.approx(float(q["rho"]), rel=1e-12)
    for value, count in zip(curve.flatten().tolist(), k.flatten().tolist(), strict=True):
        exact = (1 - Fraction(step) * rho) ** count * q["R_0"]
        assert exact <= Fraction(value) <= exact * (1 + Fraction(1, 10**11)) + Fraction(1, 10**300)
    assert float(wb.envelope(cert, step, torch.tensor(10**9))) > 0  # below every float, and still a bound


@pytest.mark.parametrize("m", [1, 3, 5, 7, 9, 11])
def test_every_square_of_a_curve_is_rounded_up(m):
    """``1 - eta rho`` is a float here, so that only the products are rounded."""
    q = {"max_step": 1.0, "phi": 0.0, "alpha": 1.0, "B": 0.0, "R_0": 1.0}
    value = training._curve(q, m / 4096, torch.tensor([1024, 4096]))
    for found, k in zip(value.tolist(), (1024, 4096), strict=True):
        assert (1 - Fraction(m, 4096)) ** k <= Fraction(found)


def test_an_envelope_needs_counts():
    cert = wb.certify(*relu_problem(8, 8, (8, 200, 1), 1, beta=3.0))
    step = cert.quantities["max_step"]
    for k in (torch.tensor([3, -1]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="k holds a number that is not a count"):
            wb.envelope(cert, step, k)
    assert torch.equal(wb.envelope(cert, step, torch.tensor([3.0])), wb.envelope(cert, step, torch.tensor([3])))
    with pytest.raises(ValueError, match="Theorem P"):
        wb.envelope(wb.certify_paper(*relu_problem(20, 20, (20, 200, 1), 1, beta=70.0)), step, torch.tensor(1))


def test_a_run_watches_what_theorem_c_bounds():
    X, Y, weights = relu_problem(5, 4, (4, 9, 7, 2), 4)
    weights[2] = weights[2] + 0.1
    run = wb.train(X, Y.expand(-1, 2).contiguous(), weights, 1e-3, 20, every=20)
    F, F_0 = (networks.features(W, X)[-1][0] for W in (run.weights, weights))
    assert float(run.observed["sigma_min"][-1, 0]) == pytest.approx(float(torch.linalg.svdvals(F)[4]), rel=1e-9)
    assert float(run.observed["drift"][-1, 0]) == pytest.approx(float((F - F_0).square().sum().sqrt()), rel=1e-12)
    moves = [float((W[0] - V).square().sum().sqrt()) for W, V in zip(run.weights, weights, strict=True)]
    assert run.observed["moves"][-1, 0].tolist() == pytest.approx(moves, rel=1e-12)
    assert min(moves) > 0


def test_a_run_that_diverges_says_so():
    X, Y, weights = relu_problem(8, 8, (8, 20, 1), 11)
    with pytest.raises(descent.Diverged, match="a smaller step size is needed"):
        wb.train(X, Y, weights, 1e17, 30)


def test_hidden_ascent_keeps_the_conclusions(deep_net):
    X, Y, weights = deep_net
    cert = wb.certify(X, Y, weights)
    step = cert.quantities["max_step"]

    def ascent(state, R, gradients):
        return [-G for G in gradients[:-1]] + gradients[-1:]

    run = wb.train(X, Y, weights, step, 1000, every=100, certificate=cert, update=ascent)
    assert bool((run.residual[:, 0] <= wb.envelope(cert, step, run.steps) * (1 + 1e-10)).all())
    assert bool((run.observed["moves"][:, 0] <= torch.tensor(cert.quantities["radii"]).double()).all())


def test_frozen_features_on_digits():
    digits = data.digits(n=50)
    generator = torch.Generator().manual_seed(7)
    weights = networks.init_mlp((64, 4096, 10), scheme="gaussian", beta=2.0, zero_last=True, generator=generator)
    cert = wb.certify(digits.X, digits.Y, weights, epsilon=0.4)
    assert cert.holds
    step = cert.quantities["max_step"]
    run = descent.train(weights, digits.X, digits.Y, step, 200, every=50)
    F = networks.features(weights, digits.X)[-1][0]
    values, U = torch.linalg.eigh(F @ F.T)
    for k, residual in zip(run.steps.tolist(), run.residual[:, 0].tolist(), strict=True):
        frozen = torch.linalg.matrix_norm((1 - step * values)[:, None] ** k * (U.T @ digits.Y))
        assert residual == pytest.approx(float(frozen), rel=1e-4)
