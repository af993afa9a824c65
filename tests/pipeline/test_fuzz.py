"""Readers of files that others may have written: damaged bytes are one `UserError`, or read right.

Nothing else comes out: no crash, no traceback of a library, no endless loop, no other tile. Each
example must end within two seconds.
"""

import json
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.plain_yaml import load_yaml
from pipeline.dataset import (
    Dataset,
    Entry,
    TileStore,
    commit_file,
    encode_png,
    make_selection,
    read_candidates,
    read_journal,
    read_selection,
    read_slides,
    write_selection,
    write_tar,
)
from pipeline.dataset.features import cls_table, open_writer, token_table, write_blocks
from pipeline.dataset.features.parquet import FeatureShard
from pipeline.dataset.identity import read_identity
from pipeline.dataset.journal import decode_line, encode_line
from pipeline.dataset.layout import parse_shard_name
from pipeline.dataset.ledger import current_entries
from pipeline.dataset.tiles.png_tar import TarShard
from pipeline.dataset.tiles.zarr_shard import ZarrShard, commit_zarr, encode_chunk
from pipeline.imports.config import Columns
from pipeline.imports.geojson import features_mask, read_features
from pipeline.imports.masks import read_png_mask
from pipeline.imports.table import read_positions
from pipeline.imports.tile_folder import find_tile_folders
from pipeline.recipe.steps import load_recipe
from pipeline.run.cluster import load_cluster
from pipeline.selection.cohort_table import read_cohort_csv
from pipeline.selection.labels import read_labels
from pipeline.slides.entries import find_slides
from train.config import load_config

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
PX, RANKS = 8, 20


@contextmanager
def within(seconds: float = 2.0) -> Iterator[None]:
    """Raise where what is inside does not end."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused_or_read(read: Callable[[], object]) -> object:
    """What was read, or None where it was refused in one line."""
    said = ""
    with within():
        try:
            return read()
        except UserError as error:
            said = str(error)
    assert "\n" not in said, f"more than a line: {said}"
    assert 0 < len(said) < 2000
    return None


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Ways to damage bytes: flips, cuts, insertions, and numbers that are far too large."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "large", "swap"]))
    where, much = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=16))
    bits = draw(st.integers(1, 255))

    def damage(data: bytes) -> bytes:
        at = int(where * len(data))
        if kind == "cut":
            return data[:at]
        if kind == "insert":
            return data[:at] + much + data[at:]
        if kind == "large":
            return data[:at] + b"\xff" * len(much) + data[at + len(much) :]
        if kind == "swap":
            return data[at:] + data[:at]
        return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :] if data else much

    return damage


DAMAGES = st.lists(damages(), min_size=1, max_size=3)


def damaged(data: bytes, ways: list[Callable[[bytes], bytes]]) -> bytes:
    for way in ways:
        data = way(data)
    return data


def tile(rank: int) -> np.ndarray:
    return np.full((PX, PX, 3), rank * 7 % 256, np.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar, a Zarr array, feature files and tables, small and whole."""
    root = tmp_path_factory.mktemp("shards")
    dataset = Dataset(root)
    index: list[bytes] = []
    name = f"s.0-{RANKS}"
    commit_file(dataset, "r", root / f"{name}.tar", lambda file: index.append(
        write_tar(file, "s", 0, [encode_png(tile(rank)) for rank in range(RANKS)])))  # fmt: skip
    (root / f"{name}.idx").write_bytes(index[0])
    chunks = [encode_chunk(tile(rank)) for rank in range(RANKS)]
    commit_zarr(dataset, "r", root / f"{name}.zarr", PX, chunks)
    for kind, table in {
        "cls": cls_table(0, np.arange(RANKS * 4, dtype=np.float32).reshape(RANKS, 4)),
        "tokens": token_table(np.ones((RANKS, 2, 3), np.float16)),
        "int8": token_table(np.ones((RANKS, 2, 3), np.int8), np.ones((RANKS, 2), np.float16)),
    }.items():
        (root / kind).mkdir()

        def write(file: object, table: pa.Table = table) -> None:
            with open_writer(file, table.schema) as writer:  # type: ignore[arg-type]
                write_blocks(writer, table)

        commit_file(dataset, "r", root / kind / f"{name}.parquet", write)
    chosen = {"s": np.arange(40, dtype=np.int32), "t": np.arange(7, dtype=np.int32)}
    write_selection(dataset, "r", make_selection("x", chosen, {"plan": 1}))
    return root


def read_tar(path: Path) -> dict[int, np.ndarray]:
    from pipeline.dataset.tiles.png_tar import decode_png

    shard, found = TarShard.open(path), {}
    for block in range(2):
        for rank, data in shard.read_block(block).items():
            try:
                found[rank] = decode_png(data, PX)
            except ValueError as error:
                raise UserError(f"tile {rank}: {error}".replace("\n", " ")) from error
    return found


def read_zarr(path: Path) -> dict[int, np.ndarray]:
    from pipeline.dataset.tiles.zarr_shard import decode_chunk

    shard, found = ZarrShard.open(path), {}
    for block in range(2):
        for rank, data in shard.read_block(block).items():
            try:
                found[rank] = decode_chunk(data, PX)
            except ValueError as error:
                raise UserError(f"tile {rank}: {error}".replace("\n", " ")) from error
    return found


@FEW
@given(ways=DAMAGES, which=st.sampled_from(["tar", "idx"]))
def test_damaged_tars(shards: Path, tmp_path_factory: pytest.TempPathFactory, ways, which) -> None:
    folder = tmp_path_factory.mktemp("tar")
    name = f"s.0-{RANKS}"
    for kind in ("tar", "idx"):
        data = (shards / f"{name}.{kind}").read_bytes()
        (folder / f"{name}.{kind}").write_bytes(damaged(data, ways) if kind == which else data)
    found = refused_or_read(lambda: read_tar(folder / f"{name}.tar"))
    assert found is None or sorted(found) == list(range(RANKS))
    shutil.rmtree(folder)


@FEW
@given(ways=DAMAGES)
def test_damaged_zarr_arrays(shards: Path, tmp_path_factory: pytest.TempPathFactory, ways) -> None:
    folder = tmp_path_factory.mktemp("zarr")
    path = folder / f"s.0-{RANKS}.zarr"
    shutil.copytree(shards / path.name, path)
    body = path / "c" / "0" / "0" / "0" / "0"
    body.write_bytes(damaged(body.read_bytes(), ways))
    found = refused_or_read(lambda: read_zarr(path))
    # A chunk's CRC-32 is its own: what is read is right.
    assert found is None or all((found[rank] == tile(rank)).all() for rank in range(RANKS))
    shutil.rmtree(folder)


@FEW
@given(ways=DAMAGES, kind=st.sampled_from(["cls", "tokens", "int8"]))
def test_damaged_features(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, ways, kind
) -> None:
    folder = tmp_path_factory.mktemp("features")
    path = folder / f"s.0-{RANKS}.parquet"
    path.write_bytes(damaged((shards / kind / path.name).read_bytes(), ways))

    def read() -> list[tuple[int, ...]]:
        shard = FeatureShard(path)
        return [shard.read_block(block).shape for block in range(2)]

    refused_or_read(read)
    shutil.rmtree(folder)


@FEW
@given(ways=DAMAGES)
def test_damaged_selections(shards: Path, tmp_path_factory: pytest.TempPathFactory, ways) -> None:
    dataset = Dataset(tmp_path_factory.mktemp("tables"))
    path = dataset.selection_file("x")
    path.parent.mkdir()
    path.write_bytes(damaged((shards / "selections" / "x.parquet").read_bytes(), ways))
    refused_or_read(lambda: read_selection(dataset, "x"))
    shutil.rmtree(dataset.root)


@FEW
@given(ways=DAMAGES, name=st.sampled_from(["slides", "candidates", "identity"]))
def test_damaged_tables(
    tiled: Dataset, tmp_path_factory: pytest.TempPathFactory, ways, name
) -> None:
    dataset = Dataset(tmp_path_factory.mktemp("tables"))
    slide = "CMU-1-Small-Region"
    files = {
        "slides": (tiled.slides_file, dataset.slides_file),
        "candidates": (tiled.candidates_file(slide), dataset.candidates_file(slide)),
        "identity": (tiled.identity_file, dataset.identity_file),
    }
    source, target = files[name]
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(damaged(source.read_bytes(), ways))
    reads = {
        "slides": lambda: read_slides(dataset),
        "candidates": lambda: read_candidates(dataset, slide),
        "identity": lambda: read_identity(dataset),
    }
    refused_or_read(reads[name])
    shutil.rmtree(dataset.root)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=8),
    st.lists(st.integers(0, 3), max_size=2),
)  # fmt: skip
COLUMNS = ["slide_id", "path", "levels", "mpp", "rank", "status", "bytes"]


@FEW
@given(table=st.dictionaries(st.sampled_from(COLUMNS), st.lists(VALUES, min_size=2, max_size=2)))
def test_tables_of_other_columns(tmp_path_factory: pytest.TempPathFactory, table) -> None:
    """Sound Parquet with columns of other names and types than ours."""
    dataset = Dataset(tmp_path_factory.mktemp("tables"))
    columns = {}
    for name, values in table.items():
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):
            columns[name] = pa.array([str(value) for value in values])
    for path in (dataset.slides_file, dataset.selection_file("x")):
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path)
    refused_or_read(lambda: read_slides(dataset))
    refused_or_read(lambda: read_selection(dataset, "x"))
    shutil.rmtree(dataset.root)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda below: st.lists(below, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["type", "features", "geometry", "coordinates", "properties", "classification", "name"]
        ),
        below, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
LINE = json.loads(encode_line(Entry("s", "done", "f", files=()), {}))


@FEW
@given(st.dictionaries(st.sampled_from([*LINE, "other"]), JSON), st.text(max_size=40))
def test_any_journal_line_is_an_entry_or_none(values: dict, text: str) -> None:
    with within():
        decode_line(text)
        record = {key: value for key, value in {**LINE, **values}.items() if key != "crc"}
        line = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        record["crc"] = f"{zlib.crc32(line.encode(errors='surrogatepass')):08x}"
        entry = decode_line(json.dumps(record))
        if entry is not None:
            current_entries([entry])


@FEW
@given(ways=DAMAGES)
def test_damaged_journals(tiled: Dataset, tmp_path_factory: pytest.TempPathFactory, ways) -> None:
    dataset = Dataset(tmp_path_factory.mktemp("journal"))
    folder = dataset.status_dir("tile")
    folder.mkdir(parents=True)
    source = next(tiled.status_dir("tile").glob("*.jsonl"))
    (folder / "a.jsonl").write_bytes(damaged(source.read_bytes(), ways))
    with within():
        read_journal(dataset, "tile")
    shutil.rmtree(dataset.root)


@FEW
@given(JSON)
@example({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[1e300, 0]]]}})
@example({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[float("nan"), 0]]]}})
@example({"features": [{"properties": {"classification": "tissue"}, "geometry": 3}]})
@example({"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9]], []]}})
def test_any_geojson(tmp_path_factory: pytest.TempPathFactory, document: object) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.geojson"
    path.write_text(json.dumps(document))
    read = lambda: features_mask(read_features(path), (16, 16), 4.0, {})  # noqa: E731
    mask = refused_or_read(read)
    assert mask is None or mask.shape == (16, 16)


@pytest.mark.parametrize("text", ["[" * 50_000, '{"features":' * 20_000, "NaN", "", "\0"])
def test_deep_geojson(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep.geojson"
    path.write_text(text)
    with pytest.raises(UserError):
        read_features(path)


@FEW
@given(ways=DAMAGES)
def test_damaged_mask_pictures(
    tiled: Dataset, tmp_path_factory: pytest.TempPathFactory, ways
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-mask.png"
    path.write_bytes(damaged(tiled.mask_file("CMU-1-Small-Region").read_bytes(), ways))
    refused_or_read(lambda: read_png_mask(path, (64, 48), 4.0, (48 * 4, 64 * 4)))


CELL = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ["", "a.svs", "../../x.svs", "-rf", "nan", "1e999", "²", "12", "NA", '"', "TCGA-02-0001"]
)
HEADS = st.lists(
    st.sampled_from(
        ["path", "slide_id", "mpp", "bytes", "id", "filename", "md5", "size", "x", "y", "rank",
         "label", "candidates", "size_bytes", "slide", ""]
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@FEW
@given(head=HEADS, rows=st.lists(st.lists(CELL, max_size=6), max_size=3), ways=st.lists(damages()))
def test_any_csv(tmp_path_factory: pytest.TempPathFactory, head, rows, ways) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    text = "\n".join(",".join(cells) for cells in [head, *rows])
    path.write_bytes(damaged(text.encode(errors="replace"), ways[:1]))
    refused_or_read(lambda: find_slides([str(path)]))
    refused_or_read(lambda: find_tile_folders(path))
    refused_or_read(lambda: read_labels(path, {"a": 3}))
    refused_or_read(lambda: read_cohort_csv(path, 1000))
    refused_or_read(lambda: read_positions(path, Columns()))


YAML = st.text(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["dataset", "steps", "scan", "slides", "train", "run", "data", "model", "queue",
             "stages", "tile", "cores", "walltime", "steps", "sit", "batch_size"]
        ),
        below, max_size=4,
    ),
    max_leaves=10,
).map(json.dumps)  # fmt: skip
BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


@FEW
@given(YAML)
@example(BOMB)
@example("run: " + "[" * 20_000)
@example("run: 2001-99-99")
@example("? [1, 2]\n: 3")
@example("run: {steps: 1e999}")
@example("model: {vae: {channel_multipliers: [1, -1]}}")
@example("!!python/object/apply:os.system ['touch x']")
@example("run: !!python/name:os.system")
@example("1: 2\ntrue: 3")
@example("a: \0")
def test_any_configuration(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    refused_or_read(lambda: load_config(path, []))
    refused_or_read(lambda: load_cluster(path, "tile"))
    refused_or_read(lambda: load_recipe(path))


@FEW
@given(st.text(max_size=40))
def test_any_override(text: str) -> None:
    refused_or_read(lambda: load_config(None, [f"run.steps={text}"]))
    refused_or_read(lambda: load_config(None, [text]))


def test_yaml_is_read_as_ever_but_for_what_swells_or_loops() -> None:
    assert load_yaml("a: {b: [1, 2.5, yes, ~, 'x']}") == {"a": {"b": [1, 2.5, True, None, "x"]}}
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    assert load_yaml("") is None
    with pytest.raises(ValueError, match="aliases"):
        load_yaml(BOMB)
    with pytest.raises(ValueError, match="contains it"):
        load_yaml("a: &x [*x]")


@FEW
@given(st.text(max_size=60))
def test_any_shard_name(name: str) -> None:
    shard = refused_or_read(lambda: parse_shard_name(name))
    if shard is not None:
        refused_or_read(lambda: str(shard))


def test_a_tile_of_another_size_is_not_decoded(own_tiled: Dataset) -> None:
    """A PNG that states 60,000 x 60,000 pixels would ask for 10 GB."""
    store = TileStore(own_tiled, 224)
    (slide,) = store.slide_ids()
    data = bytearray(store.read_block_bytes(slide, 0)[0])
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    with within(), pytest.raises(UserError, match=r"60000.*expected 224x224"):
        store.decode_tile(slide, 0, bytes(data))
