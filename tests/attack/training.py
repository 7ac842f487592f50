"""Certificates that promise something of gradient descent, against gradient descent in balls of many bits."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import flint
import numpy as np
import torch
from flint import arb, fmpq
from torch import Tensor

from attack import Arguments, Check, Tally, setting
from attack.hostile import (
    FINE,
    balls,
    exactly,
    norm_at_most,
    positive_definite,
    precision,
    rational,
    sigma_min_at_least,
    surely_above,
)
from companion import mean_field, minimum_norm, width_bounds
from companion.certificate import Certificate

DTYPES = ("float16", "float32", "float64")
BITS = 320


def generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def asked(tally: Tally, name: str, dtype: str, ask: Callable[[], Certificate]) -> list[Certificate]:
    """The certificates of all networks, if all of them hold; a ValueError is a refusal, and counts as not holding.

    What stands in front of an ensemble must be true of every member: no step larger than any of theirs, no faster rate.
    """
    with setting(dtype=dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            front = ask()
        except ValueError:
            tally.see(f"{name}: held", True, False)
            return []
    tally.see(f"{name}: held", True, front.holds)
    if not front.holds:
        return []
    for member in front.members:
        tally.see(f"{name}: front holds for all", member.holds, what=member.reason)
        for key, value in front.quantities.items():
            if key.startswith("max_") or key == "rate":
                tally.see(f"{name}: front's {key}", value <= member.quantities[key], what=f"{value}")
    return list(front.members or (front,))


def below(tally: Tally, name: str, small: Any, large: Any) -> None:
    """One comparison ``small <= large`` of exact numbers, balls or floats, which is false only if it surely is."""
    tally.see(name, not surely_above(small, large), what=f"{_shown(small)} > {_shown(large)}")


def _shown(x: Any) -> str:
    return x.str(20) if isinstance(x, arb) else str(float(x)) if isinstance(x, float) else str(x)[:60]


def inputs(rng: np.random.Generator, N: int, d: int) -> Tensor:
    """Rows that are ordinary, nearly parallel, opposite, equal, of different size, or full of ties."""
    X = torch.randn(N, d, generator=generator(rng), dtype=torch.float64)
    kind = str(rng.choice(["plain", "plain", "near", "opposite", "rows", "integers", "equal", "scaled", "extreme"]))
    if kind == "near" and N > 1:
        X[-1] = X[0] * float(rng.choice([1, 2.5])) + 10.0 ** -int(rng.integers(1, 12)) * X[-1]
    if kind == "opposite" and N > 1:
        X[-1] = -X[0] * float(rng.choice([1, 3.0]))
    if kind == "rows":
        X *= torch.from_numpy(10.0 ** rng.integers(-2, 3, size=(N, 1)))
    if kind == "integers":
        X = (2 * X).round()
    if kind == "equal" and N > 1:
        X[-1] = X[0]
    if kind == "scaled":
        X *= 10.0 ** int(rng.integers(-8, 9))
    if kind == "extreme" and rng.random() < 0.5:
        X *= 10.0 ** int(rng.choice([-300, -200, -160, 100, 150, 155, 200, 300]))
    return X


# --- Theorem C --------------------------------------------------------------------------------------------------------


def draw_theorem_c(rng: np.random.Generator) -> Arguments:
    N, d, L, S = (int(k) for k in rng.integers((1, 2, 2, 1), (4, 4, 4, 3)))
    widths = [d, *(int(w) for w in rng.integers(N, N + 10, size=L - 1)), int(rng.integers(1, 3))]
    g = generator(rng)
    weights = [torch.randn(S, a, b, generator=g, dtype=torch.float64) / a**0.5 for a, b in itertools.pairwise(widths)]
    weights[-1] *= 0.0 if rng.random() < 0.6 else 10.0 ** -int(rng.integers(0, 9))
    for s in range(S):
        weights[-2][s] *= 10.0 ** rng.uniform(0, 5)
    if rng.random() < 0.2:
        weights[0][:, :, 0] = -weights[0][:, :, 0].abs()  # a neuron that may be dead
    if rng.random() < 0.2:
        weights[0] = (4 * weights[0]).round() / 4
    Y = torch.randn(N, widths[-1], generator=g, dtype=torch.float64) * 10.0 ** int(rng.integers(-8, 2))
    epsilon = float(rng.choice([0.25, 0.25, 0.02, 0.9, rng.random()]))
    return {
        "X": inputs(rng, N, d), "Y": Y, "weights": weights, "epsilon": epsilon, "auto": bool(rng.random() < 0.2),
        "share": float(rng.choice([1.0, 1.0, 0.5, 0.01])), "dtype": str(rng.choice(DTYPES)),
    }  # fmt: skip


def see_theorem_c(
    tally: Tally, X: Tensor, Y: Tensor, weights: list[Tensor], epsilon: float, auto: bool, share: float, dtype: str
) -> None:
    """Theorem C's inequalities from the true spectra, and gradient descent below its curve and inside its radii."""
    name = "Theorem C"
    members = asked(tally, name, dtype, lambda: width_bounds.certify(
        X, Y, weights, epsilon="auto" if auto else epsilon, level="certified"))  # fmt: skip
    precision(BITS)
    for s, member in enumerate(members):
        q, stored = member.quantities, [W[s] for W in weights]
        features = [exactly(X)]
        for W in stored[:-1]:
            features.append(np.maximum(features[-1].dot(exactly(W)), fmpq(0)))
        residual = features[-1].dot(exactly(stored[-1])) - exactly(Y)
        R_0 = arb((residual * residual).sum()).sqrt()
        alpha_0 = sigma_min_at_least(features[-1], q["alpha_0"])
        tally.see(f"{name}: alpha_0", bool(alpha_0), what=f"{q['alpha_0']}")
        below(tally, f"{name}: R_0", R_0, q["R_0"])
        tally.see(f"{name}: phi", bool(norm_at_most(features[-1], q["phi"])))
        _inequalities(tally, stored, features, q, R_0)
        _descent(tally, X, Y, stored, q, share, R_0)


def spectral(A: np.ndarray) -> arb:
    """A ball around ``||A||_2`` of an exact array: bisection, each step a proof by minors."""
    low, high = 0.0, float((arb((A * A).sum()).sqrt()).upper()) * (1 + 1e-12)
    for _ in range(44):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if norm_at_most(A, middle) else (middle, high)
    return (arb(low) + arb(high)) / 2 + arb(0, (high - low) * 0.5000001)


def _inequalities(tally: Tally, weights: list[Tensor], features: list[np.ndarray], q: dict[str, Any], R_0: arb) -> None:
    """``alpha, rho > 0`` and ``T_l(C) <= C_l`` with the true spectra, from lesson 1's text."""
    C = [arb(c) for c in q["radii"]]
    bar = [spectral(exactly(W)) + c for W, c in zip(weights, C, strict=True)]
    phi, d = [spectral(features[0])], arb(0)
    for layer in range(len(C) - 1):
        d = d * bar[layer] + spectral(features[layer]) * C[layer]
        phi.append(spectral(features[layer + 1]) + d)
    alpha, g = arb(q["alpha_0"]) - d, []
    for layer in range(len(C) - 1):
        product = phi[layer]
        for factor in bar[layer + 1 :]:
            product *= factor
        g.append(product)
    rho = (1 - arb(q["epsilon"])) * alpha**2 - sum((x**2 for x in g), arb(0))
    below(tally, "Theorem C: alpha", q["alpha"], alpha)
    below(tally, "Theorem C: rho", q["rho"], rho)
    below(tally, "Theorem C: max_step", q["max_step"], 2 * arb(q["epsilon"]) / phi[-1] ** 2)
    for radius, factor in zip(C, (*g, alpha), strict=True):
        below(tally, "Theorem C: T <= C", factor * R_0 / rho, radius)


def _descent(
    tally: Tally, X: Tensor, Y: Tensor, weights: list[Tensor], q: dict[str, Any], share: float, R_0: arb
) -> None:
    eta = q["max_step"] * share
    step, rate = arb(eta), 1 - arb(eta) * arb(q["rho"])
    start = [balls(W) for W in weights]
    W, x, y, bound = [w.copy() for w in start], balls(X), balls(Y), R_0
    for _ in range(8):
        F, gates = [x], []
        for w in W[:-1]:
            Z = F[-1].dot(w)
            gates.append(np.vectorize(lambda z: arb(int(z > 0)), otypes=[object])(Z))
            F.append(Z * gates[-1])
        R = F[-1].dot(W[-1]) - y
        below(tally, "Theorem C: residual", (R * R).sum().sqrt(), bound)
        back, moves = R, []
        for layer in reversed(range(len(W))):
            moves.insert(0, F[layer].T.dot(back))
            back = back.dot(W[layer].T) * gates[layer - 1] if layer else back
        W = [w - step * move for w, move in zip(W, moves, strict=True)]
        bound = bound * rate
    for w, w_0, radius in zip(W, start, q["radii"], strict=True):
        below(tally, "Theorem C: radii", ((w - w_0) ** 2).sum().sqrt(), radius)


# --- The counting theorem ---------------------------------------------------------------------------------------------


def draw_counting(rng: np.random.Generator) -> Arguments | None:
    N, d, S = (int(k) for k in rng.integers(1, (4, 4, 3)))
    m = int(rng.choice([2, 4, 8, 16, 24]))
    if m * d < N:
        return None
    X, g = inputs(rng, N, d), generator(rng)
    W, signs = minimum_norm.initialize(
        d, m, kappa=10.0 ** int(rng.integers(0, 5)), antisymmetric=bool(rng.random() < 0.5), S=S, generator=g
    )
    if rng.random() < 0.2:
        W, X = W.round(), (X * 2).round() / 2
        W[:, :, 0] = 0
    elif X.any(1).all() and float(X.abs().max()) < 100:
        for _ in range(int(rng.integers(0, 3))):  # gates near their edge
            x, k = X[rng.integers(N)], int(rng.integers(m))
            W[0, :, k] += (float(rng.normal()) * 10.0 ** -int(rng.integers(0, 4)) - W[0, :, k] @ x) / (x @ x) * x
    outputs = torch.relu(X @ W) @ signs[:, :, None] / m**0.5
    y = outputs[:, :, 0] + 10.0 ** int(rng.choice([-8, -3, -1, 0])) * torch.randn(
        S, N, generator=g, dtype=torch.float64
    )
    largest = float((X @ X.T).diagonal().sum())
    step = float(rng.choice([0.1, 0.5, 0.9, 0.999, 1.5])) / largest if 0 < largest < math.inf else 1.0
    return {
        "X": X, "y": y, "W": W, "signs": signs, "step": step, "reference": str(rng.choice(["gate", "midpoint"])),
        "later": bool(rng.random() < 0.25), "tight": bool(rng.random() < 0.3), "dtype": str(rng.choice(DTYPES)),
    }  # fmt: skip


def see_counting(
    tally: Tally, X: Tensor, y: Tensor, W: Tensor, signs: Tensor, step: float, reference: str, later: bool, tight: bool,
    dtype: str,
) -> None:  # fmt: skip
    """The counting theorem, before training or from weights nearby, against 40 steps in balls."""
    if tight:  # the largest step that is allowed, to the last bit
        step = step_at_edge(X, W, step)
    options: dict[str, Any] = {"step": step, "reference": reference, "level": "certified"}
    start, name = W, "counting theorem"
    if later:
        start, name = W * (1 + 2.0**-20), "counting theorem, after"
        members = asked(tally, name, dtype, lambda: minimum_norm.certify_after(X, y, W, signs, start, **options))
    else:
        members = asked(tally, name, dtype, lambda: minimum_norm.certify(X, y, W, signs, **options))
    precision(BITS)
    for s, member in enumerate(members):
        problem = _Layer(X, y[s], W[s], signs[s])
        _kernel_rows(tally, name, member, problem.gram(start[s]), step, reference)
        _follow(tally, name, problem, balls(start[s]), member.quantities, step)


def step_at_edge(X: Tensor, W: Tensor, step: float) -> float:
    """``1 / lambda_max(G_0)`` of the first network as floats have it: half of the times it is too large."""
    gates = (X @ W[0] > 0).double()
    gram = (X @ X.T) * (gates @ gates.T) / W.shape[2]
    top = float(torch.linalg.eigvalsh(gram)[-1]) if bool(torch.isfinite(gram).all()) else 0.0
    return 1 / top if top > 0 else step


def _kernel_rows(tally: Tally, name: str, member: Certificate, G: np.ndarray, step: float, reference: str) -> None:
    """The rows on the spectrum of the kernel, in exact rationals."""
    for row in member.assumptions:
        if row.name.startswith("λ = λ_min(G"):
            M = G - _identity(rational(row.measured) * (1 - FINE), len(G))
            tally.see(f"{name}: lambda_min", bool(positive_definite(M)), what=f"{row.measured}")
        if row.name.startswith("η λ_max") and reference == "gate":
            M = _identity((1 + FINE) / rational(step), len(G)) - G
            tally.see(f"{name}: eta lambda_max <= 1", bool(positive_definite(M)), what=f"{row.measured}")


def _identity(value: fmpq, n: int) -> np.ndarray:
    return np.where(np.eye(n, dtype=bool), value, fmpq(0))


class _Layer:
    """A wide layer with fixed signs in balls, and the minimum-norm solution that belongs to its initial weights."""

    def __init__(self, X: Tensor, y: Tensor, W0: Tensor, signs: Tensor) -> None:
        self.exact, self.m = exactly(X), len(signs)
        self.X, self.y = balls(X), balls(y)
        self.signs, self.W0 = balls(signs), balls(W0)
        self.a = self.signs / arb(self.m).sqrt()
        self.A0 = self.gates(self.W0)
        self.star = None
        G = self.gram(W0)
        if positive_definite(G):
            c = flint.fmpq_mat([list(row) for row in G])
            self.factor = np.array([[arb(c.inv()[i, j]) for j in range(len(G))] for i in range(len(G))], dtype=object)
            self.star = self.W0 + self.pull(self.factor.dot(self.residual(self.W0)), self.A0)

    def gram(self, W: Tensor) -> np.ndarray:
        """The kernel at weights that are floats, in rationals."""
        A = np.where(self.exact.dot(exactly(W)) > fmpq(0), fmpq(1), fmpq(0))
        return self.exact.dot(self.exact.T) * A.dot(A.T) / fmpq(self.m)

    def gates(self, W: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda z: arb(int(z > 0)), otypes=[object])(self.X.dot(W))

    def tangent(self, A: np.ndarray, V: np.ndarray) -> np.ndarray:
        return (self.X.dot(V) * A).dot(self.a)

    def residual(self, W: np.ndarray) -> np.ndarray:
        return self.y - self.tangent(self.gates(W), W)

    def pull(self, c: np.ndarray, A: np.ndarray) -> np.ndarray:
        return self.X.T.dot(A * c[:, None]) * self.a

    def parallel(self, V: np.ndarray) -> np.ndarray:
        """The part of V in the row space of the initial Jacobian."""
        return self.pull(self.factor.dot(self.tangent(self.A0, V)), self.A0)


def _norm(v: np.ndarray) -> arb:
    return (v * v).sum().sqrt()


def _follow(tally: Tally, name: str, net: _Layer, W: np.ndarray, q: dict[str, Any], step: float) -> None:
    """40 steps of gradient descent; what is left of the path afterwards is bounded by the rate."""
    start, eta, length = W, arb(step), arb(0)
    first = _norm(net.residual(W))
    bound, rate = first, 1 - arb(q["rate"])
    below(tally, f"{name}: e_0", first, q["e_0"])
    for k in range(41):
        A, e = net.gates(W), net.residual(W)
        size = _norm(e)
        length += eta * size
        below(tally, f"{name}: rate", size, bound + FINE * first)
        if k % 10 == 0 and net.star is not None:
            away = W - net.star
            if "perp" in q:
                below(tally, f"{name}: perp", _norm(away - net.parallel(away)), q["perp"])
            if "b" in q:
                below(tally, f"{name}: b", _norm(net.y - net.tangent(A, net.star)), q["b"])
            below(tally, f"{name}: movement", _norm(W - start), q["movement"])
        W, bound = W + eta * net.pull(e, A), bound * rate
    below(tally, f"{name}: Q_star", length, q["Q_star"])
    rest = arb(q["movement"]) * size / arb(q["Q_star"] * (q["lambda"] - q["epsilon"]))  # ||X|| ||e|| / (lambda - eps)
    if net.star is not None and "distance" in q:
        away = W - net.star
        below(tally, f"{name}: distance", _norm(away), arb(q["distance"]) + rest)
        below(tally, f"{name}: parallel", _norm(net.parallel(away)), arb(q["parallel"]) + rest)


# --- Zero loss of a mean-field net ------------------------------------------------------------------------------------


def draw_zero_loss(rng: np.random.Generator) -> Arguments:
    n, d, L, M, S = (int(k) for k in rng.integers(1, (3, 3, 3, 4, 3)))
    g = generator(rng)
    theta = torch.randn(S, L, M, 2 * d + 1, generator=g, dtype=torch.float64) * 10.0 ** rng.uniform(-1, 0.3)
    X, v = inputs(rng, n, d).clamp(-3, 3), torch.randn(d, generator=g, dtype=torch.float64)
    block = mean_field.TanhMLP(d)
    out = mean_field.forward(block, theta[:1], X)[-1, 0] @ v
    y = out + 10.0 ** -int(rng.integers(1, 10)) * torch.randn(n, generator=g, dtype=torch.float64)
    flow = bool(rng.random() < 0.3)
    near = theta[:1] + (theta - theta[:1]) * 10.0 ** -int(rng.integers(2, 12))
    return {
        "theta": near if rng.random() < 0.8 else theta, "X": X, "y": y, "v": v,
        "step": None if flow else float(n * 10.0 ** rng.uniform(-4, 0)), "local": bool(rng.random() < 0.5),
        "dtype": str(rng.choice(DTYPES)),
    }  # fmt: skip


def see_zero_loss(
    tally: Tally, theta: Tensor, X: Tensor, y: Tensor, v: Tensor, step: float | None, local: bool, dtype: str
) -> None:
    """The rate of the loss over a few steps, and for the flow the decrease that it needs, at the start and nearby."""
    name, block = "zero loss", mean_field.TanhMLP(X.shape[1])
    options: dict[str, Any] = {"constants": "local" if local else "uniform", "level": "certified"}
    members = asked(
        tally, name, dtype, lambda: mean_field.certify_zero_loss(block, theta, X, y, v, step=step, **options)
    )
    precision(BITS)
    data, n = (balls(X), balls(y), balls(v)), len(X)
    for s, member in enumerate(members):
        q, at = member.quantities, balls(theta[s])
        start, scale = at, arb(at.shape[0] * at.shape[1])
        energy = _energy(at, *data)
        below(tally, f"{name}: E_0", energy, q["E_0"])
        bound = energy
        for _ in range(4):
            energy, slope = _energy(at, *data), _slope(at, *data)
            decrease = scale * (slope * slope).sum()
            below(tally, f"{name}: movement", ((at - start) ** 2).sum().sqrt() / scale.sqrt(), q["movement"])
            below(tally, f"{name}: lambda", arb(q["lambda"]) * 2 * energy / n / 4, decrease * (1 + FINE))
            if step is None:
                below(tally, f"{name}: rate of the flow", arb(q["rate"]) * energy, decrease * (1 + FINE))
                at = at - arb(1e-3 / q["beta"] ** 2) * scale * slope
            else:
                below(tally, f"{name}: rate", energy, bound * (1 + FINE))
                at, bound = at - arb(step) * scale * slope, bound * (1 - arb(q["rate"]))


def _energy(theta: np.ndarray, X: np.ndarray, y: np.ndarray, v: np.ndarray) -> arb:
    """``(1/2n) sum (v.z_L - y)^2`` of a net of tanh blocks with equal weights."""
    d, z = X.shape[1], X
    for layer in theta:
        u, a, b = layer[:, :d], layer[:, d : 2 * d], layer[:, 2 * d]
        h = np.vectorize(lambda t: t.tanh(), otypes=[object])(z.dot(a.T) + b)
        z = z + h.dot(u) / arb(theta.shape[0] * theta.shape[1])
    r = z.dot(v) - y
    return (r * r).sum() / (2 * len(y))


def _slope(theta: np.ndarray, *data: np.ndarray) -> np.ndarray:
    """The gradient by central differences, whose error, about 2^-170, is nothing here."""
    out, h = np.empty_like(theta), arb(2) ** -90
    for index in np.ndindex(*theta.shape):
        sides = []
        for sign in (1, -1):
            moved = theta.copy()
            moved[index] = moved[index] + sign * h
            sides.append(_energy(moved, *data))
        out[index] = ((sides[0] - sides[1]) / (2 * h)).mid()
    return out


CHECKS = {
    "theorem-c": Check(draw_theorem_c, see_theorem_c),
    "counting": Check(draw_counting, see_counting),
    "zero-loss": Check(draw_zero_loss, see_zero_loss),
}
