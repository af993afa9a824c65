"""The size that a compressed tile states in its own head: decoders take memory by that."""

import struct

_JPEG, _JPEG_2000, _BOX = b"\xff\xd8", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "
_PNG, _WEBP = b"\x89PNG\r\n\x1a\n", b"WEBP"
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
"""JPEG's start-of-frame markers, and that of JPEG-LS."""


def require_size(data: bytes, width: int, height: int) -> None:
    """Raise ValueError where a tile states more than `width` x `height` px.

    JPEG, JPEG-LS, JPEG 2000, PNG and WebP are known; others, and damaged ones, pass.
    """
    try:
        stated = declared_size(data)
    except (struct.error, IndexError):
        return
    if stated is not None and (stated[0] > width or stated[1] > height):
        raise ValueError(f"a tile states {stated[0]}x{stated[1]} px, expected {width}x{height}")


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in px, None where they are not known.

    >>> declared_size(b"\\xff\\xd8\\xff\\xc0\\x00\\x11\\x08\\x00\\x20\\x00\\x40")
    (64, 32)
    """
    if data.startswith(_JPEG):
        return _size_of_jpeg(data)
    start = _find_codestream(data) if data.startswith(_BOX) else 0
    if data[start : start + 4] == _JPEG_2000:
        right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
        components = struct.unpack_from(">H", data, start + 40)[0]
        # As if they were next to each other: each takes its memory.
        return (right - left) * max(1, -(-components // 4)), bottom - top
    if data.startswith(_PNG):
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    if data[8:12] == _WEBP:
        return _size_of_webp(data)
    return None


def _find_codestream(data: bytes) -> int:
    """Where the codestream begins in a JP2 file of boxes; raises `struct.error` without one."""
    at = 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1:
            length, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        if kind == b"jp2c":
            return at + head
        at += max(length, head)


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker == 0xDA:
            return None
        is_single = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        at += (1 if marker == 0xFF else 2) if is_single else 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _size_of_webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"),
        )  # fmt: skip
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
