"""Runs in containers are alive for as long as they renew their leases, whatever process ids say."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common import leases
from common.errors import UserError
from common.leases import Lease, is_lease_alive
from common.processes import ProcessIdentity, identify_process
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Run,
    Slide,
    claim_identity,
    make_selection,
    write_selection,
    write_slides,
)
from pipeline.upkeep.activity import list_running
from pipeline.upkeep.verify.runs import staging_folders
from tests.pipeline.faults import ROOT

RUN = """
import sys
from pathlib import Path
from common import leases
from pipeline.dataset import Dataset, Entry, Run, commit_bytes
leases.RENEW_S = 0.2
dataset = Dataset(Path(sys.argv[1]))
with Run(dataset, "tile", {}) as run:
    run.log_event("tasks", slides=1, total=1, unit="slides", engine="local")
    half = dataset.staging_dir(run.run_id) / "half"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"of the tiles")
    print("at work", flush=True)
    sys.stdin.readline()
    half.rename(dataset.root / "whole")
    run.append([Entry("s", "done", "f")])
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A dataset that prune and verify find whole."""
    made = Dataset(tmp_path / "dataset")
    claim_identity(made, {"mpp": 0.5, "tile_px": 224}, stage="scan", versions={})
    with Run(made, "scan", {}) as run:
        write_slides(made, run.run_id, [Slide("s", "s.svs", mpp=0.5)])
        write_selection(
            made, run.run_id, make_selection("all", {"s": np.arange(3, dtype=np.int32)}, {})
        )
    return made


class Contained:
    """A run at work in a container."""

    def __init__(self, dataset: Dataset, under: list[str]) -> None:
        self._process = subprocess.Popen(
            [*under, sys.executable, "-c", RUN, str(dataset.root)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "at work\n"

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        os.killpg(self._process.pid, number)

    def end(self) -> int:
        """Let it end by itself; returns its status."""
        self._process.communicate("go on\n", timeout=60)
        return self._process.returncode

    def kill(self) -> None:
        """kill -9, where it has not ended."""
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.communicate(timeout=60)


@pytest.fixture
def contained(dataset: Dataset, in_new_pid_namespace: list[str]) -> Iterator[Contained]:
    run = Contained(dataset, in_new_pid_namespace)
    yield run
    run.kill()


def clean_up(dataset: Dataset) -> list[Path]:
    """Prune and repair from outside; returns what is left of staging."""
    assert main(["prune", "--dataset", str(dataset.root), "--yes"]) == 0
    try:
        main(["verify", "--dataset", str(dataset.root), "--repair"])
    except (UserError, SystemExit) as error:
        assert "at work" in str(error)  # noqa: PT017
    return list((dataset.root / ".tmp").rglob("half"))


def test_a_live_run_of_another_container_keeps_its_staging(
    dataset: Dataset, contained: Contained
) -> None:
    assert len(clean_up(dataset)) == 1
    (running,) = list_running(dataset)
    assert running.alive
    assert contained.end() == 0
    assert (dataset.root / "whole").read_bytes() == b"of the tiles"
    assert list((dataset.root / ".tmp").iterdir()) == []
    assert list(dataset.status_dir("tile").glob("*.lease")) == []


def test_a_killed_run_of_another_container_is_cleaned_up_in_time(
    dataset: Dataset, contained: Contained, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained.kill()
    assert len(clean_up(dataset)) == 1, "it may live yet"
    monkeypatch.setattr(leases, "DEAD_S", 0.5)
    time.sleep(0.6)
    assert [run.alive for run in list_running(dataset)] == [False]
    assert clean_up(dataset) == []


def test_a_renewed_lease_is_not_outlived(
    dataset: Dataset, contained: Contained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "DEAD_S", 1.0)
    time.sleep(1.5)
    assert len(clean_up(dataset)) == 1


def test_a_run_that_was_stopped_and_taken_for_dead_writes_its_lease_again(
    dataset: Dataset, contained: Contained
) -> None:
    (lease,) = dataset.status_dir("tile").glob("*.lease")
    contained.signal(signal.SIGSTOP)
    lease.unlink()
    contained.signal(signal.SIGCONT)
    deadline = time.monotonic() + 20
    while not lease.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_run_of_this_machine_is_dead_at_once_and_a_stopped_one_lives(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Contained(dataset, [])
    run.signal(signal.SIGSTOP)
    monkeypatch.setattr(leases, "DEAD_S", 0.1)
    time.sleep(0.2)
    assert len(clean_up(dataset)) == 1
    monkeypatch.undo()
    run.kill()
    assert [seen.alive for seen in list_running(dataset)] == [False]
    assert clean_up(dataset) == []


def test_whoever_may_only_read_judges_without_writing(
    dataset: Dataset, contained: Contained, as_nobody: list[str], tmp_path: Path
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    command = [*as_nobody, sys.executable, "-m", "pipeline", "status", "--dataset"]
    before = sorted(dataset.root.rglob("*"))
    said = subprocess.run(
        [*command, str(dataset.root)], cwd="/", capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if "Permission" in said.stderr or "No module" in said.stderr:
        pytest.skip("another user cannot read this checkout")
    assert said.returncode == 0, said.stderr
    assert "running: tile" in said.stdout
    assert sorted(dataset.root.rglob("*")) == before


def test_a_run_that_has_nothing_to_write_leaves_no_trace(dataset: Dataset) -> None:
    before = sorted(dataset.root.rglob("*"))
    with Run(dataset, "tile", {}):
        pass
    assert sorted(dataset.root.rglob("*")) == before


def test_a_process_is_known_by_more_than_its_id() -> None:
    here = identify_process()
    if not here.boot:
        pytest.skip("this system does not say which process is which")
    assert here.is_alive() is True
    assert replace(here, started=here.started - 1).is_alive() is False, "its id was given anew"
    assert replace(here, pid=2**22 + 1).is_alive() is False
    assert replace(here, boot="another").is_alive() is None
    assert replace(here, namespace="pid:[1]").is_alive() is None
    assert ProcessIdentity.from_json(here.to_json()) == here
    zombie = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = replace(here, pid=zombie.pid, started=started_ticks(zombie.pid))
    assert seen.is_alive() is True
    zombie.kill()
    deadline = time.monotonic() + 10
    while seen.is_alive():
        assert time.monotonic() < deadline, "dead, and its parent has not asked after it"
        time.sleep(0.01)
    zombie.communicate()


def started_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '{"pid": 1}', "[" * 100_000, '{"boot": 1, "namespace": 2}',
     '{"boot": "", "namespace": "", "pid": true, "started": 0}',
     '{"boot": "", "namespace": "", "pid": -1, "started": 0}', "\0\xff"],
)  # fmt: skip
def test_a_forged_lease_breaks_nothing(dataset: Dataset, text: str) -> None:
    assert ProcessIdentity.from_json(text) is None
    folder = dataset.status_dir("tile")
    folder.mkdir(parents=True)
    (folder / "x.lease").write_text(text)
    (dataset.root / ".tmp" / "x").mkdir(parents=True, exist_ok=True)
    assert [each.alive for each in staging_folders(dataset)] == [True], "it was written just now"


def test_a_pipe_or_link_for_a_lease_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert is_lease_alive(tmp_path / "pipe", lambda: None)
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    Lease(tmp_path / "link").end()
    assert not (tmp_path / "precious").exists()


def test_old_leases_of_the_dead_are_cleared_by_the_next_run(dataset: Dataset) -> None:
    folder = dataset.status_dir("tile")
    folder.mkdir(parents=True)
    elsewhere = replace(identify_process(), boot="another").to_json()
    here = identify_process().to_json()
    for name, text in (("old", elsewhere), ("new", elsewhere), ("mine", here)):
        (folder / f"{name}.lease").write_text(text)
    for name in ("old", "mine"):
        os.utime(folder / f"{name}.lease", (0, 0))
    with Run(dataset, "tile", {}) as run:
        mine = run.run_id
        assert {path.stem for path in folder.glob("*.lease")} == {"new", "mine", mine}
