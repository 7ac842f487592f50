"""Lesson 3, beyond the NTK: a guarantee of global convergence for a network that learns features.

The recipe of Kawaguchi and Sun (2021): train all layers with any optimizer, add a little noise, then train the last
layer. This module gathers what the lesson uses; the work is done below it:

- `two_phase`: the recipe for any torch module, with features, noise and freezing;
- `last_layer`: phase 2, a convex problem; `regression_bounds`: its rates, curves, gaps and floors;
- `expressivity`, `loss_gap`: the certificates; `enclosures`: what they stand on;
- `features`: kernels before and after training;
- `constructions`: the witness, BatchNorm's modes and the tied trap; `vision`: the networks.
"""

from companion.beyond_ntk.bounds import (
    comparator_bound,
    cross_entropy_bound,
    duplicate_floor,
    exact_curve,
    kaczmarz_bound,
    linear_rate,
    ridge_gap,
    sgd_bound,
)
from companion.beyond_ntk.constructions import (
    batchnorm_statistics,
    spline_witness,
    switch_batchnorm,
    tie,
    tied_floor,
    tied_train,
    untie,
)
from companion.beyond_ntk.expressivity import certify_expressivity, equal_inputs, separation
from companion.beyond_ntk.features import cka, empirical_ntk, relative_change
from companion.beyond_ntk.gap_and_rate import certify_gap, certify_rate
from companion.beyond_ntk.last_layer import (
    average_loss,
    centre,
    curvature,
    phase2_gd,
    phase2_lbfgs,
    phase2_least_squares,
    phase2_momentum_sgd,
    phase2_nesterov,
    single_sample_sgd,
)
from companion.beyond_ntk.recipe import (
    last_layer_features,
    last_weights,
    relative_noise,
    set_last_weights,
    two_phase,
    with_constant,
)

__all__ = [
    "average_loss",
    "batchnorm_statistics",
    "centre",
    "certify_expressivity",
    "certify_gap",
    "certify_rate",
    "cka",
    "comparator_bound",
    "cross_entropy_bound",
    "curvature",
    "duplicate_floor",
    "empirical_ntk",
    "equal_inputs",
    "exact_curve",
    "kaczmarz_bound",
    "last_layer_features",
    "last_weights",
    "linear_rate",
    "phase2_gd",
    "phase2_lbfgs",
    "phase2_least_squares",
    "phase2_momentum_sgd",
    "phase2_nesterov",
    "relative_change",
    "relative_noise",
    "ridge_gap",
    "separation",
    "set_last_weights",
    "sgd_bound",
    "single_sample_sgd",
    "spline_witness",
    "switch_batchnorm",
    "tie",
    "tied_floor",
    "tied_train",
    "two_phase",
    "untie",
    "with_constant",
]
