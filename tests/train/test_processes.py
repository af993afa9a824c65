"""Several processes that meet a mistake: one line, told once, and nobody waits for ever."""

import errno
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import HOME, command, environment, small_config, weights_of

from common import leases
from common.errors import UserError
from common.processes import identify_process
from pipeline.dataset import Dataset
from train import lock
from train.loop import train
from train.networks import build_networks
from train.processes import first_host, slurm_variables
from train.reporter import Reporter


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def run_two(
    arguments: list[str], variables: list[dict[str, str]] | None = None
) -> tuple[list[int], list[str]]:
    """Exit statuses and all that two processes print."""
    port = str(free_port())
    if variables is None:
        variables = [
            {"RANK": f"{k}", "LOCAL_RANK": f"{k}", "WORLD_SIZE": "2", "MASTER_PORT": port,
             "MASTER_ADDR": "127.0.0.1"}
            for k in range(2)
        ]  # fmt: skip
    processes = [
        subprocess.Popen(
            arguments, env=environment(**more), text=True, cwd=HOME,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for more in variables
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.selection=other", "no selection 'other'"),  # met by the main process alone
        ("data.dataset=/nowhere", "no dataset at /nowhere"),  # by both alike
        ("run.stepz=4", "unknown configuration key 'run.stepz'"),  # before they meet
    ],
)
def test_a_mistake_of_several_processes_is_told_once(
    train_dataset: Dataset, tmp_path: Path, override: str, says: str
) -> None:
    statuses, outputs = run_two(command(train_dataset, tmp_path / "run", override))
    assert statuses == [2, 2], outputs
    said = "".join(outputs)
    assert said.count("error: ") == said.count(says) == 1, said
    assert "Traceback" not in said
    assert "closed by peer" not in said


_BREAKS_LATER = """
import sys
from common.errors import UserError
from train.reporter import Reporter
from train.__main__ import main
from common.console import run_door

def damaged(self, batch):
    if self.processes.rank == WHO and batch.step == 2:
        raise ERROR
Reporter.note_damage = damaged
run_door(lambda: main(sys.argv[1:]), ("train",))
"""


@pytest.mark.parametrize(
    ("who", "error", "status"),
    [(1, "UserError('a tile of mine')", 2), (0, "ValueError('a bug')", 1)],
)
@pytest.mark.full
def test_the_end_of_one_process_is_not_buried_by_the_others(
    train_dataset: Dataset, tmp_path: Path, who: int, error: str, status: int
) -> None:
    script = _BREAKS_LATER.replace("WHO", str(who)).replace("ERROR", error)
    arguments = command(train_dataset, tmp_path / "run")
    arguments[1:3] = ["-c", script]
    statuses, outputs = run_two(arguments)
    assert statuses[who] == status, outputs
    assert statuses[1 - who] == 1, outputs
    other = outputs[1 - who]
    assert "Traceback" not in other, other
    told = outputs[who]
    assert told.count("a tile of mine" if status == 2 else "ValueError: a bug") == 1
    assert told.count("Traceback") == (status == 1)


@pytest.mark.full
def test_srun_starts_one_training_of_its_tasks(train_dataset: Dataset, tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    }  # fmt: skip
    tasks = [step | {"SLURM_PROCID": f"{k}", "SLURM_LOCALID": f"{k}"} for k in range(2)]
    statuses, outputs = run_two(command(train_dataset, tmp_path / "run"), tasks)
    assert statuses == [0, 0], outputs
    assert "on 2 x cpu" in outputs[0]
    assert "training on" not in outputs[1]
    assert "Warning" not in "".join(outputs), "PyTorch warns of options that it renamed"
    assert weights_of(tmp_path / "run", 6)


def test_only_a_step_of_several_tasks_is_several_processes() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert slurm_variables({}) == {}
    assert slurm_variables(batch) == {}, "one process of a batch script"
    step = batch | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert slurm_variables(step) == {}
    step |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    step |= {"SLURM_STEP_NODELIST": "gpu[07-08]"}
    assert slurm_variables(step | {"WORLD_SIZE": "8"}) == {}, "torchrun knows better"
    assert slurm_variables(step) == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20104",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,09],cpu1", "gpu03"),
        ("gpu[4,7]", "gpu4"),
        ("rack[1-2]n[3-4].site.edu", "rack1n3.site.edu"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_second_training_in_a_run_directory_is_refused(
    train_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_HERE_S", 0.3)
    config = small_config(train_dataset, tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / ".writing-step-00000003-ab12"
    with lock.RunLock(tmp_path / "run") as held:
        held.acquire()
        unfinished.mkdir(parents=True)
        with pytest.raises(UserError, match=r"run is being trained by process \d+ on \S+: wait"):
            train(config)
        assert unfinished.exists(), "what the first one is writing"
    assert train(config) == 0
    assert not unfinished.exists()


def test_without_locks_of_the_file_system_a_lease_keeps_a_second_training_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock, "_HERE_S", 0.3)
    monkeypatch.setattr("fcntl.flock", refuse)
    with lock.RunLock(tmp_path) as held:
        held.acquire()
        with (
            lock.RunLock(tmp_path) as second,
            pytest.raises(UserError, match="is being trained by process"),
        ):
            second.acquire()
    # One that was killed in a container, and is not seen from here, is waited for.
    elsewhere = replace(identify_process(), namespace="pid:[1]")
    lease = tmp_path / lock.LEASE_FILE
    lease.write_text(elsewhere.to_json())
    monkeypatch.setattr(leases, "DEAD_S", 0.5)
    now = time.time() + 3600
    os.utime(lease, (now, now))
    with lock.RunLock(tmp_path) as second, pytest.raises(UserError, match="being trained"):
        second.acquire()
    os.utime(lease, (0, 0))
    with lock.RunLock(tmp_path) as second:
        second.acquire()
    assert not lease.exists()
    lease.symlink_to("nowhere")  # no lease is written through a link
    with lock.RunLock(tmp_path) as second, pytest.raises(UserError, match="cannot write"):
        second.acquire()


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_training_that_was_taken_for_dead_writes_nothing_more(
    train_dataset: Dataset, tmp_path: Path, has_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped for 300 s on one node, while another took over without the file system's locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    run_dir = tmp_path / "run"
    lease, other = run_dir / lock.LEASE_FILE, replace(identify_process(), boot="b", pid=77)

    def take_over(self: Reporter, wait_s: float) -> None:
        if self.state.step == 2:
            lease.write_text(other.to_json())
            if has_ended:
                lease.unlink()
            time.sleep(0.2)

    monkeypatch.setattr(Reporter, "write_window", take_over)
    with pytest.raises(UserError, match=r"run was taken over by process .*: ended without writing"):
        train(small_config(train_dataset, run_dir, "run.steps=4", "checkpoint.every=2"))
    assert not (run_dir / "checkpoints").exists()
    assert has_ended or lease.read_text() == other.to_json(), "it is the other's to remove"
    assert lease.exists() != has_ended


def test_torchrun_waits_for_the_last_checkpoint_as_long_as_the_batch_script_says() -> None:
    """The variable that the script exports is one that the installed torchrun reads."""
    text = (HOME / "pipeline" / "batch" / "train.sbatch").read_text()
    found = re.search(r"^export (\w+)=\$\{\1:-(\d+)\}$", text, re.MULTILINE)
    assert found is not None
    name, seconds = found.groups()
    script = (
        "from torch.distributed.launcher.api import LaunchConfig\n"
        "print(LaunchConfig(1, 1, 1).shutdown_timeout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(**{name: seconds}), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == seconds == "280"


_SMALL_BUCKETS = """
import sys
from functools import partial
import torch.distributed as dist
from train import processes
from train.__main__ import main

dist._DEFAULT_FIRST_BUCKET_BYTES = 4096
processes.DistributedDataParallel = partial(processes.DistributedDataParallel, bucket_cap_mb=0.01)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full  # two processes trace all parts of the step
@pytest.mark.parametrize("more", [(), ("optim.accumulate=2",)], ids=["whole", "in parts"])
def test_compiled_parts_on_two_processes_train_as_plain_ones(
    train_dataset: Dataset, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Graphs are cut at many gradient buckets, as those of a large network are."""
    options = ("run.steps=4", "checkpoint.every=4", "optim.lr_vae=1e-4", "optim.lr_sit=1e-4", *more)
    for name in ("off", "aot_eager"):
        arguments = command(train_dataset, tmp_path / name, *options, f"run.compile={name}")
        arguments[1:3] = ["-c", _SMALL_BUCKETS]
        statuses, outputs = run_two(arguments)
        assert statuses == [0, 0], outputs
    plain, compiled = (weights_of(tmp_path / name, 4) for name in ("off", "aot_eager"))
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-4, rtol=1e-4, msg=name)
    start = small_config(train_dataset, tmp_path)
    first = build_networks(start, torch.device("cpu")).sit.state_dict()
    moved = plain["sit/blocks.0.attn.qkv.weight"] - first["blocks.0.attn.qkv.weight"]
    assert float(moved.abs().max()) > 2e-4, "a step that did nothing would pass"
