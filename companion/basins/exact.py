"""One hidden layer in exact and in interval arithmetic: the numbers behind `companion.basins.certify_strict_minimum`.

A neuron whose pre-activations are integer multiples ``k u`` of one number u has rational features for the right u:

- ``exp``, ``sigmoid``, ``tanh``: ``u = ln b`` with b > 0 rational, because ``e^{k u} = b^k``;
- ``sin``: ``cos u`` and ``sin u`` rational with ``cos^2 + sin^2 = 1``, such as (3/5, 4/5) or (0, 1), by de Moivre.

So loss, gradient and Hessian are rational numbers and every sign is a proof.  For decimal data the same formulas run on
real balls (python-flint, the extra ``certify``), which enclose the true values.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.rigor.arbs import Jet

_ACTIVATIONS = ("exp", "sigmoid", "tanh", "sin")
_Base = Fraction | int | tuple[Fraction | int, Fraction | int]


class Jets2(NamedTuple):
    """``loss``, ``gradient`` (p entries) and ``hessian`` (p rows) of ``0.5 ||f - y||^2``, and ``e = f - y``."""

    loss: Any
    gradient: list[Any]
    hessian: list[list[Any]]
    e: list[Any]


def derivatives(jets: Sequence[Sequence[Jet]], v: Sequence[Any], X: Sequence[Sequence[Any]], y: Sequence[Any]) -> Jets2:
    """Loss, gradient, Hessian at ``theta = (v_1..v_m, w_1..w_m)`` from the features' 2-jets, in any number type.

    The slow, obvious twin of `companion.shallow.loss_derivatives`; with fractions it is exact, with balls an enclosure.

    Args:
        jets: ``jets[n][j] = (sigma, sigma', sigma'')`` at ``w_j . x_n``.
        v: m output weights.
        X: N inputs of D numbers.
        y: N targets.

    Returns:
        The `Jets2`.
    """
    N, m, D = len(X), len(v), len(X[0])
    e = [sum(jets[n][j][0] * v[j] for j in range(m)) - y[n] for n in range(N)]
    rows = [
        [jets[n][j][0] for j in range(m)] + [v[j] * jets[n][j][1] * X[n][d] for j in range(m) for d in range(D)]
        for n in range(N)
    ]
    p = m * (1 + D)
    gradient = [sum(rows[n][i] * e[n] for n in range(N)) for i in range(p)]
    H = [[sum(rows[n][i] * rows[n][k] for n in range(N)) for k in range(i + 1)] for i in range(p)]
    for j in range(m):
        for d in range(D):
            i = m + j * D + d
            H[i][j] += sum(e[n] * jets[n][j][1] * X[n][d] for n in range(N))
            for c in range(d + 1):
                second = sum(e[n] * jets[n][j][2] * X[n][d] * X[n][c] for n in range(N))
                H[i][m + j * D + c] += v[j] * second
    hessian = [[H[max(i, k)][min(i, k)] for k in range(p)] for i in range(p)]
    return Jets2(sum(t * t for t in e) / 2, gradient, hessian, e)


def ldl_pivots(A: Sequence[Sequence[Any]]) -> list[Any]:
    """The pivots of ``A = L D L^T`` up to and with the first that is not shown positive; A > 0 iff all p are positive.

    Works on fractions (exact) and on balls (an enclosure of every pivot of every symmetric matrix in the balls).
    """
    A = [list(row) for row in A]
    pivots = []
    for k in range(len(A)):
        pivots.append(A[k][k])
        if not A[k][k] > 0:
            break
        for i in range(k + 1, len(A)):
            factor = A[i][k] / A[k][k]
            for j in range(k + 1, i + 1):
                A[i][j] = A[j][i] = A[i][j] - factor * A[j][k]
    return pivots


# --- exact ------------------------------------------------------------------------------------------------------------


def _jet(act: str, base: _Base, k: int) -> Jet:
    """``sigma, sigma', sigma''`` at ``z = k u`` as fractions; ``u = ln base``, for sin ``base = (cos u, sin u)``.

    Args:
        act: one of ``exp``, ``sigmoid``, ``tanh``, ``sin``.
        base: see above.
        k: an integer.

    Returns:
        Three fractions.

    Raises:
        ValueError: an activation without exact values, or a base that is not positive or not on the circle.
    """
    base = _check_base(act, base)
    if act == "sin":
        c, s = _rotate(base, k)
        return s, c, -s
    if act == "exp":
        t = base**k
        return t, t, t
    if act == "sigmoid":
        s = base**k / (1 + base**k)
        return s, s * (1 - s), s * (1 - s) * (1 - 2 * s)
    t = (base ** (2 * k) - 1) / (base ** (2 * k) + 1)
    return t, 1 - t * t, -2 * t * (1 - t * t)


def _check_base(act: str, base: _Base) -> Any:
    """The base as fractions, refused when it does not give rational features."""
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise ValueError(f"act is {act!r}; one of {', '.join(_ACTIVATIONS)} has exact values")
    given = [*base] if isinstance(base, tuple) else [base]
    try:
        numbers = [Fraction(t) for t in given]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"base is {base!r}; rational numbers are needed") from None
    if act == "sin":
        if len(numbers) != 2 or numbers[0] ** 2 + numbers[1] ** 2 != 1:
            raise ValueError(f"base is {base}; a rational point (cos u, sin u) on the circle is needed for sin")
        return tuple(numbers)
    if isinstance(base, tuple) or not numbers[0] > 0 or numbers[0] == 1:
        raise ValueError(f"base is {base}; a positive rational other than 1 is needed for {act}")
    return numbers[0]


def _rotate(base: tuple[Fraction, Fraction], k: int) -> tuple[Fraction, Fraction]:
    """``(cos k u, sin k u)`` by repeated squaring of ``cos u + i sin u``."""
    c, s = base[0], base[1] if k >= 0 else -base[1]
    power, out = abs(k), (Fraction(1), Fraction(0))
    while power:
        if power & 1:
            out = out[0] * c - out[1] * s, out[0] * s + out[1] * c
        c, s, power = c * c - s * s, 2 * c * s, power >> 1
    return out


@dataclass(frozen=True)
class ExactPoint:
    """A network whose every feature on integer inputs is rational: ``w_j = a_j u``, ``v_j`` rational.

    Args:
        act: one of ``exp``, ``sigmoid``, ``tanh``, ``sin``.
        base: b with ``u = ln b``, or for sin the point ``(cos u, sin u)``.
        multiples: m tuples ``a_j`` of D integers.
        v: m rational output weights.
    """

    act: str
    base: _Base
    multiples: tuple[tuple[int, ...], ...]
    v: tuple[Fraction, ...]

    def __post_init__(self) -> None:
        _check_base(self.act, self.base)
        try:
            sizes = {len([operator.index(k) for k in a]) for a in self.multiples}
            count = len([Fraction(t) for t in self.v])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"multiples are {self.multiples!r}, v is {self.v!r}; tuples of integers and rational numbers are needed"
            ) from None
        if len(sizes) != 1 or 0 in sizes or len(self.multiples) != count:
            raise ValueError(
                f"multiples hold {len(self.multiples)} neurons of {sorted(sizes)} integers, v {count} numbers; "
                "as many of each, all of D integers, are needed"
            )

    def jets(self, X: Sequence[Sequence[int]]) -> list[list[Jet]]:
        """``jets[n][j]``, the 2-jet of neuron j at input n."""
        if len(X[0]) != len(self.multiples[0]):
            raise ValueError(
                f"X has {len(X[0])} columns, the neurons take {len(self.multiples[0])}; they must be equal"
            )
        products = [[sum(a * x for a, x in zip(w, row, strict=True)) for w in self.multiples] for row in X]
        return [[_jet(self.act, self.base, k) for k in row] for row in products]

    def derivatives(self, X: Sequence[Sequence[int]], y: Sequence[Fraction]) -> Jets2:
        """Loss, gradient and Hessian as fractions."""
        return derivatives(self.jets(X), self.v, X, y)

    def weights(self) -> list[Tensor]:
        """The nearest floating-point weights ``[W, V]``, shapes (D, m) and (m, 1)."""
        u = math.atan2(self.base[1], self.base[0]) if self.act == "sin" else math.log(self.base)
        W = torch.tensor(self.multiples, dtype=torch.float64, device="cpu").T * u
        V = torch.tensor([[float(t)] for t in self.v], dtype=torch.float64, device="cpu")
        return [W.contiguous(), V]


def integers(X: Any) -> tuple[tuple[int, ...], ...]:
    """Inputs as tuples of integers, refused when they are not integers; very large ones make very long fractions.

    Raises:
        ValueError: no rows or rows of different lengths, an entry that is not an integer, or beyond 10^4 in size (its
            powers would fill the memory).
    """
    rows = _rationals("X", X)
    for n, t in ((n, t) for n, row in enumerate(rows) for t in row):
        if t.denominator != 1:
            raise ValueError(f"X holds {t} in row {n}; exact arithmetic needs integer inputs")
        if abs(t) > 10_000:
            raise ValueError(f"X holds {t} in row {n}; beyond 10000 exact powers get too long, rescale the inputs")
    return tuple(tuple(map(int, row)) for row in rows)


def targets(Y: Any) -> list[Fraction]:
    """Targets of one output as fractions; floats are the rational numbers they are.

    Raises:
        ValueError: no rows, several columns, or what is no finite number.
    """
    rows = _rationals("Y", Y)
    if len(rows[0]) != 1:
        raise ValueError(f"Y has {len(rows[0])} columns; one target for each input is needed")
    return [t for (t,) in rows]


def _rationals(name: str, A: Any) -> list[list[Fraction]]:
    """Rows of fractions from a tensor, from rows, or from a column of numbers."""
    try:
        rows = [list(r) if isinstance(r, list | tuple) else [r] for r in (A.tolist() if isinstance(A, Tensor) else A)]
        rows = [[Fraction(t) for t in row] for row in rows]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {A!r}; rows of finite rational numbers are needed") from None
    if not rows or {len(row) for row in rows} != {len(rows[0]) or 1}:
        raise ValueError(
            f"{name} has rows of {sorted({len(row) for row in rows})} numbers; rows of one length are needed"
        )
    return rows


def best_exact_neuron(
    act: str, base: _Base, X: Sequence[Sequence[int]], y: Sequence[Fraction], reach: int = 3
) -> tuple[ExactPoint, Fraction]:
    """The single neuron ``c sigma(a u . x)``, ``|a| <= reach``, with the smallest exact loss, c at its best."""
    best, lowest = None, None
    for a in itertools.product(range(-reach, reach + 1), repeat=len(X[0])):
        h = [row[0][0] for row in ExactPoint(act, base, (a,), (Fraction(1),)).jets(X)]
        square = sum(t * t for t in h)
        if square == 0:
            continue
        c = sum(t * s for t, s in zip(h, y, strict=True)) / square
        loss = sum((c * t - s) ** 2 for t, s in zip(h, y, strict=True)) / 2
        if lowest is None or loss < lowest:
            best, lowest = ExactPoint(act, base, (a,), (c,)), loss
    if best is None:
        raise ValueError(f"every feature of {act} with multiples up to {reach} vanishes on X; raise reach")
    return best, lowest
