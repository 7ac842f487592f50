"""Result 1, width bounds (Nguyen 2021): when gradient descent on a deep ReLU network is proved to reach zero loss.

The network has layers ``F_0 = X``, ``F_l = relu(F_{l-1} W_l)`` for ``l < L`` and the output ``F_{L-1} W_L``, no biases;
the loss is ``0.5 * ||F_{L-1} W_L - Y||_F^2``.  Two theorems look at one initialization and one data set:

- Theorem P, the paper's, with explicit constants: `certify_paper`.
- Theorem C, the course's, derived in lesson 1, weaker hypotheses and the same conclusion: `certify`.

Both only read a handful of numbers, the `Spectra` of the network; everything that decides a theorem is a plain
function of them, batched over leading axes, so that a map over widths or scales is one call.
"""

from companion.width_bounds.certificates import certify, certify_paper
from companion.width_bounds.fixed_points import (
    AtRadii,
    Spectra,
    ball_fixed_point,
    ball_map,
    necessary_condition,
    smallest_beta,
    spectra,
    two_layer_threshold,
)
from companion.width_bounds.training import envelope, train
from companion.width_bounds.widths import chernoff_width, hermite_lower_bound, proxy_spectra, proxy_width

__all__ = [
    "AtRadii",
    "Spectra",
    "ball_fixed_point",
    "ball_map",
    "certify",
    "certify_paper",
    "chernoff_width",
    "envelope",
    "hermite_lower_bound",
    "necessary_condition",
    "proxy_spectra",
    "proxy_width",
    "smallest_beta",
    "spectra",
    "train",
    "two_layer_threshold",
]
