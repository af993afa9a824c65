"""The `select` stage: a named selection, its budget divided among sites and slides."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import UserError
from pipeline.console import say
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    Selection,
    Slide,
    candidate_count,
    fingerprint,
    make_selection,
    read_identity,
    read_journal,
    read_selection,
    standing,
    write_selection,
)
from pipeline.grid import reserve_size
from pipeline.selection.allocate import sainte_lague
from pipeline.stage import stage_versions, stands
from pipeline.tissue.stage import tissue_fingerprint, usable_slides

STAGE, VERSION = "select", 1
STRATA = ("site", "project", "none")
POOLS = ("train", "reserve")


@dataclass(frozen=True)
class SelectConfig:
    """A selection: its name, its budget (None takes all there is), its strata and pool.

    Pool `train` is every rank above the validation reserve; pool `reserve` is the reserve.
    """

    name: str
    tiles: int | None = None
    stratify: str = "site"
    pool: str = "train"


@dataclass(frozen=True)
class Stratum:
    """A site or project: its slides, and how many tiles were wanted and got."""

    name: str
    slides: int
    candidates: int
    quota: float
    selected: int


def select(dataset: Dataset, config: SelectConfig) -> int:
    """Write selections/<name>.parquet with its plan; returns the exit status."""
    slides, candidates, parents = _eligible(dataset)
    mark = fingerprint(stage=STAGE, version=VERSION, config=asdict(config), parents=parents)
    known = standing(read_journal(dataset, STAGE))
    if stands(dataset, known.get(config.name, []), mark) is not None:
        rows = read_selection(dataset, config.name).rows
        say(f"select: selection '{config.name}' ({rows:,} tiles) already done, nothing to redo")
        return 0
    reserve = np.array([reserve_size(int(n)) for n in candidates], np.int64)
    capacities = reserve if config.pool == "reserve" else candidates - reserve
    strata, counts = divide(slides, candidates, capacities, config)
    first = np.zeros_like(reserve) if config.pool == "reserve" else reserve
    selection = _build(config, slides, first, counts, strata, dataset)
    with Run(dataset, STAGE, stage_versions()) as run:
        record = write_selection(dataset, run.run_id, selection)
        counted = {"tiles": selection.rows}
        run.append([Entry(config.name, "done", mark, files=(record,), counts=counted)])
    say(
        f"select: {selection.rows:,} tiles of {len(selection.slide_ids):,} slides in "
        f"{len(strata)} strata ({config.stratify}), wrote {dataset.selection_file(config.name)}"
    )
    return 0


def _eligible(
    dataset: Dataset,
) -> tuple[list[Slide], npt.NDArray[np.int64], list[tuple[str, str]]]:
    """Slides with candidates that stand, how many each has, and what they were made from."""
    identity = read_identity(dataset)
    known = standing(read_journal(dataset, "tissue"))
    slides, counts, parents, undone = [], [], [], []
    for slide in usable_slides(dataset):
        mark = tissue_fingerprint(slide, identity)
        entry = stands(dataset, known.get(slide.slide_id, []), mark)
        if entry is None:
            undone.append(slide.slide_id)
        elif entry.outcome == "done":
            slides.append(slide)
            counts.append(candidate_count(dataset, slide.slide_id))
            parents.append((slide.slide_id, mark))
    if not slides:
        what = f"{len(undone)} slides wait for it" if undone else "none was found"
        raise UserError(f"no slide of {dataset.root} has tissue candidates ({what}); run `tissue`")
    if undone:
        say(f"select: {len(undone)} slides without tissue results are left out, e.g. {undone[0]}")
    return slides, np.array(counts, np.int64), parents


def divide(
    slides: list[Slide],
    candidates: npt.NDArray[np.int64],
    capacities: npt.NDArray[np.int64],
    config: SelectConfig,
) -> tuple[list[Stratum], npt.NDArray[np.int64]]:
    """Tiles a slide: the budget among strata by their candidates, then evenly over slides.

    What a small stratum or slide cannot give goes to the others by the same rule.
    """
    keys = [_stratum_key(slide, config.stratify) for slide in slides]
    names = sorted(set(keys))
    place = {name: i for i, name in enumerate(names)}
    group = np.array([place[key] for key in keys])
    weights = np.bincount(group, candidates, len(names)).astype(np.int64)
    limits = np.bincount(group, capacities, len(names)).astype(np.int64)
    budget = int(capacities.sum()) if config.tiles is None else config.tiles
    try:
        seats = sainte_lague(weights, limits, budget)
    except UserError as error:
        raise UserError(f"--tiles {budget:,} for '{config.name}': {error}") from error
    counts = np.zeros(len(slides), np.int64)
    for index in range(len(names)):
        members = np.flatnonzero(group == index)
        ones = np.ones(len(members), np.int64)
        counts[members] = sainte_lague(ones, capacities[members], int(seats[index]))
    total = max(1, int(weights.sum()))
    strata = [
        Stratum(name, int((group == i).sum()), int(weights[i]), budget * int(weights[i]) / total,
                int(seats[i]))
        for i, name in enumerate(names)
    ]  # fmt: skip
    return strata, counts


def _stratum_key(slide: Slide, stratify: str) -> str:
    return {"site": slide.site, "project": slide.project, "none": ""}[stratify]


def _build(
    config: SelectConfig,
    slides: list[Slide],
    first: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    strata: list[Stratum],
    dataset: Dataset,
) -> Selection:
    ranks = {
        slide.slide_id: np.arange(start, start + count, dtype=np.int32)
        for slide, start, count in zip(slides, first, counts, strict=True)
    }
    plan: dict[str, Any] = {
        "parameters": asdict(config),
        "rule": "sainte-lague",
        "seed": read_identity(dataset)["seed"],
        "strata": [asdict(stratum) for stratum in strata],
    }
    selection = make_selection(config.name, ranks, plan)
    if selection.rows == 0:
        raise UserError(f"selection '{config.name}' would be empty: no candidates in its pool")
    return selection
