"""A flipped byte anywhere in a dataset is found, and what verify names mends it."""

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    claim_identity,
    commit_file,
    read_candidates,
    read_journal,
)
from pipeline.dataset.features import (
    cls_table,
    feature_scope,
    open_writer,
    token_table,
    write_blocks,
)
from pipeline.dataset.journal import encode_line
from pipeline.features.config import CacheConfig
from pipeline.features.stage import claim_encoder
from pipeline.upkeep.activity import RunJudge
from pipeline.upkeep.verify import repair, sums
from pipeline.upkeep.verify.journal_lines import damage_of
from pipeline.upkeep.verify.runs import may_be_alive, may_write

SLIDE = "CMU-1-Small-Region"
RECORD = {"encoder": "h0-mini", "weights_sha256": "0" * 64, "compute_dtype": "float32", "view": "",
          "dim": 8, "tokens_shape": [4, 6], "mean": [0.5], "std": [0.5]}  # fmt: skip


CONFIG = CacheConfig("h0-mini", tokens="float16")


def add_features(dataset: Dataset) -> None:
    """Both kinds of features of the slide's tiles, through the cache's own writers."""
    rng = np.random.default_rng(0)
    rows = read_candidates(dataset, SLIDE).num_rows
    tables = {
        "cls": cls_table(0, rng.normal(size=(rows, 8)).astype(np.float32)),
        "tokens-float16": token_table(rng.normal(size=(rows, 4, 6)).astype(np.float16)),
    }
    with Run(dataset, "cache", {}) as run:
        claim_encoder(dataset, run, 224, CONFIG, RECORD)
        for kind, table in tables.items():
            final = dataset.features_dir(224, "h0-mini") / kind / f"{SLIDE}.0-{rows}.parquet"

            def write(file, table=table):
                with open_writer(file, table.schema) as writer:
                    write_blocks(writer, table)

            record = commit_file(dataset, run.run_id, final, write)
            scope = feature_scope(224, "h0-mini", "", kind)
            run.append([Entry(SLIDE, "done", "f", scope=scope, start=0, stop=rows,
                              files=(record,))])  # fmt: skip


@pytest.fixture
def whole(own_tiled):
    """A tiled and cached dataset that a test may change."""
    add_features(own_tiled)
    return own_tiled


def files_of(dataset):
    """All but the runs' logs and the card, on which nothing depends."""
    files = sorted(p for p in dataset.root.rglob("*") if p.is_file())
    return [p for p in files if p.suffix not in (".log", ".md")]


def verify(dataset, capsys, *more):
    capsys.readouterr()
    status = main(["verify", "--dataset", str(dataset.root), "--workers", "2", *more])
    return status, capsys.readouterr().out


def flip(path, rng):
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return place


def assert_every_flip_is_found(dataset, capsys, files, rounds):
    rng = random.Random(7)
    for path in files:
        sound = path.read_bytes()
        for _ in range(rounds):
            place = flip(path, rng)
            status, out = verify(dataset, capsys)
            name = dataset.relative_path(path)
            assert status == 1, f"{name}, byte {place}"
            assert name in out, f"{name}, byte {place}: {out}"
            path.write_bytes(sound)
    assert verify(dataset, capsys)[0] == 0


def test_a_flipped_byte_in_any_file_is_found(whole, capsys):
    status, out = verify(whole, capsys)
    assert status == 0
    files = files_of(whole)
    kinds = {path.suffix for path in files}
    assert kinds >= {".json", ".jsonl", ".parquet", ".png", ".jpg", ".tar", ".idx"}
    assert f"verify: {len(files)} files" in out
    assert "not covered" not in out
    assert_every_flip_is_found(whole, capsys, files, 3)


def test_a_flipped_byte_in_zarr_is_found(own_tiled, tmp_path, capsys):
    root = tmp_path / "zarr"
    shutil.copytree(own_tiled.root, root)
    shutil.rmtree(root / "tiles")
    shutil.rmtree(root / "status" / "tile")
    identity = json.loads((root / "dataset.json").read_text())
    del identity["identity"]["codec"], identity["crc"]
    (root / "dataset.json").write_text(json.dumps(identity))
    assert main(["tile", "--format", "zarr", "--workers", "1", "--dataset", str(root)]) == 0
    dataset = Dataset(root)
    files = [p for p in files_of(dataset) if ".zarr" in str(p)]
    assert len(files) == 2
    assert_every_flip_is_found(dataset, capsys, files, 6)


def test_every_byte_of_the_identity_and_of_a_journal_line_counts():
    line = encode_line(
        Entry("s", "done", "f", reason="ü", values={"mpp": 0.25}), {"p": "1"}
    ).encode()
    assert damage_of(line) is None
    for place in range(len(line)):
        for mask in (0x01, 0x07, 0x20, 0x80):
            bad = bytearray(line)
            bad[place] ^= mask
            parts = bytes(bad).splitlines(keepends=True) if b"\n" in bad[:-1] else [bytes(bad)]
            assert any(damage_of(part) in ("altered", "respelt") for part in parts), place
    assert damage_of(line[: len(line) // 2]) == "torn"


def test_each_byte_of_dataset_json_counts(tmp_path):
    from pipeline.dataset.identity import identity_damage

    dataset = Dataset(tmp_path)
    claim_identity(dataset, {"mpp": 0.5, "tile_px": 224}, stage="scan", versions={"python": "3"})
    sound = dataset.identity_file.read_bytes()
    assert identity_damage(dataset) == ""
    for place in range(len(sound)):
        bad = bytearray(sound)
        bad[place] ^= 1 + place % 255
        dataset.identity_file.write_bytes(bad)
        assert identity_damage(dataset), f"byte {place}"


def test_what_is_missing_short_or_long_is_named_with_its_stage(whole, capsys):
    (tar,) = whole.tiles_dir(224).glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-1])
    whole.overlay_file(SLIDE).unlink()
    whole.selection_file("train").unlink()
    status, out = verify(whole, capsys)
    assert status == 1
    assert "3 problems" in out
    words = " ".join(out.split())
    for expected in ("missing", "bytes, expected", "`pipeline tissue`", "`pipeline tile`",
                     "select --name train"):  # fmt: skip
        assert expected in words


def test_repair_and_the_named_stages_make_the_same_bytes_again(whole, capsys):
    before = {p: p.read_bytes() for p in files_of(whole)}
    rng = random.Random(3)
    (tar,) = whole.tiles_dir(224).glob("*.tar")
    for path in (tar, whole.mask_file(SLIDE)):
        flip(path, rng)
    status, out = verify(whole, capsys, "--repair")
    assert status == 1
    assert "removed 2 damaged files" in out
    for stage in ("tissue", "tile"):
        assert main([stage, "--workers", "1", "--dataset", str(whole.root)]) == 0
    assert verify(whole, capsys)[0] == 0
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_repair_keeps_what_could_not_be_read(whole, capsys, monkeypatch, code):
    before = {p: p.read_bytes() for p in files_of(whole)}
    real = sums.sha256_of

    def fails(path, *more):
        if path.parts[-3] == "h0-mini" or path.suffix == ".tar":
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *more)

    monkeypatch.setattr(sums, "sha256_of", fails)
    status, out = verify(whole, capsys, "--repair")
    words = " ".join(out.split())
    assert status == 1
    assert "5 problems" in words
    assert f"cannot be read: {os.strerror(code)}" in words
    assert "repair: removed 0 damaged files" in words
    assert {p: p.read_bytes() for p in files_of(whole)} == before
    monkeypatch.undo()
    assert verify(whole, capsys)[0] == 0


def test_a_file_that_does_not_let_itself_be_read_again_is_kept(whole, capsys, monkeypatch):
    """Read once with a wrong sum, then not at all: what it holds now nobody knows."""
    (tar,) = whole.tiles_dir(224).glob("*.tar")
    flip(tar, random.Random(3))

    def fails(path, *more):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(repair, "sha256_of", fails)
    status, out = verify(whole, capsys, "--repair")
    assert status == 1
    assert f"kept {whole.relative_path(tar)}: cannot be read" in out
    assert tar.exists()


def test_a_file_that_grew_while_it_was_read_is_no_damaged_one(whole, capsys, monkeypatch):
    (tar,) = whole.tiles_dir(224).glob("*.tar")
    sound = tar.read_bytes()
    tar.write_bytes(sound[:1000])
    real = sums.sha256_of

    def meanwhile(path, *more):
        found = real(path, *more)
        if path == tar:
            tar.write_bytes(sound)
        return found

    monkeypatch.setattr(sums, "sha256_of", meanwhile)
    assert "it changed meanwhile" in verify(whole, capsys, "--repair")[1]
    assert tar.read_bytes() == sound


def test_repair_looks_once_more_before_a_file_goes(whole, capsys, monkeypatch):
    """While verify read, a scan began, replaced slides.parquet, journalled that and ended."""
    sound = whole.slides_file.read_bytes()
    flip(whole.slides_file, random.Random(5))
    real = repair.sha256_of

    def meanwhile(path, *more):
        if path == whole.slides_file:
            with Run(whole, "scan", {}) as run:
                record = commit_file(whole, run.run_id, path, lambda file: file.write(sound + b"x"))
                run.append([Entry("slides.parquet", "done", "f", scope="table", files=(record,))])
        return real(path, *more)

    (line,) = [e for e in read_journal(whole, "scan") if any("slides" in f.path for f in e.files)]
    assert (line.slide_id, line.scope) == ("slides.parquet", "table")
    monkeypatch.setattr(repair, "sha256_of", meanwhile)
    _, out = verify(whole, capsys, "--repair")
    assert "kept slides.parquet: it is as written by now" in out
    assert whole.slides_file.read_bytes() == sound + b"x"


def test_a_run_that_begins_meanwhile_keeps_what_it_wrote(whole, capsys, monkeypatch):
    """Its file is there, its line is not yet: the file only looks altered."""
    sound = whole.slides_file.read_bytes()
    flip(whole.slides_file, random.Random(5))
    real = sums.sha256_of
    run = Run(whole, "scan", {})

    def meanwhile(path, *more):
        if path == whole.slides_file:
            commit_file(whole, run.run_id, path, lambda file: file.write(sound + b"x"))
        return real(path, *more)

    monkeypatch.setattr(sums, "sha256_of", meanwhile)
    _, out = verify(whole, capsys, "--repair")
    assert f"kept slides.parquet: the run {run.run_id} may be at work" in out
    assert whole.slides_file.read_bytes() == sound + b"x"
    run.close()


@pytest.mark.parametrize("seen_by", ["log", "staging"])
def test_repair_is_refused_while_a_run_is_at_work(whole, capsys, seen_by):
    (tar,) = whole.tiles_dir(224).glob("*.tar")
    flip(tar, random.Random(3))
    with Run(whole, "scan", {}) as run:
        if seen_by == "log":
            run.log_event("tasks", slides=1, total=1, unit="slides", engine="local")
        else:
            commit_file(whole, run.run_id, whole.root / "new", lambda file: file.write(b"x"))
        with pytest.raises(UserError, match="--repair removes nothing while") as caught:
            verify(whole, capsys, "--repair")
        assert run.run_id in str(caught.value)
        assert "\n" not in str(caught.value)
        assert tar.exists()
        assert verify(whole, capsys)[0] == 1, "without --repair nothing is refused"
    assert "removed 1 damaged" in verify(whole, capsys, "--repair")[1]


def test_repair_as_a_step_of_a_recipe_is_not_refused_for_the_recipe(whole, capsys):
    with Run(whole, "run", {}) as log:
        log.log_event("step begun", number=1, command="verify --repair")
        assert verify(whole, capsys, "--repair")[0] == 0


def test_a_journal_that_cannot_be_read_is_one_line(whole, capsys):
    (journal,) = whole.status_dir("tile").glob("*.jsonl")
    journal.unlink()
    journal.mkdir()
    with pytest.raises(UserError, match=f"{journal.name} cannot be read"):
        verify(whole, capsys, "--repair")


def test_a_log_that_cannot_be_read_is_one_line(whole, capsys):
    log = whole.status_dir("tile") / "20200101T000000-000000000-elsewhere-1-abcdef.log"
    log.mkdir()
    with pytest.raises(UserError, match=f"{log.name} cannot be read"):
        verify(whole, capsys, "--repair")
    assert verify(whole, capsys)[0] == 0


def test_an_altered_line_is_dropped_by_repair_and_its_work_done_again(whole, capsys):
    (journal,) = whole.status_dir("tile").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes().replace(b'"done"', b'"dome"'))
    status, out = verify(whole, capsys)
    assert status == 1
    assert "line 1 was altered" in out
    assert "not covered: no journal line has their sum: 2 files" in out
    # The run's process is this one, which lives: its journal is not rewritten under it.
    dead = journal.with_name("20200101T000000-000000000-elsewhere-1-abcdef.jsonl")
    journal.rename(dead)
    os.utime(dead, (0, 0))
    verify(whole, capsys, "--repair")
    assert main(["tile", "--workers", "1", "--dataset", str(whole.root)]) == 0
    status, out = verify(whole, capsys)
    assert status == 0, out
    assert len(read_journal(whole, "tile")) == 1


def test_a_torn_line_counts_until_the_stage_ran_again(whole, capsys):
    (journal,) = whole.status_dir("tile").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-40])
    status, out = verify(whole, capsys)
    assert status == 1
    assert "line 1 is torn" in out
    assert main(["tile", "--workers", "1", "--dataset", str(whole.root)]) == 0
    status, out = verify(whole, capsys)
    assert status == 0
    assert "a run was killed; the stage ran since" in out


def test_what_no_line_names_is_listed_and_no_error(whole, capsys):
    (tar,) = whole.tiles_dir(224).glob("*.tar")
    shutil.copy(tar, tar.with_name(f"{SLIDE}.512-528.tar"))
    (whole.root / "notes.txt").write_text("mine")
    (whole.root / ".tmp" / "dead").mkdir(parents=True)
    status, out = verify(whole, capsys)
    assert status == 0
    assert f"{SLIDE}.512-528.tar" in out
    assert "not covered" in out
    assert "notes.txt" in out
    assert ".tmp/dead" in out


def test_encoder_json_of_an_older_release_is_not_covered_then_journalled(whole, capsys):
    with Run(whole, "cache", {}) as run:
        assert claim_encoder(whole, run, 224, CONFIG, RECORD) is None
        assert not run.journal_file.exists(), "it stands: nothing to write"
    for journal in whole.status_dir("cache").glob("*.jsonl"):
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(x for x in lines if '"slide_id": "encoder.json"' not in x))
    status, out = verify(whole, capsys)
    assert status == 0
    assert "not covered" in out
    assert "encoder.json" in out
    with Run(whole, "cache", {}) as run:
        claim_encoder(whole, run, 224, CONFIG, RECORD)
    assert "not covered" not in verify(whole, capsys)[1]


def test_a_journal_cannot_send_verify_outside(whole, capsys, tmp_path):
    from pipeline.dataset import FileRecord

    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    record = FileRecord("../outside.txt", 5, "0" * 64)
    with Run(whole, "tile", {}) as run:
        run.append([Entry("evil", "done", "f", scope="224", start=0, stop=16, files=(record,))])
    status, out = verify(whole, capsys, "--repair")
    assert status == 1
    assert "'../outside.txt'" in out
    assert outside.exists()


def test_a_run_without_a_lease_is_alive_by_its_process_here_and_by_its_age(whole):
    """An older release's: that its process is not here proves nothing, it may be in a container."""
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
    if len(host) >= 24:
        pytest.skip("this host's name is cut short in run ids")
    ended = subprocess.Popen(["true"])
    ended.wait()
    own = f"20200101T000000-000000000-{host}-{os.getpid()}-abcdef"
    unseen = f"20200101T000000-000000000-{host}-{ended.pid}-abcdef"
    no_process = f"20200101T000000-000000000-{host}-{2**22 + 1}-abcdef"
    other = "20200101T000000-000000000-node-7-1-abcdef"
    now = time.time()
    assert may_be_alive(own, 0.0, now)
    assert not may_be_alive(no_process, now, now)
    for run_id in (unseen, other, "unknown"):
        assert may_be_alive(run_id, now - 3600, now)
        assert not may_be_alive(run_id, now - 25 * 3600, now)
    # One of this release has a lease, or has ended.
    for run_id in (own, unseen):
        assert may_write(RunJudge(whole), f"r000000000001-{run_id}", now - 60)
        assert not may_write(RunJudge(whole), f"r000000000001-{run_id}", now - 3600)
