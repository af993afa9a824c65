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

from markupsafe import Markup

from common.escape import script_safe_json
from common.templates import escape_html, load_template
from pipeline.report import svg
from pipeline.report.data import VERDICT_ORDER, css_colour, page_data
from pipeline.report.distributions import make_distributions
from pipeline.report.facts import STATUSES, Facts
from pipeline.report.selections import (
    GROUPS,
    SelectionFacts,
    Shares,
    Shortfall,
    compare_shares,
    list_shortfalls,
)
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
    """What the page shows of a selection."""

    selection: SelectionFacts
    parameters: list[tuple[str, str]]
    plots: list[SharePlot]
    below: list[Shortfall]
    left_out: int


def count_totals(facts: Facts) -> Totals:
    """Sums over the slides; tissue and tiles of those that the tissue stage measured."""
    slides = facts.slides
    # All statuses are listed, also those that no slide has.
    counted = Counter(row.status for row in slides)
    verdicts: Counter[str] = Counter()
    for row in slides:
        verdicts.update(row.tiles)
    patients, sites, projects = (
        len({getattr(row.slide, name) for row in slides} - {""})
        for name in ("patient", "site", "project")
    )
    return Totals(
        {status: counted[status] for status in STATUSES},
        sum(row.class_mm2.get("tissue", 0.0) for row in slides),
        sum(row.grid_tiles or 0 for row in slides),
        sum(row.candidates or 0 for row in slides),
        {VERDICT_NAMES[v]: verdicts[VERDICT_NAMES[v]] for v in VERDICT_ORDER},
        patients, sites, projects,
    )  # fmt: skip


def describe_identity(identity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What makes it this dataset and no other; keys that a stage has not claimed are left out."""
    # A section at a time: a dataset that was only scanned has claimed no detector yet.
    rows: list[tuple[str, str]] = []
    if {"mpp", "mpp_tolerance", "tile_px"} <= identity.keys():
        mpp, side = float(identity["mpp"]), int(identity["tile_px"])
        tolerance = f"± {float(identity['mpp_tolerance']):.1%}"
        grid = identity.get("grid", "")
        rows.append(("Resolution", f"{mpp:.4g} µm per pixel, {tolerance}"))
        rows.append(("Tiles", f"{side} × {side} px ({side * mpp:.4g} µm), {grid} grid"))
    if "detector" in identity:
        name = (identity.get("detector_parameters") or {}).get("name", "unnamed")
        rows.append(("Tissue detector", f"{name} ({str(identity['detector'])[:8]})"))
    if {"min_tissue", "max_artifact"} <= identity.keys():
        low, high = float(identity["min_tissue"]), float(identity["max_artifact"])
        rows.append(("A candidate has", f"at least {low:.0%} tissue, at most {high:.0%} artifacts"))
    if "codec" in identity:
        icc = identity.get("icc")
        colours = "as scanned" if icc == "ignore" else f"ICC profile to {icc}"
        resampler = identity.get("resampler", "unknown")
        rows.append(("Pixels", f"{identity['codec']}, {resampler} resampling, colours {colours}"))
    if "seed" in identity:
        each = identity.get("reserve_per_candidates")
        reserve = f"; validation reserve 1 of {each} candidates" if each else ""
        rows.append(("Rank order", f"seed {identity['seed']}{reserve}"))
    rows.append(("Format", f"version {identity.get('format_version', 'unknown')}"))
    return rows


def selection_part(facts: Facts, selection: SelectionFacts) -> SelectionPart:
    """A selection's shares against the candidates of all slides that may be selected."""
    slides = [row for row in facts.slides if row.candidates is not None]
    cohort = [row.candidates or 0 for row in slides]
    picked = [selection.tiles_by_slide.get(row.slide.slide_id, 0) for row in slides]
    plots = []
    for what in GROUPS:
        shares = compare_shares([getattr(row.slide, what) for row in slides], cohort, picked)
        # A cohort whose slides name no project (or site) has one group without a name.
        if len(shares.names) > 1 or (shares.names and shares.names[0]):
            many = what == "site" and len(shares.names) > _FEW_GROUPS
            plot = (svg.share_scatter_svg if many else svg.share_bars_svg)(shares, what)
            plots.append(SharePlot(what, shares, plot, many))
    parameters = selection.plan.get("parameters")
    settings = [
        (str(key).replace("_", " "), f"{value:,}" if type(value) is int else str(value))
        for key, value in sorted((parameters if isinstance(parameters, dict) else {}).items())
        if key != "name" and isinstance(value, str | int | float)
        if value != "" and value is not False
    ]
    left_out = selection.tiles - sum(picked)
    return SelectionPart(selection, settings, plots, list_shortfalls(selection.plan), left_out)


def render_page(
    facts: Facts, selections: Sequence[SelectionFacts], thumbs: set[str], overlays: str
) -> str:
    """The page as one HTML string; only pictures are outside of it, next to it in the dataset.

    A content security policy lets no script run but the page's own, however a slide is named.
    """
    # The policy names the script by its hash: read once, or the two could differ.
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    totals = count_totals(facts)
    verdicts = [
        (VERDICT_NAMES[v], totals.verdicts[VERDICT_NAMES[v]], css_colour(VERDICT_COLOURS[v]))
        for v in VERDICT_ORDER
    ]
    artifacts = {CLASS_NAMES[c] for c in TissueClass if c > TissueClass.TISSUE}
    on_trial = sorted(artifacts - facts.refusing) if "detector" in facts.identity else []
    return load_template(_HERE / "page.html.j2", {"code": mark_code}).render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(script_safe_json(page_data(facts, selections, thumbs, overlays))),
        totals=totals,
        slides=len(facts.slides),
        identity=describe_identity(facts.identity),
        verdicts=verdicts,
        verdict_bar=svg.stacked_svg(verdicts),
        kept=VERDICT_NAMES[Verdict.KEPT],
        stages=stage_outcomes(facts, selections),
        on_trial=on_trial,
        distributions=[(row, svg.histogram_svg(row)) for row in make_distributions(facts.slides)],
        selections=[selection_part(facts, selection) for selection in selections],
        shortfalls_shown=_SHORTFALLS,
        link=lambda slide_id: f"#slide={quote(slide_id, safe='')}",
        number=format_number,
        bits=_format_bits,
        # A TCGA name without its UUID, where many are listed.
        short_id=lambda name: name if len(name) <= _SHORT_ID else f"{name[: _SHORT_ID - 1]}…",
    )


def mark_code(text: str) -> Markup:
    """Text with what is between backticks as code; unpaired backticks stay as they are.

    >>> mark_code("run `tissue` & look")
    Markup('run <code>tissue</code> &amp; look')
    """
    parts = [escape_html(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape_html(text)
    marked = [Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)]
    return Markup("").join(marked)


def format_number(value: float, is_share: bool = False) -> str:
    """A number as text: thousands apart, four significant digits, shares in percent.

    >>> format_number(12345.6), format_number(0.12345), format_number(0.5, is_share=True)
    ('12,346', '0.1235', '50.0%')
    """
    if is_share:
        return f"{value:.1%}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e3 else f"{value:.4g}"


def _format_bits(value: float) -> str:
    if math.isnan(value):
        return "not defined: no tiles"
    return f"{value:.4f} bits" if value >= 5e-5 or value == 0 else "below 0.0001 bits"
