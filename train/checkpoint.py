"""Checkpoints: a folder per step, written whole or not at all, never pickled.

`RUN/checkpoints/step-NNNNNNNN/` has a safetensors file for each network, moving average and
optimizer, and state.json, which has the sums of them all. There is no state of a random generator
or of the reader in it: all randomness and the stream are functions of the step. A damaged one is
renamed, never removed.
"""

import errno
import hashlib
import math
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from common.config import build_config, check_setting
from common.console import print_line
from common.errors import UserError
from common.files import hash_file, json_bytes, make_directory, sync_directory
from common.json_text import read_json
from model.weights import WeightsError, fit_tensors, read_tensors, write_tensors

FORMAT_VERSION = 1
_NAME = re.compile(r"step-([0-9]{8,18})")
_STATE_FILE = "state.json"
_STAGING = ".writing-"
_DAMAGED = "damaged-"
_SUMS, _STATE_SUM = "sha256", "state_sha256"
"""Keys of state.json for the sums of the other files by name, and of all its other values."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what was written, or that no step can start from."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint has besides tensors.

    `blocks_sha256` is the stream's block table, `config_sha256` the configuration's `hash`;
    `seconds` of training are counted over all restarts; `untrained` is the reconstruction measured
    before the first step; `latents` says of what the latent statistics were computed, "" where
    the run began at 0 and 1 or an older version wrote the checkpoint.
    """

    step: int
    blocks_sha256: str
    config_sha256: str
    seconds: float = 0.0
    skipped_tiles: int = 0
    untrained: dict[str, float] = field(default_factory=dict)
    latents: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("step", "seconds", "skipped_tiles"):
            value = getattr(self, name)
            good = value >= 0 and math.isfinite(value)
            check_setting(good, name, value, "a number of 0 or more")


@dataclass(frozen=True)
class Trainees:
    """All that training changes: networks (averages among them) and their optimizers, by name.

    The optimizer `x` is of the network `x`'s parameters that require gradients, in their order.
    """

    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that optimizer `name` updates, by name and in its order."""
        named = self.networks[name].named_parameters()
        return {key: parameter for key, parameter in named if parameter.requires_grad}


RECORDS_FILE = "records.json"
"""What a run descends from, in its folder."""


def checkpoints_dir(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    folder = checkpoints_dir(run_dir)
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint, or None before the first."""
    return next(reversed(list_checkpoints(run_dir)), None)


def find_sound_checkpoint(run_dir: Path, names: Iterable[str]) -> Path | None:
    """The newest checkpoint that is whole, or None before the first; newer ones are set aside.

    `names` are the safetensors files that it must have. Each damaged one is renamed and reported in
    a line. Raises `UserError` where no sound one is left: nothing then begins anew in silence.
    """
    names = list(names)
    for checkpoint in reversed(list_checkpoints(run_dir)):
        try:
            check_sums(checkpoint)
            _check_tensors(checkpoint, names)
            return checkpoint
        except DamagedCheckpointError as error:
            aside = _set_aside(checkpoint)
            print_line(f"warning: {error}: set aside as {aside}")
    if aside_ones := list_damaged(run_dir):
        raise UserError(
            f"{run_dir} has no sound checkpoint, and {len(aside_ones)} damaged (newest: "
            f"{aside_ones[-1]}): restore one as step-NNNNNNNN to go on, or use another run.dir to "
            "begin anew"
        )
    return None


def list_damaged(run_dir: Path) -> list[Path]:
    """The run's checkpoints that were set aside, in the order of their names."""
    return sorted(checkpoints_dir(run_dir).glob(f"{_DAMAGED}step-*"))


def newest_state(run_dir: Path) -> tuple[Path, RunState] | None:
    """The newest checkpoint whose state.json can be read, and its state; None where there is none.

    Raises `UserError` for one of another format version.
    """
    for checkpoint in reversed(list_checkpoints(run_dir)):
        try:
            return checkpoint, read_state(checkpoint)
        except DamagedCheckpointError:
            continue
    return None


class CheckpointWriter:
    """Writes checkpoints while training goes on: tensors are copied at once, files follow.

    `save` copies to buffers of the host's memory, kept from one checkpoint to the next and pinned
    where a GPU copies into them, and returns; a thread writes, syncs and renames. One checkpoint
    is written at a time: `save` waits for the one before. Where that one failed, `save` reports
    it, writes the present state all the same and returns when that is on disk. Leaving the
    context manager waits, too. The newest `keep`, at least 1, stay.
    """

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.wait()
        elif (
            failed := self.settle_write()
        ) is not None:  # the other error is the one that ends the run
            print_line(f"warning: {failed}")

    def save(self, state: RunState, trainees: Trainees) -> None:
        """Begin the checkpoint of `state.step`: it has the values of this moment.

        Raises `UserError` where the write before failed and this one does too.
        """
        failed = self.settle_write()
        if failed is not None:
            print_line(f"warning: {failed}; now trying step {state.step}")
        # Copied at once: the next step changes the tensors while the thread still writes.
        files = _collect_tensors(trainees)
        for name, tensors in files.items():
            buffers = self._buffers.setdefault(name, {})
            for key, value in tensors.items():
                if key not in buffers:
                    buffers[key] = torch.empty_like(
                        value, device="cpu", pin_memory=value.is_cuda, requires_grad=False
                    )
                buffers[key].copy_(value.detach(), non_blocking=True)
        if any(value.is_cuda for tensors in files.values() for value in tensors.values()):
            torch.cuda.synchronize()
        copies = {name: self._buffers[name] for name in files}

        def write() -> None:
            try:
                write_checkpoint(self.run_dir, state, copies, keep=self.keep)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write)
        self._thread.start()
        if failed is not None:  # two in a row: an interval more would be lost for nothing
            self.wait()

    def wait(self) -> None:
        """Wait until what was begun is on disk; raises `UserError` where it failed."""
        if (error := self.settle_write()) is not None:
            raise error

    def settle_write(self) -> BaseException | None:
        """Wait for what was begun; the error that prevented it, returned once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error


def write_checkpoint(
    run_dir: Path, state: RunState, files: Mapping[str, Mapping[str, Tensor]], *, keep: int
) -> Path:
    """Write the checkpoint of `state.step`, durably, then remove all but the newest `keep`.

    `keep` is at least 1; `files` are the tensors of each safetensors file by its stem. On a full
    disk the oldest goes first where another remains. Raises `UserError` where the folder cannot be
    written; earlier checkpoints then remain.
    """
    final = checkpoints_dir(run_dir) / _name_of(state.step)
    try:
        if checkpoints_dir(run_dir).is_symlink():  # old ones of another run might go
            raise OSError(errno.ELOOP, f"{checkpoints_dir(run_dir)} is a link")
        try:
            _write_folder(final, state, files)
        except OSError as error:
            older = list_checkpoints(run_dir)
            if error.errno not in _NO_ROOM or not len(older) >= keep > 1:
                raise
            # It would go in a moment anyway: a disk with room for `keep` of them must do.
            shutil.rmtree(older[0], ignore_errors=True)
            _write_folder(final, state, files)
    except OSError as error:
        raise UserError(
            f"cannot write checkpoint {final}: {error.strerror or error}; free space or choose "
            "another run.dir, then run the same command to go on"
        ) from error
    # Only now: until the new one is on disk, the old ones are what a restart reads.
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_folder(final: Path, state: RunState, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a checkpoint's folder, synced, under its final name; raises `OSError`."""
    folder = final.parent
    staged = folder / f"{_STAGING}{final.name}-{secrets.token_hex(4)}"
    try:
        make_directory(staged)
        for name, tensors in files.items():
            write_tensors(staged / f"{name}.safetensors", tensors)
        sums = {path.name: hash_file(path) for path in sorted(staged.iterdir())}
        values = asdict(state) | {_SUMS: sums}
        values[_STATE_SUM] = _sum_values(values)
        (staged / _STATE_FILE).write_bytes(json_bytes(values))
        # Contents before names: a power loss must not leave a checkpoint of empty files.
        for path in staged.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(staged)
        if final.exists():  # the same step of the same run, written again after a restart
            shutil.rmtree(final)
        staged.rename(final)
        sync_directory(folder)
    except UserError as error:  # of a file in the folder; the checkpoint's own line follows
        raise error.__cause__ or error from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a killed run was writing; nothing behind a link."""
    if checkpoints_dir(run_dir).is_symlink():
        return
    for path in checkpoints_dir(run_dir).glob(f"{_STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> RunState:
    """The state.json of a checkpoint.

    Raises `DamagedCheckpointError` for a damaged one, `UserError` for that of a newer release.
    """
    return RunState(**_known(_read_values(checkpoint)))


def _read_values(checkpoint: Path) -> dict[str, Any]:
    """What state.json has, whose values of this software are of their types."""
    path = checkpoint / _STATE_FILE
    try:
        values = read_json(path)
        version = values["format_version"]
        # Another version's values may be of other types: that is no damage.
        if version == FORMAT_VERSION:
            _check_values(checkpoint, values)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DamagedCheckpointError(f"{path} cannot be read ({reason})") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this software reads {FORMAT_VERSION}; "
            "go on with the release that wrote it"
        )
    return dict(values)


def _check_values(checkpoint: Path, values: Mapping[str, Any]) -> None:
    """Raise where values are not those that were written, or of other types than ours."""
    if _STATE_SUM in values and values[_STATE_SUM] != _sum_values(values):
        raise ValueError("its values are not those that were written")
    known = _known(values)
    build_config(RunState, known)
    RunState(**known)
    # By the name it is found, and older ones are removed.
    check_setting(
        checkpoint.name == _name_of(values["step"]), "step", values["step"], "the folder's"
    )
    if not isinstance(values.get(_SUMS, {}), dict):
        raise ValueError(f"{_SUMS} is no object")


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a state; those of a later release are left out."""
    return {key: values[key] for key in RunState.__dataclass_fields__ if key in values}


def _sum_values(values: Mapping[str, Any]) -> str:
    """The sha256 of a state's values without that sum itself."""
    return hashlib.sha256(
        json_bytes({key: value for key, value in values.items() if key != _STATE_SUM})
    ).hexdigest()


def check_sums(checkpoint: Path, names: Iterable[str] | None = None) -> bool:
    """Compare a checkpoint's files, all or `names`, with the sums that state.json has of them.

    Returns whether it has sums: older releases wrote none. Raises `DamagedCheckpointError` naming
    the file that is missing, unreadable or another, `UserError` as `read_state` does.
    """
    sums = _read_values(checkpoint).get(_SUMS)
    for name, expected in (sums or {}).items():
        if names is not None and name not in names:
            continue
        path = checkpoint / Path(name).name
        try:
            found = hash_file(path)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if found != expected:
            raise DamagedCheckpointError(f"{path} is damaged (its sha256 is another)")
    return sums is not None


def _check_tensors(checkpoint: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks a file, or has one that is cut short or not finite."""
    for name in names:
        path = checkpoint / name
        try:
            tensors = read_tensors(path)
        except WeightsError as error:
            reason = "no such file" if not path.exists() else "cut short or no weights"
            raise DamagedCheckpointError(f"{path} cannot be read ({reason})") from error
        for key, value in tensors.items():
            # A moment that is none would spoil the weights at the first step, for good.
            # Smallest and largest alone: 14 times as fast as a mask of all values.
            if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
                raise DamagedCheckpointError(f"{path}: '{key}' is not finite")


def _set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing reads it as one, and nothing is lost."""
    base, number = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}"), 1
    aside = base
    while os.path.lexists(aside):
        number += 1
        aside = base.with_name(f"{base.name}-{number}")
    try:
        checkpoint.rename(aside)
        sync_directory(aside.parent)
    except OSError as error:
        raise UserError(
            f"cannot set aside the damaged checkpoint {checkpoint}: {error.strerror}; rename it "
            f"to {aside.name} to go on from the one before"
        ) from error
    return aside


def load_checkpoint(checkpoint: Path, trainees: Trainees) -> None:
    """Put a checkpoint's weights and optimizer moments in place.

    Raises `UserError` naming the file where it is missing, damaged or of other networks.
    """
    for name, network in trainees.networks.items():
        load_network(checkpoint, name, network)
    for name, optimizer in trainees.optimizers.items():
        path = checkpoint / f"optimizer_{name}.safetensors"
        _load_optimizer(optimizer, trainees.parameters(name), read_tensors(path), path)


def load_network(checkpoint: Path, name: str, network: nn.Module) -> None:
    """Put one network's weights in place: sit, sit_ema, vae, vae_ema or discriminator.

    Values take the network's dtype and device. Raises `UserError` where they do not fit.
    """
    path = checkpoint / f"{name}.safetensors"
    fit_tensors(network, read_tensors(path), source=str(path))


def _collect_tensors(trainees: Trainees) -> dict[str, dict[str, Tensor]]:
    """The tensors of every file of a checkpoint, by the file's stem.

    AdamW's moments and step counts are named `<parameter>:<moment>`.
    """
    files: dict[str, dict[str, Tensor]] = {
        name: dict(network.state_dict()) for name, network in trainees.networks.items()
    }
    for name, optimizer in trainees.optimizers.items():
        # PyTorch numbers parameters by their order; files have names, which outlive it.
        names = list(trainees.parameters(name))
        files[f"optimizer_{name}"] = {
            f"{names[index]}:{moment}": value
            for index, moments in optimizer.state_dict()["state"].items()
            for moment, value in moments.items()
        }
    return files


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    state: dict[int, dict[str, Any]] = {}
    index = {name: number for number, name in enumerate(parameters)}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(":")
        if name not in index or value.shape not in ((), parameters[name].shape):
            raise UserError(f"{path}: '{key}' is not of a parameter that this run trains")
        # Fused updates need the parameter's memory layout (channels last).
        if value.ndim:
            value = torch.empty_like(parameters[name], dtype=value.dtype).copy_(value)
        state.setdefault(index[name], {})[moment] = value.detach()
    # Learning rates come from the configuration, not from the checkpoint.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
