"""dataset.json: the identity that every stage must agree with, and records that never refuse."""

import copy
import json
import platform
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import json_bytes, read_regular
from common.json_text import parse_json
from common.terms import Terms, merge_terms, parse_terms, plain_terms
from common.text import one_line
from pipeline.dataset.commit import commit_bytes, new_run_id
from pipeline.dataset.inside import free_place
from pipeline.dataset.layout import Dataset
from pipeline.dataset.lock import hold_lock
from pipeline.dataset.tables.slides import read_slides

FORMAT_VERSION = 1


class DatasetKind(StrEnum):
    """What the tiles of a dataset are: cut from slides, brought as pictures, or made by a model."""

    UNKNOWN = ""
    SLIDES = "slides"
    IMPORTED_TILES = "imported tiles"
    GENERATED = "generated"


_KIND_WORDS = {
    DatasetKind.SLIDES: "tiles cut from slides",
    DatasetKind.IMPORTED_TILES: "imported tiles",
    DatasetKind.GENERATED: "generated images",
}


def software_versions(*packages: str) -> dict[str, str]:
    """Versions of this project, Python and the named packages ('absent' where not installed)."""
    found = {"python": platform.python_version()}
    for package in ("histogen", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def open_dataset(root: Path) -> Dataset:
    """The dataset at `root`; refuses a folder without one, or one of another major format."""
    dataset = Dataset(root)
    if not _is_there(dataset):
        if merge_copies(dataset):
            raise UserError(f"{dataset.identity_file} is missing: {way_back(dataset)}")
        raise UserError(
            f"no dataset at {root} (no dataset.json): run `python -m pipeline scan` first"
        )
    read_identity(dataset)
    return dataset


def read_identity(dataset: Dataset) -> dict[str, Any]:
    """The identity section; unknown keys are kept as they are."""
    return dict(_read_document(dataset).get("identity", {}))


def kind_of(identity: Mapping[str, object]) -> DatasetKind:
    """What the tiles of a dataset are, by its identity; `UNKNOWN` before its first stage.

    >>> kind_of({"grid": "adjacent"}).value, kind_of({"kind": "generated"}).value
    ('slides', 'generated')
    """
    # Read off the values of each kind's first stage: datasets of earlier releases have the same,
    # and one more value would be another identity to what was generated under their guidance.
    if identity.get("kind") == DatasetKind.GENERATED:
        return DatasetKind.GENERATED
    if "grid" not in identity:
        return DatasetKind.UNKNOWN
    is_imported = identity["grid"] == DatasetKind.IMPORTED_TILES
    return DatasetKind.IMPORTED_TILES if is_imported else DatasetKind.SLIDES


def refuse_other_kind(dataset: Dataset, kind: DatasetKind, stage: str) -> None:
    """Raise `UserError` where the folder is a dataset of another kind than `stage` writes."""
    identity = read_identity(dataset) if _is_there(dataset) else {}
    found = kind_of(identity) or _kind_of_slides(dataset)
    if found not in (DatasetKind.UNKNOWN, kind):
        raise UserError(
            f"{dataset.root} is a dataset of {_KIND_WORDS[found]} and `{stage}` makes "
            f"{_KIND_WORDS[kind]}: choose another folder"
        )


def _kind_of_slides(dataset: Dataset) -> DatasetKind:
    """The kind that slides.parquet shows: for what has no dataset.json, or one without a grid."""
    if not dataset.slides_file.exists():
        return DatasetKind.UNKNOWN
    slides = read_slides(dataset)
    is_generated = bool(slides) and all(s.reader == DatasetKind.GENERATED for s in slides)
    return DatasetKind.GENERATED if is_generated else DatasetKind.SLIDES


def mixed_kinds(identity: Mapping[str, object], slide_readers: Collection[str]) -> str:
    """Why a dataset is of two kinds, by its identity and its slides' readers; '' if it is not."""
    kind = kind_of(identity)
    if kind == DatasetKind.GENERATED and "grid" in identity:
        return "says both `generated` and how slides are cut: `generate` wrote over a real dataset"
    if kind and slide_readers:
        generated = sum(reader == DatasetKind.GENERATED for reader in slide_readers)
        if generated != (len(slide_readers) if kind == DatasetKind.GENERATED else 0):
            return (
                f"is of {_KIND_WORDS[kind]}, and {generated} of the {len(slide_readers)} slides in "
                "slides.parquet are generated"
            )
    return ""


def read_terms(dataset: Dataset, stage: str = "") -> tuple[Terms, ...]:
    """Under whose terms a dataset's tiles are, by what its stages (or one) recorded.

    Empty where nothing is recorded, and of a dataset that is not there yet.
    """
    records = _read_document(dataset)["records"] if _is_there(dataset) else {}
    return merge_terms(
        *(parse_terms(records[name].get("terms")) for name in sorted(records)
          if isinstance(records[name], dict) and stage in ("", name))
    )  # fmt: skip


def lineage_terms(
    datasets: Iterable[Dataset], encoders: Iterable[Mapping[str, object]]
) -> tuple[Terms, ...]:
    """The terms of datasets' tiles, then those of the features' encoder.json, each once."""
    return merge_terms(
        *map(read_terms, datasets), *(parse_terms(record.get("terms")) for record in encoders)
    )


def identity_damage(dataset: Dataset) -> str:
    """What is wrong with the bytes of dataset.json; "" where they are as they were written.

    A file without a checksum (made before there was one, or edited on purpose) is only read.
    """
    # The checksum covers the values; spaces and keys around them are compared byte by byte.
    try:
        document = _read_document(dataset)
        data = read_regular(dataset.identity_file)
    except (UserError, OSError) as error:
        return str(error)
    if set(document) == {"identity", "records"}:
        return ""
    if "crc" not in document or json_bytes(document) != data:
        return f"{dataset.identity_file} was altered outside its values: {way_back(dataset)}"
    return ""


def identity_value(dataset: Dataset, key: str) -> Any:
    """One identity value; a `UserError` names the key and stage order where it is missing."""
    identity = read_identity(dataset)
    if key not in identity:
        raise UserError(
            f"{dataset.identity_file} has no '{key}': an earlier stage has not run; "
            "stages run in the order scan, tissue, select, tile, cache"
        )
    return identity[key]


def claim_identity(
    dataset: Dataset,
    claims: Mapping[str, object],
    *,
    stage: str,
    versions: dict[str, str],
    kind: DatasetKind = DatasetKind.UNKNOWN,
    terms: Iterable[Terms] | None = None,
) -> dict[str, Any]:
    """Add a stage's identity values, or check them against the recorded ones.

    Where a stage makes one kind of dataset, `kind`, a dataset of another kind is refused.
    Another value than the recorded one is refused with both in the message. The stage's
    software versions and platform are recorded too; records have no time and no host name in them,
    so that two datasets made alike are alike in bytes. Each stage keeps a copy, `copy_file`.
    `terms` are those of what the stage brought, in place of what it stated before; None leaves
    those as they are.
    """
    if kind:
        refuse_other_kind(dataset, kind, stage)
    # As they are read back, or a tuple would differ from the list that was recorded.
    claims = json.loads(json.dumps(claims))
    record: dict[str, Any] = {"versions": versions, "platform": platform.platform()}
    if terms is not None:
        record["terms"] = plain_terms(terms)
    # Another run that makes the dataset writes its copy first: only under the lock is a missing
    # dataset.json one that was lost.
    before, after = (
        _with_claims(dataset, claims, stage, record) if _is_there(dataset) else (None, {})
    )
    if before != after:
        with hold_lock(dataset.staging_dir(f"{dataset.identity_file.name}.lock")):
            # What another run claimed in between counts, and is kept.
            if kind:
                refuse_other_kind(dataset, kind, stage)
            before, after = _with_claims(dataset, claims, stage, record)
            if before != after:
                # The copy first: once a stage goes on, its values are there twice.
                for file in (copy_file(dataset, stage), dataset.identity_file):
                    _commit_document(dataset, file, after)
    elif not _is_copied(dataset, claims, stage, after["records"][stage]):
        # A dataset of an older release. Where there is no room, the stage's own files come first.
        with suppress(UserError):
            _commit_document(dataset, copy_file(dataset, stage), after)
    return dict(after["identity"])


def copy_file(dataset: Dataset, stage: str) -> Path:
    """The copy of dataset.json as it was when a stage last claimed something.

    It is next to the stage's journals, where earlier releases read only `.jsonl` and `.log`.
    """
    return dataset.status_dir(stage) / dataset.identity_file.name


def list_copies(dataset: Dataset) -> list[Path]:
    """The stages' copies of dataset.json, by path."""
    return sorted((dataset.root / "status").glob(f"*/{dataset.identity_file.name}"))


def copy_damage(file: Path) -> str:
    """What is wrong with the bytes of a copy; "" where they are as they were written."""
    try:
        data = read_regular(file)
        document = _parse_document(data)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"is no copy of dataset.json: {error}"
    is_whole = "crc" in document and _is_sound(document) and json_bytes(document) == data
    return "" if is_whole else "was altered: its checksum does not match"


def merge_copies(dataset: Dataset) -> dict[str, Any] | None:
    """dataset.json as the stages' copies together have it; None where there is no sound copy.

    Values are only ever added, so that all copies together have all of them; and the last record
    of a stage is in the stage's own copy.
    """
    copies: dict[str, dict[str, Any]] = {}
    for path in list_copies(dataset):
        with suppress(OSError, ValueError):
            document = _parse_document(read_regular(path))
            if _is_sound(document) and document["identity"]["format_version"] == FORMAT_VERSION:
                copies[path.parent.name] = document
    if not copies:
        return None
    merged: dict[str, Any] = {"identity": {}, "records": {}}
    # The fullest is the newest: where a value was changed by hand, its copy has it.
    for _, stage in sorted((len(copies[stage]["identity"]), stage) for stage in copies):
        merged["identity"] |= copies[stage]["identity"]
        merged["records"] |= copies[stage]["records"]
    for stage, document in copies.items():
        if stage in document["records"]:
            merged["records"][stage] = document["records"][stage]
    return merged | {"crc": _checksum_of(merged)}


def way_back(dataset: Dataset) -> str:
    """What to do about a dataset.json that is missing or damaged, as the end of a message."""
    if merge_copies(dataset):
        return (
            f"run `python -m pipeline verify --dataset {dataset.root} --repair`, which restores it "
            "from the stages' copies"
        )
    return (
        "restore it from a copy; if there is none (earlier releases kept none), remove it and run "
        "the stages so far again with the same options: each states its values and finds its work "
        "done"
    )


def restore_identity(dataset: Dataset) -> list[str]:
    """Write a missing or damaged dataset.json again from the stages' copies, and damaged copies.

    Returns notes of what was done: none where there is nothing to do it with. A file that
    cannot be opened, or is of another format, may be sound. What a damaged file contained is kept
    in `.damaged`. Raises `UserError` where it cannot be written.
    """
    notes = [_restore_main(dataset)] if identity_damage(dataset) else []
    if not identity_damage(dataset):
        document = _read_document(dataset)
        for file in list_copies(dataset):
            if copy_damage(file):
                _commit_document(dataset, file, document | {"crc": _checksum_of(document)})
                notes.append(f"repair: restored {dataset.relative_path(file)}")
    return [note for note in notes if note]


def _restore_main(dataset: Dataset) -> str:
    file, data = dataset.identity_file, b""
    restored = merge_copies(dataset)
    try:
        data = read_regular(file)
        document = _parse_document(data)
        if document["identity"]["format_version"] != FORMAT_VERSION:
            return ""
        if "crc" in document and _is_sound(document):
            restored = {key: document[key] for key in ("identity", "records", "crc")}
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            return ""
    except ValueError:
        pass  # not JSON, or cut short
    if restored is None:
        return ""
    kept = ""
    if data.strip(b"\0 \r\n"):
        place = free_place(dataset, file.name)
        _commit_data(dataset, dataset.root / place, data)
        kept = f"; the damaged one is {place}"
    _commit_document(dataset, file, restored)
    return f"repair: restored {file.name}{kept}"


def _is_copied(
    dataset: Dataset, claims: Mapping[str, object], stage: str, record: Mapping[str, object]
) -> bool:
    """Whether a stage's own copy has its values and record."""
    try:
        document = _parse_document(read_regular(copy_file(dataset, stage)))
        identity = document["identity"]
    except (OSError, ValueError):
        return False
    states = all(key in identity and identity[key] == value for key, value in claims.items())
    return states and _is_sound(document) and document["records"].get(stage) == record


def _commit_document(dataset: Dataset, file: Path, document: Mapping[str, object]) -> None:
    _commit_data(dataset, file, json_bytes(document))


def _commit_data(dataset: Dataset, file: Path, data: bytes) -> None:
    run_id = new_run_id()
    commit_bytes(dataset, run_id, file, data)
    dataset.staging_dir(run_id).rmdir()


def _with_claims(
    dataset: Dataset, claims: Mapping[str, object], stage: str, record: Mapping[str, object]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """dataset.json as it is (None: there is none), and with a stage's claims and record."""
    before = _read_document(dataset) if _is_there(dataset) else None
    if before is None and merge_copies(dataset) and not _is_unfinished(dataset, stage):
        # Begun anew it would lack what the other stages stated.
        raise UserError(f"{dataset.identity_file} is missing: {way_back(dataset)}")
    empty: dict[str, Any] = {"identity": {"format_version": FORMAT_VERSION}, "records": {}}
    after = copy.deepcopy(before) if before else empty
    identity = after["identity"]
    for key, value in claims.items():
        if key in identity and identity[key] != value:
            raise UserError(
                f"{dataset.identity_file}: {key} is {identity[key]!r} in this dataset, "
                f"{value!r} was asked for; use the dataset's value or another --dataset"
            )
        identity[key] = value
    kept = after["records"].get(stage)
    kept = {"terms": kept["terms"]} if isinstance(kept, dict) and "terms" in kept else {}
    after["records"][stage] = kept | dict(record)
    after["crc"] = _checksum_of(after)
    return before, after


def _is_unfinished(dataset: Dataset, stage: str) -> bool:
    """Whether the stage that makes a dataset was stopped after its copy, before dataset.json."""
    # Its journal is only begun once both are there.
    has_journal = any((dataset.root / "status").glob("*/*.jsonl"))
    return not has_journal and list_copies(dataset) == [copy_file(dataset, stage)]


def _checksum_of(document: Mapping[str, object]) -> str:
    """Checksum of identity and records, so that a flipped byte is not taken for another mpp."""
    parts = {key: document[key] for key in ("identity", "records")}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{zlib.crc32(text.encode(errors='backslashreplace')):08x}"


def _is_there(dataset: Dataset) -> bool:
    """Whether there is a dataset.json; a folder that may not be searched is not taken for empty."""
    try:
        return dataset.identity_file.exists()
    except OSError as error:
        raise UserError(_unreadable_message(dataset, error)) from error


def _unreadable_message(dataset: Dataset, error: OSError) -> str:
    return (
        f"{dataset.identity_file} cannot be read: {error.strerror or error}; fix its "
        "permissions or its disk, or restore it from a copy"
    )


def _parse_document(data: bytes) -> dict[str, Any]:
    """The document in the bytes of a dataset.json; raises `ValueError` where it is none."""
    document = parse_json(data)
    if not isinstance(document, dict) or not all(
        isinstance(document.get(key), dict) for key in ("identity", "records")
    ):
        raise ValueError("it has no identity and records")
    if "format_version" not in document["identity"]:
        raise ValueError("it has no format_version")
    _check_values(document["identity"])
    return dict(document)


_MOST = 1 << 64
_NUMBERS = {"mpp": 1e-6, "mpp_tolerance": 0.0, "min_tissue": 0.0, "max_artifact": 0.0}
_COUNTS = {"tile_px": (1, 1 << 20), "variations": (1, _MOST), "micro_batch": (1, 1 << 20),
           "reserve_per_candidates": (0, _MOST), "seed": (-_MOST, _MOST)}  # fmt: skip
_TEXTS = ("kind", "grid", "detector", "resampler", "icc", "codec", "rounding")


def _check_values(identity: Mapping[str, object]) -> None:
    """Refuse values of other kinds than stages write, of keys that are used and not only compared.

    What is null or absent is unknown. Raises `ValueError` naming the key.
    """
    for key, value in identity.items():
        if value is None:
            continue
        good = True
        if key in _NUMBERS:
            good = type(value) in (int, float) and _NUMBERS[key] <= value < 1e6  # type: ignore[operator]
        elif key in _COUNTS:
            least, most = _COUNTS[key]
            good = type(value) is int and least <= value <= most
        elif key in _TEXTS:
            good = isinstance(value, str)
        elif key == "detector_parameters":
            good = isinstance(value, dict)
        if not good:
            raise ValueError(f"{key} is {one_line(repr(value), 60)}")


def _is_sound(document: Mapping[str, Any]) -> bool:
    """Whether the checksum matches, or there is none."""
    return bool(document.get("crc", _checksum_of(document)) == _checksum_of(document))


def _read_document(dataset: Dataset) -> dict[str, Any]:
    file, data = dataset.identity_file, b""
    try:
        data = read_regular(file)
        document = _parse_document(data)
    except FileNotFoundError as error:
        how = way_back(dataset) if merge_copies(dataset) else "run `scan` first"
        raise UserError(f"{file} is missing: {how}") from error
    except OSError as error:
        raise UserError(_unreadable_message(dataset, error)) from error
    except ValueError as error:
        what = f"is not a dataset's identity ({error})" if data else "is empty"
        raise UserError(f"{file} {what}: {way_back(dataset)}") from error
    # Before the checksum, which another format may take otherwise.
    version = document["identity"]["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {version}, this software reads {FORMAT_VERSION}; use the "
            "release that wrote it or make a new dataset"
        )
    if not _is_sound(document):
        raise UserError(
            f"{file} is damaged (its checksum does not match): if it was edited on purpose, "
            f"remove its 'crc' line; otherwise {way_back(dataset)}"
        )
    return document
