"""The work of `pipeline report`: small pictures where they miss, and the page."""

import os
from contextlib import suppress
from pathlib import Path

from common.console import meter, say
from common.text import format_bytes
from pipeline.dataset import Dataset, commit_bytes, new_run_id
from pipeline.dataset.commit import clean_staging
from pipeline.report.facts import Facts, read_facts
from pipeline.report.page import render
from pipeline.report.selections import read_selections
from pipeline.report.thumbs import Thumb, make_thumbs

PAGE, THUMBS = "index.html", "thumbs"


def write_report(dataset: Dataset, out: Path | None = None, workers: int | None = None) -> int:
    """Write `out`/index.html and `out`/thumbs (by default in the dataset's folder `report`).

    Files that are there and right are left as they are. Returns the exit status.
    """
    out = (out or dataset.root / "report").absolute()
    facts = read_facts(dataset)
    selections = read_selections(dataset)
    run_id = new_run_id()
    try:
        thumbs = _thumbs(dataset, facts, out)
        made, errors = _make_missing(out, run_id, thumbs, workers)
        shown = {one.slide.slide_id for one in thumbs} - errors.keys()
        tissue = os.path.relpath((dataset.root / "tissue").absolute(), out).replace(os.sep, "/")
        html = render(facts, selections, shown, tissue + "/").encode("utf-8", "replace")
        is_new = _commit_if_new(out, run_id, out / PAGE, html)
    finally:
        _clean(out, run_id)
    for slide_id, error in sorted(errors.items()):
        say(f"report: no small picture of {slide_id}: {error}")
    _say_end(len(facts.slides), out, len(html), made, len(thumbs), is_new)
    return 0


def _thumbs(dataset: Dataset, facts: Facts, out: Path) -> list[Thumb]:
    """Slides with an overlay, and where their small pictures belong."""
    return [
        Thumb(
            one.slide,
            dataset.overlay_file(one.slide.slide_id),
            out / THUMBS / f"{one.slide.slide_id}.jpg",
        )
        for one in facts.slides
        if one.has_overlay
    ]


def _make_missing(
    out: Path, run_id: str, thumbs: list[Thumb], workers: int | None
) -> tuple[int, dict[str, str]]:
    wanted = [one for one in thumbs if not one.is_fresh]
    with meter("report", len(wanted), "pictures") as progress:
        count = workers or len(os.sched_getaffinity(0))
        errors = make_thumbs(out, run_id, wanted, count, progress.advance) if wanted else {}
    return len(wanted) - len(errors), errors


def _commit_if_new(out: Path, run_id: str, final: Path, data: bytes) -> bool:
    with suppress(OSError):
        if final.read_bytes() == data:
            return False
    commit_bytes(Dataset(out), run_id, final, data)
    return True


def _clean(out: Path, run_id: str) -> None:
    place = Dataset(out)
    clean_staging(place, run_id)
    with suppress(OSError):  # another run may be writing
        place.staging_dir(run_id).parent.rmdir()


def _say_end(slides: int, out: Path, size: int, made: int, pictures: int, is_new: bool) -> None:
    if not made and not is_new:
        say(f"report: {slides:,} slides, already done, nothing to redo: {out / PAGE}")
        return
    say(
        f"report: {slides:,} slides; wrote {made:,} of {pictures:,} small pictures and "
        f"{out / PAGE} ({format_bytes(size)}); open it in a browser"
    )
