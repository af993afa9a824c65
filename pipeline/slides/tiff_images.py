"""Which images a TIFF file has, and which of them is the slide.

A file may begin with its label (which can carry a patient's name), have several regions, focal
planes, or channels stored as pages of their own. Everything here is read from directories and
OME-XML; no pixels.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tifffile

from common.text import list_some, one_line
from pipeline.slides.reader import SlideOpenError

OTHER_VENDORS = ("ndpi", "philips", "scn", "bif", "qpi", "stk", "lsm", "ventana")
"""Formats with their own rules for levels and gaps, which OpenSlide knows (tifffile's `is_*`)."""

JPEG = 7
_RGB, _YCBCR = 2, 6
_MINISWHITE, _MINISBLACK = 0, 1
_DECODED_TO_RGB = frozenset({JPEG, 34892, 33007, 50001, 50002, 52546, 33003})
"""Compressions whose decoders return RGB also where the file calls it YCbCr."""
_PHOTOMETRIC = {
    0: "grey (white is zero)", 1: "grey", 2: "RGB", 3: "palette colours", 4: "a mask",
    5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "a colour filter array",
    32844: "LogL", 32845: "LogLuv",
}  # fmt: skip
_SAMPLE_KIND = {2: "signed", 3: "float", 5: "complex", 6: "complex"}
_EXTRA_ASSOCIATED, _EXTRA_UNASSOCIATED = 1, 2
_ASSOCIATED = re.compile(
    r"(?<![a-z])(label|macro|thumb|thumbnail|overview|barcode|preview)s?"
    r"([ _-]*(image|img|picture))?[ _-]*(\d+\s*x\s*\d+|\d*)(\.[a-z]{3,4})?$"
)
"""Names that end in these words: "Label-free imaging" is none."""
_APERIO_ASSOCIATED = re.compile(r"^\s*(label|macro)\s+\d+\s*x\s*\d+", re.MULTILINE)
_ROUNDED_PX = 1.5
_MOST_PLANES = 100_000
_OME_COUNTS = ("SizeZ", "SizeC", "SizeT")
_OME_PLACES = frozenset({"IFD", "PlaneCount", "NumPlanes"})
_NAME_LETTERS = 60
_UM_PER_UNIT = {
    "pm": 1e-6, "nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "dm": 1e5,
    "m": 1e6, "Å": 1e-4, "in": 25_400.0, "inch": 25_400.0,
}  # fmt: skip

Pages = tuple[Any, ...]
"""The pages of one plane of one level: a single one, or three channels."""


@dataclass(frozen=True)
class TiffImage:
    """One image of a file: `levels[level][plane]` are its pages, the finest level first.

    `planes` names its focal planes and time points; `unfit` says why it cannot be the slide; `mpp`
    is µm per px (x, y) of OME-XML.
    """

    index: int
    name: str
    levels: tuple[tuple[Pages, ...], ...]
    planes: tuple[str, ...] = ("",)
    unfit: str = ""
    mpp: tuple[float, float] | None = None

    @property
    def base(self) -> Any:
        """The first page of the finest level."""
        return self.levels[0][0][0]

    @property
    def layout(self) -> Any:
        """The page that says how level 0 is stored."""
        return self.base.keyframe

    @property
    def area(self) -> int:
        """Pixels at level 0."""
        return int(self.layout.imagewidth) * int(self.layout.imagelength)

    @property
    def is_associated(self) -> bool:
        """Whether its name is that of a label, macro or thumbnail."""
        return bool(_ASSOCIATED.search(self.name.lower()))

    @property
    def key(self) -> str:
        """`index:name`, or the index alone where it has no name."""
        return f"{self.index}:{self.name}" if self.name else str(self.index)

    def __str__(self) -> str:
        size = f"{self.layout.imagewidth}x{self.layout.imagelength} px"
        planes = f", planes {self.planes[0]} to {self.planes[-1]}" if len(self.planes) > 1 else ""
        unfit = f", {self.unfit}" if self.unfit else ""
        return f"{self.key} ({size}{planes}{unfit})"


@dataclass(frozen=True)
class TiffChoice:
    """The image of a file that is the slide, and how other readers fare with it.

    `series` reopens the same image, '' where it is what the file begins with. `only_native` says
    why other readers would show something else, '' where they would not.
    """

    image: TiffImage
    plane: int
    series: str
    notes: tuple[str, ...]
    only_native: str
    left_out: tuple[Any, ...] = field(default=())

    @property
    def is_misshown(self) -> bool:
        """Whether readers show samples of this depth as something else than they are."""
        return bool(describe_depth(self.image.layout))

    @property
    def levels(self) -> list[Pages]:
        """The pages of each level of the chosen plane."""
        return [planes[self.plane] for planes in self.image.levels if self.plane < len(planes)]


def is_own_format(tiff: tifffile.TiffFile) -> str:
    """The vendor whose own rules the file follows, '' for Aperio, OME-TIFF and plain TIFF."""
    return next((name for name in OTHER_VENDORS if getattr(tiff, f"is_{name}", False)), "")


def choose_in_file(path: Path, series: str = "") -> TiffChoice | None:
    """The image of the file that is the slide; None for what is no TIFF of a kind known here.

    Raises `SlideOpenError` where no image can be the slide, or `series` names none.
    """
    if path.is_dir():
        return None
    try:
        # Pages in other files are not looked for: a slide is one file.
        with tifffile.TiffFile(path, _multifile=False) as tiff:
            require_sane_ome(tiff, path.parent)
            return None if is_own_format(tiff) else choose_image(tiff, series)
    except SlideOpenError:
        raise
    except Exception:
        # tifffile raises many kinds for damaged headers: the readers say what is wrong.
        return None


def require_sane_ome(tiff: tifffile.TiffFile, folder: Path) -> None:
    """Refuse OME-XML that speaks of more planes than any file has, or of pipes as other files.

    Readers make a list of as many planes as are stated.
    """
    xml = tiff.ome_metadata if tiff.is_ome else None
    try:
        elements = ElementTree.fromstring(xml or "<none/>").iter()
    except ElementTree.ParseError:
        return
    for element in elements:
        attributes = element.attrib
        numbers = [attributes.get(name, "1") for name in _OME_COUNTS]
        planes = math.prod(int(number) for number in numbers if number.isdecimal())
        planes = max(planes, *(int(v) for v in _ome_places(attributes)), _modulo_steps(attributes))
        if planes > _MOST_PLANES:
            raise SlideOpenError(f"its OME-XML speaks of {planes:,} planes")
        name = attributes.get("FileName", "")
        if name and (other := folder / name).exists() and not other.is_file():
            raise SlideOpenError(f"its OME-XML names {one_line(name, 60)}, which is no file")


def _ome_places(attributes: dict[str, str]) -> Iterator[str]:
    yield "0"
    for name, value in attributes.items():
        if (name in _OME_PLACES or name.startswith("First")) and value.strip().isdecimal():
            yield value.strip()


def _modulo_steps(attributes: dict[str, str]) -> int:
    """How many places an axis of OME's Modulo has."""
    try:
        start, end = float(attributes["Start"]), float(attributes["End"])
        return int(abs(end - start) / abs(float(attributes.get("Step", "1"))))
    except (KeyError, ValueError):
        return 0
    except (ZeroDivisionError, OverflowError):
        return _MOST_PLANES + 1


def choose_image(tiff: tifffile.TiffFile, series: str = "") -> TiffChoice:
    """The largest image that may be the slide, or the one that `series` names.

    `series` is an index, a name or `index:name`, with `/z1` behind it for a plane.
    """
    images = list_images(tiff)
    image, plane = _named_image(images, series) if series else (_largest_image(images), 0)
    pages = image.levels[0][plane]
    key = f"{image.key}/{image.planes[plane]}" if plane else image.key
    if plane:
        only_native = f"it shows the first plane, not {key}"
    elif image.base.index != 0:
        only_native = f"it shows what the file begins with, not image {image}"
    else:
        is_apart = len(pages) > 1 and not image.unfit
        only_native = "it shows one channel of three" if is_apart else ""
        key = ""
    # A file of one image needs no name for it.
    key = "" if len(images) == 1 and not plane else key
    notes = tuple(_choice_notes(images, image, plane))
    left_out = tuple(_unused_pages(tiff, image, plane)) if tiff.is_svs else ()
    return TiffChoice(image, plane, key, notes, only_native, left_out)


def _largest_image(images: Sequence[TiffImage]) -> TiffImage:
    fit = [image for image in images if not image.unfit]
    if fit:
        return max(fit, key=lambda image: image.area)
    # Grey, palettes and the like: what the file begins with is shown, as the readers can.
    if images and images[0].base.index == 0 and not images[0].is_associated:
        return images[0]
    listed = list_some([str(image) for image in images]) or "none"
    raise SlideOpenError(f"no image of the file can be the slide; it has {listed}")


def _named_image(images: Sequence[TiffImage], series: str) -> tuple[TiffImage, int]:
    """The image and the plane that a user, or `slides.parquet`, names."""
    found = []
    for image in images:
        for plane, label in enumerate(image.planes):
            names = {image.key, str(image.index), image.name} - {""}
            tails = {f"/{label}"} | ({""} if plane == 0 else set())
            if series in {name + tail for name in names for tail in tails}:
                found.append((image, plane))
    listed = list_some([str(image) for image in images])
    if not found:
        raise SlideOpenError(f"no series '{one_line(series, 60)}'; the file has {listed}")
    if len(found) > 1:
        raise SlideOpenError(
            f"series '{one_line(series, 60)}' names several images; the file has {listed}"
        )
    image = found[0][0]
    if image.is_associated:
        raise SlideOpenError(
            f"series {image} is never tiled, since labels may carry a patient's name; "
            f"the file has {listed}"
        )
    return found[0]


def _choice_notes(images: Sequence[TiffImage], image: TiffImage, plane: int) -> Iterator[str]:
    others = [
        other
        for other in images
        if other is not image and not other.unfit and not _is_reduction(other.layout, image.layout)
    ]
    if others or (image.base.index != 0 and len(images) > 1):
        passed = list_some([str(other) for other in images if other is not image], 5)
        yield f"image {image} of the file is read, not {passed}"
    if len(image.planes) > 1:
        another = image.planes[0 if plane else -1]
        yield (
            f"plane {image.planes[plane]} is read, one of {len(image.planes)} "
            f"(--series {image.index}/{another} would read another)"
        )
    if len(image.levels[0][plane]) > 1 and not image.unfit:
        yield "its three channels, stored apart, are read as red, green and blue"
    if image.layout.dtype == "uint16":
        yield "16 bits per sample are scaled to 8 (divided by 257)"


def _is_reduction(page: Any, base: Any) -> bool:
    """Whether the page may be a smaller copy, by its proportions."""
    factor = base.imagewidth / page.imagewidth
    off = base.imagelength / factor - page.imagelength
    return factor > 1 and bool(abs(off) <= _ROUNDED_PX)


def list_images(tiff: tifffile.TiffFile) -> list[TiffImage]:
    """The images of a file in its order, each with its levels and planes."""
    if tiff.is_ome:
        try:
            images = _list_ome(tiff)
        except (ValueError, KeyError, IndexError, ElementTree.ParseError):
            images = []  # XML that contradicts the file: its pages remain
        if images:
            return images
    pages: list[Any] = [p.aspage() if isinstance(p, tifffile.TiffFrame) else p for p in tiff.pages]
    if tiff.is_svs:
        return _list_aperio(pages)
    return _list_plain(pages)


def _list_aperio(pages: list[Any]) -> list[TiffImage]:
    """One image of the tiled pages; thumbnail, label and macro are pictures of it."""
    by_size: dict[tuple[int, int], list[Any]] = {}
    for page in pages:
        if page.is_tiled and not _APERIO_ASSOCIATED.search(str(page.description)):
            by_size.setdefault((page.imagewidth, page.imagelength), []).append(page)
    if not by_size:
        raise SlideOpenError("no tiled image in the file")
    # Stable: pages of one width stay in the file's order.
    sizes = sorted(by_size, key=lambda size: -size[0])
    count = len(by_size[sizes[0]])
    levels = []
    for size in sizes:
        group = by_size[size]
        levels.append(tuple((page,) for page in (group if len(group) == count else group[:1])))
    planes = tuple(f"z{plane}" for plane in range(count)) if count > 1 else ("",)
    image = TiffImage(0, "", tuple(levels), planes, describe_layout(levels[0][0]))
    return [image]


def _unused_pages(tiff: tifffile.TiffFile, image: TiffImage, plane: int) -> Iterator[Any]:
    """Tiled pages that OpenSlide takes for levels and that are not of this plane."""
    used = {page.index for planes in image.levels for page in planes[min(plane, len(planes) - 1)]}
    pages: list[Any] = list(tiff.pages)
    yield from (page for page in pages if page.is_tiled and page.index not in used)


def _list_plain(pages: list[Any]) -> list[TiffImage]:
    """Pages without the flag of a reduced copy are images, those with it are their levels."""
    bases = [page for page in pages if not page.is_reduced]
    if not bases:
        bases = [max(pages, key=lambda page: page.imagewidth * page.imagelength)]
    levels: dict[int, list[Any]] = {base.index: [base] for base in bases}
    first = pages[0]
    for page in pages:
        if not page.is_reduced or page.index in levels or _is_associated_page(page):
            continue
        # Of a file with one image every tiled copy is a level, by the rule that OpenSlide follows.
        owner = bases[0] if len(bases) == 1 and bases[0] is first else _find_owner(page, bases)
        if owner is not None and page.is_tiled == owner.is_tiled:
            levels[owner.index].append(page)
    images = []
    for index, base in enumerate(bases):
        below = levels[base.index]
        if base is not first or not _opens_in_openslide(base):
            below += [page for page in base.pages or () if page.is_tiled == base.is_tiled]
        below.sort(key=lambda page: -page.imagewidth)
        image = TiffImage(
            index, _page_name(base), tuple(((page,),) for page in below),
            unfit=describe_layout((base,)),
        )  # fmt: skip
        images.append(_without_associated(image))
    return images


def _find_owner(page: Any, bases: Sequence[Any]) -> Any:
    """The image that a reduced page is a copy of: the nearest before it, else behind it."""
    alike = [base for base in bases if _is_reduction(page, base)]
    before = [base for base in alike if base.index < page.index]
    return before[-1] if before else next(iter(alike), None)


def _opens_in_openslide(page: Any) -> bool:
    """Whether OpenSlide opens a plain TIFF that begins with this page.

    It shows no SubIFDs. Slides that it reads keep the levels that it shows: their tiles stay.
    """
    page = page.keyframe
    return page.is_tiled and int(page.compression) in {1, 5, 7, 8, 32773, 32946, 50000}


def _is_associated_page(page: Any) -> bool:
    return bool(_ASSOCIATED.search(_page_name(page).lower()))


def _page_name(page: Any) -> str:
    """PageName, or a description that is short enough to be a name."""
    tag = page.tags.get(285)
    text = str(tag.value) if tag is not None else str(page.description)
    lines = text.strip().splitlines()
    short = len(lines) == 1 and len(text) <= _NAME_LETTERS and not re.search(r"[{}<>=]", text)
    return one_line(lines[0], _NAME_LETTERS) if short else ""


def _without_associated(image: TiffImage) -> TiffImage:
    if not image.is_associated:
        return image
    return TiffImage(
        image.index, image.name, image.levels, image.planes, "a label or the like",
        image.mpp,
    )  # fmt: skip


def _list_ome(tiff: tifffile.TiffFile) -> list[TiffImage]:
    """The images of OME-XML with their planes; SubIFDs are their levels."""
    sizes = _physical_sizes(str(tiff.ome_metadata or ""))
    images = []
    for index, series in enumerate(tiff.series):
        if series.kind != "ome":
            return []
        image = _ome_image(index, series, sizes[index] if len(sizes) == len(tiff.series) else None)
        if image is not None:
            images.append(_without_associated(image))
    return images


def _ome_image(index: int, series: Any, mpp: tuple[float, float] | None) -> TiffImage | None:
    axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    size = dict(zip(axes, shape, strict=True))
    outer = [axis for axis in axes if axis not in "YXSC"]
    channels = size.get("C", 1)
    # Pages are in the order of the axes before the picture's own.
    order = [axis for axis in axes if axis not in "YXS"]
    base: list[Any] = list(series.levels[0].pages)
    levels = []
    for number, level in enumerate(series.levels):
        pages: list[Any] = list(level.pages)
        if len(pages) != len(base) or None in pages:
            if number == 0:
                return None
            continue
        if number and channels == 1 and base[0].index == 0 and _opens_in_openslide(base[0]):
            break
        levels.append(tuple(_planes_of(pages, order, size, outer)))
    name = one_line(str(series.name or ""), _NAME_LETTERS).replace("/", "-")
    labels = tuple(_plane_labels(outer, size))
    unfit = describe_layout(levels[0][0]) if channels > 1 else describe_layout((base[0],))
    return TiffImage(index, name, tuple(levels), labels, unfit, mpp)


def _planes_of(
    pages: Sequence[Any], order: Sequence[str], size: dict[str, int], outer: Sequence[str]
) -> Iterator[Pages]:
    """The pages of each plane: one for each channel."""
    steps, step = {}, 1
    for axis in reversed(order):
        steps[axis] = step
        step *= size[axis]
    if step != len(pages):
        raise ValueError(f"OME-XML speaks of {step} pages, the file has {len(pages)}")
    for places in product(*(range(size[axis]) for axis in outer)):
        start = sum(place * steps[axis] for place, axis in zip(places, outer, strict=True))
        count = size.get("C", 1)
        yield tuple(pages[start + channel * steps.get("C", 0)] for channel in range(count))


def _plane_labels(outer: Sequence[str], size: dict[str, int]) -> Iterator[str]:
    """`z2`, `t0z2`: the place along each axis that has several.

    >>> list(_plane_labels(["T", "Z"], {"T": 1, "Z": 2}))
    ['z0', 'z1']
    """
    several = [axis for axis in outer if size[axis] > 1]
    for places in product(*(range(size[axis]) for axis in several)):
        yield "".join(f"{a.lower()}{place}" for a, place in zip(several, places, strict=True))


def _physical_sizes(xml: str) -> list[tuple[float, float] | None]:
    """µm per px (x, y) of each image of OME-XML, None where it has none."""
    sizes = []
    for element in ElementTree.fromstring(xml):
        if element.tag.rpartition("}")[2] != "Image":
            continue
        pixels = next((e for e in element if e.tag.rpartition("}")[2] == "Pixels"), None)
        sizes.append(None if pixels is None else _physical_size(pixels.attrib))
    return sizes


def _physical_size(attributes: dict[str, str]) -> tuple[float, float] | None:
    values = []
    for axis in "XY":
        unit = _UM_PER_UNIT.get(attributes.get(f"PhysicalSize{axis}Unit", "µm"))
        try:
            value = float(attributes.get(f"PhysicalSize{axis}", ""))
        except ValueError:
            return None
        if unit is None or not value > 0:
            return None
        values.append(value * unit)
    return values[0], values[1]


def describe_layout(pages: Pages) -> str:
    """Why pixels of this layout are no RGB of a brightfield slide, '' where they are.

    RGB of 8 or 16 bits, with or without alpha, interleaved or in planes; three pages of one
    channel each are RGB too.
    """
    page = pages[0].keyframe
    depth = describe_depth(page)
    if depth:
        return depth
    if int(page.bitspersample) not in (8, 16):
        bits = int(page.bitspersample)
        return f"samples of {bits} bit{'s' if bits > 1 else ''}"
    photometric, samples = int(page.photometric), int(page.samplesperpixel)
    if len(pages) > 1:
        is_rgb = len(pages) == 3 and samples == 1 and photometric == _MINISBLACK
        return "" if is_rgb else f"{len(pages)} channels in pages of their own"
    if photometric == _YCBCR and int(page.compression) not in _DECODED_TO_RGB:
        return f"YCbCr in TIFF compression {int(page.compression)}"
    if photometric not in (_RGB, _YCBCR):
        words = _PHOTOMETRIC.get(photometric, f"photometric {photometric}")
        return words if samples == 1 else f"{words} of {samples} samples"
    if samples not in (3, 4):
        return f"{samples} samples per pixel"
    return ""


def describe_depth(page: Any) -> str:
    """Why samples of this depth are shown by no reader ("32-bit float"), '' for 1 to 16 bits."""
    bits = int(page.bitspersample)
    kind = _SAMPLE_KIND.get(int(page.sampleformat or 1), "")
    return f"{bits}-bit {kind or 'integer'} samples" if kind or bits > 16 else ""
