"""Resolution in the text that a slide's file describes itself with: Aperio's, and OME-XML."""

import re
from dataclasses import replace

from pipeline.slides.reader import ResolutionTags

_APERIO_VALUE = r"\b{}\s*=\s*([0-9]+(?:[.,][0-9]*)?(?:e[+-]?[0-9]+)?)"
_APERIO_MPP = re.compile(_APERIO_VALUE.format("MPP"), re.IGNORECASE)
_APERIO_POWER = re.compile(_APERIO_VALUE.format("AppMag"), re.IGNORECASE)
_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
_OME_OBJECTIVE = re.compile(r"<(?:\w+:)?Objective\b[^>]*>")
_ATTRIBUTE = re.compile(r"""\b(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_UNIT_IN_UM = {
    "": 1.0, "µm": 1.0, "\u03bcm": 1.0, "um": 1.0, "micron": 1.0, "micrometer": 1.0,
    "pm": 1e-6, "nm": 1e-3, "å": 1e-4, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25_400.0,
}  # fmt: skip
"""OME's units of length; one that is left out is µm."""
_SAME_VALUE = 1e-6


def read_description(
    tags: ResolutionTags, text: str, vendor: str, width: int, height: int
) -> ResolutionTags:
    """The tags with what the description of a slide states further.

    `width` and `height` are level 0's, in px: OME-XML may describe several images.
    """
    if vendor == "aperio":
        return _read_aperio(tags, text)
    if "<" in text and "Pixels" in text:
        return _read_ome(tags, text, width, height)
    return tags


def _read_aperio(tags: ResolutionTags, text: str) -> ResolutionTags:
    # A header written twice, by two programs, may state two resolutions.
    values = [_to_number(match) for match in _APERIO_MPP.findall(text)]
    used = tags.vendor[0] if tags.vendor else 0.0
    others = tuple((v, v) for v in values if used and v and abs(v / used - 1) > _SAME_VALUE)
    power = _APERIO_POWER.search(text)
    magnification = _to_number(power[1]) if power else None
    # What OpenSlide calls the objective's power is this same number.
    return replace(tags, others=others, magnification=magnification or None, lens=None)


def _read_ome(tags: ResolutionTags, text: str, width: int, height: int) -> ResolutionTags:
    images = [_attributes(element) for element in _OME_PIXELS.findall(text)]
    size = (str(width), str(height))
    same = [image for image in images if (image.get("SizeX"), image.get("SizeY")) == size]
    found = {_physical_size(image) for image in same} - {None}
    # Images of one size that differ in resolution say nothing of which is the slide.
    ome = found.pop() if len(found) == 1 else None
    lenses = {
        _to_number(_attributes(element).get("NominalMagnification", ""))
        for element in _OME_OBJECTIVE.findall(text)
    } - {0.0}
    return replace(tags, ome=tags.ome or ome, lens=lenses.pop() if len(lenses) == 1 else tags.lens)


def _attributes(element: str) -> dict[str, str]:
    return {name: one or other for name, one, other in _ATTRIBUTE.findall(element)}


def _physical_size(pixels: dict[str, str]) -> tuple[float, float] | None:
    """µm per pixel in x and y; None where a number or a known unit is missing."""
    sizes = []
    for axis in "XY":
        value = _to_number(pixels.get(f"PhysicalSize{axis}", ""))
        # Some writers put UTF-8 into text that others read as Latin-1.
        unit = pixels.get(f"PhysicalSize{axis}Unit", "").replace("Â", "").strip().lower()
        scale = _UNIT_IN_UM.get(unit)
        if not value or scale is None:
            return None
        sizes.append(value * scale)
    return sizes[0], sizes[1]


def _to_number(text: str) -> float:
    """The number, with a point or a comma; 0 for what is none."""
    try:
        return max(0.0, float(text.replace(",", ".")))
    except ValueError:
        return 0.0
