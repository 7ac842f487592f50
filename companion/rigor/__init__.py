"""Arithmetic whose results are theorems: matrices, layers, networks and formulas, with every rounding counted."""

from companion.rigor.balls import check_ball, dense_ball
from companion.rigor.intervals import Interval, cat, point, stack
from companion.rigor.linear_algebra import (
    eig_min_lower,
    frobenius_norm_upper,
    gram,
    norm,
    product_error,
    product_radius,
    sigma_min_lower,
    spectral_norm,
    spectral_norm_upper,
)
from companion.rigor.modules import enclose
from companion.rigor.rationals import exact_rank, exact_sigma_min_exceeds, null_space
from companion.rigor.rounding import UNIT, gamma, round_down, round_up

__all__ = [
    "UNIT",
    "Interval",
    "cat",
    "check_ball",
    "dense_ball",
    "eig_min_lower",
    "enclose",
    "exact_rank",
    "exact_sigma_min_exceeds",
    "frobenius_norm_upper",
    "gamma",
    "gram",
    "norm",
    "null_space",
    "point",
    "product_error",
    "product_radius",
    "round_down",
    "round_up",
    "sigma_min_lower",
    "spectral_norm",
    "spectral_norm_upper",
    "stack",
]
