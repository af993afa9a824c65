"""The page: totals, stages, distributions, selections, and the table with its data."""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.report import svg
from pipeline.report.data import VERDICT_ORDER, css_colour, page_data, script_safe_json
from pipeline.report.distributions import distributions
from pipeline.report.facts import STATUSES, Facts, refusing_classes
from pipeline.report.selections import GROUPS, SelectionFacts, Shares, Shortfall, shares, shortfalls
from pipeline.report.stages import stage_outcomes
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.overlay import VERDICT_COLOURS
from pipeline.tissue.verdict import VERDICT_NAMES, Verdict

_HERE = Path(__file__).parent
_FEW_GROUPS = 30
_SHORTFALLS = 12
_SHORT_ID = 24


@dataclass(frozen=True)
class Totals:
    """The dataset in numbers."""

    by_status: Mapping[str, int]
    tissue_mm2: float
    grid_tiles: int
    candidates: int
    verdicts: Mapping[str, int]
    patients: int
    sites: int
    projects: int


@dataclass(frozen=True)
class SharePlot:
    """One grouping of a selection: its shares, their divergence in bits, the plot."""

    what: str
    shares: Shares
    plot: Markup
    is_scatter: bool


@dataclass(frozen=True)
class SelectionPart:
    """What the page says of a selection."""

    selection: SelectionFacts
    parameters: list[tuple[str, str]]
    plots: list[SharePlot]
    below: list[Shortfall]
    left_out: int


def totals(facts: Facts) -> Totals:
    """Sums over the slides; tissue and tiles of those that the tissue stage measured."""
    slides = facts.slides
    counted = Counter(one.status for one in slides)
    verdicts: Counter[str] = Counter()
    for one in slides:
        verdicts.update(one.tiles)
    return Totals(
        {status: counted[status] for status in STATUSES},
        sum(one.class_mm2.get("tissue", 0.0) for one in slides),
        sum(one.grid_tiles or 0 for one in slides),
        sum(one.candidates or 0 for one in slides),
        {VERDICT_NAMES[v]: verdicts[VERDICT_NAMES[v]] for v in VERDICT_ORDER},
        len({one.slide.patient for one in slides} - {""}),
        len({one.slide.site for one in slides} - {""}),
        len({one.slide.project for one in slides} - {""}),
    )


def identity_in_words(identity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What makes it this dataset and no other; keys that a stage has not claimed are left out."""
    said: list[tuple[str, str]] = []
    if {"mpp", "mpp_tolerance", "tile_px"} <= identity.keys():
        mpp, side = float(identity["mpp"]), int(identity["tile_px"])
        said.append(
            ("Resolution", f"{mpp:.4g} µm per pixel, ± {float(identity['mpp_tolerance']):.1%}")
        )
        said.append(
            ("Tiles", f"{side} × {side} px ({side * mpp:.4g} µm), {identity.get('grid', '')} grid")
        )
    if "detector" in identity:
        name = (identity.get("detector_parameters") or {}).get("name", "unnamed")
        said.append(("Tissue detector", f"{name} ({str(identity['detector'])[:8]})"))
    if {"min_tissue", "max_artifact"} <= identity.keys():
        low, high = float(identity["min_tissue"]), float(identity["max_artifact"])
        said.append(("A candidate has", f"at least {low:.0%} tissue, at most {high:.0%} artifacts"))
    if "codec" in identity:
        icc = identity.get("icc")
        colours = "as scanned" if icc == "ignore" else f"ICC profile to {icc}"
        resampler = identity.get("resampler", "unknown")
        said.append(("Pixels", f"{identity['codec']}, {resampler} resampling, colours {colours}"))
    if "seed" in identity:
        each = identity.get("reserve_per_candidates")
        reserve = f"; validation reserve 1 of {each} candidates" if each else ""
        said.append(("Rank order", f"seed {identity['seed']}{reserve}"))
    said.append(("Format", f"version {identity.get('format_version', 'unknown')}"))
    return said


def selection_part(facts: Facts, selection: SelectionFacts) -> SelectionPart:
    """A selection's shares against the candidates of all slides that may be selected."""
    slides = [one for one in facts.slides if one.candidates is not None]
    cohort = [one.candidates or 0 for one in slides]
    picked = [selection.tiles_by_slide.get(one.slide.slide_id, 0) for one in slides]
    plots = []
    for what in GROUPS:
        found = shares([getattr(one.slide, what) for one in slides], cohort, picked)
        if len(found.names) > 1 or (found.names and found.names[0]):
            many = what == "site" and len(found.names) > _FEW_GROUPS
            draw = svg.share_scatter_svg if many else svg.share_bars_svg
            plots.append(SharePlot(what, found, draw(found, what), many))
    return SelectionPart(
        selection, _parameters(selection.plan), plots, shortfalls(selection.plan),
        selection.tiles - sum(picked),
    )  # fmt: skip


def _parameters(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plan's parameters that were set, as far as they are single values."""
    parameters = plan.get("parameters")
    if not isinstance(parameters, dict):
        return []
    return [
        (str(key).replace("_", " "), f"{value:,}" if type(value) is int else str(value))
        for key, value in sorted(parameters.items())
        if key != "name" and isinstance(value, str | int | float)
        if value != "" and value is not False
    ]


def render(
    facts: Facts, selections: Sequence[SelectionFacts], thumbs: set[str], overlays: str
) -> str:
    """The page as one HTML string; only pictures lie outside of it, beside it in the dataset.

    A content security policy lets no script run but the page's own, whatever a name holds.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    sums = totals(facts)
    kept_first = [
        (VERDICT_NAMES[v], sums.verdicts[VERDICT_NAMES[v]], css_colour(VERDICT_COLOURS[v]))
        for v in VERDICT_ORDER
    ]
    return environment.get_template("page.html.j2").render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(script_safe_json(page_data(facts, selections, thumbs, overlays))),
        totals=sums,
        slides=len(facts.slides),
        identity=identity_in_words(facts.identity),
        verdicts=kept_first,
        verdict_bar=svg.stacked_svg(kept_first),
        kept=VERDICT_NAMES[Verdict.KEPT],
        stages=stage_outcomes(facts, selections),
        on_trial=_on_trial(facts.identity),
        distributions=[(one, svg.histogram_svg(one)) for one in distributions(facts.slides)],
        selections=[selection_part(facts, one) for one in selections],
        shortfalls_shown=_SHORTFALLS,
        link=_link,
        number=_number,
        bits=_bits,
        short_id=_short_id,
    )


def _on_trial(identity: Mapping[str, Any]) -> list[str]:
    """Artifact classes that the detector marks and that refuse no tile."""
    names = {CLASS_NAMES[one] for one in TissueClass if one > TissueClass.TISSUE}
    return sorted(names - refusing_classes(identity)) if "detector" in identity else []


def _code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(text)
    marked = [Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)]
    return Markup("").join(marked)


def _link(slide_id: str) -> str:
    """The address, on this page, of a slide's details."""
    return f"#slide={quote(slide_id, safe='')}"


def _short_id(slide_id: str) -> str:
    """A slide's name where many stand together: a TCGA name without its UUID."""
    return slide_id if len(slide_id) <= _SHORT_ID else slide_id[: _SHORT_ID - 1] + "…"


def _number(value: float, is_share: bool = False) -> str:
    """A number as text: thousands apart, four significant digits, shares in percent."""
    if is_share:
        return f"{value:.1%}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e3 else f"{value:.4g}"


def _bits(value: float) -> str:
    """A divergence as text."""
    if math.isnan(value):
        return "not defined: no tiles"
    return f"{value:.4f} bits" if value >= 5e-5 or value == 0 else "below 0.0001 bits"
