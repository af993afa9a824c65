"""How a stage ended: counts, the slides that were not taken and why, what was written where."""

from dataclasses import dataclass, field

from rich.table import Table

from common.console import EXIT_FAILURES, EXIT_OK, print_line, stdout
from common.redact import redact_secrets
from common.text import format_bytes, format_seconds
from pipeline.dataset import Entry

_ROWS_SHOWN = 40


@dataclass
class Summary:
    """How a stage ended, slide by slide: `bytes` written and `seconds` taken among the rest.

    `notes` are of slides that were taken: (slide_id, what a person should know of it). `closing`
    lines come after the last one; `is_failure` where a stage failed as a whole.
    """

    stage: str
    done_slides: set[str] = field(default_factory=set)
    skipped: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    closing: list[str] = field(default_factory=list)
    is_failure: bool = False

    def fail(self, reason: str) -> None:
        """Say in a closing line why the stage as a whole ends with exit status 1."""
        self.is_failure = True
        self.add_closing(f"{self.stage}: {reason}")

    def add_closing(self, *lines: str) -> None:
        """Add lines to what is printed at the very end."""
        self.closing += lines

    def add_entry(self, entry: Entry) -> None:
        """Count one entry."""
        if entry.outcome == "rejected":
            self.rejected.append((entry.slide_id, entry.reason))
        elif entry.outcome == "failed":
            row = (entry.slide_id, entry.reason)
            if self.failed[-1:] != [row]:  # a slide's lines, one per scope, come together
                self.failed.append(row)
        else:
            self.done_slides.add(entry.slide_id)
            self.notes += [(entry.slide_id, note) for note in entry.values.get("notes", ())]
        self.files += len(entry.files)
        self.bytes += sum(record.bytes for record in entry.files)
        for name, count in entry.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    @property
    def status(self) -> int:
        """Exit status: 1 if any slide failed, or the stage as a whole."""
        return EXIT_FAILURES if self.failed or self.is_failure else EXIT_OK


def report_summary(summary: Summary, where: object, rate_of: str = "") -> int:
    """Print refused slides with their reasons and the final line; returns the exit status.

    `where` is what the files were written to; `rate_of` is the count to state per second.
    """
    # The line last: it is what is seen when the command has ended.
    _print_reasons(summary)
    parts = [f"{len(summary.done_slides)} done"]
    if summary.skipped:
        parts.append(f"{summary.skipped} already done, nothing to redo")
    if summary.rejected:
        parts.append(f"{len(summary.rejected)} rejected")
    if summary.failed:
        parts.append(f"{len(summary.failed)} failed")
    counts = ", ".join(f"{count:,} {name}" for name, count in summary.counts.items())
    line = f"{summary.stage}: slides: {', '.join(parts)}"
    if counts:
        line += f"; {counts}"
    if summary.files:
        line += f"; wrote {summary.files} files, {format_bytes(summary.bytes)} to {where}"
    line += f" in {format_seconds(summary.seconds)}"
    total = summary.counts.get(rate_of, 0)
    if total and summary.seconds > 0:
        line += f" ({total / summary.seconds:.1f} {rate_of}/s)"
    print_line(line)
    for closing in summary.closing:
        print_line(redact_secrets(closing))
    return summary.status


def _print_reasons(summary: Summary) -> None:
    _print_rows(
        [(slide_id, "taken", note) for slide_id, note in summary.notes],
        Table("slide", "outcome", "note", title=f"{summary.stage}: slides taken with a note"),
    )
    rows = [(slide_id, "failed", reason) for slide_id, reason in summary.failed]
    rows += [(slide_id, "rejected", reason) for slide_id, reason in summary.rejected]
    _print_rows(
        rows, Table("slide", "outcome", "reason", title=f"{summary.stage}: slides not taken")
    )


def _print_rows(rows: list[tuple[str, str, str]], table: Table) -> None:
    if not rows:
        return
    for slide_id, outcome, reason in rows[:_ROWS_SHOWN]:
        table.add_row(slide_id, outcome, redact_secrets(reason))
    stdout.print(table)
    if len(rows) > _ROWS_SHOWN:
        print_line(f"... and {len(rows) - _ROWS_SHOWN} more, in the stage's journal")
