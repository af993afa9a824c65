"""The stages, run as a user runs them, on the committed real slide."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import webdataset
from PIL import Image

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import TileStore, read_candidates, read_journal, read_selection, read_slides
from pipeline.dataset.grid import reserve_size

ROOT = Path(__file__).resolve().parents[2]
SLIDES = ROOT / "tests" / "data" / "slides"


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def text_of(output: str) -> str:
    """The words of a printed table, its lines and breaks left out."""
    return " ".join(re.sub("[─-╿]", " ", output).split())


def digest(root: Path) -> dict[str, str]:
    """sha256 of every file, journals and staging left out."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("status", ".tmp")
    }


def test_the_layout_is_the_contract(tiled):
    files = set(digest(tiled.root))
    slide = "CMU-1-Small-Region"
    assert {"dataset.json", "slides.parquet", "selections/train.parquet"} <= files
    assert {f"tissue/{slide}.png", f"tissue/{slide}.jpg", f"candidates/{slide}.parquet"} <= files
    tars = [f for f in files if f.startswith("tiles/224/") and f.endswith(".tar")]
    assert len(tars) == 1
    assert tars[0].replace(".tar", ".idx") in files
    assert not (tiled.root / ".tmp").exists() or not list((tiled.root / ".tmp").iterdir())


def test_the_slide_is_described(tiled):
    (slide,) = read_slides(tiled)
    assert (slide.status, slide.vendor, slide.mpp, slide.mpp_source) == (
        "ok", "aperio", 0.499, "vendor",
    )  # fmt: skip
    assert (slide.width, slide.height) == (2220, 2967)
    assert slide.tile_mpp == 0.499, "a tile of whole pixels, within the tolerance of 0.5"


def test_candidates_are_in_rank_order_and_have_tissue(tiled):
    table = read_candidates(tiled, "CMU-1-Small-Region")
    assert table["rank"].to_pylist() == list(range(table.num_rows))
    assert 35 <= table.num_rows <= 60
    assert min(table["tissue_fraction"].to_pylist()) >= 0.5
    assert max(table["artifact_fraction"].to_pylist()) <= 0.1
    from pipeline.dataset.grid import rank_keys

    x, y = table["x_level0"].to_numpy(), table["y_level0"].to_numpy()
    keys = rank_keys(0, "CMU-1-Small-Region", x, y)
    assert np.all(keys[1:] > keys[:-1])


def test_the_training_selection_leaves_the_reserve_alone(tiled):
    count = read_candidates(tiled, "CMU-1-Small-Region").num_rows
    ((_, ranks),) = read_selection(tiled, "train").items()
    assert ranks.tolist() == list(range(reserve_size(count), count))


def test_every_tile_equals_the_slide(tiled, cmu_slide):
    table = read_candidates(tiled, "CMU-1-Small-Region")
    store = TileStore(tiled, 224)
    slide = openslide.OpenSlide(cmu_slide)
    ranks = table["rank"].to_pylist()
    for rank, tile in zip(ranks, store.read("CMU-1-Small-Region", ranks), strict=True):
        x, y = int(table["x_level0"][rank].as_py()), int(table["y_level0"][rank].as_py())
        direct = np.asarray(slide.read_region((x, y), 0, (224, 224)).convert("RGB"))
        assert np.array_equal(tile, direct), rank


def test_stock_webdataset_reads_the_shard(tiled):
    (tar,) = tiled.tiles_dir(224).glob("*.tar")
    keys = []
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.size == (224, 224)
        assert image.mode == "RGB"
        assert "icc_profile" not in image.info
        keys.append(sample["__key__"])
    assert keys == [f"CMU-1-Small-Region/{rank:08d}" for rank in range(len(keys))]


def test_the_index_points_at_every_png(tiled):
    (tar,) = tiled.tiles_dir(224).glob("*.tar")
    data = tar.read_bytes()
    lines = tar.with_suffix(".idx").read_text().splitlines()
    assert lines[0] == f"v1.2 {len(lines) - 1}"
    for line in lines[1:]:
        kind, offset, size, name = line.split(" ")
        assert kind == "png"
        assert name.startswith("CMU-1-Small-Region/")
        png = data[int(offset) : int(offset) + int(size)]
        assert png.startswith(b"\x89PNG")
        assert png.endswith(b"IEND\xaeB`\x82")


def test_a_second_run_does_nothing_and_says_so(own_tiled, capsys):
    before = digest(own_tiled.root)
    journals = sorted((own_tiled.root / "status").rglob("*.jsonl"))
    for stage in (
        ["scan", str(SLIDES)],
        ["tissue"],
        ["select", "--name", "train"],
        ["tile"],
    ):
        assert main([stage[0], "--dataset", str(own_tiled.root), *stage[1:]]) == 0
        assert "already done, nothing to redo" in capsys.readouterr().out
    assert digest(own_tiled.root) == before
    assert sorted((own_tiled.root / "status").rglob("*.jsonl")) == journals


def test_two_datasets_made_alike_are_alike_in_bytes(tiled, tmp_path):
    for stage in (
        ["scan", str(SLIDES), "--workers", "2"],
        ["tissue", "--workers", "2"],
        ["select", "--name", "train"],
        ["tile", "--workers", "2"],
    ):
        assert main([stage[0], "--dataset", str(tmp_path / "d"), *stage[1:]]) == 0
    assert digest(tmp_path / "d") == digest(tiled.root)


def test_a_larger_selection_adds_a_shard_and_touches_nothing(tmp_path, capsys):
    root = tmp_path / "d"
    main(["scan", str(SLIDES), "--dataset", str(root)])
    main(["tissue", "--dataset", str(root)])
    main(["select", "--name", "small", "--tiles", "10", "--dataset", str(root)])
    main(["tile", "--dataset", str(root), "--selection", "small"])
    before = digest(root)
    main(["select", "--name", "large", "--dataset", str(root)])
    main(["tile", "--dataset", str(root)])
    after = digest(root)
    assert before.pop("README.md") != after["README.md"]  # the card counts its selections
    assert before.items() <= after.items()
    shards = sorted(f for f in after if f.endswith(".tar"))
    assert len(shards) == 2
    small = read_selection(tiled_at(root), "small").ranks
    large = read_selection(tiled_at(root), "large").ranks
    assert np.array_equal(small, large[: len(small)])
    assert len(TileStore(tiled_at(root), 224).read("CMU-1-Small-Region", large)) == len(large)


def tiled_at(root):
    from pipeline.dataset import open_dataset

    return open_dataset(root)


def test_a_lost_or_short_shard_is_written_again(own_tiled, capsys):
    (tar,) = own_tiled.tiles_dir(224).glob("*.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[:1000])
    assert main(["tile", "--dataset", str(own_tiled.root), "--workers", "1"]) == 0
    assert tar.read_bytes() == whole


def test_a_damaged_tile_is_named(own_tiled):
    (tar,) = own_tiled.tiles_dir(224).glob("*.tar")
    data = bytearray(tar.read_bytes())
    offset, size = map(int, tar.with_suffix(".idx").read_text().splitlines()[4].split(" ")[1:3])
    data[offset : offset + size] = bytes(size)
    tar.write_bytes(data)
    store = TileStore(own_tiled, 224)
    assert store.read("CMU-1-Small-Region", [2])
    with pytest.raises(UserError, match=r"tile 3 of slide CMU-1-Small-Region is damaged"):
        store.read("CMU-1-Small-Region", [3])


def test_bad_slides_give_a_table_of_reasons_and_harm_nobody(tmp_path, cmu_slide):
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "good.svs").symlink_to(cmu_slide)
    (folder / "empty.ndpi").touch()
    (folder / "garbage.svs").write_bytes(b"garbage" * 100)
    (folder / "pointer.tiff").write_text("version https://git-lfs.github.com/spec/v1\n")
    done = pipeline("scan", str(folder), "--dataset", str(tmp_path / "d"))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    for words in ("the file is empty", "git lfs pull", "cannot be opened", "1 done", "3 failed"):
        assert words in text_of(done.stdout)
    statuses = {s.slide_id: s.status for s in read_slides(tiled_at(tmp_path / "d"))}
    assert statuses == {"good": "ok", "empty": "failed", "garbage": "failed", "pointer": "failed"}
    assert pipeline("tissue", "--dataset", str(tmp_path / "d")).returncode == 0


def test_the_shared_bad_slides(tmp_path, shared_data):
    done = pipeline("scan", str(shared_data / "bad_slides"), "--dataset", str(tmp_path / "d"))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "4 failed" in done.stdout


@pytest.mark.full
def test_the_shared_slides_are_taken_or_rejected_for_the_right_reason(tmp_path, shared_data):
    root = tmp_path / "d"
    done = pipeline("scan", str(shared_data / "slides"), "--dataset", str(root))
    assert done.returncode == 1, "the DICOM copy bears the name of the SVS"
    slides = {slide.slide_id: slide for slide in read_slides(tiled_at(root))}
    assert slides["OS-1-detail"].reader == "tiffslide"
    assert slides["TCGA-CR-7395-01A-01-TS1"].site == "CR"
    for name, word in (
        ("TCGA-CR-7395-01A-01-TS1", "--assume-mpp"),
        ("diag_packer_example", "never enlarged"),
        ("openslide_boxes", "no trustworthy mpp"),
        ("openslide_small", "smaller than one tile"),
    ):
        assert slides[name].status == "rejected"
        assert word in slides[name].reason
    done = pipeline("tissue", "--dataset", str(root))
    assert done.returncode == 0
    outcomes = {e.slide_id: e.outcome for e in read_journal(tiled_at(root), "tissue")}
    assert outcomes == {
        "slideio_test3-DAPI-2-387": "rejected", "OS-1-detail": "done", "CMU-1-Small-Region": "done",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "{tmp}/nothing", "--dataset", "{tmp}/d"], ["no such file"]),
        (["scan", "{tmp}", "--dataset", "{tmp}/d"], ["no slides in"]),
        (["tissue", "--dataset", "{tmp}/d"], ["no dataset at", "scan"]),
        (["tile", "--dataset", "{tmp}/d", "--worker", "1", "--slection", "x"], ["--selection"]),
        (["scan"], ["required"]),
        (["frobnicate"], ["invalid choice"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words):
    done = pipeline(*[argument.format(tmp=tmp_path) for argument in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_another_identity_is_refused_with_both_values(own_tiled):
    done = pipeline("scan", str(SLIDES), "--dataset", str(own_tiled.root), "--mpp", "0.25")
    assert done.returncode == 2
    assert "mpp is 0.5 in this dataset, 0.25 was asked for" in " ".join(done.stderr.split())


def test_stages_out_of_order_say_what_to_run(tmp_path):
    root = str(tmp_path / "d")
    main(["scan", str(SLIDES), "--dataset", root])
    with pytest.raises(UserError, match="run `tissue`"):
        main(["select", "--name", "x", "--dataset", root])
    with pytest.raises(UserError, match="pipeline select"):
        main(["tile", "--dataset", root])


def test_a_budget_that_cannot_be_met_names_the_largest(own_tiled):
    with pytest.raises(UserError, match="largest possible is 4"):
        main(["select", "--name", "big", "--tiles", "1_000", "--dataset", str(own_tiled.root)])


@pytest.mark.full
def test_cache_writes_and_reuses_features(own_tiled, capsys):
    """The real H0-mini architecture with seeded weights, on one block of tiles."""
    root = str(own_tiled.root)
    main(["select", "--name", "few", "--tiles", "12", "--dataset", root])
    run = ["cache", "--weights", "random:0", "--selection", "few", "--dataset", root]
    assert main(run) == 0
    folder = own_tiled.features_dir(224, "h0-mini")
    record = json.loads((folder / "cls" / "encoder.json").read_text())
    assert record["random_weights"] is True
    assert record["tokens_shape"] == [196, 768]
    from model.encoders import load_encoder
    from pipeline.dataset.features import FeatureStore

    tiles = np.stack(TileStore(own_tiled, 224).read("CMU-1-Small-Region", range(2, 5)))
    direct = load_encoder("h0-mini", "random:0").encode(tiles)
    cls = FeatureStore(own_tiled, tile_px=224, encoder="h0-mini").read(
        "CMU-1-Small-Region", [2, 3, 4]
    )
    assert np.abs(cls - direct.cls.numpy()).max() < 1e-4
    tokens = FeatureStore(own_tiled, tile_px=224, encoder="h0-mini", kind="tokens-float16").read(
        "CMU-1-Small-Region", [2, 3, 4]
    )
    assert direct.tokens is not None
    assert np.abs(tokens.astype(np.float32) - direct.tokens.numpy()).max() < 0.02
    before = digest(own_tiled.root)
    capsys.readouterr()
    assert main(run) == 0
    assert "already done, nothing to redo" in capsys.readouterr().out
    assert digest(own_tiled.root) == before
    with pytest.raises(UserError, match="weights_sha256"):
        main(["cache", "--weights", "random:1", "--dataset", root])


def test_gated_weights_are_never_replaced(own_tiled, monkeypatch):
    # The variable HF_HUB_OFFLINE is read when the library is imported, which it is by now.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="random:0"):
        main(["cache", "--dataset", str(own_tiled.root)])


@pytest.mark.full
def test_cuda_that_is_not_there_is_one_line(own_tiled):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    done = pipeline(
        "cache", "--weights", "random:0", "--device", "cuda", "--dataset", str(own_tiled.root)
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--device cpu" in done.stderr


def test_tiles_beyond_the_selected_ones_have_a_reason(own_tiled, capsys):
    """A selection that ends within a block: the block is written whole, and the summary says so."""
    shutil.rmtree(own_tiled.root / "tiles")
    shutil.rmtree(own_tiled.status_dir("tile"))
    root = str(own_tiled.root)
    for name, count in (("few", 20), ("more", 37)):
        assert main(["select", "--dataset", root, "--name", name, "--tiles", str(count)]) == 0
    capsys.readouterr()
    written = 0
    # The second run writes what the first one did not; both selections share their first ranks.
    for names in (["few"], ["few", "more"]):
        before = written
        (ranks,) = (ranks for _, ranks in read_selection(own_tiled, names[-1]).items())
        chosen = [word for name in names for word in ("--selection", name)]
        assert main(["tile", "--dataset", root, "--workers", "1", *chosen]) == 0
        written = sum(entry.stop - entry.start for entry in read_journal(own_tiled, "tile"))
        blocks = {rank // 16 for rank in ranks}
        assert written == 16 * len(blocks)
        selected = sum(rank // 16 >= before // 16 + min(blocks) for rank in ranks)
        clause = f"tile: {written - before} tiles for {selected} selected: whole blocks of 16 ranks"
        assert clause in capsys.readouterr().out
    assert main(["tile", "--dataset", root, "--workers", "1", "--selection", "more"]) == 0
    assert "whole blocks" not in capsys.readouterr().out
