"""Reading features by (slide, rank), and what they were made with."""

import shlex
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.json_text import read_json
from common.text import one_line
from pipeline.dataset.features.parquet import FeatureShard
from pipeline.dataset.features.ranges import MOST_FEATURE, find_outside
from pipeline.dataset.features.record import FeatureRecord
from pipeline.dataset.journal import Entry
from pipeline.dataset.layout import BLOCK_ROWS, Dataset
from pipeline.dataset.ledger import Ledger
from pipeline.dataset.lineage import FIRST_CRC, Lineage
from pipeline.dataset.tables.selections import Selection

if TYPE_CHECKING:
    from torch import Tensor

_OPEN_FILES = 128


def feature_scope(tile_px: int, encoder: str, view: str, kind: str) -> str:
    """The journal scope of a kind of features, e.g. `224/h0-mini+jpeg70/cls`; 224 is in px."""
    return f"{tile_px}/{encoder}{'+' + view if view else ''}/{kind}"


def encoder_file(dataset: Dataset, tile_px: int, encoder: str, view: str, kind: str) -> Path:
    """encoder.json of a kind: what the features were computed with."""
    return dataset.features_dir(tile_px, encoder, view) / kind / "encoder.json"


def read_encoder_record(
    dataset: Dataset,
    *,
    tile_px: int,
    encoder: str,
    kind: str = "cls",
    view: str = "",
    selection: str = "",
) -> dict[str, Any]:
    """The encoder.json of cached features (weights, weights_sha256, random_weights, dtype, ...).

    `tile_px` is the tile side in px; `selection` is whose features are wanted, for the command
    that an error names.
    """
    path = encoder_file(dataset, tile_px, encoder, view, kind)
    try:
        return {"tile_px": tile_px} | _check_record(read_json(path))
    except FileNotFoundError as error:
        raise UserError(_missing_message(dataset, encoder, kind, view, selection)) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not an encoder's record in JSON: {one_line(error)}; remove it and run "
            "`cache` again"
        ) from error


_RECORD_TYPES: dict[str, type | tuple[type, ...]] = {
    "encoder": str, "weights": str, "weights_sha256": (str, type(None)),
    "random_weights": (bool, type(None)), "dim": int, "tile_px": int, "view": (str, type(None)),
    "tokens_shape": (list, type(None)), "compute_dtype": (str, type(None)),
}  # fmt: skip


def _check_record(record: object) -> dict[str, Any]:
    """The record, whose keys that readers rely on have their types; raises `ValueError`."""
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    for key, kinds in _RECORD_TYPES.items():
        if key in record and not isinstance(record[key], kinds):
            raise ValueError(f"{key} is {one_line(repr(record[key]), 60)}")
    for key in ("dim", "tile_px"):
        if key in record and not 0 < record[key] < 1 << 20:
            raise ValueError(f"{key} is {record[key]}")
    return record


def require_fields(store: "FeatureStore", *names: str) -> None:
    """Refuse features whose encoder.json does not state these fields, which it may lack."""
    if missing := [name for name in names if store.record.get(name) is None]:
        raise UserError(
            f"encoder.json of the {store.kind} features of {store.encoder} in "
            f"{store.dataset.root} has no {', '.join(missing)}: cache them again"
        )


def refuse_other_features(
    path: Path,
    written: Mapping[str, object],
    wanted: Mapping[str, object],
    *,
    remedy: str = "use the former or another --dataset",
) -> None:
    """Refuse features that were made with other values than are wanted, with both of them.

    Fields of `FeatureRecord` count, where both sides know them; `remedy` is what to do.
    """
    made, asked = FeatureRecord.parse(written), FeatureRecord.parse(wanted)
    for key, value, other in made.differs_from(asked):
        raise UserError(
            f"{path}: these features were made with {key} {value!r}, {other!r} was asked for; "
            f"{remedy}"
        )


def _missing_message(dataset: Dataset, encoder: str, kind: str, view: str, selection: str) -> str:
    chosen = f" --selection {selection}" if selection else ""
    seen = f" under view {view}" if view else ""
    return (
        f"no {kind} features of {encoder}{seen} in {dataset.root}; make them with "
        f"`python -m pipeline cache --dataset {shlex.quote(str(dataset.root))} "
        f"--encoder {encoder}{chosen}`"
    )


class FeatureStore:
    """Random access to one kind of features. Safe to share between threads.

    `kind` is `cls` (float32 [d]), `tokens-float16` or `tokens-int8` (both float16 [t, d] when
    read). `expect` names values that encoder.json must have, such as weights_sha256 or
    compute_dtype: features made otherwise are refused with both values; those of former tiles are
    refused slide by slide (see `Lineage`). `selection` is whose
    features are wanted: the `cache` command in messages names it.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        tile_px: int,
        encoder: str,
        kind: str = "cls",
        view: str = "",
        expect: Mapping[str, object] | None = None,
        selection: str = "",
    ) -> None:
        self.dataset, self.encoder, self.kind, self.view = dataset, encoder, kind, view
        self._selection = selection
        self.record = read_encoder_record(
            dataset, tile_px=tile_px, encoder=encoder, kind=kind, view=view, selection=selection
        )
        # The view too is in the record: a folder that was renamed is found out.
        refuse_other_features(
            encoder_file(dataset, tile_px, encoder, view, kind), self.record,
            {"view": view} | dict(expect or {}),
        )  # fmt: skip
        scope = feature_scope(tile_px, encoder, view, kind)
        self._ledger = Ledger.read(dataset, "cache")[scope]
        self._lineage = Lineage(dataset, tile_px)
        self._checked: set[str] = set()
        self._open: OrderedDict[str, FeatureShard] = OrderedDict()
        self._lock = threading.Lock()

    def fingerprint_of(self, slide_id: str) -> str:
        """The fingerprint of the slide's features, '' where it has none."""
        entry = self._ledger.latest(slide_id)
        return entry.fingerprint if entry else ""

    def read_block(self, slide_id: str, block: int) -> npt.NDArray[np.floating]:
        """Features of a block, [rows, ...]; row i is rank 16 * block + i."""
        return self._shard_of_block(slide_id, block).read_block(block)

    def block_tensor(self, slide_id: str, block: int) -> "Tensor":
        """`read_block` as a torch tensor [rows, ...] of the same memory, not to be written to."""
        import torch

        with warnings.catch_warnings():
            # torch warns of arrays that are read-only, as pages are.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.read_block(slide_id, block))

    def read(self, slide_id: str, ranks: Iterable[int]) -> npt.NDArray[np.floating]:
        """Features [n, ...] in the order of `ranks`; each block is read once.

        Raises `UserError` naming slide and rank where a tile's features are no encoder's.
        """
        wanted = np.fromiter((int(rank) for rank in ranks), np.int64)
        features = self._read_unchecked(slide_id, wanted)
        self.check_rows(slide_id, wanted, features)
        return features

    def check_rows(
        self, slide_id: str, ranks: npt.NDArray[np.integer], features: npt.NDArray[np.floating]
    ) -> None:
        """Refuse features [n, ...] of these ranks int [n] that are no encoder's.

        Raises `UserError` naming slide, rank, encoder and file.
        """
        if (found := find_outside(features)) is None:
            return
        row, value = found
        rank = int(ranks[row])
        raise UserError(
            f"slide {slide_id}, rank {rank}: its {self.kind} features of {self.encoder} have the "
            f"value {value:g}, expected finite numbers of magnitude up to {MOST_FEATURE:,.0f}; "
            f"remove {self.dataset.root / self.file_of(slide_id, rank)} and run "
            "`python -m pipeline cache` again"
        )

    def _read_unchecked(
        self, slide_id: str, wanted: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.floating]:
        if len(wanted) and wanted.min() < 0:
            raise UserError(f"slide {slide_id}: rank {wanted.min()}, expected ranks from 0")
        # A block is the unit of reading and checking: several of its ranks cost one read.
        needed = np.unique(wanted // BLOCK_ROWS)
        blocks = {int(b): self.read_block(slide_id, int(b)) for b in needed}
        return np.stack([blocks[int(r) // BLOCK_ROWS][int(r) % BLOCK_ROWS] for r in wanted])

    def read_selection(self, selection: Selection) -> npt.NDArray[np.floating]:
        """Features [n, ...] of all n rows of a selection, in its order (slide_id, rank).

        Values are not checked: `find_faults` of the measuring side names all rows that are no
        encoder's, and measures what does not need them.
        """
        if selection.rows == 0:
            raise UserError(f"selection '{selection.name}' of {self.dataset.root} has no rows")
        return np.concatenate(
            [
                self._read_unchecked(slide, ranks.astype(np.int64))
                for slide, ranks in selection.items()
            ]
        )

    def require_ranks(self, slide_id: str, ranks: npt.NDArray[np.integer]) -> None:
        """Raise `UserError`, with the `cache` command, where a rank of int [n] is missing.

        Also where the slide's features are of former tiles.
        """
        cached = np.zeros(len(ranks), bool)
        for entry in self._ledger.written.get(slide_id, ()):
            cached |= (entry.start <= ranks) & (ranks < entry.stop)
        if not cached.all():
            raise self._absent_error(slide_id, int(ranks[np.argmin(cached)]))
        self._check_lineage(slide_id)

    def file_of(self, slide_id: str, rank: int) -> str:
        """The file, relative to the dataset, that has a rank's features; "" where none has."""
        entry = self._ledger.file_of(slide_id, rank)
        return entry.files[0].path if entry else ""

    def _absent_error(self, slide_id: str, rank: int) -> UserError:
        missing = _missing_message(
            self.dataset, self.encoder, self.kind, self.view, self._selection
        )
        return UserError(f"slide {slide_id}, rank {rank}: {missing}")

    def _shard_of_block(self, slide_id: str, block: int) -> FeatureShard:
        rank = block * BLOCK_ROWS
        entry = self._ledger.file_of(slide_id, rank)
        if entry is None:
            raise self._absent_error(slide_id, rank)
        self._check_lineage(slide_id)
        return self._open_shard(entry)

    def _check_lineage(self, slide_id: str) -> None:
        if slide_id not in self._checked and slide_id in self._ledger.written:
            what = f"{self.kind} features of {self.encoder}"
            self._lineage.check_features(slide_id, self._ledger.written[slide_id], what)
            self._checked.add(slide_id)

    def _open_recorded(self, entry: Entry) -> FeatureShard:
        """Open a line's file, refusing another one that was written under its name since."""
        record = entry.files[0]
        path = self.dataset.root / record.path
        has_size = not path.is_file() or path.stat().st_size == record.bytes
        if has_size:
            shard = FeatureShard(path)
            stated, found = entry.values.get(FIRST_CRC), shard.first_crc
            if None in (stated, found) or stated == found:
                return shard
        raise UserError(
            f"{path} is not the file that the journal named when this command began (its "
            f"{'features are others' if has_size else 'size is another'}): its features were made "
            "again meanwhile, or it is damaged: start the command again; if it says so again, run "
            "`python -m pipeline verify --repair`, then `cache`"
        )

    def _open_shard(self, entry: Entry) -> FeatureShard:
        path = entry.files[0].path
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        # Without the lock, which would keep the other threads waiting for the disk.
        shard = self._open_recorded(entry)
        with self._lock:
            self._open[path] = shard
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return shard
