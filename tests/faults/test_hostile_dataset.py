"""A dataset one received is hostile: forged journal lines and links reach nothing outside it.

After each command everything outside the dataset is as it was, byte by byte, and so is what no
command may remove: dataset.json, slides.parquet, selections, journals.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Run,
    TileStore,
    claim_identity,
    commit_bytes,
    make_selection,
    new_run_id,
    open_dataset,
    read_journal,
    write_selection,
)
from pipeline.dataset.inside import move_inside, remove_file, remove_tree
from pipeline.dataset.journal import STAGES, encode_line
from pipeline.dataset.layout import is_inside, is_stage_file
from pipeline.dataset.tiles.zarr_shard import commit_zarr, encode_chunk
from pipeline.slides.scan import IDS_SCOPE, claimed_slides, known_slides
from pipeline.upkeep.doctor.storage import temporary_folder
from pipeline.upkeep.verify.damaged import Remaking

SLIDE = "CMU-1-Small-Region"
COMMITTED = Path(__file__).resolve().parents[1] / "data" / "slides" / f"{SLIDE}.svs"
DEAD_RUN = "20200101T000000-000000000-elsewhere-1-abcdef"


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the committed slide that tests may move away, and must bring back."""
    return Path(shutil.copy2(COMMITTED, tmp_path_factory.mktemp("slides")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, slide: Path) -> Dataset:
    """A tiled dataset with a selection and a page. Do not write to it."""
    root = tmp_path_factory.mktemp("made") / "dataset"
    for stage, *more in (
        ["scan", str(slide), "--workers", "1"],
        ["tissue", "--workers", "1"],
        ["select", "--name", "train"],
        ["tile", "--workers", "1"],
        ["report"],
    ):
        assert main([stage, "--dataset", str(root), *more]) == 0
    return Dataset(root)


@pytest.fixture
def dataset(made: Dataset, tmp_path: Path) -> Dataset:
    """A copy that a test may change."""
    shutil.copytree(made.root, tmp_path / "dataset")
    return Dataset(tmp_path / "dataset")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder outside the dataset, with files whose names commands would use."""
    folder = tmp_path / "outside"
    for name in ("canary.txt", f"{SLIDE}.parquet", "train.parquet", "index.html", "deep/x.tar"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"canary of " + name.encode())
    return folder


def snapshot(root: Path) -> dict[str, bytes]:
    """Bytes by path of everything in a folder; of a link where it leads; b"/" for a folder."""
    found: dict[str, bytes] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path).encode()
        else:
            found[name] = path.read_bytes() if path.is_file() else b"/"
    return found


def command(dataset: Dataset, name: str, *more: str) -> str:
    """Run a command; a refusal is its one line, anything else an error of the test."""
    refusal = ""
    try:
        main([name, "--dataset", str(dataset.root), *more])
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    return refusal


def forge(dataset: Dataset, stage: str, entries: list[Entry]) -> Path:
    """A journal of a run that is long dead, with valid checksums."""
    journal = dataset.status_dir(stage) / f"{DEAD_RUN}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text("".join(encode_line(entry, {}) for entry in entries))
    os.utime(journal, (0, 0))
    return journal


def named_paths(dataset: Dataset, outside: Path) -> list[str]:
    """What a hostile line may name: of the dataset, of outside, and names of odd form."""
    own = [
        dataset.relative_path(path)
        for path in dataset.root.rglob("*")
        if path.is_file() and path.suffix != ".log"
    ]
    return [
        *own, str(outside / "canary.txt"), "../outside/canary.txt", "linked/canary.txt",
        "tiles/linked/canary.txt", "tiles/224/../../dataset.json", "tiles//224/evil.0-16.tar",
        "./dataset.json", "dataset.json/", "/", "", ".", "..", "tiles", "selections",
        "tiles/224/evil.0-16.tar\0", "tiles/224/" + "x" * 5000 + ".0-16.tar", "DATASET.JSON",
        "tiles/224/ſlide.0-16.tar", "tiles\\..\\dataset.json", "Selections/train.parquet",
        "tiles/٢٢٤/evil.0-16.tar", "dataset.json\n", ".tmp", "status",
    ]  # fmt: skip


PROTECTED = ("dataset.json", "slides.parquet", "selections", "tiles", "tissue", "candidates")


@pytest.mark.parametrize("key", ["mpp", "mpp_tolerance", "tile_px", "seed", "variations", "grid",
                                 "detector", "detector_parameters", "codec"])  # fmt: skip
def test_a_value_that_no_stage_writes_is_one_line(key: str, tmp_path: Path) -> None:
    dataset = Dataset(tmp_path)
    claim_identity(dataset, {"tile_px": 224, "mpp": 0.5}, stage="scan", versions={})
    document = json.loads(dataset.identity_file.read_text())
    del document["crc"]
    values: list[object] = [[], [1], True, 1.5e300, float("nan"), float("inf"), -(10**40), 10**400]
    texts = {"grid", "detector", "codec"}
    values += [{"a": 1}] if key in texts else ["x", "0.5"]
    values += [{}] if key != "detector_parameters" else [7]
    for value in values:
        document["identity"][key] = value
        dataset.identity_file.write_text(json.dumps(document))
        with pytest.raises(UserError, match=f"{key} is ") as caught:
            open_dataset(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stages", [STAGES, ("verify", "evil", "report", "..x")])
def test_forged_lines_remove_nothing(
    dataset: Dataset, outside: Path, stages: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage's lines name everything there is; the file is as long as said or not."""
    (dataset.root / "linked").symlink_to(outside)
    (dataset.root / "tiles" / "linked").symlink_to(outside)
    before = {name: data for name, data in snapshot(dataset.root).items() if data != b"/"}
    around = snapshot(outside)
    for stage in stages:
        lines = []
        for number, path in enumerate(named_paths(dataset, outside)):
            record = FileRecord(path, 17, "0" * 64)
            lines.append(
                Entry(f"evil{number}", "done", "f", scope="224", start=0, stop=16, files=(record,))
            )
        lines.append(
            Entry(SLIDE, "done", "later", scope="224/x/cls", start=0, stop=16,
                  files=(FileRecord("dataset.json", 5, "0"),))
        )  # fmt: skip
        half = b'{"crc": "00000000", "files": [{"path": "\\ud800"}], "slide_id": "s"}\n'
        journal = forge(dataset, stage, lines)
        journal.write_bytes(journal.read_bytes() + half)
        os.utime(journal, (0, 0))
    for name, *more in (
        ("verify", "--repair"), ("prune", "--yes", "--damaged"),
        ("prune", "--features", "x", "--yes"), ("status",), ("verify", "--repair"),
        ("prune", "--yes"),
    ):  # fmt: skip
        command(dataset, name, *more)
    assert snapshot(outside) == around
    after = snapshot(dataset.root)
    for name, data in before.items():
        if not name.startswith("status/"):
            assert after[name] == data, name
    assert TileStore(dataset, 224).slide_ids() == [SLIDE]


def test_a_line_of_a_slide_names_no_other_slides_file(dataset: Dataset) -> None:
    """Nor its own file as another stage's: that stage's word on it counts."""
    (sound,) = read_journal(dataset, "tile")
    tar = sound.files[0].path
    forge(dataset, "tile", [Entry("evil", "done", "f", scope="224", start=sound.start,
                                  stop=sound.stop, files=(FileRecord(tar, 1, "0"),))])  # fmt: skip
    forge(dataset, "cache", [Entry(SLIDE, "done", "f", scope="224/x/cls", start=sound.start,
                                   stop=sound.stop, files=(FileRecord(tar, 1, "0"),))])  # fmt: skip
    assert read_journal(dataset, "tile") == [sound]
    assert read_journal(dataset, "cache") == []
    command(dataset, "verify", "--repair")
    assert (dataset.root / tar).exists()


def test_verify_names_a_foreign_line_and_repair_keeps_it_aside(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Entry("evil", "done", "f", scope="224", start=0, stop=16,
                 files=(FileRecord("dataset.json", 5, "0"),))  # fmt: skip
    journal = forge(dataset, "tile", [line])
    forged = journal.read_bytes()
    assert main(["verify", "--dataset", str(dataset.root)]) == 1
    assert "line 1 names 'dataset.json'" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", "--dataset", str(dataset.root), "--repair"]) == 1
    assert journal.read_bytes() == b""
    kept = dataset.damaged_dir / dataset.relative_path(journal)
    assert kept.read_bytes() == forged
    assert main(["verify", "--dataset", str(dataset.root)]) == 0
    assert ".damaged: 1 files" in capsys.readouterr().out


def test_a_range_without_end_is_no_line(dataset: Dataset) -> None:
    lines = []
    for start, stop in ((0, 10**12), (-5, 16), (32, 16), (0, 1 << 70)):
        tar = FileRecord(f"tiles/224/{SLIDE}.{start}-{stop}.tar", 1, "0")
        lines.append(Entry(SLIDE, "done", "f", scope="224", start=start, stop=stop, files=(tar,)))
    forge(dataset, "tile", lines)
    assert len(read_journal(dataset, "tile")) == 1
    assert command(dataset, "status") == command(dataset, "prune", "--yes") == ""


ALLOWED = {
    "scan": ("slides.parquet",), "tissue": ("tissue/", "candidates/"), "select": ("selections/",),
    "generate": ("slides.parquet", "candidates/", "guidance/", "selections/"), "tile": ("tiles/",),
    "cache": ("features/",), "curate": ("curation/",), "verify": (".damaged/",),
}  # fmt: skip


@given(
    stage=st.sampled_from(sorted(ALLOWED)),
    parts=st.lists(
        st.sampled_from(["tiles", "features", "selections", "tissue", "224", "S.0-16.tar", "..", "",
                         ".", "h0", "cls", "S.parquet", "dataset.json", "S.0-16.zarr", "zarr.json",
                         "c", "0", "status", "scores", "slides.parquet"]) | st.text(max_size=8),
        max_size=6,
    ),
)  # fmt: skip
def test_a_stages_file_is_in_its_own_folder(stage: str, parts: list[str]) -> None:
    path = "/".join(parts)
    line = {"slide_id": "S", "scope": "224", "start": 0, "stop": 16}
    if is_stage_file(stage, path, line):
        assert is_inside(path)
        assert path.startswith(ALLOWED[stage])
        place = os.path.normpath(f"/dataset/{path}")
        assert place == f"/dataset/{path}", "it is what it says"


WRITERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "selections": (("select", "--name", "new", "--tiles", "8"), ("select", "--remove", "train"),
                   ("select", "--name", "train", "--tiles", "8", "--replace")),
    "report": (("report",),),
    "report/thumbs": (("report",),),
    "geojson": (("geojson", "--workers", "1"),),
    ".tmp": (("select", "--name", "new", "--tiles", "8"), ("report",), ("prune", "--yes"),
             ("tile", "--workers", "1"), ("verify", "--repair")),
    "status": (("select", "--name", "new", "--tiles", "8"), ("verify", "--repair")),
    "status/select": (("select", "--name", "new", "--tiles", "8"), ("select", "--remove", "train")),
    "tiles": (("tile", "--workers", "1"), ("prune", "--yes"), ("verify", "--repair")),
    "tiles/224": (("tile", "--workers", "1"), ("prune", "--yes"), ("verify", "--repair")),
    "tissue": (("tissue", "--workers", "1"), ("prune", "--yes"), ("verify", "--repair")),
    "candidates": (("tissue", "--workers", "1"), ("prune", "--yes"), ("verify", "--repair")),
    ".damaged": (("verify", "--repair"), ("prune", "--yes", "--damaged")),
    "features": (("prune", "--yes"), ("verify", "--repair")),
}  # fmt: skip
"""Folders of a dataset, and the commands that write or remove there."""


@pytest.mark.parametrize("is_whole", [True, False], ids=["its own content", "other content"])
@pytest.mark.parametrize("folder", sorted(WRITERS))
def test_nothing_is_written_or_removed_behind_a_link(
    dataset: Dataset, outside: Path, folder: str, is_whole: bool
) -> None:
    place = dataset.root / folder
    if folder in ("tissue", "candidates"):
        shutil.rmtree(dataset.status_dir("tissue"))  # so that there is work
    if is_whole and place.exists():
        shutil.copytree(place, outside, dirs_exist_ok=True)
        for path in outside.rglob("*"):
            if path.is_file() and path.suffix != ".jsonl":
                path.write_bytes(path.read_bytes()[:-1] + b"?")  # damaged
    if folder == ".tmp":
        dead = outside / DEAD_RUN
        dead.mkdir()
        (dead / "half").write_bytes(b"x")
        for path in (dead / "half", dead):
            os.utime(path, (0, 0))
    if folder.startswith("tiles") and not is_whole:
        # Nobody needs them.
        with Run(dataset, "select", {}) as run:
            write_selection(dataset, run.run_id, make_selection("train", {}, {}))
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)
    before = snapshot(outside)
    identity = dataset.identity_file.read_bytes()
    for name, *more in WRITERS[folder]:
        refusal = command(dataset, name, *more)
        assert snapshot(outside) == before, (name, refusal)
        assert place.is_symlink(), name
    assert dataset.identity_file.read_bytes() == identity


@pytest.mark.full
def test_a_file_that_is_a_link_is_replaced(dataset: Dataset, outside: Path) -> None:
    paths = ("report/index.html", f"report/thumbs/{SLIDE}.jpg", f"geojson/{SLIDE}.geojson")
    for path in paths:
        (dataset.root / path).parent.mkdir(exist_ok=True)
        (dataset.root / path).unlink(missing_ok=True)
        (dataset.root / path).symlink_to(outside / "canary.txt")
    os.utime(outside / "canary.txt", (0, 0))  # so that the small picture is out of date
    before = snapshot(outside)
    assert command(dataset, "report") == command(dataset, "geojson", "--workers", "1") == ""
    assert snapshot(outside) == before
    assert not any((dataset.root / path).is_symlink() for path in paths)


def test_a_damaged_file_that_is_a_link_stays(
    dataset: Dataset, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = dataset.mask_file(SLIDE)
    shutil.move(mask, outside / "mask.png")
    (outside / "mask.png").write_bytes(b"altered")
    mask.symlink_to(outside / "mask.png")
    before = snapshot(outside)
    assert main(["verify", "--dataset", str(dataset.root), "--repair"]) == 1
    assert "is a link" in capsys.readouterr().out
    assert mask.is_symlink()
    assert snapshot(outside) == before


def test_tiles_behind_a_users_own_link_are_read(dataset: Dataset, outside: Path) -> None:
    expected = TileStore(dataset, 224).read(SLIDE, [0, 17])
    shutil.move(dataset.root / "tiles", outside / "tiles")
    (dataset.root / "tiles").symlink_to(outside / "tiles")
    before = snapshot(outside)
    assert np.array_equal(TileStore(dataset, 224).read(SLIDE, [0, 17]), expected)
    assert main(["verify", "--dataset", str(dataset.root)]) == 0
    assert main(["tile", "--dataset", str(dataset.root), "--workers", "1"]) == 0, "nothing to do"
    assert snapshot(outside) == before


def test_no_commit_goes_through_a_link(tmp_path: Path, outside: Path) -> None:
    """Of all that writes: a file, a Zarr array, an identity, a journal."""
    dataset, before = Dataset(tmp_path / "dataset"), snapshot(outside)
    chunks = [encode_chunk(np.zeros((8, 8, 3), np.uint8))]
    array = dataset.root / "tiles" / "8" / "S.0-1.zarr"
    for link in ("tiles", "tiles/8", ".tmp", "status"):
        shutil.rmtree(dataset.root, ignore_errors=True)
        (dataset.root / link).parent.mkdir(parents=True)
        (dataset.root / link).symlink_to(outside)
        if link != "status":
            with pytest.raises(UserError, match="is a link"):
                commit_bytes(dataset, new_run_id(), dataset.root / "tiles/8/x.tar", b"x")
            with pytest.raises(UserError, match="is a link"):
                commit_zarr(dataset, new_run_id(), array, 8, chunks)
        if link == ".tmp":
            with pytest.raises(UserError, match="is a link"):
                claim_identity(dataset, {"mpp": 1}, stage="scan", versions={})
        if link in (".tmp", "status"):
            with pytest.raises(UserError, match="is a link"):
                Run(dataset, "tile", {})
        if link == ".tmp":
            with pytest.raises(UserError, match="is a link"), temporary_folder(dataset.root):
                pass
    assert snapshot(outside) == before


def test_a_folder_swapped_after_the_check_is_not_followed(dataset: Dataset, outside: Path) -> None:
    """The removal itself goes by open folders: what a check saw before is of no moment."""
    before = snapshot(outside)
    shutil.move(dataset.root / "tissue", dataset.root.parent / "moved")
    (dataset.root / "tissue").symlink_to(outside)
    for path in ("tissue/canary.txt", "tissue/deep/x.tar"):
        for remove in (remove_file, remove_tree):
            with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
                remove(dataset, path)
        with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
            move_inside(dataset, path, ".damaged/x")
    remove_tree(dataset, "tissue")
    assert not (dataset.root / "tissue").is_symlink(), "the link itself may go"
    assert snapshot(outside) == before


def test_prune_removes_links_in_tmp_and_not_what_they_lead_to(
    dataset: Dataset, outside: Path
) -> None:
    before = snapshot(outside)
    top = dataset.root / ".tmp"
    inside = top / DEAD_RUN / "deep"
    inside.mkdir(parents=True)
    links = [top / DEAD_RUN.replace("abcdef", "fedcba"), inside / "folder", top / DEAD_RUN / "file"]
    for link in links:
        link.symlink_to(outside / "canary.txt" if link.name == "file" else outside)
    for path in (*links, inside, inside.parent):
        os.utime(path, (0, 0), follow_symlinks=False)
    assert command(dataset, "prune", "--yes") == ""
    assert list(top.iterdir()) == []
    assert snapshot(outside) == before


def test_the_datasets_own_folder_may_be_a_link(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dataset.root)
    linked = Dataset(tmp_path / "link")
    assert command(linked, "select", "--name", "new", "--tiles", "8") == ""
    damage(dataset.mask_file(SLIDE))
    assert command(linked, "verify", "--repair") == ""
    assert not dataset.mask_file(SLIDE).exists()


def damage(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[random.Random(1).randrange(len(data))] ^= 1
    path.write_bytes(data)
    return bytes(data)


@pytest.fixture(scope="module")
def imported_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imported tiles in `imported`, made from `pictures/s1`."""
    top, rng = tmp_path_factory.mktemp("imported"), np.random.default_rng(0)
    source = top / "pictures" / "s1"
    source.mkdir(parents=True)
    for number in range(3):
        pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    dataset = Dataset(top / "imported")
    assert import_tiles(dataset, source) == 0
    assert main(["select", "--dataset", str(dataset.root), "--name", "train"]) == 0
    return top


@pytest.fixture
def imported(imported_made: Path, tmp_path: Path) -> tuple[Dataset, Path]:
    """A copy of the imported tiles, and the folder of pictures that they came from."""
    shutil.copytree(imported_made / "imported", tmp_path / "imported")
    return Dataset(tmp_path / "imported"), imported_made / "pictures" / "s1"


def import_tiles(dataset: Dataset, source: Path) -> int:
    return main(["import", "tiles", str(source.parent), "--dataset", str(dataset.root), "--mpp",
                 "0.5", "--tile-px", "32", "--workers", "1"])  # fmt: skip


@pytest.mark.full
def test_a_damaged_shard_of_imported_tiles_is_never_lost(
    imported: tuple[Dataset, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its source may be gone: moved, listed, kept by prune until it was imported again."""
    dataset, source = imported
    (tar,) = dataset.tiles_dir(32).glob("*.tar")
    sound = tar.read_bytes()
    damaged, place = damage(tar), dataset.damaged_dir / dataset.relative_path(tar)
    source.rename(source.with_name("gone"))
    args = ["--dataset", str(dataset.root)]
    assert main(["verify", *args, "--repair"]) == 1
    assert "moved 1 damaged files" in capsys.readouterr().out
    assert place.read_bytes() == damaged
    assert not tar.exists()
    (line,) = read_journal(dataset, "verify")
    assert line.files[0].path == dataset.relative_path(place)
    assert main(["verify", *args, "--repair"]) == 1, "it is missing"
    assert ".damaged: 1 files" in capsys.readouterr().out
    assert main(["prune", *args, "--yes"]) == 0
    assert "stay in .damaged" in capsys.readouterr().out
    assert place.read_bytes() == damaged
    assert main(["status", *args]) == 0
    source.with_name("gone").rename(source)
    assert import_tiles(dataset, source) == 0
    assert tar.read_bytes() == sound
    assert main(["verify", *args]) == 0
    # The second damage of one file does not take the first one's place.
    again = damage(tar)
    tar.write_bytes(again)
    assert main(["verify", *args, "--repair"]) == 1
    second = dataset.damaged_dir / "2" / dataset.relative_path(tar)
    assert (place.read_bytes(), second.read_bytes()) == (damaged, again)
    assert import_tiles(dataset, source) == 0
    assert main(["prune", *args]) == 0
    assert place.exists(), "a dry run"
    assert main(["prune", *args, "--yes"]) == 0
    assert not dataset.damaged_dir.exists()
    assert tar.read_bytes() == sound
    assert main(["verify", *args]) == 0


def test_prune_takes_what_was_not_made_again_only_when_asked(
    imported: tuple[Dataset, Path],
) -> None:
    dataset, _ = imported
    (tar,) = dataset.tiles_dir(32).glob("*.tar")
    damage(tar)
    args = ["--dataset", str(dataset.root)]
    main(["verify", *args, "--repair"])
    tar.write_bytes(b"something else of that name")
    assert main(["prune", *args, "--yes"]) == 0
    assert dataset.damaged_dir.exists()
    assert main(["prune", *args, "--yes", "--damaged"]) == 0
    assert not dataset.damaged_dir.exists()
    assert tar.exists()


@pytest.mark.parametrize("is_there", [True, False], ids=["slide there", "slide gone"])
def test_masks_and_tiles_go_only_where_their_slide_is_there(
    dataset: Dataset, slide: Path, is_there: bool
) -> None:
    (tar,) = dataset.tiles_dir(224).glob("*.tar")
    mask = dataset.mask_file(SLIDE)
    bad = {path: damage(path) for path in (tar, mask)}
    if not is_there:
        slide.rename(slide.with_suffix(".away"))
    try:
        assert main(["verify", "--dataset", str(dataset.root), "--repair"]) == 1
    finally:
        if not is_there:
            slide.with_suffix(".away").rename(slide)
    for path, data in bad.items():
        assert not path.exists()
        place = dataset.damaged_dir / dataset.relative_path(path)
        assert place.exists() == (not is_there)
        assert is_there or place.read_bytes() == data
    assert command(dataset, "report") == command(dataset, "status") == ""


def test_a_slide_of_another_time_or_settings_is_no_source(dataset: Dataset, slide: Path) -> None:
    from pipeline.upkeep.verify.inventory import read_inventory

    (tar,) = (path for path in read_inventory(dataset).named if path.endswith(".tar"))
    (named,) = read_inventory(dataset).named[tar]
    assert Remaking(dataset).is_certain(named)
    before = slide.stat()
    os.utime(slide, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    try:
        assert not Remaking(dataset).is_certain(named)
    finally:
        os.utime(slide, ns=(before.st_atime_ns, before.st_mtime_ns))
    document = dataset.identity_file.read_text().replace('"icc": ', '"icc": 1')
    dataset.identity_file.write_text(document)
    assert not Remaking(dataset).is_certain(named), "dataset.json itself is damaged"


def test_tables_and_zarr_arrays_are_moved_whole_and_selections_stay(dataset: Dataset) -> None:
    tiles = [np.full((8, 8, 3), value, np.uint8) for value in range(3)]
    array = dataset.root / "tiles" / "8" / f"{SLIDE}.0-3.zarr"
    with Run(dataset, "tile", {}) as run:
        files = commit_zarr(dataset, run.run_id, array, 8, map(encode_chunk, tiles))
        run.append([Entry(SLIDE, "done", "f", scope="8", start=0, stop=3, files=files)])
    selection = dataset.selection_file("train")
    bad = {path: damage(path) for path in (*(dataset.root / f.path for f in files),
                                           dataset.slides_file, selection)}  # fmt: skip
    assert main(["verify", "--dataset", str(dataset.root), "--repair"]) == 1
    for path, data in bad.items():
        kept = path if path == selection else dataset.damaged_dir / dataset.relative_path(path)
        assert kept.read_bytes() == data
    assert not array.exists()


def test_a_full_disk_loses_nothing_while_damaged_files_are_moved(
    imported: tuple[Dataset, Path], make_small_disk: Callable[[int], Path]
) -> None:
    made, _ = imported
    disk = make_small_disk(512)
    shutil.copytree(made.root, disk / "dataset")
    dataset = Dataset(disk / "dataset")
    (tar,) = dataset.tiles_dir(32).glob("*.tar")
    damaged, journals = damage(tar), read_journal(dataset, "tile")
    with pytest.raises(OSError, match="No space"):
        (disk / "filler").write_bytes(bytes(1 << 20))
    before = {name: data for name, data in snapshot(dataset.root).items() if data != b"/"}
    main(["verify", "--dataset", str(dataset.root), "--repair"])
    after = snapshot(dataset.root)
    name = dataset.relative_path(tar)
    assert after.get(f".damaged/{name}", after.get(name)) == damaged
    assert all(after[other] == data for other, data in before.items() if other != name)
    assert read_journal(dataset, "tile") == journals


@pytest.mark.parametrize(
    "values",
    [
        {"path": 5}, {"levels": "x"}, {"levels": [[1]]}, {"width": "a"}, {"width": 10**12},
        {"mpp": [1]}, {"notes": 5}, {"notes": [{}]}, {"bounds": [1]}, {"patient": None},
        {"levels_left_out": ["x"]}, {"bytes": 10**30},
    ],
)  # fmt: skip
def test_a_line_of_scan_with_other_values_is_a_failed_slides(values: dict[str, object]) -> None:
    entry = Entry("S", "done", "f", values=values)
    assert [(slide.slide_id, slide.status) for slide in known_slides([entry])] == [("S", "failed")]
    newer = Entry("S", "done", "f", values={"path": "/s.svs", "of a newer release": 1})
    assert [slide.status for slide in known_slides([newer])] == ["ok"]


@pytest.mark.parametrize("ids", [5, [1], {"S": 5}, {"S": [1, 2, 3]}, {"S": ["p", "x", 1]}, None])
def test_ids_that_no_scan_claimed_are_not_taken(ids: object) -> None:
    line = Entry("ids", "pruned", "", scope=IDS_SCOPE, values={"ids": ids})
    assert claimed_slides([line]) == {}
