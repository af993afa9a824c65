"""`verify --leakage`: the hold-out, proved on the files of the selections."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table

from common.console import EXIT_FAILURES, EXIT_OK, meter, say, stdout
from common.errors import UserError
from common.text import format_seconds
from pipeline.dataset import (
    Dataset,
    Selection,
    Slide,
    identity_value,
    read_selection,
    read_slides,
)
from pipeline.dataset.tables import read_table
from pipeline.selection.leakage import (
    Positions,
    Ranks,
    equal_files,
    find_overlaps,
    shared_patients,
)
from pipeline.slides.reader import Level
from pipeline.slides.resolution import plan_read

TRAIN, VAL_IN, VAL_OUT, GUIDANCE = "train", "val-in", "val-out", "guidance"
BORDER_PX = 16
"""The 256 px variant of a 224 px tile reaches this much further on every side."""
_EXAMPLES = 3
_SLIDES_A_TURN = 64
_NONE: Ranks = np.zeros(0, np.int32)


@dataclass
class Pair:
    """One seen selection (train, guidance or val-in) against one held out, and what they share."""

    seen: Selection
    seen_role: str
    held: Selection
    held_role: str
    tiles: int = 0
    pixels: int = 0
    border: int = 0
    border_tiles: int = 0
    unplaced: int = 0
    patients: int = 0
    files: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def leaks(self) -> int:
        """How many things are on both sides that must not be."""
        return self.tiles + self.pixels + self.unplaced + self.patients + self.files


@dataclass(frozen=True)
class SlideOverlap:
    """What a pair shares on one slide; `unplaced` ranks are not among its candidates."""

    pair: int
    slide_id: str
    shared: Ranks
    pixels: tuple[Ranks, Ranks] = (_NONE, _NONE)
    border: int = 0
    border_tiles: int = 0
    unplaced: int = 0


def verify_leakage(
    dataset: Dataset,
    train: Sequence[str] = (),
    val: Sequence[str] = (),
    val_out: Sequence[str] = (),
    workers: int | None = None,
) -> int:
    """Compare every training selection with every validation one; returns the exit status."""
    began = time.monotonic()
    roles = selection_roles(dataset, train, val, val_out)
    pairs = _pairs(dataset, roles)
    slides = {slide.slide_id: slide for slide in read_slides(dataset)}
    notes = _compare_slides(pairs, slides)
    _compare_tiles(dataset, pairs, slides, workers or len(os.sched_getaffinity(0)), notes)
    return _report(dataset, roles, pairs, notes, time.monotonic() - began)


def selection_roles(
    dataset: Dataset, train: Sequence[str], val: Sequence[str], val_out: Sequence[str]
) -> dict[str, str]:
    """The role of each selection, '' where it has none.

    What the caller names comes first; where a side is not named, the role in the selection's
    plan, then its name.
    """
    plans = {name: read_plan(dataset, name) for name in dataset.selection_names()}
    named = dict.fromkeys(train, TRAIN) | dict.fromkeys(val_out, VAL_OUT)
    for name in val:
        stated = _role(name, plans.get(name, {}))
        named[name] = stated if stated in (VAL_IN, VAL_OUT) else VAL_IN
    for name in named:
        if name not in plans:
            raise UserError(
                f"no selection '{name}' in {dataset.root}; there: {', '.join(plans) or 'none'}"
            )
    twice = set(train) & {*val, *val_out}
    if twice:
        raise UserError(f"selection '{min(twice)}' is named for training and for validation")
    roles = {name: named.get(name, _role(name, plan)) for name, plan in plans.items()}
    for name, role in roles.items():
        given = train if role == TRAIN else [*val, *val_out] if role in (VAL_IN, VAL_OUT) else ()
        if given and name not in named:
            roles[name] = ""
    return roles


def read_plan(dataset: Dataset, name: str) -> dict[str, Any]:
    """The plan in a selection's metadata; {} where others wrote the file."""
    path = dataset.selection_file(name)
    try:
        metadata = pq.read_schema(path).metadata or {}
        plan = json.loads(metadata.get(b"plan", b"{}"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read: {reason}; run `verify`") from error
    return plan if isinstance(plan, dict) else {}


def _role(name: str, plan: dict[str, Any]) -> str:
    """Held out where the plan or the name says so; training where either does; else ''."""
    stated = plan.get("role")
    if stated in (VAL_IN, VAL_OUT, GUIDANCE):
        return str(stated)
    for role in (VAL_OUT, GUIDANCE, TRAIN):
        if name.startswith(role):
            return role
    if name.startswith("val-"):
        return VAL_IN
    return TRAIN if stated == TRAIN else ""


def _pairs(dataset: Dataset, roles: dict[str, str]) -> list[Pair]:
    """All pairs whose sides must not meet."""
    by_role: dict[str, list[Selection]] = {}
    for name, role in roles.items():
        if role:
            by_role.setdefault(role, []).append(read_selection(dataset, name))
    for side, option, present in (
        ("training", "--train", TRAIN in by_role),
        ("validation", "--val", VAL_IN in by_role or VAL_OUT in by_role),
    ):
        if not present:
            raise UserError(
                f"{dataset.root} has no {side} selection by plan or name (there: "
                f"{', '.join(roles) or 'none'}): name one with {option}"
            )
    return [
        Pair(a, seen, b, held)
        for seen, held in product((TRAIN, GUIDANCE, VAL_IN), (VAL_IN, VAL_OUT))
        if seen != held
        for a, b in product(by_role.get(seen, []), by_role.get(held, []))
    ]


def _compare_slides(pairs: list[Pair], slides: dict[str, Slide]) -> list[str]:
    """Patients and files on both sides; returns what a reader must know of the table."""
    patient_of = {slide_id: slide.patient for slide_id, slide in slides.items()}
    sums_of = {slide_id: (slide.md5, slide.sha256) for slide_id, slide in slides.items()}
    for pair in pairs:
        left, right = pair.seen.slide_ids, pair.held.slide_ids
        if pair.held_role == VAL_OUT and pair.seen_role != VAL_IN:
            patients = shared_patients(left, right, patient_of)
            pair.patients = len(patients)
            for name, mates in list(patients.items())[:_EXAMPLES]:
                pair.examples.append(f"patient {name}: slides {mates[0]} and {mates[1]}")
        equal = equal_files(left, right, sums_of)
        pair.files = len(equal)
        pair.examples += [f"slides {a} and {b} are one file" for a, b in equal[:_EXAMPLES]]
    used = {slide_id for pair in pairs for s in (pair.seen, pair.held) for slide_id in s.slide_ids}
    unknown = sum(not patient_of.get(slide_id) for slide_id in used)
    unsummed = sum(not any(sums_of.get(slide_id, ())) for slide_id in used)
    notes = []
    if unknown:
        notes.append(f"{unknown:,} of {len(used):,} slides have no patient: each is its own")
    if unsummed:
        notes.append(
            f"{unsummed:,} of {len(used):,} slides have no md5 or sha256: copies among them "
            "under other names cannot be told"
        )
    return notes


def _compare_tiles(
    dataset: Dataset, pairs: list[Pair], slides: dict[str, Slide], workers: int, notes: list[str]
) -> None:
    """Ranks and pixels of every slide that is on both sides of a pair."""
    places = [
        ({s: i for i, s in enumerate(pair.seen.slide_ids)},
         {s: i for i, s in enumerate(pair.held.slide_ids)})
        for pair in pairs
    ]  # fmt: skip
    common = sorted(set().union(*(left.keys() & right.keys() for left, right in places)))
    keys = ("mpp", "mpp_tolerance", "tile_px")
    identity = {key: identity_value(dataset, key) for key in keys}

    def one(slide_id: str) -> list[SlideOverlap]:
        sides = [
            (number, pair.seen.ranks_of(left[slide_id]), pair.held.ranks_of(right[slide_id]))
            for number, (pair, (left, right)) in enumerate(zip(pairs, places, strict=True))
            if slide_id in left and slide_id in right
        ]
        return list(_slide_overlaps(dataset, slides.get(slide_id), slide_id, identity, sides))

    flat = [s for s in common if s in slides and not is_placed(slides[s])]
    if flat:
        notes.append(
            f"{len(flat):,} slides on both sides are imported pictures without a known geometry, "
            f"e.g. {flat[0]}: their ranks were compared, their pixels were not"
        )
    with meter("leakage", len(common), "slides") as progress, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(common), _SLIDES_A_TURN):
            for found in pool.map(one, common[start : start + _SLIDES_A_TURN]):
                for overlap in found:
                    _add(pairs[overlap.pair], overlap)
                progress.advance()


def _slide_overlaps(
    dataset: Dataset,
    slide: Slide | None,
    slide_id: str,
    identity: dict[str, Any],
    sides: list[tuple[int, Ranks, Ranks]],
) -> Iterator[SlideOverlap]:
    if slide is None:
        raise UserError(
            f"slide {slide_id} of a selection is not in {dataset.slides_file}: run `scan`"
        )
    x, y = _positions(dataset, slide_id)
    for number, seen, held in sides:
        known, asked = (ranks[(ranks >= 0) & (ranks < len(x))] for ranks in (seen, held))
        unplaced = len(seen) + len(held) - len(known) - len(asked)
        found = SlideOverlap(number, slide_id, np.intersect1d(seen, held), unplaced=unplaced)
        if is_placed(slide):
            size, border = tile_size_level0(slide, identity)
            overlap = find_overlaps(x[asked], y[asked], x[known], y[known], size, border)
            i, j = overlap.pixels
            apart = asked[i] != known[j]
            found = replace(
                found,
                pixels=(known[j[apart]], asked[i[apart]]),
                border=len(overlap.border[0]),
                border_tiles=len(np.unique(overlap.border[0])),
            )
        yield found


def _positions(dataset: Dataset, slide_id: str) -> tuple[Positions, Positions]:
    table = read_table(dataset.candidates_file(slide_id), ["x_level0", "y_level0"], "run `tissue`")
    return table["x_level0"].to_numpy(), table["y_level0"].to_numpy()


def is_placed(slide: Slide) -> bool:
    """Whether positions of the slide's tiles mean something: imported pictures have no levels."""
    return bool(slide.mpp and slide.levels)


def tile_size_level0(slide: Slide, identity: dict[str, Any]) -> tuple[float, float]:
    """Side of the slide's tiles, and of the larger variant's border, in level-0 pixels."""
    levels = [Level(width, height, downsample) for width, height, downsample in slide.levels]
    tile_px = int(identity["tile_px"])
    plan = plan_read(
        levels, float(slide.mpp or 0), identity["mpp"], identity["mpp_tolerance"], tile_px
    )
    size = plan.window * plan.downsample
    return size, size * BORDER_PX / tile_px


def _add(pair: Pair, found: SlideOverlap) -> None:
    pair.tiles += len(found.shared)
    pair.pixels += len(found.pixels[0])
    pair.border += found.border
    pair.border_tiles += found.border_tiles
    pair.unplaced += found.unplaced
    said = [f"{found.slide_id} rank {rank}: in both" for rank in found.shared[:_EXAMPLES]]
    ranks = zip(*(side[:_EXAMPLES].tolist() for side in found.pixels), strict=True)
    said += [f"{found.slide_id}: ranks {a} and {b} share pixels" for a, b in ranks]
    if found.unplaced:
        said.append(f"{found.slide_id}: {found.unplaced:,} ranks that its candidates do not have")
    room = max(0, 4 * _EXAMPLES - len(pair.examples))
    pair.examples += said[:room]


def _report(
    dataset: Dataset, roles: dict[str, str], pairs: list[Pair], notes: list[str], seconds: float
) -> int:
    columns = ("seen", "held out", "same tile", "same pixels", "same patient", "same file")
    table = Table(*columns, f"±{BORDER_PX} px borders meet", title="leakage: what both sides share")
    for pair in pairs:
        patients = f"{pair.patients:,}" if pair.held_role == VAL_OUT else "as meant"
        if pair.seen_role == VAL_IN:
            patients = "not asked"
        table.add_row(
            f"{pair.seen.name} ({pair.seen_role})", f"{pair.held.name} ({pair.held_role})",
            f"{pair.tiles:,}", f"{pair.pixels:,}", patients, f"{pair.files:,}",
            f"{pair.border:,} pairs, {pair.border_tiles:,} tiles",
        )  # fmt: skip
    stdout.print(table)
    for pair in pairs:
        for example in pair.examples if pair.leaks else ():
            say(f"leak: {pair.seen.name} and {pair.held.name}: {example}")
    for note in [*notes, *_border_note(dataset, pairs), *_role_notes(roles)]:
        say(f"note: {note}")
    leaks = sum(pair.leaks for pair in pairs)
    selections = {id(s): s for pair in pairs for s in (pair.seen, pair.held)}
    rows = sum(selection.rows for selection in selections.values())
    say(
        f"verify --leakage: {len(selections)} selections, {rows:,} rows, {len(pairs)} pairs in "
        f"{format_seconds(seconds)}: {f'{leaks:,} leaks' if leaks else 'no leak'}"
    )
    return EXIT_FAILURES if leaks else EXIT_OK


def _border_note(dataset: Dataset, pairs: list[Pair]) -> list[str]:
    pairs = [pair for pair in pairs if pair.border and pair.seen_role != VAL_IN]
    if not pairs:
        return []
    own = int(identity_value(dataset, "tile_px"))
    count = sum(pair.border for pair in pairs)
    return [
        f"{count:,} pairs of neighbouring tiles on opposite sides would overlap by their borders "
        f"as {own + 2 * BORDER_PX} px tiles: no leak of the {own} px tiles"
    ]


def _role_notes(roles: dict[str, str]) -> list[str]:
    without = [name for name, role in roles.items() if not role]
    return [f"not looked at: {', '.join(without)} (no role; --train, --val)"] if without else []
