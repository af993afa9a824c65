"""Which slide a picture of a tile is of, by its name: pure functions of names.

Sets of tiles are often one folder with the pictures of many slides, named after the slide and the
tile's place or number: `TCGA-18-5592-01Z-00-DX1_0_276.png`, `case-3_tile_12.png`,
`b7-0001-0002.png`, `s1 [x=0,y=512,w=512,h=512].png`.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_BARCODE = re.compile(
    r"(?<![A-Z0-9])TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])"
    r"(-\d{2}[A-Z](?P<section>-\d{2}[A-Z]?-[A-Z]{2}[A-Z0-9])?(?![A-Z0-9]))?"
    r"(\.[0-9A-F]{8}-(?:[0-9A-F]{4}-){3}[0-9A-F]{12})?",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"[\s,()\[\]]")
_TOKEN = re.compile(r"([_\-]*)([^_\-]+)")
_KEYED = re.compile(
    r"(?P<key>x|y|w|h|d|row|col|r|c|i|j|idx|tile|patch|level|lvl|mag|class|size|px)=?\d+(\.\d+)?",
    re.IGNORECASE,
)
_PLACE_KEYS = frozenset({"x", "y", "row", "col", "idx", "tile", "patch"})
_WORDS = frozenset({"tile", "tiles", "patch", "crop", "img", "image", "region", "sample"})


def find_barcode(name: str) -> str:
    """The TCGA barcode in a name, with the UUID that follows it; '' where there is none.

    >>> find_barcode("blk-AAAC-TCGA-CM-5348-01Z-00-DX1_0_276.png")
    'TCGA-CM-5348-01Z-00-DX1'
    """
    match = _BARCODE.search(name)
    return match[0] if match else ""


def name_slides(paths: Sequence[str]) -> list[str]:
    """The slide that each picture's name begins with, '' where the name is a place or number only.

    All names of a folder are read together, since only together they show what a number is. Of a
    name with a TCGA barcode the slide is the barcode.

    >>> name_slides(["s_1_0_0.png", "s_1_0_224.png", "s_2_0_0.png"])
    ['s_1', 's_1', 's_2']
    >>> name_slides(["0_0.png", "0_224.png"])
    ['', '']
    """
    stems = [PurePosixPath(path).stem for path in paths]
    tails = [_split_tokens(stem) for stem in stems]
    count = _count_numbers([numbers for _, numbers, _ in tails])
    slides = []
    for stem, (head, numbers, is_after_word) in zip(stems, tails, strict=True):
        # Numbers that a word such as `tile` announces are all the tile's.
        drop = len(numbers) if is_after_word else min(count, len(numbers))
        slide = head + "".join(numbers[: len(numbers) - drop])
        slides.append(_prefer_barcode(stem, slide.strip("_-. ([,")))
    return slides


def _prefer_barcode(stem: str, slide: str) -> str:
    match = _BARCODE.search(stem)
    if match is None:
        return slide
    # What follows the patient's part of the name may distinguish several slides of that patient.
    if match["section"] is None and slide.startswith(match[0]):
        return slide
    return match[0]


def _split_tokens(stem: str) -> tuple[str, list[str], bool]:
    """What a name begins with, the numbers it ends in, and whether a word announces them.

    The numbers come with the separators before them, all of one kind.
    """
    tokens = [(m[1], m[2]) for m in _TOKEN.finditer(_BRACKETS.sub("_", stem).rstrip("_-"))]
    keys = set()
    while tokens and (keyed := _KEYED.fullmatch(tokens[-1][1])):
        keys.add(keyed["key"].lower())
        tokens.pop()
    if keys and not keys & _PLACE_KEYS and not {"r", "c"} <= keys and not {"i", "j"} <= keys:
        return stem, [], False
    numbers: list[str] = []
    # What has a place in words has no other in numbers.
    while not keys and tokens and tokens[-1][1].isdecimal():
        if numbers and numbers[0][:1] != tokens[-1][0][:1] and len(tokens) > 1:
            break
        numbers.insert(0, "".join(tokens.pop()))
    is_after_word = bool(tokens) and tokens[-1][1].lower() in _WORDS
    if is_after_word:
        tokens.pop()
    # As it is written, so that `a b` and `a_b` are two.
    return stem[: sum(len(a) + len(b) for a, b in tokens)], numbers, is_after_word


def _count_numbers(numbers: Sequence[Sequence[str]]) -> int:
    """How many numbers at the end of each name are the tile's and not the slide's."""
    # Names without any have their place in words, or none.
    numbers = [places for places in numbers if places]
    least = min(map(len, numbers), default=0)
    if least <= 2:
        return least

    def is_constant(place: int) -> bool:
        values = {places[place].lstrip("_-") for places in numbers}
        # A row of tiles shares a coordinate, which is 0 where there is one row only.
        return len(numbers) > 1 and len(values) == 1 and int(min(values)) > 0

    # x, y, and perhaps the size or level, which all tiles share.
    if least >= 4 and is_constant(-1) and is_constant(-2):
        return 4
    return 3 if is_constant(-1) else 2
