"""A slide that becomes another file while a dataset is made of it."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset import Dataset, Ledger, Slide, read_slides
from pipeline.slides.config import IN_PLACE, StageIn
from pipeline.slides.identity import OtherFileError, sample_slide, slide_state
from pipeline.slides.reader import SlideReadError
from pipeline.slides.staging import local_slide
from tests.faults.small_slides import tissue_pixels, write_part
from tests.pipeline.faults import contents, pipeline


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return tissue_pixels()


def recorded(path: Path, **values: object) -> Slide:
    """A slide as `scan` records it."""
    size, mtime_ns = slide_state(path)
    slide = Slide("s", str(path), bytes=size, mtime_ns=mtime_ns, sampled_sha256=sample_slide(path))
    return replace(slide, **values)  # type: ignore[arg-type]


def other_size(path: Path, pixels: np.ndarray) -> None:
    write_part(path, pixels, 300, 768)


def same_size(path: Path, pixels: np.ndarray) -> None:
    write_part(path, pixels, 300)


def same_size_and_time(path: Path, pixels: np.ndarray) -> None:
    before = path.stat()
    write_part(path, pixels, 300)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def older(path: Path, pixels: np.ndarray) -> None:
    write_part(path, pixels, 300)
    os.utime(path, ns=(1, 1))


def renamed_over(path: Path, pixels: np.ndarray) -> None:
    write_part(path.with_suffix(".new"), pixels, 300).replace(path)


WAYS = [other_size, same_size, same_size_and_time, older, renamed_over]
Way = Callable[[Path, np.ndarray], None]


@pytest.mark.parametrize("way", WAYS)
def test_another_file_is_not_opened(tmp_path: Path, pixels: np.ndarray, way: Way) -> None:
    slide = recorded(write_part(tmp_path / "s.tif", pixels))
    way(tmp_path / "s.tif", pixels)
    words = r"slide s is no longer the file that scan recorded \(.*\); run `scan` again"
    with pytest.raises(OtherFileError, match=words), local_slide(slide, IN_PLACE, tmp_path):
        pass


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_replaced_while_it_is_read_counts_for_nothing(
    tmp_path: Path, pixels: np.ndarray, way: Way, is_damaged: bool
) -> None:
    slide = recorded(write_part(tmp_path / "s.tif", pixels))

    def read_slide(is_damaged: bool) -> None:
        with local_slide(slide, IN_PLACE, tmp_path) as path:
            way(path, pixels)
            if is_damaged:
                # Half of one file and half of the other may look like a damaged slide.
                raise SlideReadError("a tile cannot be decoded")

    with pytest.raises(OtherFileError, match="no longer the file that scan recorded"):
        read_slide(is_damaged)


def test_a_file_that_is_touched_moved_or_copied_goes_on(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write_part(tmp_path / "s.tif", pixels)
    slide = recorded(path)
    os.utime(path, ns=(1, 1))
    with local_slide(slide, IN_PLACE, tmp_path):
        shutil.copy(path, tmp_path / "copy.tif")
        (tmp_path / "copy.tif").replace(path)
    with local_slide(slide, IN_PLACE, tmp_path) as found:
        assert found == path


def test_a_file_of_several_is_another(tmp_path: Path) -> None:
    """MIRAX: what is read is in a folder next to the slide's own file, which stays as it is."""
    path = tmp_path / "s.mrxs"
    path.write_bytes(b"a small picture")
    (tmp_path / "s").mkdir()
    for name in ("Slidedat.ini", "Data0000.dat", "Data0001.dat"):
        (tmp_path / "s" / name).write_bytes(name.encode() * 100)
    slide, former = recorded(path), recorded(path)
    former = replace(former, sampled_sha256=sample_slide(path, companions=False))
    with local_slide(slide, IN_PLACE, tmp_path), local_slide(former, IN_PLACE, tmp_path):
        pass
    data = tmp_path / "s" / "Data0001.dat"
    data.write_bytes(data.read_bytes()[::-1])
    with pytest.raises(OtherFileError), local_slide(slide, IN_PLACE, tmp_path):
        pass


def test_what_a_command_brings_is_another_file(tmp_path: Path, pixels: np.ndarray) -> None:
    far = tmp_path / "far"
    stored = write_part(far / "s.tif", pixels)
    copy = f"{sys.executable} -c 'import shutil, sys; shutil.copy(*sys.argv[1:])' {{uri}} {{dest}}"
    stage_in = StageIn(copy, retries=0)
    slide = replace(recorded(stored), mtime_ns=0)
    with local_slide(slide, stage_in, tmp_path / "scratch"):
        pass
    same_size(stored, pixels)
    words = "slide s is no longer the file that scan recorded"
    with (
        pytest.raises(OtherFileError, match=words),
        local_slide(slide, stage_in, tmp_path / "scratch"),
    ):
        pass


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    """A folder with `in`, two slides, and `d`, where scan, tissue and select are done."""
    folder = tmp_path_factory.mktemp("begun")
    for name, shift in (("a", 0), ("b", 100)):
        write_part(folder / "in" / f"{name}.tif", pixels, shift)
    run_all(folder, "scan", "tissue", "select")
    return folder


def run_all(folder: Path, *stages: str) -> list[int]:
    """Run stages on `in` and `d` of a folder; their exit statuses."""
    more = {"scan": [str(folder / "in")], "select": ["--name", "train"]}
    workers = [] if "select" in stages and len(stages) == 1 else ["--workers", "1"]
    return [
        pipeline(
            stage, "--dataset", str(folder / "d"), *more.get(stage, []),
            *(workers if stage not in ("select", "verify") else []),
        ).returncode
        for stage in stages
    ]  # fmt: skip


@pytest.fixture
def own(begun: Path, tmp_path: Path) -> Path:
    """The folder at the path that its journals name, with what a test may change."""
    shutil.copytree(begun, tmp_path / "kept")
    yield begun
    shutil.rmtree(begun)
    shutil.copytree(tmp_path / "kept", begun)


@pytest.mark.full
def test_a_slide_replaced_between_tissue_and_tile_fails_alone_until_it_is_scanned(
    own: Path, pixels: np.ndarray
) -> None:
    before = read_slides(Dataset(own / "d"))
    same_size_and_time(own / "in" / "b.tif", pixels)
    said = pipeline("tile", "--dataset", str(own / "d"), "--workers", "1")
    assert said.returncode == 1
    words = " ".join(said.stdout.split())
    assert "slide b is no longer the file that scan recorded" in words
    lines = Ledger.read(Dataset(own / "d"), "tile")["224"]
    assert [lines.latest(name).outcome for name in ("a", "b")] == ["done", "failed"]
    # The advice, as it is given: `scan` sees the file although its size and time are the former.
    assert run_all(own, "scan") == [0]
    after = read_slides(Dataset(own / "d"))
    assert (after[0], after[1].sampled_sha256) != (before[0], before[1].sampled_sha256)
    assert after[0] == before[0]
    assert run_all(own, "tissue", "select", "tile", "verify") == [0, 0, 0, 0]
    shutil.copytree(own / "d", own / "went on")
    shutil.rmtree(own / "d")
    assert run_all(own, "scan", "tissue", "select", "tile") == [0, 0, 0, 0]
    fresh, went_on = contents(own / "d"), contents(own / "went on")
    for path in fresh:
        if path.startswith(("tiles/", "candidates/", "tissue/")):
            assert went_on[path] == fresh[path], path


@pytest.mark.full
def test_verify_names_tiles_of_a_former_file(own: Path, pixels: np.ndarray) -> None:
    assert run_all(own, "tile") == [0]
    same_size_and_time(own / "in" / "b.tif", pixels)
    assert run_all(own, "scan") == [0], "neither size nor time says anything"
    assert run_all(own, "tissue") == [0], "nothing to do"
    same_size(own / "in" / "b.tif", pixels)
    assert run_all(own, "scan") == [0]
    said = pipeline("verify", "--dataset", str(own / "d"))
    assert said.returncode == 1
    words = " ".join(said.stdout.split())
    assert "made from another file of slide b than slides.parquet has" in words
    assert "of slide a" not in words
    assert run_all(own, "tissue", "select", "tile", "verify") == [0, 0, 0, 0]


@pytest.mark.full
def test_imported_masks_are_not_laid_on_another_slide(own: Path, pixels: np.ndarray) -> None:
    masks = own / "masks"
    masks.mkdir()
    for name in ("a", "b"):
        shutil.copy(Dataset(own / "d").mask_file(name), masks)
    shutil.rmtree(own / "d")
    assert run_all(own, "scan") == [0]
    same_size_and_time(own / "in" / "b.tif", pixels)
    imported = ["import", "masks", str(masks), "--dataset", str(own / "d"), "--workers", "1"]
    said = pipeline(*imported)
    assert said.returncode == 1
    assert "slide b is no longer the file that scan recorded" in " ".join(said.stdout.split())
    assert run_all(own, "scan") == [0]
    assert pipeline(*imported).returncode == 0
