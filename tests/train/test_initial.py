"""Beginning from weights on disk: our own files, SD-VAE's layouts, REPA-E's checkpoints."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config
from torch import Tensor

from common.errors import UserError
from model.cytosyn import CytoSyn
from model.sit import SiT, SiTConfig
from model.vae import VAE
from model.weights import seeded_init, write_tensors
from pipeline.dataset import Dataset
from train.config import Config
from train.networks import build_networks

CPU = torch.device("cpu")


def others(config: Config, sit: SiTConfig | None = None) -> tuple[SiT, VAE]:
    """Networks with weights that no seed of the run gives."""
    with seeded_init(77):
        networks = SiT(sit or config.model.sit), VAE(config.model.vae)
    networks[0].bn.running_mean.fill_(0.25)
    return networks


def assert_state(network: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key, value in expected.items() if not state[key].equal(value)] == []


@pytest.fixture
def config(train_dataset: Dataset, tmp_path: Path) -> Config:
    return small_config(train_dataset, tmp_path / "run")


def begun(config: Config, **places: Path) -> tuple[SiT, VAE]:
    names = {name: str(path) for name, path in places.items()}
    networks = build_networks(replace(config, init=replace(config.init, **names)), CPU)
    return networks.sit, networks.vae


def test_an_exported_model_serves_for_both(config: Config, tmp_path: Path) -> None:
    sit, vae = others(config)
    CytoSyn(sit, vae).save_pretrained(tmp_path / "model")
    ours = begun(config, sit=tmp_path / "model", vae=tmp_path / "model")
    assert_state(ours[0], sit.state_dict())
    assert_state(ours[1], vae.state_dict())


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_sd_vae_in_either_layout(config: Config, tmp_path: Path, layout: str) -> None:
    vae = others(config)[1]
    folder = tmp_path / "vae"  # as in a diffusers repository
    folder.mkdir()
    vae.save(folder / "diffusion_pytorch_model.safetensors", layout=layout)  # type: ignore[arg-type]
    assert_state(begun(config, vae=folder)[1], vae.state_dict())


def write_repa_e(path: Path, sit: SiT, vae: VAE) -> None:
    torch.save(
        {
            "model": {key: value + 1 for key, value in sit.state_dict().items()},
            "ema": sit.state_dict(),
            "vae": vae.state_dict(),
            "args": argparse.Namespace(path_type="linear", encoder_depth=1, enc_type="dinov2"),
            "steps": 5,
        },
        path,
    )


def test_a_training_checkpoint_of_repa_e(config: Config, tmp_path: Path) -> None:
    """Of a class-conditional SiT at a larger image: the grid is cut, the condition is fresh."""
    sit, vae = others(
        config, replace(config.model.sit, conditioning="label", num_classes=10, latent_size=8)
    )
    write_repa_e(tmp_path / "0400000.pt", sit, vae)
    archive = tmp_path / "0400000.pt"
    ours = begun(config, sit=archive, vae=archive)
    assert_state(ours[1], vae.state_dict())
    given, fresh = sit.state_dict(), build_networks(config, CPU).sit.state_dict()
    for key, value in ours[0].state_dict().items():
        if key.startswith("y_embedder."):
            assert value.equal(fresh[key])
        elif key == "pos_embed":
            torch.testing.assert_close(value, fresh[key])  # the same sines and cosines
        else:
            assert value.equal(given[key])
    assert float(ours[0].bn.running_mean[0]) == 0.25


def test_what_does_not_fit_is_named(config: Config, tmp_path: Path) -> None:
    wider = others(config, replace(config.model.sit, hidden_size=64))[0]
    write_tensors(tmp_path / "sit.safetensors", wider.state_dict())
    with pytest.raises(UserError, match=r"sit\.safetensors.*other shape"):
        begun(config, sit=tmp_path / "sit.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match=r"broken\.pt: damaged"):
        begun(config, vae=tmp_path / "broken.pt")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"init\.vae=.*name the file itself"):
        begun(config, vae=empty)
