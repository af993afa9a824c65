"""Where `cache` computes: GPUs of workers that batch jobs start, the device of a run."""

import socket
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pytest

from common.console import Meter
from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import Dataset, Entry
from pipeline.dataset.events import read_events
from pipeline.features import device, stage
from pipeline.features.device import stage_device, worker_device
from pipeline.run.cluster import ClusterConfig
from pipeline.run.drain import run_bundles
from pipeline.run.tasks import SlideTask, UnfitWorkerError
from pipeline.run.workers import EngineConfig, count_workers

GPU_JOBS = ClusterConfig(workers=4, cores=4, directives=("--gres=gpu:4",), max_jobs=3)


def started_right() -> Any:
    """For a scheduler that somebody else started, as docs/cluster.md asks for."""
    return dask.config.set({"distributed.scheduler.allowed-failures": 0})


def fake_torch(gpus: list[str]) -> SimpleNamespace:
    """As much of torch as says which GPUs are there."""
    cuda = SimpleNamespace(
        is_available=lambda: bool(gpus),
        device_count=lambda: len(gpus),
        get_device_properties=lambda index: SimpleNamespace(uuid=gpus[index]),
    )
    return SimpleNamespace(cuda=cuda, __version__="2.0+fake")


def device_of(gpus: list[str]) -> str:
    """In a worker: the UUID of the GPU that it computes on."""
    sys.modules["torch"] = fake_torch(gpus)  # type: ignore[assignment]
    return gpus[int(worker_device("cuda").removeprefix("cuda:"))]


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch([]))
    worker_device.cache_clear()


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login node: to look for CUDA there is the mistake."""

    def asked() -> bool:
        raise AssertionError("this machine's CUDA was looked for")

    monkeypatch.setattr(device, "_has_cuda", asked)
    monkeypatch.setattr(device, "gpu_count", asked)
    monkeypatch.setattr(stage, "gpu_count", asked)


@pytest.mark.full
def test_workers_of_a_job_take_a_gpu_each_and_a_new_one_that_of_the_dead() -> None:
    """Real workers under names as dask-jobqueue gives them; of a job with one, the job's number."""
    from distributed import Client, Nanny, Scheduler, SpecCluster

    gpus = [f"GPU-{uuid.uuid4()}" for _ in range(3)]
    names = ["SLURMCluster-0-0", "SLURMCluster-0-1", "SLURMCluster-3"]
    workers = {name: {"cls": Nanny, "options": {"nthreads": 1}} for name in names}
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": ":0"}}
    with started_right(), SpecCluster(workers, scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(3, timeout=60)
        assert count_workers(EngineConfig(scheduler=cluster.scheduler_address)) == 3
        # Each process of a job may see the job's GPUs in an order of its own.
        seen = dict(zip(client.scheduler_info()["workers"], [gpus, gpus[1:] + gpus[:1], gpus],
                        strict=True))  # fmt: skip
        taken = {one: client.run(device_of, seen[one], workers=[one])[one] for one in seen}
        assert sorted(taken.values()) == sorted(gpus)
        again = {one: client.run(device_of, seen[one], workers=[one])[one] for one in seen}
        assert again == taken, "a worker keeps its GPU from bundle to bundle"
        gone = next(iter(seen))
        client.restart_workers([gone], timeout=60)
        (came,) = set(client.scheduler_info()["workers"]) - set(seen)
        assert client.run(device_of, gpus, workers=[came])[came] == taken[gone]


def test_workers_beyond_the_gpus_share_them_evenly() -> None:
    gpus = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    assert [device.claim_gpu(gpus) for _ in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("directive", "asks"),
    [
        ("--gres=gpu:4", True),
        ("--gres gpu:a100:2", True),
        ("--gpus=1", True),
        ("--gpus-per-node=8", True),
        ("--tres-per-task=cpu=4,gres/gpu:1", True),
        ("-G 1", True),
        ("--exclude=gpu07", False),
        ("--partition=gpu", False),
        ("--gres=none", False),
        ("--comment=no-gpus", False),
    ],
)
def test_jobs_that_ask_for_gpus_are_known_by_a_directive(directive: str, asks: bool) -> None:
    jobs = ClusterConfig(directives=("--exclusive", directive))
    assert jobs.asks_for_gpus == asks


@pytest.mark.parametrize(
    ("said", "engine", "meant"),
    [
        ("cuda", EngineConfig(cluster=ClusterConfig()), "cuda"),
        ("auto", EngineConfig(cluster=GPU_JOBS), "cuda"),
        ("auto", EngineConfig(cluster=ClusterConfig()), "auto"),
        ("cpu", EngineConfig(cluster=GPU_JOBS), "cpu"),
        ("cuda", EngineConfig(scheduler="tcp://a:1"), "cuda"),
        ("auto", EngineConfig(scheduler="tcp://a:1"), "auto"),
    ],
)
@pytest.mark.usefixtures("unasked")
def test_a_login_nodes_cuda_says_nothing_about_workers(
    said: str, engine: EngineConfig, meant: str
) -> None:
    assert stage_device(said, engine) == meant


@pytest.mark.usefixtures("no_cuda")
def test_here_auto_is_what_is_here() -> None:
    assert stage_device("auto", EngineConfig()) == "cpu"
    with pytest.raises(UserError, match="no CUDA device here"):
        stage_device("cuda", EngineConfig())


@pytest.mark.usefixtures("unasked")
def test_bundles_and_workers_of_gpu_jobs_are_planned_as_such() -> None:
    engine = stage._on_devices(EngineConfig(cluster=GPU_JOBS), "cuda")
    assert engine.workers == 12
    tasks = [SlideTask(str(i), "f", (), units=10_000) for i in range(1000)]
    assert stage._tiles_per_bundle(tasks, "cuda", engine) == 100_000
    assert stage._tiles_per_bundle(tasks[:48], "cuda", engine) == 10_000, "four bundles per worker"
    assert stage._tiles_per_bundle(tasks, "cpu", engine) == 256


@pytest.mark.usefixtures("unasked")
def test_a_dry_run_from_a_login_node_reckons_with_all_workers(
    tiled: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("max_jobs: 3\nstages:\n  cache: {cores: 4, workers: 4}\n")
    planned: list[int] = []
    monkeypatch.setattr(stage, "print_plan", lambda *_, workers: planned.append(workers))
    root = str(tiled.root)
    command = ["cache", "--dataset", root, "--encoder", "dinov2-b", "--dry-run"]
    assert main([*command, "--device", "cuda", "--cluster", str(cluster)]) == 0
    assert planned == [12]


@pytest.mark.usefixtures("no_cuda")
def test_a_worker_without_the_gpu_that_was_asked_for_names_its_host() -> None:
    with pytest.raises(UnfitWorkerError, match=f"on {socket.gethostname()} .*--device cpu"):
        worker_device("cuda")


@pytest.mark.usefixtures("no_cuda")
def test_a_worker_that_may_choose_says_that_it_took_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(device, "report_note", said.append)
    assert [worker_device("auto") for _ in range(3)] == ["cpu"] * 3
    assert len(said) == 1
    assert socket.gethostname() in said[0]


def unfit(bundle: list[tuple[str]]) -> list[list[Entry]]:
    raise UnfitWorkerError(f"no CUDA device for the worker on node7, {len(bundle)} slides")


def test_a_worker_that_is_unfit_ends_the_stage_and_fails_no_slide() -> None:
    tasks = [SlideTask(f"s{i}", "f", (f"s{i}",)) for i in range(6)]
    entries: list[Entry] = []
    bundles = [tasks[:3], tasks[3:]]
    with pytest.raises(UserError, match="on node7, 3 slides"):
        run_bundles(unfit, bundles, EngineConfig(1), entries.extend, Meter("t", 6, "slides"))
    assert entries == []


def test_a_scheduler_whose_workers_have_no_gpu_is_told_in_one_line(
    own_tiled: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: the coordinator asks nothing of this machine, the worker refuses."""
    from distributed import LocalCluster

    from model.encoders import encoder_spec

    spec = encoder_spec("dinov2-b")
    loaded = SimpleNamespace(spec=spec, weights_sha256="w", is_random=True, terms=())
    monkeypatch.setattr(stage, "load_encoder_once", lambda *_: loaded)
    with started_right(), LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None,
        env={"CUDA_VISIBLE_DEVICES": ""},
    ) as workers:  # fmt: skip
        command = ["cache", "--dataset", str(own_tiled.root), "--encoder", "dinov2-b",
                   "--weights", "random:0", "--scheduler", workers.scheduler_address]  # fmt: skip
        with pytest.raises(UserError, match=f"no CUDA device .* on {socket.gethostname()}"):
            main([*command, "--device", "cuda"])
    assert "cache: device: cuda, workers: 1" in capsys.readouterr().out
    (log,) = own_tiled.status_dir("cache").glob("*.log")
    begin = read_events(log)[0]
    assert (begin.event, begin.fields["device"]) == ("begin", "cuda")
