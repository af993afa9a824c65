"""README.md of a dataset: what its tiles are, how they are read, and what they descend from."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from common.cards import render_card
from common.files import write_text
from pipeline.dataset.identity import DatasetKind, kind_of, read_identity, read_terms
from pipeline.dataset.layout import Dataset
from pipeline.dataset.tables.slides import read_slides

CARD_FILE = "README.md"
_TAGS = ["histology", "pathology", "whole-slide-images", "webdataset"]
_SAMPLER = ("solver", "steps", "guidance_scale", "guidance_low", "guidance_high", "seed",
            "compute_dtype", "generator", "revision", "subfolder")  # fmt: skip
_FEATURES = "Features of the tiles, where there are any, are Parquet files in features/."


def write_dataset_card(dataset: Dataset) -> Path:
    """Write the card of a dataset as it is now, in place of the one that is there."""
    path = dataset.root / CARD_FILE
    write_text(path, dataset_card(dataset))
    return path


def dataset_card(dataset: Dataset) -> str:
    """The card's text, of what the dataset's own files say alone."""
    identity = read_identity(dataset)
    is_generated = kind_of(identity) == DatasetKind.GENERATED
    title = "Generated histology tiles" if is_generated else "Histology tiles"
    data_files = _data_files(dataset)
    sections = [
        ("Content", _describe_content(dataset, identity)),
        ("How the images were made", _describe_generation(identity) if is_generated else []),
        ("Reading it", _describe_reading(has_shards=bool(data_files))),
        ("Intended use and limits", _describe_limits(identity, is_generated=is_generated)),
    ]
    tags = [*_TAGS, "synthetic"] if is_generated else _TAGS
    return render_card(title, {"tags": tags, **data_files}, sections, read_terms(dataset))


def _tile_sizes(dataset: Dataset) -> list[str]:
    folder = dataset.root / "tiles"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _data_files(dataset: Dataset) -> dict[str, object]:
    """The head's keys by which `datasets.load_dataset(DIR)` finds the PNG shards."""
    sizes = [px for px in _tile_sizes(dataset) if any((dataset.root / "tiles" / px).glob("*.tar"))]
    configs = [
        {"config_name": f"{px}px", "data_files": [{"split": "train", "path": f"tiles/{px}/*.tar"}]}
        for px in sizes
    ]
    return {"configs": configs} if configs else {}


def _describe_content(dataset: Dataset, identity: dict[str, Any]) -> list[str]:
    slides = read_slides(dataset) if dataset.slides_file.exists() else []
    usable = sum(slide.status == "ok" for slide in slides)
    px, mpp = identity.get("tile_px", "unknown"), identity.get("mpp") or "unknown"
    lines = [f"Tiles of {px} px at {mpp} µm per pixel, lossless"]
    if kind_of(identity) != DatasetKind.GENERATED:
        lines.append(f"{usable:,} slide{'' if usable == 1 else 's'}")
    for name in dataset.selection_names():
        rows = pq.read_metadata(dataset.selection_file(name)).num_rows
        lines.append(f"Selection {name}: {rows:,} tiles")
    return lines


def _describe_generation(identity: dict[str, Any]) -> list[str]:
    lines = [f"Model: weights {str(identity.get('model_sha256', 'unknown'))[:16]}"]
    lines += [f"{key}: {identity[key]}" for key in _SAMPLER if identity.get(key) is not None]
    if encoder := identity.get("guidance_encoder"):
        lines.append(f"Guided by features of {encoder}, one real tile for each image")
    else:
        lines.append("Not guided by any tile")
    return lines


def _describe_reading(*, has_shards: bool) -> list[str]:
    lines = [f"A dataset of histogen, which reads it with its selections. {_FEATURES}"]
    if has_shards:
        lines.append(
            "The shards are tar files of PNG, as webdataset and datasets.load_dataset read them; "
            "their tiles are all that were cut, of which selections choose"
        )
    return lines


def _describe_limits(identity: dict[str, Any], *, is_generated: bool) -> list[str]:
    if not is_generated:
        return ["For research. A program found tissue and artifacts, and nobody reviewed them"]
    lines = ["For research, never for diagnosis: no patient has this tissue"]
    if identity.get("model_encoder_random"):
        lines.append("The model was trained with an encoder of RANDOM weights: a dry run")
    if note := identity.get("generator_note"):
        lines.append(str(note))
    if forced := identity.get("forced_guidance"):
        lines.append(f"Guidance that does not fit the model: {forced}")
    return lines
