"""Checkpoints: whole or not at all, the last K, and refused where they do not fit."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from train import checkpoint
from train.checkpoint import (
    CheckpointWriter,
    RunState,
    Trainees,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_unfinished,
)


def make_trainees(seed: int = 0, width: int = 4) -> Trainees:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    net[0].bias.requires_grad_(False)
    net = net.to(memory_format=torch.channels_last)
    trained = [p for p in net.parameters() if p.requires_grad]
    return Trainees({"net": net}, {"net": torch.optim.AdamW(trained, lr=1e-2, fused=True)})


def train_once(trainees: Trainees, seed: int) -> None:
    torch.manual_seed(seed)
    trainees.networks["net"](torch.randn(2, 3, 8, 8)).square().sum().backward()
    trainees.optimizers["net"].step()
    trainees.optimizers["net"].zero_grad()


def save(run_dir: Path, state: RunState, trainees: Trainees, *, keep: int) -> Path:
    """Write a checkpoint and wait for it."""
    with CheckpointWriter(run_dir, keep=keep) as writer:
        writer.save(state, trainees)
    return run_dir / "checkpoints" / f"step-{state.step:08d}"


def state(step: int) -> RunState:
    return RunState(step, "blocks", "config", 1.5, 2, {"psnr": 3.0})


def test_a_run_goes_on_exactly(tmp_path: Path) -> None:
    ours, theirs = make_trainees(0), make_trainees(1)
    train_once(ours, 5)
    path = save(tmp_path, state(1), ours, keep=2)
    assert path == tmp_path / "checkpoints" / "step-00000001"
    assert read_state(path) == state(1)
    load_checkpoint(path, theirs)
    for seed in (6, 7):
        train_once(ours, seed)
        train_once(theirs, seed)
    mine, yours = (t.networks["net"].state_dict() for t in (ours, theirs))
    assert all(mine[key].equal(yours[key]) for key in mine)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the weights of the moment of `save`, however late the thread writes them."""
    trainees = make_trainees()
    train_once(trainees, 0)
    net, optimizer = trainees.networks["net"], trainees.optimizers["net"]
    expected = {key: value.clone() for key, value in net.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    may_write, real = threading.Event(), checkpoint.write_tensors

    def write_late(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert may_write.wait(60)
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write_late)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(state(1), trainees)
        train_once(trainees, 1)
        assert not any(
            value.equal(net.state_dict()[key])
            for key, value in expected.items()
            if key in ("0.weight", "1.weight", "1.running_mean")
        )
        assert list_checkpoints(tmp_path) == []
        may_write.set()
        writer.save(state(2), trainees)  # waits for the first, and takes its buffers
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["1", "2"]
    late = make_trainees(1)
    load_checkpoint(tmp_path / "checkpoints" / "step-00000001", late)
    loaded = late.networks["net"].state_dict()
    assert all(loaded[key].equal(value) for key, value in expected.items())
    found = late.optimizers["net"].state_dict()["state"]
    for index, values in moments.items():
        assert all(found[index][name].equal(value) for name, value in values.items())


def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Writes fail while the list's one value is true."""
    full, real = [True], checkpoint.write_tensors

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    return full


def test_after_a_failed_write_the_next_state_is_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, trainees = full_disk(monkeypatch), make_trainees()
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(state(1), trainees)
        assert writer._thread is not None
        writer._thread.join()
        full[0] = False
        writer.save(state(2), trainees)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "step-00000001: No space left" in lines[0]
    assert "now trying step 2" in lines[0]


def test_two_failed_writes_in_a_row_are_an_error_and_so_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch)
    trainees, writer = make_trainees(), CheckpointWriter(tmp_path, keep=2)
    writer.save(state(1), trainees)
    with pytest.raises(UserError, match="step-00000002: No space left"):
        writer.save(state(2), trainees)
    writer.wait()  # told once
    with pytest.raises(UserError, match="step-00000003: No space left"), writer:
        writer.save(state(3), trainees)
    writer.save(state(4), trainees)
    with pytest.raises(KeyError), writer:  # the run's own error is the one that is told
        raise KeyError


def test_only_the_newest_stay(tmp_path: Path) -> None:
    trainees = make_trainees()
    for step in (1, 2, 10, 20, 100000000):
        save(tmp_path, state(step), trainees, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-100000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-100000000"


def test_nothing_half_written_is_ever_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainees = make_trainees()
    good = save(tmp_path, state(1), trainees, keep=2)
    real = checkpoint.write_tensors
    calls = []

    def fail_later(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", fail_later)
    with pytest.raises(UserError, match="step-00000002: No space left on device"):
        save(tmp_path, state(2), trainees, keep=2)
    assert list_checkpoints(tmp_path) == [good]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    good = save(tmp_path, state(1), make_trainees(), keep=2)
    (tmp_path / "checkpoints" / ".writing-step-00000002-ab12").mkdir()
    assert latest_checkpoint(tmp_path) == good
    remove_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_damaged_and_foreign_checkpoints_get_one_line(tmp_path: Path) -> None:
    trainees = make_trainees()
    train_once(trainees, 0)
    path = save(tmp_path, state(1), trainees, keep=2)
    with pytest.raises(UserError, match=r"net\.safetensors.*other shape: 0\.weight"):
        load_checkpoint(path, make_trainees(width=6))
    weights = path / "net.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"net\.safetensors.*damaged"):
        load_checkpoint(path, trainees)
    (path / "state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        read_state(path)
