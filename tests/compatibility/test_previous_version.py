"""What the previous version has made, this version reads, resumes and extends, byte for byte.

The state is made by the code of commit 321909e: two datasets of the committed slide, with PNG and
Zarr shards, a training run that goes on, an exported model, generated images and their results.
Copies of it are then continued by that code and by this code, at the same path one after the
other, since files hold paths. Afterwards every file is the same, and so is what the journals say.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREVIOUS = "321909ea6ea6232b8009d4cef0b607f27006697d"
RUNNER = Path(__file__).with_name("run_commands.py")
SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"

SMALL_MODEL = """
run: {device: cpu}
data: {tile_px: 224, encoder: h0-mini, selection: train, batch_size: 2, cursors: 2, threads: 1}
model:
  sit: {latent_size: 28, hidden_size: 32, depth: 2, num_heads: 2, encoder_depth: 1, projector_dim: 24}
  vae: {base_channels: 4, channel_multipliers: [1, 1, 2, 2], num_res_blocks: 1, norm_groups: 2}
  discriminator: {base_channels: 4}
loss: {perceptual_weights: none}
ema: {sit: 0.9, vae: 0.8}
log: {every: 1, tensorboard: false, samples_every: 2, samples: 2, sample_steps: 2, fixed_tiles: 2}
checkpoint: {every: 1, keep: 2}
export: {sit: ema, vae: ema}
"""

Command = list[str]


def stage(name: str, dataset: str, *arguments: str) -> Command:
    return ["pipeline", name, "--dataset", dataset, *arguments]


def first_stages(dataset: str, *tile: str) -> list[Command]:
    return [
        stage("scan", dataset, "slides", "--workers", "1"),
        stage("tissue", dataset, "--workers", "1"),
        stage("select", dataset, "--name", "train", "--tiles", "12"),
        stage("tile", dataset, "--selection", "train", "--workers", "1", *tile),
    ]


def features(dataset: str, *arguments: str) -> Command:
    encoder = ("--encoder", "h0-mini", "--weights", "random:0", "--workers", "1")
    return stage("cache", dataset, *encoder, "--device", "cpu", *arguments)


def model_commands(steps: int, images: int, selection: str) -> list[Command]:
    """Train to a step, export, generate so many images, measure and report."""
    model, synthetic, results = f"model-{steps}", "synthetic", f"results-{images}.json"
    return [
        ["train", "--config", "small.yaml", "data.dataset=dataset", "run.dir=run",
         f"run.steps={steps}"],
        ["train", "export", "run", model],
        ["evaluate", "generate", "--model", "model-2", "--guidance", "dataset",
         "--selection", "train", "--limit", str(images // 2), "--variations", "2", "--steps", "2", "--batch", "2",
         "--out", synthetic, "--device", "cpu"],
        features(synthetic, "--tokens", "none"),
        ["evaluate", "measure", "--real", "dataset", "--real-selection", selection,
         "--generated", synthetic, "--encoder", "h0-mini", "--out", results],
        ["evaluate", "report", "--results", results, "--run", "run", "--dataset", "dataset",
         "--generated", synthetic, "--out", f"report-{images}.html"],
    ]  # fmt: skip


BUILD = [
    *first_stages("dataset"),
    features("dataset", "--selection", "train"),
    *first_stages("zarr", "--format", "zarr"),
    *model_commands(steps=2, images=16, selection="train"),
]
EXTEND = [
    *(
        command
        for dataset, form in (("dataset", "png"), ("zarr", "zarr"))
        for command in (
            stage("select", dataset, "--name", "more", "--tiles", "30"),
            stage("tile", dataset, "--workers", "1", "--format", form),
        )
    ),
    features("dataset"),
    *model_commands(steps=4, images=24, selection="more"),
    stage("prune", "zarr", "--keep-selection", "train", "--yes"),
    stage("verify", "zarr"),
    stage("verify", "dataset"),
    stage("report", "dataset"),
]


@dataclass(frozen=True)
class Result:
    """What one command line did."""

    command: Command
    status: int
    output: str
    seconds: float


def run_commands(tree: Path, folder: Path, commands: Sequence[Command]) -> list[Result]:
    """Run command lines with the code of `tree` in `folder`; all must succeed."""
    listing, report = folder.parent / "commands.json", folder.parent / "report.json"
    listing.write_text(json.dumps(commands))
    environment = {
        **os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    arguments = [sys.executable, str(RUNNER), str(tree), str(listing), str(report)]
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [Result(**result) for result in json.loads(report.read_text())]
    assert results[-1].status == 0, f"{results[-1].command}\n{results[-1].output[-3000:]}"
    assert len(results) == len(commands)
    return results


def previous_tree(folder: Path) -> Path:
    """The previous version's files, or a skip where the history does not hold them."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--format=tar", PREVIOUS], capture_output=True
    )
    if archive.returncode:
        pytest.skip(f"the git history here has no commit {PREVIOUS[:8]}")
    folder.mkdir()
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Continued:
    """The previous version's state, gone on with by one code."""

    folder: Path
    start: dict[str, str]
    rerun: dict[str, str]
    end: dict[str, str]
    rerun_results: list[Result]
    end_results: list[Result]


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Continued]:
    work = tmp_path_factory.mktemp("compatibility")
    trees = {"previous": previous_tree(work / "previous-tree"), "current": ROOT}
    state, start = work / "state", work / "start"
    (state / "slides").mkdir(parents=True)
    shutil.copy(SLIDE, state / "slides")
    (state / "small.yaml").write_text(SMALL_MODEL)
    run_commands(trees["previous"], state, BUILD)
    state.rename(start)
    outcome = {}
    for name, tree in trees.items():
        shutil.copytree(start, state)  # with the slide's modification time
        rerun_results = run_commands(tree, state, BUILD)
        rerun = digests(state)
        end_results = run_commands(tree, state, EXTEND)
        folder = state.rename(work / name)
        outcome[name] = Continued(
            folder, digests(start), rerun, digests(folder), rerun_results, end_results
        )
    return outcome
