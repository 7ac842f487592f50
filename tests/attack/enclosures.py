"""Whole networks in `companion.rigor.enclose`: random chains of layers, against the same chain in balls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flint import arb, fmpq
from torch import Tensor, nn

from attack import Arguments, Check, Tally, setting
from attack.arithmetic import convolved, inside
from attack.hostile import balls, numbers, precision, rational, tame
from companion import networks, rigor

Exact = Callable[[nn.Module, np.ndarray], np.ndarray]


def _map(f: Callable[[arb], arb]) -> Exact:
    return lambda layer, X: np.vectorize(f, otypes=[object])(X)


def _conv(layer: Any, X: np.ndarray) -> np.ndarray:
    options = {"stride": layer.stride[0], "padding": layer.padding[0], "dilation": 1, "groups": layer.groups}
    return convolved(X, balls(layer.weight.detach()), balls(layer.bias.detach()), **options)


def _batchnorm(layer: Any, X: np.ndarray) -> np.ndarray:
    mean, var, gain, shift = (
        balls(t.detach()).reshape(1, -1, *[1] * (X.ndim - 2))
        for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    root = _map(lambda v: v.sqrt())(layer, var + arb(rational(layer.eps)))
    return (X - mean) / root * gain + shift


def _windows(size: int, out: int) -> list[tuple[int, int]]:
    """The windows of an adaptive pooling, which may overlap."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _adaptive(layer: Any, X: np.ndarray) -> np.ndarray:
    rows, columns = (_windows(n, k) for n, k in zip(X.shape[-2:], layer.output_size, strict=True))
    return _pooled(X, rows, columns, lambda part, count: part.sum(axis=(-2, -1)) / count)


def _pooled(X: np.ndarray, rows: list[Any], columns: list[Any], reduce: Callable[[np.ndarray, int], Any]) -> np.ndarray:
    out = np.empty((*X.shape[:-2], len(rows), len(columns)), dtype=object)
    for i, (a, b) in enumerate(rows):
        for j, (c, d) in enumerate(columns):
            out[..., i, j] = reduce(X[..., a:b, c:d], (b - a) * (d - c))
    return out


def _fixed(X: np.ndarray) -> tuple[list[Any], list[Any]]:
    return tuple([(i, i + 2) for i in range(0, n - 1, 2)] for n in X.shape[-2:])


def _average(layer: Any, X: np.ndarray) -> np.ndarray:
    return _pooled(X, *_fixed(X), lambda part, count: part.sum(axis=(-2, -1)) / count)


def _largest(layer: Any, X: np.ndarray) -> np.ndarray:
    def most(part: np.ndarray, count: int) -> Any:
        flat = part.reshape(*part.shape[:-2], -1)
        return np.vectorize(lambda *entries: _maximum(entries), otypes=[object])(*np.moveaxis(flat, -1, 0))

    return _pooled(X, *_fixed(X), most)


def _maximum(entries: tuple[arb, ...]) -> arb:
    top = entries[0]
    for entry in entries[1:]:
        top = top.max(entry)
    return top


def _soft(layer: Any, X: np.ndarray) -> np.ndarray:
    beta, threshold = arb(layer.beta), getattr(layer, "threshold", None)

    def one(x: arb) -> arb:
        if threshold is not None and beta * x > threshold:
            return x
        return (1 + (beta * x).exp()).log() / beta

    return _map(one)(layer, X)


EXACT: dict[type[nn.Module], Exact] = {
    nn.Conv2d: _conv,
    nn.Linear: lambda layer, X: X.dot(balls(layer.weight.detach()).T) + balls(layer.bias.detach()),
    nn.BatchNorm1d: _batchnorm,
    nn.BatchNorm2d: _batchnorm,
    nn.AvgPool2d: _average,
    nn.MaxPool2d: _largest,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.Flatten: lambda layer, X: X.reshape(len(X), -1),
    nn.ReLU: _map(lambda x: x.max(arb(0))),
    nn.Tanh: _map(lambda x: x.tanh()),
    nn.Sigmoid: _map(lambda x: 1 / (1 + (-x).exp())),
    nn.Softplus: _soft,
    networks.Softplus: _soft,
}
CURVES = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus,
    "sharp": lambda: nn.Softplus(50.0), "analytic": lambda: networks.Softplus(3.0),
}  # fmt: skip


def draw_network(rng: np.random.Generator) -> Arguments:
    """The names of the layers and the seed of their weights, which are drawn when the network is built."""
    size, curves = int(rng.integers(2, 6)), list(CURVES)
    names = []
    for _ in range(int(rng.integers(0, 3))):
        names += [str(rng.choice(["conv", "grouped", "strided"])), str(rng.choice(["batchnorm", *curves]))]
        names += [str(rng.choice(["average", "largest", "adaptive", "none", "none"]))]
    names += ["flatten", "dense", str(rng.choice(curves)), "dense"]
    X = numbers(rng, 2, 2, size, size, kind=str(rng.choice(["normal", "normal", "float32", "near", "small integers"])))
    X = tame(X, 1e3) * float(10.0 ** rng.choice([-300, -5, 0, 0, 0, 2]))
    scale = float(10.0 ** rng.choice([-3, 0, 0, 0, 1]))
    return {
        "names": names, "seed": int(rng.integers(2**31)), "scale": scale, "X": X,
        "single": bool(rng.random() < 0.3), "flush": bool(rng.random() < 0.15),
    }  # fmt: skip


def network(names: list[str], seed: int, scale: float, X: Tensor) -> nn.Sequential:
    torch.manual_seed(seed)
    layers, out = [], X
    for name in names:
        made = _layer(name, out)
        if made is None:
            continue
        made = made.double().eval()
        with torch.no_grad():
            for key, value in made.state_dict().items():
                if value.is_floating_point() and key != "running_var":
                    value.copy_(torch.randn_like(value) * scale)
            if hasattr(made, "running_var"):
                made.running_var.copy_(torch.rand_like(made.running_var) * scale)
            out = made(out)
        layers.append(made)
    return nn.Sequential(*layers)


def _layer(name: str, X: Tensor) -> nn.Module | None:
    """The layer of this name that fits X, or None if X is too small for it."""
    channels, small = X.shape[1], X.ndim == 4 and min(X.shape[-2:]) < 2
    if name in CURVES:
        return CURVES[name]()
    if name == "dense":
        return nn.Linear(channels, 3)
    if name in ("flatten", "batchnorm"):
        return nn.Flatten() if name == "flatten" else nn.BatchNorm2d(channels)
    if name in ("conv", "grouped", "strided"):
        options: Any = {"groups": 2} if name == "grouped" else {"stride": 2} if name == "strided" else {}
        return nn.Conv2d(channels, 2, 2, padding=1, **options)
    pools = {"average": lambda: nn.AvgPool2d(2), "largest": lambda: nn.MaxPool2d(2)}
    pools["adaptive"] = lambda: nn.AdaptiveAvgPool2d((2, max(1, X.shape[-1] - 1)))
    return None if name == "none" or small else pools[name]()


def see_network(tally: Tally, names: list[str], seed: int, scale: float, X: Tensor, single: bool, flush: bool) -> None:
    """The enclosure of a network with float64 or float32 parameters."""
    model = network(names, seed, scale, X)
    model, X = (model.float(), X.float()) if single else (model, X)
    with setting(flush):
        try:
            found = rigor.enclose(model, X)
        except networks.NoEnclosure:
            return tally.see("enclose", True, False)
    precision(400)
    out = balls(X.double()) + fmpq(0)
    for layer in model:
        out = EXACT[type(layer)](layer, out)
    return inside(tally, "enclose", found, out)


CHECKS = {"network": Check(draw_network, see_network)}
