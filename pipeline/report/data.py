"""The table's data as one compact JSON document: a column a field, repeated words coded."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from pipeline.report.facts import Facts, SlideFacts, refusing_classes
from pipeline.report.selections import SelectionFacts
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.overlay import CLASS_COLOURS, VERDICT_COLOURS, Colour
from pipeline.tissue.verdict import VERDICT_NAMES, Verdict

VERDICT_ORDER = (
    Verdict.KEPT, Verdict.LITTLE_TISSUE, Verdict.PEN, Verdict.OUT_OF_FOCUS, Verdict.FOLD,
    Verdict.OTHER, Verdict.NO_TISSUE,
)  # fmt: skip
_CODED: dict[str, Callable[[SlideFacts], str]] = {
    "status": lambda one: one.status,
    "stage": lambda one: one.stage,
    "reason": lambda one: one.reason,
    "kind": lambda one: one.reason_kind,
    "note": lambda one: one.note,
    "site": lambda one: one.slide.site,
    "project": lambda one: one.slide.project,
    "patient": lambda one: one.slide.patient,
    "mpp_source": lambda one: one.slide.mpp_source,
    "reader": lambda one: one.slide.reader,
    "vendor": lambda one: one.slide.vendor,
    "codec": lambda one: one.slide.codec,
    "preparation": lambda one: one.slide.preparation,
    "plan": lambda one: one.plan,
}
_PLAIN: dict[str, Callable[[SlideFacts], Any]] = {
    "slide": lambda one: one.slide.slide_id,
    "mpp": lambda one: rounded(one.slide.mpp),
    "width": lambda one: one.slide.width or None,
    "height": lambda one: one.slide.height or None,
    "bytes": lambda one: one.slide.bytes or None,
    "grid": lambda one: one.grid_tiles,
    "candidates": lambda one: one.candidates,
    "glass": lambda one: [rounded(value) for value in one.glass] or None,
}


def page_data(
    facts: Facts, selections: Sequence[SelectionFacts], thumbs: set[str], overlays: str
) -> dict[str, Any]:
    """All that the table and the viewer show.

    `thumbs` are the slides with a small picture; `overlays` is the way from the page to the
    folder of the large ones, with '/' at its end. Values that a slide has not are null.
    """
    slides, refusing = facts.slides, refusing_classes(facts.identity)
    return {
        "overlays": quote(overlays, safe="/"),
        "rows": len(slides),
        "coded": {name: coded([read(one) for one in slides]) for name, read in _CODED.items()},
        "plain": {name: [read(one) for one in slides] for name, read in _PLAIN.items()},
        "picture": [int(one.slide.slide_id in thumbs) for one in slides],
        "classes": [
            {
                "name": CLASS_NAMES[c],
                "refuses": CLASS_NAMES[c] in refusing,
                "colour": css_colour(CLASS_COLOURS[c]),
                "mm2": [_class_mm2(one, CLASS_NAMES[c]) for one in slides],
            }
            for c in TissueClass
            if c > TissueClass.BACKGROUND
        ],
        "verdicts": [
            {
                "name": VERDICT_NAMES[v],
                "colour": css_colour(VERDICT_COLOURS[v]),
                "tiles": [one.tiles.get(VERDICT_NAMES[v], 0) for one in slides],
            }
            for v in VERDICT_ORDER
        ],
        "selections": [
            {
                "name": selection.name,
                "tiles": [selection.tiles_by_slide.get(one.slide.slide_id, 0) for one in slides],
            }
            for selection in selections
        ],
    }


def _class_mm2(one: SlideFacts, name: str) -> float | None:
    return rounded(one.class_mm2.get(name, 0.0)) if one.tiles else None


def coded(words: Sequence[str]) -> dict[str, Any]:
    """Words as their sorted distinct values and an index a row."""
    values = sorted(set(words))
    place = {value: index for index, value in enumerate(values)}
    return {"values": values, "codes": [place[word] for word in words]}


def rounded(value: float | None) -> float | int | None:
    """Seven significant digits; null for what JSON cannot say."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.7g}")
    return int(short) if short.is_integer() else short


def css_colour(colour: Colour) -> str:
    """`#rrggbb` of an RGB triple."""
    return "#" + "".join(f"{part:02x}" for part in colour)


def script_safe_json(document: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end that element."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
