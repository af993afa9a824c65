"""`.damaged`: files that `verify --repair` moved out of the way instead of removing them.

A file keeps the path that it had, below `.damaged`; where one of that path is there already, below
`.damaged/2`, `.damaged/3` and so on. No reader looks there.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import require_regular
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Entry,
    Ledger,
    Slide,
    kind_of,
    read_identity,
    read_slides,
)
from pipeline.dataset.inside import file_state
from pipeline.dataset.layout import DAMAGED_DIR
from pipeline.upkeep.verify.inventory import Inventory, Named, Stray
from pipeline.upkeep.verify.sums import sha256_of

STAGE = "verify"
"""Its journal says what was moved, from where, and when."""
_BUFFER_BYTES = 1 << 20


def unit_of(path: str) -> str:
    """What is moved for a damaged file: the file, or the folder of the Zarr array that it is in.

    >>> unit_of("tiles/224/S.0-16.zarr/c/0/0/0/0"), unit_of("tissue/S.png")
    ('tiles/224/S.0-16.zarr', 'tissue/S.png')
    """
    folder, end, _ = path.partition(".zarr/")
    return folder + end.rstrip("/") if end else path


def former_path(place: str) -> str:
    """The path that a file in `.damaged` had.

    >>> former_path(".damaged/tissue/S.png"), former_path(".damaged/2/tissue/S.png")
    ('tissue/S.png', 'tissue/S.png')
    """
    path = place.removeprefix(f"{DAMAGED_DIR}/")
    first, _, rest = path.partition("/")
    return rest if first.isdecimal() else path


def list_damaged(dataset: Dataset) -> list[Stray]:
    """The files in `.damaged`, in the order of their paths; a link is not followed."""
    return sorted(_walk_damaged(dataset), key=lambda file: file.path)


def _walk_damaged(dataset: Dataset) -> Iterator[Stray]:
    if dataset.damaged_dir.is_symlink():
        return
    for folder, folders, files in os.walk(dataset.damaged_dir):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            path = Path(folder, name)
            status = path.lstat()
            inode, size, mtime_ns = file_state(status)
            yield Stray(dataset.relative_path(path), size, inode, mtime_ns)


def journalled_moves(dataset: Dataset) -> dict[str, Entry]:
    """By the place in `.damaged`, the lines of files that were moved there and not pruned since."""
    ledger = Ledger.read(dataset, STAGE)
    entries = (e for scope in ledger.scopes for es in ledger[scope].written.values() for e in es)
    return {record.path: entry for entry in entries for record in entry.files}


def is_replaced(inventory: Inventory, place: str) -> bool:
    """Whether the file is where it was again, as a current line says; its bytes are read."""
    path = former_path(place)
    records = {(one.record.bytes, one.record.sha256) for one in inventory.named.get(path, [])}
    try:
        file = inventory.dataset.resolve_inside(path)
        return bool(records) and sha256_of(file, bytearray(_BUFFER_BYTES)) in records
    except (UserError, OSError):
        return False


class Remaking:
    """Which files the same stage surely makes again, with the same bytes, from what is here.

    Only masks, candidates and tiles of a slide that is where it was, with the size and time that it
    had, by the detection and settings of this release. All else may depend on what is gone:
    imported files, a model's weights, people's choices.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @cached_property
    def _identity(self) -> dict[str, Any]:
        identity = read_identity(self.dataset)
        parameters = identity.get("detector_parameters")
        name = parameters.get("name") if isinstance(parameters, dict) else ""
        is_detected = isinstance(name, str) and name.startswith("classical")
        return identity if is_detected and kind_of(identity) == DatasetKind.SLIDES else {}

    @cached_property
    def _slides(self) -> dict[str, Slide]:
        return {slide.slide_id: slide for slide in read_slides(self.dataset)}

    def is_certain(self, named: Named) -> bool:
        """Whether the stage makes the file of this line again."""
        if named.stage not in ("tissue", "tile") or "source" in named.entry.values:
            return False
        try:
            return bool(self._identity) and named.entry.fingerprint == self._fingerprint_now(named)
        except (UserError, OSError, LookupError, TypeError, ValueError):
            return False  # a table or record that is damaged itself

    def _fingerprint_now(self, named: Named) -> str:
        """Of what the stage would make of the slide now; '' where the slide is not here."""
        # Only a damaged file needs them, and they are slow to import.
        from pipeline.slides.identity import slide_state
        from pipeline.tiles.stage import tile_fingerprint
        from pipeline.tissue.stage import tissue_fingerprint

        slide = self._slides[named.entry.slide_id]
        path = Path(slide.path)
        if not path.is_absolute() or not slide.mtime_ns or not path.is_file():
            return ""
        require_regular(path)
        if slide_state(path, slide.series) != (slide.bytes, slide.mtime_ns):
            return ""
        if named.stage == "tissue":
            return tissue_fingerprint(slide, self._identity)
        return tile_fingerprint(slide, self._identity, int(named.entry.scope))
