"""A power loss at any moment: what counts is on disk by then, with the modes the umask gives."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from modes import other_modes
from power_loss import SHIM, final_losses, journalled_losses

SLIDE = Path(__file__).resolve().parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"

_WRITERS = """
import sys
from pathlib import Path
from common.files import append_text, replacing_path, write_json
from pipeline.dataset import Dataset, Entry, Run, claim_identity, commit_bytes
from pipeline.dataset.tiles.zarr_shard import commit_zarr
dataset, out = Dataset(Path(sys.argv[1])), Path(sys.argv[2])
# Folders that somebody made, as `mkdir -p` does, without syncing their names.
dataset.root.parent.mkdir(parents=True)
claim_identity(dataset, {"mpp": 0.5}, stage="tile", versions={})
with Run(dataset, "tile", {}) as run:
    run.log_begun("s", "w")
    for number in range(2):
        path = dataset.tiles_dir(224) / f"s.{number}-{number + 1}.zarr"
        files = commit_zarr(dataset, run.run_id, path, 224, [b"chunk"])
        more = commit_bytes(dataset, run.run_id, dataset.root / "tissue" / f"{number}.png", b"m")
        run.append([Entry("s", "done", "f", start=number, stop=number + 1, files=(*files, more))])
write_json(out / "a" / "b" / "results.json", {})
append_text(out / "a" / "b" / "skipped.jsonl", "{}")
with replacing_path(out / "model" / "sit.safetensors") as path:
    path.unlink()  # as libraries do that write a file of their own and rename it
    path.write_bytes(b"weights")
"""


class Machine:
    """A folder whose files are watched; commands run in it."""

    umask = 0o022

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.root, self.log = folder / "disk", folder / "log.tsv"
        self.root.mkdir()
        # As a group's folder is: files and folders in it have its group.
        self.root.chmod(0o2775)
        self.environment = variables | {
            "POWER_LOSS_ROOT": str(self.root), "POWER_LOSS_LOG": str(self.log),
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip

    def run(self, *arguments: object) -> None:
        """`python ARGUMENTS` in the folder; fails where the command does."""
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True,
            check=False, umask=self.umask,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def machine(
    tmp_path: Path,
    preload_shim: Callable[[str], dict[str, str]],
    clean_environment: dict[str, str],
) -> Machine:
    return Machine(tmp_path, clean_environment | preload_shim(SHIM))


def test_writers_sync_bytes_names_and_folders(machine: Machine) -> None:
    root = machine.root
    machine.run("-c", _WRITERS, root / "deep" / "er" / "ds", root / "out")
    named, losses = journalled_losses(root, machine.log, root / "deep" / "er" / "ds")
    assert (named, losses) == (10, [])
    assert final_losses(root, machine.log, root) == []


def test_the_model_sees_what_is_not_synced(machine: Machine) -> None:
    """An oracle that finds nothing anywhere would be no oracle."""
    script = """
import os
from pathlib import Path
Path("bare").write_bytes(b"1")
with open("written", "wb") as file:
    file.write(b"1"); file.flush(); os.fsync(file.fileno())
Path("folder").mkdir()
with open("folder/file", "wb") as file:
    file.write(b"1"); file.flush(); os.fsync(file.fileno())
os.fsync(os.open("folder", os.O_RDONLY))
"""
    machine.run("-c", script)
    root = machine.root
    assert final_losses(root, machine.log, root) == [
        f"the name {root / name} is lost" for name in ("bare", "folder", "written")
    ]
    machine.run("-c", "import os; os.fsync(os.open('.', os.O_RDONLY))")
    assert final_losses(root, machine.log, root) == [f"{root / 'bare'} is empty or cut short"]


@pytest.mark.full  # all commands from a slide to a report
@pytest.mark.parametrize(("layout", "umask"), [("png", 0o077), ("zarr", 0o002), ("png", 0o022)])
def test_what_journals_name_survives_the_stages(machine: Machine, layout: str, umask: int) -> None:
    root, dataset = machine.root, machine.root / "new" / "ds"
    machine.umask = umask
    slides = root.parent / "slides"
    slides.mkdir()
    shutil.copy(SLIDE, slides)
    machine.run("-m", "pipeline", "scan", slides, "--dataset", dataset)
    machine.run("-m", "pipeline", "tissue", "--dataset", dataset, "--workers", 2)
    machine.run("-m", "pipeline", "select", "--dataset", dataset, "--name", "a", "--tiles", 16)
    machine.run("-m", "pipeline", "tile", "--dataset", dataset, "--selection", "a",
                "--format", layout, "--workers", 1)  # fmt: skip
    machine.run("-m", "pipeline", "report", "--dataset", dataset)
    machine.run("-m", "pipeline", "geojson", "--dataset", dataset, "--out", root / "gj" / "x")
    machine.run("-m", "pipeline", "verify", "--dataset", dataset)
    named, losses = journalled_losses(root, machine.log, dataset)
    assert named >= 18
    assert losses == []
    assert final_losses(root, machine.log, root / "new") == []
    assert final_losses(root, machine.log, root / "gj") == []
    assert other_modes(root / "new", umask) == other_modes(root / "gj", umask) == []


@pytest.mark.full  # an encoder's features on the CPU, a training, a generation
@pytest.mark.timeout(1800)
def test_training_and_evaluation_survive(machine: Machine) -> None:
    machine.umask = 0o002
    root, dataset, synthetic = machine.root, machine.root / "ds", machine.root / "synthetic"
    run, model, results = root / "runs" / "r", root / "models" / "m", root / "results" / "r.json"
    slides = root.parent / "slides"
    slides.mkdir()
    shutil.copy(SLIDE, slides)
    cache = ("cache", "--encoder", "h0-mini", "--weights", "random:0", "--workers", 1)
    stages: list[tuple[object, ...]] = [
        ("scan", slides), ("tissue",), ("select", "--name", "a", "--tiles", 16),
        ("tile", "--selection", "a"), (*cache, "--selection", "a"),
    ]  # fmt: skip
    for stage in stages:
        machine.run("-m", "pipeline", *stage, "--dataset", dataset)
    machine.run("-m", "train", "--config", "tiny", "data.encoder=h0-mini",
                f"data.dataset={dataset}", f"run.dir={run}",
                "data.selection=a", "run.steps=2")  # fmt: skip
    machine.run("-m", "train", "export", run, model)
    machine.run("-m", "evaluate", "generate", "--model", model, "--guidance", dataset,
                "--selection", "a", "--limit", 16, "--steps", 1, "--out", synthetic)  # fmt: skip
    machine.run("-m", "pipeline", *cache, "--tokens", "none", "--dataset", synthetic)
    machine.run("-m", "evaluate", "measure", "--real", dataset, "--real-selection", "a",
                "--generated", synthetic, "--encoder", "h0-mini", "--out", results)  # fmt: skip
    machine.run("-m", "evaluate", "report", "--results", results, "--run", run, "--dataset",
                dataset, "--generated", synthetic, "--out", root / "out" / "report.html",
                "--picture", root / "out" / "picture.png")  # fmt: skip
    for folder in (dataset, synthetic):
        assert journalled_losses(root, machine.log, folder)[1] == []
    # A message to others, and curves whose values are in metrics.jsonl as well.
    excepted = (str(run / ".lock"), str(run / "tensorboard"))
    lost = final_losses(root, machine.log, root)
    assert [why for why in lost if not any(path in why for path in excepted)] == []
    assert other_modes(root, 0o002) == []
