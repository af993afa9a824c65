"""Another user of the machine tries every port of a run: nobody without its certificate gets in."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from listening import list_family, listening_at

HOME = Path(__file__).resolve().parents[2]

_STAGE = """
import sys
from pipeline.run.workers import EngineConfig, dask_client

if __name__ == "__main__":
    with dask_client(EngineConfig(workers=2), 2) as client:
        assert client.submit(abs, -1).result() == 1
        folders = {client.cluster.scheduler.local_directory}
        folders |= set(client.run(lambda dask_worker: dask_worker.local_directory).values())
        print(client.scheduler.address, *folders, flush=True)
        sys.stdin.read()
"""

_ATTACK = """
import asyncio, os, socket, sys, pathlib
from distributed import Client
from distributed.core import rpc
from distributed.protocol.pickle import dumps
from pipeline.run.private import make_security

folder, ports = pathlib.Path(sys.argv[1]), [int(port) for port in sys.argv[2:]]
(folder / "the folder can be written").touch()

def write():
    (folder / "in").touch()

def send_bytes(port):
    for data in (os.urandom(4096), b"GET /info/main/workers.html HTTP/1.0\\r\\n\\r\\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            try:
                connection.sendall(data)
                said = connection.recv(4096)
            except OSError:
                continue
            assert b"HTTP" not in said and b"compression" not in said, said

async def call(address, **options):
    async with rpc(address, **options) as server:
        await server.run(function=dumps(write), args=dumps(()), kwargs=dumps({}))

if __name__ == "__main__":
    own = make_security()
    for port in ports:
        send_bytes(port)
        for address, options in (
            (f"tcp://127.0.0.1:{port}", {}),
            (f"tls://127.0.0.1:{port}", {"security": own}),
        ):
            try:
                with Client(address, timeout=2, **options) as client:
                    client.run_on_scheduler(write)
                    print("let in at", address)
            except (OSError, TimeoutError, TypeError, ValueError):
                pass
            arguments = {"connection_args": own.get_connection_args("client")} if options else {}
            try:
                asyncio.run(asyncio.wait_for(call(address, **arguments), 2))
                print("answered at", address)
            except (OSError, TimeoutError):
                pass
"""


@dataclass(frozen=True)
class LocalStage:
    """A local stage's workers, waiting for work; the folders of scheduler and workers."""

    pid: int
    folders: list[Path]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStage]:
    script = tmp_path_factory.mktemp("stage") / "stage.py"
    script.write_text(_STAGE)
    with subprocess.Popen(
        [sys.executable, str(script)], env=_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address, *folders = process.stdout.readline().split()
        assert address.startswith("tls://127.0.0.1:")
        yield LocalStage(process.pid, [Path(folder) for folder in folders])
        process.communicate()
    assert process.returncode == 0


def test_a_local_stage_listens_on_loopback_only_and_shows_no_pages(
    stage: LocalStage,
) -> None:
    listening = listening_at(stage.pid)
    assert {address for address, _ in listening} == {"127.0.0.1"}
    # The scheduler, two nannies and two workers, and no HTTP server.
    assert len(listening) == 5, listening


def test_the_key_is_in_memory_and_what_workers_import_from_is_the_owners(
    stage: LocalStage,
) -> None:
    for process in list_family(stage.pid):
        assert "PRIVATE KEY" not in " ".join(process.cmdline())
        assert "PRIVATE KEY" not in "".join(process.environ().values())
    assert len(stage.folders) == 3
    for folder in stage.folders:
        private = next(path for path in folder.parents if path.name.startswith("histogen-"))
        assert private.stat().st_mode & 0o777 == 0o700
        assert private.stat().st_uid == psutil.Process(stage.pid).uids().real


@pytest.mark.full
def test_another_user_is_refused_at_every_port(
    stage: LocalStage,
    as_nobody: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    open_folder = _folder_for_all(tmp_path_factory)
    script = open_folder / "attack.py"
    script.write_text(_ATTACK)
    ports = [str(port) for _, port in sorted(listening_at(stage.pid))]
    attack = subprocess.run(
        [*as_nobody, sys.executable, str(script), str(open_folder), *ports],
        env=_environment(), cwd=open_folder, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert attack.returncode == 0, attack.stderr
    assert attack.stdout == ""
    names = {path.name for path in open_folder.iterdir()}
    assert names == {"attack.py", "the folder can be written"}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(HOME)}


def _folder_for_all(factory: pytest.TempPathFactory) -> Path:
    """A folder that every user can reach and write; pytest's own are closed to others."""
    folder = factory.mktemp("open")
    folder.chmod(0o777)
    for parent in folder.parents:
        if not parent.stat().st_mode & 0o1:
            parent.chmod(parent.stat().st_mode | 0o11)
    return folder
