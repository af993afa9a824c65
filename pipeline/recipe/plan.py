"""What a recipe would still do: bytes, files and hours of each step.

Counts come from the files where a stage has run, else from the slides' sizes; rates from the
dataset's own journals, else from this project's measurements (`pipeline.recipe.cost.Rates`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    read_journal,
)
from pipeline.dataset.ledger import covered_blocks, current_entries
from pipeline.recipe.cost import (
    Cost,
    Rates,
    feature_cost,
    scan_cost,
    select_cost,
    tile_cost,
    tissue_cost,
)
from pipeline.recipe.steps import Recipe, Step
from pipeline.recipe.training import training_cost
from pipeline.tiles.stage import needed_blocks

_DEFAULT_TILE_PX = 224


@dataclass(frozen=True)
class Amounts:
    """What a dataset holds so far, and what the recipe's first steps will bring.

    `planned` are the tiles of selections that the recipe makes and that do not stand yet, by
    name; None is all that there are.
    """

    dataset: Dataset
    slides: int
    scanned: int
    with_tissue: int
    candidates: int
    candidates_known: bool
    planned: Mapping[str, int | None]
    tile_px: int

    def tiles(self, names: Iterable[str]) -> tuple[int, set[str], str]:
        """Tiles that the selections need, those of them that stand, and how well it is known."""
        there = set(self.dataset.selection_names())
        wanted = list(names) or sorted(there | set(self.planned))
        coming = [name for name in wanted if name not in there]
        amount = sum(self.planned.get(name) or self.candidates for name in coming)
        if self.candidates_known:
            amount = min(amount, self.candidates)
        return amount, {name for name in wanted if name in there}, "planned" if coming else ""


def recipe_costs(recipe: Recipe) -> list[tuple[Step, Cost]]:
    """What each step would still do, in the recipe's order."""
    seen: dict[Path, Amounts] = {}
    costs = []
    for step in recipe.steps:
        root = step.dataset
        if root is not None and root not in seen:
            seen[root] = _amounts(root, recipe)
        costs.append((step, _cost(step, seen[root] if root is not None else None)))
    return costs


def _amounts(root: Path, recipe: Recipe) -> Amounts:
    dataset = Dataset(root)
    own = [step for step in recipe.steps if step.dataset == root]
    sizes = _slide_sizes(own)
    scanned = current_entries(read_journal(dataset, "scan"))
    tissue = current_entries(read_journal(dataset, "tissue"))
    known = {
        slide: sum(entry.counts.get("candidate tiles", 0) for entry in entries)
        for slide, entries in tissue.items()
    }
    slides = max(len(sizes), len(scanned))
    missing = max(0, slides - len(known))
    if known:
        candidates = sum(known.values()) + missing * sum(known.values()) // len(known)
    else:
        candidates = int(sum(sizes.values()) / Rates().slide_bytes_per_candidate)
    planned = {
        str(step.values.get("name")): _whole(step.values.get("tiles"))
        for step in own
        if step.name == "select"
    }
    px = next(
        (s.values["tile-px"] for s in own if s.name == "scan" and "tile-px" in s.values), None
    )
    return Amounts(
        dataset, slides, len(scanned), len(known), candidates, not missing and bool(known), planned,
        int(px or _DEFAULT_TILE_PX),
    )  # fmt: skip


def _whole(value: Any) -> int | None:
    return None if value is None else int(str(value).replace("_", "").replace(",", ""))


def _slide_sizes(steps: list[Step]) -> dict[str, int]:
    """Bytes of the slides that the recipe's scan would find."""
    from pipeline.slides.entries import find_slides

    inputs = []
    for step in steps:
        if step.name == "scan":
            slides = step.values["slides"]
            inputs += slides if isinstance(slides, list) else [slides]
    sizes = {}
    for source in find_slides(map(str, inputs)):
        try:
            sizes[source.slide_id] = source.bytes or source.path.stat().st_size
        except OSError:
            sizes[source.slide_id] = source.bytes
    return sizes


def _cost(step: Step, amounts: Amounts | None) -> Cost:
    if amounts is None:
        return training_cost(step) if step.name == "train" else Cost(step.name, known="not planned")
    if step.name == "scan":
        return _scan(amounts)
    if step.name == "tissue":
        return _tissue(amounts)
    if step.name == "select":
        return _select(step, amounts)
    if step.name == "tile":
        return _tile(step, amounts)
    if step.name == "cache":
        return _cache(step, amounts)
    return Cost(step.name, known="not planned")


def slide_rates(entries: list[Entry], rates: Rates, field: str) -> tuple[Rates, str]:
    """The rates with a stage's own seconds a slide, where its journal has some."""
    timed = [entry.seconds for entry in entries if entry.outcome == "done" and entry.seconds > 0]
    if not timed:
        return rates, "assumed rate"
    value = sum(timed) / len(timed)
    return replace(rates, **{field: value}), f"measured on {len(timed):,} slides"


def _scan(amounts: Amounts) -> Cost:
    rates, known = slide_rates(read_journal(amounts.dataset, "scan"), Rates(), "scan_s_per_slide")
    left = amounts.slides - amounts.scanned
    return replace(scan_cost(left, rates), known=f"{left:,} slides, {known}")


def _tissue(amounts: Amounts) -> Cost:
    journal = read_journal(amounts.dataset, "tissue")
    rates, known = slide_rates(journal, Rates(), "tissue_s_per_slide")
    left = amounts.slides - amounts.with_tissue
    share = left / amounts.slides if amounts.slides else 0.0
    cost = tissue_cost(left, int(amounts.candidates * share), rates)
    return replace(cost, known=f"{left:,} slides, {known}")


def _select(step: Step, amounts: Amounts) -> Cost:
    name = str(step.values.get("name"))
    if name in amounts.dataset.selection_names():
        return Cost("select", known=f"'{name}' stands")
    tiles = amounts.planned.get(name) or amounts.candidates
    return replace(select_cost(tiles, Rates()), known=f"'{name}': {_about(amounts)}{tiles:,} tiles")


def _about(amounts: Amounts) -> str:
    return "" if amounts.candidates_known else "about "


def _names(step: Step) -> tuple[str, ...]:
    named = step.values.get("selection", ())
    return tuple(map(str, named)) if isinstance(named, list) else ((str(named),) if named else ())


def _needed(step: Step, amounts: Amounts, done: Mapping[str, list[Entry]]) -> tuple[int, int, str]:
    """Tiles and slides that a stage still lacks, and how well that is known."""
    coming, there, known = amounts.tiles(_names(step))
    tiles = slides = 0
    if there:
        for slide, blocks in needed_blocks(amounts.dataset, tuple(sorted(there))).items():
            stood = covered_blocks(e for e in done.get(slide, ()) if e.outcome == "done")
            if lacking := len(blocks - stood):
                tiles += lacking * BLOCK_ROWS
                slides += 1
    if known:
        known = f"{_about(amounts)}{coming:,} tiles planned"
    return tiles + coming, min(max(slides, amounts.slides if coming else 0), amounts.slides), known


def tile_rates(entries: Iterable[Entry], rates: Rates) -> tuple[Rates, str]:
    """The rates with the journal's own seconds and bytes a tile, where it has some."""
    done = [e for e in entries if e.outcome == "done" and e.seconds > 0 and e.stop > e.start >= 0]
    tiles = sum(entry.stop - entry.start for entry in done)
    if not tiles:
        return rates, "assumed rate"
    seconds = sum(entry.seconds for entry in done)
    size = sum(record.bytes for entry in done for record in entry.files)
    return (
        replace(rates, tile_s=seconds / tiles, tile_bytes=size / tiles),
        f"measured on {tiles:,} tiles",
    )


def _tile(step: Step, amounts: Amounts) -> Cost:
    px = int(step.values.get("tile-px", amounts.tile_px))
    journal = read_journal(amounts.dataset, "tile")
    held = current_entries(journal, str(px))
    rates, measured = tile_rates((e for rows in held.values() for e in rows), Rates())
    tiles, slides, known = _needed(step, amounts, held)
    cost = tile_cost(slides, tiles, rates) if tiles else Cost("tile")
    return replace(cost, known=_joined(tiles, known, measured))


def _joined(tiles: int, known: str, measured: str) -> str:
    return f"{known or f'{tiles:,} tiles'}, {measured}" if tiles else "all there"


def _cache(step: Step, amounts: Amounts) -> Cost:
    """All kinds of the step's features; one forward pass gives all of them."""
    from model.encoders import encoder_spec
    from pipeline.features.config import CacheConfig
    from pipeline.features.plan import journal_rate

    config = CacheConfig(
        str(step.values.get("encoder", "h0-mini")), tokens=str(step.values.get("tokens", "auto")),
        view=str(step.values.get("view", "")),
    ).resolved()  # fmt: skip
    spec = encoder_spec(config.encoder)
    px = int(step.values.get("tile-px", amounts.tile_px))
    journal = read_journal(amounts.dataset, "cache")
    size, files, most, known = 0.0, 0, 0, ""
    for kind in config.kinds:
        held = current_entries(journal, config.scope(px, kind))
        tiles, slides, known = _needed(step, amounts, held)
        if tiles:
            shape = (spec.num_tokens, spec.token_dim)
            cost = feature_cost(kind, slides, tiles, spec.dim, shape, Rates())
            size, files, most = size + cost.bytes, files + cost.files, max(most, tiles)
    rate = journal_rate(journal, config.scope(px, "cls"))
    seconds = most / rate.tiles_per_s if rate else None
    measured = rate.source if rate else "no rate measured yet for this encoder here"
    return Cost(
        f"cache {config.encoder}", size, files, 0.0, seconds if most else 0.0,
        _joined(most, known, measured),
    )  # fmt: skip
