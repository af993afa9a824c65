"""Every entry of the encoder table: its published facts, its network, its features.

Transformers run here with one block, through the same code, and entire under `full`.
"""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from torch import nn

from common.errors import UserError
from model.encoders import ENCODERS, Encoder, EncoderSpec, load_encoder, load_spec
from model.encoders.construct import InceptionConstruction, TimmConstruction, frozen
from model.weights import write_tensors

SLIDE = Path(__file__).parents[1] / "data/slides/CMU-1-Small-Region.svs"
HAS_CONCH = importlib.util.find_spec("conch") is not None

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
UNIT = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
FROM_128 = ((128 / 255,) * 3, (128 / 255,) * 3)


@dataclass(frozen=True)
class Facts:
    """What the models' cards and papers say; written down here apart from the table."""

    millions: float  # parameters as published, to the digit given
    network_output: tuple[int, ...]  # of one tile; the first of two
    dim: int
    input_px: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    licence: str
    gated: bool


FACTS = {
    "h0-mini": Facts(86, (261, 768), 768, 224, BIOPTIMUS, "CC BY-NC-ND 4.0", True),
    "h-optimus-0": Facts(1135, (261, 1536), 1536, 224, BIOPTIMUS, "Apache-2.0", True),
    "h-optimus-1": Facts(1135, (261, 1536), 1536, 224, BIOPTIMUS, "CC BY-NC-ND 4.0", True),
    "uni": Facts(303, (197, 1024), 1024, 224, IMAGENET, "CC BY-NC-ND 4.0", True),
    "uni2-h": Facts(681, (265, 1536), 1536, 224, IMAGENET, "CC BY-NC-ND 4.0", True),
    "virchow": Facts(631, (257, 1280), 1280, 224, IMAGENET, "Apache-2.0", True),
    "virchow-cls-mean": Facts(631, (257, 1280), 2560, 224, IMAGENET, "Apache-2.0", True),
    "virchow2": Facts(631, (261, 1280), 1280, 224, IMAGENET, "CC BY-NC-ND 4.0", True),
    "virchow2-cls-mean": Facts(631, (261, 1280), 2560, 224, IMAGENET, "CC BY-NC-ND 4.0", True),
    "prov-gigapath": Facts(1135, (197, 1536), 1536, 224, IMAGENET, "Apache-2.0", True),
    "midnight": Facts(1135, (257, 1536), 1536, 224, UNIT, "MIT", False),
    "midnight-cls-mean": Facts(1135, (257, 1536), 3072, 224, UNIT, "MIT", False),
    "hibou-b": Facts(86, (261, 768), 768, 224, HIBOU, "Apache-2.0", False),
    "phikon": Facts(86, (197, 768), 768, 224, IMAGENET, "Owkin", False),
    "kaiko-vit-s16": Facts(21.7, (197, 384), 384, 224, UNIT, "Kaiko", False),
    "kaiko-vit-b8": Facts(86, (785, 768), 768, 224, UNIT, "Kaiko", False),
    "lunit-vit-s16": Facts(21.7, (197, 384), 384, 224, LUNIT, "Lunit", False),
    "efficientnet-lite0": Facts(3.4, (1280,), 1280, 224, UNIT, "Apache-2.0", False),
    "phikon-v2": Facts(303, (197, 1024), 1024, 224, IMAGENET, "Owkin", False),
    "conch-v1": Facts(90, (512,), 512, 448, CLIP, "CC BY-NC-ND 4.0", True),
    "conch-v1-224": Facts(90, (512,), 512, 224, CLIP, "CC BY-NC-ND 4.0", True),
    "inception-v3": Facts(21.8, (2048,), 2048, 299, UNIT, "Apache-2.0", False),
    "inception-v3-tf1": Facts(21.8, (2048,), 2048, 299, FROM_128, "Apache-2.0", False),
    "inception-v3-clean": Facts(21.8, (2048,), 2048, 299, FROM_128, "Apache-2.0", False),
    "inception-v3-torchvision": Facts(21.8, (2048,), 2048, 299, UNIT, "BSD-3-Clause", False),
    "dinov2-b": Facts(86, (257, 768), 768, 224, IMAGENET, "Apache-2.0", False),
    "dinov2-b-518": Facts(87, (1370, 768), 768, 518, IMAGENET, "Apache-2.0", False),
}

every_entry = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name.startswith("conch") and not HAS_CONCH,
                reason="CONCH's package is not installed",
            ),
        )
        for name in FACTS
    ],
)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    with openslide.OpenSlide(str(SLIDE)) as slide:
        regions = [slide.read_region((900, y), 0, (224, 224)) for y in (450, 1350)]
    return np.stack([np.asarray(region.convert("RGB")) for region in regions])


def shallow(spec: EncoderSpec, blocks: int = 1) -> EncoderSpec:
    """The entry with fewer transformer blocks, all else equal."""
    construction = spec.construction
    if not isinstance(construction, TimmConstruction):
        return spec
    options = frozen(**{**construction.options, "depth": blocks})
    return replace(spec, construction=replace(construction, options=options))


_seeded: dict[str, nn.Module] = {}


def seeded(name: str) -> Encoder:
    """The shallow entry with random:0; variants share one network, built once."""
    spec = shallow(ENCODERS[name])
    key = repr(spec.construction)
    if key not in _seeded:
        _seeded[key] = load_spec(spec, "random:0").network
    return Encoder(spec, _seeded[key], "random:0", device="cpu", dtype=torch.float32)


def first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_the_facts_are_of_the_whole_table() -> None:
    assert set(FACTS) == set(ENCODERS)


@pytest.mark.parametrize("name", FACTS)
def test_the_entry_says_what_is_published(name: str) -> None:
    spec, facts = ENCODERS[name], FACTS[name]
    unit = 10.0 if facts.millions < 30 else 1.0
    assert round(spec.parameters / 1e6 * unit) == facts.millions * unit
    assert (spec.mean, spec.std) == facts.statistics
    assert (spec.dim, spec.input_px) == (facts.dim, facts.input_px)
    assert spec.licence.startswith(facts.licence)
    assert bool(spec.gating) == facts.gated
    has_tokens = len(facts.network_output) == 2 or name == "efficientnet-lite0"
    assert spec.num_tokens == (196 if has_tokens else 0)


@every_entry
def test_the_network_has_the_published_size(name: str) -> None:
    spec = ENCODERS[name]
    same = ENCODERS[spec.weights_name]
    if same is not spec and same.construction is spec.construction:  # a variant, built once
        assert spec.parameters == same.parameters
        return
    with torch.device("meta"):
        network = spec.construction.build_network()
        output = first(network(torch.empty(1, 3, spec.input_px, spec.input_px)))
    assert sum(p.numel() for p in network.parameters()) == spec.parameters
    assert output.shape == (1, *FACTS[name].network_output)


@every_entry
def test_a_real_tile_becomes_features(name: str, tiles: np.ndarray) -> None:
    encoder = seeded(name)
    spec = encoder.spec
    seen: list[torch.Tensor] = []
    hook = encoder.network.register_forward_hook(lambda _, x, y: seen.extend((x[0], y)))
    out = encoder.encode(tiles)
    hook.remove()
    pixels, output = seen[0], first(seen[1])
    assert pixels.shape == (2, 3, spec.input_px, spec.input_px)
    assert output.shape == (2, *FACTS[name].network_output)
    assert out.cls.shape == (2, spec.dim)
    assert out.cls.isfinite().all()
    assert (out.cls[0] - out.cls[1]).abs().mean() > 1e-3
    if spec.num_tokens:
        assert out.tokens is not None
        assert out.tokens.shape == (2, 196, spec.token_dim)
    if output.ndim == 3:
        assert torch.equal(out.cls[:, : spec.token_dim], output[:, 0])
    else:
        assert torch.equal(out.cls, output)
        assert (out.tokens is None) == (spec.num_tokens == 0)


def test_cls_and_mean_leave_the_registers_out(tiles: np.ndarray) -> None:
    encoder = seeded("virchow2-cls-mean")
    seen: list[torch.Tensor] = []
    hook = encoder.network.register_forward_hook(lambda _, x, y: seen.append(y))
    cls = encoder.encode(tiles[:1], tokens=False).cls
    hook.remove()
    tokens = seen[0][0]
    assert torch.equal(cls[0, :1280], tokens[0])
    torch.testing.assert_close(cls[0, 1280:], tokens[-256:].mean(dim=0), atol=1e-5, rtol=0)
    assert not torch.allclose(cls[0, 1280:], tokens[1:].mean(dim=0), atol=1e-5)


def test_inception_takes_tiles_of_any_size_and_patch_encoders_do_not(tiles: np.ndarray) -> None:
    assert seeded("inception-v3").encode(tiles[:1, :160, :160]).cls.shape == (1, 2048)
    with pytest.raises(UserError, match="uni takes 224 px tiles, got 160x160"):
        seeded("uni").encode(tiles[:1, :160, :160])


@pytest.mark.skipif(HAS_CONCH, reason="CONCH's package is installed")
def test_conch_without_its_package_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="pip install git") as caught:
        load_encoder("conch-v1", "random:0")
    assert "\n" not in str(caught.value)


def test_variants_share_their_weights() -> None:
    shared = {
        "virchow-cls-mean": "virchow",
        "virchow2-cls-mean": "virchow2",
        "midnight-cls-mean": "midnight",
        "conch-v1-224": "conch-v1",
        "inception-v3-clean": "inception-v3",
        "inception-v3-tf1": "inception-v3",
        "dinov2-b-518": "dinov2-b",
    }
    for name, spec in ENCODERS.items():
        assert spec.weights_name == shared.get(name, name)


# --- the FID network ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["torchvision", "fid"])
def test_inception_is_torchvisions_with_the_poolings_it_names(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is torchvision's own module; for FID its pooling calls are exchanged."""
    import torchvision.models.inception as theirs

    with torch.random.fork_rng():
        torch.manual_seed(1)
        oracle = theirs.Inception3(aux_logits=False, init_weights=False).eval()
    oracle.fc = nn.Identity()
    ours = (
        InceptionConstruction("fid" if variant == "fid" else "torchvision").build_network().eval()
    )
    ours.load_state_dict(oracle.state_dict())
    if variant == "fid":
        functional = theirs.F
        last = oracle.Mixed_7c

        class Poolings:
            def __getattr__(self, name: str) -> object:
                return getattr(functional, name)

            def avg_pool2d(self, x: torch.Tensor, **options: int) -> torch.Tensor:
                if inside_last:
                    return functional.max_pool2d(x, **options)
                return functional.avg_pool2d(x, **options, count_include_pad=False)

        inside_last: list[bool] = []
        last.register_forward_pre_hook(lambda *_: inside_last.append(True))
        monkeypatch.setattr(theirs, "F", Poolings())
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        want, got = oracle(x), ours(x)
    assert want.std() > 0
    torch.testing.assert_close(got, want, atol=0, rtol=1e-4)


# --- memory, and the large networks entire -----------------------------------------------------


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The most anonymous memory, in bytes beyond the start, that the block had at a time.

    Pages of a mapped file are left out: they need no memory that the system cannot take back.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc/self/status")

    def anonymous() -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    start, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def write_seeded(spec: EncoderSpec, path: Path, dtype: torch.dtype) -> int:
    """A checkpoint of the whole network, without building it; returns its parameters."""
    with torch.device("meta"):
        shapes = spec.construction.build_network().state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.empty(value.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        for key, value in shapes.items()
    }
    if path.suffix == ".safetensors":
        write_tensors(path, tensors)
    else:
        torch.save(tensors, path)
    return sum(value.numel() for value in tensors.values())


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".safetensors", torch.float32), (".pt", torch.bfloat16)]
)
def test_loading_needs_one_copy_in_the_compute_dtype(
    tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    spec = shallow(ENCODERS["uni"], blocks=3)
    path = tmp_path / f"weights{suffix}"
    parameters = write_seeded(spec, path, torch.float32)
    largest = 4096 * 1024 * 4
    with anonymous_peak() as peak:
        encoder = load_spec(spec, str(path), dtype=dtype)
    assert peak[0] < parameters * dtype.itemsize + largest + 20e6
    path.write_bytes(b"")  # a view of the file would now crash or change
    assert all(p.isfinite().all() for p in encoder.network.parameters())


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    ["dinov2-b", "dinov2-b-518", "uni", "phikon-v2", "virchow2", "uni2-h", "h-optimus-0"],
)
def test_the_large_networks_run_entire(name: str, tmp_path: Path, tiles: np.ndarray) -> None:
    spec, path = ENCODERS[name], tmp_path / "weights.safetensors"
    write_seeded(spec, path, torch.float32)
    with anonymous_peak() as peak:
        encoder = load_encoder(name, str(path), dtype=torch.bfloat16)
    assert peak[0] < spec.parameters * 2 * 1.1 + 100e6
    out = encoder.encode(tiles[:1])
    assert out.cls.shape == (1, spec.dim)
    assert out.tokens is not None
    assert out.tokens.shape == (1, 196, spec.token_dim)
    assert out.cls.isfinite().all()
    assert not encoder.is_random


def test_what_encoders_were_trained_on() -> None:
    photographs = {name for name, spec in ENCODERS.items() if spec.photographs}
    assert photographs == {
        "efficientnet-lite0", "inception-v3", "inception-v3-tf1", "inception-v3-clean",
        "inception-v3-torchvision", "dinov2-b", "dinov2-b-518",
    }  # fmt: skip
    assert {name for name, spec in ENCODERS.items() if spec.tcga} == {
        "h0-mini", "phikon", "phikon-v2", "midnight", "midnight-cls-mean", "kaiko-vit-s16",
        "kaiko-vit-b8", "lunit-vit-s16",
    }  # fmt: skip
