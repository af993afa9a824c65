"""Several processes of one command on this machine: `python -m common.launch N train ...`.

As torchrun does, but with nothing for others to connect to before the command itself, with the
command's own exit status, and without lines of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from common.console import run_door
from common.errors import UserError

STORE_VARIABLE = "HISTOGEN_STORE"
"""The file by which the processes find one another, in a folder that only their owner reads."""

_ROOMS = ("train", "evaluate")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LOOK_EVERY_S = 0.05
_PATIENCE_S = 30.0
"""How long processes may take to end once one has ended with an error."""


def launch(count: int, room: str, arguments: Sequence[str]) -> int:
    """Run `python -m ROOM ARGUMENTS` as `count` processes; the status of the first that failed.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on to all of them.
    """
    with TemporaryDirectory(prefix="histogen-", ignore_cleanup_errors=True) as folder:
        shared = os.environ | {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
        shared[STORE_VARIABLE] = str(Path(folder) / "store")
        shared.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared out
        # A group of their own: a terminal's Ctrl-C would reach them twice.
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", room, *arguments],
                env=shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}, process_group=0,
            )
            for rank in range(count)
        ]  # fmt: skip
        try:
            _pass_signals_on(processes)
            return _wait_for_all(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _pass_signals_on(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    def pass_on(number: int, _: object) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, pass_on)


def _wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first status that is not 0; the other processes are then asked to end, and made to."""
    status, deadline = 0, float("inf")
    while None in (states := [process.poll() for process in processes]):
        failed = [state for state in states if state]
        if failed and not status:
            status, deadline = failed[0], time.monotonic() + _patience_s()
            for process in processes:
                process.terminate()
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_EVERY_S)
    status = status or next((state for state in states if state), 0)
    return 128 - status if status < 0 else status


def _patience_s() -> float:
    """As for torchrun, whose variable this is: a large checkpoint takes long."""
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _PATIENCE_S))


def main(arguments: Sequence[str]) -> int:
    """Parse `N ROOM ...` and run it; the exit status."""
    if arguments[1:2] == ["-m"]:  # as torchrun's users write it
        arguments = [*arguments[:1], *arguments[2:]]
    count, room = [*arguments[:2], "", ""][:2]
    if not (count.isdecimal() and int(count) >= 1 and room in _ROOMS):
        raise UserError(
            f"expected `python -m common.launch N {'|'.join(_ROOMS)} ...` with N processes, got "
            f"'{' '.join(arguments)}'"
        )
    return launch(int(count), room, arguments[2:])


if __name__ == "__main__":
    run_door(lambda: main(sys.argv[1:]), ("common",))
