"""The `report` command: read, gather, render, write."""

from pathlib import Path

from common.errors import UserError
from evaluate.compare.results import read_results
from evaluate.report.page import gather, render
from evaluate.report.picture import picture
from evaluate.report.runlog import read_run
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
    content = gather(
        read_results(results_file),
        read_run(run_dir) if run_dir is not None else None,
        open_dataset(real),
        open_dataset(generated),
    )
    written = [_write(out, render(content).encode())]
    if picture_file is not None:
        written.append(_write(picture_file, picture(content)))
    return written


def _write(path: Path, data: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from error
    return path
