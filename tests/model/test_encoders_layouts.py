"""Published checkpoints of every layout, through the real loading code."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from model.encoders import ENCODERS, Encoder, EncoderSpec, load_spec
from model.encoders.construct import TimmConstruction, frozen
from model.encoders.layouts import resample_positions
from model.weights import Tensors, write_tensors

TILE = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)


def two_blocks(name: str) -> EncoderSpec:
    spec = ENCODERS[name]
    construction = spec.construction
    assert isinstance(construction, TimmConstruction)
    options = frozen(**{**construction.options, "depth": 2})
    return replace(spec, construction=replace(construction, options=options))


def as_timm(tensors: Tensors) -> Tensors:
    return dict(tensors)


def as_meta(tensors: Tensors) -> Tensors:
    """The original DINOv2 repository: timm's names and a mask token."""
    return {**tensors, "mask_token": torch.zeros(1, tensors["cls_token"].shape[-1])}


def as_transformers(tensors: Tensors) -> Tensors:
    """transformers' Dinov2Model, name by name from its documented modules."""
    width = tensors["cls_token"].shape[-1]
    theirs: Tensors = {
        "embeddings.cls_token": tensors["cls_token"],
        "embeddings.mask_token": torch.zeros(1, width),
        "embeddings.position_embeddings": tensors["pos_embed"],
    }
    for kind in ("weight", "bias"):
        theirs[f"embeddings.patch_embeddings.projection.{kind}"] = tensors[
            f"patch_embed.proj.{kind}"
        ]
        theirs[f"layernorm.{kind}"] = tensors[f"norm.{kind}"]
        for i in (0, 1):
            ours, layer = f"blocks.{i}", f"encoder.layer.{i}"
            parts = tensors[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip(("query", "key", "value"), parts, strict=True):
                theirs[f"{layer}.attention.attention.{part}.{kind}"] = value
            theirs[f"{layer}.attention.output.dense.{kind}"] = tensors[f"{ours}.attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"{layer}.{name}.{kind}"] = tensors[f"{ours}.{name}.{kind}"]
    for i in (0, 1):
        for scale in (1, 2):
            gain = tensors.get(f"blocks.{i}.ls{scale}.gamma")
            if gain is not None:
                theirs[f"encoder.layer.{i}.layer_scale{scale}.lambda1"] = gain
    return theirs


def as_transformers_swiglu(tensors: Tensors) -> Tensors:
    """Gated feed-forward layers have names of their own there."""
    names = {".mlp.fc1.": ".mlp.weights_in.", ".mlp.fc2.": ".mlp.weights_out."}
    theirs = {}
    for key, value in as_transformers(tensors).items():
        for ours, name in names.items():
            key = key.replace(ours, name)
        theirs[key] = value
    return theirs


def as_transformers_registers(tensors: Tensors) -> Tensors:
    """Register tokens, and a position of the CLS token that its network adds at every pass."""
    cls_position = tensors["cls_token"]
    return {
        **as_transformers_swiglu(tensors),
        "embeddings.register_tokens": tensors["reg_token"],
        "embeddings.cls_token": torch.zeros_like(cls_position),
        "embeddings.position_embeddings": torch.cat([cls_position, tensors["pos_embed"]], dim=1),
    }


def as_meta_registers(tensors: Tensors) -> Tensors:
    """The original repository's names of registers and gated layers."""
    names = {"reg_token": "register_tokens", ".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
    theirs = as_meta(tensors)
    for ours, name in names.items():
        theirs = {key.replace(ours, name): value for key, value in theirs.items()}
    cls_position = tensors["cls_token"]
    return {
        **theirs,
        "cls_token": torch.zeros_like(cls_position),
        "pos_embed": torch.cat([cls_position, tensors["pos_embed"]], dim=1),
    }


def as_transformers_vit(tensors: Tensors) -> Tensors:
    """transformers' ViTModel, name by name, with the pooling layer that it may have."""
    width = tensors["cls_token"].shape[-1]
    names = {".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.",
             ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense."}  # fmt: skip
    theirs: Tensors = {"pooler.dense.weight": torch.zeros(width, width)}
    for key, value in as_transformers(tensors).items():
        for ours, name in names.items():
            key = key.replace(ours, name)
        theirs[key] = value
    theirs.pop("embeddings.mask_token")
    return theirs


VITS = [  # the others have h0-mini's layout: theirs run under `full`, entire
    ("h0-mini", as_timm),
    ("phikon-v2", as_transformers),
    ("dinov2-b", as_timm),
    ("dinov2-b", as_meta),
    ("dinov2-b", as_transformers),
    ("hibou-b", as_meta_registers),
    ("hibou-b", as_transformers_registers),
    ("phikon", as_transformers_vit),
]


@pytest.mark.parametrize(("name", "publish"), VITS)
def test_a_published_checkpoint_gives_its_network(
    name: str, publish: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    spec = two_blocks(name)
    seeded = load_spec(spec, "random:3")
    published = publish(seeded.network.state_dict())
    want = seeded.encode(TILE)
    assert_loads(spec, published, tmp_path / "model.safetensors", seeded, want.cls, want.tokens)


def assert_loads(
    spec: EncoderSpec,
    published: Tensors,
    path: Path,
    seeded: Encoder,
    cls: Tensor,
    tokens: Tensor | None,
) -> None:
    write_tensors(path, {key: value.clone() for key, value in published.items()})
    loaded = load_spec(spec, str(path))
    got = loaded.encode(TILE)
    assert loaded.weights_sha256 == seeded.weights_sha256
    assert not loaded.is_random
    assert torch.equal(got.cls, cls)
    assert (tokens is None) == (got.tokens is None)
    if tokens is not None and got.tokens is not None:
        assert torch.equal(got.tokens, tokens)


@pytest.mark.parametrize(("container", "prefix"), [
    ("", ""), ("state_dict", "module."), ("model", ""), ("teacher", "backbone."),
])  # fmt: skip
def test_containers_and_wrappers_of_pytorch_files(
    container: str, prefix: str, tmp_path: Path
) -> None:
    spec = two_blocks("h0-mini")
    seeded = load_spec(spec, "random:3")
    wrapped = {prefix + key: value for key, value in seeded.network.state_dict().items()}
    path = tmp_path / "checkpoint.pt"
    torch.save({container: wrapped, "epoch": 3} if container else wrapped, path)
    assert load_spec(spec, str(path)).weights_sha256 == seeded.weights_sha256


def test_half_precision_files_are_taken_as_float32(tmp_path: Path) -> None:
    spec = two_blocks("h0-mini")
    state = load_spec(spec, "random:3").network.state_dict()
    write_tensors(tmp_path / "half.safetensors", {k: v.bfloat16() for k, v in state.items()})
    write_tensors(
        tmp_path / "whole.safetensors", {k: v.bfloat16().float() for k, v in state.items()}
    )
    half, whole = (load_spec(spec, str(tmp_path / f"{n}.safetensors")) for n in ("half", "whole"))
    assert half.weights_sha256 == whole.weights_sha256


def test_what_is_missing_or_unexpected_is_named(tmp_path: Path) -> None:
    spec = two_blocks("phikon-v2")
    published = as_transformers(load_spec(spec, "random:3").network.state_dict())
    del published["encoder.layer.1.attention.attention.key.weight"]
    published["classifier.weight"] = torch.zeros(2, 1024)
    write_tensors(tmp_path / "odd.safetensors", {k: v.clone() for k, v in published.items()})
    with pytest.raises(UserError) as caught:
        load_spec(spec, str(tmp_path / "odd.safetensors"))
    message = str(caught.value)
    assert "\n" not in message
    assert "missing blocks.1.attn.qkv.weight" in message
    assert "classifier.weight" in message
    assert "odd.safetensors" in message


# --- DINOv2's position embeddings --------------------------------------------------------------


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.75, as F.interpolate's bicubic has it."""
    x, a = np.abs(x), -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def test_positions_of_another_grid_are_those_of_the_original_code() -> None:
    """A slow oracle: sample i lies at (i + 1/2) · 37 / 16.1 - 1/2, borders are held."""
    torch.manual_seed(0)
    position = torch.randn(1, 1 + 37 * 37, 5)
    got = resample_positions(position, 16)
    grid = position[0, 1:].reshape(37, 37, 5).double().numpy()
    matrix = np.zeros((16, 37))
    for i in range(16):
        source = (i + 0.5) * 37 / 16.1 - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            matrix[i, min(max(tap, 0), 36)] += _cubic(np.array(source - tap))
    want = np.einsum("ia,jb,abd->ijd", matrix, matrix, grid).reshape(256, 5)
    assert torch.equal(got[:, :1], position[:, :1])
    np.testing.assert_allclose(got[0, 1:].numpy(), want, atol=2e-5)
    assert resample_positions(got, 16) is got


def test_dinov2_at_224_loads_the_518_checkpoint(tmp_path: Path) -> None:
    spec = two_blocks("dinov2-b")
    seeded = load_spec(spec, "random:3")
    wide = torch.randn(1, 1 + 37 * 37, 768, generator=torch.Generator().manual_seed(1))
    state = {**seeded.network.state_dict(), "pos_embed": wide}
    write_tensors(tmp_path / "518.safetensors", state)
    with torch.no_grad():
        seeded.network.get_parameter("pos_embed").copy_(resample_positions(wide, 16))
    loaded = load_spec(spec, str(tmp_path / "518.safetensors"))
    assert torch.equal(loaded.encode(TILE).cls, seeded.encode(TILE).cls)


# --- Inception ---------------------------------------------------------------------------------


def as_fid_file(tensors: Tensors) -> Tensors:
    """pytorch-fid's and torch-fidelity's file: 1008 classes, no auxiliary classifier."""
    return {**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def as_torchvision_file(tensors: Tensors) -> Tensors:
    """torchvision's file: 1000 classes and the auxiliary classifier."""
    auxiliary = {"AuxLogits.conv0.conv.weight": torch.zeros(128, 768, 1, 1)}
    classifier = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    return {**tensors, **classifier, **auxiliary}


def without_counters(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}


def test_both_inception_files_load_into_their_own_network_only(tmp_path: Path) -> None:
    fid, other = (
        replace(ENCODERS[name], input_px=107)  # the smallest sides do for its tensors
        for name in ("inception-v3", "inception-v3-torchvision")
    )
    seeded = {spec.name: load_spec(spec, "random:5") for spec in (fid, other)}
    files = {
        fid.name: as_fid_file(seeded[fid.name].network.state_dict()),
        other.name: without_counters(as_torchvision_file(seeded[other.name].network.state_dict())),
    }
    for spec, stranger in ((fid, other), (other, fid)):
        torch.save(files[spec.name], tmp_path / f"{spec.name}.pth")
        want = seeded[spec.name].encode(TILE)
        path = tmp_path / f"{spec.name}.safetensors"
        assert_loads(spec, files[spec.name], path, seeded[spec.name], want.cls, None)
        with pytest.raises(UserError, match=f"use --encoder {spec.name}"):
            load_spec(stranger, str(tmp_path / f"{spec.name}.pth"))
    assert seeded[fid.name].weights_sha256 == seeded[other.name].weights_sha256
    cls = [seeded[name].encode(TILE).cls for name in (fid.name, other.name)]
    assert not torch.allclose(*cls, rtol=0.05)  # the same tensors, another network
