"""Prune removes what nothing needs and nothing else, and a kill in between harms nobody."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_verify import CONFIG, RECORD, SLIDE, add_features

from common.errors import UserError
from common.text import format_bytes
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Run,
    TileStore,
    commit_bytes,
    make_selection,
    new_run_id,
    read_candidates,
    read_journal,
    write_candidates,
    write_selection,
)
from pipeline.dataset.features import FeatureStore
from pipeline.features.stage import claim_encoder


def digest(root: Path) -> dict[str, str]:
    """sha256 of every file, journals and staging left out."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("status", ".tmp")
    }


def run(dataset, *arguments):
    return main([arguments[0], "--dataset", str(dataset.root), *arguments[1:]])


def prune(dataset, *more):
    return run(dataset, "prune", *more)


def select(dataset, name, start, stop):
    """A selection by ranks, journalled as `select` does."""
    ranks = {SLIDE: np.arange(start, stop, dtype=np.int32)}
    with Run(dataset, "select", {}) as one:
        record = write_selection(dataset, one.run_id, make_selection(name, ranks, {}))
        one.append([Entry(name, "done", "f", files=(record,))])


@pytest.fixture(scope="module")
def two_shards_made(tiled, tmp_path_factory):
    """Shards of ranks [0, 16) and [16, n), made one after the other; features of all."""
    root = tmp_path_factory.mktemp("two") / "dataset"
    shutil.copytree(tiled.root, root)
    shutil.rmtree(root / "tiles")
    shutil.rmtree(root / "status" / "tile")
    dataset = Dataset(root)
    select(dataset, "small", 0, 10)
    for more in (["--selection", "small"], []):
        assert run(dataset, "tile", "--workers", "1", *more) == 0
    add_features(dataset)
    return dataset


@pytest.fixture
def two_shards(two_shards_made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(two_shards_made.root, tmp_path / "dataset")
    return Dataset(tmp_path / "dataset")


def test_a_dry_run_touches_nothing_and_says_how_much(two_shards, capsys):
    before = digest(two_shards.root), sorted((two_shards.root / "status").rglob("*"))
    shard = list(two_shards.tiles_dir(224).glob(f"{SLIDE}.16-*"))
    freed = format_bytes(sum(path.stat().st_size for path in shard))
    for more in ([], ["--dry-run"]):
        assert prune(two_shards, "--keep-selection", "small", *more) == 0
        out = capsys.readouterr().out
        assert "tile 224" in out
        assert f"would remove 2 files, {freed}" in out
        assert "--yes" in out
    after = digest(two_shards.root), sorted((two_shards.root / "status").rglob("*"))
    assert after == before


def test_what_all_selections_need_stays(two_shards, capsys):
    before = digest(two_shards.root)
    assert prune(two_shards, "--yes") == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert digest(two_shards.root) == before


def test_pruned_then_needed_again_is_as_never_pruned(two_shards, capsys):
    before = digest(two_shards.root)
    assert prune(two_shards, "--keep-selection", "small", "--yes") == 0
    assert run(two_shards, "verify") == 0
    gone = before.keys() - digest(two_shards.root).keys()
    assert {Path(name).suffix for name in gone} == {".tar", ".idx"}
    assert all(f"{SLIDE}.16-" in name for name in gone)
    assert TileStore(two_shards, 224).recorded_blocks(SLIDE) == {0}
    with pytest.raises(UserError, match="pipeline tile"):
        TileStore(two_shards, 224).read(SLIDE, [20])
    # The features' single file holds block 0, which is needed: it stays whole.
    assert FeatureStore(two_shards, tile_px=224, encoder="h0-mini").read(SLIDE, [20]).shape == (
        1,
        8,
    )
    assert run(two_shards, "tile", "--workers", "1") == 0
    assert run(two_shards, "verify") == 0
    assert digest(two_shards.root) == before
    assert prune(two_shards, "--yes") == 0
    assert digest(two_shards.root) == before


def test_features_and_their_record_go_with_the_last_that_needs_them(two_shards, capsys):
    other = two_shards
    with Run(other, "cache", {}) as one:  # killed before its first features
        claim_encoder(other, one, 224, replace(CONFIG, tokens="int8"), RECORD)
    lost = other.selection_file("train").read_bytes()
    other.selection_file("train").unlink()
    ranks = {"another-slide": np.arange(3, dtype=np.int32)}
    with Run(other, "select", {}) as one:
        write_selection(other, one.run_id, make_selection("elsewhere", ranks, {}))
    with Run(other, "tissue", {}) as one:
        table = read_candidates(other, SLIDE)
        record = write_candidates(other, one.run_id, "another-slide", table)
        counts = {"candidate tiles": table.num_rows}
        one.append([Entry("another-slide", "done", "f", files=(record,), counts=counts)])
    with pytest.raises(UserError, match="'train' is missing"):
        prune(other, "--yes")
    other.selection_file("train").write_bytes(lost)
    for name in ("train", "small"):
        assert run(other, "select", "--remove", name) == 0
    assert prune(other, "--yes") == 0
    assert list(other.root.rglob("*.tar")) == []
    assert not (other.root / "features").exists()
    assert Ledger.read(other, "tile")["224"].written == {}
    assert run(other, "verify") == 0
    # Another weight is not refused for the sake of features that are gone.
    with Run(other, "cache", {}) as one:
        claim_encoder(other, one, 224, CONFIG, RECORD | {"weights_sha256": "other"})
    assert run(other, "verify") == 0


@pytest.mark.parametrize("moment", [0, 1])
def test_killed_between_the_line_and_the_files(two_shards, monkeypatch, capsys, moment):
    """The line stands, some or no file went: readers see nothing, the next prune finishes."""
    import pipeline.upkeep.prune

    before = digest(two_shards.root)
    remove = pipeline.upkeep.prune._remove_files

    class Killed(BaseException):
        pass

    def killed(dataset, entry):
        if moment:
            remove(dataset, Entry("", "done", "", files=entry.files[:1]))
        raise Killed

    monkeypatch.setattr(pipeline.upkeep.prune, "_remove_files", killed)
    with pytest.raises(Killed):
        prune(two_shards, "--keep-selection", "small", "--yes")
    monkeypatch.undo()
    assert run(two_shards, "verify") == 0
    assert "superseded" in capsys.readouterr().out
    assert TileStore(two_shards, 224).recorded_blocks(SLIDE) == {0}
    assert prune(two_shards, "--keep-selection", "small", "--yes") == 0
    assert len(list(two_shards.tiles_dir(224).iterdir())) == 2
    assert run(two_shards, "tile", "--workers", "1") == 0
    assert digest(two_shards.root) == before


def test_leftovers_go_but_never_what_somebody_reads(two_shards, capsys):
    sound = digest(two_shards.root)
    tiles = two_shards.tiles_dir(224)
    (tiles / f"{SLIDE}.512-528.tar").write_bytes(b"of a killed run")
    (tiles / f"{SLIDE}.0-16.zarr" / "c").mkdir(parents=True)
    (tiles / f"{SLIDE}.0-16.zarr" / "c" / "0").write_bytes(b"x")
    (two_shards.root / "selections" / "theirs.parquet").write_bytes(
        two_shards.selection_file("small").read_bytes()
    )
    (two_shards.root / "notes.txt").write_text("mine")
    link = two_shards.root / "features" / "linked"
    outside = two_shards.root.parent / "outside"
    outside.mkdir()
    (outside / "precious.parquet").write_bytes(b"x")
    link.symlink_to(outside)
    assert prune(two_shards, "--yes") == 0
    assert "removed 2 files" in capsys.readouterr().out
    after = digest(two_shards.root)
    assert sound.items() <= after.items()
    assert after.keys() - sound.keys() - {"features/linked/precious.parquet"} == {
        "selections/theirs.parquet", "notes.txt",
    }  # fmt: skip
    assert (outside / "precious.parquet").exists()


def test_of_staging_folders_only_dead_ones_go_and_a_live_run_keeps_unnamed_files(
    two_shards, capsys
):
    top = two_shards.root / ".tmp"
    live = new_run_id()
    dead = live.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    elsewhere = "20200101T000000-000000000-node7-17-abcdef"
    for name in (live, dead, elsewhere):
        (top / name).mkdir(parents=True)
        (top / name / "half").write_bytes(b"1234")
    shard = two_shards.tiles_dir(224) / f"{SLIDE}.512-528.tar"
    shard.write_bytes(b"committed, its line is yet to come")
    assert prune(two_shards, "--yes") == 0
    assert {path.name for path in top.iterdir()} == {live, elsewhere}, "a day has not passed"
    assert shard.exists()
    assert "may be under way" in capsys.readouterr().out
    shutil.rmtree(top / live)
    for path in (top / elsewhere / "half", top / elsewhere):
        os.utime(path, (0, 0))
    assert prune(two_shards, "--yes") == 0
    assert not shard.exists()
    assert list(top.iterdir()) == []
    assert run(two_shards, "verify") == 0


def test_files_of_older_parameters_are_superseded(two_shards, capsys):
    (old,) = (e for e in read_journal(two_shards, "tile") if e.start == 16)
    with Run(two_shards, "tile", {}) as one:
        one.append([Entry(SLIDE, "failed", "another", "slide changed", scope="224")])
    assert prune(two_shards, "--yes") == 0
    assert "superseded" in capsys.readouterr().out
    assert not (two_shards.root / old.files[0].path).exists()


def test_prune_refuses_where_it_is_not_certain_what_is_needed(two_shards):
    path = two_shards.selection_file("small")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # the footer's length: still caught, whatever the reader makes of it
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"small\.parquet"):
        prune(two_shards, "--yes")
    with pytest.raises(UserError, match="no selection 'nope'"):
        prune(two_shards, "--keep-selection", "nope", "--yes")
    shutil.rmtree(two_shards.root / "selections")
    shutil.rmtree(two_shards.status_dir("select"))
    with pytest.raises(UserError, match="no selection"):
        prune(two_shards, "--yes")
    assert len(list(two_shards.root.rglob("*.tar"))) == 2


def test_without_its_journal_nothing_is_a_leftover(two_shards, capsys):
    """A lost status folder must not make prune empty the dataset."""
    shutil.rmtree(two_shards.status_dir("tile"))
    before = digest(two_shards.root)
    assert prune(two_shards, "--yes") == 0
    assert digest(two_shards.root) == before


def test_a_pruned_line_makes_nothing_stand(two_shards):
    line = Entry(SLIDE, "pruned", "f", start=0, stop=16)
    assert Ledger([line], lambda entry: True)[""].done(SLIDE, "f") is None


OTHER = RECORD | {"weights_sha256": "1" * 64}


@pytest.fixture
def two_encoders(two_shards):
    """Features of h0-mini, of one of its views, and of another encoder."""
    for encoder, view in (("h0-mini", "jpeg70"), ("uni2-h", "")):
        for kind in ("cls", "tokens-float16"):
            (old,) = (two_shards.features_dir(224, "h0-mini") / kind).glob("*.parquet")
            folder = two_shards.features_dir(224, encoder, view) / kind
            with Run(two_shards, "cache", {}) as one:
                config = replace(CONFIG, encoder=encoder, view=view)
                record = RECORD | {"encoder": encoder, "view": view}
                claim_encoder(two_shards, one, 224, config, record)
                file = commit_bytes(two_shards, one.run_id, folder / old.name, old.read_bytes())
                (_, stop) = map(int, old.stem.rpartition(".")[2].split("-"))
                scope = config.scope(224, kind)
                one.append([Entry(SLIDE, "done", "f", scope=scope, start=0, stop=stop,
                                  files=(file,))])  # fmt: skip
    assert run(two_shards, "verify") == 0
    return two_shards


def claim_other(dataset):
    """What `cache` does first with other weights."""
    with Run(dataset, "cache", {}) as one:
        claim_encoder(dataset, one, 224, CONFIG, OTHER)


@pytest.mark.parametrize(("name", "folders"), [
    ("h0-mini", {"h0-mini", "h0-mini+jpeg70"}), ("h0-mini+jpeg70", {"h0-mini+jpeg70"}),
    ("uni2-h", {"uni2-h"}),
])  # fmt: skip
def test_an_encoder_s_features_go_and_nothing_else(two_encoders, capsys, name, folders):
    before = digest(two_encoders.root)
    gone = {
        path for path in before if path.startswith("features/") and path.split("/")[2] in folders
    }
    freed = format_bytes(sum((two_encoders.root / path).stat().st_size for path in gone))
    assert prune(two_encoders, "--features", name) == 0
    assert f"would remove {len(gone)} files, {freed}; nothing was" in capsys.readouterr().out
    assert digest(two_encoders.root) == before
    assert prune(two_encoders, "--features", name, "--yes") == 0
    assert f"removed {len(gone)} files, {freed} from" in capsys.readouterr().out
    assert digest(two_encoders.root) == {k: v for k, v in before.items() if k not in gone}
    assert run(two_encoders, "verify") == 0
    assert prune(two_encoders, "--features", name, "--yes") == 0
    assert f"no features of {name} in" in capsys.readouterr().out


def test_the_refusal_of_other_weights_names_the_way_out(two_encoders, capsys):
    with pytest.raises(UserError) as refusal:
        claim_other(two_encoders)
    command = f"python -m pipeline prune --dataset {two_encoders.root} --features h0-mini"
    assert "weights_sha256 '000" in str(refusal.value)
    assert f"`{command}`" in str(refusal.value)
    assert main([*command.split()[3:], "--yes"]) == 0
    claim_other(two_encoders)
    record = json.loads(
        (two_encoders.features_dir(224, "h0-mini") / "cls" / "encoder.json").read_text()
    )
    assert record["weights_sha256"] == OTHER["weights_sha256"]
    with pytest.raises(UserError, match="uni2-h"):
        prune(two_encoders, "--features", "uni3-h")
    with pytest.raises(UserError, match="leave --keep-selection out"):
        prune(two_encoders, "--features", "uni2-h", "--keep-selection", "small")


@pytest.mark.parametrize("moment", range(9))
def test_killed_while_features_go(two_encoders, monkeypatch, moment):
    """After any number of files: what is left is whole or unseen, and the same command goes on."""
    import pipeline.upkeep.prune as module

    class Killed(BaseException):
        pass

    done = []
    remove = module.remove_file

    def killed(dataset, path, *more):
        if path.startswith("features/") and path.endswith((".parquet", ".json")):
            if len(done) == moment:
                raise Killed
            done.append(path)
        return remove(dataset, path, *more)

    monkeypatch.setattr(module, "_ENTRIES_PER_TURN", 2)
    monkeypatch.setattr(module, "remove_file", killed)
    if moment < 8:  # two folders of two kinds, each with a record and a file
        with pytest.raises(Killed):
            prune(two_encoders, "--features", "h0-mini", "--yes")
    else:
        assert prune(two_encoders, "--features", "h0-mini", "--yes") == 0
    monkeypatch.undo()
    assert run(two_encoders, "verify") == 0
    # As long as a reader would see any, other weights are refused.
    scopes = Ledger.read(two_encoders, "cache")
    if any(scopes[CONFIG.scope(224, kind)].written for kind in CONFIG.kinds):
        with pytest.raises(UserError, match="--features h0-mini"):
            claim_other(two_encoders)
    assert prune(two_encoders, "--features", "h0-mini", "--yes") == 0
    assert [path.name for path in (two_encoders.root / "features" / "224").iterdir()] == ["uni2-h"]
    claim_other(two_encoders)
    assert run(two_encoders, "verify") == 0


def test_features_are_not_removed_under_a_run(two_encoders):
    live = two_encoders.root / ".tmp" / new_run_id()
    live.mkdir(parents=True)
    before = digest(two_encoders.root)
    assert prune(two_encoders, "--features", "h0-mini") == 0
    with pytest.raises(UserError, match="may be at work"):
        prune(two_encoders, "--features", "h0-mini", "--yes")
    assert digest(two_encoders.root) == before
