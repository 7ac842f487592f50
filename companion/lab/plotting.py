"""The look of the lessons' figures: prediction and measurement, the same everywhere, and a player that needs no server.

Measured curves are solid, predicted ones dashed, in colours that stay apart for colour-blind readers.  Figures keep
their own light background, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

# Okabe and Ito's palette, reordered: blue, vermilion, green, purple, orange, sky, black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MEASURED = {"linestyle": "-", "linewidth": 1.8}
PREDICTED = {"linestyle": (0, (5, 2.5)), "linewidth": 1.6}

_STYLE = {
    "figure.figsize": (6.4, 3.8),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "font.size": 10.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "animation.embed_limit": 40,
    "animation.html": "jshtml",
}


def use() -> None:
    """Set the course's figure style for this session, and ask a notebook for sharp (retina) pictures.

    The one function of the package that changes global state: matplotlib's `rcParams`, and IPython's figure format.
    """
    plt.rcParams.update(_STYLE)
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ModuleNotFoundError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("retina")


def predicted_over_measured(
    axis: Axes,
    k: Any,
    measured: Any,
    predicted: Any,
    *,
    colour: str = COLOURS[0],
    labels: Sequence[str] = ("measured", "predicted"),
) -> None:
    """Draw a measured curve (solid) and the theorem's curve over it (dashed, darker), with labels.

    Args:
        axis: where to draw.
        k: abscissae, shape (T,).
        measured: ordinates, shape (T,) or (S, T) for S runs drawn as thin lines.
        predicted: ordinates, shape (T,).
        colour: the colour of the measured curve.
        labels: the two labels of the legend.
    """
    k, predicted, runs = np.asarray(k), np.asarray(predicted), np.atleast_2d(np.asarray(measured))
    thin = MEASURED | ({"linewidth": 0.9, "alpha": 0.6} if len(runs) > 1 else {})
    for i, run in enumerate(runs):
        axis.plot(k, run, color=colour, label=labels[0] if i == 0 else None, **thin)
    axis.plot(k, predicted, color=COLOURS[-1], label=labels[1], **PREDICTED)


def slope_guide(axis: Axes, x: Sequence[float], y0: float, slope: float, label: str, **style: Any) -> Line2D:
    """Draw ``y = y0 (x / x_0)^slope`` through the first abscissa on logarithmic axes, with its label at the end."""
    x = np.asarray(x, dtype=float)
    y = y0 * (x / x[0]) ** slope
    (line,) = axis.plot(x, y, **(PREDICTED | {"color": "#777777", "linewidth": 1.1} | style))
    axis.annotate(label, (x[-1], y[-1]), xytext=(3, 0), textcoords="offset points", color="#555555", va="center")
    return line


class Player:
    """A film with play, pause and a slider that works on a static page; shown by a notebook as HTML."""

    def __init__(self, markup: str, alt: str) -> None:
        self._markup, self.alt = markup, alt

    def _repr_html_(self) -> str:
        return self._markup

    def __repr__(self) -> str:
        return f"[a player: {self.alt}]"


def player(figure: Figure, draw: Callable[[int], Any], frames: int, *, alt: str, interval: int = 80) -> Player:
    """Make a film of `frames` pictures with matplotlib's `to_jshtml` player, and close the figure.

    Args:
        figure: the figure that `draw` changes.
        draw: called with the number of the frame.
        frames: how many frames.
        alt: what the film shows, for readers who cannot see it.
        interval: milliseconds for each frame.

    Returns:
        A `Player`; its markup is the same at every run on one machine (matplotlib's random names are replaced).
    """
    film = FuncAnimation(figure, draw, frames=frames, interval=interval, blit=False)
    # the film is encoded frame by frame: a tight bounding box would let frames differ in size
    with plt.rc_context({"savefig.bbox": None, "savefig.dpi": 96}):
        markup = film.to_jshtml(default_mode="once")
    plt.close(figure)
    return Player(_tidy(markup, alt), alt)


_BUTTONS = {
    "Decrease speed": "−",
    "First frame": "|◀",
    "Previous frame": "‹",
    "Play backwards": "◀",
    "Pause": "❚❚",
    "Play": "▶",
    "Next frame": "›",
    "Last frame": "▶|",
    "Increase speed": "+",
}


def _tidy(markup: str, alt: str) -> str:
    """Make matplotlib's player self-contained, repeatable and readable aloud.

    It loads its icons from another site, names its parts at random, and gives its picture neither an alternative text
    nor a first frame for a page without scripts.
    """
    markup = re.sub(r"<link[^>]*>\s*", "", markup)
    for title, sign in _BUTTONS.items():
        markup = re.sub(rf'(title="{title}"[^>]*>)\s*<i class="fa [^"]*"></i>', rf"\g<1>{sign}", markup)
    name = hashlib.sha256(alt.encode()).hexdigest()[:32]
    for random_name in set(re.findall(r"_anim_img([0-9a-f]{32})", markup)):
        markup = markup.replace(random_name, name)
    markup = re.sub(r'(= "data:image/png;base64,)([^"]*)"', _small_frame, markup)
    first = re.search(r'frames\[0\] = "([^"]*)"', markup)
    source = first[1] if first else ""
    label = html.escape(alt, quote=True)
    markup = markup.replace("<img ", f'<img alt="{label}" src="{source}" ', 1)
    markup = markup.replace('type="range" ', f'type="range" aria-label="frame of: {label}" ', 1)
    markup = markup.replace('<form title="Repetition mode"', '<form hidden title="Repetition mode"')
    return f'<div class="player">{markup}</div>'


def _small_frame(match: re.Match[str]) -> str:
    """Store a frame with 256 colours, chosen to keep the rare ones (thin lines): half the size or less."""
    picture = Image.open(io.BytesIO(base64.b64decode(match[2].replace("\\\n", "")))).convert("RGB")
    packed = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(packed, "png", optimize=True)
    return f'{match[1]}{base64.b64encode(packed.getvalue()).decode()}"'
