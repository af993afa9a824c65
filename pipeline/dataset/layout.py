"""Where each thing is in a dataset directory. Names here are the contract."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import find_link

BLOCK_ROWS = 16
"""Ranks [16 b, 16 b + 16) of a slide form block b: the unit of reading, whatever file it is in."""

_SHARD_NAME = re.compile(r"^(?P<slide>.+)\.(?P<start>\d+)-(?P<stop>\d+)\.(?P<kind>\w+)$")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_LONGEST_PATH = 4000
"""Letters of a path in a record: no file system takes more, and patterns take time for them."""
_MOST_LETTERS = 200
"""Of a name: with a shard's ranks and suffix it still fits into the 255 bytes of a file name."""

DAMAGED_DIR = ".damaged"
"""Folder of the damaged files that `verify --repair` moved away; no reader looks into it."""

_SLIDE, _NAME = f"(?P<slide_id>{_SAFE_ID.pattern})", _SAFE_NAME.pattern
_SHARD = rf"{_SLIDE}\.(?P<start>[0-9]+)-(?P<stop>[0-9]+)"
_STAGE_FILES: dict[str, tuple[tuple[str, str], ...]] = {
    "scan": (("", r"slides\.parquet"),),
    "tissue": (("tissue", rf"{_SLIDE}\.(?:png|jpg)"), ("candidates", rf"{_SLIDE}\.parquet")),
    "select": (("selections", rf"{_SLIDE}\.(?:parquet|excluded\.csv)"),),
    "generate": (
        ("", r"slides\.parquet"),
        ("candidates", rf"{_SLIDE}\.parquet"),
        ("guidance", _NAME),
        ("selections", rf"{_SLIDE}\.parquet"),
    ),
    "tile": (("tiles", rf"(?P<scope>[0-9]+)/{_SHARD}\.(?:tar|idx|zarr/(?:zarr\.json|c/0/0/0/0))"),),
    "cache": (
        ("features", rf"(?P<scope>[0-9]+/{_NAME}/{_NAME})/{_SHARD}\.parquet"),
        ("features", rf"(?P<scope>[0-9]+/{_NAME}/{_NAME}/(?P<slide_id>encoder\.json))"),
    ),
    "curate": (
        ("curation", rf"{_NAME}/scores/{_SLIDE}\.parquet"),
        ("curation", rf"{_SLIDE}/(?:deny\.parquet|classifier\.json|report\.json)"),
    ),
    "verify": ((DAMAGED_DIR, r".+"),),
}
"""What each stage writes, as its journal lines name it: folder, and pattern of the rest. A group is
what the line's field of that name says: a line of one slide names no other slide's file."""
_FILE_PATTERNS = {
    stage: tuple(re.compile(f"{folder}/{rest}" if folder else rest) for folder, rest in files)
    for stage, files in _STAGE_FILES.items()
}


@dataclass(frozen=True)
class ShardName:
    """The slide and the half-open rank range [start, stop) that a shard's file name states."""

    slide_id: str
    start: int
    stop: int
    kind: str

    def __str__(self) -> str:
        return f"{check_slide_id(self.slide_id)}.{self.start}-{self.stop}.{self.kind}"


def parse_shard_name(name: str) -> ShardName:
    """Read `<slide_id>.<a>-<b>.<kind>`, ranks [a, b); raises `UserError` on any other name.

    >>> parse_shard_name("slide.1.16-40.tar")
    ShardName(slide_id='slide.1', start=16, stop=40, kind='tar')
    """
    match = _SHARD_NAME.match(name)
    if match is None:
        raise UserError(f"'{name}' is not a shard's name: expected <slide_id>.<a>-<b>.<kind>")
    return ShardName(match["slide"], int(match["start"]), int(match["stop"]), match["kind"])


def safe_slide_id(name: str) -> str:
    """A slide id that is a safe file name everywhere: other characters become `_`.

    What would be longer than 200 bytes ends in a hash of the whole.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("._-")
    # Two long names that begin alike must not become one id.
    if len(safe) > _MOST_LETTERS:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
        safe = f"{safe[: _MOST_LETTERS - len(digest) - 1]}.{digest}"
    return safe or "slide"


def check_slide_id(slide_id: str) -> str:
    """Refuse an id that could leave the dataset's folders, break a tar key or exceed 200 bytes."""
    if not _SAFE_ID.fullmatch(slide_id) or len(slide_id) > _MOST_LETTERS:
        raise UserError(
            f"slide id {slide_id[: 2 * _MOST_LETTERS]!r} is not usable: expected letters, digits, "
            f"'.', '_', '-', beginning with a letter or digit, at most {_MOST_LETTERS} in all"
        )
    return slide_id


def is_safe_name(name: str) -> bool:
    """Whether a name of a slide, selection, encoder or view is a plain file name, <= 200 bytes."""
    return len(name) <= _MOST_LETTERS and _SAFE_NAME.fullmatch(name) is not None


def is_inside(path: str) -> bool:
    """Whether a path, as journals name it, stays in the dataset: relative, without `..`."""
    try:
        path.encode()
    except UnicodeEncodeError:  # half a character, which no system call takes
        return False
    if len(path) > _LONGEST_PATH or "\0" in path:
        return False
    return not {"", ".", ".."} & set(path.split("/"))


def is_known_stage(stage: str) -> bool:
    """Whether this release knows what the stage writes."""
    return stage in _FILE_PATTERNS


def is_stage_file(stage: str, path: str, fields: Mapping[str, object]) -> bool:
    """Whether a stage's journal line may name a path; `fields` are the line's.

    Journals may come from others: a line that names what its stage does not write is no line. Of a
    stage that this release does not know, every path inside the dataset is taken.

    >>> line = {"slide_id": "S", "scope": "224", "start": 0, "stop": 16}
    >>> is_stage_file("tile", "tiles/224/S.0-16.tar", line)
    True
    >>> any(is_stage_file("tile", path, line) for path in ("tiles/224/T.0-16.tar", "dataset.json"))
    False
    """
    if not is_inside(path) or not is_known_stage(stage):
        return is_inside(path)
    for pattern in _FILE_PATTERNS[stage]:
        if match := pattern.fullmatch(path):
            groups = match.groupdict().items()
            return all(str(fields.get(name)) == value for name, value in groups)
    return False


def check_name(name: str, what: str) -> str:
    """Refuse a selection, encoder or view name that is not a plain file name."""
    if not is_safe_name(name):
        raise UserError(f"{what} '{name}' is not usable: expected letters, digits, '.', '_', '-'")
    return name


@dataclass(frozen=True)
class Dataset:
    """A dataset directory: tiles and features of real slides, or of generated pseudo-slides."""

    root: Path

    @property
    def identity_file(self) -> Path:
        """`dataset.json`: identity and records."""
        return self.root / "dataset.json"

    @property
    def slides_file(self) -> Path:
        """`slides.parquet`: one row per slide."""
        return self.root / "slides.parquet"

    def mask_file(self, slide_id: str) -> Path:
        """The tissue mask, a PNG uint8 [h, w] with classes as pixel values."""
        return self.root / "tissue" / f"{check_slide_id(slide_id)}.png"

    def overlay_file(self, slide_id: str) -> Path:
        """The picture of the mask and grid to look at, a JPEG uint8 [h, w, 3]."""
        return self.root / "tissue" / f"{check_slide_id(slide_id)}.jpg"

    def candidates_file(self, slide_id: str) -> Path:
        """The slide's tile grid in rank order, positions in level-0 px."""
        return self.root / "candidates" / f"{check_slide_id(slide_id)}.parquet"

    def selection_file(self, name: str) -> Path:
        """A named view: rows of (slide_id, rank)."""
        return self.root / "selections" / f"{check_name(name, 'selection')}.parquet"

    def selection_names(self) -> list[str]:
        """The selections there are, sorted."""
        return sorted(path.stem for path in (self.root / "selections").glob("*.parquet"))

    def tiles_dir(self, tile_px: int) -> Path:
        """Folder of the tile shards of that side in px."""
        return self.root / "tiles" / str(tile_px)

    def features_dir(self, tile_px: int, encoder: str, view: str = "") -> Path:
        """Folder of an encoder's features of tiles of `tile_px` px under a view ('' is none)."""
        leaf = check_name(f"{encoder}+{view}" if view else encoder, "encoder and view")
        return self.root / "features" / str(tile_px) / leaf

    def status_dir(self, stage: str) -> Path:
        """Folder of a stage's journals."""
        return self.root / "status" / stage

    def staging_dir(self, run_id: str) -> Path:
        """Where a run writes before it renames; on the same file system as the rest."""
        return self.root / ".tmp" / run_id

    @property
    def damaged_dir(self) -> Path:
        """`.damaged`: what `verify --repair` moved away, under the paths that it had."""
        return self.root / DAMAGED_DIR

    def resolve_inside(self, path: str) -> Path:
        """The place of a path as records name it, which is nowhere but in this dataset.

        Raises `UserError` where the path leaves the dataset, or it or a folder on the way is a
        link: what a record names must not lead to files that are not the dataset's.
        """
        if not is_inside(path):
            raise UserError(f"{path!r} is not a path inside {self.root}")
        link = self.find_link(self.root / path)
        if link is not None:
            raise UserError(f"{self.root / path}: {link} is a link, so it is not the dataset's own")
        return self.root / path

    def find_link(self, path: Path) -> Path | None:
        """The first link on the way from the dataset's folder to a path, itself included.

        None without any; the dataset's own folder may be a link, and so may what is above it.
        """
        return find_link(self.root, path)

    def refuse_linked_folders(self, path: Path) -> None:
        """Raise `UserError` where a folder on the way to a file to be written is a link.

        The file itself may be one: it is replaced, as everything is renamed into place. A path
        outside the dataset, which a user named, is left alone.
        """
        link = self.find_link(path.parent)
        if link is not None:
            raise UserError(
                f"cannot write {path}: {link} is a link, and nothing is written or removed behind "
                "links in a dataset, which may lead anywhere; put a folder in its place (one on "
                "another disk: mount it there)"
            )

    def refuse_linked_stage(self, stage: str) -> None:
        """Raise `UserError` where a folder into which a stage writes is a link."""
        for folder, _ in _STAGE_FILES.get(stage, ()):
            self.refuse_linked_folders(self.root / folder / "file")

    def relative_path(self, path: Path) -> str:
        """The path as journals name it: relative to the dataset, with '/'."""
        return path.relative_to(self.root).as_posix()


def ranks_of_blocks(blocks: range, rows: int) -> range:
    """The ranks of a span of blocks of a slide with `rows` candidates; its last block may be short.

    >>> ranks_of_blocks(range(1, 3), rows=40)
    range(16, 40)
    """
    return range(blocks.start * BLOCK_ROWS, min(blocks.stop * BLOCK_ROWS, rows))


def covering_blocks(ranks_start: int, ranks_stop: int) -> range:
    """The blocks that ranks [start, stop) touch.

    >>> covering_blocks(16, 33)
    range(1, 3)
    """
    return range(ranks_start // BLOCK_ROWS, -(-ranks_stop // BLOCK_ROWS))
