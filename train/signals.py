"""Requests to stop: finish the step, save, and leave with a status that says so."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

from common.console import EXIT_INTERRUPTED, EXIT_REQUEUE, ExplainedExit, print_line, stdout

_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_IGNORABLE = (signal.SIGHUP,)  # as nohup leaves it
_SAME_KEY_S = 0.1  # Ctrl-C can reach a process twice: from the terminal and from what started it


class StoppedEarly(ExplainedExit):
    """Leaves a run that was asked to stop before its first step: nothing would be lost."""

    def __init__(self) -> None:
        super().__init__(
            EXIT_REQUEUE,
            "stopped on request before the first step of this start: there is nothing new to "
            f"save; the same command begins there again (exit status {EXIT_REQUEUE})",
        )


@contextlib.contextmanager
def leaving_early() -> Iterator[None]:
    """Leave with status 75 on a request to stop inside the block: before torch is imported.

    That takes seconds, in which SIGUSR1 would end the process with a status that no requeue
    script knows. `StopRequests` takes over.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if _is_first_process():
            print_line(StoppedEarly().line)
            stdout.file.flush()
        # At once: an exception may be lost in an import.
        os._exit(EXIT_REQUEUE)

    previous = _replace_handlers(leave)
    try:
        yield
    finally:
        for request, handler in previous.items():
            signal.signal(request, handler)


def _replace_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[Any, Any]:
    """Handle the requests to stop, but one that is ignored as under nohup; the former handlers."""
    return {
        number: signal.signal(number, handler)
        for number in _REQUESTS
        if number not in _IGNORABLE or signal.getsignal(number) is not signal.SIG_IGN
    }


def _is_first_process() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


class StopRequests:
    """Notes SIGTERM, SIGUSR1, SIGINT and SIGHUP inside the `with` block instead of dying of them.

    Until `begin_steps` a request raises `StoppedEarly`, since there is nothing to save; after it
    `received` is set. A second SIGINT ends the process at once, whatever it is doing.
    """

    def __init__(self) -> None:
        self.received = False
        self._may_leave = True
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._says = _is_first_process()
        # torchrun passes the second Ctrl-C on as SIGTERM.
        is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._seconds = {signal.SIGINT, *([signal.SIGTERM] if is_torchrun else [])}

    def __enter__(self) -> Self:
        # Python runs its handlers between two operations, and one of them may wait for other
        # processes for ever: a thread hears of signals by this pipe at once.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_child)
        self._previous = _replace_handlers(self._note_signal)
        self._watcher = threading.Thread(target=self._watch_signals, args=(reading,), daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, StoppedEarly) and self._says:
            print_line(error.line)
        self._restore_handlers(self._previous_fd)
        os.close(self._writing)  # which ends the thread
        self._watcher.join()

    def begin_steps(self) -> None:
        """From now on a request is noted, for the end of the step to see."""
        self._may_leave = False

    def _leave_child(self) -> None:
        """A forked process's signals are its own: in this pipe they would look like ours."""
        if self._previous:
            self._restore_handlers(-1)

    def _restore_handlers(self, wakeup_fd: int) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        signal.set_wakeup_fd(wakeup_fd)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._may_leave:
            self._may_leave = False  # a second one must not end what the first one unwinds
            raise StoppedEarly

    def _watch_signals(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in self._previous:
                        self._take_request(signal.Signals(number))

    def _take_request(self, number: signal.Signals) -> None:
        self.received = True
        now, before = time.monotonic(), self._interrupted_at
        if before is not None and number in self._seconds and now - before > _SAME_KEY_S:
            _end_at_once(self._says)
        if number is signal.SIGINT and before is None:
            self._interrupted_at = now
            if self._says and not self._may_leave:
                print_line(
                    "interrupted: finishing this step and saving it; Ctrl-C again ends at once, "
                    "without saving"
                )


def _end_at_once(says: bool) -> NoReturn:
    """End the process from any thread; the console may be locked, so this writes by itself."""
    if says:
        cursor = b"\x1b[?25h" if os.isatty(2) else b""  # which a progress bar hides
        line = b"interrupted again: ended at once; the same command goes on from the checkpoints\n"
        with contextlib.suppress(OSError):
            os.write(2, cursor + line)
    os._exit(EXIT_INTERRUPTED)
