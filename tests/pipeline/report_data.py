"""A dataset of many slides, made from the overlay and candidates of the committed one.

Files, fingerprints and journal lines are such as the stages write; only the numbers vary.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Run,
    Slide,
    read_candidates,
    read_identity,
    read_journal,
    read_slides,
    write_slides,
)
from pipeline.slides.barcode import parse_barcode
from pipeline.tissue.stage import tissue_fingerprint

_UNREADABLE = "slide {}.svs: cannot read level 0 at x={}, y=0, 64x64 px; fetch it again"
_COARSE = "{:.4g} mpp is coarser than the target 0.5; slides are never enlarged"
_BLACK = "{}% of the slide is black: fluorescence or an empty scan, not brightfield H&E"
_INKED = "no tile has enough tissue free of artifacts; tiles refused: pen {}"


@dataclass(frozen=True)
class _Fate:
    status: str = "ok"
    reason: str = ""
    tissue: str = "done"
    tissue_reason: str = ""


def replicate(tiled: Dataset, root: Path, slides: int, *, seed: int = 0) -> Dataset:
    """`slides` slides under TCGA names of many sites; a few of each kind of mishap.

    Their overlays are the committed slide's at an eighth of its size: quick to read again.
    """
    rng = np.random.default_rng(seed)
    (template,) = read_slides(tiled)
    identity = read_identity(tiled)
    dataset = Dataset(root)
    for folder in ("tissue", "candidates"):
        (root / folder).mkdir(parents=True)
    dataset.identity_file.write_bytes(tiled.identity_file.read_bytes())
    sources = _Sources(tiled, dataset, template)
    rows: list[Slide] = []
    entries: list[Entry] = []
    for name in _names(rng, slides):
        fate = _fate(rng, name)
        slide = _slide(rng, template, name, fate)
        rows.append(slide)
        if slide.status == "ok" and fate.tissue != "waiting":
            mark = tissue_fingerprint(slide, identity)
            entries.append(sources.entry(rng, slide.slide_id, mark, fate))
    with Run(dataset, "tissue", {}) as run:
        run.append(entries)
        write_slides(dataset, run.run_id, rows)
    with Run(dataset, "scan", {}) as run:
        run.append(_scan_entry(slide) for slide in rows)
    return dataset


def _names(rng: np.random.Generator, count: int) -> Iterator[str]:
    """Barcodes of that many slides, unlike numbers of them a site, as in TCGA."""
    table = resources.files("pipeline.slides.tcga").joinpath("tissue_source_sites.tsv")
    listed = [line.split("\t")[0] for line in table.read_text("utf-8").splitlines()[1:]]
    codes = [code for code in listed if len(code) == 2]
    weights = 1 / np.arange(1, len(codes) + 1)
    sites = rng.choice(codes, count, p=weights / weights.sum())
    for number, site in enumerate(sites):
        digest = hashlib.sha256(str(number).encode()).hexdigest().upper()
        uuid = "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))
        yield f"TCGA-{site}-{number:04X}-01Z-00-DX1.{uuid}"


def _fate(rng: np.random.Generator, name: str) -> _Fate:
    chance = rng.random()
    if chance < 0.01:
        return _Fate("failed", _UNREADABLE.format(name, rng.integers(9000)))
    if chance < 0.03:
        return _Fate("rejected", _COARSE.format(rng.uniform(0.6, 1.2)))
    if chance < 0.035:
        return _Fate(tissue="waiting")
    if chance < 0.045:
        return _Fate(tissue="black", tissue_reason=_BLACK.format(rng.integers(60, 99)))
    if chance < 0.055:
        return _Fate(tissue="rejected", tissue_reason=_INKED.format(rng.integers(5, 60)))
    return _Fate()


def _slide(rng: np.random.Generator, template: Slide, name: str, fate: _Fate) -> Slide:
    barcode = parse_barcode(name)
    assert barcode is not None
    mpp = float(rng.choice([0.2485, 0.252, 0.5015], p=[0.1, 0.72, 0.18]))
    return replace(
        template, slide_id=name, path=f"/slides/{name}.svs", status=fate.status,
        reason=fate.reason, mpp=None if fate.status == "failed" else round(mpp, 6),
        mpp_source="" if fate.status == "failed" else "vendor", site=barcode.site,
        project=barcode.project, patient=barcode.patient, sample_type=barcode.sample_type,
    )  # fmt: skip


def _scan_entry(slide: Slide) -> Entry:
    outcome = "done" if slide.status == "ok" else slide.status
    return Entry(slide.slide_id, outcome, "scan", slide.reason)  # type: ignore[arg-type]


class _Sources:
    """The real slide's files, from which those of the many are made."""

    def __init__(self, tiled: Dataset, dataset: Dataset, template: Slide) -> None:
        self._dataset = dataset
        self._mask = tiled.mask_file(template.slide_id)
        self._overlay = dataset.root / "tissue" / ".overlay"
        large = cv2.imread(str(tiled.overlay_file(template.slide_id)), cv2.IMREAD_REDUCED_COLOR_8)
        self._overlay.write_bytes(cv2.imencode(".jpg", large)[1].tobytes())
        self._candidates_table = read_candidates(tiled, template.slide_id)
        (entry,) = read_journal(tiled, "tissue")
        self._values = entry.values
        # Files of equal size are one file under many names: quick to make.
        self._sizes = np.unique(np.random.default_rng(1).lognormal(5, 1, 60).astype(int) + 1)
        self._tables: dict[int, Path] = {}

    def entry(self, rng: np.random.Generator, slide_id: str, mark: str, fate: _Fate) -> Entry:
        """The tissue stage's line of a slide, and its files."""
        if fate.tissue == "black":
            return Entry(slide_id, "rejected", mark, fate.tissue_reason)
        rows = 0 if fate.tissue == "rejected" else int(rng.choice(self._sizes))
        tiles = {
            "kept": rows, "little tissue": int(rng.integers(0, 60)),
            "no tissue": int(rng.integers(100, 900)), "pen": int(rng.integers(0, 9)),
        }  # fmt: skip
        values: dict[str, Any] = {
            **self._values, "tiles": {key: n for key, n in tiles.items() if n},
            "class_mm2": self._areas(rng, rows),
        }  # fmt: skip
        counts = {"grid tiles": sum(tiles.values()), "candidate tiles": rows}
        files = self._files(slide_id, rows)
        outcome = "done" if rows else "rejected"
        return Entry(
            slide_id, outcome, mark, fate.tissue_reason, files=files, counts=counts, values=values
        )

    def _areas(self, rng: np.random.Generator, rows: int) -> dict[str, float]:
        tissue = round(0.0125 * (rows + 1) * float(rng.uniform(0.9, 1.3)), 4)
        parts = rng.gamma(0.15, 0.15, 4)
        names = ("pen", "out of focus", "fold", "other artifact")
        areas = {
            name: round(tissue * float(part), 4) for name, part in zip(names, parts, strict=True)
        }
        return {"tissue": tissue, **{name: area for name, area in areas.items() if area}}

    def _files(self, slide_id: str, rows: int) -> tuple[FileRecord, ...]:
        dataset = self._dataset
        if rows not in self._tables:
            table = self._candidates_table.take(
                pa.array(np.arange(rows) % self._candidates_table.num_rows)
            )
            table = table.set_column(0, "rank", pa.array(np.arange(rows, dtype=np.int32)))
            pq.write_table(table, dataset.candidates_file(slide_id))
            self._tables[rows] = dataset.candidates_file(slide_id)
        else:
            os.link(self._tables[rows], dataset.candidates_file(slide_id))
        os.link(self._mask, dataset.mask_file(slide_id))
        os.link(self._overlay, dataset.overlay_file(slide_id))
        return tuple(
            FileRecord(dataset.relative_path(path), path.stat().st_size, "")
            for path in (
                dataset.mask_file(slide_id), dataset.overlay_file(slide_id),
                dataset.candidates_file(slide_id),
            )
        )  # fmt: skip
