"""`verify --leakage`: the hold-out, proved on the files of the selections."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from rich.table import Table

from common.console import EXIT_FAILURES, EXIT_OK, open_meter, print_line, stdout
from common.errors import UserError
from common.text import describe_joined, format_seconds, joined_names, same_identity_key
from pipeline.dataset import (
    Dataset,
    Selection,
    Slide,
    candidate_count,
    identity_value,
    read_selection_rows,
    read_slides,
)
from pipeline.dataset.hold_outs import shared_patients
from pipeline.dataset.tables.candidates import read_positions
from pipeline.dataset.tables.selections import read_plan
from pipeline.selection.leakage import Ranks, equal_files, find_overlaps
from pipeline.selection.plan import GUIDANCE, TRAIN, VAL_IN, VAL_OUT, role_of_name
from pipeline.slides.reader import Level
from pipeline.slides.resolution import plan_read

BORDER_PX = 16
"""The 256 px variant of a 224 px tile reaches this much further on every side."""
_EXAMPLES = 3
_SLIDES_PER_TURN = 64
_NONE: Ranks = np.zeros(0, np.int32)


@dataclass(frozen=True)
class TileSize:
    """The dataset's tiles: micrometres per pixel, its relative tolerance, side in pixels."""

    mpp: float
    mpp_tolerance: float
    tile_px: int


@dataclass
class SelectionPair:
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
        """How many tiles, pairs of pixels, patients and files are on both sides: 0 is right."""
        return self.tiles + self.pixels + self.unplaced + self.patients + self.files

    def add_overlap(self, overlap: "SlideOverlap") -> None:
        """Count what the two share on a slide."""
        slide_id = overlap.slide_id
        self.tiles += len(overlap.shared)
        self.pixels += len(overlap.pixels[0])
        self.border += overlap.border
        self.border_tiles += overlap.border_tiles
        self.unplaced += overlap.unplaced
        new = [f"{slide_id} rank {rank}: in both" for rank in overlap.shared[:_EXAMPLES]]
        ranks = zip(*(side[:_EXAMPLES].tolist() for side in overlap.pixels), strict=True)
        new += [f"{slide_id}: ranks {a} and {b} share pixels" for a, b in ranks]
        if overlap.unplaced:
            new.append(f"{slide_id}: {overlap.unplaced:,} ranks that its candidates do not have")
        room = max(0, 4 * _EXAMPLES - len(self.examples))
        self.examples += new[:room]


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
    # Patients and files by the table of slides first: it takes seconds, pixels take minutes.
    roles = selection_roles(dataset, train, val, val_out)
    pairs = _make_pairs(dataset, roles)
    slides = {slide.slide_id: slide for slide in read_slides(dataset)}
    notes = _compare_slides(pairs, slides)
    notes += _compare_tiles(dataset, pairs, slides, workers or len(os.sched_getaffinity(0)))
    if borders := sum(pair.border for pair in pairs if pair.seen_role != VAL_IN):
        side = int(identity_value(dataset, "tile_px"))
        notes.append(
            f"{borders:,} pairs of neighbouring tiles on opposite sides would overlap by their "
            f"borders as {side + 2 * BORDER_PX} px tiles: no leak of the {side} px tiles"
        )
    if without := [name for name, role in roles.items() if not role]:
        notes.append(f"not compared: {', '.join(without)} (no role; --train, --val)")
    return _report_pairs(pairs, notes, time.monotonic() - began)


def selection_roles(
    dataset: Dataset, train: Sequence[str], val: Sequence[str], val_out: Sequence[str]
) -> dict[str, str]:
    """The role of each selection, '' where it has none.

    What the caller names comes first; where a side is not named, the role in the selection's
    plan, then its name.
    """
    # A name that tells a validation set must not be overruled by --val alone.
    planned = {name: _planned_role(dataset, name) for name in dataset.selection_names()}
    named = dict.fromkeys(train, TRAIN) | dict.fromkeys(val_out, VAL_OUT)
    for name in val:
        role = planned.get(name)
        named[name] = role if role in (VAL_IN, VAL_OUT) else VAL_IN
    for name in named:
        if name not in planned:
            raise UserError(
                f"no selection '{name}' in {dataset.root}; there: {', '.join(planned) or 'none'}"
            )
    twice = set(train) & {*val, *val_out}
    if twice:
        raise UserError(f"selection '{min(twice)}' is named for training and for validation")
    roles = planned | named
    # Where a side is named, no other selection counts for that side.
    for name in roles.keys() - named.keys():
        if (train and roles[name] == TRAIN) or (
            (val or val_out) and roles[name] in (VAL_IN, VAL_OUT)
        ):
            roles[name] = ""
    return roles


def _planned_role(dataset: Dataset, name: str) -> str:
    """Held out where the plan or the name says so; training where either does; else ''."""
    role = read_plan(dataset, name).get("role")
    if role in (VAL_IN, VAL_OUT, GUIDANCE):
        return str(role)
    if name.startswith(GUIDANCE):
        return GUIDANCE
    return role_of_name(name) or (TRAIN if role == TRAIN else "")


def _make_pairs(dataset: Dataset, roles: Mapping[str, str]) -> list[SelectionPair]:
    """All pairs whose sides must not meet."""
    by_role: dict[str, list[Selection]] = {}
    for name, role in roles.items():
        if role:
            by_role.setdefault(role, []).append(read_selection_rows(dataset, name))
    # With one side empty nothing could leak, and the check would pass for nothing.
    for side, option, present in (
        ("training", "--train", TRAIN in by_role),
        ("validation", "--val", VAL_IN in by_role or VAL_OUT in by_role),
    ):
        if not present:
            raise UserError(
                f"{dataset.root} has no {side} selection by plan or name (there: "
                f"{', '.join(roles) or 'none'}): name one with {option}"
            )
    # val-in counts as seen too: it is of training's patients.
    return [
        SelectionPair(seen, seen_role, held, held_role)
        for seen_role, held_role in product((TRAIN, GUIDANCE, VAL_IN), (VAL_IN, VAL_OUT))
        if seen_role != held_role
        for seen, held in product(by_role.get(seen_role, []), by_role.get(held_role, []))
    ]


def _compare_slides(pairs: list[SelectionPair], slides: Mapping[str, Slide]) -> list[str]:
    """Compare patients and files; returns what a reader must know of the table."""
    patient_of = {slide_id: slide.patient for slide_id, slide in slides.items()}
    sums_of = {
        slide_id: (slide.md5, slide.sha256, slide.sampled_key) for slide_id, slide in slides.items()
    }
    for pair in pairs:
        left, right = pair.seen.slide_ids, pair.held.slide_ids
        # val-in is of training's patients by intent, and tells nothing of val-out's.
        if pair.held_role == VAL_OUT and pair.seen_role != VAL_IN:
            patients = shared_patients(left, right, patient_of)
            pair.patients = len(patients)
            for name, mates in list(patients.items())[:_EXAMPLES]:
                pair.examples.append(f"patient {name}: slides {mates[0]} and {mates[1]}")
        equal = equal_files(left, right, sums_of)
        pair.files = len(equal)
        pair.examples += [f"slides {a} and {b} are one file" for a, b in equal[:_EXAMPLES]]
    used = {slide_id for pair in pairs for s in (pair.seen, pair.held) for slide_id in s.slide_ids}
    unknown = sum(not same_identity_key(patient_of.get(slide_id, "")) for slide_id in used)
    unsummed = sum(not any(sums_of.get(slide_id, ())) for slide_id in used)
    joined = joined_names(patient_of.get(slide_id, "") for slide_id in used)
    notes = [line] if (line := describe_joined("patients", joined)) else []
    if unknown:
        notes.append(f"{unknown:,} of {len(used):,} slides have no patient: each is its own")
    if unsummed:
        notes.append(
            f"{unsummed:,} of {len(used):,} slides have no md5, sha256 or samples: copies among "
            "them under other names cannot be recognised"
        )
    return notes


def _compare_tiles(
    dataset: Dataset, pairs: list[SelectionPair], slides: Mapping[str, Slide], workers: int
) -> list[str]:
    """Compare ranks and pixels of every slide that is on both sides of a pair; returns notes."""
    places = [
        ({s: i for i, s in enumerate(pair.seen.slide_ids)},
         {s: i for i, s in enumerate(pair.held.slide_ids)})
        for pair in pairs
    ]  # fmt: skip
    # Only slides on both sides can share pixels.
    common = sorted(set().union(*(left.keys() & right.keys() for left, right in places)))
    # From the identity, not from slides.parquet: tiles were cut by what the identity states.
    mpp, tolerance, tile_px = (
        identity_value(dataset, key) for key in ("mpp", "mpp_tolerance", "tile_px")
    )
    tile = TileSize(float(mpp), float(tolerance), int(tile_px))

    def compare_slide(slide_id: str) -> list[SlideOverlap]:
        sides = [
            (number, pair.seen.ranks_of(left[slide_id]), pair.held.ranks_of(right[slide_id]))
            for number, (pair, (left, right)) in enumerate(zip(pairs, places, strict=True))
            if slide_id in left and slide_id in right
        ]
        if slide_id not in slides:
            raise UserError(
                f"slide {slide_id} of a selection is not in {dataset.slides_file}: run `scan`"
            )
        return list(_slide_overlaps(dataset, slides[slide_id], tile, sides))

    with (
        open_meter("leakage", len(common), "slides") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        # In turns: results of a whole cohort would fill the memory before they are added up.
        for start in range(0, len(common), _SLIDES_PER_TURN):
            turn = common[start : start + _SLIDES_PER_TURN]
            for overlaps in pool.map(compare_slide, turn):
                for overlap in overlaps:
                    pairs[overlap.pair].add_overlap(overlap)
                progress.advance()
    flat = [s for s in common if s in slides and not is_placed(slides[s])]
    if not flat:
        return []
    return [
        f"{len(flat):,} slides on both sides are imported pictures without a known geometry, "
        f"e.g. {flat[0]}: their ranks were compared, their pixels were not"
    ]


def _slide_overlaps(
    dataset: Dataset, slide: Slide, tile: TileSize, sides: list[tuple[int, Ranks, Ranks]]
) -> Iterator[SlideOverlap]:
    """What each pair (its number, the ranks of both) shares on the slide."""
    if is_placed(slide):
        x, y = read_positions(dataset, slide.slide_id)
        rows = len(x)
    else:
        rows = candidate_count(dataset, slide.slide_id)
    for number, seen, held in sides:
        ours, theirs = (ranks[ranks < rows] for ranks in (seen, held))
        unplaced = len(seen) + len(held) - len(ours) - len(theirs)
        shared = np.intersect1d(seen, held)
        result = SlideOverlap(number, slide.slide_id, shared, unplaced=unplaced)
        if is_placed(slide):
            size, border = tile_size_level0(slide, tile)
            overlap = find_overlaps(x[theirs], y[theirs], x[ours], y[ours], size, border)
            i, j = overlap.pixels
            # A tile on both sides is counted as that, not as two that share their pixels.
            apart = theirs[i] != ours[j]
            result = replace(
                result,
                pixels=(ours[j[apart]], theirs[i[apart]]),
                border=len(overlap.border[0]),
                border_tiles=len(np.unique(overlap.border[0])),
            )
        yield result


def is_placed(slide: Slide) -> bool:
    """Whether positions of the slide's tiles mean something: imported pictures have no levels."""
    return bool(slide.mpp and slide.levels)


def tile_size_level0(slide: Slide, tile: TileSize) -> tuple[float, float]:
    """Side of the slide's tiles, and of the larger variant's border, in level-0 pixels."""
    levels = [Level(width, height, downsample) for width, height, downsample in slide.levels]
    plan = plan_read(levels, float(slide.mpp or 0), tile.mpp, tile.mpp_tolerance, tile.tile_px)
    size = plan.window * plan.downsample
    return size, size * BORDER_PX / tile.tile_px


def _report_pairs(pairs: list[SelectionPair], notes: list[str], seconds: float) -> int:
    """Print the table, examples of leaks, notes and the summary; returns the exit status."""
    columns = ("seen", "held out", "same tile", "same pixels", "same patient", "same file")
    table = Table(*columns, f"±{BORDER_PX} px borders meet", title="leakage: what both sides share")
    for pair in pairs:
        patients = f"{pair.patients:,}" if pair.held_role == VAL_OUT else "as intended"
        table.add_row(
            f"{pair.seen.name} ({pair.seen_role})", f"{pair.held.name} ({pair.held_role})",
            f"{pair.tiles:,}", f"{pair.pixels:,}",
            "not compared" if pair.seen_role == VAL_IN else patients, f"{pair.files:,}",
            f"{pair.border:,} pairs, {pair.border_tiles:,} tiles",
        )  # fmt: skip
    stdout.print(table)
    for pair in pairs:
        for example in pair.examples if pair.leaks else ():
            print_line(f"leak: {pair.seen.name} and {pair.held.name}: {example}")
    for note in notes:
        print_line(f"note: {note}")
    # A selection is in several pairs, and is counted once.
    leaks = sum(pair.leaks for pair in pairs)
    selections = {id(s): s for pair in pairs for s in (pair.seen, pair.held)}
    rows = sum(selection.rows for selection in selections.values())
    print_line(
        f"verify --leakage: {len(selections)} selections, {rows:,} rows, {len(pairs)} pairs in "
        f"{format_seconds(seconds)}: {f'{leaks:,} leaks' if leaks else 'no leak'}"
    )
    return EXIT_FAILURES if leaks else EXIT_OK
