"""A scheduler's warning: finish the step, save, and leave with a status that says so."""

import signal
from types import FrameType
from typing import Any, Self

EXIT_REQUEUE = 75
"""Exit status after SIGTERM or SIGUSR1 (EX_TEMPFAIL of sysexits.h): the state is saved, and the
same command goes on from it. A requeue script starts the job again on this status alone."""

_WARNINGS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Notes SIGTERM and SIGUSR1 instead of dying from them, inside the `with` block."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        def note_signal(number: int, frame: FrameType | None) -> None:
            self.received = True

        for number in _WARNINGS:
            self._previous[number] = signal.signal(number, note_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
