"""One small PNG that shows a run at a glance, for a README."""

import io
from contextlib import suppress

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from common.errors import UserError
from common.escape import escape_plot
from common.pictures import PictureSizeError, check_data
from common.plain_plots import plain_plots
from evaluate.metrics.registry import summarise_metrics
from evaluate.report.images import Tile
from evaluate.report.page import PageContent
from evaluate.report.plots import MUTED, STYLE, draw_curves, logged_panels

_COLUMNS = 6
_MAX_BYTES = 400_000


def draw_picture(content: PageContent) -> bytes:
    """PNG of the overlay, a row of real tiles, one of generated tiles, a loss curve; < 400 kB."""
    with plain_plots(STYLE):
        figure = Figure(figsize=(9.6, 3.55), dpi=100)
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 2.75), height_ratios=(1, 1))
        _draw_overlay(figure.add_subplot(grid[0, 0]), content)
        _draw_first_curves(figure.add_subplot(grid[1, 0]), content)
        rows = grid[:, 1].subgridspec(2, _COLUMNS, wspace=0.04, hspace=0.22)
        # Pairs with both tiles first: the rows are then one above the other.
        pairs = [pair for pair in content.pairs if pair.real is not None] or content.pairs
        real = [pair.real for pair in pairs if pair.real is not None] or content.real_tiles
        generated = [pair.generated for pair in pairs]
        for row, (title, tiles) in enumerate((("real", real), ("generated from each", generated))):
            for column in range(min(_COLUMNS, len(tiles))):
                axes = figure.add_subplot(rows[row, column])
                _draw_image(axes, tiles[column])
                if column == 0:
                    axes.set_title(title if content.is_paired else title.split()[0])
        figure.subplots_adjust(
            left=0.06, right=0.99, top=0.93, bottom=0.12, wspace=0.08, hspace=0.35
        )
        _draw_footer(figure, content)
        return _encode_below(figure, _MAX_BYTES)


def _draw_overlay(axes: Axes, content: PageContent) -> None:
    if not content.overlays:
        axes.set_axis_off()
        return
    jpeg, image = content.overlays[0].jpeg, None
    with suppress(PictureSizeError):
        check_data(jpeg, ("JPEG",))
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise UserError(f"the overlay of {content.overlays[0].slide_id} is no readable JPEG")
    _draw_image(axes, np.asarray(image, np.uint8))
    axes.set_title("tissue")


def _draw_first_curves(axes: Axes, content: PageContent) -> None:
    for panel, shown in logged_panels(content.run.series if content.run else {}):
        draw_curves(axes, shown, panel.title)
        return
    axes.set_axis_off()


def _draw_image(axes: Axes, image: Tile) -> None:
    axes.imshow(image, interpolation="antialiased")
    axes.set_axis_off()


def _draw_footer(figure: Figure, content: PageContent) -> None:
    summaries = summarise_metrics(content.results)
    text = summaries[0] if summaries else ""
    random = any(one["code"].startswith("random_") for one in content.warnings)
    note = "; encoder weights are random: the number means nothing" if random else ""
    figure.text(
        0.985, 0.025, escape_plot(text + note), ha="right", color="#b3261e" if random else MUTED
    )


def _encode_below(figure: Figure, limit: int) -> bytes:
    """The figure as a palette PNG, at the largest scale that keeps it under the limit."""
    # A README's picture must load quickly: smaller until it is light enough.
    for dpi in (110, 95, 80, 65, 50):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        image = Image.open(buffer).convert("RGB").quantize(255, dither=Image.Dither.FLOYDSTEINBERG)
        packed = io.BytesIO()
        image.save(packed, "PNG", optimize=True)
        if packed.tell() < limit:
            break
    return packed.getvalue()
