"""Networks for images, written plainly: a multilayer perceptron and a convolutional residual network with BatchNorm.

Both are ``torch.nn.Sequential`` with named parts, so that they can be read, trained and walked from front to back. All
inputs are rows ``(N, d)``; an image network begins by folding a row into an image. The end is the same everywhere::

    ..., xi, model.wide = nn.Linear(p, m), model.wide_activation, model.last = nn.Linear(m, K)

with ``xi`` the lower layers' output. A sum of two branches is the module `Residual`, never a hidden ``+``.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion.arguments import checked
from companion.networks.layers import Residual, Softplus

_Make = Callable[[], nn.Module]


@checked
def mlp(
    widths: Sequence[int],
    *,
    activation: _Make = Softplus,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Build ``h_0 = x``, ``h_l = sigma(W_l h_{l-1} + b_l)``, output ``W_L h_{L-1} + b_L``.

    Args:
        widths: ``(d, n_1, ..., m, K)``; the last hidden layer, of width m, is the wide one.
        activation: called without arguments for each activation, e.g. ``lambda: Softplus(10.0)`` or ``nn.Tanh``.
        generator: CPU generator for the initial parameters, see `initialize`.
        dtype: of the parameters.
        device: where they live.

    Returns:
        The network; `last` and `wide` are attributes, and lower parts are called ``linear1``, ``activation1``, ...

    Raises:
        ValueError: fewer than three widths, or a width below 1.
    """
    widths = [int(n) for n in widths]
    if len(widths) < 3 or min(widths) < 1:
        raise ValueError(f"widths is {tuple(widths)}; (d, ..., m, K) with at least one hidden layer is needed")
    with torch.random.fork_rng(devices=[]):  # torch's constructors draw numbers of their own, which are not used
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for l, (n_in, n_out) in enumerate(itertools.pairwise(widths[:-2]), 1):
            parts[f"linear{l}"] = nn.Linear(n_in, n_out)
            parts[f"activation{l}"] = activation()
        parts["wide"] = nn.Linear(widths[-3], widths[-2])
        parts["wide_activation"] = activation()
        parts["last"] = nn.Linear(widths[-2], widths[-1])
    return initialize(nn.Sequential(parts), generator, dtype=dtype, device=device)


@checked
def conv_resnet(
    image: Sequence[int],
    channels: Sequence[int],
    wide: int,
    classes: int,
    *,
    blocks: int = 1,
    activation: _Make = Softplus,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Build a convolutional residual network with BatchNorm, a dense wide layer and a linear last layer.

    Rows are folded into images; the stem is convolution, BatchNorm, activation; each stage has residual blocks ``x ->
    sigma(BN(conv(sigma(BN(conv x)))) + shortcut(x))`` with 3 x 3 convolutions, and halves the image where the
    number of channels grows; the mean over the remaining pixels gives ``xi``.

    Args:
        image: ``(C, height, width)`` of an input; a row has the product of them as its length.
        channels: ``(stem, stage 1, stage 2, ...)``; ``(16, 16, 32)`` suits 8 x 8 digits, ``(64, 64, 128, 256, 512)``
            with ``blocks=2`` has the layout of an 18-layer network.
        wide: width m of the dense wide layer.
        classes: number of outputs K.
        blocks: residual blocks in each stage.
        activation: called without arguments for each activation.
        generator: CPU generator for the initial parameters, see `initialize`.
        dtype: of the parameters.
        device: where they live.

    Returns:
        The network; ``fold``, ``stem``, ``stage1``, ..., ``pool``, ``flatten``, ``wide``, ``wide_activation`` and
        ``last`` are attributes.

    Raises:
        ValueError: sizes below 1.
    """
    image, channels = [int(n) for n in image], [int(n) for n in channels]
    if len(image) != 3 or min(image) < 1:
        raise ValueError(f"image is {tuple(image)}; (C, height, width) is needed")
    if len(channels) < 2 or min(*channels, wide, classes, blocks) < 1 or max(*channels, wide, classes) >= 2**31:
        raise ValueError(
            f"channels, wide, classes, blocks are {tuple(channels)}, {wide}, {classes}, {blocks}; a stem, at least one "
            "stage, and numbers >= 1 are needed"
        )
    with torch.random.fork_rng(devices=[]):
        parts: OrderedDict[str, nn.Module] = OrderedDict(fold=nn.Unflatten(1, tuple(image)))
        parts["stem"] = nn.Sequential(*_conv_bn(image[0], channels[0]), activation())
        height, width = image[1:]
        for s, (before, after) in enumerate(itertools.pairwise(channels), 1):
            stride = 2 if after > before and min(height, width) > 1 else 1
            height, width = -(-height // stride), -(-width // stride)
            stage = [_block(before, after, stride, activation)]
            stage += [_block(after, after, 1, activation) for _ in range(blocks - 1)]
            parts[f"stage{s}"] = nn.Sequential(*stage)
        parts["pool"] = nn.AvgPool2d((height, width))
        parts["flatten"] = nn.Flatten()
        parts["wide"] = nn.Linear(channels[-1], wide)
        parts["wide_activation"] = activation()
        parts["last"] = nn.Linear(wide, classes)
    return initialize(nn.Sequential(parts), generator, dtype=dtype, device=device)


def _conv_bn(n_in: int, n_out: int, size: int = 3, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution without bias, as BatchNorm brings its own, and that BatchNorm."""
    return nn.Conv2d(n_in, n_out, size, stride=stride, padding=size // 2, bias=False), nn.BatchNorm2d(n_out)


def _block(n_in: int, n_out: int, stride: int, activation: _Make) -> nn.Sequential:
    body = nn.Sequential(*_conv_bn(n_in, n_out, stride=stride), activation(), *_conv_bn(n_out, n_out))
    same = n_in == n_out and stride == 1
    shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(n_in, n_out, size=1, stride=stride))
    return nn.Sequential(Residual(body, shortcut), activation())


@checked
def initialize(
    model: nn.Module,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Draw weights ``N(0, 2 / n_in)`` and biases uniform on ``[-1, 1] / sqrt(n_in)``; normalizations keep 1 and 0.

    The numbers are drawn on the CPU in float64 and then cast, so that every device and dtype starts from the same.

    Args:
        model: changed in place; its linear and convolutional layers are drawn anew, in order.
        generator: CPU generator.
        dtype: of the parameters and floating buffers.
        device: where they live; None for the CPU.

    Returns:
        The model.

    Raises:
        ValueError: a generator that is not on the CPU.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"generator lives on {generator.device}; a CPU generator is needed, so that all devices agree")
    model.to(dtype=dtype, device=device)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            n_in = module.weight[0].numel()
            draw = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
            module.weight.copy_(draw.mul_(math.sqrt(2 / n_in)))
            if module.bias is not None:
                draw = torch.rand(module.bias.shape, generator=generator, dtype=torch.float64)
                module.bias.copy_(draw.mul_(2).sub_(1).div_(math.sqrt(n_in)))
    return model


@checked
def random_shift(image: Sequence[int], pixels: int = 1) -> Callable[[Float[Tensor, "N d"]], Float[Tensor, "N d"]]:
    """Make an augmentation ``x -> x`` moved by up to `pixels` in both directions, with zeros moving in.

    Args:
        image: ``(C, height, width)`` of a row.
        pixels: largest shift, at least 0.

    Returns:
        A function of a batch ``(N, d)``. It draws from torch's global generator on the CPU, as dropout does.

    Raises:
        ValueError: sizes out of range.
    """
    C, H, W = (int(n) for n in image)
    if min(C, H, W) < 1 or pixels < 0:
        raise ValueError(f"image is {(C, H, W)} and pixels is {pixels}; positive sizes and pixels >= 0 are needed")

    def shift(batch: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
        N = len(batch)
        padded = nn.functional.pad(batch.reshape(N, C, H, W), (pixels,) * 4)
        down, right = torch.randint(0, 2 * pixels + 1, (2, N, 1)).to(batch.device)
        rows = (down + torch.arange(H, device=batch.device))[:, None, :, None]
        columns = (right + torch.arange(W, device=batch.device))[:, None, None, :]
        member = torch.arange(N, device=batch.device)[:, None, None, None]
        channel = torch.arange(C, device=batch.device)[None, :, None, None]
        return padded[member, channel, rows, columns].reshape(N, -1)

    return shift
