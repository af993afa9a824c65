"""Numbers of Thrift's compact protocol, in which the heads of Parquet's pages are written."""


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte, and where it ends.

    Raises ValueError for one that does not end within 64 bits, IndexError beyond the data.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number in the page's header does not end")


def read_number(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The signed number at a place, and where it ends; raises as `read_varint` does.

    >>> read_number(bytes([3]), 0), read_number(bytes([0x80, 0x01]), 0)
    ((-2, 1), (64, 2))
    """
    value, at = read_varint(data, at)
    # Thrift's zigzag code: signs are in the lowest bit.
    return (value >> 1) ^ -(value & 1), at
