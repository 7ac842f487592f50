"""The finite-volume solver against exact transport and against the particles, which know no grid."""

import math

import pytest
import torch

from companion.mean_field.blocks import BallBump, Bias, GaussBump
from companion.mean_field.density_flow import _weno, fv_flow
from companion.mean_field.flow import density_rule, limit_flow

F64 = torch.float64
X = torch.tensor([[-1.2], [-0.4], [0.4], [1.2]], dtype=F64)
Y = torch.tensor([-1.5, -1.0, 0.1, 1.5], dtype=F64)
ONE = torch.ones(1, dtype=F64)
TIMES = [0.0, 1.0, 2.0, 4.0]


@pytest.fixture(scope="module")
def by_particles():
    return limit_flow(
        GaussBump(1.5), X, Y, ONE, *density_rule(GaussBump.density, (-3.0, 3.0), 96), times=TIMES, step=0.05
    )


@pytest.mark.parametrize(("cells", "bound"), [(100, 1.9e-6), (200, 6.4e-7), (400, 1.9e-7)])
def test_grid_and_particles_agree(by_particles, cells, bound):
    flow = fv_flow(GaussBump(1.5), X, Y, ONE, GaussBump.density, support=(-4.5, 4.5), cells=cells, times=TIMES)
    assert float((flow.loss - by_particles.loss)[1:].abs().max()) < bound
    assert float((flow.mass() - 1).abs().max()) < 1e-12
    assert float(flow.rho.min()) > -1e-12
    assert float((flow.Z - by_particles.Z).abs().max()) < 9e-5 * (100 / cells) ** 2


def test_moments_of_the_density_are_those_of_the_particles(by_particles):
    flow = fv_flow(GaussBump(1.5), X, Y, ONE, GaussBump.density, support=(-4.5, 4.5), cells=200, times=TIMES)
    dx = float(flow.centres[1] - flow.centres[0])
    for power in (1, 2, 4):
        grid = (flow.rho * flow.centres**power).sum(-1) * dx
        cloud = (by_particles.theta[..., 0] ** power) @ by_particles.weights
        assert torch.allclose(grid, cloud, atol=2e-3 if power < 4 else 2e-2)


def test_the_regularised_flow_agrees_too():
    rule = density_rule(GaussBump.density, (-3.0, 3.0), 64)
    cloud = limit_flow(GaussBump(1.5), X, Y, ONE, *rule, times=[0.5, 1.0], step=0.05, decay=1.0)
    grid = fv_flow(
        GaussBump(1.5), X, Y, ONE, GaussBump.density, support=(-3.5, 3.5), cells=120, times=[0.5, 1.0], decay=1.0
    )
    assert torch.allclose(grid.loss, cloud.loss, atol=1e-4)


def test_uniform_motion_carries_the_profile():
    # Bias: every parameter moves by the same amount c(s) = (1 - e^-s) (y - x); the profile only shifts
    def profile(theta):
        return torch.exp(-2 * theta**2)

    flow = fv_flow(Bias(1), ONE[None], 2 * ONE, ONE, profile, support=(-4.0, 5.0), cells=160, times=[1.0], depth=4)
    shift = 1 - math.exp(-1)
    exact = profile(flow.centres - shift) * math.sqrt(2 / math.pi)
    assert float((flow.rho[0, 0] - exact).abs().max()) < 2e-3
    assert float((flow.rho[0, 0] * flow.centres).sum()) * 9 / 160 == pytest.approx(shift, abs=1e-5)
    assert flow.loss.item() == pytest.approx(0.5 * math.exp(-2), abs=1e-5)


def test_weno_is_of_fifth_order_on_smooth_data_and_does_not_overshoot_at_a_jump():
    errors = []
    for N in (20, 40):
        h = 1 / N
        j = torch.arange(N + 5, dtype=F64)
        averages = (torch.cos((j - 2) * h) - torch.cos((j - 1) * h)) / h  # of sin, on [(j - 2) h, (j - 1) h]
        a, b, c, d, e = (averages[k : k + N] for k in range(5))
        errors.append(float((_weno(a, b, c, d, e) - torch.sin((j[:N] + 1) * h)).abs().max()))
    assert errors[0] / errors[1] > 25
    step = torch.cat([torch.ones(10, dtype=F64), torch.zeros(10, dtype=F64)])
    a, b, c, d, e = (step[k : k + 16] for k in range(5))
    values = _weno(a, b, c, d, e)
    assert float(values.max()) < 1 + 1e-6
    assert float(values.min()) > -1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block": BallBump(1)}, ValueError, "k = 3"),
        ({"X": X.expand(4, 2), "v": torch.ones(2, dtype=F64)}, ValueError, r"X has shape \(4, 2\); \(n, 1\)"),
        ({"X": X.float()}, TypeError, "X has dtype torch.float32"),
        ({"cells": 4}, ValueError, "cells"),
        ({"cfl": 2.0}, ValueError, "cfl"),
        ({"support": (1.0, -1.0)}, ValueError, "two increasing numbers"),
        ({"support": [1.0]}, ValueError, "support has 1 entries; 2 are needed"),
        ({"y": 1e200 * Y}, ValueError, "X, y or v are too large"),
        ({"times": []}, ValueError, "times"),
        ({"support": (-1.0, 1.0)}, ValueError, "widen it"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    good = {"block": GaussBump(1.0), "X": X, "y": Y, "v": ONE, "density": GaussBump.density}
    good |= {"support": (-4.5, 4.5), "cells": 20, "times": [0.1]}
    with pytest.raises(error, match=words):
        fv_flow(**(good | change))
