"""Readers and codecs: each is given something small and known to read."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.upkeep.doctor.finding import Finding, judged

_SIDE_PX = 512
_ASK = "make setup (or pip install --constraint constraints.txt --editable .) again"
Image = npt.NDArray[np.uint8]


def codec_findings() -> list[Finding]:
    """Every codec that slides, tiles and features need, forth and back."""
    image = _picture()
    return [_tried(f"codec {name}", partial(check, image)) for name, check in _codecs()]


def _codecs() -> Iterator[tuple[str, Callable[[Image], str]]]:
    yield "jpeg", partial(_by_imagecodecs, name="jpeg8", tolerance=12.0)
    yield "jpeg2000", partial(_by_imagecodecs, name="jpeg2k", tolerance=0.0)
    yield "png", _png
    yield "png fast", partial(_png, effort="fast")
    yield "parquet", _parquet


def _picture() -> Image:
    """A smooth picture in tissue's colours, so that a lossy codec stays near it."""
    y, x = np.mgrid[:_SIDE_PX, :_SIDE_PX] / _SIDE_PX
    waves = np.stack([np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))], axis=2)
    return (np.array([200, 140, 190]) + 35 * waves).astype(np.uint8)


def _by_imagecodecs(image: Image, name: str, tolerance: float) -> str:
    import imagecodecs

    options: dict[str, Any] = {"level": 95} if name == "jpeg8" else {"reversible": True}
    data = getattr(imagecodecs, f"{name}_encode")(image, **options)
    back = getattr(imagecodecs, f"{name}_decode")(data)
    off = float(np.abs(back.astype(int) - image).mean())
    return "" if back.shape == image.shape and off <= tolerance else f"off by {off:.1f} grey levels"


def _png(image: Image, effort: str = "small") -> str:
    from pipeline.dataset import decode_png, encode_png

    same = np.array_equal(decode_png(encode_png(image, effort=effort)), image)
    return "" if same else "a tile is not what was encoded"


def _parquet(image: Image) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"rank": pa.array(image[0, :, 0])})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, compression="zstd")
    back = pq.read_table(pa.BufferReader(sink.getvalue()), page_checksum_verification=True)
    return "" if back.equals(table) else "a table is not what was written"


def reader_findings(folder: Path, slide: Path | None = None) -> list[Finding]:
    """Each reader on a small tiled TIFF made in `folder`, or on the given slide.

    They must agree: on the made one with what was written, on a slide with the reader that
    stages would choose.
    """
    path = slide or _made_slide(folder / "slide.tiff")
    names = ("openslide", "tiffslide", "native")
    expected = None if slide else _picture()
    return [_tried(f"reader {name}", partial(_read, path, name, expected)) for name in names] + (
        [_chosen(slide)] if slide else []
    )


def _made_slide(path: Path) -> Path:
    import tifffile

    tifffile.imwrite(
        path, _picture(), tile=(256, 256), compression="jpeg", photometric="rgb",
        compressionargs={"level": 95}, resolution=(20_000, 20_000), resolutionunit=3,
    )  # fmt: skip
    return path


def _read(path: Path, name: str, expected: Image | None) -> str:
    from pipeline.slides.open import open_slide

    with open_slide(path, name) as reader:
        side = min(_SIDE_PX, reader.levels[0].width, reader.levels[0].height)
        pixels = reader.read(0, 0, 0, side, side)
    if expected is None:
        return ""
    off = float(np.abs(pixels.astype(int) - expected).mean())
    return "" if off < 12 else f"pixels are off by {off:.1f} grey levels"


def _chosen(slide: Path) -> Finding:
    """What `scan` would say of the slide."""
    from common.errors import UserError
    from pipeline.slides.open import best_reader
    from pipeline.slides.resolution import resolve_mpp

    subject = f"slide {slide.name}"
    try:
        reader, why = best_reader(slide)
        with reader:
            mpp = resolve_mpp(reader.resolution, table=None, assumed=None)
            size = f"{reader.levels[0].width}x{reader.levels[0].height} px"
            found = f"{reader.vendor}, {size}, {mpp.value:.4f} µm/px, read by {reader.name}"
    except UserError as error:
        return Finding(subject, "bad", str(error), "see docs/slides.md")
    return Finding(subject, "ok", found + (f" ({why})" if why else ""))


def _tried(subject: str, check: Callable[[], str]) -> Finding:
    """Run a check; what a broken library raises is a finding, not the end."""
    try:
        problem = check()
    except Exception as error:  # whatever a broken library raises is what is to be found out
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return judged(subject, "works", problem, _ASK)
