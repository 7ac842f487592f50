"""Result 4, minimum norm (Satpathi and Srikant 2021): where gradient descent on a wide ReLU layer stops.

The network is ``f(x) = sum_r a_r relu(w_r.x) / sqrt(m)`` with fixed signs ``a_r = +-1``; the loss is
``0.5 * ||f(X) - y||^2``.  J is the Jacobian of the N outputs, ``G = J J^T``, ``e = y - f``; an index 0 means "at the
initial weights".  The minimum-norm solution ``w* = w_0 + J_0^T G_0^-1 e_0`` is the point nearest to ``w_0`` that fits
the data *linearly*; `solve` finds it, `train` follows the distance of gradient descent to it, and three certificates
bound that distance: `certify_width` from the kernel alone, `certify` from the initial weights, `certify_after` from any
later ones.  Weights are ``(d, m)`` or ``(S, d, m)``, signs ``(m,)`` or ``(S, m)``, targets ``(N,)`` or ``(S, N)``.
"""

from companion.minimum_norm.certificates import certify, certify_after, certify_width, function_bound
from companion.minimum_norm.first_layer import WideStep, empirical_gram, forward
from companion.minimum_norm.kernel_limit import (
    Constant,
    Generalization,
    KernelFit,
    generalization_bound,
    kernel_regression,
    perp_constant,
    perp_constant_n1,
    spectrum_bounds,
)
from companion.minimum_norm.solution import (
    Lyapunov,
    MinimumNorm,
    figure_1_data,
    initialize,
    lyapunov_terms,
    safe_step,
    solve,
    train,
)

__all__ = [
    "Constant",
    "Generalization",
    "KernelFit",
    "Lyapunov",
    "MinimumNorm",
    "WideStep",
    "certify",
    "certify_after",
    "certify_width",
    "empirical_gram",
    "figure_1_data",
    "forward",
    "function_bound",
    "generalization_bound",
    "initialize",
    "kernel_regression",
    "lyapunov_terms",
    "perp_constant",
    "perp_constant_n1",
    "safe_step",
    "solve",
    "spectrum_bounds",
    "train",
]
