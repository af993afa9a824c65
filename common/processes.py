"""Processes of this machine."""

import os


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
