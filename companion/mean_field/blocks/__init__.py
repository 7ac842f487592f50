"""Blocks ``f(z, theta)`` of residual networks that average over particles: ``z <- z + (1/L) sum_m w_m f(z, theta_m)``.

A block knows its function and how to multiply by its derivatives, the constants that the theorems of lesson 2 need, and
which of their hypotheses it satisfies. States are ``z (S, n, d)``, one layer's particles ``theta (S, M, k)`` with
weights ``w (M,)``. `Block` says what a block of one's own must give.
"""

from companion.mean_field.blocks.base import HYPOTHESES, Block, Constants, Custom, check_fit, check_positive, like
from companion.mean_field.blocks.bumps import RBF, BallBump, GaussBump
from companion.mean_field.blocks.perceptrons import ReluMLP, TanhMLP
from companion.mean_field.blocks.polynomials import Bias, Linear, Squares

__all__ = [
    "HYPOTHESES",
    "RBF",
    "BallBump",
    "Bias",
    "Block",
    "Constants",
    "Custom",
    "GaussBump",
    "Linear",
    "ReluMLP",
    "Squares",
    "TanhMLP",
    "check_fit",
    "check_positive",
    "like",
]
