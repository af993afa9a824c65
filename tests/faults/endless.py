"""Files that never end, or claim more than any machine has: small, and made without libraries."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

TIFF_RGB = {258: (3, [8, 8, 8]), 262: (3, [2]), 277: (3, [3]), 284: (3, [1])}
"""Fields of a TIFF directory: (type, values) by tag, here of 8-bit RGB."""
Fields = Mapping[int, tuple[int, Sequence[int] | bytes]]
_FORMS = {1: "B", 2: "s", 3: "H", 4: "I", 7: "s", 13: "I", 16: "Q"}


def tiff(directories: Sequence[Fields], following: Sequence[int] | None = None, *,
         data: bytes = b"", big: bool = False) -> bytes:  # fmt: skip
    """A TIFF of these directories; `following` is which one comes after each (-1: none).

    `data` begins at byte 16. An offset of a SubIFD (330) below 0 is the number of a directory,
    counted from -1 down.
    """
    following = following or [*range(1, len(directories)), -1]
    word, count_form, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    room = struct.calcsize(word)
    heads = [struct.calcsize("<" + count_form) + entry * len(f) + room for f in directories]
    tails = [sum(_size_of(*field) for field in f.values()) for f in directories]
    starts = [16 + len(data)]
    for head, tail in zip(heads, tails, strict=True):
        starts.append(starts[-1] + head + tail)
    del starts[-1]
    first = b"II+\0\x08\0\0\0" if big else b"II*\0"
    parts = [(first + struct.pack("<" + word, starts[0])).ljust(16, b"\0"), data]
    for number, fields in enumerate(directories):
        body, tail = struct.pack("<" + count_form, len(fields)), b""
        for tag, (kind, values) in sorted(fields.items()):
            packed = value = _pack(kind, values, starts)
            if len(packed) > room:
                value = struct.pack("<" + word, starts[number] + heads[number] + len(tail))
                tail += packed
            count = len(packed) // struct.calcsize(_FORMS[kind])
            body += struct.pack("<HH" + word, tag, kind, count) + value.ljust(room, b"\0")
        after = following[number]
        end = struct.pack("<" + word, starts[after] if after >= 0 else 0)
        parts.append(body + end + tail.ljust(tails[number], b"\0"))
    return b"".join(parts)


def _size_of(kind: int, values: Sequence[int] | bytes) -> int:
    return len(values) * (1 if isinstance(values, bytes) else struct.calcsize(_FORMS[kind]))


def _pack(kind: int, values: Sequence[int] | bytes, starts: Sequence[int]) -> bytes:
    if isinstance(values, bytes):
        return values
    places = [
        starts[-value - 1] if -len(starts) <= value < 0 else max(0, value) for value in values
    ]
    return struct.pack(f"<{len(values)}{_FORMS[kind]}", *places)


def page(
    width: int, height: int, tile: int = 256, compression: int = 8, *, stored: int = 16,
    tiles: int = 0,
) -> dict[int, tuple[int, Sequence[int] | bytes]]:  # fmt: skip
    """A page of RGB tiles, all of the same first bytes; `tiles` is how many are listed."""
    count = tiles or -(-width // tile) * -(-height // tile)
    return {
        256: (4, [width]), 257: (4, [height]), 259: (3, [compression]), **TIFF_RGB,
        322: (4, [tile]), 323: (4, [tile]), 324: (4, [16] * count), 325: (4, [stored] * count),
    }  # fmt: skip


def png_claiming(width: int, height: int, *, colour: int = 2, chunks: bytes = b"") -> bytes:
    """A PNG whose rows are zeros, deflated: about a thousandth of what it becomes."""
    row = width * {0: 1, 2: 3, 6: 4}[colour] + 1
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(row)) for _ in range(height)) + packer.flush()
    return png_of(struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0), chunks, body)


def png_of(header: bytes, chunks: bytes, body: bytes) -> bytes:
    """A PNG of these parts; `chunks` come before the pixels."""
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunks, chunk(b"IDAT", body),
                     chunk(b"IEND", b"")))  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deflated_zeros(megabytes: int) -> bytes:
    """Deflated zeros, about a thousandth of their size."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def jpeg_claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header states another size."""
    at = next(
        i for i in range(2, len(jpeg)) if jpeg[i : i + 1] == b"\xff" and jpeg[i + 1] in (0xC0, 0xC2)
    )
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def sparse_file(path: Path, size: int) -> Path:
    """A file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
    return path
