"""Several processes that meet a mistake: one line, told once, and nobody waits for ever."""

import socket
import subprocess
from pathlib import Path

import pytest
from conftest import HOME, command, environment

from pipeline.dataset import Dataset


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
from model.errors import UserError
from train import loop
from train.__main__ import main
from pipeline.console import run_door

def damaged(self, batch):
    if self.ranks.rank == WHO and batch.step == 2:
        raise ERROR
loop.Training._note_damage = damaged
run_door(lambda: main(sys.argv[1:]), ("train",))
"""


@pytest.mark.parametrize(
    ("who", "error", "status"),
    [(1, "UserError('a tile of mine')", 2), (0, "ValueError('a bug')", 1)],
)
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
