"""The `report` command: read, gather, render, write."""

from pathlib import Path

from common.files import write_bytes, write_text
from evaluate.compare.results import read_results
from evaluate.report.page import gather_content, render_page
from evaluate.report.picture import draw_picture
from evaluate.report.run_curves import read_run
from pipeline.dataset import open_dataset


def write_report(
    *,
    results_file: Path,
    run_dir: Path | None,
    real: Path,
    generated: Path,
    out: Path,
    picture_file: Path | None = None,
) -> list[Path]:
    """Write the page, and the picture if a file is named for it; returns what was written."""
    content = gather_content(
        read_results(results_file),
        read_run(run_dir) if run_dir is not None else None,
        open_dataset(real),
        open_dataset(generated),
    )
    write_text(out, render_page(content))
    if picture_file is None:
        return [out]
    write_bytes(picture_file, draw_picture(content))
    return [out, picture_file]
