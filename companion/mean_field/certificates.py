"""Zero loss, proved at one moment of training from the particles at hand: the theorem on nets of finite size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion import data, rigor
from companion.arguments import checked
from companion.certificate import Assumption, Certificate, assumed, compare, gather, show, silent
from companion.mean_field.blocks import Block, check_fit, check_positive, like
from companion.mean_field.hypotheses import warn_order
from companion.mean_field.jacobian import Centre, centre, local_region, uniform_region
from companion.mean_field.resnets import clash
from companion.rigor.formulas import lower, minimum, number, sqrt, upper

_SMALLEST = ("lambda", "rate", "max_step")  # of an ensemble's quantities; of the others the largest


@checked(double=True)
def certify_zero_loss(
    block: Block,
    theta: Float[Tensor, "*S L M k"],
    X: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    v: Float[Tensor, " d"],
    *,
    step: float | None = None,
    weights: Float[Tensor, " M"] | None = None,
    constants: Literal["uniform", "local"] = "uniform",
    level: Literal["measured", "certified"] = "measured",
) -> Certificate:
    """From these particles on, gradient descent brings the loss to zero: ``E_j <= (1 - h lambda / 4n)^j E_0``.

    Shown when ``8 Lambda |r| < lambda = lambda_min(K)`` and ``h <= n / (beta^2 + Lambda |r|)``; for the flow (`step`
    None) when ``4 Lambda |r| < lambda``, and then ``E <= E_0 e^{-lambda s / 2n}``. The constants hold within a radius
    ``R_s`` that no particle can leave, found as a fixed point. Applicable at any time of training; the index 0 means
    "at these particles".

    Args:
        block: the block.
        theta: particles ``(L, M, k)`` or ``(S, L, M, k)``, float64.
        X: inputs ``(n, d)``; equal inputs with equal targets are merged.
        y: targets ``(n,)``.
        v: the readout.
        step: h of gradient descent on the rescaled gradient; None for the flow.
        weights: ``(M,)``, sum 1; None for ``1/M``.
        constants: ``"uniform"``, the block's constants alone; ``"local"``, the propagators and derivatives of this net
            and how far they can move, which shows more and costs ``L^2`` products of ``d x d`` matrices.
        level: ``"measured"``, or ``"certified"``: states, adjoints and the Jacobian in interval arithmetic, every
            conversion rounded outward. The theorem is then one about gradient descent in exact arithmetic from these
            stored numbers.

    Returns:
        A `Certificate`; for an ensemble that of the first network that is not shown or, if all are, of the one with the
        largest ratio, with bounds that hold for every network, and all in ``members``. Reasons:
        ``duplicate_inputs (i,j)``, ``no_constants``, ``kernel_singular``, ``radius_diverged``, ``residual_too_large``,
        ``step_too_large``. ``quantities``: ``lambda``, ``Lambda``, ``ratio`` (8 or 4 times
        ``Lambda |r| / lambda``), ``rate`` (per step, or per unit of s), ``movement`` (bounds ``||Theta - Theta_0||_*``
        for ever), ``R_s``, ``max_step``, ``beta``, ``E_0``, ``residual``.

    Warns:
        UserWarning: ``d = 1`` and y not monotone along x.

    Raises:
        TypeError, ValueError: bad data (NaN, float32, wrong shapes), weights not summing to 1, a step that is not
            positive, an unknown level or choice of constants; ``"certified"`` for a block without interval formulas or
            a net too large.

    Source: the theorem on zero loss at finite size, derived in lesson 2.
    """
    if theta.ndim not in (3, 4):
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (L, M, k) or (S, L, M, k) is needed")
    check_fit(block, theta, X, weights, y=y, v=v)
    if step is not None:
        check_positive("step", step)
    if (pair := clash(X, y)) is not None:
        row = Assumption("equal inputs have equal targets", False, "is", True, "exact", False)
        return silent(_name(step), [row], f"duplicate_inputs ({pair[0]},{pair[1]})")
    theta = theta[None] if theta.ndim == 3 else theta
    if not block.constants(theta, 0.0, 1.0).largest().finite():
        row = compare(f"bounds of the second derivatives of {block.name}", False, "is", True)
        return silent(_name(step), [row], "no_constants: the block gives no bounds of its derivatives")
    warn_order(block, X, y, v, theta)
    groups = data.equal_inputs(X)
    later = {j for _, j in data.equal_pairs(groups)}
    kept = torch.tensor([i for i in range(len(X)) if i not in later], dtype=torch.int64, device="cpu")
    counts = torch.bincount(groups)[groups[kept]]
    options, made = {"local": constants == "local", "certified": level == "certified"}, []
    for net in theta:
        at = centre(block, net, X[kept], y[kept], v, counts=counts.to(X.device), weights=weights, **options)
        made.append(_certificate(block, net, at, len(X), v, step, weights, constants == "local", level))
    front = gather(made, key=lambda member: -member.quantities["ratio"])
    if not front.members or not front.holds:
        return front
    every = {name: [m.quantities[name] for m in made] for name in front.quantities}
    return replace(front, quantities={n: min(q) if n in _SMALLEST else max(q) for n, q in every.items()})


def _name(step: float | None) -> str:
    return f"Zero loss at this size, {'flow' if step is None else 'gradient descent'}"


def _certificate(
    block: Block,
    theta: Tensor,
    at: Centre,
    n: int,
    v: Tensor,
    step: float | None,
    weights: Tensor | None,
    local: bool,
    level: Literal["measured", "certified"],
) -> Certificate:
    """The rows, the quantities and the reason for one network."""
    factor, theta = (4 if step is None else 8), number(theta, level)
    of = like(theta)
    r, lam, kappa = of(at.r), of(at.lam), upper(rigor.norm(of(v)))
    values = {"lambda": at.lam, "E_0": upper(r**2 / (2 * n)), "residual": at.r}
    rows = [
        Assumption("inputs distinct, or merged with equal targets", True, "is", True, "exact", True),
        compare("λ = λ_min(K)", at.lam, ">", 0.0, level),
    ]
    if not rows[-1].holds:
        return Certificate(_name(step), False, tuple(rows), values, f"kernel_singular: λ = {at.lam:.3g}")
    search = local_region if local else uniform_region
    region = search(block, theta, at, n, kappa, factor=factor, weights=weights)
    rows.append(compare("R_s, which no particle can leave", region.radius, "<", math.inf, level))
    if not rows[-1].holds:
        reason = "radius_diverged: no radius found that no particle can leave"
        return Certificate(_name(step), False, tuple(rows), values, reason)
    beta = minimum(region.beta, sqrt(of(at.top)) + sqrt(lam) / 2)
    lead = factor * region.Lambda * r
    rows.append(compare(f"{factor} Λ|r|, against λ", upper(lead), "<", at.lam, level))
    values |= {
        "Lambda": upper(region.Lambda),
        "ratio": upper(lead / lam),
        "rate": lower(lam / (2 * n) if step is None else of(step) * lam / (4 * n)),
        "movement": upper(factor * r / (2 * sqrt(lam))),
        "R_s": region.radius,
        "beta": upper(beta),
    }
    reason = "" if rows[-1].holds else f"residual_too_large: {factor} Λ|r|/λ = {values['ratio']:.3g}"
    if step is not None:
        values["max_step"] = lower(n / (beta**2 + region.Lambda * r))
        rows.append(compare("h, against h_max", step, "<=", values["max_step"], level))
        if not reason and not rows[-1].holds:
            reason = f"step_too_large: h = {step:.3g}, h_max = {show(values['max_step'], side='down')}"
    rows.append(assumed("gradient descent in exact arithmetic" if step is not None else "the flow"))
    rate = show(values["rate"], side="down")
    says = f"E_j <= (1 - {rate})^j E_0" if step is not None else f"E <= E_0 exp(-{rate} s)"
    return Certificate(_name(step), not reason, tuple(rows), values, reason, says="" if reason else says)
