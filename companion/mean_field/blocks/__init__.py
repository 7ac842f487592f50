"""Blocks ``f(z, theta)`` of a mean-field ResNet."""

from companion.mean_field.blocks.base import (
    HYPOTHESES,
    Block,
    Constants,
    Custom,
    Hypothesis,
    audit,
    check_dimension,
    check_positive,
    largest,
    norm,
    reached,
)
from companion.mean_field.blocks.bumps import (
    RBF,
    BallBump,
    Bias,
    GaussBump,
    Linear,
    ReluMLP,
    Squares,
    TanhMLP,
)

__all__ = [
    "HYPOTHESES",
    "RBF",
    "BallBump",
    "Bias",
    "Block",
    "Constants",
    "Custom",
    "GaussBump",
    "Hypothesis",
    "Linear",
    "ReluMLP",
    "Squares",
    "TanhMLP",
    "audit",
    "check_dimension",
    "check_positive",
    "largest",
    "norm",
    "reached",
]
