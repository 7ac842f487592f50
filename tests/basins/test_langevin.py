"""Exit times: equation, walkers, asymptotic law."""

import math

import pytest
import torch
from making import e1_at

from companion import basins
from companion.basins import langevin, shallow

F64 = torch.float64


@pytest.mark.parametrize(("T", "tau"), [(0.4, 8.730), (0.25, 32.678), (0.2, 82.542), (0.15, 408.788)])
def test_the_pde_gives_the_known_exit_times(T, tau):
    """By another scheme: Scharfetter-Gummel on the nodes of a grid of 1/240, a sparse solver."""
    assert basins.exit_time_of_e1(T) == pytest.approx(tau, rel=0.005)


def test_the_pde_solver_solves_its_equations():
    """One cell's balance on a coarse grid, and a strip against the closed form in one dimension."""
    loss = lambda x, y: 0.5 * x**2 + y**2 + 0.3 * x * y  # noqa: E731
    coarse = langevin.mean_exit_time(loss, 0.7, (0.5, 2.0, -1.0, 1.5), 0.4, per_unit=6)
    free = loss(coarse.x[None], coarse.y[:, None]) > 0.4
    h = float(coarse.x[1] - coarse.x[0])
    u, n_x = coarse.u, len(coarse.x)
    j, i = (int(t) for t in free.nonzero()[len(free.nonzero()) // 2])
    flow = 0.0
    for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        if 0 <= j + a < len(coarse.y) and 0 <= i + b < n_x:
            middle = loss(coarse.x[i] + b * h / 2, coarse.y[j] + a * float(coarse.y[1] - coarse.y[0]) / 2)
            step = h if b else float(coarse.y[1] - coarse.y[0])
            rate = 0.7 / step**2 * math.exp((float(loss(coarse.x[i], coarse.y[j])) - float(middle)) / 0.7)
            flow += rate * float(u[j + a, i + b] - u[j, i])
    assert flow == pytest.approx(-1, abs=1e-9)
    # no force, target x <= 0 at the left end, wall at x = 1: u = (x - x^2 / 2) / T
    strip = langevin.mean_exit_time(lambda x, y: torch.where(x > 0, 1.0, 0.0).double(), 1e3, (-0.1, 1.0, 0.0, 0.1), 0.5,
                                    per_unit=100)  # fmt: skip
    assert strip.at(1.0, 0.05) == pytest.approx(0.5 / 1e3, rel=0.03)


def test_eyring_kramers_for_e1():
    at_min = shallow.loss_derivatives(*e1_at(), "sin").hessian[0]
    saddle = shallow.loss_derivatives(*e1_at(math.asin(math.sqrt(7 / 8)), 0.0), "sin").hessian[0]
    tau = basins.eyring_kramers(at_min, saddle, 1.0, 0.2, 2)
    assert math.isinf(basins.eyring_kramers(at_min, saddle, 1.0, 1e-3, 2))
    lowest = (35 / 32 - math.sqrt((35 / 32) ** 2 + 4 * 98)) / 2
    assert tau / math.exp(5) == pytest.approx(math.pi / abs(lowest) * math.sqrt(98 / 48), rel=1e-9)
    ratio = [basins.exit_time_of_e1(T) / basins.eyring_kramers(at_min, saddle, 1.0, T, 2) - 1 for T in (0.4, 0.2)]
    assert 0 < ratio[1] < ratio[0] / 2  # the law is approached, linearly in T


def test_walkers_agree_with_the_pde_at_width_one():
    (W, V), X, Y = e1_at()
    start = [W.expand(400, 1, 1), V.expand(400, 1, 1)]
    times = basins.exit_times(start, X, Y, "sin", 0.4, level=4.5, generator=torch.Generator().manual_seed(0))
    assert float(times.mean()) == pytest.approx(basins.exit_time_of_e1(0.4), rel=0.15)


def test_walkers_leave_fast_at_width_two():
    g = torch.Generator().manual_seed(1)
    v = -torch.log(torch.rand(400, 2, generator=g, dtype=F64))  # uniform shares
    v = (v / v.sum(1, keepdim=True))[..., None]
    W = torch.full((400, 1, 2), math.pi / 2, dtype=F64)
    _, X, Y = e1_at()
    times = basins.exit_times([W, v], X, Y, "sin", 0.2, level=4.5, generator=g)
    assert float(times.mean()) == pytest.approx(1.313, abs=0.2)  # 1.313 +- 0.02 by another program, steps of 0.002


def test_a_walker_that_stays_has_no_exit_time_and_noise_does_not_depend_on_the_others():
    (W, V), X, Y = e1_at()
    two = [W.expand(2, 1, 1), V.expand(2, 1, 1)]
    T = torch.tensor([1e-6, 2.0], dtype=F64)
    times = basins.exit_times(two, X, Y, "sin", T, level=4.5, generator=torch.Generator().manual_seed(0),
                                       longest=30.0)  # fmt: skip
    assert math.isinf(float(times[0]))
    swapped = basins.exit_times(two, X, Y, "sin", torch.tensor([2.0, 2.0]).double(), level=4.5,
                                         generator=torch.Generator().manual_seed(0), longest=30.0)  # fmt: skip
    assert float(swapped[1]) == float(times[1])
