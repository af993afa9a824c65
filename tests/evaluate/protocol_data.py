"""A toy world for protocols: two dozen slides with patients and projects, a tiny model, features.

The generator, the dataset's tables and shards, the selections and the report are the real ones.
Only features are written instead of computed: an encoder takes seconds a tile on a CPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from evaluate_data import RECORD, make_real, random_features, write_features

from common.torch_processes import ALONE
from evaluate.protocols.config import Protocol, load_protocol
from evaluate.protocols.making import SourceMaker
from evaluate.protocols.plan import Seen, all_features, made_sources, plan_cells
from model import CytoSyn, SiT, SiTConfig
from model.cytosyn import Records
from model.encoders import load_encoder
from model.vae import VAE, VAEConfig
from pipeline.dataset import (
    Dataset,
    Slide,
    make_selection,
    new_run_id,
    read_candidates,
    write_selection,
    write_slides,
)
from pipeline.dataset.features import FeatureStore

PX, COUNT, DIM = 32, 64, RECORD["dim"]
_SLIDES, _TILES = 24, 12


def record_of(encoder: str, view: str = "", px: int = PX) -> dict[str, Any]:
    """encoder.json of one of the toy's encoders."""
    own = {"encoder": encoder, "weights_sha256": encoder[0] * 64, "input_px": PX, "resize": ""}
    return {**RECORD, **own, "tile_px": px, "view": view, "mean": [0.5] * 3, "std": [0.5] * 3}


def make_world(root: Path, encoders: tuple[str, ...]) -> Dataset:
    """The real dataset with selections guidance, val-in (same slides) and val-out (others)."""
    names = [f"S-{number:02d}" for number in range(_SLIDES)]
    dataset = make_real(root / "real", dict.fromkeys(names, _TILES), record=record_of("h0-mini"))
    run_id = new_run_id()
    slides = [
        Slide(name, path="", patient=f"P-{i // 2}", project=f"T-{i % 2}", site=f"0{i % 4}")
        for i, name in enumerate(names)
    ]
    write_slides(dataset, run_id, slides)
    inside, outside = names[:16], names[16:]
    parts = {
        "guidance": (inside, np.arange(4, 12)),
        "val-in": (inside, np.arange(0, 4)),
        "val-out": (outside, np.arange(0, 8)),
    }
    for name, (slide_ids, ranks) in parts.items():
        rows = {slide_id: ranks.astype(np.int32) for slide_id in slide_ids}
        write_selection(dataset, run_id, make_selection(name, rows, {"role": name}))
    for encoder in dict.fromkeys(("h0-mini", *encoders)):
        features = {name: _features(encoder, name) for name in names}
        write_features(dataset, features, record_of(encoder))
    return dataset


def _features(encoder: str, slide_id: str) -> np.ndarray:
    """A slide's features: a mean of its own, and the tiles about it."""
    centre = 0.5 * random_features(f"{encoder} {slide_id}", 1, DIM)
    return random_features(f"{encoder}/{slide_id}", _TILES, DIM) + centre


def make_model(root: Path) -> Path:
    """An exported model of 32 px tiles with noise for weights, so that features steer it."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig.preset("tiny", latent_size=4, condition_dim=DIM, depth=2))
    vae = VAE(VAEConfig.preset("tiny"))
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.normal_(0, 0.1)
    records = Records(
        encoder="h0-mini", encoder_weights="random:0", encoder_is_random=True, mpp=0.5,
        encoder_weights_sha256=record_of("h0-mini")["weights_sha256"],
    )  # fmt: skip
    CytoSyn(sit, vae, records=records).save_pretrained(root / "model")
    return root / "model"


SECOND_COHORT = (
    "sets.conditioning.selection=guidance", "sets.reference.selection=val-out",
    "sets.conditioning.count=0", "sets.reference.count=0",
    "generations.from-conditioning.count=0",
)  # fmt: skip
"""What has table 3's two sets of another cohort in the toy world, which has none."""
SMALL_PIXCELL = (
    *(f"generations.pixcell-{name}.guidance_px=32" for name in (
        "png", "jpeg", "png-val-out", "jpeg-val-out", "jpeg-conditioning")),
    "generations.pixcell-jpeg-conditioning.count=0",
)  # fmt: skip
"""PixCell's part is played by the toy model, whose guiding tiles have its own size."""


def toy(root: Path, name: str, *more: str) -> Protocol:
    """A protocol over the toy world, with as few steps and resamples as show something."""
    fixed = [
        f"dataset={root / 'real'}", f"out={root / 'out'}", f"count={COUNT}", "weights=random:0",
        "device=cpu", f"models.*.model={root / 'model'}", "models.*.generator=own",
        "models.*.encoder=h0-mini", "generations.*.steps=[2]", "settings.draws=3",
        "settings.subsample=32", "settings.kid_subsets=4", "settings.fld_seeds=[0,1]",
        "group_tiles=8", "tiles=4", "top=6",
    ]  # fmt: skip
    return load_protocol(name, None, [*fixed, *more])


def make_all(protocol: Protocol) -> SourceMaker:
    """Make the images with the model and write features of them, as `cache` would."""
    sources, cells = SourceMaker(protocol), plan_cells(protocol)
    for seen, encoder in sources.conditioning_features():
        if sources.missing_features(seen, encoder, whole=True):
            _write_generated(sources, seen, encoder)
    for source in made_sources(protocol, cells):
        if sources.missing_images(source):
            sources.generate_images(source, ALONE)
    for seen, encoder in all_features(protocol, cells):
        if sources.missing_features(seen, encoder):
            _write_generated(sources, seen, encoder)
    return sources


def _write_generated(sources: SourceMaker, seen: Seen, encoder: str) -> None:
    """Features of images, or of tiles through a view: their source's own, noisy and shifted."""
    tiles = sources.select_tiles(seen.source)
    store = FeatureStore(Dataset(Path(sources.protocol.dataset)), tile_px=PX, encoder=encoder)
    noise = 0.05 if seen.source.startswith("vae:") else 0.3
    found = {}
    for slide_id in tiles.whole.slide_ids:
        table = read_candidates(tiles.dataset, slide_id)
        names = _column(table, "source_slide_id", [slide_id] * table.num_rows)
        ranks = _column(table, "source_rank", list(range(table.num_rows)))
        rows = noise * random_features(f"{seen}{encoder}{slide_id}", table.num_rows, DIM) - noise
        for row, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            own = random_features(f"{encoder}{row}", 1, DIM) if name is None else None
            rows[row] += store.read(name, [rank])[0] if own is None else own[0]
        found[slide_id] = rows.astype(np.float32)
    record = record_of(encoder, seen.view, seen.px or PX)
    write_features(tiles.dataset, found, record, seen.view)


def _column(table: pa.Table, name: str, default: list[Any]) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else default


def make_pixel_model(folder: Path) -> None:
    """An exported untrained model of 224 px that Inception's features condition."""
    encoder = load_encoder("inception-v3", "random:0", device="cpu")
    torch.manual_seed(0)
    sit = SiT(SiTConfig.preset("tiny", latent_size=28, condition_dim=2048, depth=2))
    records = Records(
        encoder="inception-v3", encoder_weights="random:0", encoder_is_random=True, mpp=0.5,
        encoder_weights_sha256=encoder.weights_sha256,
    )  # fmt: skip
    CytoSyn(sit, VAE(VAEConfig.preset("tiny")), records=records).save_pretrained(folder)
