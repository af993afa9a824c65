"""The report's content, gathered from results, run and datasets, and its HTML page."""

from contextlib import suppress
from dataclasses import dataclass

from common.errors import UserError
from common.record import Record
from common.text import format_number
from evaluate.compare.results import make_warning
from evaluate.metrics.registry import METRICS
from evaluate.report import numbers
from evaluate.report.images import (
    ImagePair,
    Overlay,
    Tile,
    read_overlays,
    read_tile_pairs,
    sample_tiles,
)
from evaluate.report.levels import VOIDING, LevelledWarning, with_levels
from evaluate.report.plots import draw_svg, loss_panels
from evaluate.report.run_curves import RunCurves
from evaluate.report.template import render_template
from pipeline.dataset import Dataset, read_selection

_PAIRS, _OVERLAYS, _REAL_TILES = 12, 4, 12
_DANGERS = VOIDING | {"forced_guidance": "Guidance does not fit the model"}


@dataclass(frozen=True)
class PageContent:
    """All that the page and the picture show; tiles are uint8 [px, px, 3]."""

    results: Record
    run: RunCurves | None
    overlays: list[Overlay]
    pairs: list[ImagePair]
    real_tiles: list[Tile]
    warnings: list[LevelledWarning]

    @property
    def is_paired(self) -> bool:
        """Whether generated tiles have real tiles that guided them."""
        return any(pair.real is not None for pair in self.pairs)


def gather_content(
    results: Record, run: RunCurves | None, dataset: Dataset, generated: Dataset
) -> PageContent:
    """Read what the report shows from the datasets and the run.

    Raises `UserError` where the datasets are not those that were measured.
    """
    # Tiles of another selection would be shown under numbers that are not theirs.
    selections = []
    for side, place in ((results.part("real"), dataset), (results.part("generated"), generated)):
        selection = read_selection(place, side.text("selection"))
        if selection.content_hash != side.text("selection_sha256"):
            raise UserError(
                f"selection '{selection.name}' of {place.root} is not the one that was measured "
                f"({side.get('rows')} tiles then, {selection.rows} now); measure again"
            )
        selections.append(selection)
    real_selection, generated_selection = selections
    pairs = read_tile_pairs(generated, generated_selection, dataset, _PAIRS)
    real_tiles: list[Tile] = []
    # Features may outlive the tiles that they were made from.
    with suppress(UserError):
        if all(pair.real is None for pair in pairs):
            real_tiles = sample_tiles(dataset, real_selection, _REAL_TILES)
    overlays = read_overlays(dataset, real_selection.slide_ids, _OVERLAYS)
    return PageContent(results, run, overlays, pairs, real_tiles, all_warnings(results, run))


def all_warnings(results: Record, run: RunCurves | None) -> list[LevelledWarning]:
    """The warnings of the measurement and of the training, each with a level, worst first."""
    warnings = [dict(one) for one in results.parts("warnings")]
    record = run.summary.part("encoder_record") if run else Record({})
    # The run's summary knows of random weights that older synthetic datasets do not record.
    known = {one["code"] for one in warnings}
    if record.get("random_weights") and "random_training_encoder" not in known:
        message = (
            f"the model was trained on features of {record.get('encoder')} with random weights "
            f"({record.get('weights')}): what it learned from them has no biological meaning"
        )
        warnings.append({**make_warning("random_training_encoder", message)})
    return with_levels(warnings, _DANGERS)


def render_page(content: PageContent) -> str:
    """The page as one HTML string: styles and images inside, no address outside."""
    summary = content.run.summary if content.run else Record({})
    metrics = content.results.part("metrics")
    # Metrics bring their plots: a new metric needs no change here.
    plots = [
        (metric.plot, draw_svg(metric.plot.bind_result(metrics.part(name))))
        for name, metric in METRICS.items()
        if metric.plot and metrics.part(name)
    ]
    return render_template(
        "page.html.j2",
        content=content,
        metric_rows=numbers.metric_rows(content.results),
        metric_plots=plots,
        card=numbers.run_card(content.results),
        panels=loss_panels(content.run.series) if content.run else [],
        reconstruction=numbers.reconstruction_rows(summary),
        summary=summary,
        format_number=format_number,
    )
