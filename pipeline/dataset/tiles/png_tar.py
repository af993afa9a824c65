"""PNG tiles in a webdataset tar, with an index, so that a block is one contiguous read."""

import hashlib
import os
import struct
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.files import open_descriptor, read_regular
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.layout import BLOCK_ROWS, ShardName, covering_blocks, parse_shard_name

PNG_EFFORTS = ("small", "fast")
SHARD_REMEDY = "run `python -m pipeline verify --repair`, then `tile` again"
"""What makes a damaged shard anew: `tile` alone goes by names and sizes of files."""
MADE_AGAIN = (
    "is not the file that the journal named when this command began: it was made again meanwhile, "
    f"or is damaged: start the command again; if it says so again, {SHARD_REMEDY}"
)
"""Of a shard of other tiles than those of the line by which it was found."""
_HEADER = 512
_PNG_END = 12
"""Bytes of a PNG's last chunk, which is empty."""
_MOST_BLOCK_BYTES = 2 << 30
"""Of 16 tiles, which have 2 MB each as a rule."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUE_COLOUR, _FILTER_AVERAGE = 2, 3
_PNG_OPTIONS = [
    cv2.IMWRITE_PNG_COMPRESSION,
    1,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
]
"""zlib level 1 with run-length matches: H&E noise repays no more (docs/performance/tiling.md)."""


def encode_png(tile: npt.NDArray[np.uint8], effort: str = "small") -> bytes:
    """Lossless PNG of an RGB tile uint8 [H, W, 3]; no ICC profile, no other chunk.

    "small" is OpenCV's level 1 with run-length matches; "fast" (needs the isal package) is
    about five times as fast and 3 to 7% larger.
    """
    if effort == "fast":
        return _encode_fast(tile)
    ok, data = cv2.imencode(".png", cv2.cvtColor(tile, cv2.COLOR_RGB2BGR), _PNG_OPTIONS)
    if not ok:
        raise RuntimeError("the PNG encoder refused a tile")
    return data.tobytes()


def _encode_fast(tile: npt.NDArray[np.uint8]) -> bytes:
    """Every row with the filter Average, all deflated by ISA-L at its level 1."""
    from isal import isal_zlib

    height, width, _ = tile.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _TRUE_COLOUR, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"IDAT", isal_zlib.compress(_average_filtered(tile), 1)),
        (b"IEND", b""),
    )
    parts = [_SIGNATURE]
    for kind, data in chunks:
        crc = isal_zlib.crc32(data, isal_zlib.crc32(kind))
        parts += (struct.pack(">I", len(data)), kind, data, struct.pack(">I", crc))
    return b"".join(parts)


def _average_filtered(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Rows as PNG stores them: filter type 3, then x - floor((left + above) / 2) modulo 256.

    ISO/IEC 15948, section 9.2. Floor of the mean in eight bits: (a & b) + ((a ^ b) >> 1).
    """
    height, width, channels = tile.shape
    rows = tile.reshape(height, width * channels)
    # In place wherever possible: allocation takes as long as the arithmetic.
    left = np.zeros_like(rows)
    left[:, channels:] = rows[:, :-channels]
    mean = left >> 1
    np.bitwise_xor(left[1:], rows[:-1], out=mean[1:])
    mean[1:] >>= 1
    left[1:] &= rows[:-1]
    mean[1:] += left[1:]
    stored = np.empty((height, width * channels + 1), np.uint8)
    stored[:, 0] = _FILTER_AVERAGE
    np.subtract(rows, mean, out=stored[:, 1:])
    return stored


def decode_png(data: bytes | memoryview, tile_px: int | None = None) -> npt.NDArray[np.uint8]:
    """RGB tile [H, W, 3]; raises ValueError on damaged bytes, and on another size than tile_px."""
    # The size first: a few bytes may state a picture of gigabytes.
    if tile_px is not None and png_size(data) != (tile_px, tile_px):
        raise ValueError(f"it is {png_size(data)} px, expected {tile_px}x{tile_px}")
    try:
        tile = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ValueError(f"not a readable PNG ({error.err})") from error
    if tile is None:
        raise ValueError("not a readable PNG")
    return np.asarray(tile, np.uint8)


def png_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height in px that a PNG states, before anything is decoded or allocated."""
    if len(data) < 33 or bytes(data[:8]) != _SIGNATURE or bytes(data[12:16]) != b"IHDR":
        raise ValueError("not a PNG")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def member_name(slide_id: str, rank: int) -> str:
    """The tar key, with the rank in 8 digits: the slide is a folder, since its id may have dots.

    >>> member_name("slide.1", 7)
    'slide.1/00000007.png'
    """
    return f"{slide_id}/{rank:08d}.png"


def write_tar(file: HashingFile, slide_id: str, start: int, pngs: Iterable[bytes]) -> bytes:
    """Write PNGs of consecutive ranks from `start`; returns the index's bytes (wds2idx v1.2)."""
    lines = []
    for rank, png in enumerate(pngs, start):
        info = tarfile.TarInfo(member_name(slide_id, rank))
        info.size, info.mode = len(png), 0o644
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        lines.append(f"png {file.tell()} {len(png)} {info.name}")
        file.write(png)
        file.write(bytes(-len(png) % _HEADER))
    file.write(bytes(2 * _HEADER))
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode()


class ShardHandle:
    """A file descriptor that closes when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = open_descriptor(path)

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end); raises `UserError` where the disk refuses them or the file ends."""
        # What an index says: a sparse file has any number of bytes.
        if not 0 <= end - begin <= _MOST_BLOCK_BYTES:
            raise UserError(f"{self.path}: a block of {end - begin:,} bytes: {SHARD_REMEDY}")
        try:
            data = os.pread(self.fd, end - begin, begin)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(data) != end - begin:
            raise UserError(f"{self.path} is shorter than its index says: {SHARD_REMEDY}")
        return data

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@dataclass(frozen=True)
class TarShard:
    """An open tar shard: where each of its blocks begins, int64 [blocks + 1] in bytes."""

    path: Path
    start: int
    stop: int
    block_starts: npt.NDArray[np.int64]

    @classmethod
    def open(cls, path: Path, index_sha256: str = "") -> "TarShard":
        """Read the index next to the tar; keeps one int64 per block.

        `index_sha256` is the sum of the index as its line states it, '' where that is not known.
        """
        name = parse_shard_name(path.name)
        index = path.with_suffix(".idx")
        # Blocks are read whole, so that the offset of each block's first member is enough.
        try:
            data = read_regular(index)
            # The index has all tiles' sizes in it: that of other tiles is another one.
            if index_sha256 and hashlib.sha256(data).hexdigest() != index_sha256:
                raise UserError(f"{index} {MADE_AGAIN}")
            lines = data.decode().splitlines()
            offsets = [int(line.split(" ", 3)[1]) - _HEADER for line in lines[1::BLOCK_ROWS]]
            last = lines[-1].split(" ", 3)
            end = int(last[1]) + -(-int(last[2]) // _HEADER) * _HEADER
            starts = np.array([*offsets, end], np.int64)
            _check_starts(starts, name, path.stat().st_size)
        except (OSError, IndexError, ValueError, OverflowError) as error:
            raise UserError(f"{index} cannot be read ({error}): {SHARD_REMEDY}") from error
        return cls(path, name.start, name.stop, starts)

    def open_handle(self) -> ShardHandle:
        """Open the tar for reading of bytes."""
        return ShardHandle(self.path)

    def first_crc(self, handle: ShardHandle) -> int | None:
        """The last checksum in the first tile's PNG, which is that of its pixels; None without."""
        header = _plain_header(handle.read(0, _HEADER))
        if header is None or header[1] < _PNG_END:
            return None
        end = _HEADER + header[1] - _PNG_END
        return int.from_bytes(handle.read(end - 4, end), "big")

    def read_block(self, block: int, handle: ShardHandle | None = None) -> dict[int, bytes]:
        """PNG bytes by rank of one block of the slide, in one read."""
        handle = handle or self.open_handle()
        index = block - self.start // BLOCK_ROWS
        if not 0 <= index < len(self.block_starts) - 1:
            raise UserError(f"{self.path} has no block {block}: {SHARD_REMEDY}")
        begin, end = int(self.block_starts[index]), int(self.block_starts[index + 1])
        data = handle.read(begin, end)
        # Ranks by the tar's headers, not by the index: a mixed-up pair of files is found out.
        members = dict(_read_members(data, self.path))
        ranks = range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.stop))
        if list(members) != list(ranks):
            raise UserError(f"{self.path}: block {block} has not its tiles: {SHARD_REMEDY}")
        return members


def _check_starts(starts: npt.NDArray[np.int64], name: ShardName, size: int) -> None:
    """An index that is not of this tar must not make us read anything else, or for ever."""
    blocks = len(covering_blocks(name.start, name.stop))
    if name.start % BLOCK_ROWS or len(starts) != blocks + 1:
        raise ValueError(f"it has {len(starts) - 1} blocks, expected {blocks}")
    if starts[0] < 0 or (np.diff(starts) < _HEADER).any() or starts[-1] > size:
        raise ValueError("its offsets are not those of the tar")


def _read_members(data: bytes, path: Path) -> Iterable[tuple[int, bytes]]:
    # Each member's own header is checked: an index may belong to another tar.
    at, slide_id = 0, parse_shard_name(path.name).slide_id
    while at < len(data):
        header = data[at : at + _HEADER]
        try:
            name, size = _plain_header(header) or _any_header(header)
            rank = int(name.rpartition("/")[2].removesuffix(".png"))
            if name != member_name(slide_id, rank) or size < 0:
                raise ValueError(f"a member {name[:80]!r} is not one of slide {slide_id}")
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): {SHARD_REMEDY}") from error
        at += _HEADER
        yield rank, data[at : at + size]
        at += -(-size // _HEADER) * _HEADER


def _plain_header(header: bytes) -> tuple[str, int] | None:
    """Name and size of a ustar header such as ours, in a fifth of tarfile's time.

    None, for tarfile to look at, where it is anything else: a name in two parts, a size or a
    checksum that is not plain octal digits, another checksum.
    """
    name, size, checksum = header[:100].rstrip(b"\0"), header[124:135], header[148:154]
    plain = name.isascii() and size.isdigit() and checksum.isdigit() and not header[345]
    if len(header) != _HEADER or not plain:
        return None
    # POSIX.1-1988: the sum of all bytes, those of the sum itself taken for spaces.
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if total != int(checksum, 8):
        return None
    return name.decode("ascii"), int(size, 8)


def _any_header(header: bytes) -> tuple[str, int]:
    info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    return info.name, info.size
