"""Plots as SVG, without a display and the same in bytes for the same numbers."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluate.report.runlog import Series

INK, MUTED, GRID = "#1c2430", "#5b6675", "#dfe3e8"
COLOURS = ("#2458a6", "#b4431f", "#2f7d4f", "#7a4ba0")

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.hashsalt": "histogen",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Panel:
    """One plot of the training log: the series it shows, by their labels."""

    title: str
    series: Mapping[str, str]


PANELS = (
    Panel("Reconstruction (VAE)", {"L1": "vae/l1", "LPIPS": "vae/lpips"}),
    Panel("Denoising (SiT)", {"velocity error": "sit/denoise"}),
    Panel("Alignment with the encoder", {"SiT": "sit/align", "VAE": "vae/align"}),
    Panel("Adversarial", {"discriminator": "discriminator/total", "generator": "vae/generator"}),
)


def loss_panels(series: Mapping[str, Series]) -> list[tuple[str, bytes]]:
    """(title, SVG) of each panel of which the run logged anything."""
    drawn = []
    for panel in PANELS:
        shown = {label: series[key] for label, key in panel.series.items() if key in series}
        if shown:
            drawn.append((panel.title, draw_svg(partial(curves, shown=shown, title=panel.title))))
    return drawn


def curves(axes: Axes, shown: Mapping[str, Series], title: str) -> None:
    """Series over steps: every logged value thin, a running median strong."""
    for colour, (label, (steps, values)) in zip(COLOURS, shown.items(), strict=False):
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_median(values), color=colour, linewidth=1.8, label=label)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if len(shown) > 1:
        axes.legend()


def running_median(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Median over a window of about a twentieth of the run, shorter at its ends.

    Fewer than 40 values are shown as they are.
    """
    half = len(values) // 40
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def cosine_histogram(cosine: Mapping[str, Any]) -> bytes:
    """SVG: the cosines of generated tiles to their sources, their mean and the shuffled null."""
    histogram = cosine["histogram"]
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])

    def draw(axes: Axes) -> None:
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=COLOURS[0], alpha=0.55)
        axes.axvline(cosine["mean"], color=COLOURS[0], linewidth=2, label="mean, own source")
        axes.axvline(
            cosine["null_mean"],
            color=COLOURS[1],
            linewidth=2,
            linestyle="--",
            label="mean, shuffled",
        )
        used = edges[:-1][counts > 0]
        axes.set_xlim(min(used.min(), cosine["null_mean"]) - 0.1, 1.0)
        axes.set_title("Cosine to the source tile")
        axes.set_xlabel("cosine similarity")
        axes.set_ylabel("tiles")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(0, 1.3 * max(counts.max(), 1))
        # On white: the lines run up behind it.
        axes.legend(loc="upper left", ncols=2, frameon=True, framealpha=1, edgecolor="white")

    return draw_svg(draw)


def draw_svg(draw: Callable[[Axes], None], *, wide: bool = False, height: float = 2.9) -> bytes:
    """What `draw` draws on a figure's axes, as SVG; `height` in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2 if wide else 4.6, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.BytesIO()
        # No date and no creator: the same numbers give the same bytes.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
