import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Run,
    claim_identity,
    commit_bytes,
    commit_file,
    files_present,
    make_selection,
    new_run_id,
    open_dataset,
    parse_shard_name,
    read_journal,
    read_selection,
    read_slides,
    safe_slide_id,
    write_selection,
    write_slides,
)
from pipeline.dataset.journal import decode_line, encode_line
from pipeline.dataset.layout import check_name, check_slide_id
from pipeline.dataset.ledger import current_entries
from pipeline.dataset.tables.slides import Slide

VERSIONS = {"python": "3"}


def test_a_committed_file_has_the_recorded_size_and_sum(tmp_path):
    import hashlib

    dataset = Dataset(tmp_path)
    final = tmp_path / "tiles" / "224" / "a.0-1.tar"
    record = commit_bytes(dataset, "run", final, b"12345")
    assert final.read_bytes() == b"12345"
    assert record == FileRecord("tiles/224/a.0-1.tar", 5, hashlib.sha256(b"12345").hexdigest())


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    dataset = Dataset(tmp_path)
    final = tmp_path / "x.bin"

    def write(file):
        file.write(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        commit_file(dataset, "run", final, write)
    assert not final.exists()
    assert list((tmp_path / ".tmp" / "run").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a small tmpfs")
def test_a_full_disk_is_one_clear_line(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        dataset = Dataset(tmp_path)
        with pytest.raises(UserError, match=r"cannot write .*x\.bin.*space"):
            commit_bytes(dataset, "run", tmp_path / "x.bin", bytes(1 << 20))
        assert not (tmp_path / "x.bin").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def entry(slide="s", mark="f", outcome="done", **more):
    return Entry(slide, outcome, mark, **more)


def test_runs_sort_by_time_where_a_second_ends(monkeypatch):
    last_of_a_second = 1_700_000_000 * 10**9 - 1
    clock = iter([last_of_a_second, last_of_a_second + 1, last_of_a_second + 2])
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    ids = [new_run_id() for _ in range(3)]
    assert ids == sorted(ids)
    assert ids[0].startswith("20231114T221319-999999999-")
    assert ids[1].startswith("20231114T221320-000000000-")


def test_journal_lines_come_back(tmp_path):
    dataset = Dataset(tmp_path)
    wanted = entry(
        reason="ü, \"quoted\"\nline", scope="224", start=0, stop=16, counts={"tiles": 16},
        files=(FileRecord("tiles/224/s.0-16.tar", 1, "00"),), values={"mpp": 0.5},
    )  # fmt: skip
    with Run(dataset, "tile", VERSIONS) as run:
        run.append([wanted])
        run.append([entry("t")])
    assert read_journal(dataset, "tile") == [wanted, entry("t")]


def test_torn_or_altered_lines_are_left_out(tmp_path):
    dataset = Dataset(tmp_path)
    with Run(dataset, "tile", VERSIONS) as run:
        run.append([entry("a"), entry("b"), entry("c")])
        path = run.journal_file
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace('"b"', '"x"') + lines[2][: len(lines[2]) // 2])
    assert [e.slide_id for e in read_journal(dataset, "tile")] == ["a"]


def test_a_journal_that_cannot_be_read_is_one_line_and_not_an_empty_one(tmp_path):
    dataset = Dataset(tmp_path)
    (dataset.status_dir("tile") / "run.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run\.jsonl cannot be read: it is a folder, .*; fix"):
        read_journal(dataset, "tile")
    dataset.status_dir("cache").touch()
    with pytest.raises(UserError, match=r"status/cache cannot be read: Not a directory; fix"):
        read_journal(dataset, "cache")
    assert read_journal(dataset, "tissue") == []


def test_an_identity_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "dataset.json").mkdir()
    claim = {"stage": "scan", "versions": {}}
    for read in (open_dataset, lambda root: claim_identity(Dataset(root), {}, **claim)):
        with pytest.raises(UserError, match=r"dataset\.json cannot be read: it is a folder"):
            read(tmp_path)

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.exists", refuse)
    with pytest.raises(UserError, match=r"dataset\.json cannot be read: Permission denied"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("line", ["", "{", "[]", "null", "1", '{"crc": "0"}', '"text"'])
def test_no_line_breaks_the_reader(line):
    assert decode_line(line) is None


def test_a_line_from_the_future_is_read_for_what_is_known():
    record = json.loads(encode_line(entry(), VERSIONS))
    record.pop("crc")
    record["unheard_of"] = 1
    from pipeline.dataset.journal import _checksum_of

    record["crc"] = _checksum_of(record)
    assert decode_line(json.dumps(record)) == entry()


def test_what_stands_is_what_the_latest_fingerprint_says():
    rows = [
        entry(start=0, stop=16),
        entry(start=16, stop=32),
        entry(mark="g", start=0, stop=16),
        entry("t", start=0, stop=16),
    ]
    stood = current_entries(rows)
    assert [(e.fingerprint, e.start) for e in stood["s"]] == [("g", 0)]
    assert len(stood["t"]) == 1
    assert current_entries(rows, "other scope") == {}


def _line(outcome, scope="224", start=-1, stop=-1, mark="f", slide="s"):
    return Entry(slide, outcome, mark, scope=scope, start=start, stop=stop)


def test_a_failure_stands_until_its_slide_is_done_in_its_scope():
    failed, done = _line("failed"), _line("done", start=0, stop=16)
    others = [_line("done", "448", 0, 16), _line("done", start=0, stop=16, slide="t")]
    assert current_entries([failed, done], "224") == {"s": [done]}
    assert current_entries([done, failed], "224")["s"] == [failed, done], (
        "what is done may fail later"
    )
    assert current_entries([failed, done, failed], "224")["s"] == [failed, done]
    assert current_entries([failed, *others], "224")["s"] == [failed]
    assert current_entries([failed, _line("pruned", start=0, stop=16)], "224")["s"][0] == failed
    kept = [_line("done", start=16, stop=32), failed, done]
    assert current_entries(kept, "224")["s"] == [done, kept[0]], "other ranges are as they were"


def test_a_failure_without_a_scope_stands_until_its_slide_is_done_in_any():
    """As older releases wrote those of `cache`, and of slides that killed their workers."""
    failed, done = _line("failed", ""), _line("done", "224/h0-mini/cls", 0, 16, "g")
    assert current_entries([failed]) == {"s": [failed]}
    assert current_entries([failed, done]) == {}
    assert current_entries([failed, done], done.scope) == {"s": [done]}
    assert current_entries([done, failed]) == {"s": [failed]}
    assert current_entries([failed, _line("done", "224", 0, 16, slide="t")]) == {"s": [failed]}
    whole = _line("done", "")
    assert current_entries([whole, done]) == {"s": [whole]}


def test_a_failure_of_newer_parameters_leaves_older_ranges_superseded():
    lines = [
        _line("done", start=0, stop=16, mark="old"),
        _line("failed", mark="new"),
        _line("done", start=16, stop=32, mark="old"),
    ]
    assert current_entries(lines, "224") == {"s": [lines[2]]}


def test_a_file_of_another_size_is_not_present(tmp_path):
    dataset = Dataset(tmp_path)
    record = commit_bytes(dataset, "run", tmp_path / "a.bin", b"123")
    assert files_present(dataset, entry(files=(record,)))
    (tmp_path / "a.bin").write_bytes(b"12")
    assert not files_present(dataset, entry(files=(record,)))
    (tmp_path / "a.bin").unlink()
    assert not files_present(dataset, entry(files=(record,)))


WRITER = """
import sys
from pathlib import Path
from pipeline.dataset import Dataset, Entry, Run, commit_bytes
dataset = Dataset(Path(sys.argv[1]))
with Run(dataset, "tile", {}) as run:
    for number in range(100000):
        name = f"s{number}"
        path = dataset.tiles_dir(224) / f"{name}.0-1.tar"
        record = commit_bytes(dataset, run.run_id, path, name.encode() * 1000)
        run.append([Entry(name, "done", "f", scope="224", start=0, stop=1, files=(record,))])
"""


def test_kill_9_leaves_only_whole_files_under_journalled_names(tmp_path):
    dataset = Dataset(tmp_path)
    for moment in (0.0, 0.07, 0.15):
        stood = len(read_journal(dataset, "tile"))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        while len(read_journal(dataset, "tile")) == stood and writer.poll() is None:
            time.sleep(0.02)
        time.sleep(moment)
        writer.kill()
        writer.wait()
        for one in read_journal(dataset, "tile"):
            assert files_present(dataset, one)
            assert (tmp_path / one.files[0].path).read_bytes() == one.slide_id.encode() * 1000
    assert len(read_journal(dataset, "tile")) > 3


def test_identity_grows_by_stage_and_refuses_another_value(tmp_path):
    dataset = Dataset(tmp_path)
    claim_identity(dataset, {"mpp": 0.5}, stage="scan", versions=VERSIONS)
    claim_identity(dataset, {"min_tissue": 0.5}, stage="tissue", versions=VERSIONS)
    claim_identity(dataset, {"mpp": 0.5}, stage="scan", versions={"python": "4"})
    with pytest.raises(UserError, match=r"mpp is 0\.5 in this dataset, 0\.25 was asked for"):
        claim_identity(dataset, {"mpp": 0.25}, stage="scan", versions=VERSIONS)
    document = json.loads(dataset.identity_file.read_text())
    assert document["identity"] == {"format_version": 1, "mpp": 0.5, "min_tissue": 0.5}


def test_a_format_of_another_version_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_text('{"identity": {"format_version": 9}, "records": {}}')
    with pytest.raises(UserError, match="format version 9"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="not a dataset's identity"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="run `python -m pipeline scan` first"):
        open_dataset(tmp_path / "nowhere")


def test_slides_come_back_with_text_columns_as_text(tmp_path):
    dataset = Dataset(tmp_path)
    slides = [
        Slide("b", "/x/b.svs", site="NA", project="02", mpp=0.25, levels=((9, 8, 1.0),)),
        Slide("a", "/x/a.svs", status="failed", reason="no", site="2E4"),
    ]
    write_slides(dataset, new_run_id(), slides)
    assert read_slides(dataset) == [slides[1], slides[0]]


def test_selections_are_sorted_and_carry_their_plan(tmp_path):
    dataset = Dataset(tmp_path)
    made = make_selection(
        "x", {"b": np.array([9, 1]), "a": np.array([4]), "c": np.array([], int)}, {"seed": 1}
    )
    write_selection(dataset, new_run_id(), made)
    found = read_selection(dataset, "x")
    assert [(s, r.tolist()) for s, r in found.items()] == [("a", [4]), ("b", [1, 9])]
    assert found.plan == {"seed": 1}
    assert found.content_hash == made.content_hash
    other = make_selection("y", {"a": np.array([4]), "b": np.array([1, 8])}, {})
    assert other.content_hash != made.content_hash
    with pytest.raises(UserError, match="there: x"):
        read_selection(dataset, "nope")


def test_a_selection_written_by_others_in_any_order_is_grouped(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset = Dataset(tmp_path)
    path = dataset.selection_file("theirs")
    path.parent.mkdir(parents=True)
    table = pa.table({"slide_id": ["b", "a", "b"], "rank": [3, 7, 1], "extra": [1, 2, 3]})
    pq.write_table(table, path)
    found = read_selection(dataset, "theirs")
    assert [(s, r.tolist()) for s, r in found.items()] == [("a", [7]), ("b", [1, 3])]


def test_names_cannot_leave_the_dataset():
    for bad in ("../x", "a/b", "", ".hidden", "-x", "a\0b"):
        with pytest.raises(UserError):
            check_slide_id(bad)
        with pytest.raises(UserError):
            check_name(bad, "selection")
        assert check_slide_id(safe_slide_id(bad))


def test_shard_names_with_dots_in_the_slide():
    name = parse_shard_name("TCGA-3C-AALI-01Z-00-DX1.F6E9.0-512.tar")
    assert (name.slide_id, name.start, name.stop) == ("TCGA-3C-AALI-01Z-00-DX1.F6E9", 0, 512)
    assert str(name) == "TCGA-3C-AALI-01Z-00-DX1.F6E9.0-512.tar"
    with pytest.raises(UserError, match="not a shard's name"):
        parse_shard_name("slide.tar")
