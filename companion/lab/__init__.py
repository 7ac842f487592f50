"""What a lesson needs around the mathematics: claims, plotting, records, sweeps."""

from companion.lab.claims import (
    ClaimFailed,
    Claims,
)
from companion.lab.sweeps import (
    grid,
    stored,
    sweep,
)

__all__ = [
    "ClaimFailed",
    "Claims",
    "grid",
    "stored",
    "sweep",
]
