"""Published weights fetched into a folder, for machines without a network.

Each item becomes DIR/<name>.safetensors, with the tensors under their published names, and a
record in DIR/weights.json: where it came from, its sums, its licence.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import torchvision

from common.console import EXIT_FAILURES, EXIT_OK, print_line, stdout
from common.errors import UserError
from common.files import hash_file, replacing_path, write_json
from common.json_text import read_json
from common.text import format_bytes
from model.encoders import MissingPackageError, published_sha256, table
from model.encoders.published import Published, ReleaseFile, local_copy
from model.perceptual import PerceptualLoss
from model.weights import Tensors, WeightsError, read_tensors, write_tensors

RECORDS = "weights.json"


class WeightsRecord(TypedDict):
    """What weights.json states of one item."""

    file: str
    bytes: int
    sha256: str
    weights_sha256: str | None  # of a run; None where this machine lacked the network's package
    source: str
    published_file: str
    published_sha256: str
    licence: str
    gating: str


@dataclass(frozen=True)
class Item:
    """Weights that can be fetched.

    `tensors` reads what is kept of a published file that is not safetensors; `check` reads the
    file as a run will and gives the sum that the run will record, or raises `UserError`.
    """

    name: str
    published: Published
    licence: str
    gating: str
    tensors: Callable[[Path], Tensors]
    check: Callable[[Path], str]


def known_items() -> Mapping[str, Item]:
    """Everything `weights fetch` knows, by name; variants of an encoder share one item."""
    encoders = [
        Item(
            spec.name,
            spec.published,
            spec.licence,
            spec.gating,
            tensors=partial(read_tensors, containers=spec.containers, mapped=True),
            check=partial(published_sha256, spec),
        )
        for spec in table.ENCODERS.values()
        if spec.weights_name == spec.name
    ]
    return {item.name: item for item in (*encoders, _LPIPS)}


def _lpips_tensors(vgg16: Path) -> Tensors:
    """VGG16's features and the heads that the `lpips` package has, by published names."""
    loss = PerceptualLoss(str(vgg16))
    heads = {
        f"lin{number}.model.1.weight": head.view(1, -1, 1, 1)
        for number, head in enumerate(loss.heads)
    }
    features = {k: v for k, v in loss.state_dict().items() if k.startswith("features.")}
    return {**features, **heads}


_LPIPS = Item(
    "lpips-vgg16",
    ReleaseFile(torchvision.models.VGG16_Weights.IMAGENET1K_V1.url),
    "BSD-3-Clause (torchvision), BSD-2-Clause (lpips)",
    "",
    tensors=_lpips_tensors,
    check=lambda path: PerceptualLoss(str(path)).weights_sha256,
)


def fetch_weights(names: list[str], folder: Path, *, mirror: str = "") -> int:
    """Fetch the named weights into `folder`; returns the exit status.

    One that is refused or broken leaves nothing behind and does not keep the others from being
    fetched. Raises `UserError` for an unknown name before anything is fetched.
    """
    wanted = {item.name: item for item in map(_find_item, names)}
    failed = [item.name for item in wanted.values() if not _ensure_item(item, folder, mirror)]
    failures = f", {len(failed)} failed ({', '.join(failed)})" if failed else ""
    print_line(
        f"weights: {len(wanted) - len(failed)} in {folder}{failures}; use them as --weights FILE"
    )
    return EXIT_FAILURES if failed else EXIT_OK


def _find_item(name: str) -> Item:
    known = known_items()
    if name in known:
        return known[name]
    try:
        return known[table.encoder_spec(name).weights_name]
    except UserError as error:
        raise UserError(
            f"weights {name!r} are not known; known are {', '.join(known)} "
            "(`python -m pipeline weights list` says more)"
        ) from error


def _ensure_item(item: Item, folder: Path, mirror: str) -> bool:
    """Fetch an item that is not there yet, and report it; whether it is there now."""
    record = _read_records(folder).get(item.name)
    if record is not None:
        path = folder / record["file"]
        if path.is_file() and hash_file(path) == record["sha256"]:
            print_line(f"{item.name}: is in {path}")
            return True
    try:
        record = _fetch_item(item, folder, mirror)
        # Read again: another process may have fetched another item meanwhile.
        records = {**_read_records(folder), item.name: record}
        write_json(folder / RECORDS, records)
    except UserError as error:
        print_line(f"{item.name}: failed: {error}")
        return False
    print_line(f"{item.name}: wrote {folder / record['file']}, {format_bytes(record['bytes'])}")
    return True


def _fetch_item(item: Item, folder: Path, mirror: str) -> WeightsRecord:
    """Fetch one item, check that it fits, and only then give it its name."""
    gating = f"; gated: {item.gating}" if item.gating else ""
    print_line(f"{item.name}: from {item.published.id}; licence: {item.licence}{gating}")
    staging = folder / f".fetching-{item.name}"
    final = folder / f"{item.name}.safetensors"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        source = local_copy(
            item.published, name=item.name, folder=staging, mirror=mirror,
            progress=stdout.is_terminal,
        )  # fmt: skip
        published_sha256 = hash_file(source)
        staged = staging / final.name
        if source.suffix == staged.suffix and source.is_relative_to(staging):
            source.resolve().replace(staged)  # the hub's client gives a link into its cache
        else:
            write_tensors(staged, item.tensors(source))
        weights_sha256: str | None = None
        try:
            weights_sha256 = item.check(staged)
        except MissingPackageError as error:
            print_line(f"{item.name}: not checked against its network: {error}")
        record: WeightsRecord = {
            "file": final.name,
            "bytes": staged.stat().st_size,
            "sha256": hash_file(staged),
            "weights_sha256": weights_sha256,
            "source": item.published.id,
            "published_file": source.name,
            "published_sha256": published_sha256,
            "licence": item.licence,
            "gating": item.gating,
        }
        with replacing_path(final) as checked:
            staged.replace(checked)
    except OSError as error:
        raise WeightsError(
            f"weights of {item.name}: cannot write {folder} ({error.strerror or error}); free "
            "space or choose another --to"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def _read_records(folder: Path) -> dict[str, WeightsRecord]:
    path = folder / RECORDS
    if not path.exists():
        return {}
    try:
        records = read_json(path)
        if not all("file" in record and "sha256" in record for record in records.values()):
            raise ValueError("records lack a file or its sha256")
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and fetch again") from error
    return dict(records)


def table_rows() -> list[tuple[str, ...]]:
    """What `weights list` prints: a head, one row for each encoder, then the other items.

    Encoders come in the order of how long one waits for their weights.
    """
    head = ("name", "dim", "tokens", "parameters", "input", "licence", "gated", "from")
    rows = [
        (
            spec.name,
            str(spec.dim),
            f"{spec.num_tokens}x{spec.token_dim}" if spec.num_tokens else "-",
            f"{spec.parameters / 1e6:,.1f} M",
            f"{spec.input_px} px" + (f", {spec.resize}" if spec.resize else ""),
            spec.licence,
            spec.gating or "no",
            spec.hub_id,
        )
        for spec in sorted(table.ENCODERS.values(), key=_wait)
    ]
    others = [
        (item.name, "-", "-", "-", "-", item.licence, item.gating or "no", item.published.id)
        for item in known_items().values()
        if item.name not in table.ENCODERS
    ]
    return [head, *rows, *others]


def _wait(spec: table.EncoderSpec) -> int:
    """How long one waits for an encoder's weights: not at all, for a click, for a review."""
    return 2 if spec.gating == table.TERMS_BY_HAND else int(bool(spec.gating))
