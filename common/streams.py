"""Output that may be lost: a full disk, a closed pipe or a terminal that is gone ends no work."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class LossyStream:
    """A text stream that passes over what it cannot write; `loss` is the last failure.

    `explain` gives the line that standard error gets about the first one, "" for none.
    """

    def __init__(self, stream: TextIO, explain: Callable[[OSError], str] = lambda _: "") -> None:
        self.loss: OSError | None = None
        self._stream, self._explain = stream, explain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or lose it; returns its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._leave_stream(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or lose it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave_stream(error)

    def _leave_stream(self, error: OSError) -> None:
        line = self._explain(error) if self.loss is None else ""
        self.loss = error
        if line:
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode())
        # What is still buffered, Python's last flush and programs started from here go there too.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lossy_output(*, is_result: bool = False) -> Iterator[list[OSError]]:
    """Let standard output and error be lost inside the block, and say so once.

    `is_result`: what is printed is the command's result, not merely a report on work that goes
    on without it. Yields a list, which has the failure of standard output after the block.
    """

    def explain(error: OSError) -> str:
        if not is_result:
            return (
                f"warning: standard output cannot be written ({error.strerror}): its lines are "
                "lost, the work goes on"
            )
        if isinstance(error, BrokenPipeError):  # the reader has seen enough (`| head`)
            return ""
        return f"error: standard output cannot be written: {error.strerror}"

    _hold_closed_handles()
    plain, losses = (sys.stdout, sys.stderr), list[OSError]()
    # Not there at all in a process that was started without them.
    output = LossyStream(plain[0], explain) if plain[0] is not None else None
    if output is not None:
        sys.stdout = cast(TextIO, output)
    if plain[1] is not None:
        sys.stderr = cast(TextIO, LossyStream(plain[1]))
    try:
        yield losses
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if output is not None and output.loss is not None:
            losses.append(output.loss)
        sys.stdout, sys.stderr = plain


def _hold_closed_handles() -> None:
    """Open /dev/null where a standard stream is closed: a data file would get its number."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
