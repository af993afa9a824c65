"""The released models' published calls, on small local pipelines: the real weights are gated."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_data import RECORD, make_real, tile_hashes

from common.errors import UserError
from evaluate.__main__ import main
from evaluate.generators.interface import ModelSource
from evaluate.generators.open import open_generator, settings_for
from model.sampler_settings import SamplerSettings
from pipeline.dataset import Dataset, read_identity

pytest.importorskip("diffusers")
from local_pipelines import save_cytosyn, save_pixcell

CPU = torch.device("cpu")
SEEDS = np.array([3, -7, 2**62, 11])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("released")
    return {
        "cytosyn": save_cytosyn(root / "cytosyn", takes="generator"),
        "cytosyn without generator": save_cytosyn(root / "cytosyn2", takes=""),
        "cytosyn with seed": save_cytosyn(root / "cytosyn3", takes="seed"),
        "pixcell": save_pixcell(root / "pixcell"),
    }


def source(folders: dict[str, Path], name: str, *, trust: bool = True) -> ModelSource:
    folder = str(folders[name])
    return ModelSource(name.split()[0], folder, CPU, trust_remote_code=trust,
                       pipeline_code=folder, vae="none")  # fmt: skip


def features(dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "dim", "px"),
    [
        ("cytosyn", 768, 224),
        ("cytosyn without generator", 768, 224),
        ("cytosyn with seed", 768, 224),
        ("pixcell", 1536, 256),
    ],
)
def test_an_image_is_its_seeds_and_features_own(
    folders: dict[str, Path], name: str, dim: int, px: int
) -> None:
    opened = open_generator(source(folders, name))
    generator = opened.make(settings_for(name.split()[0], {"steps": 2}))
    assert (generator.condition_dim, generator.tile_px) == (dim, px)
    rows = features(dim)
    tiles = generator.generate_tiles(rows, SEEDS)
    assert tiles.shape == (4, px, px, 3)
    assert tiles.dtype == np.uint8
    assert len({tile.tobytes() for tile in tiles}) == 4
    order = [2, 0, 3, 1]
    moved = generator.generate_tiles(rows[order], SEEDS[order]).astype(int)
    assert np.abs(moved - tiles[order]).max() <= 1  # rows of a batch may round differently
    assert (generator.generate_tiles(rows, SEEDS) == tiles).all()
    free = generator.generate_tiles(None, SEEDS)
    assert free.shape == tiles.shape
    assert (free != tiles).any()
    identity = generator.identity()
    assert "untested on the gated weights" in identity["generator_note"]
    assert len(identity["model_sha256"]) == 64
    assert "untested on the gated weights" in opened.notices[0]


def test_published_settings_are_the_defaults_and_unpublished_ones_are_refused() -> None:
    assert settings_for("cytosyn", {}) == SamplerSettings("sde", 250, 2.5, 0.0, 0.75)
    assert settings_for("pixcell", {}) == SamplerSettings("dpm", 50, 2.0, 0.0, 1.0)
    with pytest.raises(UserError, match="cytosyn takes no solver"):
        settings_for("cytosyn", {"solver": "ode"})
    for kind in ("cytosyn", "pixcell"):
        with pytest.raises(UserError, match=f"{kind} takes no legacy_truncate"):
            settings_for(kind, {"legacy_truncate": True})
    with pytest.raises(UserError, match="pixcell takes no guidance_low"):
        settings_for("pixcell", {"guidance_low": 0.1})


def test_a_pipelines_code_runs_only_when_it_is_trusted(folders: dict[str, Path]) -> None:
    for name in ("cytosyn", "pixcell"):
        with pytest.raises(UserError, match="read that code, then give --trust-remote-code"):
            open_generator(source(folders, name, trust=False))


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"model {tmp_path}: not a diffusers pipeline that loads"):
        open_generator(ModelSource("cytosyn", str(tmp_path), CPU, trust_remote_code=True))


def test_a_subfolder_and_a_revision_choose_a_model_and_are_recorded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "v2").symlink_to(folders["cytosyn"])
    both = ModelSource("cytosyn", str(tmp_path), CPU, trust_remote_code=True)
    opened = open_generator(replace(both, subfolder="v2", revision="main"))
    identity = opened.make(settings_for("cytosyn", {})).identity()
    assert (identity["revision"], identity["subfolder"]) == ("main", "v2")
    plain = open_generator(source(folders, "cytosyn")).make(settings_for("cytosyn", {})).identity()
    assert identity["model_sha256"] == plain["model_sha256"]
    assert "subfolder" not in plain
    untrusted = replace(both, model="lab/nowhere", subfolder="v2", trust_remote_code=False)
    with pytest.raises(UserError, match="read that code"):  # before anything is fetched
        open_generator(untrusted)
    for wrong, message in (("v3", "has no such folder"), ("../x", "within the repository")):
        with pytest.raises(UserError, match=message):
            open_generator(replace(both, subfolder=wrong))


def test_pixcells_vae_has_a_dtype_of_its_own(folders: dict[str, Path]) -> None:
    half = replace(source(folders, "pixcell"), dtype="bfloat16")
    make = open_generator(half).make
    generator = make(settings_for("pixcell", {}))
    assert generator.loaded.pipeline.vae.dtype == torch.float32
    assert generator.identity()["vae_dtype"] == "float32"
    same = open_generator(replace(half, vae_dtype="bfloat16")).make(settings_for("pixcell", {}))
    assert same.loaded.pipeline.vae.dtype == torch.bfloat16
    assert "vae_dtype" not in same.identity()


def test_generate_with_a_released_model_says_that_it_is_untested(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {**RECORD, "weights": "hub", "random_weights": False, "dim": 768, "tile_px": 224}
    real = make_real(tmp_path / "real", {"A": 17}, record=record)
    arguments = ["generate", "--generator", "cytosyn", "--model", str(folders["cytosyn"])]
    arguments += ["--guidance", str(real.root), "--selection", "train", "--steps", "2"]
    arguments += ["--out", str(tmp_path / "syn"), "--device", "cpu"]
    with pytest.raises(UserError, match="--trust-remote-code"):
        main(arguments)
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert "untested on the gated weights" in capsys.readouterr().out
    identity = read_identity(Dataset(tmp_path / "syn"))
    assert identity["generator"] == "released CytoSyn"
    assert "untested" in identity["generator_note"]
    assert identity["solver"] == "the pipeline's own"
    assert len(set(tile_hashes(Dataset(tmp_path / "syn")).values())) == 16
    figure = ["figure", "grid", "--generated", str(tmp_path / "syn"), "--out"]
    assert main([*figure, str(tmp_path / "grid")]) == 0
    assert "UNTESTED ON THE GATED WEIGHTS" in capsys.readouterr().out


def test_random_features_do_not_guide_a_released_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    real = make_real(tmp_path / "real", {"A": 17}, record={**RECORD, "dim": 768, "tile_px": 224})
    arguments = ["generate", "--generator", "cytosyn", "--model", str(folders["cytosyn"])]
    arguments += ["--guidance", str(real.root), "--selection", "train", "--trust-remote-code"]
    with pytest.raises(UserError, match=r"h0-mini aaaaaaaaaaaa \(random\).*--force"):
        main([*arguments, "--out", str(tmp_path / "syn"), "--device", "cpu"])


class _Gate(BaseHTTPRequestHandler):
    """A hub that has everything and gives nothing without a token."""

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the server's name for it


@pytest.fixture
def gate() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("cytosyn", "Owkin-Bioptimus/CytoSyn"),
        ("pixcell", "stabilityai/stable-diffusion-3.5-large"),
    ],
)
@pytest.mark.full
def test_gated_weights_say_what_to_accept_and_where_to_put_the_token(
    gate: str, tmp_path: Path, kind: str, page: str
) -> None:
    arguments = ["generate", "--generator", kind, "--unconditional", "--count", "1"]
    arguments += ["--out", str(tmp_path / "syn"), "--trust-remote-code", "--device", "cpu"]
    environment = {**os.environ, "HF_ENDPOINT": gate, "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-m", "evaluate", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"accept the terms at https://huggingface.co/{page}" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert "--model" in done.stderr
    assert not (tmp_path / "syn").exists()
