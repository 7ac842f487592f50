"""Where training ends: one class for each kind of end point, never merged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.arguments import checked
from companion.basins.shallow import Trained, check_shallow, loss_derivatives
from companion.networks import Activation

CLASSES = ("zero loss", "strict, bad", "strict, best of its starts", "saddle", "degenerate", "drifting", "unconverged")


@dataclass(frozen=True)
class Endpoints:
    """What kind of point every trained network ended at.

    Args:
        label: index into `CLASSES`, (S,).
        smallest: smallest eigenvalue of the Hessian, (S,).
        best: the lowest loss among the starts on the same data, (S,).
    """

    label: Int[Tensor, " S"]
    smallest: Float[Tensor, " S"]
    best: Float[Tensor, " S"]

    def fraction(self, name: str) -> float:
        """The fraction of networks in the class `name` of `CLASSES`."""
        return float((self.label == CLASSES.index(name)).double().mean())


@checked(double=True)
def classify_endpoints(
    trained: Trained,
    X: Float[Tensor, "*x N D"],
    Y: Float[Tensor, "*y N 1"],
    act: str | Activation,
    *,
    starts: int,
    tolerance: float = 1e-8,
    zero: float = 1e-14,
) -> Endpoints:
    """Sort end points of training into `CLASSES`, which are never merged.

    ``zero loss``: ``L <= zero ||y||^2``; ``strict``: gradient below the tolerance and ``lambda_min > 1e-7 lambda_max``,
    *bad* if a start on the same data ended lower; ``saddle``: at rest with ``lambda_min < -1e-7 lambda_max``;
    ``degenerate``: at rest otherwise; ``drifting``: parameters large and growing, or at rest beyond 1000;
    ``unconverged``: the rest.  *Best of its starts* does not mean global.

    Args:
        trained: the result of `train_lm_newton`.
        X: inputs, shape (N, D) or (S, N, D).
        Y: targets, shape (N, 1) or (S, N, 1).
        act: the activation used.
        starts: how many consecutive networks share one data set; divides S.
        tolerance: a network is at rest when ``||grad L||`` is below this.
        zero: what counts as zero loss, relative to ``||y||^2``.

    Returns:
        The `Endpoints`.

    Raises:
        ValueError: starts does not divide S.
    """
    check_shallow(trained.weights, X, Y, act)
    S = len(trained.loss)
    if starts < 1 or S % starts:
        raise ValueError(f"starts is {starts}; a divisor of the number {S} of networks is needed")
    smallest, largest = torch.empty_like(trained.loss), torch.empty_like(trained.loss)
    for part in torch.arange(S, device=trained.loss.device).split(1024):
        x, y = (T if T.ndim == 2 else T[part] for T in (X, Y))
        own = [T[part] for T in trained.weights]
        values = torch.linalg.eigvalsh(torch.nan_to_num(loss_derivatives(own, x, y, act).hessian))
        smallest[part], largest[part] = values[:, 0], values[:, -1]
    best = torch.nan_to_num(trained.loss, nan=math.inf).view(-1, starts).amin(1).repeat_interleave(starts)
    size = torch.maximum(trained.weights[0].abs().amax((1, 2)), trained.weights[1].abs().amax((1, 2)))
    energy = Y.square().sum((-1, -2)).expand(S)
    rest = trained.gradient < tolerance
    strict = rest & (smallest > 1e-7 * largest)
    moving = (size > 8) & (size > 1.02 * trained.halfway)
    label = torch.full((S,), CLASSES.index("unconverged"), device=rest.device)
    order = (
        ("drifting", ~rest & moving),
        ("degenerate", rest),
        ("saddle", rest & (smallest < -1e-7 * largest)),
        ("drifting", rest & ~strict & (size > 1e3)),
        ("strict, best of its starts", strict),
        ("strict, bad", strict & (trained.loss > best * (1 + 1e-6) + 1e-9 * energy)),
        ("zero loss", trained.loss <= zero * energy),
    )
    for name, which in order:
        label = torch.where(which, CLASSES.index(name), label)
    return Endpoints(label, smallest, best)
