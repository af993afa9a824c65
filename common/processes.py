"""Processes of this machine, and how one is known again where process ids mean something else."""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from common.json_text import parse_json

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process as others can tell it from every other one, on any machine and in any container.

    `boot` is the kernel's id of this start of the machine, `namespace` that of the process ids
    (each container has its own), `started` the ticks from the boot to the process's start, for
    ids are given anew. `boot` is "" where the system tells none of this.
    """

    boot: str
    namespace: str
    pid: int
    started: int
    host: str = ""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ProcessIdentity | None":
        """What `to_json` wrote, or None: the text may be anybody's, cut short or empty."""
        try:
            made = cls(**parse_json(text))
        except (ValueError, TypeError):
            return None
        texts = all(isinstance(value, str) for value in (made.boot, made.namespace, made.host))
        is_whole = type(made.pid) is type(made.started) is int
        return made if texts and is_whole and made.pid > 0 else None

    def is_alive(self) -> bool | None:
        """Whether the process lives; None where only others could say, in another container too."""
        mine = identify_process()
        if not mine.boot or (self.boot, self.namespace) != (mine.boot, mine.namespace):
            return None
        if (found := _read_stat(str(self.pid))) is None:
            # Not found, or hidden from us because it is another user's.
            return is_process_alive(self.pid)
        state, started = found
        # A dead process whose parent has not asked after it still has its id.
        return state not in "ZX" and started == self.started


def identify_process() -> ProcessIdentity:
    """This process."""
    boot, namespace, started = "", "", 0
    found = _read_stat("self")
    try:
        # A container may see the /proc of its host, whose ids are not the container's.
        if found and os.readlink(_PROC / "self") == str(os.getpid()):
            namespace = os.readlink(_PROC / "self" / "ns" / "pid")
            boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            started = found[1]
    except OSError:
        boot = ""
    return ProcessIdentity(boot, namespace, os.getpid(), started, socket.gethostname())


def _read_stat(name: str) -> tuple[str, int] | None:
    """The state of a process and its start in ticks since the boot."""
    try:
        text = (_PROC / name / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in brackets, which may have brackets and blanks itself.
    fields = text.rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else None


def is_process_alive(pid: int) -> bool:
    """Whether this machine has a process of that id; one that may not be asked counts as alive."""
    try:
        # Signal 0 only asks.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
