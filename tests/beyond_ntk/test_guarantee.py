"""Lesson 3 as a whole: its names, and its theorems where they meet."""

import math

import pytest
import torch
from making import seeded
from torch import nn

from companion import beyond_ntk as by
from companion import data, networks
from companion import rigor as verified
from companion.beyond_ntk import certificates, expressivity, vision
from companion.beyond_ntk import recipe as two_phase


def gaussian(N, d, seed):
    return torch.randn(N, d, generator=seeded(seed), dtype=torch.float64)


def test_names():
    assert by.two_phase is two_phase.two_phase
    assert by.certify_expressivity is expressivity.certify_expressivity
    assert by.certify_gap is certificates.certify_gap
    assert by.certify_rate is certificates.certify_rate
    assert sorted(by.__all__) == by.__all__
    assert all(callable(getattr(by, name)) for name in by.__all__)


# --- separation is expressivity (width threshold) ---------------------------------------------------------------------


@pytest.mark.parametrize("activation", [networks.Softplus, nn.Tanh])
def test_full_rank_begins_at_exactly_N_minus_1_neurons(activation):
    N, d = 60, 8
    for seed in range(20):
        X = gaussian(N, d, seed)
        for m, wanted in ((58, False), (59, True)):
            model = vision.mlp((d, m, 2), activation=activation, generator=seeded(seed + 100))
            assert bool(by.certify_expressivity(model, X)) is wanted
            M = by.with_constant(by.last_layer_features(model, model.last, X))
            found = m + 1 >= N and verified.sigma_min_lower(M) > 0
            assert found is wanted


def test_linear_networks_never_have_it():
    X = gaussian(60, 8, 0)
    model = vision.mlp((8, 200, 2), activation=nn.Identity, generator=seeded())
    M = by.with_constant(by.last_layer_features(model, model.last, X))
    assert int(torch.linalg.matrix_rank(M)) == 9
    assert not by.certify_expressivity(model, X)


def test_square_stops_at_the_number_of_quadratics():
    for p in (2, 3, 4):
        X = gaussian(40, p, p)
        model = vision.mlp((p, 100, 2), activation=networks.Square, generator=seeded())
        M = by.with_constant(by.last_layer_features(model, model.last, X))
        assert int(torch.linalg.matrix_rank(M)) == math.comb(p + 2, 2)
        assert not by.certify_expressivity(model, X)


def test_the_bias_is_needed():
    # odd activation without a bias: the rows of x, -x, z, -z are dependent, at every width
    X = gaussian(2, 3, 1)
    X = torch.cat([X, -X])
    model = nn.Sequential(nn.Linear(3, 50, bias=False), nn.Tanh(), nn.Linear(50, 1)).double()
    vision.initialize(model, seeded())
    M = by.with_constant(by.last_layer_features(model, model[2], X))
    assert int(torch.linalg.matrix_rank(M)) == 3
    assert not by.certify_expressivity(model, X)


def test_one_separating_neuron_a_layer_is_enough():
    # the corollary: widths (1, 1, N - 1) after one separating projection
    model = vision.mlp((5, 1, 1, 29, 2), generator=seeded(3))
    assert by.certify_expressivity(model, gaussian(30, 5, 2))


def test_copies_are_named():
    X = gaussian(30, 5, 2)
    X[17] = X[4]
    model = vision.mlp((5, 3, 40, 2), generator=seeded(3))
    certificate = by.certify_expressivity(model, X)
    assert not certificate
    assert "4, 17" in certificate.reason


# --- the loss bounds the gap ------------------------------------------------------------------------------------------


def digits(N=40):
    few = data.digits(n=N, centre=False, normalize=False, generator=seeded(0))
    return few.X, few.Y, few.labels


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.02, momentum=0.9)


def small(seed=1):
    return vision.mlp((64, 16, 60, 10), activation=lambda: networks.Softplus(10.0), generator=seeded(seed))


def test_the_recipe_ends_at_a_certified_global_minimum():
    X, Y, _ = digits()
    model = small()
    run = by.two_phase(
        model, model.last, X, Y, sgd, 5, loss="squared", noise=1e-2, phase2="least_squares", generator=seeded(2)
    )
    assert by.certify_expressivity(model, X)
    gap = by.certify_gap(model, X, Y)
    assert gap
    assert run.loss <= gap.quantities["gap"] < 1e-14
    assert run.before > 1e-3  # phase 1 alone was not there


def test_the_gap_needs_no_rank():
    X, _, labels = digits()
    model = vision.mlp((64, 16, 7, 10), activation=lambda: networks.Softplus(10.0), generator=seeded(1))
    run = by.two_phase(model, model.last, X, labels, sgd, 10, options={"steps": 300}, generator=seeded(2))
    assert not by.certify_expressivity(model, X)
    gap = by.certify_gap(model, X, labels)
    assert run.loss <= gap.quantities["gap"] <= run.loss * (1 + 1e-6) + 1e-9


def test_random_labels_do_as_well():
    X, _, _ = digits()
    Y = nn.functional.one_hot(torch.randint(10, (40,), generator=seeded(7)), 10).double()
    model = small()
    by.two_phase(model, model.last, X, Y, sgd, 5, loss="squared", phase2="least_squares", generator=seeded(2))
    assert by.certify_gap(model, X, Y).quantities["gap"] < 1e-12


def test_copies_have_a_floor_and_least_squares_reaches_it():
    X, Y, _ = digits()
    X[3], Y[3] = X[9], Y[9].roll(1)
    model = small()
    with pytest.warns(UserWarning, match="sigma_1 / sigma_min"):
        run = by.two_phase(
            model, model.last, X, Y, sgd, 3, loss="squared", noise=1e-2, phase2="least_squares", generator=seeded(2)
        )
    floor = by.duplicate_floor(data.equal_inputs(X), Y)
    assert floor == pytest.approx(0.5 / 40)
    assert run.loss == pytest.approx(floor, rel=1e-8)
    gap = by.certify_gap(model, X, Y)
    assert gap.quantities["floor"] == pytest.approx(floor)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_on_the_wide_layer_gives_rank_over_frozen_relu_layers():
    X, _, _ = digits()
    lower = [nn.Linear(64, 30), nn.ReLU()]
    model = nn.Sequential(*lower, nn.Linear(30, 60), networks.Softplus(10.0), nn.Linear(60, 10)).double()
    vision.initialize(model, seeded(4))
    with torch.no_grad():
        model[2].weight.zero_(), model[2].bias.zero_()  # no rank at all
    two_phase.relative_noise(model[2].parameters(), 0.0, 0.3, generator=seeded(5))
    M = by.with_constant(by.last_layer_features(model, model[4], X))
    assert verified.sigma_min_lower(M) > 0


# --- phase 2 ----------------------------------------------------------------------------------------------------------


def test_rates_cover_phase_two_of_the_recipe():
    X, Y, labels = digits()
    for target, loss in ((Y, "squared"), (labels, "cross_entropy")):
        for method in ("gd", "nesterov"):
            model = small()
            run = by.two_phase(
                model, model.last, X, target, sgd, 2, loss=loss, phase2=method,
                options={"steps": 100}, generator=seeded(3),
            )  # fmt: skip
            start = small()
            by.two_phase(start, start.last, X, target, sgd, 2, loss=loss, phase2="gd",
                         options={"steps": 0}, generator=seeded(3))  # fmt: skip
            frame = by.centre(run.M)
            V0 = frame.to(by.last_weights(start.last))
            bound = by.comparator_bound(
                frame.features(run.M), V0, target, run.phase2.steps, loss=loss, step=run.phase2.step, method=method
            )
            assert run.phase2.covered
            assert bool((run.phase2.losses <= bound * (1 + 1e-9)).all())
            assert float(bound[-1]) < 0.5 * float(bound[0])


def test_other_statistics_keep_expressivity():
    X, _, _ = digits(30)
    model = vision.conv_resnet(
        (1, 8, 8), (4, 4, 6), 29, 10, activation=lambda: networks.Softplus(10.0), generator=seeded(1)
    )
    twin = by.switch_batchnorm(model, by.batchnorm_statistics(model, X))
    assert by.certify_expressivity(model, X)
    assert by.certify_expressivity(twin, X)
    h, g = (by.last_layer_features(net, net.last, X) for net in (model, twin))
    torch.testing.assert_close(h, g)
