"""What is stale, or was made again while it was read, is refused by name, slide by slide."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Run,
    TileStore,
    read_selection,
    read_slides,
    write_slides,
)
from pipeline.dataset.lineage import Lineage, glance_fingerprints
from pipeline.imports.config import CoordinatesExport
from pipeline.imports.export import SlideExport, export_slide, plan_exports
from train.source import check_coverage
from train.stream import compile_blocks


def latest(dataset: Dataset, stage: str, scope: str) -> Entry:
    (entries,) = Ledger.read(dataset, stage)[scope].by_slide.values()
    return entries[-1]


def make_tissue_again(dataset: Dataset) -> None:
    """The line that an import of masks, or `tissue` of a replaced slide, leaves."""
    line = replace(latest(dataset, "tissue", ""), fingerprint="f" * 32)
    with Run(dataset, "tissue", {}) as run:
        run.append([line])


def read_tiles(dataset: Dataset) -> None:
    (slide_id,) = TileStore(dataset, 224).slide_ids()
    TileStore(dataset, 224).read(slide_id, [0])


def require_tiles(dataset: Dataset) -> None:
    table = compile_blocks(read_selection(dataset, "train"))
    check_coverage(dataset, table, tile_px=224, encoder="e", view="", kinds=())


READERS = pytest.mark.parametrize("read", [read_tiles, require_tiles])


@READERS
def test_tiles_of_former_candidates_are_refused(own_tiled: Dataset, read) -> None:
    made_from = latest(own_tiled, "tile", "224").values["tissue"]
    assert made_from == latest(own_tiled, "tissue", "").fingerprint
    read(own_tiled)
    make_tissue_again(own_tiled)
    with pytest.raises(UserError, match=r"were cut from other candidates .* run `python -m pipe"):
        read(own_tiled)


@READERS
def test_tiles_of_a_former_slide_are_refused(own_tiled: Dataset, read) -> None:
    """Scanned again after the file was replaced; `tissue` has not run yet."""
    slides = [replace(slide, sampled_sha256="0" * 64) for slide in read_slides(own_tiled)]
    write_slides(own_tiled, "test", slides)
    with pytest.raises(UserError, match="cut from another file than the slide is now"):
        read(own_tiled)


def test_lines_of_earlier_releases_are_read(own_tiled: Dataset) -> None:
    tiles = Ledger.read(own_tiled, "tile").lines
    shutil.rmtree(own_tiled.status_dir("tile"))
    with Run(own_tiled, "tile", {}) as run:
        run.append([replace(line, values={}) for line in tiles])
    make_tissue_again(own_tiled)
    read_tiles(own_tiled)


def test_a_glance_sees_what_the_ledger_sees(own_tiled: Dataset) -> None:
    for stage, scope in (("tissue", ""), ("tile", "224"), ("tile", "256")):
        exact = {
            slide_id: entries[-1].fingerprint
            for slide_id, entries in Ledger.read(own_tiled, stage)[scope].by_slide.items()
        }
        assert glance_fingerprints(own_tiled, stage, scope) == exact
        assert exact or scope == "256"


def test_a_line_that_only_looks_like_one_refuses_nothing(own_tiled: Dataset) -> None:
    """Altered, so that the ledger does not take it: what is looked at alone is no proof."""
    make_tissue_again(own_tiled)
    journal = max(own_tiled.status_dir("tissue").glob("*.jsonl"))
    journal.write_text(journal.read_text().replace('"crc": "', '"crc": "0'))
    read_tiles(own_tiled)


def test_a_shard_that_was_made_again_is_not_mixed_with_the_ledger(own_tiled: Dataset) -> None:
    store = TileStore(own_tiled, 224)
    (slide_id,) = store.slide_ids()
    tar = own_tiled.root / latest(own_tiled, "tile", "224").files[0].path
    idx = tar.with_suffix(".idx")
    before = {path: path.read_bytes() for path in (tar, idx)}
    # Its index says other sizes, the tar has other bytes; alone and together.
    cut_index = b"\n".join(before[idx].splitlines()[:-1]) + b"\n"
    for changed in ({idx: cut_index}, {tar: before[tar] + bytes(512)}):
        for path, data in changed.items():
            path.write_bytes(data)
        with pytest.raises(UserError, match="is not the file that the journal named"):
            TileStore(own_tiled, 224).read(slide_id, [0])
        for path, data in before.items():
            path.write_bytes(data)
    # Opened before, closed as too many others were, and opened again.
    store.read(slide_id, [0])
    store._handles.clear()
    replaced = tar.with_suffix(".new")
    replaced.write_bytes(bytes(reversed(before[tar])))
    replaced.replace(tar)
    with pytest.raises(UserError, match=r"\.tar is not the file that the journal named"):
        store.read(slide_id, [0])


def test_other_sizes_of_tiles_are_judged_by_themselves(own_tiled: Dataset) -> None:
    entry = latest(own_tiled, "tile", "224")
    features = replace(entry, values={"tiles": entry.fingerprint})
    Lineage(own_tiled, 224).check_features(entry.slide_id, [features], "features")
    with Run(own_tiled, "tile", {}) as run:
        run.append([replace(entry, fingerprint="f" * 32, scope="256")])
        Lineage(own_tiled, 224).check_features(entry.slide_id, [features], "features")
        run.append([replace(entry, fingerprint="f" * 32)])
    with pytest.raises(
        UserError, match=r"features were made from other tiles .*`python -m pipeline cache"
    ):
        Lineage(own_tiled, 224).check_features(entry.slide_id, [features], "features")


def test_ranks_of_former_candidates_are_not_exported(own_tiled: Dataset, tmp_path: Path) -> None:
    def export(*selections: str) -> SlideExport:
        config = CoordinatesExport(out=tmp_path, selections=selections)
        (planned,) = plan_exports(own_tiled, config)
        return planned

    assert export("train").former == ""
    line = latest(own_tiled, "tissue", "")
    files = [replace(f, sha256="0" * 64) if f.path.startswith("cand") else f for f in line.files]
    with Run(own_tiled, "tissue", {}) as run:
        run.append([replace(line, fingerprint="f" * 32, files=tuple(files))])
    assert export().former == "", "the mask is the slide's own"
    (entry,) = export_slide(str(own_tiled.root), export("train"), str(tmp_path))
    assert entry.outcome == "failed"
    assert "selection 'train' was drawn from another file or other candidates" in entry.reason
    slides = [replace(slide, sampled_sha256="0" * 64) for slide in read_slides(own_tiled)]
    write_slides(own_tiled, "test", slides)
    assert "are of another file than the slide is now: run `tissue`" in export().former
    assert list(tmp_path.glob("*.geojson")) == []
