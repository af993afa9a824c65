"""What processes tell one another is data: it runs no code, and is checked before it is used."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from evaluate.generate.plan import units_of_rows

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "pipeline", "model", "train", "evaluate", "bench")

_PAIR = """
import json, os, sys
import torch
import torch.distributed as dist
from common.errors import UserError
from common.torch_processes import joined_processes

class Forged:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)

def send(data, length=None):
    dist.broadcast(torch.tensor([len(data) if length is None else length]), src=0)
    if length is None:
        dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), src=0)

FORGED = [
    lambda: dist.broadcast_object_list([Forged()], src=0),
    lambda: send(b"", length=1 << 40),
    lambda: send(b"", length=-1),
    lambda: send(b"[" * 10**6),
    lambda: send(b'{"value": 1, "other": 2}'),
    lambda: send(b"\\xff\\xfe"),
    lambda: send(b"7"),
]
with joined_processes("cpu") as processes:
    plan = {"units": [[0, 0, 128]] * 1000, "name": "Grün", "share": 0.1, "none": None}
    said = [processes.on_main(lambda: plan if processes.is_main else None) == plan]
    said.append(processes.on_main(lambda: None))
    for forge in FORGED:
        if processes.is_main:
            forge()
            continue
        try:
            said.append(f"took {processes.on_main(lambda: None)!r}")
        except UserError as error:
            said.append(str(error))
    processes.wait_for_all()
    print(json.dumps(said))
"""


@pytest.mark.full
def test_a_forged_message_of_another_process_runs_no_code(tmp_path: Path) -> None:
    shared = os.environ | {
        "WORLD_SIZE": "2", "HISTOGEN_STORE": str(tmp_path / "store"), "PYTHONPATH": str(ROOT),
        "MARK": str(tmp_path / "mark"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", _PAIR], env=shared | {"RANK": f"{k}", "LOCAL_RANK": f"{k}"},
            text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for k in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    is_same, nothing, *refused = json.loads(outputs[1][0])
    assert is_same is True
    assert nothing is None
    assert len(refused) == 7
    for line in refused:
        assert line.startswith("a message from process 0 cannot be read ("), line
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "rows",
    [7, {"a": 1}, [7], [[0, 0]], [[0, 0, 16, 1]], [["0", 0, 16]], [[0, 0, True]], [[0, 0.0, 16]],
     [[-1, 0, 16]], [[0, 16, 16]], [[0, -16, 16]], [[0, 0, 1040]]],
)  # fmt: skip
def test_units_from_another_process_are_checked(rows: object) -> None:
    with pytest.raises(UserError, match="is no unit of images"):
        units_of_rows(rows)


def test_no_objects_are_exchanged() -> None:
    """torch.distributed's functions for objects unpickle what comes in."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in [getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))]
        if isinstance(name, str)
        and ("_object" in name or name.startswith("rpc_") or name == "rpc")
        and any(word in name for word in ("broadcast", "gather", "scatter", "send", "recv", "rpc"))
    ]
    assert not wrong
