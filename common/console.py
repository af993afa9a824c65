"""What a long command shows: one-line errors, progress with rate and ETA.

Used by the doors of `pipeline`, `train` and `evaluate`. All that they print but JSON and scripts
passes through the two consoles here, which let no text of a record steer the terminal.
"""

import argparse
import io
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from common.errors import UserError, describe_machine_error
from common.escape import escape_terminal
from common.following import follow_starter
from common.redact import redact_secrets
from common.streams import lossy_output
from common.text import find_nearest, format_seconds

EXIT_OK, EXIT_FAILURES, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_REQUEUE = 75
"""Exit status after a request to stop (EX_TEMPFAIL of sysexits.h): the state is saved, and the
same command goes on from it. A requeue script starts the job again on this status alone."""
_PLAIN_INTERVAL_S = 10.0

_LOG_WIDTH = 160


class _PlainConsole(Console):
    """A console on which text is only text: no markup, emoji code or control character."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(
            stderr=stderr, width=width, soft_wrap=True, highlight=False, markup=False, emoji=False
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """A string, such as a table's cell, on one line."""
        # Before it is measured: a table's columns are as wide as what is shown.
        return super().render_str(escape_terminal(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """All that is drawn, whatever it is made of; lines end, nothing else steers."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isalnum():
                yield segment
            else:
                lines = map(escape_terminal, segment.text.split("\n"))
                yield Segment("\n".join(lines), segment.style)


stdout = _PlainConsole(width=None if sys.stdout and sys.stdout.isatty() else _LOG_WIDTH)
stderr = _PlainConsole(stderr=True)


def print_line(message: str) -> None:
    """Print one line, without secrets, on the terminal or in the batch job's log."""
    stdout.print(redact_secrets(message))


def run_door(
    command: Callable[[], int],
    rooms: tuple[str, ...],
    *,
    prints_result: bool = False,
    is_resumable: bool = True,
) -> None:
    """Run a room's command and exit with its status.

    A `UserError`, or an error of a disk, a limit or memory, becomes one line on stderr and exit
    status 2; Ctrl-C becomes 130. Output that
    cannot be written ends no command; where it is the result (`prints_result`), the status of one
    that did its work is 1. `is_resumable` is whether an interrupted command keeps what it has done.
    Rooms that were not imported from this project (a stray train.py in the working folder) are
    refused.
    """
    follow_starter()
    _guard_streams()
    with lossy_output(is_result=prints_result) as losses:
        try:
            _check_rooms(rooms)
            status = command()
        except (UserError, KeyboardInterrupt) as error:
            status = report_error(error, is_resumable=is_resumable)
        except (OSError, MemoryError, RuntimeError) as error:
            text = describe_machine_error(error)
            if not text:
                raise
            status = report_error(UserError(text))
    if losses and prints_result and status == EXIT_OK:
        status = EXIT_FAILURES
    sys.exit(status)


def report_error(error: UserError | KeyboardInterrupt, *, is_resumable: bool = True) -> int:
    """Print in one line on stderr what ended a command; returns its exit status."""
    if isinstance(error, UserError):
        stderr.print(redact_secrets(f"error: {error}"), style="bold red")
        return EXIT_USAGE
    done = "what was committed stays; run the same command to go on"
    again = "no result was written; the same command begins again"
    stderr.print(f"interrupted: {done if is_resumable else again}")
    return EXIT_INTERRUPTED


def print_traceback(error: BaseException) -> None:
    """Print on stderr where an unforeseen error came from; what it says steers no terminal."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        stderr.print(Text(line))


def _guard_streams() -> None:
    """Tracebacks and the log lines of libraries quote files, too."""
    sys.excepthook = lambda kind, error, trace: print_traceback(error)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainFormatter())
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal does not have ends no command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_terminal(super().format(record))


def _check_rooms(rooms: tuple[str, ...]) -> None:
    home = Path(__file__).resolve().parents[1]
    # `python -m` searches the working folder before this project.
    for room in rooms:
        path = getattr(import_module(room), "__file__", None)
        if path is None or Path(path).resolve().parents[1] != home:
            raise UserError(
                f"package '{room}' was imported from {path}, expected {home / room}: "
                "set PYTHONSAFEPATH=1 or leave the folder that contains another one of that name"
            )


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {self.unit}/s" if speed else f"– {self.unit}/s", style="cyan")


class Meter:
    """Counts work done; shows a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        # In a job's log a bar would leave a line per refresh.
        if stdout.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(self.unit),
                TimeElapsedColumn(),
                TextColumn("ETA", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=stdout,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """How many seconds ago the meter was made."""
        return time.monotonic() - self.started

    def advance(self, count: int = 1, note: str = "", *, under_way: float = 0.0) -> None:
        """Add finished units; `note` (a loss, a slide) is shown at the end of the bar.

        `under_way` is what is done of unfinished units, in units: rate and ETA count it, so that
        they are known before the first unit is finished. The next call says it anew.
        """
        self.done += count
        reached = self.done + under_way
        if self._bar is not None:
            self._bar.update(self._task, completed=reached, note=note)
        elif time.monotonic() - self._last_line >= _PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            rate = reached / max(self.seconds, 1e-9)
            seconds_left = (self.total - reached) / rate if rate > 0 else float("inf")
            print_line(
                f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, "
                f"ETA {format_seconds(seconds_left)}{'  ' + note if note else ''}"
            )


@contextmanager
def open_meter(label: str, total: int, unit: str) -> Iterator[Meter]:
    """Progress over `total` units with a rate in units per second and an ETA.

    Call `.advance()` as they finish.
    """
    with Meter(label, total, unit) as progress:
        yield progress


class ExplainedExit(SystemExit):
    """Ends a command with a status and a line, which one of several processes prints."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(status)
        self.line = line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest known option."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as a `UserError`; the door prints it and exits with 2."""
        raise UserError(f"{message}{self._suggest_option(message)}; see `{self.prog} --help`")

    def _suggest_option(self, message: str) -> str:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        word = unknown[0].partition("=")[0] if unknown else ""
        known = _all_options(self)
        if word in known:
            return f" ({word} is an option of another command)"
        close = find_nearest(word, known) if word else ""
        return f" (did you mean {close}?)" if close else ""


def _all_options(parser: argparse.ArgumentParser) -> list[str]:
    options: list[str] = []
    for action in parser._actions:
        options += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                options += _all_options(child)
    return options
