"""The work of `pipeline report`: small pictures where they are missing, and the page."""

import os
from contextlib import suppress
from pathlib import Path

from common.console import open_meter, print_line
from common.text import format_bytes
from pipeline.dataset import Dataset, commit_bytes, new_run_id
from pipeline.dataset.commit import clean_staging
from pipeline.report.facts import read_facts
from pipeline.report.page import render_page
from pipeline.report.selections import read_selections
from pipeline.report.thumbs import Thumb, make_thumbs

PAGE, THUMBS = "index.html", "thumbs"


def write_report(dataset: Dataset, out: Path | None = None, workers: int | None = None) -> int:
    """Write `out`/index.html and `out`/thumbs (by default in the dataset's folder `report`).

    Files that are there and right are left as they are. Returns the exit status.
    """
    out = (out or dataset.root / "report").absolute()
    # Where a part of the dataset is named: `out` itself may be a link that another put there.
    dataset.refuse_linked_folders(out / THUMBS / PAGE)
    facts, selections = read_facts(dataset), read_selections(dataset)
    thumbs = [
        Thumb(row.slide, dataset.overlay_file(row.slide.slide_id), row.overlay_sha256,
              out / THUMBS / f"{row.slide.slide_id}.jpg")
        for row in facts.slides if row.overlay_sha256 is not None
    ]  # fmt: skip
    target, run_id = Dataset(out), new_run_id()
    is_new = False
    try:
        missing = [thumb for thumb in thumbs if not thumb.is_fresh]
        with open_meter("report", len(missing), "pictures") as progress:
            threads = workers or len(os.sched_getaffinity(0))
            errors = make_thumbs(target, run_id, missing, threads, progress.advance)
        tissue = os.path.relpath((dataset.root / "tissue").absolute(), out).replace(os.sep, "/")
        pictured = {thumb.slide.slide_id for thumb in thumbs} - errors.keys()
        html = render_page(facts, selections, pictured, tissue + "/")
        page = html.encode("utf-8", "replace")
        if not (out / PAGE).exists() or (out / PAGE).read_bytes() != page:
            commit_bytes(target, run_id, out / PAGE, page)
            is_new = True
    finally:
        clean_staging(target, run_id)
        with suppress(OSError):  # another run may be writing
            target.staging_dir(run_id).parent.rmdir()
    for slide_id, error in sorted(errors.items()):
        print_line(f"report: no small picture of {slide_id}: {error}")
    slides, made = len(facts.slides), len(missing) - len(errors)
    if not made and not is_new:
        print_line(f"report: {slides:,} slides, already done, nothing to redo: {out / PAGE}")
        return 0
    print_line(
        f"report: {slides:,} slides; wrote {made:,} of {len(thumbs):,} small pictures and "
        f"{out / PAGE} ({format_bytes(len(page))}); open it in a browser"
    )
    return 0
