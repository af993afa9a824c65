"""A file has what the umask says, whoever wrote it; a group's dataset stays the group's."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from modes import other_modes

from common.errors import UserError
from common.files import replacing_path, write_text
from model.weights import write_tensors
from pipeline.dataset import Dataset, Entry, Run, claim_identity, commit_bytes
from pipeline.dataset.tiles.zarr_shard import commit_zarr

UMASKS = [0o077, 0o002, 0o022]


@pytest.fixture(params=UMASKS, ids=[f"{umask:03o}" for umask in UMASKS])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_writers_leave_modes_to_the_umask(tmp_path: Path, umask: int) -> None:
    dataset = Dataset(tmp_path / "new" / "ds")
    claim_identity(dataset, {"mpp": 0.5}, stage="tile", versions={})
    with Run(dataset, "tile", {}) as run:
        run.log_begun("s", "w")
        path = dataset.tiles_dir(224) / "s.0-1.zarr"
        files = commit_zarr(dataset, run.run_id, path, 224, [b"chunk"])
        mask = commit_bytes(dataset, run.run_id, dataset.mask_file("s"), b"mask")
        run.append([Entry("s", "done", "f", start=0, stop=1, files=(*files, mask))])
    write_text(tmp_path / "out" / "results.json", "{}")
    write_tensors(tmp_path / "model" / "sit.safetensors", {"weight": torch.zeros(3)})
    assert other_modes(tmp_path, umask) == []


def test_what_is_replaced_has_the_umasks_mode_too(tmp_path: Path, umask: int) -> None:
    final = tmp_path / "weights.safetensors"
    final.write_bytes(b"old")
    final.chmod(0o640)
    with replacing_path(final) as path:
        path.write_bytes(b"new")
        path.chmod(0o600)
    assert final.read_bytes() == b"new"
    assert other_modes(tmp_path, umask) == []


_MEMBER = """
import sys
from pathlib import Path
from common.files import write_text
from pipeline.dataset import Dataset, Entry, Run, claim_identity, commit_bytes
dataset, name = Dataset(Path(sys.argv[1])), sys.argv[2]
claim_identity(dataset, {name: 1}, stage="tile", versions={})
with Run(dataset, "tile", {}) as run:
    run.log_begun("s", "w")
    # Both write the same file: the second replaces the first's.
    record = commit_bytes(dataset, run.run_id, dataset.slides_file, name.encode())
    run.append([Entry(name, "done", "f", files=(record,))])
write_text(dataset.root / "report" / "index.html", name)
"""


def test_two_members_of_a_group_write_one_dataset(
    tmp_path: Path, clean_environment: dict[str, str], as_nobody: list[str]
) -> None:
    """As docs/operations.md says: a folder of the group with g+s, and umask 002."""
    root = tmp_path / "shared"
    root.mkdir()
    os.chown(root, 0, 4321)
    root.chmod(0o2775)
    for folder in [tmp_path, *tmp_path.parents]:
        # Not only up to the first open one: another session of tests may have closed the top again.
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    for user in (65534, 65533):
        member = [as_nobody[0], f"--reuid={user}", "--regid=65534", "--groups=4321", "--"]
        subprocess.run(
            [*member, sys.executable, "-c", _MEMBER, root / "ds", f"user{user}"],
            check=True, umask=0o002, env=clean_environment,
        )  # fmt: skip
    assert other_modes(root, 0o002) == []
    assert {path.stat().st_gid for path in root.rglob("*")} == {4321}
    assert stat.S_IMODE((root / "ds").stat().st_mode) == 0o2775
    assert (root / "ds" / "slides.parquet").read_text() == "user65533"


def test_weights_that_do_not_fit_leave_nothing(make_small_disk: Callable[[int], Path]) -> None:
    disk = make_small_disk(256)
    with pytest.raises(UserError, match=r"cannot write .*sit\.safetensors: No space left"):
        write_tensors(disk / "sit.safetensors", {"weight": torch.zeros(1_000_000)})
    assert list(disk.iterdir()) == []
