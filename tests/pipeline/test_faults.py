"""Faults injected into the stages: one slide's never harms another, nothing is half-written."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tifffile

from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    TileStore,
    read_journal,
    read_slides,
)
from pipeline.dataset.ledger import current_entries
from pipeline.run.summary import Summary
from pipeline.slides.entries import find_slides
from pipeline.slides.scan import _slide_before_opening, record_slides
from pipeline.slides.tiff_extent import what_is_missing
from tests.pipeline.faults import ROOT, contents, pipeline

SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"
CUTS = (0.1, 0.4, 0.69, 0.8, 0.9999)


def aperio(path: Path, rgb: np.ndarray) -> None:
    """A tiled TIFF that OpenSlide takes for an Aperio slide of 0.5 mpp."""
    said = "Aperio Image Library v1\n1x1 [0,0 1x1] (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(
        path, rgb, tile=(256, 256), compression="jpeg", photometric="rgb", description=said,
        compressionargs={"level": 70}, metadata=None,
    )  # fmt: skip


def outcomes(root: Path, stage: str) -> dict[str, tuple[str, str]]:
    scope = "224" if stage == "tile" else ""
    rows = current_entries(read_journal(Dataset(root), stage), scope)
    return {slide: (entries[-1].outcome, entries[-1].reason) for slide, entries in rows.items()}


def test_every_bad_slide_fails_with_its_reason_and_the_good_one_is_tiled(
    tmp_path: Path, tiled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, root = tmp_path / "slides", tmp_path / "dataset"
    folder.mkdir()
    shutil.copy2(SLIDE, folder)
    whole = SLIDE.read_bytes()
    for cut in CUTS:
        (folder / f"cut-{cut}.svs").write_bytes(whole[: int(len(whole) * cut)])
    glass = np.random.default_rng(0).normal(243, 1.5, (1024, 1024, 3)).astype(np.uint8)
    aperio(folder / "glass.svs", glass)
    aperio(folder / "small.svs", glass[:200, :300])
    assert main(["scan", str(folder), "--dataset", str(root), "--workers", "1"]) == 1
    slides = {slide.slide_id: slide for slide in read_slides(Dataset(root))}
    for cut in CUTS:
        assert slides[f"cut-{cut}"].status == "failed"
        assert "the file is cut off: " in slides[f"cut-{cut}"].reason
    assert slides["small"].status == "rejected"
    assert "300x200 px is smaller than one tile" in slides["small"].reason
    assert slides["glass"].status == "ok"
    assert main(["tissue", "--dataset", str(root), "--workers", "1"]) == 0
    assert outcomes(root, "tissue")["glass"][0] == "rejected"
    assert "no tile has enough tissue" in outcomes(root, "tissue")["glass"][1]
    assert main(["select", "--dataset", str(root), "--name", "train"]) == 0
    assert main(["tile", "--dataset", str(root), "--workers", "1"]) == 0
    assert set(outcomes(root, "tile")) == {"CMU-1-Small-Region"}
    (made,) = Dataset(root).tiles_dir(224).glob("*.tar")
    (expected,) = tiled.tiles_dir(224).glob("*.tar")
    assert made.read_bytes() == expected.read_bytes()
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_cut_off_tiff_is_seen_at_every_length(tmp_path: Path, big: bool, order: str) -> None:
    path = tmp_path / "whole.tif"
    pixels = np.random.default_rng(1).integers(0, 255, (300, 300, 3), np.uint8)
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as tiff:
        tiff.write(pixels, tile=(128, 128), compression="deflate")
        tiff.write(pixels[::4, ::4], rowsperstrip=16)
    assert what_is_missing(path) == ""
    whole = path.read_bytes()
    for length in range(16, len(whole), 4097):
        path.write_bytes(whole[:length])
        assert what_is_missing(path), f"cut at {length} of {len(whole)} bytes"


def test_a_slide_that_goes_bad_after_scan_fails_alone_until_it_is_whole_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, root = tmp_path / "slides", tmp_path / "dataset"
    folder.mkdir()
    for name in ("good", "bad"):
        shutil.copy2(SLIDE, folder / f"{name}.svs")
    run = ("--dataset", str(root), "--workers", "1")
    assert main(["scan", str(folder), *run]) == 0
    assert main(["tissue", *run]) == 0
    assert main(["select", "--dataset", str(root), "--name", "train"]) == 0
    with tifffile.TiffFile(SLIDE) as tiff:
        page = tiff.pages[0]
        middle = len(page.dataoffsets) // 2
        offset, count = page.dataoffsets[middle], page.databytecounts[middle]
    with (folder / "bad.svs").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    os.utime(folder / "bad.svs", ns=(SLIDE.stat().st_atime_ns, SLIDE.stat().st_mtime_ns))
    capsys.readouterr()
    assert main(["tile", *run]) == 1
    good, bad = outcomes(root, "tile")["good"], outcomes(root, "tile")["bad"]
    assert good[0] == "done"
    assert bad[0] == "failed"
    # Its samples are seen to differ before a damaged part is read.
    assert "is no longer the file that scan recorded" in bad[1]
    assert "run `scan` again" in bad[1]
    assert [path.name.split(".")[0] for path in Dataset(root).tiles_dir(224).glob("*.tar")] == [
        "good"
    ]
    shutil.copy2(SLIDE, folder / "bad.svs")
    assert main(["tile", *run]) == 0
    tiles = TileStore(Dataset(root), 224)
    good_tiles, bad_tiles = (tiles.recorded_blocks(name) for name in ("good", "bad"))
    assert good_tiles == bad_tiles


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own; the test is skipped where none may be mounted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.full
def test_a_full_disk_fails_the_slide_and_room_mends_it(tmp_path: Path, tiled: Dataset) -> None:
    root = tmp_path / "dataset"
    with mounted(root, "size=4m"):
        run = ("--dataset", str(root))
        assert pipeline("scan", str(SLIDE), *run).returncode == 0
        assert pipeline("tissue", *run).returncode == 0
        assert pipeline("select", *run, "--name", "train").returncode == 0
        done = pipeline("tile", *run, "--workers", "1")
        assert done.returncode == 1
        ((outcome, reason),) = outcomes(root, "tile").values()
        assert outcome == "failed"
        assert "No space left on device" in reason
        assert "Traceback" not in done.stdout + done.stderr
        assert not list(root.glob("tiles/*/*.tar"))
        assert not list((root / ".tmp").rglob("*.tar"))
        subprocess.run(["mount", "-o", "remount,size=40m", str(root)], check=True)
        assert pipeline("tile", *run, "--workers", "1").returncode == 0
        (made,) = Dataset(root).tiles_dir(224).glob("*.tar")
        (expected,) = tiled.tiles_dir(224).glob("*.tar")
        assert made.read_bytes() == expected.read_bytes()


def test_a_read_only_output_is_one_line(tmp_path: Path, tiled: Dataset) -> None:
    root = tmp_path / "dataset"
    with mounted(root, "size=40m"):
        shutil.copytree(tiled.root, root, dirs_exist_ok=True)
        before = contents(root)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        done = pipeline("select", "--dataset", str(root), "--name", "more", "--tiles", "8")
        assert done.returncode == 2
        assert "Read-only file system" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        done = pipeline("tile", "--dataset", str(root), "--tile-px", "256")
        assert done.returncode in (1, 2)
        assert "Read-only file system" in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert contents(root) == before


def test_an_unreadable_file_fails_alone(tmp_path: Path) -> None:
    folder, root = tmp_path / "slides", tmp_path / "dataset"
    folder.mkdir()
    for name in ("locked", "open"):
        shutil.copy2(SLIDE, folder / f"{name}.svs")
    (folder / "locked.svs").chmod(0)
    plain: tuple[str, ...] = ()
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads every file, and setpriv is not there to take that from it")
        plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    done = pipeline("scan", str(folder), "--dataset", str(root), under=plain)
    assert done.returncode == 1, done.stderr
    assert outcomes(root, "scan") == {
        "locked": ("failed", "cannot be read: Permission denied"), "open": ("done", ""),
    }  # fmt: skip


def test_a_slide_that_kills_scan_is_in_the_table_with_its_reason(tmp_path: Path) -> None:
    dataset, (source,) = Dataset(tmp_path), find_slides([str(SLIDE)])
    killed = Entry(source.slide_id, "failed", "f", "killed its worker 3 times",
                   values=asdict(_slide_before_opening(source)))  # fmt: skip
    with Run(dataset, "scan", {}) as run:
        run.append([killed])
        record_slides(dataset, run, Summary("scan"))
    (slide,) = read_slides(dataset)
    assert (slide.status, slide.reason) == ("failed", "killed its worker 3 times")
    assert (slide.path, slide.bytes) == (str(SLIDE), SLIDE.stat().st_size)
