"""A model's folder that is exported to again: the old model or the new one, never of both."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import files
from common.errors import UserError
from common.files import replacing_folder
from model import CytoSyn
from model.sit import SiT, SiTConfig
from model.vae import VAE, VAEConfig


def make_model(value: float) -> CytoSyn:
    """A small model all of whose weights have one value."""
    torch.set_num_threads(1)
    sit = SiT(SiTConfig(latent_size=4, hidden_size=32, depth=2, num_heads=2, encoder_depth=1,
                        projector_dim=24, token_dim=12, condition_dim=16))  # fmt: skip
    vae = VAE(VAEConfig(base_channels=4, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1,
                        norm_groups=2))  # fmt: skip
    model = CytoSyn(sit, vae)
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model


def value_of(folder: Path) -> float:
    """The one value of a folder's model, which `from_pretrained` refuses if it is of two."""
    values = CytoSyn.from_pretrained(folder).state_dict().values()
    (value,) = {float(tensor.flatten()[0]) for tensor in values}
    return value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.full
def test_an_export_that_is_killed_leaves_one_of_both(folder: Path) -> None:
    models, values = [make_model(1), make_model(2)], []
    for moment in (0.01, 0.03, 0.06, 0.1, 0.15):
        child = os.fork()
        if child == 0:
            for number in itertools.count():
                models[number % 2].save_pretrained(folder)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values.append(value_of(folder))
    assert set(values) <= {1, 2}
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "sit.safetensors", "vae.safetensors"
    }  # fmt: skip


def test_a_reader_meanwhile_has_one_of_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced after its configuration was read, and before its weights are."""
    from model import cytosyn

    real, calls = cytosyn._read_config, list[Path]()

    def replace_after(path: Path) -> object:
        config = real(path)
        if not calls:
            make_model(2).save_pretrained(folder)
        calls.append(path)
        return config

    monkeypatch.setattr(cytosyn, "_read_config", replace_after)
    assert value_of(folder) == 2
    assert len(calls) == 2


def test_what_else_is_in_the_folder_stays(folder: Path) -> None:
    (folder / "README").write_text("mine")
    (folder / "notes").mkdir()
    make_model(3).save_pretrained(folder)
    assert value_of(folder) == 3
    assert (folder / "README").read_text() == "mine"
    assert len(list(folder.iterdir())) == 5
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("is_link", [True, False])
def test_a_model_is_replaced_on_any_file_system(
    folder: Path, is_link: bool, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    named = folder
    if is_link:
        named = folder.with_name("link")
        named.symlink_to(folder)
    folder.chmod(0o750)
    make_model(2).save_pretrained(named)
    assert value_of(folder) == 2
    assert named.is_symlink() == is_link
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.name for path in folder.parent.iterdir()} == {"model", named.name}


def test_a_disk_without_room_keeps_the_old_model(
    tmp_path: Path, make_small_disk: Callable[[int], Path]
) -> None:
    disk = make_small_disk(64)
    (disk / "out").mkdir()
    (disk / "out" / "last").write_bytes(b"old")
    with (
        pytest.raises(UserError, match=r"cannot write \S+/out: No space left"),
        replacing_folder(disk / "out", last="last") as staged,
    ):
        (staged / "last").write_bytes(bytes(10**6))
    assert (disk / "out" / "last").read_bytes() == b"old"
    assert [path.name for path in disk.iterdir()] == ["out"]
