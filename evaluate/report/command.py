"""The `report` command: read, gather, render, write."""

from pathlib import Path

from common.console import EXIT_OK, say
from common.errors import UserError
from common.files import write_bytes, write_text
from common.text import format_bytes
from evaluate.compare.results import read_results
from evaluate.protocols.results import read_protocol_results
from evaluate.report.config import ReportConfig
from evaluate.report.page import gather_content, render_page
from evaluate.report.picture import draw_picture
from evaluate.report.protocol_files import write_protocol_files
from evaluate.report.run_curves import read_run
from pipeline.dataset import open_dataset


def report_command(config: ReportConfig) -> int:
    """Run the command; returns the exit status."""
    # One option for both kinds of results: the file itself says which it is.
    protocol = read_protocol_results(config.results)
    if protocol is not None:
        written = write_protocol_files(protocol, config.out.parent, config.out)
    elif config.dataset is None or config.generated is None:
        raise UserError("results of `measure` need --dataset DATASET and --generated SYN")
    else:
        written = write_report(
            results_file=config.results,
            run_dir=config.run_dir,
            real=config.dataset,
            generated=config.generated,
            out=config.out,
            picture_file=config.picture,
        )
    for path in written:
        say(f"report: wrote {path}, {format_bytes(path.stat().st_size)}")
    return EXIT_OK


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
    # All is read before the first file is replaced.
    write_text(out, render_page(content))
    if picture_file is None:
        return [out]
    write_bytes(picture_file, draw_picture(content))
    return [out, picture_file]
