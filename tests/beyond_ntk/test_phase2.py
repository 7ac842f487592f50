"""The methods of phase 2 against slow loops, against torch, and what they refuse."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from making import phase2_problem as problem
from making import seeded

from companion import descent
from companion.beyond_ntk import bounds as rb
from companion.beyond_ntk import last_layer as ll
from companion.beyond_ntk import phase2


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("centred", [True, False])
def test_gd_is_the_slow_loop(loss, centred):
    M, V0, Y = problem(loss=loss)
    run = phase2.phase2_gd(M, V0, Y, loss=loss, steps=7, centred=centred)
    frame = ll.centre(M)
    A, V = (frame.features(M), frame.to(V0)) if centred else (M, V0.clone())
    losses = []
    for t in range(8):
        losses.append(ll.average_loss(A, V, Y, loss))
        if t < 7:
            V = V - run.step * A.T @ ll.slope(A @ V, Y, loss) / len(M)
    torch.testing.assert_close(run.losses, torch.stack(losses))
    torch.testing.assert_close(run.V, frame.back(V) if centred else V)
    assert run.covered


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_nesterov_is_the_slow_loop(loss):
    M, V0, Y = problem(loss=loss)
    run = phase2.phase2_nesterov(M, V0, Y, loss=loss, steps=9, centred=False)
    V, y, a = V0.clone(), V0.clone(), 1.0
    for _ in range(9):
        new = y - run.step * M.T @ ll.slope(M @ y, Y, loss) / len(M)
        after = (1 + math.sqrt(1 + 4 * a * a)) / 2
        y = new + (a - 1) / after * (new - V)
        V, a = new, after
    torch.testing.assert_close(run.V, V)
    torch.testing.assert_close(run.losses[-1], ll.average_loss(M, V, Y, loss))


def test_batched_descent_is_one_run_each():
    M, V0, Y = problem()
    M2 = torch.stack([M, problem(seed=5)[0]])
    both = phase2.phase2_nesterov(M2, torch.stack([V0, V0]), Y, steps=20)
    for s in range(2):
        one = phase2.phase2_nesterov(M2[s], V0, Y, steps=20)
        torch.testing.assert_close(both.V[s], one.V)
        torch.testing.assert_close(both.losses[:, s], one.losses)
        assert one.step == pytest.approx(float(both.step[s]))


@pytest.mark.parametrize("shape", [(10, 25), (25, 8)])
def test_least_squares_is_the_nearest_solution(shape):
    M, V0, Y = problem(*shape)
    run = phase2.phase2_least_squares(M, V0, Y)
    torch.testing.assert_close(run.V, V0 + torch.linalg.pinv(M) @ (Y - M @ V0), rtol=1e-8, atol=1e-9)
    if shape[0] <= shape[1]:
        assert float(run.losses[-1]) < 1e-27
    assert not run.covered


def test_least_squares_warns_where_the_rank_is_nearly_lost():
    M, V0, Y = problem(10, 25)
    M[1] = M[0]
    M[1, 0] += 1e-12
    with pytest.warns(UserWarning, match="sigma_1 / sigma_min"):
        phase2.phase2_least_squares(M, V0, Y)


def test_least_squares_survives_equal_rows():
    M, V0, Y = problem(10, 25)
    M[1] = M[0]
    with pytest.warns(UserWarning, match="sigma_1 / sigma_min"):
        run = phase2.phase2_least_squares(M, V0, Y)
    groups = torch.unique(M, dim=0, return_inverse=True)[1]
    assert float(run.losses[-1]) == pytest.approx(rb.duplicate_floor(groups, Y), rel=1e-9)


def test_lbfgs_finds_the_ridge_minimum():
    M, V0, Y = problem(loss="cross_entropy")
    for centred in (True, False):
        run = phase2.phase2_lbfgs(M, V0, Y, loss="cross_entropy", ridge=1e-2, steps=300, centred=centred)
        assert rb.ridge_gap(M, run.V, Y, 1e-2).gradient < 1e-14
    M, V0, Y = problem()
    ridge = 0.1
    found = phase2.phase2_lbfgs(M, V0, Y, ridge=ridge, steps=300).V
    p = M.shape[1]
    exact = torch.linalg.solve(M.T @ M / len(M) + ridge * torch.eye(p, dtype=M.dtype), M.T @ Y / len(M))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


def test_momentum_is_torchs_own():
    M, V0, Y = problem(16, 5)
    run = phase2.phase2_momentum_sgd(M, V0, Y, step=0.01, momentum=0.8, batch=5, epochs=3, generator=seeded(3))
    seed = int(torch.randint(2**62, (), generator=seeded(3)))
    V = torch.nn.Parameter(V0.clone())
    rule = torch.optim.SGD([V], lr=0.01, momentum=0.8)
    for k in range(3):
        for part in torch.randperm(16, generator=torch.Generator().manual_seed(seed + k)).split(5):
            rule.zero_grad()
            (0.5 * (M[part] @ V - Y[part]).square().sum(1).mean()).backward()
            rule.step()
    torch.testing.assert_close(run.V, V.detach())
    assert len(run.losses) == 4


def test_single_samples_follow_kaczmarz():
    M, V0, Y = problem(6, 9)
    run = phase2.single_sample_sgd(M, V0, Y, steps=5, S=2, generator=seeded(4))
    seed = int(torch.randint(2**62, (), generator=seeded(4)))
    V, total, eta = V0.clone(), torch.zeros_like(V0), 1 / float(M.square().sum(1).max())
    for k in range(5):
        total += V
        i = int(torch.randint(6, (2,), generator=torch.Generator().manual_seed(seed + k))[1])
        V = V - eta * torch.outer(M[i], M[i] @ V - Y[i])
    torch.testing.assert_close(run.V[1], V)
    torch.testing.assert_close(run.average[1], total / 5)


def test_descent_resumes_to_the_same_bits(tmp_path):
    M, V0, Y = problem()
    whole = phase2.phase2_nesterov(M, V0, Y, steps=40)
    path = tmp_path / "phase2.safetensors"

    class Stop(Exception):
        pass

    calls = []

    def killed(q, Y, loss="squared"):
        calls.append(1)
        if len(calls) > 25:
            raise Stop
        return ll_pointwise(q, Y, loss)

    ll_pointwise = phase2.pointwise

    old = descent._CHECKPOINT_SECONDS, descent._BLOCK_SECONDS
    descent._CHECKPOINT_SECONDS = descent._BLOCK_SECONDS = 0.0
    phase2.pointwise = killed
    try:
        with pytest.raises(Stop):
            phase2.phase2_nesterov(M, V0, Y, steps=40, checkpoint=path)
    finally:
        phase2.pointwise = ll_pointwise
        descent._CHECKPOINT_SECONDS, descent._BLOCK_SECONDS = old
    assert path.exists()
    again = phase2.phase2_nesterov(M, V0, Y, steps=40, checkpoint=path)
    assert torch.equal(again.V, whole.V)
    assert torch.equal(again.losses, whole.losses)


def test_steps_beyond_the_theorem():
    M, V0, Y = problem()
    L_H = float(ll.curvature(M))
    with pytest.warns(UserWarning, match="not covered"):
        run = phase2.phase2_gd(M, V0, Y, step=1.5 / L_H, steps=3, centred=False)
    assert not run.covered
    with pytest.raises(ValueError, match="squared loss diverges above 2 / L_H"):
        phase2.phase2_gd(M, V0, Y, step=2.2 / L_H, steps=3, centred=False)
    M, V0, Y = problem(loss="cross_entropy")
    with pytest.warns(UserWarning, match="not covered"):  # cross-entropy may still descend: no error
        phase2.phase2_gd(M, V0, Y, loss="cross_entropy", step=8 / L_H, steps=3, centred=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phase2.phase2_gd(M, V0, Y, loss="cross_entropy", step=1 / L_H, steps=3, centred=False)


def bad(M=None, V=None, Y=None, loss="squared", **rest):
    M0, V0, Y0 = problem(loss="squared" if loss not in ll.LAMBDA else loss)
    return phase2.phase2_gd(
        M0 if M is None else M, V0 if V is None else V, Y0 if Y is None else Y, loss=loss, **({"steps": 1} | rest)
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bad(loss="hinge"), ValueError, "loss is 'hinge'"),
        (lambda: bad(M=torch.full((12, 21), math.nan, dtype=torch.float64)), ValueError, "M\\[0, 0\\] is nan"),
        (lambda: bad(M=torch.ones(12, 21, dtype=torch.int64)), TypeError, "M has dtype"),
        (lambda: bad(M=torch.ones(0, 21, dtype=torch.float64)), ValueError, "M has shape"),
        (lambda: bad(M=torch.ones(12, 20, dtype=torch.float64)), ValueError, "p = 20, as in M, is needed"),
        (lambda: bad(Y=torch.ones(11, 3, dtype=torch.float64)), ValueError, r"\(N, K\) with N = 12 is needed"),
        (lambda: bad(Y=torch.ones(12, 2, dtype=torch.float64)), ValueError, "Y has 2 columns"),
        (lambda: bad(Y=torch.zeros(12, dtype=torch.int64), loss="cross_entropy"), ValueError, "one class only"),
        (lambda: bad(Y=torch.arange(12), loss="cross_entropy"), ValueError, "labels 0 to 11"),
        (lambda: bad(Y=torch.zeros(12), loss="cross_entropy"), TypeError, "integer labels"),
        (lambda: bad(step=-1.0), ValueError, "step is -1.0"),
        (lambda: bad(M=problem()[0][:, 1:] * 2, V=torch.ones(20, 3).double()), ValueError, "no constant last column"),
        (lambda: phase2.phase2_lbfgs(*problem(), ridge=-1.0), ValueError, "ridge is -1.0"),
        (lambda: ll.curvature(problem()[0], "hinge"), ValueError, "loss is 'hinge'"),
        (
            lambda: phase2.phase2_momentum_sgd(*problem(), step=0.1, momentum=1.0, generator=seeded()),
            ValueError,
            "step, momentum, batch",
        ),
        (lambda: phase2.single_sample_sgd(*problem(), step=0.0, generator=seeded()), ValueError, "step is 0.0"),
    ],
)
def test_bad_input_is_named(call, error, words, unchecked):
    with pytest.raises(error, match=words):
        call()


def test_losses_beyond_the_floats_are_named(unchecked):
    M, V0, Y = problem()
    with pytest.raises(ValueError, match="the loss at V0 overflows"):
        phase2.phase2_lbfgs(M, V0 * 1e300, Y)
    with pytest.raises(ValueError, match="M has 3 axes and V0 has 2"):
        phase2.phase2_gd(M[None], V0, Y)
    with pytest.raises(ValueError, match="S is 0"):
        phase2.single_sample_sgd(M, V0, Y, S=0, generator=seeded())


def test_how_surely_a_step_is_covered():
    M, V0, Y = problem()
    L_H = float(ll.curvature(M))
    for step, expected in ((None, "certified"), (0.5 / L_H, "certified"), (1 / L_H * (1 + 1e-8), "measured")):
        assert phase2.phase2_gd(M, V0, Y, step=step, steps=1, centred=False).covered == expected
    single = phase2.phase2_gd(M.float(), V0.float(), Y.float(), steps=1)
    assert single.covered == "measured"
    for centred in (True, False):  # the step of a certified run is below 1 / L_H in exact arithmetic
        run = phase2.phase2_gd(M, V0, Y, steps=1, centred=centred)
        A = ll.centre(M).features(M) if centred else M
        exact = [[Fraction(x) for x in row] for row in A.tolist()]
        x = [Fraction(v) for v in torch.linalg.svd(A)[2][0].tolist()]
        Ax = [sum(a * b for a, b in zip(row, x, strict=True)) for row in exact]
        assert Fraction(run.step) * sum(v * v for v in Ax) <= len(M) * sum(v * v for v in x)
