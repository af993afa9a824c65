"""The `report` command: read, gather, render, write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError

from common.console import EXIT_OK, print_line
from common.errors import UserError
from common.files import write_bytes, write_text
from common.text import format_bytes, one_line
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
    with _one_line_for_strange_values(config.results):
        written = _write_files(config)
    for path in written:
        print_line(f"report: wrote {path}, {format_bytes(path.stat().st_size)}")
    return EXIT_OK


@contextmanager
def _one_line_for_strange_values(path: Path) -> Iterator[None]:
    """Pages rely on the kinds of a thousand values, and results of others may have any."""
    try:
        yield
    except UserError:
        raise
    except (
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{path}: a value is of another kind than this software writes "
            f"({type(error).__name__}: {one_line(error, 120)}); make the file again"
        ) from error


def _write_files(config: ReportConfig) -> list[Path]:
    # One option for both kinds of results: the file itself says which it is.
    protocol = read_protocol_results(config.results)
    if protocol is not None:
        return write_protocol_files(protocol, config.out.parent, config.out)
    if config.dataset is None or config.generated is None:
        raise UserError("results of `measure` need --dataset DATASET and --generated SYN")
    return write_report(
        results_file=config.results,
        run_dir=config.run_dir,
        real=config.dataset,
        generated=config.generated,
        out=config.out,
        picture_file=config.picture,
    )


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
