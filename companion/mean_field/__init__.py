"""Result 2, mean-field ResNets (Ding, Chen, Li and Wright 2021): a deep wide net as a scheme for a flow of laws.

``z_{l+1} = z_l + (1/L) sum_m w_m f(z_l, theta_lm)``, loss ``E = (1/2n) sum_i r_i^2`` with ``r_i = v.z_L^i - y_i``,
trained by ``theta <- theta - h (L / w_m) grad E``. As L and M grow this follows the flow of a law of parameters
(`limit_flow`, `fv_flow`). `coupling_bound` says how far a net of given size can be from it, `certify_zero_loss` proves
at any moment of training that the loss goes to zero from there, `isotonic_floor` that it cannot, and `audit` says which
hypotheses of the paper's theorems a block satisfies. Particles are ``theta (S, L, M, k)``: S networks, L layers, M
particles.
"""

from companion.mean_field.blocks import (
    RBF,
    BallBump,
    Bias,
    Block,
    Constants,
    Custom,
    GaussBump,
    Linear,
    ReluMLP,
    Squares,
    TanhMLP,
)
from companion.mean_field.certificates import certify_zero_loss
from companion.mean_field.coupling import coupling_bound
from companion.mean_field.density_flow import fv_flow
from companion.mean_field.flow import Depth, density_rule, limit_flow, normal_rule
from companion.mean_field.hypotheses import (
    audit,
    crossing_ratio,
    depth_regularity,
    first_variation,
    first_variation_sup,
    isotonic_floor,
)
from companion.mean_field.jacobian import gram_kernel
from companion.mean_field.resnets import forward, init_particles, monitors, rescaled_gradient, train

__all__ = [
    "RBF",
    "BallBump",
    "Bias",
    "Block",
    "Constants",
    "Custom",
    "Depth",
    "GaussBump",
    "Linear",
    "ReluMLP",
    "Squares",
    "TanhMLP",
    "audit",
    "certify_zero_loss",
    "coupling_bound",
    "crossing_ratio",
    "density_rule",
    "depth_regularity",
    "first_variation",
    "first_variation_sup",
    "forward",
    "fv_flow",
    "gram_kernel",
    "init_particles",
    "isotonic_floor",
    "limit_flow",
    "monitors",
    "normal_rule",
    "rescaled_gradient",
    "train",
]
