"""Make the pictures of the home page and of the README from the package itself: `make pictures`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from companion import data, descent, kernels, networks
from companion import width_bounds as wb
from companion.lab import plotting

STATIC = Path(__file__).parents[1] / "_static"


def lift(angle: torch.Tensor) -> torch.Tensor:
    """Points of the unit circle."""
    return torch.stack([angle.sin(), angle.cos()], 1)


def home_player() -> plotting.Player:
    """Six points on an arc, three widths, a logarithmic clock; the wide one stays under its proved curve."""
    angle = 1.25 * torch.linspace(-1, 1, 6, dtype=torch.float64)
    X, Y = lift(angle), torch.tensor([-0.6, 0.8, -0.2, -0.9, 0.5, 0.3], dtype=torch.float64)[:, None]
    grid = torch.linspace(-1.45, 1.45, 200, dtype=torch.float64)
    clock = np.unique(np.geomspace(1, 30_000, 36).astype(int))
    runs, fits = {}, {}
    for n in (3, 12, 8000):
        W = networks.init_mlp((2, n, 1), scheme="gaussian", zero_last=True, generator=5)
        cert = wb.certify(X, Y, W)
        step = (
            cert.quantities["max_step"]
            if cert.holds
            else float(0.5 / torch.linalg.eigvalsh(kernels.ntk_gram(W, X))[0, -1])
        )
        look = {"fit": lambda state: networks.forward(state.weights, lift(grid))[0, :, 0]}
        parts, at = [(W, Y.norm(), torch.zeros(200).double())], 0
        for k in clock:
            run = descent.train(parts[-1][0], X, Y, step, int(k) - at, every=int(k) - at, observe=look)
            parts.append((run.weights, run.residual[-1, 0], run.observed["fit"][-1]))
            at = int(k)
        runs[n] = np.array([float(r) for _, r, _ in parts])
        fits[n] = [f for _, _, f in parts]
        if cert.holds:
            envelope = wb.envelope(cert, step, torch.tensor([0, *clock]))
    k = np.array([0.8, *clock])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.0))
    left.plot(angle, Y[:, 0], "o", color="#222222", markersize=6, zorder=5)
    curves, losses = {}, {}
    for (n, residual), colour in zip(runs.items(), [plotting.COLOURS[i] for i in (4, 2, 0)], strict=True):
        (curves[n],) = left.plot(grid, fits[n][0], color=colour, label=f"{n:,} neurons")
        (losses[n],) = right.plot(k[:1], residual[:1], color=colour)
    right.plot(k, envelope, color=plotting.COLOURS[-1], label="proved for 8,000 neurons", **plotting.PREDICTED)
    left.set(ylim=(-1.9, 1.4), xlabel="input (an angle)", title="what the networks compute")
    right.set(
        xscale="log",
        yscale="log",
        xlim=(0.8, 3e4),
        ylim=(1e-5, 4),
        xlabel="step k",
        title="distance from the data $\\|R_k\\|$",
    )
    left.legend(loc="lower left", ncol=3, columnspacing=1, handlelength=1.2)
    right.legend(loc="lower left")

    def draw(frame: int) -> None:
        for n in runs:
            curves[n].set_ydata(fits[n][frame])
            losses[n].set_data(k[: frame + 1], runs[n][: frame + 1])

    alt = (
        "A film of gradient descent on six points. Left: the functions of networks with 3, 12 and 8,000 neurons bend "
        "towards the points. Right: the distance from the data stalls for 3 neurons; it falls for 12, for which "
        "nothing was proved; for 8,000 neurons it falls below the dashed curve that was proved before training."
    )
    draw(len(k) - 1)
    figure.savefig(STATIC / "home.png", dpi=96)
    return plotting.player(figure, draw, len(k), alt=alt, interval=110)


def readme_pictures() -> None:
    """A certificate and a predicted-over-measured curve, as pictures for GitHub."""
    generator = torch.Generator().manual_seed(0)
    X, Y = data.sphere(50, 50, generator), data.signs(50, generator)
    weights = networks.init_mlp((50, 1600, 1), scheme="gaussian", zero_last=True, generator=generator)
    cert = wb.certify(X, Y, weights, level="certified")
    step = cert.quantities["max_step"]
    run = wb.train(X, Y, weights, step, 6000, every=50, certificate=cert)
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    plotting.predicted_over_measured(
        axis,
        run.steps,
        run.residual[:, 0],
        wb.envelope(cert, step, run.steps),
        labels=("measured", "proved before training"),
    )
    axis.set(yscale="log", xlabel="step k", ylabel="$\\|R_k\\|_F$", title="50 points, 1,600 neurons, 6,000 steps")
    axis.legend()
    figure.savefig(STATIC / "readme-curve.png", dpi=150)
    rows = [("assumption", "found", "needed", "status", "holds"), *cert.rows()]
    figure, axis = plt.subplots(figsize=(8.2, 3.0))
    axis.axis("off")
    axis.set_title(f"{cert.theorem}: {cert.verdict()}", loc="left", fontweight="bold")
    table = axis.table(
        rows, loc="upper left", cellLoc="left", edges="horizontal", colWidths=(0.5, 0.12, 0.14, 0.12, 0.12)
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    table.scale(1, 1.3)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("#cccccc")
        cell.set_text_props(fontweight="bold" if row == 0 else "normal")
    figure.savefig(STATIC / "readme-certificate.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    plotting.use()
    STATIC.mkdir(exist_ok=True)
    (STATIC / "home.html").write_text(home_player()._repr_html_() + "\n")
    readme_pictures()
