"""The cache worker on small tiles and a small network: overlap, faults, memory, batch sizes."""

import dataclasses
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.errors import UserError
from model import encoders
from model.encoders import Encoder, encoder_spec
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Entry,
    FileRecord,
    Ledger,
    Missing,
    Run,
    TileStore,
    commit_bytes,
    commit_file,
    commit_json,
    encode_png,
    make_selection,
    write_candidates,
    write_selection,
    write_tar,
)
from pipeline.dataset.features import FeatureStore, cls_table
from pipeline.dataset.features.quantise import quantise_tokens
from pipeline.dataset.ledger import current_entries
from pipeline.dataset.tiles.store import with_first_crc
from pipeline.features import bundle
from pipeline.features.bundle import SlideWork, _write_table, cache_bundle
from pipeline.features.compute import Forward, Span, lanes_for, order_batches
from pipeline.features.config import CacheConfig
from pipeline.features.plan import bytes_per_tile, journal_rate, stored_bytes
from pipeline.features.stage import CacheStage
from pipeline.run.workers import EngineConfig

PX, ROWS = 28, 40
SLIDES = ("a", "b", "c")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three slides of 40 small tiles."""
    made = Dataset(tmp_path / "dataset")
    rng = np.random.default_rng(0)
    with Run(made, "tile", {}) as run:
        for slide in SLIDES:
            tiles = rng.integers(0, 255, (ROWS, PX, PX, 3), np.uint8)
            path = made.tiles_dir(PX) / f"{slide}.0-{ROWS}.tar"
            index = bytearray()

            def write(file, slide=slide, tiles=tiles, index=index):
                index.extend(write_tar(file, slide, 0, (encode_png(tile) for tile in tiles)))

            tar = commit_file(made, run.run_id, path, write)
            idx = commit_bytes(made, run.run_id, path.with_suffix(".idx"), bytes(index))
            columns = [pa.array(np.arange(ROWS).astype(f.type.to_pandas_dtype()))
                       for f in CANDIDATES_SCHEMA]  # fmt: skip
            write_candidates(made, run.run_id, slide, pa.table(columns, schema=CANDIDATES_SCHEMA))
            entry = Entry(slide, "done", "f", scope=str(PX), start=0, stop=ROWS, files=(tar, idx))
            run.append([entry])
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """H0-mini's own kind of network at two patches a side, one block and 24 channels."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(
        "vit_base_patch14_reg4_dinov2", img_size=PX, embed_dim=24, depth=1, num_heads=2,
        num_classes=0, global_pool="", reg_tokens=4, no_embed_class=True,
    )  # fmt: skip
    spec = dataclasses.replace(
        encoder_spec("h0-mini"), dim=24, token_dim=24, native_grid=2, token_grid=2, input_px=PX
    )
    encoder = Encoder(spec, network, "random:0", device="cpu", dtype=torch.float32)
    monkeypatch.setattr(bundle, "load_encoder_once", lambda *_: encoder)
    return encoder


def arguments(
    dataset: Dataset, slide: str, encoder: Encoder, config: CacheConfig,
    work: dict[range, tuple[str, ...]] | None = None,
) -> tuple[SlideWork]:  # fmt: skip
    spans = work or {range(3): config.kinds}
    return (
        SlideWork(
            str(dataset.root), "run", slide, config, PX, spans, "mark", encoder.weights_sha256, ROWS
        ),
    )


def compute(
    dataset: Dataset, encoder: Encoder, config: CacheConfig, slides: tuple[str, ...] = SLIDES
) -> list[list[Entry]]:
    rows = list(cache_bundle([arguments(dataset, slide, encoder, config) for slide in slides]))
    with Run(dataset, "cache", {}) as run:
        run.append([entry for entries in rows for entry in entries])
    for kind in config.kinds:
        path = config.file(dataset, PX, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"weights_sha256": "w", "view": ""}')
    return rows


def tiles_of(dataset: Dataset, slide: str) -> np.ndarray:
    return np.stack(TileStore(dataset, PX).read(slide, range(ROWS)))


@pytest.mark.parametrize("tokens", ["float16", "int8"])
def test_features_are_the_encoders_own(dataset: Dataset, small: Encoder, tokens: str) -> None:
    config = CacheConfig("h0-mini", tokens=tokens, batch=32)
    rows = compute(dataset, small, config)
    assert [[entry.outcome for entry in entries] for entries in rows] == [["done"] * 2] * 3
    for slide in SLIDES:
        direct = small.encode(tiles_of(dataset, slide))
        cls = FeatureStore(dataset, tile_px=PX, encoder="h0-mini").read(slide, range(ROWS))
        assert np.abs(cls - direct.cls.numpy()).max() < 1e-5
        kind = f"tokens-{tokens}"
        stored = FeatureStore(dataset, tile_px=PX, encoder="h0-mini", kind=kind)
        assert direct.tokens is not None
        expected = direct.tokens.numpy()
        limit = 2e-3 if tokens == "float16" else float(quantise_tokens(expected)[1].max()) / 127
        assert np.abs(stored.read(slide, range(ROWS)) - expected).max() <= limit
    with pytest.raises(UserError, match="weights_sha256 'w'"):
        FeatureStore(dataset, tile_px=PX, encoder="h0-mini", expect={"weights_sha256": "x"})


def test_batch_size_changes_less_than_a_hundred_thousandth(
    dataset: Dataset, small: Encoder
) -> None:
    whole = small.encode(tiles_of(dataset, "a")).cls.numpy()
    for batch in (16, 32, 48):
        compute(dataset, small, CacheConfig("h0-mini", tokens="none", batch=batch), ("a",))
        cls = FeatureStore(dataset, tile_px=PX, encoder="h0-mini").read("a", range(ROWS))
        assert np.abs(cls - whole).max() <= 1e-5 * np.abs(whole).max()


def test_a_slides_bytes_do_not_depend_on_its_bundle(dataset: Dataset, small: Encoder) -> None:
    config = CacheConfig("h0-mini", tokens="float16", batch=16)
    together = {
        e.scope + e.slide_id: e.files for row in compute(dataset, small, config) for e in row
    }
    alone = {
        e.scope + e.slide_id: e.files
        for slide in SLIDES
        for row in compute(dataset, small, config, (slide,))
        for e in row
    }
    assert alone == together


def test_files_written_by_turns_are_the_same(
    dataset: Dataset, small: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three lanes, as on a GPU, over slides of one and of two runs of blocks."""
    config = CacheConfig("h0-mini", tokens="float16", batch=16)
    kinds = config.kinds
    whole = {range(3): kinds}
    work = {"a": {range(1): kinds, range(2, 3): kinds}, "b": whole, "c": whole}
    bundle_of = [arguments(dataset, slide, small, config, work[slide]) for slide in SLIDES]

    def files() -> list[list[tuple[str, int, object]]]:
        rows = list(cache_bundle(bundle_of))
        assert all(entry.outcome == "done" for entries in rows for entry in entries)
        return [[(e.scope, e.start, e.files) for e in entries] for entries in rows]

    in_order = files()
    monkeypatch.setattr(bundle, "lanes_for", lambda *_: 3)
    assert files() == in_order


def test_lanes_take_turns_and_keep_each_spans_order() -> None:
    spans = [Span(i, name, range(2 * i, 2 * i + 3), ("cls",)) for i, name in enumerate("abc")]
    in_order = list(order_batches(spans, 16))
    by_turns = list(order_batches(spans, 16, lanes=2))
    assert "".join(span.slide_id for span, _, _ in by_turns) == "abababccc"
    for one in spans:
        assert [b for b in by_turns if b[0] is one] == [b for b in in_order if b[0] is one]
    assert (lanes_for("cpu", 64), lanes_for("cuda", 2), lanes_for("cuda", 16)) == (1, 1, 4)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_damaged_tile_fails_its_slide_alone(
    dataset: Dataset, small: Encoder, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    monkeypatch.setattr(bundle, "lanes_for", lambda *_: lanes)
    tar = dataset.tiles_dir(PX) / f"b.0-{ROWS}.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"b/00000020.png") + 512
    data[at : at + 64] = bytes(64)
    tar.write_bytes(data)
    rows = compute(dataset, small, CacheConfig("h0-mini", tokens="float16", batch=16))
    assert [entries[-1].outcome for entries in rows] == ["done", "failed", "done"]
    assert "tile 20 of slide b is damaged" in rows[1][-1].reason
    assert not list(dataset.features_dir(PX, "h0-mini").rglob("b.*"))
    assert not [path for path in (dataset.root / ".tmp").rglob("*") if path.is_file()]


def test_a_full_disk_fails_its_slide_alone(
    dataset: Dataset, small: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(dataset, run_id, final, write):
        if final.name.startswith("b."):
            raise UserError(f"cannot write {final}: No space left on device")
        return commit_file(dataset, run_id, final, write)

    monkeypatch.setattr(bundle, "commit_file", full)
    rows = compute(dataset, small, CacheConfig("h0-mini", tokens="float16", batch=16))
    assert [entries[-1].outcome for entries in rows] == ["done", "failed", "done"]
    assert "No space left" in rows[1][-1].reason


def scopes_of(entries: list[Entry], outcome: str) -> list[str]:
    return [e.scope.rpartition("/")[2] for e in entries if e.outcome == outcome]


def test_a_failure_names_the_kinds_that_were_not_written(
    dataset: Dataset, small: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a kind that lacks nothing no later line would say that the slide is done."""

    def full(dataset, run_id, final, write):
        if "tokens" in str(final):
            raise UserError(f"cannot write {final}: No space left on device")
        return commit_file(dataset, run_id, final, write)

    config = CacheConfig("h0-mini", tokens="float16")
    work = {range(1): ("cls",), range(2, 3): ("tokens-float16",)}
    given = [arguments(dataset, "c", small, config, work)]
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "commit_file", full)
        (first,) = cache_bundle(given)
    assert [e.outcome for e in first] == ["done", "failed"]
    assert scopes_of(first, "failed") == ["tokens-float16"]
    (second,) = cache_bundle(
        [arguments(dataset, "c", small, config, {range(2, 3): work[range(2, 3)]})]
    )
    for kind in config.kinds:
        stood = current_entries([*first, *second], config.scope(PX, kind))["c"]
        assert [e.outcome for e in stood] == ["done"]


def test_weights_that_changed_fail_every_scope_that_lacks_something(
    dataset: Dataset, small: Encoder
) -> None:
    config = CacheConfig("h0-mini", tokens="float16")
    (work,) = arguments(dataset, "a", small, config)
    changed = dataclasses.replace(work, weights_sha256="another sum")
    (entries,) = cache_bundle([(changed,)])
    assert scopes_of(entries, "failed") == ["cls", "tokens-float16"]


def test_tokens_can_be_added_later(dataset: Dataset, small: Encoder) -> None:
    compute(dataset, small, CacheConfig("h0-mini", tokens="none"), ("a",))
    cls = dataset.features_dir(PX, "h0-mini") / "cls" / f"a.0-{ROWS}.parquet"
    before = cls.stat().st_mtime_ns
    config = CacheConfig("h0-mini", tokens="int8")
    only = arguments(dataset, "a", small, config, {range(3): ("tokens-int8",)})
    ((entry,),) = cache_bundle([only])
    assert entry.scope == f"{PX}/h0-mini/tokens-int8"
    assert cls.stat().st_mtime_ns == before


def test_several_runs_of_blocks_make_a_file_each(dataset: Dataset, small: Encoder) -> None:
    config = CacheConfig("h0-mini", tokens="float16")
    work = {range(2, 3): ("cls", "tokens-float16"), range(1): ("cls",)}
    (entries,) = cache_bundle([arguments(dataset, "c", small, config, work)])
    spans = [(entry.scope.rpartition("/")[2], entry.start, entry.stop) for entry in entries]
    assert spans == [("cls", 0, 16), ("cls", 32, 40), ("tokens-float16", 32, 40)]


class Hungry:
    """The encoder on a device with room for eight tiles."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self.device = encoder, encoder.device

    def encode(self, images, *, tokens):
        if len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._encoder.encode(images, tokens=tokens)


def test_out_of_memory_halves_the_batch_and_says_so(dataset: Dataset, small: Encoder) -> None:
    notes: list[str] = []
    forward = Forward(Hungry(small), 32, "float16", notes.append)  # type: ignore[arg-type]
    tiles = tiles_of(dataset, "a")
    features = forward(tiles, tokens=True, slide_id="a", first_rank=0)()
    direct = small.encode(tiles)
    assert forward.batch == 8
    assert np.abs(features.cls - direct.cls.numpy()).max() < 1e-5
    assert [note.rpartition(" ")[2] for note in notes] == ["16", "8"]


def test_memory_that_holds_no_tile_is_one_line(dataset: Dataset, small: Encoder) -> None:
    class Full(Hungry):
        def encode(self, images, *, tokens):
            raise torch.OutOfMemoryError("CUDA out of memory")

    forward = Forward(Full(small), 4, "none", lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="out of memory on cpu with a single tile"):
        forward(tiles_of(dataset, "a")[:4], tokens=False, slide_id="a", first_rank=0)


def test_features_that_are_not_finite_fail_the_slide(dataset: Dataset, small: Encoder) -> None:
    with torch.no_grad():
        small.network.norm.weight[0] = torch.nan
    rows = compute(dataset, small, CacheConfig("h0-mini", tokens="float16"), ("a",))
    assert rows[0][-1].outcome == "failed"
    assert "the value nan for rank 0 of slide a, expected finite numbers" in rows[0][-1].reason


@pytest.mark.parametrize("tokens", ["none", "float16", "int8"])
def test_one_tile_without_features_is_named(
    dataset: Dataset, small: Encoder, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tiles_of(dataset, "b")[37]
    encode = small.encode

    def encode_but_one(images, *, tokens=True):
        output = encode(images, tokens=tokens)
        is_bad = torch.tensor([bool((image == bad).all()) for image in np.asarray(images)])
        # In the tokens alone, where there are any.
        (output.cls if output.tokens is None else output.tokens)[is_bad] = 20_000.0
        return output

    monkeypatch.setattr(small, "encode", encode_but_one)
    rows = compute(dataset, small, CacheConfig("h0-mini", tokens=tokens, batch=16))
    ended = {entry.slide_id: entry for entries in rows for entry in entries}
    assert [ended[slide].outcome for slide in SLIDES] == ["done", "failed", "done"]
    assert "the value 20000 for rank 37 of slide b, expected" in ended["b"].reason


def test_encoders_without_patch_tokens_store_none() -> None:
    assert CacheConfig("h0-mini").resolve_tokens().tokens == "float16"
    assert "uni" not in encoders.ENCODERS or CacheConfig("uni").resolve_tokens().tokens == "none"


@pytest.mark.parametrize("kind", ["cls", "tokens-float16", "tokens-int8"])
def test_planned_bytes_are_those_on_disk(dataset: Dataset, small: Encoder, kind: str) -> None:
    tokens = "none" if kind == "cls" else kind.removeprefix("tokens-")
    rows = compute(dataset, small, CacheConfig("h0-mini", tokens=tokens))
    sizes = [e.files[0].bytes for entries in rows for e in entries if e.scope.endswith(kind)]
    planned = stored_bytes(kind, 3 * ROWS, 3, 24, (4, 24))
    bare = 3 * ROWS * bytes_per_tile(kind, 24, (4, 24))
    assert bare <= sum(sizes)
    assert abs(planned - sum(sizes)) < 3 * 4000, "overhead is a few kB a file"


def test_the_rate_is_that_of_the_journal() -> None:
    def entry(seconds: float, stop: int, scope: str = "s") -> Entry:
        return Entry("a", "done", "f", scope=scope, start=0, stop=stop, seconds=seconds)

    rate = journal_rate([entry(2, 32), entry(6, 64), entry(1, 900, "other")], "s")
    assert rate is not None
    assert rate.tiles_per_s == 12
    assert journal_rate([], "s") is None


def test_lost_features_hide_none_that_hold_their_blocks_since(dataset: Dataset) -> None:
    """A lost file [16, 40) must not be read in place of [0, 40), which was written for it."""
    config, scope = CacheConfig("h0-mini", tokens="none", tile_px=PX), f"{PX}/h0-mini/cls"
    ranks = {"a": np.arange(ROWS, dtype=np.int32)}
    write_selection(dataset, "run", make_selection("all", ranks, {}))
    stage = CacheStage(dataset, config, EngineConfig(1))
    (slide,) = stage.list_items()
    mark = stage.item_fingerprint(slide)

    def missing() -> Missing:
        return stage.find_missing(slide, mark, Ledger.read(dataset, "cache"))

    gone = (FileRecord("features/28/h0-mini/cls/a.16-40.parquet", 1, "0"),)
    lost = Entry("a", "done", mark, scope=scope, start=16, stop=40, files=gone)
    with Run(dataset, "cache", {}) as run:
        run.append([lost])
        assert missing().spans == {range(3): (scope,)}
        assert [(line.outcome, line.start) for line in missing().withdrawn] == [("pruned", 16)]
        folder, cls = dataset.features_dir(PX, "h0-mini") / "cls", np.ones((ROWS, 24), np.float32)
        commit_json(dataset, run.run_id, folder / "encoder.json", {"encoder": "h0-mini"})
        write = partial(_write_table, cls_table(0, cls))
        record = commit_file(dataset, run.run_id, folder / "a.0-40.parquet", write)
        run.append([replace(lost, start=0, files=(record,))])
        with pytest.raises(UserError):
            FeatureStore(dataset, tile_px=PX, encoder="h0-mini").read("a", [20])
        assert not missing()
        run.append(list(missing().withdrawn))
    assert FeatureStore(dataset, tile_px=PX, encoder="h0-mini").read("a", [20]).shape == (1, 24)
    assert missing() == Missing()


def run_cache(dataset: Dataset, encoder: Encoder, config: CacheConfig) -> dict[str, Entry]:
    """What the stage refuses and makes, without its workers; the last entry of each slide."""
    stage = CacheStage(dataset, config, EngineConfig(1))
    stage.weights_sha256 = encoder.weights_sha256
    ledger, entries = Ledger.read(dataset, "cache"), []
    for item in stage.list_items():
        mark = stage.item_fingerprint(item)
        if refusal := stage.reason_to_refuse(item, mark, ledger):
            entries.append(Entry(item.slide_id, refusal[0], mark, refusal[1]))
        elif missing := stage.find_missing(item, mark, ledger):
            task = stage.make_task(item, mark, missing, "run")
            entries += [one for row in cache_bundle([task.arguments]) for one in row]
    with Run(dataset, "cache", {}) as run:
        run.append(entries)
    for kind in config.kinds:
        path = config.file(dataset, PX, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"weights_sha256": "w", "view": ""}')
    return {entry.slide_id: entry for entry in entries}


def remake_tiles(dataset: Dataset, slide: str, mark: str, tissue: str, seed: int = 1) -> None:
    """The tiles of a slide again, of other candidates: other pixels, under names and of sizes
    that are the same."""
    tiles = np.random.default_rng(seed).integers(0, 255, (ROWS, PX, PX, 3), np.uint8)
    path, index = dataset.tiles_dir(PX) / f"{slide}.0-{ROWS}.tar", bytearray()

    def write(file):
        index.extend(write_tar(file, slide, 0, map(encode_png, tiles)))

    with Run(dataset, "tile", {}) as run:
        tar = commit_file(dataset, run.run_id, path, write)
        idx = commit_bytes(dataset, run.run_id, path.with_suffix(".idx"), bytes(index))
        entry = Entry(slide, "done", mark, scope=str(PX), start=0, stop=ROWS, files=(tar, idx),
                      values={"tissue": tissue})  # fmt: skip
        run.append([with_first_crc(dataset, entry)])


def test_stale_tiles_and_features_are_refused_slide_by_slide(
    dataset: Dataset, small: Encoder
) -> None:
    config = CacheConfig("h0-mini", tokens="int8", tile_px=PX)
    write_selection(dataset, "run", make_selection("all", dict.fromkeys("ab", np.arange(ROWS)), {}))
    with Run(dataset, "tissue", {}) as run:
        run.append([Entry(slide, "done", "first") for slide in "ab"])
    remake_tiles(dataset, "a", "m1", "first")
    assert {e.outcome for e in run_cache(dataset, small, config).values()} == {"done"}

    def read(slide: str, kind: str = "cls") -> np.ndarray:
        store = FeatureStore(dataset, tile_px=PX, encoder="h0-mini", kind=kind)
        return store.read(slide, range(ROWS))

    before = read("a")
    with Run(dataset, "tissue", {}) as run:
        run.append([Entry("a", "done", "second")])
    for kind in config.kinds:
        with pytest.raises(UserError, match=r"slide a: .*from other candidates.* `cache` again"):
            read("a", kind)
        read("b", kind)
    failed = run_cache(dataset, small, CacheConfig("h0-mini", tokens="float16", tile_px=PX))
    assert failed["a"].outcome == "failed"
    assert "run `python -m pipeline tile" in failed["a"].reason
    assert failed["b"].outcome == "done"
    remake_tiles(dataset, "a", "m2", "second")
    with pytest.raises(UserError, match="slide a: its cls features of h0-mini were made from oth"):
        read("a")
    assert run_cache(dataset, small, config)["a"].outcome == "done"
    assert read("a").shape == before.shape


def test_files_made_again_are_not_mixed_with_those_of_the_ledger(
    dataset: Dataset, small: Encoder
) -> None:
    """A reader opened the ledger; then tiles and features were made again under their names."""
    config = CacheConfig("h0-mini", tokens="float16", tile_px=PX)
    write_selection(dataset, "run", make_selection("all", {"a": np.arange(ROWS)}, {}))
    remake_tiles(dataset, "a", "m1", "x", seed=2)
    run_cache(dataset, small, config)
    tiles = TileStore(dataset, PX)
    stores = [FeatureStore(dataset, tile_px=PX, encoder="h0-mini", kind=k) for k in config.kinds]
    for store in stores:
        store.read("a", [0])
    stage = CacheStage(dataset, config, EngineConfig(1))
    stage.weights_sha256 = small.weights_sha256
    (item,) = stage.list_items()
    remake_tiles(dataset, "a", "m2", "x")
    with pytest.raises(UserError, match="is not the file that the journal named"):
        tiles.read("a", [0])
    # A worker that begins now reads the new ledger, and was given those of the former tiles.
    work = stage.make_task(item, "mark", Missing({range(3): stage.scopes}), "run").arguments
    (entries,) = cache_bundle([work])
    assert {e.outcome for e in entries} == {"failed"}
    assert "tiles were made again while `cache` ran" in entries[0].reason
    assert run_cache(dataset, small, config)["a"].outcome == "done"
    for store in stores:
        store._open.clear()  # as where many others were opened since
        with pytest.raises(UserError, match="its features were made again meanwhile"):
            store.read("a", [0])
