"""Cluster files, job arrays and the printed batch scripts, without a batch system."""

import filecmp
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import batch
from pipeline.__main__ import main
from pipeline.commands.batch import SCRIPTS
from pipeline.run import cluster
from pipeline.run.cluster import (
    ClusterConfig,
    JobWatch,
    cluster_options,
    load_cluster,
    parse_walltime,
)
from pipeline.run.workers import EngineConfig

BATCH = Path(batch.__file__).parent
SLIDE = Path(__file__).resolve().parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("04:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
    ],
)
def test_walltimes_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert parse_walltime(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1:2:3:4", "1-", "a:b", "1-1:1:1:1", "00:00:00"])
def test_other_walltimes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="walltime"):
        parse_walltime(text)


def test_a_worker_leaves_before_its_walltime() -> None:
    assert ClusterConfig(walltime="04:00:00").lifetime_s == 14400 - 300
    assert ClusterConfig(walltime="10").lifetime_s == 540


def test_a_stages_own_keys_come_over_the_files(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "queue: cpu\nmax_jobs: 50\n"
        "stages:\n  cache: {queue: gpu, cores: 16, directives: ['--gres=gpu:1']}\n"
    )
    assert load_cluster(path, "tile") == ClusterConfig(queue="cpu", max_jobs=50)
    own = ClusterConfig(queue="gpu", max_jobs=50, cores=16, directives=("--gres=gpu:1",))
    assert load_cluster(path, "cache") == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quue: cpu", "unknown configuration key 'quue': did you mean 'queue'"),
        ("walltime: 3600", "'walltime': expected text, got '3600'"),
        ("cores: '4'", "'cores': expected a whole number, got '4'"),
        ("directives: --gres=gpu:1", "'directives': expected a list"),
        ("tls: 1", "expected true or false"),
        ("cores: 3\nworkers: 2", "a multiple of workers"),
        ("workers: 0", "workers is 0, expected at least 1"),
        ("system: slurn", "system is 'slurn', expected slurm"),
        ("system: pbs", "system is 'pbs', expected slurm; .*--array.*--scheduler"),
        ("min_jobs: 20", "min_jobs is 20"),
        ("- a\n- b", "expected keys and values"),
        ("stages: [tile]", "expected 'stages:"),
        ("a: [", "not YAML"),
        ('queue: "cpu\\ncurl x | sh"', "queue is .*expected one word"),
        ("account: lab --wrap=id", "account is .*expected one word"),
        ("local_dir: /tmp/$(id)", "local_dir is .*expected a folder"),
        ('directives: ["--gres=gpu:1\\nid"]', "expected one line"),
    ],
)
def test_a_wrong_cluster_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"(?s)cluster.yaml.*{message}") as caught:
        load_cluster(path, "tile")
    assert "\n" not in str(caught.value)


def test_the_job_script_has_what_the_file_says(tmp_path: Path) -> None:
    from dask_jobqueue.slurm import SLURMJob

    config = ClusterConfig(
        queue="gpu", account="lab", cores=16, memory="64GB", walltime="1-00:00:00",
        directives=("--gres=gpu:1",), prologue=("module load cuda",), log_dir=str(tmp_path / "l"),
        tls=False,
    )  # fmt: skip
    options = cluster_options(config, EngineConfig(cluster=config, threads=16).job_environment())
    for key in ("scheduler_options", "silence_logs"):
        del options[key]
    script = SLURMJob("tcp://127.0.0.1:1", name="w", **options).job_script()
    for line in (
        "#SBATCH -p gpu", "#SBATCH -A lab", "#SBATCH --cpus-per-task=16", "#SBATCH -t 1-00:00:00",
        "#SBATCH --gres=gpu:1", "module load cuda", "export OMP_NUM_THREADS=16",
        "export MALLOC_TRIM_THRESHOLD_=65536",
    ):  # fmt: skip
        assert line in script.splitlines()
    assert "--lifetime 86100s" in script
    assert "--no-dashboard" in script
    assert 'mktemp -d -p "${TMPDIR:-/tmp}"' in script, "no folder that others can take first"


def test_values_with_blanks_and_quotes_are_words_of_the_job_script(tmp_path: Path) -> None:
    from dask_jobqueue.slurm import SLURMJob

    config = ClusterConfig(local_dir="/a b/$USER", log_dir=str(tmp_path / "l"), tls=False)
    options = cluster_options(config, {"HF_HOME": "/data/my models; id"})
    for key in ("scheduler_options", "silence_logs"):
        del options[key]
    script = SLURMJob("tcp://127.0.0.1:1", name="w", **options).job_script()
    assert 'mkdir -p "/a b/$USER"' in script.splitlines()
    assert "export HF_HOME='/data/my models; id'" in script.splitlines()
    with pytest.raises(UserError, match="log_dir"):
        cluster_options(ClusterConfig(log_dir=str(tmp_path / "a b")), {})


def test_jobs_whose_workers_are_gone_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now)
    watch = JobWatch(ClusterConfig())
    jobs = {"a": {"a-0", "a-1"}, "b": {"b"}, "c": {"c"}}
    assert watch.find_lost(jobs, {"a-0", "b"}) == []
    now += 59
    assert watch.find_lost(jobs, {"a-1"}) == []
    now += 2
    assert watch.find_lost(jobs, set()) == ["b"], "c was never there: it waits in the queue"
    now += 61
    assert watch.find_lost(jobs, set()) == ["a"]


def test_jobs_that_never_bear_a_worker_stop_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 11\necho 99\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    watch = JobWatch(ClusterConfig())
    assert watch.find_ended({"a": "11"}) == []
    watch.check()
    assert watch.find_ended({"a": "11", "b": "12", "c": "13", "d": "14"}) == ["b", "c", "d"]
    with pytest.raises(UserError, match="3 jobs ended before their worker answered"):
        watch.check()


def test_no_job_is_given_up_where_squeue_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert JobWatch(ClusterConfig()).find_ended({"a": "11"}) == []


def test_parts_of_an_array_are_disjoint_and_whole() -> None:
    names = [f"TCGA-{i:04d}" for i in range(2000)]
    parts = [[n for n in names if EngineConfig(array=(i, 7)).includes_slide(n)] for i in range(7)]
    assert sorted(name for part in parts for name in part) == names
    # 2,000 / 7 = 286; a fair draw has a standard deviation of 16.
    assert all(220 < len(part) < 350 for part in parts)


@pytest.mark.full
def test_an_array_leaves_what_one_run_leaves(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    names = ["slide-1", "slide-2", "slide-3"]
    for name in names:
        shutil.copy(SLIDE, slides / f"{name}.svs")
    assert [EngineConfig(array=(0, 2)).includes_slide(name) for name in names] == [
        True,
        True,
        False,
    ]
    one, many = tmp_path / "one", tmp_path / "many"

    def run(root: Path, stage: str, *options: str) -> None:
        assert main([stage, "--dataset", str(root), "--workers", "1", *options]) == 0

    run(one, "scan", str(slides))
    run(one, "tissue")
    for element in ("0/2", "1/2"):
        run(many, "scan", str(slides), "--array", element)
    assert not (many / "slides.parquet").exists()
    run(many, "scan", str(slides))
    for element in ("1/2", "0/2"):
        run(many, "tissue", "--array", element)
    made = [p.relative_to(one) for p in sorted(one.rglob("*")) if p.is_file()]
    made = [str(path) for path in made if path.parts[0] != "status"]
    assert len(made) > 9
    assert filecmp.cmpfiles(one, many, made, shallow=False)[0] == made


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_a_wrong_array_element_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="I from 0 to N - 1"):
        main(["tissue", "--dataset", str(tmp_path), f"--array={text}"])


def test_cluster_and_scheduler_exclude_each_other() -> None:
    with pytest.raises(UserError, match="not allowed with"):
        main(["tile", "--dataset", "d", "--scheduler", "tcp://a:1", "--workers", "2"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_scripts_take_a_cluster_files_keys(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "account: lab\nqueue: cpu\ncores: 2\nprologue: ['module load cuda']\nstages:\n"
        f"  {name}: {{memory: 64GB, walltime: '1-00:00:00', directives: ['--gres=gpu:4']}}\n"
    )
    assert main(["batch", name, "--cluster", str(path)]) == 0
    script = capsys.readouterr().out
    said = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for line in ("--account=lab", "--mem=64G", "--time=1-00:00:00", "--gres=gpu:4"):
        assert said.count(f"#SBATCH {line}") == 1
    assert sum(line.split("=")[0].endswith("--time") for line in said) == 1
    assert sum("--gres" in line for line in said) == 1
    # What tiling wants of a job is not what training wants.
    assert ("#SBATCH --partition=cpu" in said) == (name == "tile")
    assert ("#SBATCH --cpus-per-task=2" in said) == (name == "tile")
    lines = script.splitlines()
    assert lines.index("module load cuda") > lines.index(said[-1])
    assert lines.index("module load cuda") < lines.index("set -euo pipefail")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("asked", ["--gpus-per-node=4", "--gpus=8", "-G 8"])
def test_gpus_asked_for_in_another_way_replace_the_scripts_own(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM obeys both, which no node can."""
    path = tmp_path / "cluster.yaml"
    path.write_text(f"stages:\n  train: {{directives: ['{asked}']}}\n")
    assert main(["batch", "train", "--cluster", str(path)]) == 0
    script = capsys.readouterr().out
    assert f"#SBATCH {asked}" in script
    assert "--gres" not in script


def calls_of(tmp_path: Path, script: str, **variables: str) -> list[str]:
    """What a batch script calls, a line each: run by bash, around a program that only notes it."""
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    tools = {"python": f'#!/bin/sh\necho "$*" >> {calls}\n', "srun": '#!/bin/sh\nexec "$@"\n'}
    for tool, text in tools.items():
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "HEAD_ADDRESS": "here",
        "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here",
        "CONFIG": "tiny", "REAL": "r", "GENERATED": "g", "MODEL": "m", "GUIDANCE": "r", "OUT": "o",
    }  # fmt: skip
    subprocess.run(
        ["bash", "-s"], input=script, text=True, check=True, env=environment | variables,
        cwd=tmp_path, timeout=60,
    )  # fmt: skip
    return calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "say", "computing"),
    [
        ("cache", {"ARGS": "--device cpu"}, "-m pipeline cache"),
        ("evaluate", {"DEVICE": "cpu"}, "-m pipeline cache"),
        ("generate", {"ARGS": "--device cpu"}, "evaluate generate"),
        ("train", {"ARGS": "run.device=cpu"}, "train --config"),
    ],
)
def test_jobs_that_ask_for_a_gpu_compute_on_it_unless_told_otherwise(
    name: str, say: dict[str, str], computing: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["batch", name]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gres=gpu:" in script

    def devices(**variables: str) -> list[str]:
        calls = [c for c in calls_of(tmp_path, script, **variables) if computing in c]
        # The last one counts, for argparse as for overrides.
        return [re.findall(r"(?:--device |run\.device=)(\w+)", call)[-1] for call in calls]

    often = 2 if name == "evaluate" else 1
    assert devices() == ["cuda"] * often
    assert devices(**say) == ["cpu"] * often


@pytest.mark.parametrize("name", ["train", "generate"])
def test_processes_of_one_node_are_not_started_by_torchrun(name: str, tmp_path: Path) -> None:
    """It listens on all networks, and unpickles what it is sent; several nodes need it."""
    script = (BATCH / f"{name}.sbatch").read_text()
    starts = f"-m common.launch 4 {'train --config' if name == 'train' else 'evaluate generate'}"
    calls = calls_of(tmp_path, script, NPROC="4")
    assert sum(starts in call for call in calls) == 1, calls
    assert not any("torch.distributed" in call for call in calls)
    if name == "train":
        calls = calls_of(tmp_path, script, NPROC="4", SLURM_JOB_NUM_NODES="2")
        assert any("torch.distributed.run --nnodes=2" in call for call in calls), calls


@pytest.mark.parametrize("name", ["tile", "cache"])
def test_a_part_of_an_array_can_be_sent_again_by_itself(name: str, tmp_path: Path) -> None:
    """What SLURM says to the only element of --array=37."""
    script = (BATCH / f"{name}.sbatch").read_text()
    alone = {"SLURM_ARRAY_TASK_ID": "37", "SLURM_ARRAY_TASK_COUNT": "1", "PARTS": "64"}
    (call,) = calls_of(tmp_path, script, STAGE="tissue", **alone)
    assert "--array 37/64" in call


def test_only_failed_starts_in_a_row_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that came and went between two looks was there all the same."""
    alive: set[str] = set()
    monkeypatch.setattr(cluster, "query_alive_jobs", lambda ids: alive & ids)
    came: set[str] = set()
    watch = JobWatch(ClusterConfig(), lambda: came)
    for number in range(6):
        came = {"a"} if number % 3 == 2 else set()
        watch.find_lost({"a": {"a"}}, set())
        assert watch.find_ended({"a": str(number)}) == ["a"]
        watch.check()
    came = set()
    watch.find_ended({"a": "7"})
    watch.find_ended({"a": "8"})
    watch.find_ended({"a": "9"})
    with pytest.raises(UserError, match="3 jobs ended before their worker answered"):
        watch.check()


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_scripts_are_bash(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", name]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/usr/bin/env bash\n")
    assert f"#SBATCH --job-name=histogen-{name}\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
