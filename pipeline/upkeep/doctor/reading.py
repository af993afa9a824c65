"""Readers and codecs: each is given something small and known to read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.text import one_line
from pipeline.slides.readers import readers_for
from pipeline.upkeep.doctor.finding import Finding, make_finding

_SIDE_PX = 512
_MOST_GREY_LEVELS = 12.0
"""How far, in the mean, pixels may be off that went through JPEG."""
_FIX = "make setup (or pip install --constraint constraints.txt --editable .) again"
Image = npt.NDArray[np.uint8]


def codec_findings() -> list[Finding]:
    """Every codec that slides, tiles and features need, encoded and decoded."""
    checks: dict[str, Callable[[Image], str]] = {
        "jpeg": partial(_check_imagecodecs, codec="jpeg8", most=_MOST_GREY_LEVELS, level=95),
        "jpeg2000": partial(_check_imagecodecs, codec="jpeg2k", most=0.0, reversible=True),
        "png": partial(_check_png, effort="small"),
        "png fast": partial(_check_png, effort="fast"),
        "parquet": _check_parquet,
    }
    image = _tissue_image()
    return [_run_check(f"codec {name}", partial(check, image)) for name, check in checks.items()]


def _tissue_image() -> Image:
    """A smooth picture in tissue's colours, so that a lossy codec stays near it."""
    y, x = np.mgrid[:_SIDE_PX, :_SIDE_PX] / _SIDE_PX
    waves = np.stack([np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))], axis=2)
    return (np.array([200, 140, 190]) + 35 * waves).astype(np.uint8)


def _check_imagecodecs(image: Image, codec: str, most: float, **options: object) -> str:
    import imagecodecs

    data = getattr(imagecodecs, f"{codec}_encode")(image, **options)
    return _pixel_problem(getattr(imagecodecs, f"{codec}_decode")(data), image, most)


def _pixel_problem(pixels: Image, expected: Image, most: float = _MOST_GREY_LEVELS) -> str:
    if pixels.shape != expected.shape:
        return f"pixels are {pixels.shape}, expected {expected.shape}"
    off = float(np.abs(pixels.astype(int) - expected).mean())
    return "" if off <= most else f"pixels are off by {off:.1f} grey levels"


def _check_png(image: Image, effort: str) -> str:
    from pipeline.dataset import decode_png, encode_png

    same = np.array_equal(decode_png(encode_png(image, effort=effort)), image)
    return "" if same else "a tile is not what was encoded"


def _check_parquet(image: Image) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"rank": pa.array(image[0, :, 0])})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, compression="zstd")
    back = pq.read_table(pa.BufferReader(sink.getvalue()), page_checksum_verification=True)
    return "" if back.equals(table) else "a table is not what was written"


def reader_findings(folder: Path, slide: Path | None = None) -> list[Finding]:
    """Each reader on a small tiled TIFF made in `folder`, or on the given slide.

    On the made one they must show what was written; of a slide, what `scan` would do is added.
    """
    path = slide or _write_tiff(folder / "slide.tiff")
    expected = None if slide else _tissue_image()
    findings = [
        _run_check(f"reader {name}", partial(_check_reader, path, name, expected))
        for name in readers_for(path)
    ]
    return [*findings, _scan_finding(slide)] if slide else findings


def _write_tiff(path: Path) -> Path:
    import tifffile

    tifffile.imwrite(
        path, _tissue_image(), tile=(256, 256), compression="jpeg", photometric="rgb",
        compressionargs={"level": 95}, resolution=(20_000, 20_000), resolutionunit=3,
    )  # fmt: skip
    return path


def _check_reader(path: Path, name: str, expected: Image | None) -> str:
    from pipeline.slides.open import open_slide

    with open_slide(path, name) as reader:
        side = min(_SIDE_PX, reader.levels[0].width, reader.levels[0].height)
        pixels = reader.read(0, 0, 0, side, side)
    return "" if expected is None else _pixel_problem(pixels, expected)


def _scan_finding(slide: Path) -> Finding:
    """What `scan` would record of the slide."""
    from pipeline.slides.open import best_reader
    from pipeline.slides.resolution import resolve_mpp

    subject = f"slide {slide.name}"
    try:
        reader, why = best_reader(slide)
        with reader:
            mpp = resolve_mpp(reader.resolution, table=None, assumed=None)
            size = f"{reader.levels[0].width}x{reader.levels[0].height} px"
            result = f"{reader.vendor}, {size}, {mpp.value:.4f} µm/px, read by {reader.name}"
    except UserError as error:
        return Finding(subject, "bad", str(error), "see docs/slides.md")
    return Finding(subject, "ok", result + (f" ({why})" if why else ""))


def _run_check(subject: str, check: Callable[[], str]) -> Finding:
    try:
        problem = check()
    except Exception as error:  # what a broken library raises is a finding, not the end
        problem = f"{type(error).__name__}: {one_line(error, 160)}"
    return make_finding(subject, "works", problem, _FIX)
