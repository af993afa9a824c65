"""Inputs that never end or claim more than there is: each is refused at once, in one line."""

import csv
import ctypes
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from endless import (
    chunk,
    deflated_zeros,
    jpeg_claiming,
    page,
    png_claiming,
    png_of,
    sparse_file,
    tiff,
)

from common.console import Meter
from common.errors import UserError
from common.json_text import MOST_DEPTH, parse_json
from pipeline.dataset import Entry
from pipeline.run.drain import run_bundles, run_tasks
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"
APERIO = b"Aperio Image Library v11\r\n1024x1024 |AppMag = 20|MPP = 0.5\0"
WHITE = zlib.compress(bytes([255]) * (256 * 256 * 3), 9)
MOST_S, MOST_MB = 5.0, 700

LIMITED = """
import json, sys, time
from pathlib import Path
from pipeline.slides.config import ScanConfig
from pipeline.slides.entries import SlideEntry
from pipeline.slides.scan import scan_slide
for name in sys.argv[1:]:
    began, config = time.monotonic(), ScanConfig((name,))
    entry = scan_slide(SlideEntry(Path(name), "x", 0.5), config, "f", "/nowhere")[0]
    # Not getrusage: its peak is that of the process that started this one, if that is larger.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    print(json.dumps([Path(name).name, entry.outcome, entry.reason,
                      time.monotonic() - began, peak]), flush=True)
"""


MEASURED = """
import resource, subprocess, sys
status = subprocess.call([sys.executable, *sys.argv[1:]])
print("peak MB", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(status)
"""
"""A small process between the test and the command: a peak is at least that of the parent."""


def run(arguments: list[str], clean: dict[str, str], timeout: float, **more: Any) -> Any:
    """A Python process that is killed where it does not end; its output is kept."""
    return subprocess.run(
        [sys.executable, *arguments], env=clean | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
        capture_output=True, text=True, timeout=timeout, check=False, **more,
    )  # fmt: skip


def loops() -> dict[str, bytes]:
    """TIFF files whose directories lead back to one before."""
    plain = page(1024, 1024, stored=len(WHITE))
    below = {**plain, 330: (4, [-2])}
    return {
        "two.tif": tiff([plain, plain], [1, 0], data=WHITE),
        "itself.svs": tiff([{**plain, 270: (2, APERIO)}], [0], data=WHITE),
        "late.tif": tiff([plain] * 300, [*range(1, 300), 150], data=WHITE),
        "late-big.tif": tiff([plain] * 300, [*range(1, 300), 150], data=WHITE, big=True),
        "sub.tif": tiff([below, below], [-1, -1], data=WHITE),
        "plain.ndpi": tiff([plain, plain], [1, 0], data=WHITE),
        "marked.ndpi": tiff([{**plain, 65420: (4, [1])}, plain], [1, 0], data=WHITE),
    }


def claims() -> dict[str, bytes]:
    """TIFF files that claim more pixels, tiles, bytes or planes than there can be."""
    plain = page(1024, 1024, stored=len(WHITE))
    bomb = deflated_zeros(100)
    counted = bytearray(tiff([plain], data=WHITE))
    struct.pack_into("<I", counted, counted.find(struct.pack("<HH", 324, 4)) + 4, 10**9)
    xml = (
        b'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        b'<Image ID="Image:0"><Pixels DimensionOrder="XYCZT" SizeX="1024" SizeY="1024" SizeC="3" '
        b'SizeZ="1" SizeT="1" Type="uint8"><Channel ID="c" SamplesPerPixel="3"/>'
        b'<TiffData IFD="0" PlaneCount="300000000"/></Pixels></Image></OME>\0'
    )
    return {
        "pixels.tif": tiff([page(10**6, 10**6, 16384, tiles=3844, stored=9)], data=WHITE),
        "sparse.tif": tiff([page(200_000, 200_000, 4096, stored=0)], data=WHITE),
        "tiles.tif": tiff([page(90_000, 90_000, 16, tiles=9, stored=9)], data=WHITE),
        "tile.tif": tiff([page(20_000, 20_000, 20_000, stored=len(bomb))], data=bomb),
        "count.tif": bytes(counted),
        "planes.ome.tif": tiff([{**plain, 270: (2, xml)}], data=WHITE),
        "chain.tif": tiff([page(256, 256, stored=len(WHITE))] * 10_001, data=WHITE),
    }


def tiles() -> dict[str, bytes]:
    """TIFF files whose tiles state a size of their own."""
    white = np.full((256, 256, 3), 255, np.uint8)
    jpeg = jpeg_claiming(cv2.imencode(".jpg", white)[1].tobytes(), 60_000, 60_000)
    ycbcr = {**page(1024, 1024, compression=7, stored=len(jpeg)), 262: (3, [6])}
    return {
        "jpeg.tif": tiff([ycbcr], data=jpeg),
        "jpeg.svs": tiff([{**ycbcr, 270: (2, APERIO)}], data=jpeg),
    }


def pictures() -> dict[str, bytes]:
    """Pictures that become gigabytes."""
    head, rows = struct.pack(">IIBBBBB", 256, 256, 8, 2, 0, 0, 0), zlib.compress(bytes(256 * 769))
    jpeg = cv2.imencode(".jpg", np.full((64, 64, 3), 9, np.uint8))[1].tobytes()
    zeros = deflated_zeros(100)
    bmp = struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 10**5, 10**5, 1, 24, *(0,) * 6)
    return {
        "rgba.png": png_claiming(5000, 5000, colour=6),
        "large.png": png_of(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"", b"x"),
        "profile.png": png_of(head, chunk(b"iCCP", b"x\0\0" + zeros), rows),
        "text.png": png_of(head, chunk(b"zTXt", b"x\0\0" + zeros), rows),
        "unicode.png": png_of(head, chunk(b"iTXt", b"x\0\1\0\0\0" + zeros), rows),
        "chunks.png": png_of(head, b"".join([chunk(b"tEXt", b"a\0b")] * 100_000), rows),
        "head.jpg": jpeg_claiming(jpeg, 12_000, 12_000),
        "head.bmp": b"BM" + bmp + bytes(99),
    }


SLOW = [pytest.param(make, marks=pytest.mark.full) for make in (claims, tiles, pictures)]


@pytest.mark.parametrize("make", [loops, *SLOW])
def test_a_hostile_slide_fails_at_once_in_one_line(tmp_path, clean_environment, make) -> None:
    files = {tmp_path / name: data for name, data in make().items()}
    for path, data in files.items():
        path.write_bytes(data)
    done = run(["-W", "ignore", "-c", LIMITED, *map(str, files)], clean_environment, 60)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in results] == [path.name for path in files]
    for name, outcome, reason, seconds, megabytes in results:
        assert outcome == "failed", (name, outcome, reason)
        assert 0 < len(reason) < 500 and "\n" not in reason, (name, reason)  # noqa: PT018
        assert max(seconds / MOST_S, megabytes / MOST_MB) < 1, (name, seconds, megabytes)
    if make is loops:
        assert all("loop" in row[2] for row in results), results


@pytest.mark.full
def test_what_is_no_regular_file_is_no_slide(tmp_path, clean_environment) -> None:
    mirax = tmp_path / "a.mrxs"
    (tmp_path / "a").mkdir()
    mirax.write_bytes(b"x")
    (tmp_path / "a" / "Slidedat.ini").write_text("[GENERAL]\nSLIDE_VERSION = 1\nFILE_0 = b.dat\n")
    os.mkfifo(tmp_path / "a" / "b.dat")
    hamamatsu = tmp_path / "b.vms"
    hamamatsu.write_text("[Virtual Microscope Specimen]\nImageFile=../dev\n")
    os.mkfifo(tmp_path.parent / f"{tmp_path.name}-pipe")
    hamamatsu.write_text(f"[Virtual Microscope Specimen]\nImageFile=../{tmp_path.name}-pipe\n")
    series = tmp_path / "series"
    series.mkdir()
    (series / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(64))
    os.mkfifo(series / "b.dcm")
    os.mkfifo(tmp_path / "pipe.svs")
    (tmp_path / "zero.tif").symlink_to("/dev/zero")
    (tmp_path / "mirax.mrxs").symlink_to("/dev/zero")
    paths = [mirax, hamamatsu, series, series / "a.dcm", tmp_path / "pipe.svs",
             tmp_path / "zero.tif", tmp_path / "mirax.mrxs", Path("/dev/zero")]  # fmt: skip
    done = run(["-c", LIMITED, *map(str, paths)], clean_environment, 60)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        _, outcome, reason, seconds, _ = json.loads(line)
        assert (outcome, seconds < MOST_S) == ("failed", True), line
        assert "regular file" in reason, line
    assert len(done.stdout.splitlines()) == len(paths), done.stderr
    (tmp_path.parent / f"{tmp_path.name}-pipe").unlink()


@pytest.mark.parametrize("kind", ["pipe", pytest.param("sparse", marks=pytest.mark.full)])
def test_tables_and_texts_that_never_end_are_one_line(tmp_path, clean_environment, kind) -> None:
    code = """
import sys, time
from pathlib import Path
from common.config import read_yaml
from common.errors import UserError
from pipeline.imports.config import Columns
from pipeline.imports.geojson import read_features
from pipeline.imports.masks import read_png_mask
from pipeline.imports.picture import read_picture
from pipeline.imports.table import read_positions
from pipeline.imports.tile_folder import find_tile_folders
from pipeline.recipe.steps import load_recipe
from pipeline.selection.cohort_table import read_cohort_csv
from pipeline.selection.labels import read_labels
from pipeline.slides.entries import find_slides
path = lambda suffix: Path(sys.argv[1], f"endless.{suffix}")
for read in (
    lambda: find_slides([str(path("csv"))]), lambda: read_labels(path("csv"), {}),
    lambda: read_cohort_csv(path("csv"), 9), lambda: find_tile_folders(path("csv")),
    lambda: read_yaml(path("yaml")), lambda: load_recipe(path("yaml")),
    lambda: read_features(path("geojson")), lambda: read_picture(path("png"), 224),
    lambda: read_png_mask(path("png"), (9, 9), 1.0, (9, 9)),
    lambda: read_positions(path("parquet"), Columns()),
):
    began = time.monotonic()
    try:
        read()
    except UserError as error:
        print(round(time.monotonic() - began), str(error).replace(chr(10), "NEWLINE")[:300])
"""
    for suffix in ("csv", "yaml", "geojson", "png", "parquet"):
        path = tmp_path / f"endless.{suffix}"
        sparse_file(path, 1 << 40) if kind == "sparse" else os.mkfifo(path)
    limit = 8 << 30
    done = run(["-c", code, str(tmp_path)], clean_environment, 60,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit,) * 2))  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10, done.stdout
    for line in lines:
        assert int(line.split()[0]) < MOST_S, line
        assert "NEWLINE" not in line, line


def test_an_array_that_was_never_written_is_refused_by_its_size(tmp_path) -> None:
    h5py = pytest.importorskip("h5py")
    from pipeline.dataset import Slide
    from pipeline.imports.h5 import read_patches

    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", (10**12, 2), "int64", chunks=(1024, 2))
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"coords has 2,000,000,000,000 numbers"):
        read_patches(path, Slide("s", "s.svs"))


def test_a_shard_is_not_read_by_what_its_index_claims(tmp_path) -> None:
    from pipeline.dataset.tiles.png_tar import ShardHandle

    handle = ShardHandle(sparse_file(tmp_path / "s.0-16.tar", 1 << 40))
    for begin, end in ((0, 1 << 40), (9, 0)):
        with pytest.raises(UserError, match="a block of"):
            handle.read(begin, end)


def test_a_list_of_slides_is_a_file_not_a_pipe(tmp_path) -> None:
    from pipeline.slides.entries import find_slides

    os.mkfifo(tmp_path / "fd63")
    with pytest.raises(UserError, match=r"is a pipe or device.*write what it gives to a file"):
        find_slides([str(tmp_path / "fd63")])


DEEP = {
    "lists": "[" * 900 + "]" * 900,
    "objects": '{"a":' * 900 + "1" + "}" * 900,
    "beyond the stack": "[" * 100_000,
    "just too deep": "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1),
    "in a value": '{"values": ' + "[" * 500 + "]" * 500 + "}",
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_deep_json_is_a_value_error(text) -> None:
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(form)


def test_json_of_any_width_is_read_as_ever() -> None:
    wide = {"a": [[1, 2], {"b": [3.5, None, "[[["]}] * 500, "c": "{" * 500}
    assert parse_json(json.dumps(wide)) == wide
    deepest = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(deepest) == json.loads(deepest)


def write_line(values: str, **more: object) -> str:
    """A journal line with a right checksum whatever its values are."""
    record = {"slide_id": "s", "outcome": "done", "fingerprint": "f", "files": [], **more}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))[:-1]
    body = text + ',"values":' + values + "}"
    return body[:-1] + f',"crc":"{zlib.crc32(body.encode()):08x}"}}\n'


@pytest.mark.parametrize("value", [
    *list(DEEP.values())[:3], '{"a":' + "9" * 4000 + "}", '{"a":NaN}', '{"a":1,"a":2}',
    '{"a":"' + "x" * 10**6 + '"}', '{"a":"\\ud800"}', "1e999", "null",
], ids=lambda value: value[:12])  # fmt: skip
def test_no_record_ends_a_command_with_a_traceback(tmp_path, value, capsys) -> None:
    from pipeline.__main__ import main
    from pipeline.dataset import Dataset
    from pipeline.dataset.identity import claim_identity

    dataset = Dataset(tmp_path / "d")
    claim_identity(dataset, {"mpp": 0.5, "tile_px": 224}, stage="scan", versions={})
    for stage in ("scan", "tissue", "tile"):
        folder = dataset.status_dir(stage)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "20260101T000000Z-aaaa.jsonl").write_text(
            write_line(value) + write_line("{}", start=10**400) + write_line("{}", seconds=10**400)
        )
        (folder / "20260101T000000Z-aaaa.log").write_text(
            '{"time": "", "run": "", "stage": "", "event": "begin", "x": ' + value + "}\n"
        )
    said = []
    for command in ("status", "verify", "tissue", "select", "tile", "prune", "report"):
        more = ["--name", "t"] if command == "select" else []
        try:
            main([command, "--dataset", str(dataset.root), *more])
        except UserError as error:
            said.append(str(error))
    dataset.identity_file.write_text('{"identity": ' + value + "}")
    for command in ("status", "verify", "tissue"):
        try:
            main([command, "--dataset", str(dataset.root)])
        except UserError as error:
            said.append(str(error))
    assert all("\n" not in text and len(text) < 3000 for text in said), said
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.full
def test_the_other_slides_of_the_folder_are_tiled(tmp_path, clean_environment) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "good.svs").symlink_to(SLIDE)
    for make in (loops, claims, tiles):
        for name, data in make().items():
            (folder / f"{make.__name__}-{name}").write_bytes(data)
    os.mkfifo(folder / "pipe.svs")
    sparse_file(folder / "zeros.svs", 1 << 40)
    table = tmp_path / "more.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path"], ["/dev/zero"], [str(folder / "pipe.svs")]])
    began, dataset = time.monotonic(), tmp_path / "dataset"
    for words in (["scan", str(folder), str(table)], ["tissue"], ["select", "--name", "t"],
                  ["tile"]):  # fmt: skip
        more = [] if words[0] == "select" else ["--workers", "2"]
        done = run(
            ["-c", MEASURED, "-m", "pipeline", words[0], "--dataset", str(dataset), *words[1:],
             *more],
            clean_environment, 120,
        )  # fmt: skip
        assert done.returncode == (1 if words[0] == "scan" else 0), done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert int(done.stdout.rpartition("peak MB")[2]) < 2000, done.stdout
    assert time.monotonic() - began < 120
    assert list(dataset.glob("**/good.*.tar"))


def hang(slide_id: str, what: str) -> list[Entry]:
    """A stage's work on one slide, which may never end."""
    if what == "in C":
        # The interpreter's lock is kept, and no signal but SIGKILL is heard.
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            with suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(1000)
    while what == "in Python":
        pass
    return [Entry(slide_id, "done", "f")]


def hang_in_bundle(bundle: list[tuple[str, str]]) -> Iterator[list[Entry]]:
    for slide_id, what in bundle:
        yield hang(slide_id, what)


def end_slides(kinds: list[str], bundle: bool, config: EngineConfig) -> dict[str, Entry]:
    """The entries of slides, in one bundle or each by itself."""
    tasks = [
        SlideTask(f"s{number}", "f", (f"s{number}", kind)) for number, kind in enumerate(kinds)
    ]
    entries: list[Entry] = []
    meter = Meter("test", len(tasks), "slides")
    if bundle:
        run_bundles(hang_in_bundle, [tasks], config, entries.extend, meter)
    else:
        run_tasks(hang, tasks, config, entries.extend, meter)
    assert len(entries) == len(tasks), "each slide is journalled once"
    return {entry.slide_id: entry for entry in entries}


@pytest.mark.full
@pytest.mark.parametrize("where", ["in C", "in Python"])
@pytest.mark.parametrize("bundle", [True, False])
def test_a_slide_that_hangs_fails_alone(where: str, bundle: bool) -> None:
    config, began = EngineConfig(1, slide_timeout_s=3.0), time.monotonic()
    entries = end_slides(["ok", where, "ok"], bundle, config)
    assert [entries[f"s{n}"].outcome for n in range(3)] == ["done", "failed", "done"]
    assert entries["s1"].reason == "took longer than 3.0 s (--slide-timeout)"
    assert time.monotonic() - began < 60


@pytest.mark.full
def test_a_slide_that_hangs_on_a_scheduler_of_others_fails_alone() -> None:
    import dask
    from distributed import LocalCluster

    options = {"distributed.scheduler.allowed-failures": 0, "distributed.worker.daemon": False}
    with (
        dask.config.set(options),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0",
                     silence_logs=50) as cluster,
    ):  # fmt: skip
        config = EngineConfig(scheduler=cluster.scheduler_address, slide_timeout_s=3.0)
        entries = end_slides(["in C", "ok"], False, config)
    assert [entries[f"s{n}"].outcome for n in range(2)] == ["failed", "done"]


@pytest.mark.full
def test_without_a_limit_nothing_is_killed() -> None:
    entries = end_slides(["ok", "ok"], True, EngineConfig(1, slide_timeout_s=0.0))
    assert {entry.outcome for entry in entries.values()} == {"done"}
