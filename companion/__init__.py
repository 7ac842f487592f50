"""Wide Enough: five theorems on when gradient descent reaches zero loss, run and checked."""

__version__ = "0.1.0"
