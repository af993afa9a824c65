"""SD-VAE: counts, keys and operations of the specification, oracles, layouts, recompute."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from model.vae import VAE, Posterior, ResBlock, SpatialAttention, VAEConfig, group_norm_silu
from model.vae_keys import from_native, to_native
from model.weights import tensors_sha256


def tiny(**overrides: object) -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig.preset("tiny", **overrides))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def f8d4() -> VAE:
    with torch.device("meta"):
        return VAE()


def test_f8d4_counts(f8d4: VAE) -> None:
    assert parameters(f8d4) == 83_653_863
    assert parameters(f8d4.encoder) + parameters(f8d4.quant_conv) == 34_163_664
    assert parameters(f8d4.decoder) + parameters(f8d4.post_quant_conv) == 49_490_199
    assert len(f8d4.state_dict()) == 248


def test_f8d4_operations_a_224_px_tile(f8d4: VAE) -> None:
    with FlopCounterMode(display=False) as encoding:
        posterior = f8d4.encode(torch.zeros(1, 3, 224, 224, device="meta"))
    with FlopCounterMode(display=False) as decoding:
        image = f8d4.decode(posterior.mean)
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, 28, 28)
    assert image.shape == (1, 3, 224, 224)
    assert encoding.get_total_flops() / 1e9 == pytest.approx(208.4, abs=0.05)
    assert decoding.get_total_flops() / 1e9 == pytest.approx(476.0, abs=0.05)


def state_of_the_specification() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the CompVis SD-VAE f8d4."""
    state: dict[str, tuple[int, ...]] = {}

    def conv(name: str, channels_in: int, channels_out: int, side: int = 3) -> None:
        state[f"{name}.weight"] = (channels_out, channels_in, side, side)
        state[f"{name}.bias"] = (channels_out,)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = state[f"{name}.bias"] = (channels,)

    def block(name: str, channels_in: int, channels_out: int) -> None:
        norm(f"{name}.norm1", channels_in)
        conv(f"{name}.conv1", channels_in, channels_out)
        norm(f"{name}.norm2", channels_out)
        conv(f"{name}.conv2", channels_out, channels_out)
        if channels_in != channels_out:
            conv(f"{name}.nin_shortcut", channels_in, channels_out, 1)

    for side, ends in (("encoder", (3, 128, 512, 8)), ("decoder", (4, 512, 128, 3))):
        conv(f"{side}.conv_in", *ends[:2])
        norm(f"{side}.norm_out", ends[2])
        conv(f"{side}.conv_out", *ends[2:])
        block(f"{side}.mid.block_1", 512, 512)
        norm(f"{side}.mid.attn_1.norm", 512)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{layer}", 512, 512, 1)
        block(f"{side}.mid.block_2", 512, 512)
    for level, (before, here) in enumerate(((128, 128), (128, 256), (256, 512), (512, 512))):
        for index in range(2):
            block(f"encoder.down.{level}.block.{index}", here if index else before, here)
    for level in (0, 1, 2):
        conv(f"encoder.down.{level}.downsample.conv", *[(128, 256, 512)[level]] * 2)
    for level, (before, here) in enumerate(((256, 128), (512, 256), (512, 512), (512, 512))):
        for index in range(3):
            block(f"decoder.up.{level}.block.{index}", here if index else before, here)
    for level in (1, 2, 3):
        conv(f"decoder.up.{level}.upsample.conv", *[(256, 512, 512)[level - 1]] * 2)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    return state


def test_f8d4_has_compvis_keys_and_shapes(f8d4: VAE) -> None:
    expected = state_of_the_specification()
    assert len(expected) == 248
    assert {key: tuple(value.shape) for key, value in f8d4.state_dict().items()} == expected
    assert sum(".nin_shortcut.weight" in key for key in expected) == 4


def test_f16d32_attends_at_its_coarsest_level() -> None:
    with torch.device("meta"):
        vae = VAE(VAEConfig.preset("f16d32"))
        posterior = vae.encode(torch.zeros(1, 3, 256, 256))
        assert vae.decode(posterior.mean).shape == (1, 3, 256, 256)
    assert posterior.mean.shape == (1, 32, 16, 16)
    keys = vae.state_dict().keys()
    assert "encoder.down.4.attn.1.q.weight" in keys
    assert "decoder.up.4.attn.2.proj_out.bias" in keys
    assert "decoder.up.3.attn.0.q.weight" not in keys


def naive_attention(module: SpatialAttention, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    normed = module.norm(x)
    out = torch.empty_like(x)
    for b in range(batch):
        q, k, v = (
            conv(normed[b : b + 1]).reshape(channels, -1) for conv in (module.q, module.k, module.v)
        )
        weights = torch.softmax(q.T @ k / channels**0.5, dim=1)
        out[b] = (v @ weights.T).reshape(channels, height, width)
    return x + module.proj_out(out)


def test_attention_equals_the_written_out_softmax() -> None:
    attention = tiny().encoder.mid.attn_1
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(attention(x), naive_attention(attention, x), atol=1e-5, rtol=0)


def test_norm_and_silu_equal_the_formula() -> None:
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 8, 3, 5)
    grouped = x.reshape(2, 4, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    scaled = centred / (grouped.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    y = scaled.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(group_norm_silu(x, norm), y * torch.sigmoid(y), atol=1e-5, rtol=1e-5)


def test_downsampling_pads_right_and_bottom() -> None:
    down = tiny().encoder.down[0].downsample
    nn.init.constant_(down.conv.weight, 1.0)
    nn.init.zeros_(down.conv.bias)
    x = torch.zeros(1, 8, 4, 4)
    x[0, 0, 0, 0] = 1  # at the corner: in one window, which a symmetric pad would also give
    x[0, 0, 3, 3] = 10  # last row and column: only in the last window
    assert down(x)[0, 0].tolist() == [[1, 0], [0, 10]]


def test_posterior_against_torch_distributions() -> None:
    mean, logvar, noise = torch.randn(3, 2, 4, 3, 3).unbind()
    posterior = Posterior(mean, logvar)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    want = torch.distributions.kl_divergence(normal, prior).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), want)
    torch.testing.assert_close(posterior.sample(noise), mean + (logvar / 2).exp() * noise)
    assert torch.equal(posterior.mode(), mean)


def test_log_variance_is_held_in_range() -> None:
    vae = tiny()
    nn.init.constant_(vae.quant_conv.bias, 1000.0)
    assert vae.encode(torch.zeros(1, 3, 32, 32)).logvar.max() == 20.0
    nn.init.constant_(vae.quant_conv.bias, -1000.0)
    assert vae.encode(torch.zeros(1, 3, 32, 32)).logvar.min() == -30.0


def test_forward_is_encode_sample_decode_and_reaches_every_parameter() -> None:
    vae, images, noise = tiny(), torch.randn(2, 3, 32, 40), torch.randn(2, 4, 4, 5)
    out = vae(images, noise)
    torch.testing.assert_close(out.latents, vae.encode(images).sample(noise))
    torch.testing.assert_close(out.reconstruction, vae.decode(out.latents))
    out.reconstruction.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_recompute_and_channels_last_change_no_gradient() -> None:
    images, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4)
    gradients = []
    for recompute, layout in ((False, torch.contiguous_format), (True, torch.channels_last)):
        vae = tiny().to(memory_format=layout)
        vae.recompute = recompute
        assert vae.recompute == recompute
        vae(images.contiguous(memory_format=layout), noise).reconstruction.abs().mean().backward()
        gradients.append([p.grad for p in vae.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-3)


class OperatorCount(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_recompute_repeats_norms_in_the_backward_pass_but_no_convolution(
    backend: str | None,
) -> None:
    """Compiled: with the decompositions and the partitioner of inductor."""
    config = VAEConfig.preset("tiny")
    backward = {}
    for recompute in (False, True):
        blocks = nn.Sequential(
            ResBlock(8, 16, config), ResBlock(16, 16, config), nn.Conv2d(16, 3, 1)
        )
        for block in blocks[:2]:
            block.recompute = recompute
        torch._dynamo.reset()
        call = torch.compile(blocks, backend=backend) if backend else blocks
        loss = call(torch.randn(1, 8, 16, 16)).mean()
        with OperatorCount() as count:
            loss.backward()
        backward[recompute] = count.calls
    moments = "var_mean" if backend else "native_group_norm"
    assert (backward[False][moments], backward[True][moments]) == (0, 4)
    assert backward[True]["convolution"] == backward[False]["convolution"] == 0


@pytest.mark.parametrize("width", [32, 64])
def test_recompute_keeps_a_blocks_input_and_its_first_convolutions_output(width: int) -> None:
    """Without it: also both norms' and both SiLUs' outputs, six maps of one size in all."""
    block = ResBlock(width, width, VAEConfig(base_channels=width))
    kept = {}
    for recompute in (False, True):
        block.recompute = recompute
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        x = torch.randn(1, width, 16, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = block(x)
        kept[recompute] = sum(size == x.numel() for size in sizes.values())
        output.sum().backward()
    assert kept == {False: 6, True: 2}


@pytest.mark.parametrize("recompute", [False, True])
def test_it_compiles_without_graph_breaks(recompute: bool) -> None:
    vae = tiny()
    vae.recompute = recompute
    images, noise = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
    torch._dynamo.reset()
    report = torch._dynamo.explain(vae)(images, noise)
    assert report.graph_break_count == 0, report.break_reasons


def diffusers_key_by_hand(levels: int) -> dict[str, str]:
    """Spell the mapping of the specification out for one level count, without attention levels."""
    pairs = {}
    for part in ("weight", "bias"):
        for side, stack, far in (("encoder", "down", levels - 1), ("decoder", "up", 0)):
            pairs[f"{side}.conv_in.{part}"] = f"{side}.conv_in.{part}"
            pairs[f"{side}.conv_out.{part}"] = f"{side}.conv_out.{part}"
            pairs[f"{side}.norm_out.{part}"] = f"{side}.conv_norm_out.{part}"
            for ours, theirs in (
                ("norm", "group_norm"),
                ("q", "to_q"),
                ("k", "to_k"),
                ("v", "to_v"),
                ("proj_out", "to_out.0"),
            ):
                pairs[f"{side}.mid.attn_1.{ours}.{part}"] = (
                    f"{side}.mid_block.attentions.0.{theirs}.{part}"
                )
            for layer in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"):
                theirs = layer.replace("nin", "conv")
                for n in (1, 2):
                    pairs[f"{side}.mid.block_{n}.{layer}.{part}"] = (
                        f"{side}.mid_block.resnets.{n - 1}.{theirs}.{part}"
                    )
                for i in range(levels):
                    block = i if stack == "down" else levels - 1 - i
                    for j in range(3):
                        pairs[f"{side}.{stack}.{i}.block.{j}.{layer}.{part}"] = (
                            f"{side}.{stack}_blocks.{block}.resnets.{j}.{theirs}.{part}"
                        )
            for i in range(levels):
                if i != far:
                    block = i if stack == "down" else levels - 1 - i
                    pairs[f"{side}.{stack}.{i}.{stack}sample.conv.{part}"] = (
                        f"{side}.{stack}_blocks.{block}.{stack}samplers.0.conv.{part}"
                    )
        for conv in ("quant_conv", "post_quant_conv"):
            pairs[f"{conv}.{part}"] = f"{conv}.{part}"
    return pairs


def test_diffusers_keys_are_the_specifications(f8d4: VAE) -> None:
    by_hand = diffusers_key_by_hand(levels=4)
    native = f8d4.state_dict()
    renamed = from_native(
        {k: torch.empty(v.shape, device="meta") for k, v in native.items()}, "diffusers"
    )
    assert list(renamed) == [by_hand[key] for key in native]
    assert renamed["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)


@pytest.mark.full  # importing diffusers takes longer than all other tests of this file
@pytest.mark.parametrize("preset", ["f8d4", "f16d32", "tiny"])
def test_diffusers_own_autoencoder_has_these_keys_and_shapes(preset: str) -> None:
    with torch.device("meta"):
        ours, theirs = VAE(VAEConfig.preset(preset)), diffusers_vae(VAEConfig.preset(preset))
    renamed = from_native(ours.state_dict(), "diffusers")
    assert {k: tuple(v.shape) for k, v in renamed.items()} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items()
    }


@pytest.mark.full
@pytest.mark.parametrize("attention_levels", [(), (2, 3)])
def test_diffusers_own_autoencoder_computes_the_same(
    tmp_path: Path, attention_levels: tuple[int, ...]
) -> None:
    """Weights that we wrote give diffusers our latents and images; those it wrote load here."""
    ours = tiny(attention_levels=attention_levels)
    ours.save(tmp_path / "ours.safetensors", layout="diffusers")
    theirs = diffusers_vae(ours.config)
    theirs.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    images, latents = torch.randn(2, 3, 32, 40), torch.randn(2, 4, 4, 5)
    with torch.no_grad():
        posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
        close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
        close(posterior.mean, expected.mean)
        close(posterior.logvar, expected.logvar)
        close(posterior.kl(), expected.kl())
        close(ours.decode(latents), theirs.decode(latents).sample)
    theirs.save_pretrained(tmp_path / "theirs")
    again = VAE.load(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors", ours.config)
    assert tensors_sha256(again.state_dict()) == tensors_sha256(ours.state_dict())


def diffusers_vae(config: VAEConfig) -> nn.Module:
    """The AutoencoderKL of diffusers in our configuration's shape."""
    from diffusers import AutoencoderKL

    levels = range(len(config.channel_multipliers))
    attends = [level in config.attention_levels for level in levels]
    vae: nn.Module = AutoencoderKL(
        down_block_types=[f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        up_block_types=[f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        block_out_channels=config.level_channels,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
    ).eval()
    return vae


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
@pytest.mark.parametrize("attention_levels", [(), (2, 3)])
def test_round_trip_in_both_layouts(
    tmp_path: Path, layout: str, attention_levels: tuple[int, ...]
) -> None:
    vae = tiny(attention_levels=attention_levels)
    vae.save(tmp_path / "vae.safetensors", layout=layout)
    again = VAE.load(tmp_path / "vae.safetensors", vae.config)
    assert tensors_sha256(again.state_dict()) == tensors_sha256(vae.state_dict())


def test_older_files_are_read(tmp_path: Path) -> None:
    vae = tiny()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in from_native(vae.state_dict(), "diffusers").items():
        for new_name, old_name in old_names.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = value
    save_file(old, tmp_path / "old.safetensors")
    whole_model = {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}
    whole_model["model.diffusion_model.out.weight"] = torch.zeros(3)
    torch.save({"state_dict": whole_model, "epoch": 3}, tmp_path / "sd.ckpt")
    training = {**vae.state_dict(), "loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": training}, tmp_path / "kl.ckpt")
    for name in ("old.safetensors", "sd.ckpt", "kl.ckpt"):
        again = VAE.load(tmp_path / name, vae.config)
        assert tensors_sha256(again.state_dict()) == tensors_sha256(vae.state_dict())


def test_files_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    vae = tiny()
    vae.save(tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    cases = {
        "cut.safetensors": "damaged",
        "junk.safetensors": "damaged",
        "foreign.safetensors": "blocks.0.attn.qkv.weight",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            VAE.load(tmp_path / name, vae.config)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"other shape: encoder\.conv_in\.weight \[8, 3, 3, 3\]"):
        VAE.load(tmp_path / "whole.safetensors", VAEConfig.preset("tiny", base_channels=16))
    with pytest.raises(UserError, match="layout"):
        vae.save(tmp_path / "x.safetensors", layout="flax")  # type: ignore[arg-type]


def test_renaming_there_and_back_is_the_identity() -> None:
    native = tiny().state_dict()
    back = to_native(from_native(native, "diffusers"))
    assert list(back) == list(native)
    assert all(torch.equal(back[key], native[key]) for key in native)


def test_configuration_round_trip_and_refusals() -> None:
    config = VAEConfig.preset("f16d32")
    assert VAEConfig.from_dict(config.to_dict()) == config
    assert (config.downsampling, VAEConfig().downsampling) == (16, 8)
    for wrong in (
        {"base_channels": 0},
        {"norm_groups": 7},
        {"attention_levels": (4,)},
        {"channel_multipliers": ()},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            VAEConfig(**wrong)
    with pytest.raises(UserError, match="did you mean 'base_channels'"):
        VAEConfig.from_dict({"base_chanels": 8})
    with pytest.raises(UserError, match="tiny"):
        VAEConfig.preset("f4")
    with pytest.raises(ValueError, match="multiples of 8"):
        tiny().encode(torch.zeros(1, 3, 60, 64))


def test_a_few_steps_lower_the_reconstruction_error() -> None:
    vae = tiny()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(4, 3, 4, 4, generator=generator) * 2 - 1
    images = F.interpolate(colours, (32, 32), mode="bilinear")
    errors = []
    for _ in range(40):
        out = vae(images, torch.randn(4, 4, 4, 4, generator=generator))
        error = (out.reconstruction - images).abs().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0]
