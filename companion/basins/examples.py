"""Bad strict minima in exact fractions (E1, E4 and what Theorem N makes), and how long noise needs to leave E1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from companion import rigor
from companion.arguments import checked
from companion.basins import exact, langevin
from companion.basins.certificates import certify_strict_minimum
from companion.basins.exact import ExactPoint
from companion.certificate import Certificate


@dataclass(frozen=True)
class ExactMinimum:
    """A bad strict minimum in rationals: the point, the data, and a competitor (its own base is allowed)."""

    point: ExactPoint
    X: tuple[tuple[int, ...], ...]
    y: tuple[Fraction, ...]
    competitor: ExactPoint

    def tensors(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The nearest floating-point ``[W, V]``, X (N, D) and Y (N, 1)."""
        Y = torch.tensor([[float(t)] for t in self.y], dtype=torch.float64, device="cpu")
        return self.point.weights(), torch.tensor(self.X, dtype=torch.float64, device="cpu"), Y

    def certificate(self) -> Certificate:
        """The exact certificate of `certify_strict_minimum`."""
        return certify_strict_minimum(
            self.point, self.X, self.y, self.point.act, level="exact", competitor=self.competitor
        )


@checked
def exact_bad_minimum(act: str, a: Sequence[int], x: Sequence[int], base: Any) -> ExactMinimum:
    """Theorem N in rationals, one input: ``w_j = a_j u`` on integers x, e from the left kernel of the nodes.

    The nodes ``[sigma(w_j x), x sigma'(w_j x)]`` are 2m rational vectors; any e orthogonal to them with
    ``g_e''(w_j) != 0`` gives a strict minimum for ``y = H v - e``, and v is halved until one neuron beats it.

    Args:
        act: ``"exp"``, ``"sigmoid"``, ``"tanh"`` or ``"sin"``.
        a: m different integers.
        x: N different integers, ``N >= 2 m + 1``.
        base: b with ``u = ln b``, or for sin a rational point ``(cos u, sin u)``.

    Returns:
        The `ExactMinimum`.

    Raises:
        ValueError: inputs that are not integers or repeat, too few of them, a base without rational features, or a
            kernel in which every ``g_e''(w_j)`` vanishes.

    Source: Theorem N, derived in lesson 5.
    """
    m, N = len(a), len(x)
    if len(set(a)) < m or m < 1 or len(set(x)) < N:
        raise ValueError(f"a is {list(a)}, x is {list(x)}; different integers are needed")
    if 2 * m >= N:
        raise ValueError(f"x holds {N} inputs; at least 2 m + 1 = {2 * m + 1} are needed for m = {m} neurons")
    X = exact.integers([[t] for t in x])
    point = ExactPoint(act, base, tuple((int(t),) for t in a), (Fraction(1),) * m)
    jets = point.jets(X)
    nodes = [[jets[n][j][0] for n in range(N)] for j in range(m)]
    nodes += [[X[n][0] * jets[n][j][1] for n in range(N)] for j in range(m)]
    kernel = rigor.null_space(nodes)
    e, second = None, []
    for power in range(1, 6):  # combinations of the kernel's basis until no g'' vanishes
        trial = [sum(Fraction((i + 1) ** (power - 1)) * z[n] for i, z in enumerate(kernel)) for n in range(N)]
        second = [sum(trial[n] * jets[n][j][2] * X[n][0] ** 2 for n in range(N)) for j in range(m)]
        if kernel and all(second):
            e = trial
            break
    if e is None:
        raise ValueError(f"g_e'' vanishes at one of a = {list(a)} for every e tried; other a or x are needed")
    size = Fraction(1)
    for _ in range(200):
        v = tuple(size if s > 0 else -size for s in second)
        y = tuple(sum(jets[n][j][0] * v[j] for j in range(m)) - e[n] for n in range(N))
        competitor, lowest = exact.best_exact_neuron(act, base, X, y, reach=2 + max(abs(int(t)) for t in a))
        if lowest < sum(t * t for t in e) / 2:
            return ExactMinimum(ExactPoint(act, base, point.multiples, v), X, y, competitor)
        size /= 2
    raise ValueError("no single neuron with small integer multiples beats the minimum; another base is needed")


def example_e1() -> ExactMinimum:
    """E1: sine, x = (1, 3), y = (-2, -4): a strict minimum at ``(w, v) = (pi/2, 1)`` with ``L = 9``, 0 at (pi/6, -4).

    The competitor stands next to ``(pi/6, -4)``, at the rational rotation with ``sin w = 120/241``.
    """
    competitor = ExactPoint("sin", (Fraction(209, 241), Fraction(120, 241)), ((1,),), (Fraction(-4),))
    point = ExactPoint("sin", (0, 1), ((1,),), (Fraction(1),))
    return ExactMinimum(point, ((1,), (3,)), (Fraction(-2), Fraction(-4)), competitor)


def example_e4() -> ExactMinimum:
    """E4: exp, D = 2, a strict bad minimum at ``w = (-ln 2, 0)``, ``v = 1`` although ``Hess g_e`` is indefinite."""
    X = ((3, 0), (0, 1), (-1, 0), (0, -1))
    y = (Fraction(-23, 8), Fraction(7, 4), Fraction(23, 16), Fraction(7, 4))
    h = [Fraction(4) ** row[0] for row in X]  # features of w = (ln 4, 0)
    c = sum(s * t for s, t in zip(h, y, strict=True)) / sum(s * s for s in h)
    point = ExactPoint("exp", Fraction(2), ((-1, 0),), (Fraction(1),))
    return ExactMinimum(point, X, y, ExactPoint("exp", Fraction(2), ((2, 0),), (c,)))


@checked
def exit_time_of_e1(T: float, *, per_unit: int = 40) -> float:
    """Mean time in which noisy descent at temperature T takes E1's bad minimum below ``L = 4.5``, at width 1.

    ``T Lap u - grad L . grad u = -1`` on ``w in [-pi/2, pi/2]`` (the ends are symmetry axes), ``v in [-6, 6]``.

    Args:
        T: temperature.
        per_unit: grid cells for a unit of length.

    Returns:
        ``u(pi/2, 1)``.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def loss(w: Tensor, v: Tensor) -> Tensor:
        return 0.5 * ((v * torch.sin(w) + 2) ** 2 + (v * torch.sin(3 * w) + 4) ** 2)

    box = (-math.pi / 2, math.pi / 2, -6.0, 6.0)
    return langevin.mean_exit_time(loss, T, box, 4.5, per_unit=per_unit).at(math.pi / 2, 1.0)
