"""Claims of several runs at once: dataset.json holds all, and of two that differ one is refused."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.processes import ProcessIdentity
from pipeline.dataset import Dataset, claim_identity, identity, lock, read_identity
from pipeline.dataset.commit import commit_bytes
from pipeline.dataset.lock import hold_lock

HOLDER = """
import os, signal, sys
from pathlib import Path
from pipeline.dataset.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
BREAKER = """
import os, signal, sys
from pathlib import Path
from pipeline.dataset import lock
create_lock = lock._create_lock
def create_and_die(path):
    handle = create_lock(path)
    if handle is not None and path.name != "lock":
        os.kill(os.getpid(), signal.SIGKILL)
    return handle
lock._create_lock = create_and_die
with lock.hold_lock(Path(sys.argv[1])):
    pass
"""


def claim(dataset: Dataset, **claims: Any) -> dict[str, Any]:
    return claim_identity(dataset, claims, stage="tile", versions={})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = Dataset(tmp_path)
    claim(made, mpp=0.5)
    return made


def lock_file(dataset: Dataset) -> Path:
    return dataset.staging_dir("dataset.json.lock")


class Pause:
    """The first commit goes on when told to, or after half a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        monkeypatch.setattr(identity, "commit_bytes", self.commit)

    def commit(self, *arguments: Any) -> Any:
        if not self.reached.is_set():
            self.reached.set()
            self.go.wait(0.5)
        return commit_bytes(*arguments)


def test_of_two_first_claims_at_once_one_is_refused(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = Pause(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(claim, dataset, codec="png")
        assert pause.reached.wait(10)
        with pytest.raises(UserError, match=r"codec is 'png' in this dataset, 'png-fast' was"):
            claim(dataset, codec="png-fast")
        pause.go.set()
    assert first.result()["codec"] == "png"
    assert read_identity(dataset)["codec"] == "png"
    assert list(dataset.staging_dir("").iterdir()) == []


def test_two_stages_that_claim_at_once_are_both_kept(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = Pause(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(claim, dataset, codec="png")
        assert pause.reached.wait(10)
        claim(dataset, detector="d")
        pause.go.set()
    first.result()
    assert read_identity(dataset).items() >= {"mpp": 0.5, "codec": "png", "detector": "d"}.items()


def test_what_stands_already_needs_no_lock(dataset: Dataset) -> None:
    """A dataset that may not be written to is still used, and nobody waits for a dead holder."""
    lock_file(dataset).touch()
    assert claim(dataset, mpp=0.5)["mpp"] == 0.5


def hold_by_turns(path: Path) -> None:
    """Eight threads hold the lock, and no two of them at once."""
    inside: list[int] = []

    def hold(number: int) -> int:
        with hold_lock(path):
            inside.append(number)
            here = list(inside)
            inside.remove(number)
            return len(here)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(hold, range(8))) == {1}
    assert list(path.parent.iterdir()) == []


def test_a_holder_killed_with_9_is_outlived_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / ".tmp" / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    assert subprocess.run(command, check=False).returncode == -9
    assert path.exists()
    hold_by_turns(path)


def test_a_waiter_killed_while_it_breaks_a_lock_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a second one, killed while it clears away what the first one left."""
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
    path = tmp_path / ".tmp" / "lock"
    for code in (HOLDER, BREAKER, BREAKER):
        command = [sys.executable, "-c", code, str(path)]
        assert subprocess.run(command, check=False).returncode == -9
    assert len(list(path.parent.iterdir())) == 3
    hold_by_turns(path)


def test_a_holder_that_did_not_say_who_it_is_is_outlived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older releases wrote nothing into the lock, and a full disk has no room for a name."""
    monkeypatch.setattr(lock, "STALE_S", 0.3)
    path = tmp_path / ".tmp" / "lock"
    path.parent.mkdir()
    path.touch()
    hold_by_turns(path)


def test_a_lock_is_renewed_for_as_long_as_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder elsewhere, whose process nobody here can see, keeps it however long it takes."""
    monkeypatch.setattr(lock, "STALE_S", 0.4)
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
    path = tmp_path / "lock"
    with hold_lock(path) as held:
        there = ProcessIdentity.from_json(path.read_text())
        assert there is not None
        assert there.is_alive()
        elsewhere = replace(there, namespace="pid:[1]")
        assert elsewhere.is_alive() is None
        path.write_text(elsewhere.to_json())
        with pytest.raises(UserError, match=f"held by process {os.getpid()} on "), hold_lock(path):
            pass
        assert held.is_held()
    assert not path.exists()


def test_a_holder_that_lives_here_keeps_a_lock_that_it_does_not_renew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does one that SIGSTOP or a suspended laptop stopped."""
    monkeypatch.setattr(lock, "STALE_S", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_S", 0.5)
    with hold_lock(tmp_path / "lock"):
        with pytest.raises(UserError, match="is held by process"), hold_lock(tmp_path / "lock"):
            pass
        assert (tmp_path / "lock").exists()


def test_a_successors_lock_is_never_broken_nor_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path):
        dead = lock._look_at(path)
    assert dead is not None
    with hold_lock(path) as held:
        os.utime(path, ns=(1, 1))
        lock._break_lock(path, dead, lock._Watch())
        assert held.is_held()
        there = lock._look_at(path)
        assert there is not None
        (tmp_path / f"lock.{there.name}").touch()
        lock._break_lock(path, there, lock._Watch())
        assert path.exists(), "another waiter has the right to break it"
        path.unlink()
        path.touch()
        assert not held.is_held()
    assert path.exists(), "it is another's"


def test_a_lock_that_is_never_let_go_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.2)
    with hold_lock(tmp_path / "lock"):
        with (
            pytest.raises(UserError, match=r"lock is held by process .* remove it"),
            hold_lock(tmp_path / "lock"),
        ):
            pass
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), hold_lock(tmp_path / "file" / "lock"):
        pass
