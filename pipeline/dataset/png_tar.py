"""PNG tiles in a webdataset tar, with an index, so that a block is one contiguous read."""

import os
import struct
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from model.errors import UserError
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.layout import BLOCK_ROWS, parse_shard_name

PNG_EFFORTS = ("small", "fast")
_HEADER = 512
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


def decode_png(data: bytes | memoryview) -> npt.NDArray[np.uint8]:
    """RGB tile [H, W, 3]; raises ValueError on damaged bytes."""
    tile = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if tile is None:
        raise ValueError("not a readable PNG")
    return np.asarray(tile, np.uint8)


def member_name(slide_id: str, rank: int) -> str:
    """The tar key: the slide is a folder, since its id may hold dots."""
    return f"{slide_id}/{rank:08d}.png"


def write_tar(file: HashingFile, slide_id: str, start: int, pngs: Iterable[bytes]) -> bytes:
    """Write PNGs of consecutive ranks from `start`; returns the index in wds2idx's v1.2 format."""
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
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@dataclass(frozen=True)
class TarShard:
    """An open tar shard: where each of its blocks begins."""

    path: Path
    start: int
    stop: int
    block_starts: npt.NDArray[np.int64]

    @classmethod
    def open(cls, path: Path) -> "TarShard":
        """Read the index beside the tar; keeps one number a block."""
        name = parse_shard_name(path.name)
        index = path.with_suffix(".idx")
        try:
            lines = index.read_text().splitlines()
            offsets = [int(line.split(" ", 3)[1]) - _HEADER for line in lines[1::BLOCK_ROWS]]
            last = lines[-1].split(" ", 3)
            end = int(last[1]) + -(-int(last[2]) // _HEADER) * _HEADER
        except (OSError, IndexError, ValueError) as error:
            raise UserError(f"{index} cannot be read ({error}): run `verify` and tile again") from (
                error
            )
        return cls(path, name.start, name.stop, np.array([*offsets, end], np.int64))

    def handle(self) -> ShardHandle:
        """Open the tar for reading."""
        return ShardHandle(self.path)

    def read_block(self, block: int, handle: ShardHandle | None = None) -> dict[int, bytes]:
        """PNG bytes by rank of one block of the slide, in one read."""
        handle = handle or self.handle()
        index = block - self.start // BLOCK_ROWS
        begin, end = int(self.block_starts[index]), int(self.block_starts[index + 1])
        data = os.pread(handle.fd, end - begin, begin)
        if len(data) != end - begin:
            raise UserError(f"{self.path} is shorter than its index says: run `verify`")
        return dict(_members(data, self.path))


def _members(data: bytes, path: Path) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        try:
            info = tarfile.TarInfo.frombuf(data[at : at + _HEADER], "utf-8", "strict")
        except tarfile.TarError as error:
            raise UserError(f"{path} is damaged ({error}): run `verify`") from error
        rank = int(info.name.rsplit("/", 1)[1].removesuffix(".png"))
        at += _HEADER
        yield rank, data[at : at + info.size]
        at += -(-info.size // _HEADER) * _HEADER
