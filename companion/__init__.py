"""Wide Enough: five theorems on when gradient descent reaches zero loss, run and checked.

One result is one wing; each is imported when it is first named.

- `width_bounds`: gradient descent on deep ReLU networks reaches zero loss at finite width (Nguyen 2021).
- `mean_field`: the mean-field limit of deep ResNets and its zero loss (Ding, Chen, Li and Wright 2021).
- `beyond_ntk`: a two-phase guarantee for networks that learn features (Kawaguchi and Sun 2021).
- `minimum_norm`: convergence to the minimum-norm solution (Satpathi and Srikant 2021).
- `basins`: bad basins disappear with width (Li, Ding and Sun 2018-22).

They stand on common ground: `data`, `networks`, `kernels`, `descent`, `runs`, `certificate`, and `rigor`, arithmetic
whose results are theorems. `lab` holds what a lesson needs around the mathematics: claims, plotting, records, sweeps.
"""

from importlib import import_module

__version__ = "0.1.0"

_DOORS = (
    "arguments",
    "basins",
    "beyond_ntk",
    "certificate",
    "data",
    "descent",
    "kernels",
    "lab",
    "mean_field",
    "minimum_norm",
    "networks",
    "rigor",
    "runs",
    "width_bounds",
)


def __getattr__(name: str) -> object:
    if name in _DOORS:
        return import_module(f"companion.{name}")
    raise AttributeError(f"module 'companion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOORS})
