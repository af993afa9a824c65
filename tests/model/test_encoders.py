"""H0-mini without its gated weights: construction, output, sources of weights, errors."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.errors import UserError
from model.encoders import (
    Encoder,
    EncoderOutput,
    antialias_bicubic_matrix,
    encoder_spec,
    load_encoder,
    load_spec,
    resize_tokens,
)
from model.encoders.construct import TimmConstruction, frozen

SLIDE = Path(__file__).parents[1] / "data/slides/CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("h0-mini", "random:0")


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    with openslide.OpenSlide(str(SLIDE)) as slide:
        corners = [(224 * i, 224 * j) for i, j in ((1, 2), (4, 2), (4, 6))]
        return np.stack(
            [np.asarray(slide.read_region(c, 0, (224, 224)).convert("RGB")) for c in corners]
        )


@pytest.fixture(scope="module")
def encoded(encoder: Encoder, tiles: np.ndarray) -> EncoderOutput:
    return encoder.encode(tiles)


def test_h0_mini_has_swiglu_layer_scale_and_four_registers(encoder: Encoder) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in encoder.network.state_dict().items()}
    assert shapes["pos_embed"] == (1, 256, 768)
    assert shapes["reg_token"] == (1, 4, 768)
    assert shapes["blocks.11.mlp.fc1.weight"] == (4096, 768)
    assert shapes["blocks.11.mlp.fc2.weight"] == (768, 2048)
    assert shapes["blocks.0.ls1.gamma"] == (768,)
    assert len(shapes) == 175


def test_encode_equals_the_network_by_hand(
    encoder: Encoder, tiles: np.ndarray, encoded: EncoderOutput
) -> None:
    rgb = tiles[:1].transpose(0, 3, 1, 2) / 255.0
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (encoder.spec.mean, encoder.spec.std))
    with torch.no_grad():
        raw = encoder.network(torch.from_numpy((rgb - mean) / std).float())
    assert raw.shape == (1, 261, 768)
    grid = raw[:, 5:].transpose(1, 2).reshape(1, 768, 16, 16)
    grid = F.interpolate(grid, (14, 14), mode="bicubic", antialias=True)
    assert encoded.tokens is not None
    want = grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoded.cls[:1], raw[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(encoded.tokens[:1], want, atol=1e-4, rtol=0)


def test_layouts_and_arrays_give_the_same_features(encoder: Encoder, tiles: np.ndarray) -> None:
    nhwc = tiles[:1]
    nhwc.flags.writeable = False
    reference = encoder.encode(nhwc, tokens=False)
    nchw = encoder.encode(torch.tensor(nhwc).permute(0, 3, 1, 2), tokens=False)
    assert reference.tokens is None
    assert torch.equal(reference.cls, nchw.cls)


def test_random_features_tell_tiles_apart(encoder: Encoder, encoded: EncoderOutput) -> None:
    cls = encoded.cls
    directions = F.normalize(cls, dim=-1)
    cosines = (directions @ directions.T)[~torch.eye(len(cls), dtype=torch.bool)]
    assert cls.std(dim=0).mean() > 0.3  # 0.005 with the layer scales at their initial 1e-5
    assert cosines.mean() < 0.95
    assert torch.allclose(encoder.network.state_dict()["blocks.3.ls2.gamma"], torch.ones(768))


def test_random_weights_depend_on_the_seed_alone(encoder: Encoder) -> None:
    construction = encoder.spec.construction
    assert isinstance(construction, TimmConstruction)
    options = frozen(**{**construction.options, "depth": 1})
    spec = replace(encoder.spec, construction=replace(construction, options=options))
    first = load_spec(spec, "random:0")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again = load_spec(spec, "random:0")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.is_random
    assert again.weights == "random:0"
    assert again.weights_sha256 == first.weights_sha256
    assert load_spec(spec, "random:1").weights_sha256 != first.weights_sha256


@pytest.mark.full
def test_bfloat16_stays_close_and_returns_float32(
    encoder: Encoder, tiles: np.ndarray, encoded: EncoderOutput
) -> None:
    half = Encoder(
        encoder.spec, deepcopy(encoder.network), "random:0", device="cpu", dtype=torch.bfloat16
    )
    got = half.encode(tiles[:1])
    assert got.tokens is not None
    assert got.cls.dtype == got.tokens.dtype == torch.float32
    assert F.cosine_similarity(got.cls, encoded.cls[:1]).min() > 0.99
    assert half.weights_sha256 == encoder.weights_sha256


def test_a_local_file_gives_the_weights_it_holds(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "h0-mini.pt"
    torch.save(encoder.network.state_dict(), path)
    loaded = load_encoder("h0-mini", str(path))
    assert loaded.weights_sha256 == encoder.weights_sha256
    assert not loaded.is_random
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_files_that_do_not_fit_are_one_clear_line(encoder: Encoder, tmp_path: Path) -> None:
    state = dict(encoder.network.state_dict())
    state["head.weight"] = torch.zeros(2, 768)
    del state["cls_token"]
    state["norm.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "foreign.safetensors")
    save_file(encoder.network.state_dict(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.pt").write_bytes(b"not an archive")
    (tmp_path / "notes.txt").write_text("weights?")
    expected = {
        "foreign.safetensors": ["cls_token", "head.weight", "norm.bias [5]"],
        "cut.safetensors": ["damaged"],
        "junk.pt": ["damaged"],
        "notes.txt": ["unknown file type"],
        "absent.pt": ["no such file"],
    }
    for name, words in expected.items():
        with pytest.raises(UserError) as caught:
            load_encoder("h0-mini", str(tmp_path / name))
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in [name, *words])


def test_pickled_code_is_refused_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"w": Touch()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match=r"trap\.pt"):
        load_encoder("h0-mini", str(tmp_path / "trap.pt"))
    assert not (tmp_path / "ran").exists()


def test_an_unreachable_hub_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_encoder("h0-mini", "hub:bioptimus/absent-for-this-test")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("accept the terms", "HF_TOKEN", "local weights file"))


@pytest.mark.parametrize("weights", ["random", "random:", "random:-1", "random:x", "none", ""])
def test_weights_strings_that_mean_nothing_are_refused(weights: str) -> None:
    with pytest.raises(UserError):
        load_encoder("h0-mini", weights)


def test_an_unknown_encoder_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'h0-mini'"):
        encoder_spec("h0mini")


def test_wrong_tiles_are_refused(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="224 px"):
        encoder.encode(np.zeros((1, 256, 256, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        encoder.encode(np.zeros((1, 224, 224, 3), np.float32))
    with pytest.raises(ValueError, match="expected"):
        encoder.encode(np.zeros((224, 224, 3), np.uint8))


@pytest.mark.parametrize(("size_in", "size_out"), [(16, 14), (16, 7), (37, 14), (14, 16)])
def test_the_matrix_is_torchs_antialiased_bicubic(size_in: int, size_out: int) -> None:
    matrix = antialias_bicubic_matrix(size_in, size_out)
    grid = torch.randn(2, 3, size_in, size_in, dtype=torch.float64)
    want = F.interpolate(grid, (size_out, size_out), mode="bicubic", antialias=True)
    torch.testing.assert_close(matrix @ grid @ matrix.T, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.sum(1), torch.ones(size_out, dtype=torch.float64))


def test_tokens_resize_as_grids_in_one_product() -> None:
    tokens = torch.randn(2, 256, 8)
    grid = tokens.transpose(1, 2).reshape(2, 8, 16, 16)
    # in float64: torch's own float32 result is up to 4e-6 away from it
    want = F.interpolate(grid.double(), (14, 14), mode="bicubic", antialias=True).float()
    got = resize_tokens(tokens, 16, 14)
    torch.testing.assert_close(got, want.flatten(2).transpose(1, 2), atol=1e-6, rtol=0)
    assert torch.equal(resize_tokens(tokens, 16, 16), tokens)
    with pytest.raises(ValueError, match="196"):
        resize_tokens(tokens, 14, 14)
