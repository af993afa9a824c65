"""The report's content, gathered from results, run and datasets, and its HTML page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from evaluate.report import numbers
from evaluate.report.images import (
    Overlay,
    Pair,
    Tile,
    data_uri,
    overlays,
    png,
    sample_tiles,
    tile_pairs,
)
from evaluate.report.plots import cosine_histogram, loss_panels
from evaluate.report.runlog import RunLog
from evaluate.report.template import style, template
from pipeline.dataset import Dataset, read_selection

_PAIRS, _OVERLAYS, _REAL_TILES = 12, 4, 12
_DANGERS = {
    "random_encoder_weights": "These numbers mean nothing",
    "random_training_encoder": "This model means nothing",
    "forced_guidance": "Guidance does not fit the model",
}
"""Titles of the warnings that make the report void; the others ask for care."""


@dataclass(frozen=True)
class Content:
    """All that the page and the picture show."""

    results: Mapping[str, Any]
    run: RunLog | None
    overlays: list[Overlay]
    pairs: list[Pair]
    real_tiles: list[Tile]
    warnings: list[dict[str, str]]

    @property
    def is_paired(self) -> bool:
        """Whether generated tiles have real tiles that guided them."""
        return any(pair.real is not None for pair in self.pairs)


def gather(
    results: Mapping[str, Any], run: RunLog | None, dataset: Dataset, generated: Dataset
) -> Content:
    """Read what the report shows from the datasets and the run.

    Raises `UserError` where the datasets are not those that were measured.
    """
    selections = []
    for side, place in (("real", dataset), ("generated", generated)):
        selection = read_selection(place, results[side]["selection"])
        if selection.content_hash != results[side]["selection_sha256"]:
            raise UserError(
                f"selection '{selection.name}' of {place.root} is not the one that was measured "
                f"({results[side]['rows']} tiles then, {selection.rows} now); measure again"
            )
        selections.append(selection)
    real, made = selections
    pairs = tile_pairs(generated, made, dataset, _PAIRS)
    paired = any(pair.real is not None for pair in pairs)
    return Content(
        results,
        run,
        overlays(dataset, real.slide_ids, _OVERLAYS),
        pairs,
        [] if paired else _some_tiles(dataset, real.name),
        all_warnings(results, run),
    )


def _some_tiles(dataset: Dataset, selection_name: str) -> list[Tile]:
    try:
        return sample_tiles(dataset, read_selection(dataset, selection_name), _REAL_TILES)
    except UserError:
        return []  # features may outlive the tiles that they were made from


def all_warnings(results: Mapping[str, Any], run: RunLog | None) -> list[dict[str, str]]:
    """The warnings of the measurement and of the training, each with a level, worst first."""
    found = list(results["warnings"])
    record = (run.summary.get("encoder_record") or {}) if run else {}
    known = {one["code"] for one in found}
    if record.get("random_weights") and "random_training_encoder" not in known:
        message = (
            f"the model was trained on features of {record.get('encoder')} with random weights "
            f"({record.get('weights')}): what it learned from them has no biological meaning"
        )
        found.append({"code": "random_training_encoder", "message": message})
    levelled = [
        {
            **one,
            "level": "danger" if one["code"] in _DANGERS else "caution",
            "title": _DANGERS.get(one["code"], "Read with care"),
        }
        for one in found
    ]
    return sorted(levelled, key=lambda one: one["level"] != "danger")


def render(content: Content) -> str:
    """The page as one HTML string: styles and images inside, no address outside."""
    cosine = content.results["metrics"].get("cosine_similarity")
    return template("page.html.j2").render(
        style=style(),
        content=content,
        metric_rows=numbers.rows(content.results),
        card=numbers.card(content.results),
        panels=loss_panels(content.run.series) if content.run else [],
        reconstruction=numbers.reconstruction(content.run.summary) if content.run else [],
        summary=content.run.summary if content.run else {},
        histogram=cosine_histogram(cosine) if cosine else None,
        show=numbers.show,
        svg_uri=lambda data: data_uri(data, "image/svg+xml"),
        jpeg_uri=lambda data: data_uri(data, "image/jpeg"),
        tile_uri=lambda tile: data_uri(png(tile), "image/png"),
    )
