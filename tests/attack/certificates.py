"""Certificates about one network and its data, each against an independent computation in balls of many bits."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import torch
from flint import arb, fmpq
from torch import Tensor, nn

from attack import Arguments, Check, Tally, training
from attack.hostile import (
    FINE,
    balls,
    exactly,
    positive_definite,
    precision,
    rational,
    rational_matrix,
)
from attack.training import BITS, DTYPES, asked, below, generator, inputs
from companion import basins, beyond_ntk, rigor
from companion.networks import Activation

CURVES: dict[str, Callable[[arb], arb]] = {
    "tanh": lambda z: z.tanh(),
    "sigmoid": lambda z: 1 / (1 + (-z).exp()),
    "softplus": lambda z: (1 + z.exp()).log(),
    "sin": lambda z: z.sin(),
    "cos": lambda z: z.cos(),
    "exp": lambda z: z.exp(),
    "gauss": lambda z: (-z * z / 2).exp(),
    "relu": lambda z: z.max(arb(0)),
    "step": lambda z: arb(int(z > 0)),
}


def curved(name: str, Z: np.ndarray) -> np.ndarray:
    return np.vectorize(CURVES[name], otypes=[object])(Z)


# --- A module ---------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}


def draw_module(rng: np.random.Generator) -> Arguments:
    N, d, depth, K = (int(k) for k in rng.integers((1, 1, 1, 1), (5, 4, 4, 4)))
    widths = [d, *(int(w) for w in rng.integers(1, 8, size=depth)), K]
    g, kind = generator(rng), str(rng.choice(["float32", "float64"]))
    dtype = getattr(torch, kind)
    pairs = list(itertools.pairwise(widths))
    scales = 10.0 ** rng.choice([-8, -2, 0, 0, 0, 1, 3], size=len(pairs))
    W = [
        (torch.randn(b, a, generator=g, dtype=torch.float64) * s).to(dtype)
        for (a, b), s in zip(pairs, scales, strict=True)
    ]
    biases = [torch.randn(b, generator=g, dtype=torch.float64).to(dtype) for _, b in pairs]
    if rng.random() < 0.2:
        biases[0] = -10 * biases[0].abs()  # dead neurons
    acts = [str(a) for a in rng.choice(["tanh", "tanh", "sigmoid", "relu"], size=depth)]
    X, loss = inputs(rng, N, d).clamp(-1e37, 1e37).to(dtype), str(rng.choice(["squared", "cross_entropy"]))
    if loss == "squared":
        y = torch.randn(N, K, generator=g, dtype=torch.float64) * 10.0 ** int(rng.choice([-160, -5, 0, 0, 2]))
    else:
        y = torch.from_numpy(rng.integers(0, max(K, 2), size=N))
    return {
        "weights": W, "biases": biases, "acts": acts, "X": X, "y": y, "loss": loss, "t": int(rng.integers(1, 12)),
        "fit": bool(rng.random() < 0.5), "centred": bool(rng.random() < 0.5), "dtype": str(rng.choice(DTYPES)),
    }  # fmt: skip


def module(weights: list[Tensor], biases: list[Tensor], acts: list[str]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for W, b, act in zip(weights, biases, [*acts, ""], strict=True):
        layers.append(nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype))
        layers[-1].weight.data, layers[-1].bias.data = W.clone(), b.clone()
        if act:
            layers.append(LAYERS[act]())
    return nn.Sequential(*layers)


def states(weights: list[Tensor], biases: list[Tensor], acts: list[str], X: Tensor) -> list[np.ndarray]:
    """The exact inputs of all dense layers, and the outputs."""
    F = [balls(X)]
    for W, b, act in zip(weights, biases, [*acts, ""], strict=True):
        Z = F[-1].dot(balls(W).T) + balls(b)
        F.append(curved(act, Z) if act else Z)
    return F


def see_module(
    tally: Tally, weights: list[Tensor], biases: list[Tensor], acts: list[str], X: Tensor, y: Tensor, loss: str, t: int,
    fit: bool, centred: bool, dtype: str,
) -> None:  # fmt: skip
    """E: different inputs of the wide layer. G: the loss and its floor. R: sigma_N, and the loss after t steps."""
    model = module(weights, biases, acts)
    precision(BITS)
    F = states(weights, biases, acts, X)
    if fit and loss == "squared":  # a loss of rounding size
        y = torch.tensor([[float(q.mid()) for q in row] for row in F[-1]], dtype=torch.float64)
        if not bool(torch.isfinite(y).all()):
            return
    for _ in asked(tally, "expressivity", dtype, lambda: beyond_ntk.certify_expressivity(model, X)):
        _see_distinct(tally, weights, biases, acts, X)
    for gap in asked(tally, "gap", dtype, lambda: beyond_ntk.certify_gap(model, X, y, loss=loss)):
        _see_gap(tally, F[-1], X, y, loss, gap.quantities)
    options: dict[str, Any] = {"loss": loss, "steps": t, "centred": centred}
    for rate in asked(tally, "rate", dtype, lambda: beyond_ntk.certify_rate(model, X, y=y, **options)):
        mean, scale = coordinates(model, X) if centred else (0 * balls(weights[-1][0]), arb(1))
        M = np.concatenate([F[-2] - mean, np.full((len(X), 1), scale, dtype=object)], axis=1)
        W, b = balls(weights[-1]).T, balls(biases[-1])
        _see_rate(tally, M, np.concatenate([W, (b + mean.dot(W))[None] / scale]), y, loss, t, rate.quantities)


def coordinates(model: nn.Sequential, X: Tensor) -> tuple[np.ndarray, arb]:
    """The floats that define the centred coordinates: no claim is made of them."""
    h, _ = rigor.enclose(model, X, before=model[-1])
    frame = beyond_ntk.centre(torch.cat([h, h.new_ones(len(h), 1)], dim=1))
    return balls(frame.mean[0]), balls(frame.scale)[0, 0]


def _see_distinct(tally: Tally, weights: list[Tensor], biases: list[Tensor], acts: list[str], X: Tensor) -> None:
    """The inputs of the wide layer differ, and one drawing of that layer has features of rank N."""
    N = len(X)
    for bits in (BITS, 5000):
        precision(bits)
        xi = states(weights, biases, acts, X)[-3]
        apart = [any(bool(a != b) for a, b in zip(xi[i], xi[j], strict=True)) for i in range(N) for j in range(i)]
        if all(apart):
            break
    tally.see("expressivity: inputs of the wide layer differ", all(apart))
    A = torch.randn(*weights[-2].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = curved(
        acts[-1], xi.dot(balls(A / (1 + float(max(abs(float(x.mid())) for x in xi.ravel())))).T) + balls(A[:, 0])
    )
    M = np.concatenate([h, np.full((N, 1), arb(1), dtype=object)], axis=1)
    independent = positive_definite(M.dot(M.T))
    tally.see("expressivity: rank N", independent is not False, independent is True)


def loss_of(Q: np.ndarray, y: Tensor, loss: str) -> arb:
    if loss == "squared":
        R = Q - balls(y)
        return (R * R).sum() / (2 * len(Q))
    total = arb(0)
    for q, label in zip(Q, y.tolist(), strict=True):
        total += sum(((c - q[label]).exp() for c in q), arb(0)).log()
    return total / len(Q)


def floor_of(X: Tensor, y: Tensor, loss: str) -> arb:
    """What equal inputs cost whatever the network: half squared distances to the mean, or an entropy."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, x in enumerate(X.tolist()):
        groups.setdefault(tuple(a + 0.0 for a in x), []).append(i)
    total = arb(0)
    for members in groups.values():
        if loss == "squared":
            part = exactly(y[members])
            mean = part.sum(axis=0) / fmpq(len(members))
            total += arb(((part - mean) ** 2).sum() / 2)
        else:
            for count in Counter(y[members].tolist()).values():
                total -= count * arb(fmpq(count, len(members))).log()
    return total / len(X)


def _see_gap(tally: Tally, Q: np.ndarray, X: Tensor, y: Tensor, loss: str, q: dict[str, Any]) -> None:
    true, floor = loss_of(Q, y, loss), floor_of(X, y, loss)
    below(tally, "gap: loss_lower", q["loss_lower"], true)
    below(tally, "gap: loss_upper", true, q["loss_upper"])
    below(tally, "gap: floor", q["floor"], floor)
    below(tally, "gap: L - inf L", true - floor, q["gap"])


def _see_rate(tally: Tally, M: np.ndarray, V: np.ndarray, y: Tensor, loss: str, t: int, q: dict[str, Any]) -> None:
    square = arb(rational(q["sigma_min"]) ** 2 * (1 - FINE))
    shown = positive_definite(M.dot(M.T) - np.where(np.eye(len(M), dtype=bool), square, arb(0)))
    tally.see("rate: sigma_min", shown is not False, shown is True)
    square = arb(rational(q["sigma_max"]) ** 2 * (1 + FINE))
    shown = positive_definite(np.where(np.eye(len(M), dtype=bool), square, arb(0)) - M.dot(M.T))
    tally.see("rate: sigma_max", shown is not False, shown is True)
    eta, start = arb(q["max_step"]), None
    for _ in range(t):
        Q = M.dot(V)
        if loss == "squared":
            start = loss_of(Q, y, loss) if start is None else start
            R = Q - balls(y)
        else:
            R = curved("exp", Q)
            R = R / R.sum(axis=1)[:, None]
            for i, label in enumerate(y.tolist()):
                R[i, label] -= 1
        V = V - eta * M.T.dot(R) / len(M)
    end = loss_of(M.dot(V), y, loss)
    below(tally, "rate: bound", end, q["bound"])
    if start is not None:
        below(tally, "rate: contraction", end, start * (1 - arb(q["contraction"])) ** t + FINE)


# --- One hidden layer: basins -----------------------------------------------------------------------------------------


def draw_basin(rng: np.random.Generator) -> Arguments:
    N, D, m = (int(k) for k in rng.integers(1, (6, 4, 8)))
    X = inputs(rng, N, D)
    if rng.random() < 0.3:
        X[:, -1] = X[:, 0] * 2
    if rng.random() < 0.3:
        X = torch.cat([X, torch.full((N, 1), float(rng.choice([1.0, 0.3])), dtype=torch.float64)], dim=1)
    return {
        "X": X, "m": m, "act": str(rng.choice([*CURVES, "exp", "sin", "impostor relu"])), "K": int(rng.integers(1, 3)),
        "loss": str(rng.choice(["square", "logistic", "convex", "quasi-convex", "continuous"])),
        "given": bool(rng.random() < 0.7), "bias": bool(rng.random() < 0.3), "dtype": str(rng.choice(DTYPES)),
    }  # fmt: skip


def see_basin(
    tally: Tally, X: Tensor, m: int, act: str, K: int, loss: str, given: bool, bias: bool, dtype: str
) -> None:
    """Theorems P' and T hold only where width, homogeneity, rank or the number of touches says so."""
    sigma = Activation("relu", torch.sin, torch.cos, torch.cos) if act == "impostor relu" else act
    known = X if given else None
    distinct = len({tuple(a + 0.0 for a in x) for x in X.tolist()}) if given else len(X)
    right = act != "step" and (
        m + bias > distinct
        or (m + bias >= distinct and loss != "continuous")
        or act == "relu"
        or (given and _has_ray(X, act))
        or (given and K == 1 and loss in ("square", "logistic", "convex") and m > touches(X, act, distinct, bias))
    )
    shown = asked(tally, "no basin", dtype, lambda: basins.certify_no_basin(
        len(X), m, sigma, loss, known, K=K, output_bias=bias))  # fmt: skip
    tally.see("no basin: width, rank, touches", bool(right) or not shown, bool(shown), f"{[str(c) for c in shown]}")


def _has_ray(X: Tensor, act: str) -> bool:
    """Too few dimensions for the columns of X, or an exponential that can take its factor out of a constant."""
    rank = rational_matrix(X).rank()
    lifted = rational_matrix(torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], dim=1)).rank()
    return rank < X.shape[1] or (act == "exp" and rank == lifted)


def touches(X: Tensor, act: str, distinct: int, bias: bool) -> float:
    """How often a sum of these features can touch zero, if there is one input."""
    if X.shape[1] > 1:
        return math.inf
    if act == "exp":
        return (distinct - 1 - bias) // 2
    if act != "sin" or bias or not X.any():
        return math.inf
    numbers = [abs(Fraction(t)) for t in X[:, 0].tolist() if t]
    unit = Fraction(math.gcd(*(t.numerator for t in numbers)), math.lcm(*(t.denominator for t in numbers)))
    return (max(numbers) / unit - 1) // 2


def draw_rank(rng: np.random.Generator) -> Arguments:
    N, d, depth = (int(k) for k in rng.integers(1, (5, 4, 3)))
    widths = [d, *(int(w) for w in rng.integers(max(1, N - 1), N + 4, size=depth)), 1]
    g = generator(rng)
    scale = 10.0 ** rng.choice([-6, -2, 0, 0, 1])
    W = [torch.randn(a, b, generator=g, dtype=torch.float64) * scale for a, b in itertools.pairwise(widths)]
    if rng.random() < 0.3:
        W[0][:, -1] = W[0][:, 0]
    act = str(rng.choice([a for a in CURVES if a not in ("relu", "step")]))
    return {"X": inputs(rng, N, d).clamp(-20, 20), "weights": W, "act": act, "dtype": str(rng.choice(DTYPES))}


def see_rank(tally: Tally, X: Tensor, weights: list[Tensor], act: str, dtype: str) -> None:
    """Criterion (R): ``sigma_N`` of the features of a network without biases."""
    for shown in asked(tally, "full rank", dtype, lambda: basins.certify_full_rank(weights, X, act)):
        precision(3000 if act == "exp" else 1000)
        H = balls(X)
        for W in weights[:-1]:
            H = curved(act, H.dot(balls(W)))
        square = arb(rational(shown.quantities["sigma_N(H) >="]) ** 2 * (1 - FINE))
        right = positive_definite(H.dot(H.T) - np.where(np.eye(len(H), dtype=bool), square, arb(0)))
        tally.see("full rank: sigma_N", right is not False, right is True)


def draw_minimum(rng: np.random.Generator) -> Arguments | None:
    N, D, m = int(rng.integers(2, 5)), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    act, g = str(rng.choice(["tanh", "sin", "sigmoid", "gauss", "cos"])), generator(rng)
    X = torch.randn(N, D, generator=g, dtype=torch.float64)
    Y = torch.randn(N, 1, generator=g, dtype=torch.float64) * 2
    start = [
        2 * torch.randn(24, D, m, generator=g, dtype=torch.float64),
        torch.randn(24, m, 1, generator=g, dtype=torch.float64),
    ]
    trained = basins.train_lm_newton(start, X, Y, act, iters=60, newton_from=30)
    losses = torch.nan_to_num(trained.loss, nan=math.inf)
    flat, low = trained.gradient < 1e-8, int(losses.argmin())
    found = (flat & (losses > losses[low] * 1.001 + 1e-9)).nonzero()[:, 0].tolist()
    if not found:
        return None
    s = found[int(rng.integers(len(found)))]
    noise = 10.0 ** -int(rng.choice([5, 9, 12, 17, 17, 17]))
    W, V = (T[s] * (1 + noise * torch.randn(T[s].shape, generator=g, dtype=torch.float64)) for T in trained.weights)
    other = [T[low] if rng.random() < 0.9 else T[s] for T in trained.weights]
    return {"X": X, "Y": Y, "W": W, "V": V, "other": other, "act": act, "dtype": str(rng.choice(DTYPES))}


def see_minimum(
    tally: Tally, X: Tensor, Y: Tensor, W: Tensor, V: Tensor, other: list[Tensor], act: str, dtype: str
) -> None:
    """Newton's method in 50 digits stays in the box, the Hessian is positive there, and the competitor lower."""
    shown = asked(tally, "strict minimum", dtype, lambda: basins.certify_strict_minimum(
        [W, V], X, Y, act, competitor=other))  # fmt: skip
    for certificate in shown:
        mpmath.mp.dps = 50
        theta = [mpmath.mpf(x) for x in (*W.T.flatten().tolist(), *V.flatten().tolist())]
        data = X.tolist(), Y[:, 0].tolist(), act, V.shape[0]
        point = _newton(theta, *data)
        reach = certificate.quantities["radius of the box"]
        moved = max(abs(a - b) for a, b in zip(point, theta, strict=True))
        tally.see("strict minimum: critical point in the box", moved <= reach * 1.0000001, what=f"{moved} {reach}")
        hessian = _hessian(point, *data)
        least = min(mpmath.eigsy(hessian, eigvals_only=True))
        tally.see("strict minimum: positive Hessian", least > 0, what=mpmath.nstr(least, 10))
        here = _loss(point, *data)
        there = [mpmath.mpf(x) for x in (*other[0].T.flatten().tolist(), *other[1].flatten().tolist())]
        tally.see("strict minimum: competitor", _loss(there, *data[:3], other[1].shape[0]) < here)
        q = certificate.quantities
        tally.see("strict minimum: L", q["L from"] <= here <= q["L to"] or q["L from"] <= here, what=f"{here}")


_JETS = {
    "tanh": (mpmath.tanh, lambda z: mpmath.sech(z) ** 2),
    "sin": (mpmath.sin, mpmath.cos),
    "cos": (mpmath.cos, lambda z: -mpmath.sin(z)),
    "sigmoid": (lambda z: 1 / (1 + mpmath.exp(-z)), lambda z: mpmath.exp(-z) / (1 + mpmath.exp(-z)) ** 2),
    "gauss": (lambda z: mpmath.exp(-z * z / 2), lambda z: -z * mpmath.exp(-z * z / 2)),
}


def _residual(theta: list[Any], X: list[list[float]], y: list[float], act: str, m: int) -> tuple[list[Any], list[Any]]:
    """Outputs less targets, and the pre-activations."""
    D = len(X[0])
    Z = [[sum(theta[j * D + k] * x[k] for k in range(D)) for j in range(m)] for x in X]
    v = theta[m * D :]
    e = [sum(v[j] * _JETS[act][0](z[j]) for j in range(m)) - t for z, t in zip(Z, y, strict=True)]
    return e, Z


def _loss(theta: list[Any], X: list[list[float]], y: list[float], act: str, m: int) -> Any:
    return sum(e * e for e in _residual(theta, X, y, act, m)[0]) / 2


def _gradient(theta: list[Any], X: list[list[float]], y: list[float], act: str, m: int) -> list[Any]:
    (e, Z), D, v = _residual(theta, X, y, act, m), len(X[0]), theta[m * len(X[0]) :]
    value, slope = _JETS[act]
    inner = [sum(e[n] * v[j] * slope(Z[n][j]) * X[n][k] for n in range(len(X))) for j in range(m) for k in range(D)]
    return inner + [sum(e[n] * value(Z[n][j]) for n in range(len(X))) for j in range(m)]


def _hessian(theta: list[Any], *data: Any) -> Any:
    """Differences of the gradient with a step of 10^-18 in 50 digits."""
    h, p = mpmath.mpf(10) ** -18, len(theta)
    H = mpmath.matrix(p, p)
    for i in range(p):
        up, down = ([t + s * h * (k == i) for k, t in enumerate(theta)] for s in (1, -1))
        for j, (a, b) in enumerate(zip(_gradient(up, *data), _gradient(down, *data), strict=True)):
            H[j, i] = (a - b) / (2 * h)
    return (H + H.T) / 2


def _newton(theta: list[Any], *data: Any) -> list[Any]:
    for _ in range(6):
        step = mpmath.lu_solve(_hessian(theta, *data), mpmath.matrix(_gradient(theta, *data)))
        theta = [t - s for t, s in zip(theta, step, strict=True)]
    return theta


def draw_road(rng: np.random.Generator) -> Arguments:
    N, D = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    m, K, g = N + int(rng.integers(0, 4)), int(rng.integers(1, 3)), generator(rng)
    X = torch.cat([inputs(rng, N, D), torch.ones(N, 1, dtype=torch.float64)], dim=1)
    W = torch.randn(D + 1, m, generator=g, dtype=torch.float64) * float(rng.choice([0.0, 0.3, 1.0, 5.0]))
    if rng.random() < 0.4:
        W[:, m // 2 :] = W[:, :1]
    if rng.random() < 0.3:
        W[-1] -= 50.0  # dead neurons
    V = torch.randn(m, K, generator=g, dtype=torch.float64)
    Y = torch.randn(N, K, generator=g, dtype=torch.float64)
    act = str(rng.choice([a for a in CURVES if a != "exp"]))
    return {
        "X": X,
        "Y": Y,
        "W": W,
        "V": V,
        "act": act,
        "seed": int(rng.integers(100)),
        "dtype": str(rng.choice(DTYPES)),
    }


def see_road(tally: Tally, X: Tensor, Y: Tensor, W: Tensor, V: Tensor, act: str, seed: int, dtype: str) -> None:
    """Along a road, all of whose losses are measured, the loss is constant on A and B, falls on C, and ends as said."""
    made: list[Any] = []

    def ask() -> Any:
        made.append(basins.descent_road([W, V], X, Y, act, seed=seed))
        return made[0].certificate()

    for certificate in asked(tally, "road", dtype, ask):
        precision(200)
        losses, x, y = [], balls(X), balls(Y)
        for (W_0, V_0), (W_1, V_1) in itertools.pairwise(made[0].vertices):
            for k in range(9):
                t = fmpq(k, 8)
                w, v = (balls(exactly(a) * (1 - t) + exactly(b) * t) for a, b in ((W_0, W_1), (V_0, V_1)))
                R = curved(act, x.dot(w)).dot(v) - y
                losses.append((R * R).sum() / 2)
        room = losses[0] * arb("1e-11") + rounding(X, made[0].vertices) * (1 + losses[0])
        for k, (a, b) in enumerate(itertools.pairwise(losses)):
            below(tally, f"road: no rise on {'ABC'[min(k // 9, 2)]}", b, a + room)
        below(tally, "road: end", losses[-1], arb(certificate.quantities["L(end)"]) + room)


def rounding(X: Tensor, vertices: Any) -> float:
    """What ordinary floating point may do to the loss: pre-activations that are large, or cancel, lose digits."""
    size = max(float((X.abs() @ W.abs()).max()) for W, _ in vertices)
    return 1e-14 * (1 + size) * (1 + max(float(V.abs().sum()) for _, V in vertices)) ** 2


CHECKS = {
    **training.CHECKS,
    "module": Check(draw_module, see_module),
    "no-basin": Check(draw_basin, see_basin),
    "full-rank": Check(draw_rank, see_rank),
    "minimum": Check(draw_minimum, see_minimum),
    "road": Check(draw_road, see_road),
}
