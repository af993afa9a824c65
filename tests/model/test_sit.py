import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from model.sit import (
    SIT_PRESETS,
    Attention,
    PatchEmbedder,
    SiT,
    SiTConfig,
    position_embedding,
    time_features,
)


@cache
def on_meta(**overrides: Any) -> SiT:
    """A SiT of shapes alone, so that XL costs no memory."""
    with torch.device("meta"):
        return SiT(SiTConfig.preset("XL/2", **overrides))


def size(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def trainable(model: nn.Module) -> int:
    return size(p for p in model.parameters() if p.requires_grad)


def stirred(**overrides: Any) -> SiT:
    """A tiny SiT with no weight at zero, so that every path of the network shows."""
    torch.manual_seed(0)
    model = SiT(SiTConfig.preset("tiny", latent_size=8, **overrides))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs(batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    t = torch.rand(batch, generator=generator)
    return x, t, torch.randn(batch, 768, generator=generator)


# --- counts, keys and FLOPs of the specification -------------------------------------------------


def test_parameter_counts_of_xl_2() -> None:
    label = on_meta(conditioning="label")
    assert size(label.parameters()) == 683_173_392
    assert trainable(label) == 682_947_600
    assert trainable(on_meta(conditioning="label", train_pos_embed=True)) == 683_173_392
    assert size(on_meta(conditioning="none").parameters()) == 682_020_240
    feature = on_meta()
    assert trainable(feature) == 682_680_336 + 1152
    assert label.pos_embed.numel() == 225_792
    assert size(label.blocks[0].parameters()) == 23_905_152
    assert size(label.projectors.parameters()) == 8_131_328


def state_of_the_specification() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of REPA-E's SiT-XL/2 at latent 28, with the label table."""
    state: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 196, 1152),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
        "bn.num_batches_tracked": (),
    }

    def affine(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = shape
        state[f"{name}.bias"] = shape[:1]

    affine("x_embedder.proj", 1152, 4, 2, 2)
    affine("t_embedder.mlp.0", 1152, 256)
    affine("t_embedder.mlp.2", 1152, 1152)
    for i in range(28):
        affine(f"blocks.{i}.attn.qkv", 3456, 1152)
        affine(f"blocks.{i}.attn.proj", 1152, 1152)
        affine(f"blocks.{i}.mlp.fc1", 4608, 1152)
        affine(f"blocks.{i}.mlp.fc2", 1152, 4608)
        affine(f"blocks.{i}.adaLN_modulation.1", 6912, 1152)
    affine("projectors.0.0", 2048, 1152)
    affine("projectors.0.2", 2048, 2048)
    affine("projectors.0.4", 768, 2048)
    affine("final_layer.linear", 16, 1152)
    affine("final_layer.adaLN_modulation.1", 2304, 1152)
    return state


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_state_of_the_label_conditioned_xl_2_is_the_references() -> None:
    expected = state_of_the_specification()
    assert len(expected) == 301
    assert shapes(on_meta(conditioning="label")) == expected


def test_conditioners_differ_in_their_own_keys_alone() -> None:
    expected = state_of_the_specification()
    del expected["y_embedder.embedding_table.weight"]
    assert shapes(on_meta(conditioning="none")) == expected
    feature = {
        "y_embedder.linear.weight": (1152, 768),
        "y_embedder.linear.bias": (1152,),
        "y_embedder.null": (1152,),
    }
    assert shapes(on_meta()) == expected | feature


def test_query_key_norms_have_the_heads_width() -> None:
    state = shapes(on_meta(qk_norm=True))
    assert state["blocks.3.attn.q_norm.weight"] == (72,)
    assert state["blocks.3.attn.k_norm.bias"] == (72,)


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_of_xl_2() -> None:
    model = on_meta()
    x, t = torch.empty(1, 4, 28, 28, device="meta"), torch.empty(1, device="meta")
    y, c = torch.empty(1, 768, device="meta"), torch.empty(1, 1152, device="meta")
    tokens = torch.empty(1, 196, 1152, device="meta")
    T, D = 196, 1152
    block = flops(lambda: model.blocks[0](tokens, c))
    assert block == 24 * T * D**2 + 4 * T**2 * D + 12 * D**2
    assert block / 1e9 == pytest.approx(6.436, abs=5e-4)
    projector = flops(lambda: model.projectors[0](tokens))
    whole = flops(lambda: model(x, t, y, return_tokens=True))
    assert whole / 1e9 == pytest.approx(183.4, abs=0.05)
    assert flops(lambda: model(x, t, y)) == whole - projector
    assert (whole - projector) / 1e9 == pytest.approx(180.2, abs=0.05)
    assert flops(lambda: model.align_tokens(x, t, y)) / 1e9 == pytest.approx(54.7, abs=0.05)


def test_a_single_null_row_costs_no_modulation_a_sample() -> None:
    model = on_meta()
    x = torch.empty(8, 4, 28, 28, device="meta")
    each = flops(lambda: model.forward_from_condition(x, torch.empty(8, 1152, device="meta")))
    row = flops(lambda: model.forward_from_condition(x, torch.empty(1, 1152, device="meta")))
    assert each - row == 7 * (28 * 12 + 4) * 1152**2


# --- pieces against slow, obvious versions -------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_a_loop_over_heads(qk_norm: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(24, 3, qk_norm=qk_norm)
    x = torch.randn(2, 7, 24)
    q, k, v = attention.qkv(x).split(24, dim=2)
    heads = []
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        qh, kh = attention.q_norm(q[..., part]), attention.k_norm(k[..., part])
        weights = torch.softmax(qh @ kh.transpose(1, 2) / math.sqrt(8), dim=2)
        heads.append(weights @ v[..., part])
    assert torch.allclose(attention(x), attention.proj(torch.cat(heads, dim=2)), atol=1e-6)


def test_block_equals_its_equations() -> None:
    model = stirred()
    block = model.blocks[0]
    x, c = torch.randn(2, 5, 128), torch.randn(2, 128)
    linear = block.adaLN_modulation[1]
    parts = (F.silu(c) @ linear.weight.T + linear.bias).reshape(2, 6, 128)
    rows = []
    for b in range(2):
        shift1, scale1, gate1, shift2, scale2, gate2 = parts[b]

        def norm(z: Tensor) -> Tensor:
            centred = z - z.mean(dim=1, keepdim=True)
            return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()

        z = x[b]
        z = z + gate1 * block.attn((norm(z) * (1 + scale1) + shift1)[None])[0]
        hidden = (norm(z) * (1 + scale2) + shift2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        cubic = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        active = 0.5 * hidden * (1 + torch.tanh(cubic))
        rows.append(z + gate2 * (active @ block.mlp.fc2.weight.T + block.mlp.fc2.bias))
    assert torch.allclose(block(x, c), torch.stack(rows), atol=1e-5)


def sit_of_the_specification(
    w: dict[str, Tensor], config: SiTConfig, x: Tensor, t: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Velocity and projected tokens of one sample x [C, H, W], from the state alone, in loops."""
    p, g, heads = config.patch_size, config.grid_size, config.num_heads

    def linear(name: str, z: Tensor) -> Tensor:
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(z: Tensor) -> Tensor:
        centred = z - z.mean(dim=1, keepdim=True)
        return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()

    rates = torch.tensor([math.exp(-math.log(10000) * k / 128) for k in range(128)])
    time = torch.cat([(t * rates).cos(), (t * rates).sin()])
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time)))
    c = F.silu(c + linear("y_embedder.linear", y))
    patches = [
        x[:, row * p : row * p + p, column * p : column * p + p].flatten()
        for row in range(g)
        for column in range(g)
    ]
    kernel = w["x_embedder.proj.weight"].flatten(1)
    z = torch.stack(patches) @ kernel.T + w["x_embedder.proj.bias"] + w["pos_embed"][0]
    tokens = z
    for i in range(config.depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(
            f"{name}.adaLN_modulation.1", c
        ).chunk(6)
        q, k, v = linear(f"{name}.attn.qkv", norm(z) * (1 + scale1) + shift1).chunk(3, dim=1)
        attended = [
            torch.softmax(qh @ kh.T / kh.shape[1] ** 0.5, dim=1) @ vh
            for qh, kh, vh in zip(
                q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True
            )
        ]
        z = z + gate1 * linear(f"{name}.attn.proj", torch.cat(attended, dim=1))
        hidden = linear(f"{name}.mlp.fc1", norm(z) * (1 + scale2) + shift2)
        z = z + gate2 * linear(f"{name}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
        tokens = z if i + 1 == config.encoder_depth else tokens
    for layer in (0, 2, 4):
        tokens = linear(f"projectors.0.{layer}", F.silu(tokens) if layer else tokens)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2)
    values = linear("final_layer.linear", norm(z) * (1 + scale) + shift)
    velocity = torch.empty_like(x)
    for n in range(g * g):
        row, column = divmod(n, g)
        patch = values[n].reshape(p, p, -1)  # (row, column, channel)
        velocity[:, row * p : row * p + p, column * p : column * p + p] = patch.permute(2, 0, 1)
    return velocity, tokens


def test_the_whole_network_equals_the_specification_on_its_state() -> None:
    model = stirred()
    x, t, y = inputs()
    with torch.no_grad():
        got = model(x, t, y, return_tokens=True)
        rows = [
            sit_of_the_specification(model.state_dict(), model.config, x[b], t[b], y[b])
            for b in range(3)
        ]
    for ours, theirs in zip(got, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-4)


def test_position_embedding_by_the_loop() -> None:
    grid, width = 3, 16
    table = position_embedding(grid, width)[0]
    for row in range(grid):
        for column in range(grid):
            expected = []
            for position in (column, row):
                rates = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
                expected += [math.sin(position * rate) for rate in rates]
                expected += [math.cos(position * rate) for rate in rates]
            assert table[row * grid + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_time_features_are_cosines_then_sines_of_the_time_as_it_is() -> None:
    t = torch.tensor([0.0, 0.3, 1.0])
    rates = [math.exp(-math.log(10000) * k / 128) for k in range(128)]
    for b in range(3):
        angles = [float(t[b]) * rate for rate in rates]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert time_features(t)[b].tolist() == pytest.approx(expected, abs=1e-6)


def test_patches_are_embedded_row_by_row() -> None:
    torch.manual_seed(0)
    embedder = PatchEmbedder(4, 2, 6)
    x = torch.randn(1, 4, 6, 6)
    token = embedder(x)[0, 1 * 3 + 2]  # grid row 1, column 2
    patch = x[0, :, 2:4, 4:6]
    expected = embedder.proj.weight.flatten(1) @ patch.flatten() + embedder.proj.bias
    assert torch.allclose(token, expected, atol=1e-6)


def test_output_patches_are_row_column_channel() -> None:
    model = stirred()
    patches = torch.arange(16 * 16, dtype=torch.float32).reshape(1, 16, 16)
    image = model._unpatchify(patches)[0]
    for token, p, q, channel in ((0, 0, 0, 0), (5, 1, 0, 2), (14, 0, 1, 3)):
        row, column = divmod(token, 4)
        value = patches[0, token, (p * 2 + q) * 4 + channel]
        assert image[channel, row * 2 + p, column * 2 + q] == value


# --- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SIT_PRESETS if name != "tiny"])
def test_every_preset_maps_a_latent_to_a_velocity(name: str) -> None:
    with torch.device("meta"):
        model = SiT(SiTConfig.preset(name))
        x, t, y = torch.empty(2, 4, 28, 28), torch.empty(2), torch.empty(2, 768)
    velocity, tokens = model(x, t, y, return_tokens=True)
    assert velocity.shape == x.shape
    assert tokens.shape == (2, model.config.num_tokens, 768)


def test_the_small_preset_runs() -> None:
    """The reference's S has a final layer of the wrong width."""
    model = SiT(SiTConfig.preset("S/4"))
    x, t, y = torch.randn(1, 4, 28, 28), torch.rand(1), torch.randn(1, 768)
    assert model(x, t, y).shape == x.shape


def test_latents_of_f16d32_fit_patch_1() -> None:
    model = SiT(SiTConfig.preset("tiny", latent_size=14, latent_channels=32, patch_size=1))
    velocity = model(torch.randn(2, 32, 14, 14), torch.rand(2), None)
    assert velocity.shape == (2, 32, 14, 14)


def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    model = SiT(SiTConfig.preset("tiny", latent_size=8))
    x, t, y = inputs()
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    tokens = torch.randn(3, 16, 128)
    assert torch.equal(model.blocks[0](tokens, torch.randn(3, 128)), tokens)


def test_initial_weights_have_the_specified_spread() -> None:
    torch.manual_seed(0)
    model = SiT(SiTConfig.preset("tiny", conditioning="label"))
    assert isinstance(model.y_embedder, nn.Module)
    table = model.y_embedder.embedding_table.weight.detach()
    assert float(table.std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.t_embedder.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    patch = model.x_embedder.proj.weight.detach()
    assert float(patch.abs().max()) <= math.sqrt(6 / (128 + 16))
    assert float(patch.std()) == pytest.approx(math.sqrt(2 / (128 + 16)), rel=0.05)
    qkv = model.blocks[0].attn.qkv.weight.detach()
    assert float(qkv.std()) == pytest.approx(math.sqrt(2 / (4 * 128)), rel=0.02)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases
    assert not any(bias.any() for bias in biases)
    feature = SiT(SiTConfig.preset("S/2", depth=4))
    assert float(feature.y_embedder.null.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_dropped_samples_get_the_null_condition_and_the_others_their_own() -> None:
    model = stirred()
    x, t, y = inputs()
    drop = torch.tensor([False, True, False])
    mixed, own, null = model(x, t, y, drop=drop), model(x, t, y), model(x, t, None)
    assert torch.allclose(mixed[1], null[1], atol=1e-6)
    assert torch.allclose(mixed[[0, 2]], own[[0, 2]], atol=1e-6)
    assert not torch.allclose(own[1], null[1], atol=1e-3)


def test_labels_and_their_null_class() -> None:
    model = stirred(conditioning="label", num_classes=5)
    x, t, _ = inputs()
    labels = torch.tensor([0, 3, 4])
    drop = torch.tensor([True, False, True])
    null_class = model(x, t, torch.full((3,), 5))
    assert torch.allclose(model(x, t, None), null_class, atol=1e-6)
    mixed = model(x, t, labels, drop=drop)
    assert torch.allclose(mixed[[0, 2]], null_class[[0, 2]], atol=1e-6)
    assert torch.allclose(mixed[1], model(x, t, labels)[1], atol=1e-6)


def test_labels_without_a_null_class() -> None:
    model = stirred(conditioning="label-only", num_classes=5)
    x, t, _ = inputs()
    labels = torch.tensor([0, 3, 4])
    assert model.y_embedder.embedding_table.weight.shape == (5, 128)
    assert model(x, t, labels).shape == x.shape
    for y, drop in ((None, None), (labels, torch.tensor([True, False, True]))):
        with pytest.raises(UserError, match="without label drop and has no null class"):
            model(x, t, y, drop=drop)


def test_no_conditioning_refuses_a_condition() -> None:
    model = stirred(conditioning="none")
    x, t, y = inputs()
    assert model(x, t, None).shape == x.shape
    with pytest.raises(UserError, match="conditioning 'none'"):
        model(x, t, y)


def test_forward_from_condition_equals_forward() -> None:
    model = stirred()
    x, t, y = inputs()
    assert torch.equal(model.forward_from_condition(x, model.condition(t, y)), model(x, t, y))
    one_time = torch.full((3,), 0.4)
    row = model.condition(one_time[:1], None)
    assert row.shape == (1, 128)
    assert torch.allclose(model.forward_from_condition(x, row), model(x, one_time, None), atol=1e-6)


def test_velocity_keeps_the_latents_dtype_whatever_the_weights_are() -> None:
    x, t, y = inputs()
    exact = stirred()(x, t, y)
    half = stirred().bfloat16()(x, t, y)
    assert half.dtype == torch.float32
    assert torch.allclose(half, exact, atol=0.1 * exact.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert stirred()(x, t, y).dtype == torch.float32


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = stirred()
    x, t, y = inputs()
    assert torch.allclose(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), atol=1e-6)


def test_pos_embed_is_loaded_and_not_recomputed() -> None:
    model, other = stirred(), stirred()
    with torch.no_grad():
        other.pos_embed += 1
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.pos_embed, other.pos_embed)
    assert not model.pos_embed.requires_grad


# --- the alignment pass and gradients ------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["feature", "label", "none"])
def test_align_tokens_are_forwards_tokens(conditioning: str) -> None:
    model = stirred(conditioning=conditioning)
    x, t, y = inputs()
    condition = {"feature": y, "label": torch.tensor([1, 2, 3]), "none": None}[conditioning]
    _, tokens = model(x, t, condition, return_tokens=True)
    assert torch.equal(model.align_tokens(x, t, condition), tokens)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_alignment_gradient_reaches_the_latents_and_no_parameter(recompute: bool) -> None:
    model = stirred(train_pos_embed=True)
    model.recompute = recompute
    x, t, y = inputs()
    x.requires_grad_()
    model.align_tokens(x, t, y).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    aligned = x.grad
    assert aligned is not None
    x.grad = None
    model(x, t, y, return_tokens=True)[1].square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(aligned, x.grad, rtol=1e-4, atol=1e-4)


def test_align_tokens_does_no_work_after_the_tap() -> None:
    model = stirred()
    x, t, y = inputs()
    expected = model.align_tokens(x, t, y)
    with torch.no_grad():
        for module in (*model.blocks[model.config.encoder_depth :], model.final_layer):
            for parameter in module.parameters():
                parameter.fill_(math.nan)
    assert torch.equal(model.align_tokens(x, t, y), expected)
    assert model(x, t, y).isnan().any()


def test_token_gradient_stops_at_the_tap() -> None:
    model = stirred()
    x, t, y = inputs()
    model(x, t, y, return_tokens=True)[1].square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {"projectors.0.4.weight", "blocks.1.mlp.fc2.weight", "blocks.0.attn.qkv.bias"} <= reached
    beyond = ("blocks.2.", "blocks.3.", "final_layer.")
    assert not any(name.startswith(beyond) for name in reached)


def test_every_trainable_parameter_learns_from_the_whole_loss() -> None:
    model = stirred()
    x, t, y = inputs()
    drop = torch.tensor([True, False, False])
    velocity, tokens = model(x, t, y, drop=drop, return_tokens=True)
    (velocity.square().mean() + tokens.square().mean()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert model.pos_embed.grad is None


def test_recompute_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = stirred()
        model.recompute = recompute
        x, t, y = inputs()
        velocity, tokens = model(x, t, y, return_tokens=True)
        (velocity.square().sum() + tokens.square().sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditioning", "recompute"),
    [("feature", False), ("feature", True), ("label", False), ("none", False)],
)
def test_no_graph_break(conditioning: str, recompute: bool) -> None:
    model = stirred(depth=2, encoder_depth=1, conditioning=conditioning)
    model.recompute = recompute
    x, t, feature = inputs()
    x.requires_grad_()
    y = {"feature": feature, "label": torch.tensor([1, 2, 3]), "none": None}[conditioning]
    drop = torch.tensor([True, False, False])
    row = model.condition(t[:1], None).detach()
    calls: list[tuple[Callable[..., object], tuple[Tensor | None, ...], dict[str, Any]]] = [
        (model, (x, t, y), {"drop": drop, "return_tokens": True}),
        (model.align_tokens, (x, t, y), {}),
        (model.forward_from_condition, (x.detach(), row), {}),
    ]
    for call, arguments, options in calls if conditioning == "feature" else calls[:1]:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(call)(*arguments, **options)
        assert explained.graph_count == 1
        assert explained.graph_break_count == 0, explained.break_reasons


def test_the_compiled_alignment_pass_still_reaches_no_parameter() -> None:
    model = stirred(depth=2, encoder_depth=1)
    model.recompute = True
    x, t, y = inputs()
    x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(model.align_tokens, backend="aot_eager", fullgraph=True)
    compiled(x, t, y).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert x.grad is not None
    compiled_gradient, x.grad = x.grad, None
    model.align_tokens(x, t, y).square().sum().backward()
    assert torch.allclose(compiled_gradient, x.grad, rtol=1e-4, atol=1e-4)


# --- configuration -------------------------------------------------------------------------------


def test_configuration_round_trips() -> None:
    config = SiTConfig.preset("B/4", conditioning="label", num_classes=7)
    assert SiTConfig.from_dict(config.to_dict()) == config
    assert (config.hidden_size, config.num_tokens) == (768, 49)
    assert SiTConfig.preset("XL/2") == SiTConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 8}, "unknown configuration key 'hiden_size': did you mean 'hidden_s"),
        ({"depth": 0}, "SiT depth is 0; expected an integer from 1 to 1,024"),
        ({"depth": "28"}, "'depth': expected a whole number, got '28'"),
        ({"latent_size": 27}, "SiT latent_size is 27; expected a multiple of patch_size 2"),
        ({"num_heads": 7}, "SiT hidden_size is 1152; expected a multiple of num_heads 7"),
        ({"hidden_size": 6, "num_heads": 2}, "SiT hidden_size is 6; expected a multiple of 4"),
        ({"encoder_depth": 29}, "encoder_depth is 29; expected at most depth 28"),
        ({"conditioning": "text"}, "'conditioning': expected one of feature, label, none"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SiTConfig.from_dict(values)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match="SiT preset is 'XXL/2'; expected one of S/1"):
        SiTConfig.preset("XXL/2")
