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

from common.console import EXIT_REQUEUE, run_door, stderr
from common.errors import UserError
from common.following import shutdown_patience, tied_children

STORE_VARIABLE = "HISTOGEN_STORE"
"""The file by which the processes find one another, in a folder that only their owner reads."""

_ROOMS = ("train", "evaluate")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LOOK_EVERY_S = 0.05


class _Group:
    """The processes of a launch, and the signals that were passed on to them."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.passed = set[int]()

    def pass_signals_on(self) -> None:
        """From now on what this process is sent reaches all."""
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: object) -> None:
        self.passed.add(number)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def states(self) -> list[int | None]:
        """The exit status of each process, None for one that lives."""
        return [process.poll() for process in self.processes]


def launch(count: int, room: str, arguments: Sequence[str]) -> int:
    """Run `python -m ROOM ARGUMENTS` as `count` processes; the status of the first that failed.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on to all of them. All are asked to end where
    one was killed, which a line reports, and where this process is.
    """
    group = _Group()
    # Before the first one is started: a signal that came in between would leave them behind.
    group.pass_signals_on()
    with (
        TemporaryDirectory(prefix="histogen-", ignore_cleanup_errors=True) as folder,
        tied_children() as tie,
    ):
        shared = os.environ | {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
        shared[STORE_VARIABLE] = str(Path(folder) / "store")
        shared.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared out
        try:
            for rank in range(count):
                if group.passed:  # nothing is begun yet
                    return _status_of_request(room, group.passed)
                variables = shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
                group.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", room, *arguments],
                        process_group=0,  # their own: a terminal's Ctrl-C would reach them twice
                        **tie.options(variables),
                    )
                )
            status = _wait_for_all(group)
        finally:
            for process in group.processes:
                process.kill()
                process.wait()
    if -status in group.passed:  # it came before they could hear it
        return _status_of_request(room, {-status})
    return 128 - status if status < 0 else status


def _status_of_request(room: str, numbers: set[int]) -> int:
    """The status after a signal before anything was begun: a training is simply to be resumed."""
    return EXIT_REQUEUE if room == "train" else 128 + min(numbers)


def _wait_for_all(group: _Group) -> int:
    """The first status that is not 0; the other processes are then asked to end, and made to.

    A signal that ended a process is a negative number.
    """
    status, deadline = 0, float("inf")
    while None in (states := group.states()):
        if not status and (status := _first_failure(states)):
            deadline = time.monotonic() + shutdown_patience()
            _report_killed(group, states)
            for process in group.processes:
                process.terminate()
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_EVERY_S)
    if not status and (status := _first_failure(states)):
        _report_killed(group, states)
    return status


def _first_failure(states: Sequence[int | None]) -> int:
    """A status that is not 0; a signal's before those of processes that merely lost another."""
    failed = [state for state in states if state]
    return min(failed) if failed and min(failed) < 0 else next(iter(failed), 0)


def _report_killed(group: _Group, states: Sequence[int | None]) -> None:
    """One line for processes that were killed, which they cannot report themselves."""
    for rank, state in enumerate(states):
        if state is None or state >= 0 or -state in group.passed:
            continue
        name = signal.Signals(-state).name
        memory = " (was there too little memory?)" if -state == signal.SIGKILL else ""
        stderr.print(
            f"error: process {rank} of {len(states)} was ended by {name}{memory}; the others are "
            "ended, and the same command goes on from what is saved",
            style="bold red",
        )
        return


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
