"""Where a command and its children listen, as the kernel has it."""

import psutil


def list_family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, directly or not."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def listening_at(pid: int) -> set[tuple[str, int]]:
    """Address and port of each TCP socket on which a process or a child of its listens."""
    found = set()
    for process in list_family(pid):
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == "LISTEN"}
    return found
