"""The trainer against a plain loop with autograd, and long runs killed, interrupted and resumed."""

import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import data, descent, networks

ROOT = Path(__file__).resolve().parents[2]


def problem(widths=(5, 7, 6, 2), S=3, N=9, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    X = data.sphere(N, widths[0], generator)
    Y = torch.randn(N, widths[-1], generator=generator, dtype=torch.float64)
    return networks.init_mlp(widths, S=S, generator=seed + 1, **options), X, Y


def by_autograd(weights, X, Y, step, steps, activation):
    """The slow, obvious twin: one loss, one backward, one subtraction."""
    weights = [W.clone() for W in weights]
    step = torch.as_tensor(step, dtype=X.dtype).reshape(-1, 1, 1)
    residuals = []
    for k in range(steps + 1):
        leaves = [W.clone().requires_grad_() for W in weights]
        R = networks.forward(leaves, X, activation) - Y
        residuals.append(R.detach().flatten(1).norm(dim=1))
        grads = torch.autograd.grad(0.5 * R.square().sum(), leaves)
        if k < steps:
            weights = [W - step * g for W, g in zip(weights, grads, strict=True)]
    return weights, torch.stack(residuals)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.weights, b.weights, strict=True)) and (
        torch.equal(a.residual, b.residual)
        and a.observed.keys() == b.observed.keys()
        and all(torch.equal(a.observed[name], b.observed[name]) for name in a.observed)
    )


def size_of_first(state):
    return state.weights[0].flatten(1).norm(dim=1)


OBSERVE = {"size": size_of_first}
CUBE = networks.Activation("cube", lambda z: z**3, lambda z: 3 * z**2)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", ["relu", "tanh", "softplus", "sigmoid", "sin", "exp", "identity", CUBE])
def test_train_against_autograd(name, chunk):
    weights, X, Y = problem()
    before = [W.clone() for W in weights]
    step = torch.tensor([1e-3, 2e-3, 3e-3], dtype=torch.float64)
    run = descent.train(weights, X, Y, step, 10, activation=name, chunk=chunk, every=4)
    expected, residuals = by_autograd(weights, X, Y, step, 10, name)
    for W, E in zip(run.weights, expected, strict=True):
        assert torch.allclose(W, E, rtol=1e-12, atol=1e-13)
    assert run.steps.tolist() == [0, 4, 8, 10]
    assert torch.allclose(run.residual, residuals[run.steps], rtol=1e-12)
    assert torch.allclose(run.loss, 0.5 * residuals[run.steps] ** 2, rtol=1e-12)
    assert all(torch.equal(W, B) for W, B in zip(weights, before, strict=True))


def test_step_activation_only_moves_the_last_layer():
    weights, X, Y = problem()
    run = descent.train(weights, X, Y, 1e-2, 20, activation="step")
    assert torch.equal(run.weights[0], weights[0])
    assert torch.equal(run.weights[1], weights[1])
    assert (run.residual[-1] < run.residual[0]).all()


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 7),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_any_shape_chunk_and_schedule(seed, widths, S, N, steps, every, chunk):
    weights, X, Y = problem(tuple(widths), S, N, seed)
    run = descent.train(weights, X, Y, 1e-3, steps, every=every, chunk=chunk, observe=OBSERVE)
    expected, residuals = by_autograd(weights, X, Y, 1e-3, steps, "relu")
    assert run.steps.tolist() == sorted({*range(0, steps + 1, every), steps})
    assert torch.allclose(run.residual, residuals[run.steps], rtol=1e-11, atol=1e-13)
    assert torch.allclose(run.observed["size"][-1], expected[0].flatten(1).norm(dim=1), rtol=1e-12)
    assert torch.allclose(run.observed["size"][0], weights[0].flatten(1).norm(dim=1))


def test_a_member_does_as_it_would_alone():
    weights, X, Y = problem(S=4)
    together = descent.train(weights, X, Y, 1e-2, 50)
    for s in range(4):
        alone = descent.train([W[s] for W in weights], X, Y, 1e-2, 50)
        assert alone.weights[0].shape == (1, 5, 7)
        for W, V in zip(together.weights, alone.weights, strict=True):
            assert torch.allclose(W[s], V[0], rtol=1e-10, atol=1e-12)
        assert torch.allclose(together.residual[:, s], alone.residual[:, 0], rtol=1e-10)


def test_float32_follows_float64():
    weights, X, Y = problem((8, 64, 1), S=2)
    double = descent.train(weights, X, Y, 1e-2, 30)
    single = descent.train([W.float() for W in weights], X.float(), Y.float(), 1e-2, 30)
    assert single.residual.dtype == torch.float32
    assert torch.allclose(single.residual.double(), double.residual, rtol=1e-4)
    gap = (single.weights[0].double() - double.weights[0]).norm() / double.weights[0].norm()
    assert gap < 1e-4


def test_wide_last_layer_regression_reaches_zero():
    """With one layer this is linear least squares: R_k = (I - eta X X^T)^k R_0."""
    weights, X, Y = problem((12, 2), S=1, N=5)
    eta = 0.5
    run = descent.train(weights, X, Y, eta, 40)
    M = torch.eye(5, dtype=torch.float64) - eta * X @ X.T
    R0 = X @ weights[0][0] - Y
    expected = torch.stack([torch.linalg.matrix_power(M, k) @ R0 for k in range(41)]).flatten(1).norm(dim=1)
    assert torch.allclose(run.residual[:, 0], expected, rtol=1e-10)


def test_hidden_ascent_and_random_moves():
    weights, X, Y = problem((5, 20, 1), S=3)
    eta, seen = 1e-3, []

    def ascent(state, R, gradients):
        return [*(-g for g in gradients[:-1]), gradients[-1]]

    def random_moves(state, R, gradients):
        seen.append((state.step, state.members))
        moves = []
        for member in range(*state.members.indices(3)):
            generator = torch.Generator().manual_seed(1000 * state.step + member)
            G = torch.randn(5, 20, generator=generator, dtype=torch.float64)
            moves.append(G / G.norm() * R[member - state.members.start].norm())
        return [torch.stack(moves), gradients[-1]]

    descent_first = descent.train(weights, X, Y, eta, 1)
    ascent_first = descent.train(weights, X, Y, eta, 1, update=ascent)
    assert torch.allclose(ascent_first.weights[0] - weights[0], weights[0] - descent_first.weights[0], atol=1e-15)
    assert torch.allclose(ascent_first.weights[1], descent_first.weights[1], atol=1e-15)
    run = descent.train(weights, X, Y, eta, 1, update=random_moves, chunk=2)
    assert torch.allclose((run.weights[0] - weights[0]).flatten(1).norm(dim=1), eta * run.residual[0])
    assert seen == [(0, slice(0, 2)), (0, slice(2, 3))]
    whole = descent.train(weights, X, Y, eta, 1, update=random_moves, chunk=3)
    assert torch.allclose(run.weights[0], whole.weights[0], atol=1e-15)
    with pytest.raises(ValueError, match="update returned shapes"):
        descent.train(weights, X, Y, eta, 1, update=lambda state, R, gradients: gradients[:1])


def test_divergence_names_step_and_member_and_keeps_the_run():
    weights, X, Y = problem(S=3)
    step = torch.tensor([1e-3, 1e3, 1e-3], dtype=torch.float64)
    with pytest.raises(descent.Diverged, match="network 1 is not finite at step") as caught:
        descent.train(weights, X, Y, step, 400, every=3, observe=OBSERVE, activation="identity")
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.members == [1]
    kept = descent.train(weights, X, Y, step, 400, on_divergence="keep", activation="identity")
    first_bad = int((~torch.isfinite(kept.residual[:, 1])).nonzero()[0])
    assert error.step == first_bad >= 3
    assert error.run.steps.tolist() == list(range(0, first_bad, 3))
    assert torch.isfinite(error.run.residual).all()
    assert torch.equal(error.run.residual, kept.residual[error.run.steps])
    assert error.run.observed["size"].shape == error.run.residual.shape
    good = descent.train(weights, X, Y, 1e-3, 400, activation="identity")
    assert torch.allclose(kept.residual[:, [0, 2]], good.residual[:, [0, 2]])


def test_default_chunk_bounds_the_workspace():
    X = torch.zeros(200, 64)
    shapes = [(16, 64, 2048), (16, 2048, 128), (16, 128, 10)]
    for tensor in (X, X.double()):
        chunk = descent.default_chunk(shapes, tensor)
        per_network = 200 * (2 * 2048 + 2 * 128 + 10) * tensor.element_size()
        assert chunk == max(1, 4 * 2**20 // per_network) == 1
        few = tensor[:10]
        assert descent.default_chunk(shapes, few, keep_gradients=True) < descent.default_chunk(shapes, few) <= 16
    assert descent.default_chunk([(7, 3, 4), (7, 4, 1)], X) == 7
    assert descent.default_chunk([(2, 3, 10**6), (2, 10**6, 1)], X) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 0.0}, ValueError, r"step is 0.0; positive finite"),
        ({"step": -1e-3}, ValueError, "step is -0.001"),
        ({"step": float("nan")}, ValueError, "step is nan"),
        ({"step": float("inf")}, ValueError, "step is inf"),
        ({"step": "fast"}, TypeError, "step is .fast.; a number or a torch tensor is needed"),
        ({"step": torch.tensor([1e-3, 1e-3])}, ValueError, r"step has shape \(2,\); a number or \(3,\)"),
        ({"step": torch.tensor([1e-3, 0.0, 1e-3])}, ValueError, "positive finite"),
        ({"steps": -1}, ValueError, "steps is -1; an integer >= 0"),
        ({"steps": 1.5}, TypeError, "steps is 1.5; a whole number is needed"),
        ({"every": 0}, ValueError, "every is 0"),
        ({"chunk": 0}, ValueError, "chunk is 0"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every is 0"),
        ({"on_divergence": "ignore"}, ValueError, "on_divergence is 'ignore'"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"weights": []}, ValueError, "weights is empty"),
        ({"weights": [torch.ones(3, 4, 1, dtype=torch.float64)]}, ValueError, "W_1 takes 4 inputs but X has 5"),
        ({"weights": [torch.ones(3, 5, 1, dtype=torch.float64)]}, ValueError, "Y has 2 columns"),
        ({"weights": [torch.ones(3, 5, 2)]}, ValueError, "W_1 is torch.float32 on cpu, X is torch.float64"),
        ({"weights": [torch.ones(3, 5, 2, dtype=torch.float16)]}, TypeError, "W_1 is torch.float16"),
        ({"Y": torch.ones(9, dtype=torch.float64)}, ValueError, r"Y has shape \(9,\)"),
        ({"X": torch.ones(9, 5, dtype=torch.int64)}, TypeError, "X has dtype torch.int64"),
        ({"X": torch.full((9, 5), float("nan"), dtype=torch.float64)}, ValueError, r"X\[0, 0\] is nan"),
        ({"observe": {"loss": lambda state: 1.0}}, TypeError, "observable 'loss' returned float"),
    ],
)
def test_bad_input(unchecked, change, error, message):
    weights, X, Y = problem()
    arguments = {"weights": weights, "X": X, "Y": Y, "step": 1e-3, "steps": 5} | change
    with pytest.raises(error, match=message):
        descent.train(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_agrees_with_the_cpu(dtype):
    weights, X, Y = problem((8, 64, 32, 2), S=4)
    weights, X, Y = [W.to(dtype) for W in weights], X.to(dtype), Y.to(dtype)
    here = descent.train(weights, X, Y, 1e-2, 100, every=10, observe=OBSERVE)
    there = descent.train([W.cuda() for W in weights], X.cuda(), Y.cuda(), 1e-2, 100, every=10, observe=OBSERVE)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    assert there.residual.is_cuda
    assert torch.allclose(there.residual.cpu(), here.residual, rtol=tolerance)
    assert torch.allclose(there.observed["size"].cpu(), here.observed["size"], rtol=tolerance)


def newton_root(params, k, move):
    """x <- x - (x^2 - a)/(2x): another loss, another parameter, its own state."""
    x, a = params
    value = (x * x - a).abs()
    if move:
        x.sub_((x * x - a) / (2 * x))
    return value


def test_iterate_runs_any_step_function():
    a = torch.tensor([2.0, 3.0, 10.0], dtype=torch.float64)
    x = torch.ones_like(a)
    run = descent.iterate([x, a], newton_root, 8, observe={"x": lambda state: state.weights[0]})
    assert torch.allclose(run.weights[0], a.sqrt(), rtol=1e-15)
    assert run.observed["x"].shape == (9, 3)
    assert torch.equal(run.observed["x"][0], torch.ones_like(a))
    assert torch.equal(x, torch.ones_like(a))
    assert torch.equal(run.residual[0], (1 - a).abs())
    with pytest.raises(ValueError, match="params is empty"):
        descent.iterate([], newton_root, 8)


def test_iterate_survives_more_steps_than_a_block_holds():
    def count(params, k, move):
        params[0].add_(float(move))
        return params[0] - float(move)

    run = descent.iterate([torch.zeros(2)], count, 3000, every=7)
    assert run.weights[0].tolist() == [3000, 3000]
    assert torch.equal(run.residual[:, 0], run.steps.float())


class Stop(Exception):
    """What interrupts the run of the next test."""


STOP = {"at": None}  # not enclosed by the observable, which is the same with it and without


def stopping(state):
    if STOP["at"] is not None and state.step >= STOP["at"]:
        raise Stop
    return size_of_first(state)


@pytest.mark.parametrize("every", [1, 7])
def test_resume_after_any_stop_gives_the_same_bits(tmp_path, every):
    weights, X, Y = problem()
    arguments = (weights, X, Y, 1e-2, 60)
    observe = {"size": stopping}
    whole = descent.train(*arguments, every=every, observe=observe)
    for stop in (3, 10, 31, 59, 60):
        path = tmp_path / f"{stop}.safetensors"
        options = {"every": every, "checkpoint": path, "checkpoint_every": 10, "observe": observe}
        STOP["at"] = stop
        with pytest.raises(Stop):
            descent.train(*arguments, **options)
        STOP["at"] = None
        assert path.exists() == (stop >= 10)
        assert same_bits(descent.train(*arguments, **options), whole)
        assert same_bits(descent.train(*arguments, **options), whole)  # a finished run is just loaded
        assert not list(tmp_path.glob("*.tmp"))
        other = {"size": lambda state: 2 * size_of_first(state)}
        with pytest.raises(ValueError, match="another observables"):
            descent.train(*arguments, **{**options, "observe": other})


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    weights, X, Y = problem()
    path = tmp_path / "runs" / "a.safetensors"
    descent.train(weights, X, Y, 1e-2, 5, checkpoint=path)
    with pytest.raises(ValueError, match="of a run with another step; delete it"):
        descent.train(weights, X, Y, 2e-2, 5, checkpoint=path)
    with pytest.raises(ValueError, match="another X, Y, chunk, steps"):
        descent.train(weights, X + 1, -Y, 1e-2, 6, checkpoint=path, chunk=1)
    with pytest.raises(ValueError, match="another initial parameters"):
        descent.train([2 * W for W in weights], X, Y, 1e-2, 5, checkpoint=path)
    with pytest.raises(ValueError, match="another observables"):
        descent.train(weights, X, Y, 1e-2, 5, checkpoint=path, observe=OBSERVE)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        descent.train(weights, X, Y, 1e-2, 5, checkpoint=path)
    descent.train(weights, X, Y, 1e-2, 5, checkpoint=tmp_path)
    assert (tmp_path / "run.safetensors").exists()


def test_interrupt_leaves_a_checkpoint(tmp_path):
    weights, X, Y = problem()
    whole = descent.train(weights, X, Y, 1e-2, 60)
    handler = signal.getsignal(signal.SIGINT)

    def update(state, R, gradients):
        if state.step == 23 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        return gradients

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        descent.train(weights, X, Y, 1e-2, 60, update=update, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert path.exists()
    run = descent.train(weights, X, Y, 1e-2, 60, update=update, checkpoint=path)
    assert torch.allclose(run.residual, whole.residual, rtol=1e-12)
    assert same_bits(run, descent.train(weights, X, Y, 1e-2, 60, update=update))


KILLED = """
    import os, random, signal, sys, time
    import torch
    from companion import data, descent, networks

    torch.set_num_threads(1)
    folder, seed = sys.argv[1], 3
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    X, Y = data.sphere(20, 6, generator), data.signs(20, generator)
    weights = networks.init_mlp((6, 40, 1), S=5, generator=seed)
    path = os.path.join(folder, "run.safetensors")

    def train(**options):
        observe = {"W": lambda state: state.weights[1]}
        return descent.train(weights, X, Y, 1e-3, 3000, every=50, chunk=2, observe=observe, **options)

    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            train(checkpoint=path, checkpoint_every=10)  # so often that many kills fall into a write
            os._exit(0)
        time.sleep(random.uniform(0.02, 0.12) * (1 + kills / 10))  # also a slow machine gets through
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
    resumed, whole = train(checkpoint=path, checkpoint_every=10), train()
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights, whole.weights))
    assert torch.equal(resumed.residual, whole.residual)
    assert torch.equal(resumed.observed["W"], whole.observed["W"])
    print(kills)
"""


def test_killed_again_and_again_gives_the_same_bits(tmp_path):
    """SIGKILL at random moments, a write of the checkpoint included, until the run is through."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5


def test_progress_is_silent_by_default_and_shown_on_request(capsys, monkeypatch):
    weights, X, Y = problem()
    descent.train(weights, X, Y, 1e-2, 20)
    assert capsys.readouterr() == ("", "")
    descent.train(weights, X, Y, 1e-2, 20, progress=True)
    out, err = capsys.readouterr()
    assert "/20 [" in out
    assert err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    descent.train(weights, X, Y, 1e-2, 20)
    assert "step" in terminal.getvalue()
    before = terminal.getvalue()
    descent.train(weights, X, Y, 1e-2, 20, progress=False)
    assert terminal.getvalue() == before


def test_no_global_state_is_changed():
    weights, X, Y = problem()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    descent.train(weights, X, Y, 1e-2, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_single_network_with_a_checkpoint(tmp_path):
    """One step size expands to a view with stride 0, whose bytes the checkpoint must still be able to hash."""
    X, Y = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    weights = [torch.ones(1, 2, 3, dtype=torch.float64), torch.zeros(1, 3, 1, dtype=torch.float64)]
    run = descent.train(weights, X, Y, 0.1, 4, checkpoint=tmp_path / "run")
    again = descent.train(weights, X, Y, 0.1, 4, checkpoint=tmp_path / "run")
    assert torch.equal(run.weights[0], again.weights[0])
