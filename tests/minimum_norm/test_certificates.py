"""Lesson 4's certificates against what descent does, against plain loops, and against exact arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import sphere_example, wide_layer

from companion import data
from companion import minimum_norm as mn
from companion.minimum_norm import first_layer


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    kappa=st.sampled_from([30.0, 100.0, 1000.0]),
    reference=st.sampled_from(["gate", "midpoint"]),
    kinks=st.integers(0, 4),
    antisymmetric=st.booleans(),
)
def test_everything_that_a_certificate_says_happens(seed, kappa, reference, kinks, antisymmetric):
    X, y, W0, signs = wide_layer(seed, kappa=kappa, kinks=kinks, antisymmetric=antisymmetric)
    step = mn.safe_step(X)
    y = y if antisymmetric else y + first_layer.forward(X, W0, signs)[0]
    c = mn.certify(X, y, W0, signs, step=step, reference=reference)
    if not c.holds:
        assert c.reason.split(":")[0] in ("too many fragile gates", "no Q closes the loop")
        return
    q, sol = c.quantities, mn.solve(X, y, W0, signs)
    assert q["trivial"] == pytest.approx(float(sol.norm2.sqrt()))
    tau = torch.linalg.vector_norm(X @ X.T, dim=1) * q["Q_star"] / math.sqrt(W0.shape[2])
    Z = data.sphere(5, 3, torch.Generator().manual_seed(seed + 1))
    floor = 1e-14 * math.sqrt(W0.shape[2]) * float((X @ W0).abs().max())
    W, path = W0.clone(), 0.0
    for k in range(200):
        e = y - first_layer.forward(X, W, signs)
        norm = float(e.norm())
        path += step * norm
        assert norm <= (1 - q["rate"]) ** k * q["e_0"] + floor * 100
        if k % 20 == 0:
            terms = mn.lyapunov_terms(sol, W, step)
            assert bool(((X @ (W - W0))[0].abs().amax(1) <= tau * (1 + 1e-9) + floor).all())
            assert float(terms.V_perp.sqrt()) <= q["perp"] + floor
            assert float(terms.V_parallel.clamp_min(0).sqrt()) <= q["parallel"] + norm / q_lambda0(X, W0) + floor
            assert float(terms.b) <= q["b"] + floor
            assert float((W - W0).norm()) <= q["movement"] + floor
            bound = mn.function_bound(sol, Z, torch.tensor([q["Q_star"]], dtype=torch.float64), norm)
            error = (first_layer.forward(Z, W, signs) - sol.predict(Z)).abs()
            assert bool((error <= bound + floor).all())
        W = W + step * first_layer.pull_back(X, W, signs, e)
    assert path <= q["Q_star"] * (1 + 1e-9)


def q_lambda0(X, W0):
    return float(torch.linalg.eigvalsh(first_layer.empirical_gram(X, W0))[0, 0]) ** 0.5


def test_certificates_close_here_and_the_certified_one_is_weaker():
    X, y, W0, signs = wide_layer(3, m=400, kappa=300.0)
    step, found = 0.9 * mn.safe_step(X), {}
    for reference in ("gate", "midpoint"):
        for level in ("measured", "certified"):
            c = found[reference, level] = mn.certify(X, y, W0, signs, step=step, reference=reference, level=level)
            assert c.holds, c
            assert c.status == level
        weak, plain = found[reference, "certified"].quantities, found[reference, "measured"].quantities
        assert weak["Q_star"] >= plain["Q_star"]
        assert weak["rate"] <= plain["rate"]
        assert weak["distance"] >= plain["distance"]
    assert found["midpoint", "measured"].quantities["Q_star"] <= found["gate", "measured"].quantities["Q_star"] * 1.001


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
            assert float(later.residual[-1, s]) <= (1 - q["rate"]) ** 1500 * q["e_0"] + 1e-9


def test_the_explicit_width_of_the_example():
    X, y = sphere_example()
    step = mn.safe_step(X)
    c = mn.certify_width(X, y, 10**6, step=step)
    assert not c.holds
    assert c.reason.startswith("m is below")
    q = c.quantities
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
    assert mn.certify(X, y, W0, signs, step=1.5 / top).reason.startswith("step too large: η λ_max = 1.5")
    with pytest.warns(UserWarning, match="at least 2"):
        assert mn.certify(X, y, W0, signs, step=2.5 / top).reason.startswith("step too large")
    assert mn.certify(X, y, W0 / 1e6, signs, step=small_step).reason.startswith("too many fragile gates: ε/λ = ")
    double = X.clone()
    double[2] = 3 * X[0]
    assert mn.certify(double, y, W0, signs, step=small_step).reason == "kernel singular: inputs 0, 2"
    assert mn.certify_after(double, y, W0, signs, W0, step=small_step).reason == "kernel singular: inputs 0, 2"
    blind = torch.ones_like(W0)
    plus = X.abs()
    plus[0] *= -1
    assert mn.certify(plus, y, blind, signs, step=mn.safe_step(plus)).reason.startswith("kernel singular: λ = 0")
