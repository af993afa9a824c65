"""Plots as SVG, without a display and the same in bytes for the same numbers."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.plain_plots import plain_plots
from evaluate.report.run_curves import Series

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
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.hashsalt": "histogen",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class LossPanel:
    """A plot of the training log: the series that it shows, by their labels."""

    title: str
    series: Mapping[str, str]


PANELS = (
    LossPanel("Reconstruction (VAE)", {"L1": "vae/l1", "LPIPS": "vae/lpips"}),
    LossPanel("Denoising (SiT)", {"velocity error": "sit/denoise"}),
    LossPanel("Alignment with the encoder", {"SiT": "sit/align", "VAE": "vae/align"}),
    LossPanel(
        "Adversarial", {"discriminator": "discriminator/total", "generator": "vae/generator"}
    ),
)


def loss_panels(series: Mapping[str, Series]) -> list[tuple[str, bytes]]:
    """(title, SVG bytes) of each panel of which the run logged anything."""
    return [
        (panel.title, draw_svg(partial(draw_curves, shown=shown, title=panel.title)))
        for panel, shown in logged_panels(series)
    ]


def logged_panels(
    series: Mapping[str, Series],
) -> Iterator[tuple[LossPanel, dict[str, Series]]]:
    """Each panel of which the run logged anything, with its logged series by label."""
    for panel in PANELS:
        shown = {label: series[key] for label, key in panel.series.items() if key in series}
        if shown:
            yield panel, shown


def draw_curves(axes: Axes, shown: Mapping[str, Series], title: str) -> None:
    """Series (steps ``[n]``, values ``[n]``): every value thin, a running median strong."""
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
    """Median ``[n]`` over a window of about a twentieth of the run, shorter at its ends.

    Fewer than 40 values are shown as they are.

    >>> running_median(np.array([1.0, 9.0, 2.0])).tolist()
    [1.0, 9.0, 2.0]
    """
    # A window that grows with the run, so that long runs are not drawn as noise.
    half = len(values) // 40
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def draw_svg(draw: Callable[[Axes], None], *, wide: bool = False, height: float = 2.9) -> bytes:
    """What `draw` draws on a figure's axes, as SVG; `height` in inches.

    The same numbers give the same bytes.
    """
    with plain_plots(STYLE):
        figure = Figure(figsize=(7.2 if wide else 4.6, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.BytesIO()
        # A date or a creator would change the bytes.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
