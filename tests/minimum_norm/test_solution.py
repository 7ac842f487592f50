"""Lesson 4's theorems on networks small enough to check everything: pinv, rationals, long runs, bad input."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from making import layer_jacobian, sphere_example, wide_layer

from companion import data, descent
from companion import minimum_norm as mn
from companion.minimum_norm import first_layer

# --- the minimum-norm solution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("antisymmetric", [True, False])
def test_solve_is_the_pseudoinverse_and_split_is_the_projection(antisymmetric):
    X, y = sphere_example()
    W0, signs = mn.initialize(10, 50, S=2, antisymmetric=antisymmetric)
    sol = mn.solve(X, y, W0, signs)
    W = W0 + torch.randn(W0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parallel, perp = sol.split(W)
    for s in range(2):
        J = layer_jacobian(X, W0[s], signs[s])
        f0 = (torch.relu(X @ W0[s]) @ signs[s]) / math.sqrt(50)
        inverse = torch.linalg.pinv(J)
        move = inverse @ (y - f0)
        torch.testing.assert_close((sol.W - W0)[s].reshape(-1), move, atol=1e-10, rtol=0)
        assert float(sol.norm2[s]) == pytest.approx(float(move @ move), rel=1e-10)
        v = (W - sol.W)[s].reshape(-1)
        assert float(parallel[s]) == pytest.approx(float((inverse @ J @ v).square().sum()), rel=1e-10)
        assert float(parallel[s] + perp[s]) == pytest.approx(float(v @ v), rel=1e-10)
    torch.testing.assert_close(sol.predict(X), y.expand(2, -1), atol=1e-10, rtol=0)


def test_linear_descent_stays_in_the_row_space_and_ends_at_the_solution():
    X, y = sphere_example()
    W0, signs = mn.initialize(10, 512)
    sol, step = mn.solve(X, y, W0, signs), mn.safe_step(X)
    J = layer_jacobian(X, W0[0], signs[0])
    values, U = torch.linalg.eigh(J @ J.T)
    for k in (1, 10, 1000, 20_000):  # w_k = w_0 + J_0^T sum_{l<k} eta (I - eta G_0)^l e_0, with f_0 = 0
        moved = U @ ((U.T @ y) * (1 - (1 - step * values) ** k) / values)
        parallel, perp = sol.split(W0 + (J.T @ moved).reshape(W0.shape))
        assert float(perp) < 1e-18
        residual = U @ ((U.T @ y) * (1 - step * values) ** k)
        assert float(parallel) == pytest.approx(
            float(residual @ torch.linalg.solve(J @ J.T, residual)), rel=1e-9, abs=1e-18
        )


# --- the Lyapunov identity --------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), eta=st.floats(1e-3, 3.0), move=st.floats(0, 3), kinks=st.integers(0, 6))
def test_the_lyapunov_identity_and_its_inequalities(seed, eta, move, kinks):
    X, y, W0, signs = wide_layer(seed, m=24, antisymmetric=bool(seed % 2), kinks=kinks, S=2)
    assume(float(torch.linalg.eigvalsh(first_layer.empirical_gram(X, W0))[:, 0].min()) > 1e-3)
    sol = mn.solve(X, y, W0, signs)
    W = W0 + move * torch.randn(W0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = eta / float(torch.linalg.eigvalsh(sol.gram).max())
    terms = mn.lyapunov_terms(sol, W, step)
    following = W + step * first_layer.pull_back(X, W, signs, y - first_layer.forward(X, W, signs))
    before, after = ((w - sol.W).square().sum((1, 2)) for w in (W, following))
    size = before + after + terms.e**2 * step
    assert bool((((after - before) / 2 - terms.change).abs() <= 1e-11 * size).all())
    parallel, perp = sol.split(following)
    if eta <= 1:
        assert bool((perp.sqrt() <= terms.perp_next + 1e-7 * size.sqrt()).all())
        assert bool((parallel.clamp_min(0).sqrt() <= terms.parallel_next + 1e-7 * size.sqrt()).all())
    if step <= mn.safe_step(X):
        falls = terms.e > 2 * terms.b
        assert bool((terms.change[falls] <= 1e-11 * size[falls]).all())
    G = first_layer.empirical_gram(X, W)
    norm = torch.linalg.matrix_norm(X, 2) ** 2
    assert bool((torch.linalg.eigvalsh(G)[:, -1] <= norm * (1 + 1e-12)).all())


def test_the_terms_by_autograd_free_matrices():
    X, y, W0, signs = wide_layer(5, m=20, kinks=3)
    sol, W = mn.solve(X, y, W0, signs), W0 + 0.5
    terms = mn.lyapunov_terms(sol, W, 0.1)
    J0, J = layer_jacobian(X, W0[0], signs[0]), layer_jacobian(X, W[0], signs[0])
    e = y - J @ W[0].reshape(-1)
    assert float(terms.e) == pytest.approx(float(e.norm()))
    assert float(terms.b) == pytest.approx(float(((J0 - J) @ sol.W[0].reshape(-1)).norm()))
    assert float(terms.drift) == pytest.approx(float(torch.linalg.matrix_norm(J - J0, 2)))
    assert float(terms.gap) == pytest.approx(float(((J - J0) @ W[0].reshape(-1)).norm()))


def solve_rational(M, v):
    """M^-1 v in Fractions."""
    M, n = [[*row, b] for row, b in zip(M, v, strict=True)], len(v)
    for k in range(n):
        p = next(i for i in range(k, n) if M[i][k] != 0)
        M[k], M[p] = M[p], M[k]
        M[k] = [a / M[k][k] for a in M[k]]
        for i in range(n):
            if i != k:
                M[i] = [a - M[i][k] * b for a, b in zip(M[i], M[k], strict=True)]
    return [row[-1] for row in M]


def rational_rows(X, W, a):
    """The Jacobian in Fractions, m = 4 neurons, so that sqrt(m) = 2; rows of length 4 d."""
    gate = [[sum(x * w for x, w in zip(row, neuron, strict=True)) > 0 for neuron in W] for row in X]
    return [
        [a[r] * g * x / Fraction(2) for r, g in enumerate(gs) for x in row] for row, gs in zip(X, gate, strict=True)
    ]


def test_the_lyapunov_identity_is_exact_in_fractions_also_when_gates_flip():
    g, flipped = torch.Generator().manual_seed(7), 0
    dot = lambda u, v: sum(p * q for p, q in zip(u, v, strict=True))  # noqa: E731
    for _ in range(10):
        X, W = (
            [[Fraction(int(v), 7) for v in row] for row in torch.randint(-9, 9, (n, 3), generator=g)] for n in (2, 4)
        )
        y, a, eta = [Fraction(3), Fraction(-2)], [1, 1, -1, -1], Fraction(9, 5)
        J0 = rational_rows(X, W, a)
        w = [v for neuron in W for v in neuron]
        gram = [[dot(p, q) for q in J0] for p in J0]
        if gram[0][0] * gram[1][1] == gram[0][1] ** 2:
            continue
        alpha = solve_rational(gram, [t - dot(row, w) for t, row in zip(y, J0, strict=True)])
        star = [v + sum(c * row[i] for c, row in zip(alpha, J0, strict=True)) for i, v in enumerate(w)]
        for _ in range(4):
            J = rational_rows(X, [w[3 * r : 3 * r + 3] for r in range(4)], a)
            flipped += J != J0
            e = [t - dot(row, w) for t, row in zip(y, J, strict=True)]
            b = [dot(p, star) - dot(q, star) for p, q in zip(J0, J, strict=True)]
            push = [sum(c * row[i] for c, row in zip(e, J, strict=True)) for i in range(12)]
            new = [v + eta * p for v, p in zip(w, push, strict=True)]
            change = sum((p - s) ** 2 - (v - s) ** 2 for p, v, s in zip(new, w, star, strict=True)) / 2
            assert change == eta * (dot(e, b) - dot(e, e)) + eta**2 / 2 * dot(push, push)
            w = new
    assert flipped > 5


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_is_plain_gradient_descent_and_records_the_split():
    X, y = sphere_example()
    W0, signs = mn.initialize(10, 128, S=3)
    untouched = W0.clone()
    run = mn.train(X, y, W0, signs, 0.2, 40, every=8)
    assert torch.equal(W0, untouched)
    W, sol = W0.clone(), mn.solve(X, y, W0, signs)
    for k in range(41):
        f = (torch.relu(X @ W) * signs[:, None]).sum(-1) / math.sqrt(128)
        if k % 8 == 0:
            torch.testing.assert_close(run.residual[k // 8], torch.linalg.vector_norm(y - f, dim=1))
            parallel, perp = sol.split(W)
            torch.testing.assert_close(run.observed["V_parallel"][k // 8], parallel)
            torch.testing.assert_close(run.observed["V_perp"][k // 8], perp, atol=1e-12, rtol=1e-9)
        if k < 40:
            gate = (X @ W > 0).double()
            W = W + 0.2 / math.sqrt(128) * signs[:, None] * (X.T @ ((y - f)[:, :, None] * gate))
    torch.testing.assert_close(run.weights[0], W)


def test_each_network_may_have_its_own_targets_and_step():
    X, y = sphere_example()
    W0, signs = mn.initialize(10, 64, S=2)
    targets, steps = torch.stack([y, -2 * y]), torch.tensor([0.1, 0.2], dtype=torch.float64)
    both = mn.train(X, targets, W0, signs, steps, 20)
    for s in range(2):
        one = mn.train(X, targets[s], W0[s], signs[s], float(steps[s]), 20)
        torch.testing.assert_close(one.weights[0][0], both.weights[0][s])
        torch.testing.assert_close(one.observed["V_perp"][:, 0], both.observed["V_perp"][:, s], atol=1e-12, rtol=1e-9)


def test_float32_trains_without_the_decomposition_and_a_killed_run_resumes(tmp_path):
    X, y = sphere_example()
    W0, signs = mn.initialize(10, 64)
    run = mn.train(X.float(), y.float(), W0.float(), signs.float(), 0.2, 30, decompose=False)
    assert run.weights[0].dtype == torch.float32
    whole = mn.train(X, y, W0, signs, 0.2, 30, every=5)

    class Stop(Exception):
        pass

    class Kill:
        done = False

        def __call__(self, state):
            if state.step == 25 and not self.done:
                self.done = True
                raise Stop
            return torch.zeros(())

    options = {
        "every": 5,
        "checkpoint": tmp_path / "run.safetensors",
        "checkpoint_every": 10,
        "observe": {"kill": Kill()},
    }
    with pytest.raises(Stop):
        mn.train(X, y, W0, signs, 0.2, 30, **options)
    resumed = mn.train(X, y, W0, signs, 0.2, 30, **options)
    assert torch.equal(resumed.weights[0], whole.weights[0])
    assert torch.equal(resumed.observed["V_perp"], whole.observed["V_perp"])
    with pytest.raises(ValueError, match="another step"):
        mn.train(X, y, W0, signs, 0.3, 30, **options)


def test_a_large_step_warns_and_still_reaches_zero_loss_far_from_the_solution():
    X, y = sphere_example()
    W0, signs = mn.initialize(10, 4096, antisymmetric=False)
    sol = mn.solve(X, y, W0, signs)
    top = float(torch.linalg.eigvalsh(sol.gram)[0, -1])
    with pytest.warns(UserWarning, match=r"at least 2: the linear dynamics is unstable"):
        far = mn.train(X, y, W0, signs, 2.4 / top, 400, every=400, solution=sol)
    near = mn.train(X, y, W0, signs, 1.9 / top, 400, every=400, solution=sol)
    assert float(far.loss[-1]) < 1e-8
    assert float(far.observed["V_perp"][-1]) > 100 * float(near.observed["V_perp"][-1])
    with pytest.warns(UserWarning, match="at least 2"), pytest.raises(descent.Diverged):
        mn.train(X, y, W0, signs, 40 / top, 2000, every=400, solution=sol)


def test_mirrored_pairs_start_at_zero():
    X, _ = sphere_example()
    W0, signs = mn.initialize(10, 200, S=2, kappa=3.0)
    assert float(first_layer.forward(X, W0, signs).abs().max()) < 1e-13
    W, a = mn.initialize(10, 4000, antisymmetric=False, kappa=3.0)
    assert float(W.std()) == pytest.approx(3, rel=0.02)
    assert abs(float(a.mean())) < 0.06


# --- bad input --------------------------------------------------------------------------------------------------------


def cases(X, y, W0, a):
    double, anti, square = X.clone(), X.clone(), torch.randn(4, 2, dtype=torch.float64)
    double[3], anti[2] = 2 * X[1], -X[1]
    square = torch.cat([square, -square])  # four dependent lines in the plane
    eight = torch.arange(8, dtype=torch.float64)
    return {
        "duplicate": ((double, y, W0, a), ValueError, r"positively parallel rows \(1, 3\)"),
        "antipodal": ((square, eight, W0[:, :2], a), ValueError, r"dependent antipodal pairs \(0, 4\)"),
        "narrow": ((X, y, W0[:, :, :1], a[:, :1]), ValueError, r"m d = 1 x 3 weights for N = 4"),
        "float32": ((X.float(), y.float(), W0.float(), a.float()), TypeError, "float64"),
        "integer": ((X.long(), y, W0, a), TypeError, "X has dtype torch.int64"),
        "integer y": ((X, y.long(), W0, a), TypeError, "y has dtype torch.int64"),
        "list": ((X, y.tolist(), W0, a), TypeError, "y is a list"),
        "NaN": ((X, y / 0 * 0, W0, a), ValueError, r"y\[0\] is nan"),
        "NaN X": ((X * torch.nan, y, W0, a), ValueError, r"X\[0, 0\] is nan"),
        "NaN W": ((X, y, W0 * torch.nan, a), ValueError, r"W0\[0, 0, 0\] is nan"),
        "shape": ((X, y[:3], W0, a), ValueError, r"y has shape \(3,\); \(4,\)"),
        "signs": ((X, y, W0, a * 0.5), ValueError, "every sign must be"),
        "zero": ((X * torch.tensor([[1.0], [0], [1], [1]]), y, W0, a), ValueError, r"zero rows 1"),
    }


NAMES = ["duplicate", "antipodal", "narrow", "float32", "integer", "list", "NaN", "shape", "signs", "zero"]
NAMES += ["integer y", "NaN X", "NaN W"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_in_one_sentence(unchecked, name):
    arguments, error, text = cases(*wide_layer(1))[name]
    with pytest.raises(error, match=text):
        mn.solve(*arguments)
    with pytest.raises(error, match=text):
        mn.train(*arguments, 0.1, 2)
    if name not in ("duplicate", "antipodal", "zero"):  # a certificate says so itself
        with pytest.raises(error, match=text):
            mn.certify(*arguments, step=0.1)


def test_independent_antipodal_inputs_are_named_and_solved():
    X, y, W0, signs = wide_layer(1)
    X = torch.cat([X[:2], -2 * X[1:2]])
    with pytest.warns(UserWarning, match=r"antipodal rows 1, 2"):
        sol = mn.solve(X, y[:3], W0, signs)
    torch.testing.assert_close(sol.predict(X)[0], y[:3])


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_steps_must_be_positive(unchecked, step):
    X, y, W0, signs = wide_layer(1)
    for call in (lambda: mn.train(X, y, W0, signs, step, 3), lambda: mn.certify(X, y, W0, signs, step=step)):
        with pytest.raises(ValueError, match="finite number"):
            call()


def test_other_arguments_out_of_range(unchecked):
    X, y, W0, signs = wide_layer(1)
    with pytest.raises(TypeError, match=r"step is '0\.1'; a number"):
        mn.train(X, y, W0, signs, "0.1", 3)
    with pytest.raises(ValueError, match="reference is 'both'"):
        mn.certify(X, y, W0, signs, step=0.1, reference="both")
    with pytest.raises(ValueError, match="level is 'sure'"):
        mn.certify(X, y, W0, signs, step=0.1, level="sure")
    with pytest.raises(ValueError, match=r"W has shape \(1, 3, 32\); \(..., d, m\) with m = 64, as in W0"):
        mn.certify_after(X, y, W0, signs, W0[:, :, :32], step=0.1)
    with pytest.raises(ValueError, match="even m for mirrored pairs"):
        mn.initialize(3, 5)
    with pytest.raises(ValueError, match="kappa is 0"):
        mn.initialize(3, 4, kappa=0.0)
    with pytest.raises(ValueError, match="0 < delta < 1"):
        mn.certify_width(data.sphere(4, 3, torch.Generator()), y, 10, step=0.1, delta=0.0)


def test_a_dead_layer_is_singular_and_said_so():
    X, y, W0, signs = wide_layer(1)
    with pytest.raises(ValueError, match="G_0 of network 0 has smallest eigenvalue"):
        mn.solve(X.abs(), y, -W0.abs(), signs)


def test_a_column_of_targets_is_accepted():
    X, y, W0, signs = wide_layer(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mn.solve(X, y[:, None], W0, signs).W, mn.solve(X, y, W0, signs).W)


def test_the_data_of_figure_1():
    X, y = mn.figure_1_data()
    assert X.shape == (100, 5)
    torch.testing.assert_close(torch.linalg.vector_norm(X, dim=1), torch.ones(100, dtype=torch.float64))
    assert float(y.mean()) == pytest.approx(0, abs=1e-12)
    assert float(y.std()) == pytest.approx(1)
    # y is a quadratic form of rank one, up to the shift: the Gram matrix of x_i x_i^T explains it, and all of it
    products = torch.cat([torch.stack([torch.outer(x, x).flatten() for x in X]), X.new_ones(100, 1)], 1)
    fit = torch.linalg.lstsq(products, y[:, None], driver="gelsd").solution
    assert float((products @ fit - y[:, None]).abs().max()) < 1e-10
    lifted, same = mn.figure_1_data(bias=True)
    assert torch.equal(lifted[:, :5], X)
    assert torch.equal(lifted[:, 5], torch.ones(100, dtype=torch.float64))
    assert torch.equal(same, y)
    large, same = mn.figure_1_data(radius=math.sqrt(5))
    torch.testing.assert_close(large, math.sqrt(5) * X)
    assert torch.equal(same, y)
    assert not torch.equal(mn.figure_1_data(12)[1], y)


def test_terms_of_weights_of_another_shape_are_refused(unchecked):
    X, y, W0, signs = wide_layer(1)
    with pytest.raises(ValueError, match="they must be equal"):
        mn.lyapunov_terms(mn.solve(X, y, W0, signs), W0[:, :, :4], 0.1)
