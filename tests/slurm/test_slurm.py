"""Stages, job arrays and training as jobs of a real SLURM: what ends, what is redone."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import HOME, job_field, slurm_command, wait_for
from slide_work import work, work_or_die

from common.console import Meter
from pipeline.__main__ import main
from pipeline.dataset import Dataset, Entry
from pipeline.run import cluster, drain, workers
from pipeline.run.cluster import ClusterConfig
from pipeline.run.drain import run_tasks
from pipeline.run.give_up import MAX_WORKER_DEATHS
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig

pytestmark = pytest.mark.slurm

SLIDES = HOME / "tests" / "data" / "slides"


def return_within(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """How long a worker that died is waited for."""
    for module in (drain, workers):
        monkeypatch.setattr(module, "RETURNS_WITHIN_S", seconds)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs here last seconds, not hours."""
    monkeypatch.setattr(cluster, "_QUERY_QUEUE_EVERY_S", 3.0)
    return_within(monkeypatch, 25.0)


def small_jobs(tmp_path: Path, **more: object) -> ClusterConfig:
    values = {"memory": "2GB", "max_jobs": 1, "log_dir": str(tmp_path / "logs"), **more}
    return ClusterConfig(**values)  # type: ignore[arg-type]


def run_on(
    config: ClusterConfig, function: object, names: list[str], folder: Path, seconds: float
) -> dict[str, Entry]:
    """Each slide's entry; what was begun and ended stands in the folder."""
    folder.mkdir()
    tasks = [SlideTask(name, "f", (name, str(folder), seconds)) for name in names]
    entries: dict[str, Entry] = {}

    def take(rows: list[Entry]) -> None:
        entries.update({row.slide_id: row for row in rows})

    run_tasks(function, tasks, EngineConfig(cluster=config), take,  # type: ignore[arg-type]
              Meter("test", len(tasks), "slides"))  # fmt: skip
    return entries


def lines(folder: Path, name: str) -> list[tuple[str, str]]:
    """(begin or end, job) of a slide, in order."""
    text = (folder / f"{name}.log").read_text()
    return [(line.split()[0], line.split()[1]) for line in text.splitlines()]


def test_a_walltime_costs_the_slide_in_progress_alone(slurm: Path, tmp_path: Path) -> None:
    names = [f"s{i}" for i in range(4)]
    folder = tmp_path / "work"
    # A worker lives 27 s of its 30: enough for one to three slides of 8 s, never for four.
    entries = run_on(small_jobs(tmp_path, walltime="00:00:30"), work, names, folder, 8.0)
    assert [entries[name].outcome for name in names] == ["done"] * 4
    jobs = {job for name in names for _, job in lines(folder, name)}
    assert len(jobs) > 1, "the walltime came"
    redone = sum([what for what, _ in lines(folder, name)].count("begin") - 1 for name in names)
    assert redone <= len(jobs) - 1, "a job's end costs at most the slide that was in it"
    wait_for(lambda: not slurm_command("squeue", "--noheader"), "the jobs to be given back")


def test_a_cancelled_job_is_replaced_and_its_slide_not_charged(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here no worker comes back: how long one is waited for is the test's time.
    return_within(monkeypatch, 5.0)
    names, folder = ["s0", "s1", "s2"], tmp_path / "work"
    cancelled: list[str] = []

    def cancel() -> None:
        for _ in range(MAX_WORKER_DEATHS):
            known = set(cancelled)

            def begun(known: set[str] = known) -> bool:
                logs = [lines(folder, p.stem) for p in folder.glob("*.log")]
                return any(one[-1][0] == "begin" and one[-1][1] not in known for one in logs)

            wait_for(begun, "a slide to begin in another job")
            running = slurm_command("squeue", "--noheader", "--format=%i", "--states=RUNNING")
            for job in set(running.split()) - known:
                cancelled.append(job)
                slurm_command("scancel", job)

    thread = threading.Thread(target=cancel)
    thread.start()
    entries = run_on(small_jobs(tmp_path), work, names, folder, 6.0)
    thread.join()
    assert [entries[name].outcome for name in names] == ["done"] * 3
    assert len(cancelled) >= MAX_WORKER_DEATHS
    ends = [what for name in names for what, _ in lines(folder, name)].count("end")
    assert ends == 3, "no slide is done twice"


def test_a_slide_that_kills_its_worker_is_failed_and_the_rest_goes_on(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its worker always comes back, but late where the machine is loaded.
    return_within(monkeypatch, 120.0)
    names, folder = ["s0", "killer", "s1"], tmp_path / "work"
    entries = run_on(small_jobs(tmp_path, max_jobs=2), work_or_die, names, folder, 1.0)
    assert {name: entries[name].outcome for name in names} == {
        "s0": "done", "killer": "failed", "s1": "done",
    }  # fmt: skip
    assert "killed its worker 3 times" in entries["killer"].reason
    assert [what for what, _ in lines(folder, "killer")] == ["begin"] * 3


def test_tile_and_cache_as_jobs_equal_a_local_run(slurm: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"memory: 3GB\nmax_jobs: 2\nlog_dir: {tmp_path / 'logs'}\n"
        "stages:\n  cache: {cores: 2, max_jobs: 1}\n"
    )
    roots = {"local": tmp_path / "local", "slurm": tmp_path / "slurm"}
    where = {"local": ["--workers", "1"], "slurm": ["--cluster", str(file)]}
    encoder = ["--encoder", "dinov2-b", "--weights", "random:0", "--device", "cpu"]
    for kind, root in roots.items():
        for stage in (
            ["scan", str(SLIDES), *where[kind]],
            ["tissue", *where[kind]],
            ["select", "--name", "few", "--tiles", "8"],
            ["tile", "--selection", "few", *where[kind]],
            ["cache", "--selection", "few", "--tokens", "none", *encoder, *where[kind]],
        ):
            assert main([stage[0], "--dataset", str(root), *stage[1:]]) == 0
    assert_same_dataset(roots["local"], roots["slurm"])


def assert_same_dataset(one: Path, other: Path) -> None:
    made = [p.relative_to(one) for p in sorted(one.rglob("*")) if p.is_file()]
    made = [str(path) for path in made if path.parts[0] != "status"]
    assert any(name.endswith(".tar") for name in made)
    assert filecmp.cmpfiles(one, other, made, shallow=False)[0] == made


def test_the_doctor_sees_both_nodes(slurm: Path, tmp_path: Path) -> None:
    command = ["-m", "pipeline", "doctor", "--dataset", str(tmp_path / "d"), "--size", "8"]
    said = slurm_command(
        "srun", "--nodes=2", "--ntasks-per-node=1", "--time=5", sys.executable, *command
    )
    assert said.count("other nodes: 2 tasks see each other's files") == 2
    assert said.count("SLURM: slurm-wlm") == 2


def test_job_arrays_at_once_equal_a_local_run(slurm: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for i in range(4):
        shutil.copy(next(SLIDES.glob("*.svs")), slides / f"slide-{i}.svs")
    script = tmp_path / "tile.sbatch"
    script.write_text(printed("tile"))
    local, array = tmp_path / "local", tmp_path / "array"

    def send(stage: str, elements: str) -> None:
        variables = {"STAGE": stage, "DATASET": str(array), "SLIDES": str(slides),
                     "PYTHON": sys.executable, "SELECTION": "all"}  # fmt: skip
        sent = subprocess.run(
            ["sbatch", "--parsable", "--wait", f"--array={elements}", "--cpus-per-task=1",
             "--time=10", str(script)],
            cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True,
            timeout=400,
        )  # fmt: skip
        logs = "".join(path.read_text() for path in tmp_path.glob("histogen-tile-*.log"))
        assert sent.returncode == 0, sent.stderr + logs

    send("scan", "0-3")
    send("table", "0")
    send("tissue", "0-3")
    assert main(["select", "--dataset", str(array), "--name", "all"]) == 0
    send("tile", "0-3")
    for stage in (["scan", str(slides)], ["tissue"], ["select", "--name", "all"],
                  ["tile", "--selection", "all"]):  # fmt: skip
        options = ["--workers", "1"] if stage[0] != "select" else []
        assert main([stage[0], "--dataset", str(local), *stage[1:], *options]) == 0
    assert_same_dataset(local, array)


def printed(name: str) -> str:
    """A batch script as the command prints it."""
    command = [sys.executable, "-m", "pipeline", "batch", name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_training_is_put_back_after_a_warning_and_a_preemption(slurm: Path, tmp_path: Path) -> None:
    dataset = tiny_features(tmp_path / "dataset")
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [
        "data.selection=few", "run.steps=30", "log.every=1", "log.samples_every=0",
        "log.tensorboard=false", "run.device=cpu",
        "checkpoint.every=1000",
    ]  # fmt: skip
    train = [sys.executable, "-m", "train", "--config", "tiny", f"data.dataset={dataset.root}"]
    subprocess.run([*train, f"run.dir={whole}", *options], check=True, timeout=900)

    script = tmp_path / "train.sbatch"
    script.write_text(printed("train"))
    variables = {
        "CONFIG": "tiny", "DATASET": str(dataset.root), "RUN": str(run), "NPROC": "1",
        "PYTHON": sys.executable, "ARGS": " ".join(options), "HEAD_ADDRESS": "127.0.0.1",
    }  # fmt: skip
    job = subprocess.run(
        ["sbatch", "--parsable", "--gres=none", "--cpus-per-task=2", "--mem=2G", "--time=30",
         str(script)],
        cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    log = tmp_path / f"histogen-train-{job}.log"

    wait_for(lambda: steps(run) >= 3, "three steps", 400)
    slurm_command("scancel", "--batch", "--signal=USR1", job)
    goes_back(job, 1)
    warned_at = steps(run)
    wait_for(lambda: goes_on(job) and steps(run) >= warned_at + 3, "training to go on", 400)
    preempt(job)
    goes_back(job, 2)
    wait_for(lambda: job_field(job, "JobState") == "COMPLETED", "the end of training", 900)

    assert same_bytes(whole, run), log.read_text()[-2000:]
    assert (run / "model" / "config.json").exists(), "the finished run is exported"
    done = [row["step"] for row in rows(run) if "sit/denoise" in row]
    assert sorted(done) == sorted(set(done)), "no step was done twice: each warning saved the state"


def preempt(job: str) -> None:
    """An urgent job that wants all nodes, waited for until it runs."""
    urgent = slurm_command(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--cpus-per-task=2",
        "--ntasks-per-node=1", "--output=/dev/null", "--wrap=sleep 3",
    ).strip()  # fmt: skip
    wait_for(lambda: job_field(urgent, "JobState") == "COMPLETED", f"{job} to make room", 200)


def goes_back(job: str, times: int) -> None:
    """Wait until the job was put back so often, and let it start soon: SLURM waits 2 minutes.

    Not at once: within the second of its requeue a node refuses it ("Job credential revoked").
    """

    def is_back() -> bool:
        state = job_field(job, "JobState")
        assert state not in ("FAILED", "COMPLETED", "CANCELLED"), f"job {job} has {state}"
        return int(job_field(job, "Restarts")) == times and state == "PENDING"

    wait_for(is_back, f"job {job} to go back into the queue", 200)
    slurm_command("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")


def goes_on(job: str) -> bool:
    """Whether the job has not ended; one that failed would otherwise be waited for."""
    state = job_field(job, "JobState")
    assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"job {job} has {state}"
    return True


def test_a_preempted_job_goes_back_and_a_cancelled_one_does_not(
    slurm: Path, tmp_path: Path
) -> None:
    """The script for training around a program that stops as torchrun does: with status 1."""
    program, script = tmp_path / "program", tmp_path / "train.sbatch"
    program.write_text(
        f"#!/bin/bash\ntrap 'exit 1' TERM\ntouch {tmp_path}/begun-$SLURM_RESTART_COUNT\n"
        "for _ in {1..600}; do sleep 0.2; done\n"
    )
    program.chmod(0o755)
    script.write_text(printed("train"))
    variables = {"CONFIG": "tiny", "RUN": str(tmp_path), "PYTHON": str(program), "NPROC": "1"}
    job = subprocess.run(
        ["sbatch", "--parsable", "--gres=none", "--cpus-per-task=2", "--mem=1G", "--time=10",
         str(script)],
        cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    wait_for((tmp_path / "begun-").exists, "the job to run")
    preempt(job)
    goes_back(job, 1)
    wait_for((tmp_path / "begun-1").exists, "the job to run again")
    slurm_command("scancel", job)
    wait_for(lambda: not slurm_command("squeue", "--noheader", f"--jobs={job}"), "its end")
    assert (job_field(job, "JobState"), job_field(job, "Restarts")) == ("CANCELLED", "1")


def tiny_features(root: Path) -> Dataset:
    """The committed slide's tiles and features, for the tiny preset."""
    for stage in (
        ["scan", str(SLIDES), "--workers", "1"],
        ["tissue", "--workers", "1"],
        ["select", "--name", "few", "--tiles", "16"],
        ["tile", "--selection", "few", "--workers", "1"],
        ["cache", "--selection", "few", "--encoder", "efficientnet-lite0", "--weights", "package",
         "--tokens", "float16", "--device", "cpu"],
    ):  # fmt: skip
        assert main([stage[0], "--dataset", str(root), *stage[1:]]) == 0
    return Dataset(root)


def rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(run: Path) -> int:
    return max((int(row["step"]) for row in rows(run)), default=0)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether the last checkpoints hold the same networks and averages."""
    from train.checkpoint import latest_checkpoint

    a, b = latest_checkpoint(one), latest_checkpoint(other)
    assert a is not None
    assert b is not None
    assert a.name == b.name
    names = [path.name for path in a.glob("*.safetensors")]
    assert len(names) > 4
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names
