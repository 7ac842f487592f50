"""BatchNorm's modes: other statistics, the same function; so one value of the buffers speaks for all (lesson 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion.arguments import checked
from companion.beyond_ntk.phase1 import outputs

_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_Statistics = Mapping[str, tuple[Tensor, Tensor]]


@checked
def batchnorm_statistics(model: nn.Module, X: Float[Tensor, "N ..."]) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure the mean and the (biased) variance of every BatchNorm's input, over all of X in eval mode.

    Args:
        model: any module with BatchNorm layers; not changed.
        X: inputs ``(N, ...)``.

    Returns:
        Mean and variance ``(C,)`` by the layer's name.

    Raises:
        ValueError: a layer that is called twice, for which no one pair of statistics is right.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if name in found:
                raise ValueError(f"BatchNorm {name!r} is called twice, on inputs with other statistics; once is needed")
            axes = [i for i in range(given[0].ndim) if i != 1]
            found[name] = (given[0].mean(axes), given[0].var(axes, correction=0))

        return hook

    twin = copy.deepcopy(model).eval()
    for name, part in twin.named_modules():
        if isinstance(part, _BATCHNORM):
            part.register_forward_pre_hook(look(name))
    with torch.no_grad():
        outputs(twin, X)
    return found


@checked
def switch_batchnorm(model: nn.Module, statistics: _Statistics) -> nn.Module:
    """Give BatchNorm layers other statistics and undo it: ``gamma' = gamma sqrt((v' + e) / (v + e))``, ...

    ``b' = b + gamma (mu' - mu) / sqrt(v + e)``. The copy computes the same function in eval mode; with the statistics
    of `batchnorm_statistics` it does so in full-batch train mode, too. So full rank for one value of the buffers is
    full rank for every other (lesson 3).

    Args:
        model: any module; not changed.
        statistics: the new mean and variance by the layer's name; other layers stay.

    Returns:
        A copy in eval mode.

    Raises:
        ValueError: a name that is no BatchNorm with statistics and affine parameters, a variance below 0, or parameters
            that are shared.
    """
    twin = copy.deepcopy(model).eval()
    parts = dict(twin.named_modules())
    seen: set[int] = set()
    for name, (mean, variance) in statistics.items():
        part = parts.get(name)
        if not isinstance(part, _BATCHNORM) or part.running_mean is None or part.weight is None:
            raise ValueError(f"statistics names {name!r}; a BatchNorm with buffers and affine parameters is needed")
        if not bool((variance >= 0).all()):
            raise ValueError(f"statistics of {name!r} holds a variance below 0 or NaN; numbers >= 0 are needed")
        if id(part.weight) in seen:
            raise ValueError(f"BatchNorm {name!r} shares its parameters with another; each needs its own")
        seen.add(id(part.weight))
        with torch.no_grad():
            root = torch.sqrt(part.running_var + part.eps)
            part.bias.add_(part.weight * (mean - part.running_mean) / root)
            part.weight.mul_(torch.sqrt(variance + part.eps) / root)
            part.running_mean.copy_(mean)
            part.running_var.copy_(variance)
    return twin
