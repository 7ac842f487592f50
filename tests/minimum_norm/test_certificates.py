"""Lesson 4's certificates against what descent does, against plain loops, and against exact arithmetic."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import oracles
import pytest
import torch
from making import gaussian, layer_jacobian, seeded, sphere_example, wide_layer

from companion import minimum_norm as mn
from companion import rigor
from companion.minimum_norm import first_layer, gates


def planted(seed):
    """A hostile small problem: near-parallel or opposite rows, pre-activations so near a kink that gates do flip."""
    g = seeded(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (1,), generator=g))]  # noqa: E731
    N, d, m, antisymmetric = pick(1, 2, 2, 3), pick(1, 2, 3), pick(8, 16, 24), pick(True, False)
    X = torch.randn(N, d, generator=g, dtype=torch.float64)
    kind = pick("plain", "near", "opposite")
    if kind == "near" and N > 1 and d > 1:
        X[1] = X[0] * pick(1, 2.5) + 10.0 ** -pick(2, 3, 5) * torch.randn(d, generator=g, dtype=torch.float64)
    if kind == "opposite" and N > 1:
        X[1] = -X[0] * pick(1, 3.0)
    W, a = mn.initialize(d, m, kappa=10.0 ** pick(1, 2, 3, 4), antisymmetric=antisymmetric, generator=g)
    for _ in range(pick(1, 1, 2, 3)):
        x, r, z = X[pick(*range(N))], pick(*range(m)), pick(1, 1, -1) * pick(0.01, 0.1, 0.5, 1.5)
        W[0, :, r] += (z - W[0, :, r] @ x) / (x @ x) * x
    y = first_layer.outputs(X, W, a)[0] + pick(0.1, 0.3, 1, 2) * torch.randn(N, generator=g, dtype=torch.float64)
    return X, y, W, a, mn.safe_step(X) * pick(0.1, 0.5, 0.9, 0.999), pick("gate", "midpoint")


def descent_with_50_digits(X, y, W, a, step, steps):
    """The path of one network, each iterate's true distances by name."""
    mpmath.mp.dps = 50
    many = lambda A: np.vectorize(mpmath.mpf, otypes=[object])(A.numpy())  # noqa: E731
    norm = lambda v: mpmath.sqrt(sum(v.ravel() ** 2))  # noqa: E731
    X, w, a, y = many(X), many(W), many(a), many(y)
    root, w0, moved = mpmath.sqrt(w.shape[1]), w, mpmath.mpf(0)
    jacobian = lambda gates: np.einsum("nd,nm,m->ndm", X, gates, a / root).reshape(len(X), -1)  # noqa: E731
    J0 = jacobian(np.where(X @ w > 0, 1, 0))
    G = mpmath.matrix((J0 @ J0.T).tolist())
    solve = lambda v: np.array(mpmath.lu_solve(G, mpmath.matrix(v.tolist())), dtype=object).ravel()  # noqa: E731
    star = None
    for k in range(steps + 1):
        J = jacobian(np.where(X @ w > 0, 1, 0))
        e = y - J @ w.ravel()
        star = w0.ravel() + J0.T @ solve(e) if star is None else star
        moved += mpmath.mpf(step) * norm(e)
        v = w.ravel() - star
        parallel = J0.T @ solve(J0 @ v)
        yield {
            "k": k,
            "e": norm(e),
            "Q_star": moved,
            "movement": norm(w - w0),
            "perp": norm(v - parallel),
            "parallel": norm(parallel),
            "distance": norm(v),
            "b": norm(y - J @ star),
            "flips": int((np.where(X @ w > 0, 1, 0) != np.where(X @ w0 > 0, 1, 0)).sum()),
        }
        w = w + mpmath.mpf(step) * (J.T @ e).reshape(w.shape)


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_everything_that_a_certificate_says_happens(level):
    held = flips = 0
    slack = mpmath.mpf(10) ** (-9 if level == "measured" else -40)
    for seed in range(60):
        X, y, W, a, step, reference = planted(seed)
        if W.shape[1] * W.shape[2] < len(X) or held == 20:
            continue
        c = mn.certify(X, y, W, a, step=step, reference=reference, level=level)
        assert c.holds or c.reason.split(":")[0] in (
            "too many fragile gates",
            "no Q closes the loop",
            "kernel singular",
        )
        if not c.holds:
            assert set(c.quantities) <= {"e_0", "trivial"}
            continue
        held, q = held + 1, {name: mpmath.mpf(value) for name, value in c.quantities.items()}
        for true in descent_with_50_digits(X, y, W[0], a[0], step, 30):
            room = slack * (1 + q["e_0"] + q["trivial"])
            if true["k"] == 0:
                assert q["e_0"] * (1 - mpmath.mpf(10) ** -3) - room <= true["e"] <= q["e_0"] + room
                assert q["trivial"] <= true["distance"] + room
                assert q["trivial"] >= true["distance"] * (1 - mpmath.mpf(10) ** -6)
            assert true["e"] <= (1 - q["rate"]) ** true["k"] * q["e_0"] + room
            for name in ("Q_star", "movement", "perp", "b"):
                assert true[name] <= q[name] + room, (seed, name)
            rest = true["e"] / mpmath.sqrt(q["lambda"] if reference == "gate" else q["lambda"] - q["epsilon"])
            assert true["parallel"] <= q["parallel"] + rest + room
            assert true["distance"] <= q["distance"] + rest + room
        flips += true["flips"] > 0
    assert held >= 12
    assert flips >= 4


# --- the theorem's text, transcribed ----------------------------------------------------------------------------------


def transcribed(X, y, W, a, step, reference, Q, Q_star):
    """The counting theorem neuron by neuron: the sets at Q, then the bounds with the sets at Q_star."""
    (N, _), m = X.shape, W.shape[1]
    z, inner = (X @ W).tolist(), (X @ X.T).tolist()
    reach = [math.sqrt(sum(v * v for v in row)) for row in inner]
    F, B, G, sizes = (np.zeros((N, N)) for _ in range(4))
    for length in (Q, Q_star):
        fragile = [[abs(z[i][r]) <= reach[i] * length / math.sqrt(m) for r in range(m)] for i in range(N)]
        for i in range(N):
            for j in range(N):
                one = sum(fragile[i][r] and not fragile[j][r] and z[j][r] > 0 for r in range(m))
                other = sum(fragile[j][r] and not fragile[i][r] and z[i][r] > 0 for r in range(m))
                both = sum(fragile[i][r] and fragile[j][r] for r in range(m))
                sure = sum(z[i][r] > 0 and z[j][r] > 0 and not fragile[i][r] and not fragile[j][r] for r in range(m))
                if length == Q:
                    F[i, j] = abs(inner[i][j]) * (one + other + both) / m
                    G[i, j] = inner[i][j] * (sure + (one + other + both) / 2) / m
                if length == Q_star:
                    B[i, j], sizes[i, j] = abs(inner[i][j]) * both / m, both
    J = layer_jacobian(X, W, a).numpy()
    e = y.numpy() - J @ W.reshape(-1).numpy()
    alpha = np.linalg.solve(J @ J.T, e)
    lam0, eps = np.linalg.eigvalsh(J @ J.T)[0], np.linalg.norm(F, 2) / (2 if reference == "midpoint" else 1)
    lam = lam0 if reference == "gate" else np.linalg.eigvalsh(G)[0]
    D = np.linalg.norm([reach[i] * Q_star / math.sqrt(m) * sizes[i, i] / math.sqrt(m) for i in range(N)])
    perp, parallel = math.sqrt(np.linalg.norm(B, 2)) * Q_star, D / math.sqrt(lam0)
    return {
        "lambda": lam,
        "epsilon": eps,
        "rate": step * (lam - eps),
        "movement": np.linalg.norm(X.numpy(), 2) * Q_star,
        "perp": perp,
        "parallel": parallel,
        "distance": math.hypot(perp, parallel),
        "b": (1 + np.linalg.norm(alpha) / Q_star) * D,
        "fragile": np.trace(sizes) / (N * m),
        "e_0": np.linalg.norm(e),
        "trivial": math.sqrt(e @ alpha),
    }


@pytest.mark.parametrize("reference", ["gate", "midpoint"])
def test_a_certificate_is_the_text_of_the_theorem(reference):
    held, fragile = 0, 0
    for seed in range(16):
        X, y, W, a = wide_layer(seed, m=48, kappa=300.0, kinks=3, antisymmetric=seed % 2 == 0)
        y, step = y + first_layer.outputs(X, W, a)[0], 0.7 * mn.safe_step(X)
        c = mn.certify(X, y, W, a, step=step, reference=reference)
        if not c.holds:
            continue
        p = gates.Problem.of(X, y[None], W, a, X.new_tensor([step]), "measured")
        loop, q = gates.close_loop(p, reference), dict(c.quantities)
        text = transcribed(X, y, W[0], a[0], step, reference, float(loop.Q), q["Q_star"])
        for name, value in text.items():
            assert q[name] == pytest.approx(value, rel=1e-9, abs=1e-12), (seed, name)
        # Q_star = Q_lin lambda / (lambda - epsilon), and Q_lin sums the path of descent in the reference kernel
        lam, eps = text["lambda"], text["epsilon"]
        matrix = p.gram if reference == "gate" else p.inner * (_at(loop, p).on + _at(loop, p).off) / (2 * 48)
        values, U = torch.linalg.eigh(matrix[0])
        residuals = (1 - step * values) ** torch.arange(20_000)[:, None] * (U.T @ p.e[0])
        length = step * float(residuals.norm(dim=1).sum())
        assert length * (1 - 1e-9) <= q["Q_star"] * (lam - eps) / lam <= length * 1.001
        held, fragile = held + 1, fragile + (text["fragile"] > 0)
    assert held >= 4
    assert fragile == held


def _at(loop, p):
    """The counts from which the loop's last epsilon came, those at Q."""
    return gates.fragile_counts(p.X, p.W, p.tau(loop.Q))


def test_the_formulas_at_random_numbers_of_every_kind():
    for seed in range(20):
        lam, eps, Q, length, blur, *rest = (float(v) for v in gaussian(13, seed=seed).abs() + 0.1)
        eps = lam * eps / (1 + eps)
        reach, sets = rest[:4], [math.floor(9 * v) for v in rest[4:8]]
        D = math.sqrt(sum(((r * length / 4 + 3 * blur) * n / 4) ** 2 for r, n in zip(reach, sets, strict=True)))
        for level in ("measured", "certified"):
            number = lambda v: rigor.formulas.number(torch.tensor(v, dtype=torch.float64), level)  # noqa: E731, B023
            found = gates.closed_path(number([Q]), number([lam]), number([eps]))
            kinks = gates.kink_error(
                number([length]), number(reach), number([[blur] * 4]), number([*map(float, sets)]), number(16.0)
            )
            both = gates.limit_distance(number([lam]), number([eps]))
            for value, text in ((found, Q * lam / (lam - eps)), (kinks, D), (both, math.hypot(lam, eps))):
                assert float(gates.upper(value)) == pytest.approx(text, rel=1e-12)
                assert float(gates.lower(value)) <= text * (1 + 1e-15)
                assert level == "measured" or float(gates.lower(value)) < float(gates.upper(value))


def test_the_bound_of_functions_is_the_text_of_its_theorem():
    fragile = 0
    for seed in range(8):
        X, y, W, a = wide_layer(seed, m=48, kappa=300.0, kinks=3, antisymmetric=False)
        y, Z = y + first_layer.outputs(X, W, a)[0], gaussian(3, 3, seed=seed)
        c, sol = mn.certify(X, y, W, a, step=mn.safe_step(X)), mn.solve(X, y, W, a)
        if not c.holds:
            continue
        Q, m, N = c.quantities["Q_star"], 48, len(X)
        J, both = layer_jacobian(X, W[0], a[0]), torch.cat([X, Z])
        z, inner = both @ W[0], both @ X.T
        tau = torch.linalg.vector_norm(inner, dim=1) * Q / math.sqrt(m)
        S, A = z.abs() <= tau[:, None], z > 0
        flips = [[abs(float(inner[i, j])) * int((S[j] & A[i]).sum()) / m for j in range(N)] for i in range(len(both))]
        D = math.sqrt(sum((float(tau[i]) * int(S[i].sum())) ** 2 / m for i in range(N)))
        M = float(np.linalg.norm(np.array(flips[:N]), 2))
        for k in range(3):
            alpha = torch.linalg.solve(J @ J.T, J @ layer_jacobian(Z[k : k + 1], W[0], a[0])[0])
            text = float(tau[N + k]) * int(S[N + k].sum()) / math.sqrt(m) + Q * math.hypot(*flips[N + k])
            text += float(alpha.norm()) * (0.25 + D + Q * M)
            assert float(mn.function_bound(sol, Z, c, 0.25)[0, k]) == pytest.approx(text, rel=1e-9)
        fragile += M > 0 and D > 0
        run = mn.train(X, y, W, a, mn.safe_step(X), 40, every=40)
        bound = mn.function_bound(sol, Z, c, run.residual[-1])
        error = (mn.forward(Z, run.weights[0], a) - sol.predict(Z)).abs()
        assert bool((error <= bound + 1e-11).all())
    assert fragile >= 4


def test_the_explicit_width_is_the_text_of_its_theorem():
    X, y = sphere_example()
    lam0, norm_X = float(torch.linalg.eigvalsh(mn_kernel(X))[0]), float(torch.linalg.matrix_norm(X, 2))
    # a random f_0 of independent signs: E f_0 f_0^T = kappa^2 Sigma, Monte Carlo over the signs of one wide layer
    W, _ = mn.initialize(10, 20_000, antisymmetric=False)
    relu = torch.relu(X @ W[0])
    extra = float((torch.linalg.inv(mn_kernel(X)) * (relu @ relu.T / 20_000)).sum())
    for kappa, delta, pairs in ((1.0, 0.05, True), (3.0, 0.2, False), (0.5, 0.01, True)):
        E = float(y.norm()) if pairs else math.sqrt((float(y @ y) + 20 * kappa**2 / 2) / delta)
        c = mn.certify_width(X, y, 10**18, step=0.1, kappa=kappa, delta=delta, antisymmetric=pairs)
        assert c.holds
        q, width = c.quantities, (51.1 * 20 * norm_X * E / (kappa * lam0**2)) ** 2
        distance = 31.7 * math.sqrt(20) * math.sqrt(norm_X) * E**1.5 / (math.sqrt(kappa) * lam0**1.5)
        trivial = math.sqrt(float(y @ torch.linalg.inv(mn_kernel(X)) @ y) + (0 if pairs else kappa**2 * extra))
        text = {"width": width, "rate": 0.1 * lam0 / 4, "distance": distance / 10**4.5, "trivial": trivial}
        text["informative"] = max(width, (distance / trivial) ** 4)
        assert q == pytest.approx(text, rel=1e-9 if pairs else 0.02)
        rows = {row.name: row for row in c.assumptions}
        assert rows["m"].required == pytest.approx(width, rel=1e-9)
        assert rows["η ‖X‖²"].measured == pytest.approx(0.1 * norm_X**2)
        if pairs:
            log = math.log(20 / delta)
            assert rows["m/2"].required == pytest.approx(8 * norm_X**2 / lam0 * log)
            assert rows["1.59 √m ‖X‖ E/(κ λ₀)"].required == pytest.approx(3 * log)
            assert rows["1.59 √m ‖X‖ E/(κ λ₀)"].measured == pytest.approx(1.59e9 * norm_X * E / (kappa * lam0))


def mn_kernel(X):
    """``x.z (pi - t) / (2 pi)`` of unit rows, with arccos."""
    cosine = (X @ X.T).clamp(-1, 1).fill_diagonal_(1)
    return cosine * (math.pi - torch.arccos(cosine)) / (2 * math.pi)


def test_the_constants_of_the_explicit_width():
    # p = 2 ||X|| rho Q / (sqrt(2 pi) kappa rho sqrt(m)) with Q = 4 E / lambda_0; 2 m p neurons are fragile
    p = 8 / math.sqrt(2 * math.pi)
    assert 3.19 < p <= 3.192
    # epsilon <= 4 n rho^2 p <= lambda_0 / 4 asks for sqrt(m) >= 16 p ...
    assert 51.0 < 16 * 3.192 <= 51.1
    # beta^2 <= 2 n rho^2 p, and beta Q twice: once in V_perp, once in (e)
    twice = 2 * math.sqrt(2 * 3.192) * 4
    assert 20.2 < twice <= 20.3
    # 2.22 D / sqrt(lambda) over 2 beta Q, at the smallest m: at most 2.22 / 4
    assert twice * (1 + 2.22 / 4) <= 31.7
    assert 2 / math.sqrt(math.e) + 1 <= 2.22
    # scalar Chernoff: m p >= 3 log, and m p >= 1.59 sqrt(m) ... since p is at least half of its bound
    assert 1.59 <= 3.192 / 2


# --- tight instances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["measured", "certified"])
@pytest.mark.parametrize("reference", ["gate", "midpoint"])
def test_bounds_that_are_nearly_attained(reference, level):
    # one neuron of 64 is near its kink: it closes at once, and the others do all the work
    X, a, W = torch.ones(1, 1).double(), torch.ones(1, 64).double(), torch.full((1, 1, 64), 1e3).double()
    W[0, 0, 0] = 1e-6
    y = first_layer.outputs(X, W, a)[0] - 1
    c, sol = mn.certify(X, y, W, a, step=0.01, reference=reference, level=level), mn.solve(X, y, W, a)
    run = mn.train(X, y, W, a, 0.01, 4000, every=4000)
    terms = mn.lyapunov_terms(sol, run.weights[0], 0.01)
    assert c.holds
    assert 0.98 < float(terms.V_perp.sqrt()) / c.quantities["perp"] < 1
    assert 0.98 < float((run.weights[0] - W).norm()) / c.quantities["movement"] < 1
    assert 0.98 < float(sol.norm2.sqrt()) / c.quantities["trivial"] < 1 + 1e-9
    assert 0.45 < float(terms.b) / c.quantities["b"] < 1
    assert c.quantities["lambda"] == pytest.approx({"gate": 1.0, "midpoint": 127 / 128}[reference], rel=2e-6)


def test_a_parallel_bound_that_is_nearly_attained():
    # one long step throws the fragile neuron far beyond its kink
    X, a, W = torch.ones(1, 1).double(), torch.ones(1, 64).double(), torch.full((1, 1, 64), 1e3).double()
    W[0, 0, 0] = 0.1
    y = first_layer.outputs(X, W, a)[0] - 8
    c, sol = mn.certify(X, y, W, a, step=0.99, reference="gate"), mn.solve(X, y, W, a)
    terms = mn.lyapunov_terms(sol, mn.train(X, y, W, a, 0.99, 400, every=400).weights[0], 0.99)
    assert c.holds
    assert 0.85 < float(terms.V_parallel.sqrt()) / c.quantities["parallel"] < 1


# --- the certified level ----------------------------------------------------------------------------------------------


def test_a_certified_certificate_says_strictly_less_than_a_measured_one():
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    step, found = 0.9 * mn.safe_step(X), {}
    for reference in ("gate", "midpoint"):
        for level in ("measured", "certified"):
            c = found[reference, level] = mn.certify(X, y, W0, signs, step=step, reference=reference, level=level)
            assert c.holds, c
            assert c.status == level
        weak, plain = found[reference, "certified"].quantities, found[reference, "measured"].quantities
        for name in ("lambda", "rate", "trivial"):
            assert weak[name] < plain[name]
        for name in ("Q_star", "epsilon", "movement", "perp", "parallel", "distance", "b", "e_0"):
            assert weak[name] > plain[name], name
    assert found["midpoint", "measured"].quantities["Q_star"] <= found["gate", "measured"].quantities["Q_star"] * 1.001
    assert found["gate", "measured"].theorem == "Counting theorem (gate), before training"


def exact_dot(u, v):
    return sum((Fraction(p) * Fraction(q) for p, q in zip(u.tolist(), v.tolist(), strict=True)), Fraction(0))


def test_signs_that_rounding_leaves_open_are_fragile():
    """Three terms that cancel: the computed sign is wrong, and only the certified sets know."""
    X = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    W = torch.full((1, 3, 16), 5.0, dtype=torch.float64)
    W[0, :, 3] = torch.tensor([1.0, 2.0**-54, -1.0], dtype=torch.float64)
    W[0, :, 4] = torch.tensor([2.0**53, 1.0, -(2.0**53)], dtype=torch.float64)
    wrong = [r for r in range(16) if (exact_dot(X[0], W[0, :, r]) > 0) != bool((X @ W[0])[0, r] > 0)]
    assert wrong
    y, signs, eta = torch.zeros(1, 1).double(), torch.ones(1, 16).double(), torch.ones(1).double()
    p = gates.Problem.of(X, y, W, signs, eta, "certified")
    counts = gates.fragile_counts(X, W, p.tau(torch.zeros(1).double()))
    assert int(counts.both) >= len(wrong)
    assert int(counts.both) < 16
    for r in range(16):
        assert abs(Fraction(float((X @ W[0])[0, r])) - exact_dot(X[0], W[0, :, r])) <= Fraction(float(p.blur))
    # and through the certificate, whose targets ask for next to no movement
    W[0, :, 4] = 5.0
    y = first_layer.outputs(X, W, signs)[0] + 1e-9
    certified, measured = (mn.certify(X, y, W, signs, step=0.1, level=v) for v in ("certified", "measured"))
    assert certified.holds
    assert certified.quantities["fragile"] == 1 / 16
    assert measured.quantities["fragile"] == (1 / 16 if float((X @ W[0])[0, 3]) == 0 else 0)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_and_residuals_are_enclosed_when_all_digits_cancel(seed):
    X, y, W, a = wide_layer(seed, m=16, kappa=1e8, antisymmetric=True)
    W[:, :, 8:] *= 1 + gaussian(1, 3, 8, seed=seed) * 1e-15
    exact = []
    for x in X:
        z = [exact_dot(x, W[0, :, r]) for r in range(16)]
        exact.append(sum((int(a[0, r]) * max(z[r], Fraction(0)) for r in range(16)), Fraction(0)) / 4)
    f, _ = gates.enclosed_outputs(X, W, a)
    computed = first_layer.outputs(X, W, a)[0].tolist()
    assert any(abs(Fraction(c) - t) > abs(t) / 100 for c, t in zip(computed, exact, strict=True))  # digits are lost
    for low, high, t in zip(f.lo[0].tolist(), f.hi[0].tolist(), exact, strict=True):
        assert Fraction(low) <= t <= Fraction(high)
        assert high - low < 1e-5
    p = gates.Problem.of(X, y[None], W, a, torch.ones(1).double(), "certified")
    norm2 = sum((Fraction(t) - f) ** 2 for t, f in zip(y.tolist(), exact, strict=True))
    assert Fraction(float(p.norm_e)) ** 2 >= norm2
    y = first_layer.outputs(X, W, a)[0]  # the computed residual is zero, the true one is not
    p = gates.Problem.of(X, y[None], W, a, torch.ones(1).double(), "certified")
    assert Fraction(float(p.norm_e)) ** 2 >= sum((Fraction(t) - f) ** 2 for t, f in zip(y.tolist(), exact, strict=True))
    assert float(p.norm_e) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_certified_eigenvalues_are_those_of_the_exact_products(dtype):
    """Also when torch makes its tensors in another dtype: bounds rounded to float32 would be false half of the time."""
    refused = 0
    try:
        torch.set_default_dtype(dtype)
        for seed in range(12):
            X, y, W, a = wide_layer(seed, N=3, d=3, m=64)
            X = X + 1e6 * (seed % 2)  # rows whose products are rounded
            p = gates.Problem.of(X, y[None], W, a, torch.ones(1).double(), "certified")
            counts = first_layer.gate_counts(X, W)[0]
            G = [[exact_dot(X[i], X[j]) * int(counts[i, j]) / 64 for j in range(3)] for i in range(3)]
            for i in range(3):
                for j in range(3):
                    assert Fraction(float(p.gram.lo[0, i, j])) <= G[i][j] <= Fraction(float(p.gram.hi[0, i, j]))
            low, high = Fraction(float(p.smallest(p.gram))), Fraction(float(p.largest(p.gram)))
            assert oracles.positive_definite(oracles.shifted(G, -1, high))
            if low:
                assert oracles.positive_definite(oracles.shifted(G, 1, -low))
                assert seed % 2 or float(low) > 0.9 * float(torch.linalg.eigvalsh(p.gram.lo)[0, 0])
            # a step just too large for the exact matrix is refused
            one = [x[:1] for x in (X, W)]
            product = exact_dot(X[0], X[0]) * int(counts[0, 0]) / 64
            eta = math.nextafter(float(1 / product), math.inf)
            c = mn.certify(one[0], y[:1] + 0.1, W, a, step=eta, level="certified")
            refused += c.reason.startswith("step too large") and Fraction(eta) * product > 1
    finally:
        torch.set_default_dtype(torch.float32)
    assert refused >= 6


def test_the_default_dtype_changes_nothing():
    X, y, W, a = wide_layer(3, m=400, kappa=300.0)
    found, solution = [], mn.solve(X, y, W, a)
    for dtype in (torch.float64, torch.float32, torch.float16):
        try:
            torch.set_default_dtype(dtype)
            c = mn.certify(X, y, W, a, step=0.1, level="certified")
            after = mn.certify_after(X, y, W, a, W, step=0.1, level="certified")
            found.append((c.quantities, after.quantities, mn.function_bound(solution, X, c, 0.1).tolist()))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_to_the_solution_is_enclosed(seed):
    X, y, W0, a = wide_layer(seed, N=2, d=2, m=16, kappa=10.0)
    W = W0 + 1e-3 * gaussian(1, 2, 16, seed=seed)
    p = gates.Problem.of(X, y[None], W0, a, torch.ones(1).double(), "certified")
    known = gates.solve_kernel(p, p.smallest(p.gram))
    here = gates.enclosed_distance(p, a, W, known.alpha)
    true = _distances(X, y, W0[0], a[0], W[0])
    low, high = gates.lower(here - known.spread), gates.upper(here + known.spread)
    assert mpmath.mpf(float(low)) <= true["here"] <= mpmath.mpf(float(high))
    assert float(high - low) < 1e-9
    assert mpmath.mpf(float(gates.lower(known.norm))) <= true["alpha"] * (1 + mpmath.mpf(10) ** -12)
    assert true["alpha"] <= mpmath.mpf(float(gates.upper(known.norm)))


@pytest.mark.parametrize("seed", range(4))
def test_the_pull_of_large_opposite_alphas_is_enclosed(seed):
    X, y, W0, a = wide_layer(seed, N=2, d=2, m=16, kappa=10.0)
    X[1] = X[0] * (1 + 1e-9)
    p = gates.Problem.of(X, y[None], W0, a, torch.ones(1).double(), "certified")
    alpha = torch.tensor([[1e8, -1e8 / (1 + 1e-9)]], dtype=torch.float64)  # J_0^T alpha is what rounding leaves
    here = gates.enclosed_distance(p, a, W0, alpha)
    pulled = [sum((Fraction(float(c)) * Fraction(float(x[k])) for c, x in zip(alpha[0], X, strict=True)), Fraction(0))
              for k in range(2)]  # fmt: skip
    both = sum(exact_dot(X[0], W0[0, :, r]) > 0 for r in range(16))
    square = sum(v**2 for v in pulled) * both / 16
    assert both == sum(exact_dot(X[1], W0[0, :, r]) > 0 for r in range(16)) > 0
    assert Fraction(max(0.0, float(here.lo))) ** 2 <= square <= Fraction(float(here.hi)) ** 2
    assert float(here.hi) < 1e-6


@pytest.mark.parametrize("error", [0.0, 1e-3, -1e-3])
def test_a_poor_guess_of_alpha_only_widens_the_enclosures(monkeypatch, error):
    X, y, W0, a = wide_layer(1, N=2, d=2, m=16, kappa=10.0)
    W, solve = W0 + 0.1 * gaussian(1, 2, 16, seed=1), torch.linalg.solve_ex
    monkeypatch.setattr(torch.linalg, "solve_ex", lambda A, b: (solve(A, b)[0] * (1 + error), None))
    p = gates.Problem.of(X, y[None], W0, a, torch.ones(1).double(), "certified")
    known = gates.solve_kernel(p, p.smallest(p.gram))
    true, trivial = (_distances(X, y, W0[0], a[0], V[0]) for V in (W, W0))
    assert (
        float(gates.lower(known.length - known.spread))
        <= trivial["here"]
        <= float(gates.upper(known.length + known.spread))
    )
    assert true["alpha"] <= float(gates.upper(known.norm))
    assert float(known.spread.hi) < 10 * abs(error) * trivial["here"] + 1e-12
    c = mn.certify_after(X, y, W0, a, W, step=0.01, level="certified")
    assert true["here"] <= c.quantities["here"] < true["here"] + 20 * abs(error) * trivial["here"] + 1e-9
    c = mn.certify(X, y, W0, a, step=0.01, level="certified")
    assert trivial["here"] * (1 - 20 * abs(error)) - 1e-9 < c.quantities["trivial"] <= trivial["here"]


def _distances(X, y, W0, a, W):
    """``||W - w*||`` and ``||alpha||`` with 50 digits, from exact Gram matrices in fractions."""
    mpmath.mp.dps = 50
    gate = [[exact_dot(x, W0[:, r]) > 0 for r in range(16)] for x in X]
    root = Fraction(4)
    rows = [
        [int(a[r]) * g[r] * Fraction(float(v)) / root for r in range(16) for v in x]
        for x, g in zip(X, gate, strict=True)
    ]
    w0, w = ([Fraction(float(M[k, r])) for r in range(16) for k in range(2)] for M in (W0, W))
    e = [Fraction(float(t)) - sum(p * q for p, q in zip(row, w0, strict=True)) for t, row in zip(y, rows, strict=True)]
    g = [[sum(p * q for p, q in zip(u, v, strict=True)) for v in rows] for u in rows]
    det = g[0][0] * g[1][1] - g[0][1] ** 2
    alpha = [(g[1][1] * e[0] - g[0][1] * e[1]) / det, (g[0][0] * e[1] - g[0][1] * e[0]) / det]
    star = [v + sum(c * row[k] for c, row in zip(alpha, rows, strict=True)) for k, v in enumerate(w0)]
    root = lambda t: mpmath.sqrt(mpmath.mpf(t.numerator) / t.denominator)  # noqa: E731
    return {
        "here": root(sum((p - q) ** 2 for p, q in zip(w, star, strict=True))),
        "alpha": root(sum(c**2 for c in alpha)),
    }


def test_after_training_the_limit_is_enclosed():
    X, y = sphere_example()
    W0, signs = mn.initialize(10, 2048, S=2, antisymmetric=False)
    step = mn.safe_step(X)
    assert not mn.certify(X, y, W0, signs, step=step).holds
    run = mn.train(X, y, W0, signs, step, 300, every=300)
    later = mn.train(X, y, run.weights[0], signs, step, 1500, every=1500)
    for level in ("measured", "certified"):
        c = mn.certify_after(X, y, W0, signs, run.weights[0], step=step, level=level)
        assert c.holds, c
        assert len(c.members) == 2
        sol = mn.solve(X, y, W0, signs)
        limit = torch.linalg.vector_norm(later.weights[0] - sol.W, dim=(1, 2))
        for s, member in enumerate(c.members):
            q = member.quantities
            assert q["distance_low"] <= float(limit[s]) <= q["distance_high"]
            assert q["distance_high"] - q["distance_low"] < 0.5 * float(limit[s])
            reached = float((run.weights[0] - sol.W)[s].norm())
            assert q["here"] == pytest.approx(reached, rel=1e-9)
            assert q["distance_low"] == pytest.approx(reached - q["movement"], rel=1e-9)
            assert q["distance_high"] == pytest.approx(reached + q["movement"], rel=1e-9)
            assert level == "measured" or q["distance_low"] < reached - q["movement"] < q["distance_high"]
            assert float(later.residual[-1, s]) <= (1 - q["rate"]) ** 1500 * q["e_0"] + 1e-9


def test_the_explicit_width_of_the_example():
    X, y = sphere_example()
    step = mn.safe_step(X)
    c = mn.certify_width(X, y, 10**6, step=step)
    assert not c.holds
    q, printed = c.quantities, c.reason.removeprefix("m is below ")
    assert 0 <= float(printed) - q["width"] < 0.01 * q["width"]  # the printed width is wide enough
    assert mn.certify_width(X, y, int(float(printed)), step=step).holds
    assert q["width"] == pytest.approx(1.65e11, rel=0.01)
    at_width = mn.certify_width(X, y, math.ceil(q["width"]), step=step)
    assert at_width.holds
    assert at_width.quantities["distance"] == pytest.approx(50.8, rel=0.01)
    assert q["informative"] == pytest.approx(2.8e14, rel=0.02)
    assert q["trivial"] == pytest.approx(7.93, abs=0.005)
    wider = mn.certify_width(X, y, 10**20, step=step, antisymmetric=False).quantities
    assert wider["width"] == pytest.approx(q["width"] * (19 + 10) / 0.05 / 19, rel=1e-6)
    with pytest.raises(ValueError, match="rows of equal norm"):
        mn.certify_width(X * torch.arange(1, 21)[:, None], y, 10, step=step)


def test_reasons_of_a_refusal():
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    small_step = mn.safe_step(X)
    top = float(torch.linalg.eigvalsh(first_layer.empirical_gram(X, W0))[0, -1])
    for factor in (1.001, 1.5):
        c = mn.certify(X, y, W0, signs, step=factor / top)
        assert c.reason.startswith(f"step too large: η λ_max = {factor:.3g}")
    assert mn.certify(X, y, W0, signs, step=0.99 / top).holds
    with pytest.warns(UserWarning, match="at least 2"):
        assert mn.certify(X, y, W0, signs, step=2.5 / top).reason.startswith("step too large")
    c = mn.certify(X, y, W0 / 1e6, signs, step=small_step)
    assert c.reason.startswith("too many fragile gates: ε/λ = ")
    assert "certify_after" in c.reason
    assert set(c.quantities) == {"e_0", "trivial"}
    c = mn.certify_after(X, y, W0 / 1e6, signs, W0 / 1e6, step=small_step)
    assert c.reason.startswith("too many fragile gates: ε/λ = ")
    assert set(c.quantities) == {"e_0", "here"}
    double = X.clone()
    double[2] = 3 * X[0]
    assert mn.certify(double, y, W0, signs, step=small_step).reason == "kernel singular: inputs 0, 2"
    assert mn.certify_after(double, y, W0, signs, W0, step=small_step).reason == "kernel singular: inputs 0, 2"
    double[2] = 0
    assert mn.certify(double, y, W0, signs, step=small_step).reason == "kernel singular: inputs 2, 2"
    blind = torch.ones_like(W0)
    plus = X.abs()
    plus[0] *= -1
    for level in ("measured", "certified"):
        c = mn.certify(plus, y, blind, signs, step=mn.safe_step(plus), level=level)
        assert c.reason.startswith("kernel singular: λ = 0")
    # weights at which everything is fine, but w* belongs to a start at which no neuron sees the first input
    for W in (W0, blind):
        c = mn.certify_after(plus, y, blind, signs, W, step=mn.safe_step(plus), level="certified")
        assert c.reason.startswith("kernel singular: λ = 0")


def test_no_q_closes_the_loop():
    # between a certificate that holds and too many fragile gates
    reasons = set()
    for seed in range(40):
        X, y, W0, signs = wide_layer(seed, m=64, kappa=20.0)
        c = mn.certify(X, 0.05 * (1 + seed) * y, W0, signs, step=mn.safe_step(X))
        reasons.add(c.reason.split(":")[0])
        assert ("no Q" in c.reason) == (not c.holds and "fragile" not in c.reason)
    assert reasons == {"", "no Q closes the loop", "too many fragile gates"}


def test_an_ensemble_holds_if_every_network_does():
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0, S=3)
    c = mn.certify(X, y, W0, signs, step=torch.tensor([0.1, 0.05, 0.02], dtype=torch.float64))
    assert c.holds
    assert c.quantities["distance"] == max(m.quantities["distance"] for m in c.members)
    assert c.quantities["rate"] == min(m.quantities["rate"] for m in c.members)
    for s, member in enumerate(c.members):
        alone = mn.certify(X, y, W0[s], signs[s], step=[0.1, 0.05, 0.02][s])
        assert member.quantities == pytest.approx(alone.quantities, rel=1e-9)
    W0[1] /= 1e6
    c = mn.certify(X, y, W0, signs, step=0.1)
    assert not c.holds
    assert c.reason.endswith("(network 1)")
    assert [m.holds for m in c.members] == [True, False, True]


def test_what_says_nothing_is_called_vacuous():
    X, y = sphere_example()
    step = mn.safe_step(X)
    assert "vacuous" in mn.certify_width(X, y, 2 * 10**11, step=step).theorem
    assert "vacuous" not in mn.certify_width(X, y, 3 * 10**14, step=step).theorem
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    for weights, targets in ((W0, y), (W0 / 20, y / 30)):
        c = mn.certify(X, targets, weights, signs, step=mn.safe_step(X))
        if c.holds:
            assert ("vacuous" in c.theorem) == (c.quantities["distance"] >= c.quantities["trivial"])


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_nothing_to_fit_and_tiny_targets_give_numbers(level):
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    for scale in (0.0, 1e-90):
        c = mn.certify(X, scale * y, W0, signs, step=0.1, level=level)
        assert all(math.isfinite(v) for v in c.quantities.values())
        assert not c.holds or c.quantities["trivial"] <= c.quantities["movement"] * (1 + 1e-9)
    c = mn.certify_width(X / data_norms(X), 0 * y, 10**9, step=0.1)
    assert c.quantities["width"] == c.quantities["informative"] == 0


def data_norms(X):
    return torch.linalg.vector_norm(X, dim=1, keepdim=True)


# --- arguments that do not belong together ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_the_solution_of_another_problem_is_refused(level):
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    other, options = mn.initialize(3, 400, kappa=300.0, generator=seeded(9)), {"step": 0.1, "level": level}
    for arguments, name in (((X, y, *other), "W0"), ((2 * X, y, W0, signs), "X"), ((X, 2 * y, W0, signs), "y"),
                            ((X, y, W0, -signs), "signs")):  # fmt: skip
        wrong = mn.solve(*arguments)
        with pytest.raises(ValueError, match=f"solution has another {name};"):
            mn.certify_after(X, y, W0, signs, W0, solution=wrong, **options)
        with pytest.raises(ValueError, match=f"solution has another {name};"):
            mn.train(X, y, W0, signs, 0.1, 2, solution=wrong)
    right = mn.certify_after(X, y, W0, signs, W0, solution=mn.solve(X, y, W0, signs), **options)
    assert right.quantities == mn.certify_after(X, y, W0, signs, W0, **options).quantities


def test_functions_are_bounded_by_a_certificate_of_their_own_that_holds():
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    sol, c = mn.solve(X, y, W0, signs), mn.certify(X, y, W0, signs, step=0.1)
    other = mn.certify(X, y, *mn.initialize(3, 400, kappa=300.0, generator=seeded(9)), step=0.1)
    after = mn.certify_after(X, y, W0, signs, W0, step=0.1)
    silent = mn.certify(X, y, W0 / 1e6, signs, step=0.1)
    width = mn.certify_width(X / data_norms(X), y, 10, step=0.1)
    for wrong, text in ((other, "different data or weights"), (after, "one from certify is needed"),
                        (silent, "certificate is not shown"), (width, "one from certify is needed")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            mn.function_bound(sol, X, wrong)
    for residual in (-1.0, torch.ones(2).double()):
        with pytest.raises(ValueError, match="norms, one or 1, are needed"):
            mn.function_bound(sol, X, c, residual)
    with pytest.raises(ValueError, match="Z has 2 columns"):
        mn.function_bound(sol, X[:, :2], c)


def test_sizes_whose_squares_are_no_floats_are_refused(unchecked):
    X, y, W0, signs = wide_layer(3)
    unit = X / data_norms(X)
    for scale in (1e-200, 1e200, 1e308):
        for name, arguments in {"X": (X * scale, y, W0, signs), "y": (X, y * scale, W0, signs)}.items():
            with pytest.raises(ValueError, match=rf"{name} has entries up to .*rescale it"):
                mn.certify(*arguments, step=0.1)
            with pytest.raises(ValueError, match=rf"{name} has entries up to .*rescale it"):
                mn.certify_width(*((unit * scale, y) if name == "X" else (unit, y * scale)), 10, step=0.1)
    with pytest.raises(ValueError, match="W has entries up to"):
        mn.certify(X, y, W0 * 1e200, signs, step=0.1)
    with pytest.raises(ValueError, match="X is zero"):
        mn.safe_step(0 * X)
    for options in ({"delta": 0.0}, {"delta": 1.0}, {"kappa": 0.0}, {"step": 0.0}):
        with pytest.raises(ValueError, match="0 < delta < 1, the rest positive"):
            mn.certify_width(unit, y, 10, **({"step": 0.1} | options))
    with pytest.raises(ValueError, match="even m for mirrored pairs"):
        mn.certify_width(unit, y, 11, step=0.1)
    assert mn.certify_width(unit, y, 10**30, step=9.0).reason.startswith("η ‖X‖² is ")
    with pytest.raises(ValueError, match=r"y has shape \(4, 1\)"):
        mn.certify_width(unit, y[:, None], 10, step=0.1)
    with pytest.raises(TypeError, match=r"y has dtype torch\.float32"):
        mn.certify_width(unit, y.float(), 10, step=0.1)


@pytest.mark.parametrize("level", ["measured", "certified"])
def test_weights_that_require_grad_and_inference_mode_give_the_same(level):
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    plain = mn.certify(X, y, W0, signs, step=0.1, level=level).quantities
    leaf = W0.clone().requires_grad_()
    assert mn.certify(X, y, leaf, signs, step=0.1, level=level).quantities == plain
    assert not mn.solve(X, y, leaf, signs).W.requires_grad
    with torch.inference_mode():
        assert mn.certify(X, y, leaf, signs, step=0.1, level=level).quantities == plain
