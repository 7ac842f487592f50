"""All bounds of `companion.rigor`, against exact rationals, and against balls where a function is not rational."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flint import arb, fmpq
from torch import Tensor

from attack import Arguments, Check, Tally, setting
from attack.hostile import (
    FINE,
    balls,
    exactly,
    norm_at_most,
    numbers,
    positive_definite,
    precision,
    rational,
    rational_matrix,
    sigma_min_at_least,
    surely_above,
    tame,
)
from companion import rigor
from companion.rigor import balls as layers
from companion.rigor import formulas, rationals

SHAPES = ((1, 1), (1, 2), (2, 1), (1, 5), (5, 1), (2, 2), (2, 3), (3, 3), (3, 2), (2, 6), (4, 4), (3, 12), (6, 9))
ENTRIES = 96  # of one batch of intervals


def _flush(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.15)


# --- Matrices ---------------------------------------------------------------------------------------------------------


def draw_matrix(rng: np.random.Generator) -> Arguments:
    A = numbers(rng, *SHAPES[rng.integers(len(SHAPES))])
    return {"A": A, "method": str(rng.choice(["auto", "shift", "inverse"])), "flush": _flush(rng)}


def see_matrix(tally: Tally, A: Tensor, method: str, flush: bool) -> None:
    """Norms, ranks and the smallest singular value of one matrix."""
    n, m = A.shape
    with setting(flush):
        spectral, frobenius = rigor.spectral_norm_upper(A), rigor.frobenius_norm_upper(A)
        sigma = rigor.sigma_min_lower(A, method=method) if n <= m else 0.0
        measured, rows = rigor.spectral_norm(A), rigor.norm(rigor.point(A))
        rank = rigor.exact_rank(A)
        beyond = rigor.exact_sigma_min_exceeds(A, sigma * (1 - 1e-12)) if sigma > 0 and n <= 3 else None
    Q = exactly(A)
    squares = Q * Q
    finite = math.isfinite(spectral)
    tally.see("spectral_norm_upper", bool(norm_at_most(Q, spectral)) or not A.any() if finite else spectral > 0, finite)
    finite, square = math.isfinite(frobenius), squares.sum()
    tally.see("frobenius_norm_upper", rational(frobenius) ** 2 >= square if finite else frobenius > 0, finite)
    told = sigma > 0
    tally.see("sigma_min_lower", bool(sigma_min_at_least(Q, sigma)) if told else sigma == 0, told, f"{method} {sigma}")
    if beyond is not None:
        tally.see("exact_sigma_min_exceeds", beyond)
    tally.see("exact_rank", rank == rational_matrix(A).rank(), what=f"{rank}")
    fine = 1e-290 < frobenius < 1e300
    least = rational(float(measured)) ** 2 <= square * (1 + fmpq(1, 10**12)) if fine else True
    low = norm_at_most(Q, float(measured) * (1 + 1e-7)) if fine else True
    tally.see("spectral_norm, measured", bool(low) and least, fine, f"{float(measured)}")
    for i, (low, high) in enumerate(zip(rows.lo.tolist(), rows.hi.tolist(), strict=True)):
        s = squares[i].sum()
        right = rational(low) ** 2 <= s and (math.isinf(high) or rational(high) ** 2 >= s)
        tally.see("norm of an interval", right, math.isfinite(high), f"row {i}: {low} {high}")


def draw_product(rng: np.random.Generator) -> Arguments:
    n, k, m = (int(x) for x in rng.integers(1, (5, 9, 5)))
    return {"A": numbers(rng, n, k), "B": numbers(rng, k, m), "flush": _flush(rng)}


def see_product(tally: Tally, A: Tensor, B: Tensor, flush: bool) -> None:
    with setting(flush):
        radius, error, C = rigor.product_radius(A, B), rigor.product_error(A, B), A @ B
    truth = exactly(A).dot(exactly(B))
    total = fmpq(0)
    for c, r, t in zip(C.flatten().tolist(), radius.flatten().tolist(), truth.ravel(), strict=True):
        if not math.isfinite(r):
            tally.see("product_radius", r > 0, False)
            total = None
            continue
        off = abs(rational(c) - t) if math.isfinite(c) else None
        tally.see("product_radius", off is not None and off <= rational(r), what=f"{c} {r}")
        total = None if total is None or off is None else total + off * off
    if total is not None and math.isfinite(error):
        tally.see("product_error", rational(error) ** 2 >= total, what=f"{error}")


def draw_symmetric(rng: np.random.Generator) -> Arguments:
    n = int(rng.integers(1, 6))
    A = numbers(
        rng, n, n + int(rng.integers(3)), kind=str(rng.choice(["normal", "near", "identity", "hilbert", "rows"]))
    )
    A = tame(A) * 2.0 ** int(rng.integers(-300, 300)) if rng.random() < 0.3 else tame(A)
    size = float((A @ A.T).abs().max())
    radius = torch.from_numpy(rng.random((n, n))) * size * 10.0 ** int(rng.integers(-18, -2))
    radius = torch.zeros(n, n, dtype=torch.float64) if rng.random() < 0.3 else radius
    signs = torch.from_numpy(rng.integers(-1, 2, size=(n, n)))
    return {"G": A @ A.T, "radius": radius, "signs": signs, "flush": _flush(rng)}


def see_symmetric(tally: Tally, G: Tensor, radius: Tensor, signs: Tensor, flush: bool) -> None:
    """`eig_min_lower` at a corner of the ball of matrices."""
    if not bool(torch.isfinite(G).all() and torch.isfinite(radius).all()):
        return
    with setting(flush):
        bound = rigor.eig_min_lower(G, radius)
    G, radius, signs = (T.tril() + T.tril(-1).T for T in (G, radius, signs))
    if not bound > 0:
        return tally.see("eig_min_lower", bound == 0, False)
    M = exactly(G) + exactly(radius) * exactly(signs.double())
    for i in range(len(M)):
        M[i, i] -= rational(bound) * (1 - FINE)
    return tally.see("eig_min_lower", bool(positive_definite(M)), what=f"{bound}")


# --- Balls ------------------------------------------------------------------------------------------------------------


def _ball(rng: np.random.Generator, *shape: int) -> Arguments:
    """A ball, and a corner or the middle of it."""
    value = numbers(rng, *shape)
    radius = value.abs() * torch.from_numpy(10.0 ** rng.integers(-17, 1, size=shape) * (rng.random(shape) < 0.7))
    radius = torch.where(torch.isfinite(radius), radius, 0.0)
    return {"value": value, "radius": radius, "signs": torch.from_numpy(rng.integers(-1, 2, size=shape))}


def inside(tally: Tally, name: str, ball: layers.Ball, truth: np.ndarray) -> None:
    """Whether the true values are in a ball; a value that is not finite says nothing."""
    value, radius = ball
    if tuple(value.shape) != truth.shape:
        return tally.see(name, False, what=f"shape {tuple(value.shape)}, not {truth.shape}")
    for c, r, t in zip(value.flatten().tolist(), radius.flatten().tolist(), truth.ravel(), strict=True):
        finite = math.isfinite(c) and math.isfinite(r)
        right = not finite or not surely_above(abs(rational(c) - t), rational(r))
        tally.see(name, right, finite, f"{c} {r}")
    return None


def _point(value: Tensor, radius: Tensor, signs: Tensor) -> np.ndarray:
    return exactly(value) + exactly(radius) * exactly(signs.double())


def draw_layer(rng: np.random.Generator) -> Arguments:
    N, p, m = (int(x) for x in rng.integers(1, (5, 7, 5)))
    more = {"weight": numbers(rng, m, p), "bias": tame(numbers(rng, m), 1e3), "other": numbers(rng, N, p)}
    more |= {
        "mean": tame(numbers(rng, p), 1e100),
        "var": torch.from_numpy(rng.random(p) * 10.0 ** rng.integers(-300, 3)),
    }
    more |= {"gain": tame(numbers(rng, p), 1e3), "eps": float(rng.choice([1e-5, 0.0, 1e-300])), "flush": _flush(rng)}
    return _ball(rng, N, p) | more


def see_layer(
    tally: Tally, value: Tensor, radius: Tensor, signs: Tensor, weight: Tensor, bias: Tensor, other: Tensor,
    mean: Tensor, var: Tensor, gain: Tensor, eps: float, flush: bool,
) -> None:  # fmt: skip
    """Dense layers, sums, ReLU and BatchNorm."""
    small = value.abs().max() < 1e100 and bool((var + eps > 2e-308).all())
    with setting(flush):
        dense, sums = layers.dense_ball(value, radius, weight, bias), layers.add_ball(value, radius, other, radius)
        relu = layers.relu_ball(value, radius)
        norm = layers.batchnorm_ball(value, radius, mean, var, gain, mean.flip(0), eps) if small else None
    X = _point(value, radius, signs)
    inside(tally, "dense_ball", dense, X.dot(exactly(weight).T) + exactly(bias))
    inside(tally, "add_ball", sums, X + exactly(other) - exactly(radius))
    inside(tally, "relu_ball", relu, np.maximum(X, fmpq(0)))
    if norm is not None:
        precision(200)
        root = np.array([arb(t).sqrt() for t in exactly(var) + rational(eps)], dtype=object)
        truth = balls((X - exactly(mean)) * exactly(gain)) / root + balls(exactly(mean.flip(0)))
        inside(tally, "batchnorm_ball", norm, truth)


def draw_curved(rng: np.random.Generator) -> Arguments:
    ball = _ball(rng, int(rng.integers(1, 40)))
    if rng.random() < 0.5:
        ball["value"] = torch.from_numpy(rng.standard_normal(len(ball["value"])) * 10.0 ** rng.integers(-3, 3))
        ball["radius"] = ball["value"].abs() * 10.0 ** int(rng.integers(-17, 0))
    threshold = (None, 20.0, float(rng.integers(-5, 40)))[rng.integers(3)]
    return ball | {"beta": float(10.0 ** rng.integers(-3, 4)), "threshold": threshold, "flush": _flush(rng)}


def see_curved(
    tally: Tally, value: Tensor, radius: Tensor, signs: Tensor, beta: float, threshold: float | None, flush: bool
) -> None:
    """tanh, sigmoid and softplus, PyTorch's with its jump too."""
    with setting(flush):
        found = layers.tanh_ball(value, radius), layers.sigmoid_ball(value, radius)
        soft = layers.softplus_ball(value, radius, beta, threshold)
    precision(200)
    X = _point(value, radius, signs)
    near = [arb(min(max(x, fmpq(-900)), fmpq(900))) for x in X]  # beyond that, no float tells the difference
    inside(tally, "tanh_ball", found[0], np.array([x.tanh() for x in near], dtype=object))
    inside(tally, "sigmoid_ball", found[1], np.array([1 / (1 + (-x).exp()) for x in near], dtype=object))
    truth = [_softplus(x, rational(beta), threshold) for x in X]
    inside(tally, "softplus_ball", soft, np.array(truth, dtype=object))


def _softplus(x: fmpq, beta: fmpq, threshold: float | None) -> Any:
    scaled = beta * x
    if scaled > 10**4 or (threshold is not None and scaled > rational(threshold)):
        return arb(x)
    return (1 + arb(scaled).exp()).log() / arb(beta) if scaled > -(10**4) else arb(0)


def draw_image(rng: np.random.Generator) -> Arguments:
    groups = int(rng.integers(1, 3))
    C, out, size = groups * int(rng.integers(1, 3)), groups * int(rng.integers(1, 3)), int(rng.integers(3, 6))
    window = [int(w) for w in rng.integers(1, 4, size=2)]
    options = {"stride": int(rng.integers(1, 3)), "padding": int(rng.integers(0, 2)), "groups": groups}
    options["dilation"] = 1 if size == 3 and max(window) == 3 and not options["padding"] else int(rng.integers(1, 3))
    if (max(window) - 1) * options["dilation"] + 1 > size + 2 * options["padding"]:
        options["dilation"] = 1
    more = {"weight": numbers(rng, out, C // groups, *window), "bias": numbers(rng, out), "options": options}
    return _ball(rng, int(rng.integers(1, 3)), C, size, size) | more | {"flush": _flush(rng)}


def see_image(
    tally: Tally, value: Tensor, radius: Tensor, signs: Tensor, weight: Tensor, bias: Tensor, options: Arguments,
    flush: bool,
) -> None:  # fmt: skip
    """Convolutions, and both kinds of pooling with windows of two."""

    def average(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, 2)

    def largest(t: Tensor) -> Tensor:
        return F.max_pool2d(t, 2, stride=1)

    with setting(flush):
        conv = layers.conv2d_ball(value, radius, weight, bias, **options)
        mean, most = layers.avgpool_ball(value, radius, average, 4), layers.maxpool_ball(value, radius, largest)
    X, W = _point(value, radius, signs), exactly(weight)
    inside(tally, "conv2d_ball", conv, convolved(X, W, exactly(bias), **options))
    half = X.shape[2] // 2
    windows = [X[:, :, i : 2 * half : 2, j : 2 * half : 2] for i in (0, 1) for j in (0, 1)]
    inside(tally, "avgpool_ball", mean, sum(windows) / fmpq(4))
    end = X.shape[2] - 1
    a, b, c, d = (X[:, :, i : end + i, j : end + j] for i in (0, 1) for j in (0, 1))
    inside(tally, "maxpool_ball", most, np.maximum(np.maximum(a, b), np.maximum(c, d)))


def convolved(
    X: np.ndarray, W: np.ndarray, bias: np.ndarray, *, stride: int, padding: int, dilation: int, groups: int
) -> np.ndarray:
    """A convolution of arrays of exact numbers, one shifted image after the other."""
    N, C, H, V = X.shape
    out, fan, h, w = W.shape
    padded = np.full((N, C, H + 2 * padding, V + 2 * padding), fmpq(0), dtype=object)
    padded[:, :, padding : padding + H, padding : padding + V] = X
    rows, columns = ((n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((H, h), (V, w)))
    result = np.full((N, out, rows, columns), fmpq(0), dtype=object) + bias[:, None, None]
    for o in range(out):
        first = (o // (out // groups)) * fan
        for c in range(fan):
            for i in range(h):
                for j in range(w):
                    part = padded[:, first + c, i * dilation :: stride, j * dilation :: stride][:, :rows, :columns]
                    result[:, o] = result[:, o] + part * W[o, c, i, j]
    return result


# --- Intervals --------------------------------------------------------------------------------------------------------


def draw_intervals(rng: np.random.Generator) -> Arguments:
    """Two batches of intervals by their ends, and a point in each by its share of the width."""
    n, ends = ENTRIES, []
    for _ in range(2):
        middle = rng.standard_normal(n) * 10.0 ** (rng.integers(-320, 300, size=n) if rng.random() < 0.6 else 1)
        if rng.random() < 0.2:
            middle = numbers(rng, n).numpy()
        with np.errstate(all="ignore"):
            width = np.abs(middle) * 10.0 ** rng.integers(-16, 1, size=n) * (rng.random(n) < 0.6)
            lo, hi = middle - width, middle + width
        bad = ~(np.isfinite(lo) & np.isfinite(hi))
        ends += [torch.from_numpy(np.where(bad, 1.0, e)) for e in (lo, hi)]
    shares = torch.from_numpy(rng.integers(0, 3, size=(2, n)))
    return dict(zip(("a", "b", "c", "d"), ends, strict=True)) | {
        "s": shares[0], "t": shares[1], "power": int(rng.integers(-4, 6)), "flush": _flush(rng),
    }  # fmt: skip


def _held(tally: Tally, name: str, found: Any, truth: list[Any]) -> None:
    """Whether the ends of an interval enclose the true values; None stands for a value that does not exist."""
    for low, high, t in zip(found.lo.tolist(), found.hi.tolist(), truth, strict=True):
        if t is None or math.isnan(low) or math.isnan(high):
            right = (math.isnan(low) and math.isnan(high)) or t is not None
            tally.see(name, right, False, f"{low} {high} where there is no value")
        else:
            tally.see(name, not surely_above(low, t) and not surely_above(t, high), True, f"{low} {high}")


def see_intervals(
    tally: Tally, a: Tensor, b: Tensor, c: Tensor, d: Tensor, s: Tensor, t: Tensor, power: int, flush: bool
) -> None:
    """``+ - * /``, powers, |x|, maximum, minimum, clamp, split, sum and norm of intervals."""
    x, y = (rigor.Interval(rigor.point(lo).lo, rigor.point(hi).hi) for lo, hi in ((a, b), (c, d)))
    third = Fraction(1, 3)
    with setting(flush):
        found = {
            "+": x + y, "-": x - y, "*": x * y, "/": x / y, "1/3 / x": third / x, "x / 3": x / 3, "3/8 - x": 0.375 - x,
            "power": x**power, "square": x.square(), "reciprocal": x.reciprocal(), "abs": abs(x), "neg": -x,
            "maximum": x.maximum(y), "minimum": formulas.minimum(x, y), "clamp": x.clamp(-1.0, 2.0),
            "cat": rigor.cat([x]),
        }  # fmt: skip
        middle, radius = x.split()
        total, long = x.sum(0), rigor.norm(x)
        around = rigor.Interval.around(middle, radius)
    p, q = (_chosen(lo, hi, share) for lo, hi, share in ((a, b, s), (c, d, t)))
    holds_0, holds_0_y = (
        [lo <= 0 <= hi for lo, hi in zip(low.tolist(), high.tolist(), strict=True)] for low, high in ((a, b), (c, d))
    )
    one = fmpq(1, 3)
    _held(tally, "interval +", found["+"], [u + v for u, v in zip(p, q, strict=True)])
    _held(tally, "interval -", found["-"], [u - v for u, v in zip(p, q, strict=True)])
    _held(tally, "interval *", found["*"], [u * v for u, v in zip(p, q, strict=True)])
    _held(tally, "interval /", found["/"], [None if z else u / v for u, v, z in zip(p, q, holds_0_y, strict=True)])
    for name, top in (("1/3 / x", one), ("reciprocal", fmpq(1))):
        _held(tally, f"interval {name}", found[name], [None if z else top / u for u, z in zip(p, holds_0, strict=True)])
    none = power < 0
    _held(tally, "interval power", found["power"],
          [None if none and z else u**power for u, z in zip(p, holds_0, strict=True)])  # fmt: skip
    simple: dict[str, Callable[[fmpq], fmpq]] = {
        "x / 3": lambda u: u * one, "3/8 - x": lambda u: fmpq(3, 8) - u, "square": lambda u: u * u, "abs": abs,
        "neg": lambda u: -u, "clamp": lambda u: min(max(u, fmpq(-1)), fmpq(2)), "cat": lambda u: u,
    }  # fmt: skip
    for name, f in simple.items():
        _held(tally, f"interval {name}", found[name], [f(u) for u in p])
    _held(tally, "interval maximum", found["maximum"], [max(u, v) for u, v in zip(p, q, strict=True)])
    _held(tally, "interval minimum", found["minimum"], [min(u, v) for u, v in zip(p, q, strict=True)])
    _held(tally, "interval around", around, p)
    for i, u in enumerate(p):
        m, r = float(middle[i]), float(radius[i])
        if math.isfinite(r):
            tally.see("interval split", abs(rational(m) - u) <= rational(r), what=f"{m} {r}")
    for name, end, truth in (("sum", total, sum(p, fmpq(0))), ("norm", long, sum((u * u for u in p), fmpq(0)))):
        low, high = float(end.lo), float(end.hi)
        if math.isnan(low) or math.isnan(high):
            tally.see(f"interval {name}", True, False)
            continue
        ends = [low, high] if name == "sum" else [t * t if math.isinf(t) else rational(t) ** 2 for t in (low, high)]
        tally.see(f"interval {name}", not surely_above(ends[0], truth) and not surely_above(truth, ends[1]))


def _chosen(lo: Tensor, hi: Tensor, share: Tensor) -> list[fmpq]:
    ends = zip(lo.tolist(), hi.tolist(), share.tolist(), strict=True)
    return [(rational(a) * (2 - s) + rational(b) * s) / 2 for a, b, s in ends]


def draw_functions(rng: np.random.Generator) -> Arguments:
    n = ENTRIES
    middle = rng.standard_normal(n) * 10.0 ** rng.integers(-4, 3, size=n)
    if rng.random() < 0.4:
        middle = numbers(rng, n).numpy()
    if rng.random() < 0.2:  # near the ends of the range, and where 1 + x cancels
        middle = rng.choice([0.0, 1.0, -1.0, 709.78, -745.1, -708.4, 20.0, 0.3466, -0.3466], size=n)
        middle = middle + rng.standard_normal(n) * 10.0 ** rng.integers(-17, -1, size=n)
    with np.errstate(all="ignore"):
        width = np.abs(middle) * 10.0 ** rng.integers(-16, 0, size=n) * (rng.random(n) < 0.5)
        lo, hi = middle - width, middle + width
    bad = ~(np.isfinite(lo) & np.isfinite(hi))
    share = torch.from_numpy(rng.integers(0, 3, size=n))
    lo, hi = (torch.from_numpy(np.where(bad, 1.0, e)) for e in (lo, hi))
    return {"a": lo, "b": hi, "s": share, "flush": _flush(rng)}


def see_functions(tally: Tally, a: Tensor, b: Tensor, s: Tensor, flush: bool) -> None:
    """sqrt, exp, expm1, log, log1p and tanh of intervals."""
    x = rigor.Interval(rigor.point(a).lo, rigor.point(b).hi)
    names = ("sqrt", "exp", "expm1", "log", "log1p", "tanh")
    with setting(flush):
        found = {name: getattr(x, name)() for name in names}
    precision(140)
    points = _chosen(a, b, s)
    near = [arb(min(max(u, fmpq(-900)), fmpq(900))) for u in points]
    for name in ("exp", "expm1", "tanh"):  # increasing, and no float tells what is beyond 900 from 900
        _held(tally, f"interval {name}", found[name], [getattr(u, name)() for u in near])
    for name, least in (("sqrt", fmpq(0)), ("log", fmpq(0)), ("log1p", fmpq(-1))):
        inside = [i for i, u in enumerate(points) if u > least]
        part = found[name][torch.tensor(inside, dtype=torch.int64)]
        _held(tally, f"interval {name}", part, [getattr(arb(points[i]), name)() for i in inside])


# --- One number -------------------------------------------------------------------------------------------------------


def draw_number(rng: np.random.Generator) -> Arguments:
    x = numbers(rng, 32).tolist()
    k = [int(2 ** rng.uniform(0, 45)) for _ in range(16)]
    fractions = [[int(rng.integers(-(2**62), 2**62)), int(rng.integers(1, 2**62))] for _ in range(16)]
    return {"x": x, "k": k, "fractions": fractions, "flush": _flush(rng)}


def see_number(tally: Tally, x: list[float], k: list[int], fractions: list[list[int]], flush: bool) -> None:
    """`round_up`, `round_down`, `gamma`, `whole_numbers`, `point` of fractions."""
    with setting(flush):
        ups, downs = [rigor.round_up(t) for t in x], [rigor.round_down(t) for t in x]
        gammas = [rigor.gamma(n) for n in k]
        points = [rigor.point(Fraction(p, q)) for p, q in fractions]
    (whole,), exponent = rationals.whole_numbers(torch.tensor([x], dtype=torch.float64))
    for t, up, down, n in zip(x, ups, downs, whole, strict=True):
        tally.see("round_up", surely_above(up, t))
        tally.see("round_down", surely_above(t, down))
        tally.see("whole_numbers", n * Fraction(2) ** exponent == Fraction(t))
    for n, g in zip(k, gammas, strict=True):
        u = fmpq(n, 2**53)
        tally.see("gamma", rational(g) >= u / (1 - u))
    for (p, q), interval in zip(fractions, points, strict=True):
        low, high = rational(float(interval.lo)), rational(float(interval.hi))
        tally.see("point", low <= fmpq(p, q) <= high)


CHECKS = {
    "matrix": Check(draw_matrix, see_matrix),
    "product": Check(draw_product, see_product),
    "symmetric": Check(draw_symmetric, see_symmetric),
    "layer": Check(draw_layer, see_layer),
    "curved": Check(draw_curved, see_curved),
    "image": Check(draw_image, see_image),
    "intervals": Check(draw_intervals, see_intervals),
    "functions": Check(draw_functions, see_functions),
    "number": Check(draw_number, see_number),
}
