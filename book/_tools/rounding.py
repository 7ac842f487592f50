"""The last bits of PyTorch's results, moved as another processor might move them.

Every processor rounds a single ``+ - * /`` and a square root alike. The order of a sum, fused operations, the last bits
of ``exp`` and the path of a factorization differ. Under `Rounding` each float32 and float64 result of such an operation
on the CPU, backward passes included, is moved by up to `MOST` units in the last place. The noise is a hash of the
operation's name, the number's own bits and the seed: a repeated run repeats, and equal numbers stay equal. Besides,
products of matrices and sums add up their terms in the opposite order, so that a sum that cancels moves as a whole.

Left alone: zero, infinity, NaN and subnormal numbers; short entries, the last half of whose digits is zero, of what is
computed entry by entry (``exp(0)``, ``sigmoid(0)``, a saturated ``tanh``); results all of whose entries are whole or
short (counts, residues), and means of such; sums of two terms and products of one, which are single operations.
Out of reach: NumPy's and Python's own functions (the lessons take logarithms and slopes of finished numbers with them)
and other processes.

    with Rounding(seed=1): ...     # or, for the rest of the process, install(1)
"""

import math
import zlib

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

MOST = 2
MANY = 2**31
_BLOCK = 2**14  # numbers at a time, so that what is made of them stays in the cache

# --- which operations -------------------------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# in ATen's names, without the underscore of those that work in place; what is made of these needs no name here
PRODUCTS = _names("""
    _addmm_activation _cdist_backward _cdist_forward _euclidean_dist _pdist_forward
    _scaled_dot_product_flash_attention_for_cpu _slow_conv2d_forward _trilinear addbmm addmm addmv addr baddbmm bmm
    convolution convolution_backward convolution_overrideable dot linalg_cross linear mkldnn_convolution mm mv polar
    slow_conv3d thnn_conv2d vdot
""")
REDUCTIONS = _names("""
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _fft_c2c _fft_c2r _fft_r2c _log_softmax
    _log_softmax_backward_data _native_batch_norm_legit _native_batch_norm_legit_no_training _softmax
    _softmax_backward_data avg_pool2d avg_pool2d_backward avg_pool3d binary_cross_entropy cumprod cumsum dist
    embedding_dense_backward huber_loss index_add index_reduce l1_loss linalg_matrix_exp linalg_vector_norm
    logcumsumexp logsumexp mean mse_loss nansum native_batch_norm native_batch_norm_backward native_group_norm
    native_group_norm_backward native_layer_norm native_layer_norm_backward nll_loss2d_forward nll_loss_forward norm
    prod renorm scatter_add scatter_reduce smooth_l1_loss std std_mean sum trace upsample_bilinear2d var var_mean
""")
FACTORIZATIONS = _names("""
    _linalg_det _linalg_eigh _linalg_eigvals _linalg_slogdet _linalg_solve_ex _linalg_svd cholesky cholesky_inverse
    cholesky_solve geqrf linalg_cholesky_ex linalg_eig linalg_eigvals linalg_householder_product linalg_inv_ex
    linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor_ex linalg_lu_solve linalg_pinv
    linalg_qr linalg_solve_triangular ormqr triangular_solve
""")
FUNCTIONS = _names("""
    acos acosh add addcdiv addcmul asin asinh atan atan2 atanh binary_cross_entropy_backward cauchy celu cos cosh
    digamma elu elu_backward erf erfc erfinv exp exp2 expm1 exponential gelu gelu_backward geometric hypot i0 igamma
    igammac lerp lgamma linspace log log10 log1p log2 log_normal log_sigmoid_backward log_sigmoid_forward logaddexp
    logaddexp2 logit logit_backward logspace mish mish_backward mse_loss_backward mvlgamma normal polygamma pow
    randn randn_like rsub selu sigmoid sigmoid_backward silu silu_backward sin sinc sinh softplus softplus_backward
    special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri special_xlog1py
    special_zeta sub tan tanh tanh_backward uniform xlogy
""")
# powers that the library makes of single products, quotients and square roots
_EXACT_POWERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)


def _kind(name: str) -> str:
    if name in FUNCTIONS:
        return "function"
    if name in PRODUCTS:
        return "product"
    return "other" if name in REDUCTIONS or name in FACTORIZATIONS else ""


def _terms(name: str, args: tuple) -> int:
    """How many products are added up in an entry of a product; many where it is not worth knowing."""
    if name in ("mm", "bmm", "mv", "dot", "vdot", "linear"):
        return args[0].shape[-1]
    if name in ("addmm", "baddbmm", "addmv"):
        return args[1].shape[-1] + 1
    return math.prod(args[1].shape[1:]) + 1 if name == "convolution" else MANY


def _single(name: str, args: tuple, kwargs: dict, out: torch.Tensor) -> bool:
    """Whether this call is one rounding, or none, on every processor."""
    if name == "pow":
        return not isinstance(args[1], torch.Tensor) and args[1] in _EXACT_POWERS
    if name in ("add", "sub", "rsub"):  # a + alpha b may be fused; with a power of two it rounds once either way
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        return math.frexp(abs(alpha))[0] in (0.0, 0.5)
    if name == "uniform":  # a + (b - a) x, which may be fused
        return (*args[1:], 0, 1)[:2] == (0, 1)
    if name in PRODUCTS:
        return _terms(name, args) <= 1
    if name in ("sum", "mean", "prod", "linalg_vector_norm"):
        terms = args[0].numel() // max(1, out.numel())
        if name == "mean" and torch.equal((out * terms).round() / terms, out):
            return True  # the quotient of a whole sum: a share
        return terms <= (1 if name == "linalg_vector_norm" else 2)
    return False


def _backwards(name: str, args: tuple) -> tuple:
    """The arguments of the same products or sums, their terms in the opposite order."""
    if name in ("mm", "bmm"):
        return args[0].flip(-1), args[1].flip(-2), *args[2:]
    if name in ("mv", "dot", "vdot"):
        return args[0].flip(-1), args[1].flip(-1), *args[2:]
    if name in ("addmm", "baddbmm", "addmv"):
        return args[0], args[1].flip(-1), args[2].flip(-1 if name == "addmv" else -2), *args[3:]
    if name in ("sum", "mean") and args[0].is_floating_point():
        axes = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) and args[1] else range(args[0].ndim)
        return args[0].flip(list(axes)), *args[1:]
    return args


# --- the noise --------------------------------------------------------------------------------------------------------


class _Format:
    """The bit patterns of a floating type: `unsigned` integers of its size, and where its numbers lie among them."""

    def __init__(self, dtype: type, unsigned: type) -> None:
        limits, self.unsigned = np.finfo(dtype), unsigned
        self.size = unsigned(2 ** (8 * limits.dtype.itemsize - 1) - 1)  # all bits but the sign
        self.least = np.array(limits.tiny).view(unsigned)[()]  # below are zero and the subnormal numbers
        self.count = np.array(limits.max / 2).view(unsigned)[()] - self.least  # above, what a step might make infinite
        self.last = unsigned(2 ** (limits.nmant // 2) - 1)  # the last half of the digits


_FORMATS = {np.dtype(np.float32): _Format(np.float32, np.uint32), np.dtype(np.float64): _Format(np.float64, np.uint64)}
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def move(values: np.ndarray, key: int, each: bool, most: int = MOST) -> int:
    """Move the entries of `values` in place by -most, ..., -1, 1, ..., most units in the last place.

    Args:
        values: float32 or float64, of any shape and strides.
        key: names the noise: the same key and the same number give the same step.
        each: leave every short entry alone; if False, they and whole ones are left alone only when all are.
        most: the largest step, 1 or 2.

    Returns:
        How many entries were moved.
    """
    values = values.reshape(-1) if values.flags.c_contiguous else np.atleast_1d(values)
    blocks = (
        [values] if values.size <= _BLOCK or values.ndim > 1 else np.split(values, range(_BLOCK, len(values), _BLOCK))
    )
    if not each and all(_all_exact(block) for block in blocks):
        return 0
    return sum(_move(block, np.uint64(key), each, most) for block in blocks)


def _all_exact(values: np.ndarray) -> bool:
    """Whether each entry is whole, or short."""
    form = _FORMATS[values.dtype]
    long = (values.view(form.unsigned) & form.last) != 0
    if np.count_nonzero(long):
        long &= values != np.rint(values)
    return not np.count_nonzero(long)


def _move(values: np.ndarray, key: np.uint64, each: bool, most: int) -> int:
    form = _FORMATS[values.dtype]
    bits = values.view(form.unsigned)
    movable = ((bits & form.size) - form.least) < form.count  # below `least` the difference wraps around
    if each:
        movable &= (bits & form.last) != 0
    hashed = (bits ^ key) * _MIX[0]
    hashed ^= hashed >> np.uint64(29)
    hashed *= _MIX[1]
    hashed >>= np.uint64(62)
    steps = hashed.view(np.int64)
    if most == 1:
        steps &= 1
        steps *= 2
        steps -= 1
    else:
        steps -= 2
        steps += steps >= 0  # never a step of 0
    steps *= movable
    bits += steps.view(np.uint64) if form.unsigned is np.uint64 else steps.astype(np.uint32)
    return int(np.count_nonzero(movable))


class Rounding(TorchDispatchMode):
    """Moves the last bits of what PyTorch computes; see the module.

    Args:
        seed: another seed is another processor.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.moved = seed, 0
        self._known: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self._known:
            name = func.name().split("::")[-1].split(".")[0].removesuffix("_")
            self._known[func] = (name, _kind(name), zlib.crc32(f"{name} {self.seed}".encode()) * 0x9E3779B1)
        name, kind, key = self._known[func]
        kwargs = kwargs or {}
        if not kind:
            return func(*args, **kwargs)
        out = func(*_backwards(name, args), **kwargs)
        results = out if isinstance(out, tuple | list) else (out,)
        # where few products are added up, every proof grants less
        most = 1 if kind == "product" and _terms(name, args) <= 4 else MOST
        for result in results:
            if isinstance(result, torch.Tensor) and not _single(name, args, kwargs, result):
                self._move(result, key, kind == "function", most)
        return out

    def _move(self, result: torch.Tensor, key: int, each: bool, most: int) -> None:
        if result.device.type != "cpu" or not result.numel():
            return
        if result.is_complex():
            result = torch.view_as_real(result)
        if result.dtype in (torch.float32, torch.float64):
            self.moved += move(result.numpy(), key, each, most)


# --- for a whole process ----------------------------------------------------------------------------------------------

_installed: list[Rounding] = []


def install(seed: int) -> None:
    """Switch the noise on in this thread, for good."""
    _installed.append(Rounding(seed))
    _installed[-1].__enter__()


def report() -> None:
    """Print how many numbers the noise has moved in this process."""
    print(sum(mode.moved for mode in _installed))
