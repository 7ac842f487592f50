"""Lesson 3, beyond the NTK: a guarantee of global convergence for a network that learns features.

The recipe of Kawaguchi and Sun (2021): train all layers with any optimizer, add a little noise, then train the last
layer. What is inside:

- `recipe`, `phase1`: the recipe for any torch module, with features, noise and freezing;
- `phase2`, `last_layer`: the last layer's training, a convex problem; `bounds`: its rates, curves, gaps and floors;
- `expressivity`: a proof that the features can fit any targets; `certificates`: proofs of the gap to the global minimum
  and of the rate;
- `features`: kernels before and after training;
- `witness`, `batchnorm`, `tied`: the constructions in the proofs; `vision`: the networks.
"""

from companion.beyond_ntk.batchnorm import batchnorm_statistics, switch_batchnorm
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
from companion.beyond_ntk.certificates import certify_gap, certify_rate
from companion.beyond_ntk.expressivity import certify_expressivity, separation
from companion.beyond_ntk.features import cka, empirical_ntk
from companion.beyond_ntk.last_layer import average_loss, centre, curvature
from companion.beyond_ntk.phase2 import phase2_gd, phase2_lbfgs, phase2_nesterov, single_sample_sgd
from companion.beyond_ntk.recipe import TwoPhaseRun, last_layer_features, last_weights, two_phase, with_constant
from companion.beyond_ntk.tied import tie, tied_floor, tied_train, untie
from companion.beyond_ntk.vision import conv_resnet, mlp
from companion.beyond_ntk.witness import spline_witness

__all__ = [
    "TwoPhaseRun",
    "average_loss",
    "batchnorm_statistics",
    "centre",
    "certify_expressivity",
    "certify_gap",
    "certify_rate",
    "cka",
    "comparator_bound",
    "conv_resnet",
    "cross_entropy_bound",
    "curvature",
    "duplicate_floor",
    "empirical_ntk",
    "exact_curve",
    "kaczmarz_bound",
    "last_layer_features",
    "last_weights",
    "linear_rate",
    "mlp",
    "phase2_gd",
    "phase2_lbfgs",
    "phase2_nesterov",
    "ridge_gap",
    "separation",
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
