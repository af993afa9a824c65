"""The table's data as one compact JSON document: a column per field, repeated words coded."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict
from urllib.parse import quote

from common.escape import escape_terminal
from pipeline.report.facts import Facts, SlideFacts
from pipeline.report.selections import SelectionFacts
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.overlay import CLASS_COLOURS, VERDICT_COLOURS, Colour
from pipeline.tissue.verdict import VERDICT_NAMES, Verdict

VERDICT_ORDER = (
    Verdict.KEPT, Verdict.LITTLE_TISSUE, Verdict.PEN, Verdict.OUT_OF_FOCUS, Verdict.FOLD,
    Verdict.OTHER, Verdict.NO_TISSUE,
)  # fmt: skip
_OF_FACTS = {"status": "status", "stage": "stage", "reason": "reason", "kind": "reason_kind",
             "note": "note", "plan": "plan"}  # fmt: skip
_OF_SLIDE = ("site", "project", "patient", "mpp_source", "reader", "vendor", "codec", "preparation")
_PLAIN: dict[str, Callable[[SlideFacts], object]] = {
    "slide": lambda facts: facts.slide.slide_id,
    "mpp": lambda facts: round_short(facts.slide.mpp),
    "width": lambda facts: facts.slide.width or None,
    "height": lambda facts: facts.slide.height or None,
    "bytes": lambda facts: facts.slide.bytes or None,
    "grid": lambda facts: facts.grid_tiles,
    "candidates": lambda facts: facts.candidates,
    "glass": lambda facts: [round_short(value) for value in facts.glass] or None,
}


class CodedWords(TypedDict):
    """Sorted distinct words, and per row the index of its word."""

    values: list[str]
    codes: list[int]


def page_data(
    facts: Facts, selections: Sequence[SelectionFacts], thumbs: set[str], overlays: str
) -> dict[str, Any]:
    """All that the table and the viewer show.

    `thumbs` are the slides with a small picture; `overlays` is the way from the page to the
    folder of the large ones, with '/' at its end. Values that a slide does not have are null.
    """
    slides = facts.slides
    words = {key: [getattr(row, name) for row in slides] for key, name in _OF_FACTS.items()}
    words |= {name: [getattr(row.slide, name) for row in slides] for name in _OF_SLIDE}
    words = {key: list(map(escape_terminal, column)) for key, column in words.items()}
    classes = [(CLASS_NAMES[c], c) for c in TissueClass if c > TissueClass.BACKGROUND]
    return {
        "overlays": quote(overlays, safe="/"),
        "rows": len(slides),
        "coded": {name: code_words(column) for name, column in words.items()},
        "plain": {name: [read(row) for row in slides] for name, read in _PLAIN.items()},
        "picture": [int(row.slide.slide_id in thumbs) for row in slides],
        "classes": [
            {
                "name": name,
                "refuses": name in facts.refusing,
                "colour": css_colour(CLASS_COLOURS[tissue_class]),
                # A slide that the tissue stage has not measured has no areas.
                "mm2": [
                    round_short(row.class_mm2.get(name, 0.0)) if row.tiles else None
                    for row in slides
                ],
            }
            for name, tissue_class in classes
        ],
        "verdicts": [
            {
                "name": VERDICT_NAMES[verdict],
                "colour": css_colour(VERDICT_COLOURS[verdict]),
                "tiles": [row.tiles.get(VERDICT_NAMES[verdict], 0) for row in slides],
            }
            for verdict in VERDICT_ORDER
        ],
        "selections": [
            {
                "name": selection.name,
                "tiles": [selection.tiles_by_slide.get(row.slide.slide_id, 0) for row in slides],
            }
            for selection in selections
        ],
    }


def code_words(words: Sequence[str]) -> CodedWords:
    """Words as their sorted distinct values and an index per row.

    >>> code_words(["b", "a", "b"])
    {'values': ['a', 'b'], 'codes': [1, 0, 1]}
    """
    values = sorted(set(words))
    place = {value: index for index, value in enumerate(values)}
    return {"values": values, "codes": [place[word] for word in words]}


def round_short(value: float | None) -> float | int | None:
    """Seven significant digits; null for what JSON cannot express.

    >>> round_short(0.22817505590), round_short(3.0), round_short(float("nan"))
    (0.2281751, 3, None)
    """
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.7g}")
    return int(short) if short.is_integer() else short


def css_colour(colour: Colour) -> str:
    """`#rrggbb` of an RGB triple, each 0 to 255."""
    return "#" + "".join(f"{part:02x}" for part in colour)
