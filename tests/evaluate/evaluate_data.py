"""Small real and synthetic datasets in the contract, written by the contract's own functions."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from common.terms import Terms
from common.torch_processes import ALONE
from evaluate.generate.condition_source import ConditionSource
from evaluate.generate.run import Request, generate
from model import CytoSyn, SiT, SiTConfig
from model.cytosyn import Records
from model.vae import VAE, VAEConfig
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Entry,
    HashingFile,
    Run,
    Slide,
    TileStore,
    claim_identity,
    commit_bytes,
    commit_file,
    commit_json,
    encode_png,
    identity_value,
    make_selection,
    new_run_id,
    read_candidates,
    read_selection,
    read_slides,
    write_candidates,
    write_selection,
    write_slides,
    write_tar,
)
from pipeline.dataset.features import (
    cls_table,
    encoder_file,
    feature_scope,
    open_writer,
    write_blocks,
)

DIM = 12
PX = 64  # small tiles: nothing here depends on their size

RECORD: dict[str, Any] = {
    "encoder": "h0-mini",
    "weights": "random:0",
    "weights_sha256": "a" * 64,
    "random_weights": True,
    "dim": DIM,
    "view": "",
    "compute_dtype": "float32",
    "tile_px": PX,
}

DOOR_PX = 32
DOOR_RECORD = {**RECORD, "tile_px": DOOR_PX}


def export_model(folder: Path, px: int, dim: int, record: dict[str, Any]) -> Path:
    """A tiny exported model; its weights are noise, so that features steer it."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig.preset("tiny", latent_size=px // 8, condition_dim=dim, depth=2))
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.normal_(0, 0.1)
    records = Records(
        encoder=record["encoder"],
        encoder_weights=record["weights"],
        encoder_weights_sha256=record["weights_sha256"],
        encoder_is_random=record["random_weights"],
        mpp=0.5,
    )
    CytoSyn(sit, VAE(VAEConfig.preset("tiny")), records=records).save_pretrained(folder)
    return folder


def slide_colour(slide_id: str) -> npt.NDArray[np.uint8]:
    """A colour of the slide's own, so that its tiles are recognised."""
    return np.frombuffer(hashlib.sha256(slide_id.encode()).digest()[:3], np.uint8)


def real_tile(slide_id: str, rank: int, px: int = PX) -> npt.NDArray[np.uint8]:
    tile = np.empty((px, px, 3), np.uint8)
    tile[:] = slide_colour(slide_id)
    tile[: rank + 1] = 255 - tile[: rank + 1]
    return tile


def write_tiles(dataset: Dataset, slide_id: str, count: int, px: int) -> None:
    with Run(dataset, "tile", {}) as run:
        index: list[bytes] = []
        final = dataset.tiles_dir(px) / f"{slide_id}.0-{count}.tar"
        pngs = [encode_png(real_tile(slide_id, rank, px)) for rank in range(count)]
        tar = commit_file(
            dataset, run.run_id, final, lambda f: index.append(write_tar(f, slide_id, 0, pngs))
        )
        idx = commit_bytes(dataset, run.run_id, final.with_suffix(".idx"), index[0])
        run.append(
            [Entry(slide_id, "done", "f", scope=str(px), start=0, stop=count, files=(tar, idx))]
        )


def _write_table(file: HashingFile, table: pa.Table) -> None:
    with open_writer(file, table.schema) as writer:
        write_blocks(writer, table)


def write_features(
    dataset: Dataset,
    features: dict[str, npt.NDArray[np.float32]],
    record: dict[str, Any] | None = None,
    view: str = "",
) -> None:
    """Cache CLS features [n, d] of ranks 0..n-1 of each slide, as the `cache` stage does."""
    record = record or RECORD
    encoder, px = record["encoder"], record["tile_px"]
    folder = dataset.features_dir(px, encoder, view) / "cls"
    with Run(dataset, "cache", {}) as run:
        for slide_id, rows in features.items():
            final = folder / f"{slide_id}.0-{len(rows)}.parquet"
            table = cls_table(0, rows)
            file = commit_file(dataset, run.run_id, final, lambda f, t=table: _write_table(f, t))
            scope = feature_scope(px, encoder, view, "cls")
            entry = Entry(
                slide_id, "done", "f", scope=scope, start=0, stop=len(rows), files=(file,)
            )
            run.append([entry])
        commit_json(dataset, run.run_id, encoder_file(dataset, px, encoder, view, "cls"), record)


def random_features(slide_id: str, count: int, dim: int = DIM) -> npt.NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).normal(1.0, 1.0, (count, dim)).astype(np.float32)


def make_real(
    root: Path, slides: dict[str, int] | None = None, *, record: dict[str, Any] | None = None
) -> Dataset:
    """A real dataset of slides with so many tiles each, their features, and selection `train`."""
    slides = slides or {"A.b-1": 40, "C-2": 24}
    record = record or RECORD
    dataset = Dataset(root)
    claim_identity(dataset, {"tile_px": record["tile_px"], "mpp": 0.5}, stage="scan", versions={})
    run_id = new_run_id()
    write_slides(dataset, run_id, [Slide(slide_id, path="") for slide_id in slides])
    ranks = {}
    for slide_id, count in slides.items():
        ranks[slide_id] = np.arange(1, count, dtype=np.int32)
        columns = [np.arange(count), *[np.zeros(count)] * 4]
        arrays = [
            pa.array(column).cast(field.type)
            for column, field in zip(columns, CANDIDATES_SCHEMA, strict=True)
        ]
        write_candidates(dataset, run_id, slide_id, pa.table(arrays, schema=CANDIDATES_SCHEMA))
        write_tiles(dataset, slide_id, count, record["tile_px"])
    dim = record["dim"]
    features = {slide_id: random_features(slide_id, n, dim) for slide_id, n in slides.items()}
    write_features(dataset, features, record)
    write_selection(dataset, run_id, make_selection("train", ranks, {"rule": "test"}))
    return dataset


def tile_hashes(dataset: Dataset) -> dict[tuple[str, int], str]:
    """sha256 of the pixels of every tile of the selection `generated`, read by the contract."""
    store = TileStore(dataset, int(identity_value(dataset, "tile_px")))
    return {
        (slide_id, int(rank)): hashlib.sha256(tile.tobytes()).hexdigest()
        for slide_id, ranks in read_selection(dataset, "generated").items()
        for rank, tile in zip(ranks, store.read(slide_id, ranks), strict=True)
    }


class Stripes:
    """A small generator: noise of the image's seed under a stripe for every feature."""

    tile_px = PX
    mpp: float | None = None
    condition_dim = DIM
    encoder_record: dict[str, Any] | None = RECORD
    terms: tuple[Terms, ...] = ()

    def __init__(self, name: str = "stripes", stop_after: int | None = None) -> None:
        self.name, self.stop_after = name, stop_after
        self.shapes: set[int] = set()
        self.calls = 0

    def identity(self) -> dict[str, Any]:
        return {"model_sha256": self.name, "solver": "none"}

    def generate_tiles(
        self,
        features: npt.NDArray[np.float32] | None,
        seeds: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.uint8]:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.shapes.add(len(seeds))
        tiles = np.empty((len(seeds), PX, PX, 3), np.uint8)
        for row, seed in enumerate(seeds):
            random = np.random.default_rng(int(np.uint64(seed)))
            tiles[row] = random.integers(0, 256, (1, 1, 3), np.uint8)
            if features is not None:
                tiles[row, :DIM, 0, 0] = np.clip(features[row] * 32 + 128, 0, 255)
        return tiles


def make_synthetic(
    root: Path,
    guidance: ConditionSource,
    *,
    record: dict[str, Any] | None = None,
    shift: float = 0.0,
    **request: Any,
) -> Dataset:
    """A synthetic dataset whose features are its sources' own, a little noisy and shifted."""
    generate(Stripes(), guidance, Request(out=root, **request), ALONE)
    dataset = Dataset(root)
    features = {}
    for slide in read_slides(dataset):
        rows = read_candidates(dataset, slide.slide_id).num_rows
        images = np.arange(rows) + int(slide.slide_id.removeprefix("gen-")) * 1024
        found = guidance.read_features(images // request.get("variations", 1))
        noise = 0.1 * random_features(slide.slide_id, rows) + np.float32(shift)
        features[slide.slide_id] = noise if found is None else found + noise
    write_features(dataset, features, record)
    return dataset
