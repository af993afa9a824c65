"""CytoSyn: folders round-trip, images depend on their seed alone, REPA-E checkpoints load."""

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from model.cytosyn import CytoSyn, Records
from model.images import from_uint8, to_uint8
from model.interpolant import Interpolant
from model.sampler import sample
from model.sit import SiT, SiTConfig
from model.vae import VAE, VAEConfig
from model.weights import tensors_sha256, write_tensors

SIT = SiTConfig.preset("tiny", latent_size=4, condition_dim=12)
STEPS = 4


def random_values(module: nn.Module, seed: int) -> None:
    """Overwrite the zero initialisations, so that the velocity is not 0 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def model() -> CytoSyn:
    torch.manual_seed(0)
    sit, vae = SiT(SIT), VAE(VAEConfig.preset("tiny"))
    vae.to(memory_format=torch.channels_last)  # as a trainer holds it and a loader gives it
    random_values(sit, 1)
    sit.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    sit.bn.running_var.copy_(torch.tensor([1.5, 0.5, 2.0, 1.0]))
    records = Records(encoder="h0-mini", encoder_is_random=True, mpp=0.5, sit="ema", vae="ema")
    return CytoSyn(sit, vae, interpolant=Interpolant("cosine"), records=records)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)


def test_images_have_the_tile_size_and_order(model: CytoSyn, features: np.ndarray) -> None:
    seeds = [1, 2, 3, 4, 5, 6]
    images = model.generate(
        features, num_images_per_prompt=2, num_inference_steps=STEPS, seed=seeds
    )
    assert model.tile_px == 32
    assert images.shape == (6, 32, 32, 3)
    assert images.dtype == np.uint8
    fourth = model.generate(features[1:2], num_inference_steps=STEPS, seed=[4])
    np.testing.assert_allclose(images[3].astype(int), fourth[0].astype(int), atol=1)


def test_an_image_depends_on_its_feature_and_seed_alone(
    model: CytoSyn, features: np.ndarray
) -> None:
    def run(rows: list[int], seed: object, **options: object) -> np.ndarray:
        images = model.generate(features[rows], num_inference_steps=STEPS, seed=seed, **options)
        return images.astype(int)

    together = run([0, 1, 2], [7, 8, 9])
    np.testing.assert_array_equal(run([0, 1, 2], [7, 8, 9]), together)
    torch.manual_seed(99)  # no global randomness takes part
    np.testing.assert_allclose(run([0, 1, 2], [7, 8, 9], batch_size=2), together, atol=1)
    np.testing.assert_allclose(run([2, 0], [9, 7]), together[[2, 0]], atol=1)
    assert np.abs(run([0], [8]) - together[0]).mean() > 1
    assert np.abs(run([1], [7]) - together[0]).mean() > 0.1
    derived = run([0, 1], 5)
    np.testing.assert_allclose(run([0], np.int64(5)), derived[:1], atol=1)
    assert np.abs(run([0], 6) - derived[:1]).mean() > 1


def test_lower_precision_is_the_samplers_and_not_the_decoders(
    model: CytoSyn, features: np.ndarray
) -> None:
    images = model.generate(
        features, num_inference_steps=STEPS, seed=[1, 2, 3], dtype=torch.bfloat16
    )
    latents = sample(
        model.sit,
        torch.from_numpy(features),
        seeds=[1, 2, 3],
        steps=STEPS,
        guidance_scale=2.5,
        guidance_high=0.75,
        interpolant=model.interpolant,
        dtype=torch.bfloat16,
    )
    np.testing.assert_array_equal(images, model.decode(latents))
    assert (images != model.decode(latents, dtype=torch.bfloat16)).any()


def test_guidance_acts_only_with_a_condition(model: CytoSyn, features: np.ndarray) -> None:
    def run(condition: np.ndarray | None, scale: float) -> np.ndarray:
        return model.generate(condition, num_inference_steps=STEPS, guidance_scale=scale, seed=[3])

    np.testing.assert_array_equal(run(None, 2.5), run(None, 1.0))
    assert (run(features[:1], 2.5) != run(features[:1], 1.0)).any()
    unconditional = model.generate(num_images_per_prompt=2, num_inference_steps=2, solver="ode")
    assert unconditional.shape == (2, 32, 32, 3)


def test_progress_counts_the_steps_of_all_batches(model: CytoSyn, features: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []
    model.generate(
        features,
        num_inference_steps=2,
        batch_size=2,
        solver="ode",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_generate_is_sample_denormalise_decode_round(model: CytoSyn) -> None:
    latents = torch.randn(2, 4, 4, 4)
    std, mean = model.sit.bn.running_var.sqrt(), model.sit.bn.running_mean
    raw = latents * std[:, None, None] + mean[:, None, None]
    with torch.no_grad():
        grey = (model.vae.decode(raw) + 1) / 2 * 255
    want = grey.clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(model.decode(latents), np.rint(want))
    truncated = model.decode(latents, legacy_truncate=True)
    np.testing.assert_allclose(truncated, np.floor(want), atol=1)
    assert (want - truncated).mean() == pytest.approx(0.5, abs=0.02)


def test_encode_normalises_the_posterior(model: CytoSyn) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        posterior = model.vae.encode(
            torch.from_numpy(images / 127.5 - 1).permute(0, 3, 1, 2).float()
        )
    variance = model.sit.bn.running_var[:, None, None] + 1e-4
    want = (posterior.mean - model.sit.bn.running_mean[:, None, None]) / variance.sqrt()
    torch.testing.assert_close(model.encode(images), want, atol=1e-5, rtol=1e-5)
    noise = torch.randn(2, 4, 4, 4)
    shift = (posterior.logvar / 2).exp() * noise / variance.sqrt()
    torch.testing.assert_close(
        model.encode(images, noise=noise), want + shift, atol=1e-5, rtol=1e-5
    )


def test_bytes_survive_the_way_to_minus_one_one_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert torch.equal(to_uint8(from_uint8(images)), images)
    beyond = torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)
    assert to_uint8(beyond).flatten().tolist() == [0, 255, 128]


def test_a_folder_round_trips(model: CytoSyn, features: np.ndarray, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "config.json",
        "sit.safetensors",
        "vae.safetensors",
    }
    again = CytoSyn.from_pretrained(tmp_path / "model")
    assert tensors_sha256(again.state_dict()) == tensors_sha256(model.state_dict())
    assert (again.records, again.interpolant) == (model.records, model.interpolant)
    assert (again.sit.config, again.vae.config) == (model.sit.config, model.vae.config)
    assert not any(p.requires_grad for p in again.parameters())
    kernels = again.vae.decoder.conv_in.weight
    assert kernels.is_contiguous(memory_format=torch.channels_last)
    addresses = [tensor.data_ptr() % 64 for tensor in again.state_dict().values()]
    assert not any(addresses)  # else products round by where the file's header ends
    options = {"num_inference_steps": STEPS, "seed": [5, 6, 7]}
    np.testing.assert_array_equal(
        again.generate(features, **options), model.generate(features, **options)
    )


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_damaged_folders_are_one_clear_line(model: CytoSyn, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    (broken("cut") / "sit.safetensors").write_bytes(b"\0" * 100)
    (broken("absent") / "vae.safetensors").unlink()
    (broken("empty") / "config.json").unlink()
    (broken("torn") / "config.json").write_text('{"format": "cyt')
    (broken("other") / "config.json").write_text('{"_class_name": "DiTPipeline"}')
    edit_config(broken("newer"), format_version=2)
    edit_config(broken("wide"), sit={**SIT.to_dict(), "hidden_size": 256})
    edit_config(broken("typo"), sit={"hiden_size": 256})
    edit_config(broken("kind"), vae={"channel_multipliers": 3})
    edit_config(broken("list"), records=["h0-mini"])
    foreign = {"conv.weight": torch.zeros(2), "conv.bias": torch.zeros(2)}
    write_tensors(broken("foreign") / "sit.safetensors", foreign)
    mixed = broken("mixed")
    strangers = {k: v + 1 for k, v in model.vae.state_dict().items()}
    write_tensors(mixed / "vae.safetensors", strangers)
    expected = {
        "cut": ["sit.safetensors", "damaged"],
        "absent": ["vae.safetensors", "no such file"],
        "empty": ["config.json"],
        "torn": ["config.json", "JSON"],
        "other": ["config.json", "cytosyn"],
        "newer": ["format_version", "2"],
        "wide": ["sit.safetensors", "pos_embed [1, 4, 128] where [1, 4, 256] is expected"],
        "typo": ["config.json", "hiden_size", "hidden_size"],
        "kind": ["config.json", "channel_multipliers", "expected a list"],
        "list": ["config.json", "another kind"],
        "foreign": [
            "sit.safetensors",
            "missing pos_embed, x_embedder.proj.weight, x_embedder.proj.bias and",
            "unexpected conv.bias, conv.weight",
        ],
        "mixed": ["vae.safetensors", "sum"],
        "nowhere/at/all": ["no such folder", "hub id"],
    }
    for name, words in expected.items():
        with pytest.raises(UserError) as caught:
            CytoSyn.from_pretrained(tmp_path / name)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_TOKEN"):
        CytoSyn.from_pretrained("nobody/absent-for-this-test")


@pytest.mark.parametrize("source", ["lab/slides", "hub:lab/slides", "lab/slides@v1"])
def test_a_hub_id_is_read_from_the_hubs_cache(
    model: CytoSyn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """As on a node without a network, after another machine has filled the shared cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--lab--slides", "0123456789abcdef" * 2 + "01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / ("v1" if "@" in source else "main")).write_text(commit)
    model.save_pretrained(repository / "snapshots" / commit)
    again = CytoSyn.from_pretrained(source)
    assert tensors_sha256(again.state_dict()) == tensors_sha256(model.state_dict())
    with pytest.raises(UserError, match="hub:lab/slides@v2"):
        CytoSyn.from_pretrained("lab/slides@v2")


def test_wrong_requests_are_refused(model: CytoSyn, features: np.ndarray) -> None:
    for options, words in (
        ({"features": features[:, :5]}, r"\[3, 5\].*\[n, 12\]"),
        ({"features": features[:0]}, r"\[0, 12\]"),
        ({"features": features, "seed": [1]}, "1 seeds for 3 images"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"batch_size": 0}, "batch_size"),
        ({"solver": "rk45"}, "solver"),
        (
            {"features": features * [[1], [np.nan], [1]]},
            r"1 of 3 images are not finite \(first: 1\)",
        ),
    ):
        with pytest.raises(UserError, match=words):
            model.generate(**{"num_inference_steps": 1, **options})
    with pytest.raises(UserError, match="latent channels"):
        CytoSyn(model.sit, VAE(VAEConfig.preset("tiny", latent_channels=8)))


REPA_E_SIT = SiTConfig(
    latent_size=4,
    hidden_size=384,
    depth=2,
    num_heads=6,
    encoder_depth=1,
    projector_dim=32,
    token_dim=16,
    conditioning="label",
    num_classes=10,
    train_pos_embed=True,
)
REPA_E_VAE = VAEConfig(
    base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,)
)


@cache
def repa_e_content() -> dict:
    """What a file of the public code holds: seven parts, arguments as a Namespace."""
    torch.manual_seed(3)
    model, ema, vae = SiT(REPA_E_SIT), SiT(REPA_E_SIT), VAE(REPA_E_VAE)
    random_values(model, 4)
    random_values(ema, 5)
    ema.bn.running_mean.fill_(0.25)
    arguments = argparse.Namespace(
        model="SiT-S/2", encoder_depth=1, path_type="cosine", enc_type="dinov2-vit-b"
    )
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "vae": vae.state_dict(),
        "discriminator": {"main.0.bias": torch.zeros(64)},
        "opt": {"state": {}, "param_groups": []},
        "args": arguments,
        "steps": 400_000,
    }


def repa_e_checkpoint(path: Path, **changes: object) -> dict:
    """Write that content, with parts changed, and return it."""
    content = {**repa_e_content(), **changes}
    torch.save(content, path)
    return content


@pytest.mark.parametrize("use_ema", [True, False])
def test_repa_e_checkpoints_load(tmp_path: Path, use_ema: bool) -> None:
    content = repa_e_checkpoint(tmp_path / "0400000.pt")
    model = CytoSyn.from_repa_e(tmp_path / "0400000.pt", use_ema=use_ema)
    part = content["ema" if use_ema else "model"]
    assert tensors_sha256(model.sit.state_dict()) == tensors_sha256(part)
    assert tensors_sha256(model.vae.state_dict()) == tensors_sha256(content["vae"])
    assert model.vae.config == REPA_E_VAE
    assert model.sit.config.to_dict() == {**REPA_E_SIT.to_dict(), "train_pos_embed": False}
    assert model.interpolant.path == "cosine"
    assert model.records == Records(
        encoder="dinov2-vit-b",
        tile_px=8,
        training_step=400_000,
        sit="ema" if use_ema else "raw",
        vae="raw",
    )
    images = model.generate(torch.tensor([3, 9]), num_inference_steps=2, solver="ode")
    assert images.shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match=r"\[0, 9\]"):
        model.generate(torch.tensor([10]), num_inference_steps=2)


@pytest.mark.parametrize(
    ("arguments", "has_null"),
    [
        ({}, True),  # the code's default is 1000 classes, which 10 rows tell nothing of
        ({"cfg_prob": 0.1}, True),
        ({"cfg_prob": 0.0}, False),
        ({"num_classes": 10, "cfg_prob": 0.1}, False),
        ({"num_classes": 9, "cfg_prob": 0.0}, True),  # the table itself decides
        ({"num_classes": 10}, False),
        ({"num_classes": 9}, True),
    ],
)
def test_a_repa_e_table_of_classes_with_and_without_the_null_class(
    tmp_path: Path, arguments: dict[str, float], has_null: bool
) -> None:
    content = repa_e_content()
    key = "y_embedder.embedding_table.weight"
    sit = {**content["ema"], key: content["ema"][key][:10].clone()}
    namespace = argparse.Namespace(path_type="linear", encoder_depth=1, **arguments)
    repa_e_checkpoint(tmp_path / "x.pt", ema=sit, args=namespace)
    model = CytoSyn.from_repa_e(tmp_path / "x.pt")
    assert model.sit.config.conditioning == ("label" if has_null else "label-only")
    assert model.sit.config.num_classes == 10 - has_null
    assert model.sit.state_dict()[key].equal(sit[key])
    last = torch.tensor([9 - has_null])
    quick = {"num_inference_steps": 2, "solver": "ode"}
    assert model.generate(last, guidance_scale=1.0, **quick).shape == (1, 8, 8, 3)
    with pytest.raises(UserError, match=rf"\[0, {9 - has_null}\]"):
        model.generate(last + 1, **quick)
    if not has_null:
        for features in (last, None):
            with pytest.raises(
                UserError, match=r"no null class: give labels, and guidance_scale=1"
            ):
                model.generate(features, **quick)
    model.save_pretrained(tmp_path / "model")
    assert CytoSyn.from_pretrained(tmp_path / "model").sit.config == model.sit.config


def test_foreign_repa_e_files_are_one_clear_line(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    content = repa_e_checkpoint(tmp_path / "good.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    repa_e_checkpoint(tmp_path / "code.pt", args=Trap())
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:5000])
    sit = dict(content["ema"])
    del sit["final_layer.linear.bias"]
    repa_e_checkpoint(tmp_path / "lacks.pt", ema=sit)
    repa_e_checkpoint(tmp_path / "flat.pt", ema={**content["ema"], "pos_embed": torch.zeros(3)})
    thin = {**content["ema"], "x_embedder.proj.weight": torch.zeros(3)}
    repa_e_checkpoint(tmp_path / "thin.pt", ema=thin)
    narrow = {**content["vae"], "encoder.conv_in.weight": torch.zeros(0)}
    repa_e_checkpoint(tmp_path / "narrow.pt", vae=narrow)
    repa_e_checkpoint(tmp_path / "vae.pt", vae={"decoder.conv_in.bias": torch.zeros(2)})
    expected = {
        "foreign.pt": "'ema'",
        "code.pt": "damaged, incomplete or not a plain weights file",
        "cut.pt": "damaged",
        "lacks.pt": "missing final_layer.linear.bias",
        "flat.pt": "the SiT in it lacks or misshapes",
        "thin.pt": "the SiT in it lacks or misshapes",
        "narrow.pt": "the VAE in it lacks or misshapes",
        "vae.pt": "encoder.conv_in.weight",
        "absent.pt": "no such file",
    }
    for name, words in expected.items():
        with pytest.raises(UserError) as caught:
            CytoSyn.from_repa_e(tmp_path / name)
        assert name in str(caught.value)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
