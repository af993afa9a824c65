"""How good the classical detector is, on real pictures: the figures of docs/tissue.md, again.

Reference polygons were drawn by hand before the detector existed (tests/data/tissue); the
pictures themselves are free only for the committed slide, the others are development data.
"""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from PIL import Image

from pipeline.tissue.classes import TissueClass
from pipeline.tissue.colour import (
    NotHematoxylinEosinError,
    density_over_glass,
    optical_density,
    smooth_density,
)
from pipeline.tissue.detect import DetectorConfig, classify_density, detect_tissue
from pipeline.tissue.focus import FocusConfig, PatchSource, mark_out_of_focus, measure_sharpness
from pipeline.tissue.glass import estimate_glass, glass_level

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = ROOT / "tests" / "data" / "tissue"
DOCUMENT = ROOT / "docs" / "tissue.md"
CONFIG = DetectorConfig()
FOCUS = FocusConfig()
THUMBNAILS = (
    "21-rgb", "498-rgb", "pink-and-purple-slide", "slide-pen", "tcga-green-pen", "wsi-blue-pen",
)  # fmt: skip
WITHOUT_TISSUE = (
    "almost-white-1", "almost-white-2", "no-tissue", "no-tissue2", "no-tissue-line",
    "no-tissue-green-pen", "no-tissue-red-pen",
)  # fmt: skip
WITH_TISSUE = {
    "high-nuclei-score-level2": 0.14,
    "high-nuclei-score-red-pen-level1": 0.75,
    "low-nuclei-score-level1": 0.75,
    "medium-nuclei-score-green-pen-level1": 0.3,
    "medium-nuclei-score-level1": 0.55,
    "very-low-nuclei-score-red-pen-level1": 0.25,
}
"""Least share of the picture that is unmarked tissue: these show glass, fat and ink as well."""


def picture(path: Path) -> np.ndarray:
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def cmu_picture(cmu_slide: Path) -> np.ndarray:
    slide = openslide.OpenSlide(cmu_slide)
    return np.array(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def shrunk(image: np.ndarray, um_per_px: float, target: float = 8.0) -> tuple[np.ndarray, float]:
    """Reduced by the integer factor that comes nearest to the target; never enlarged."""
    factor = max(1, round(target / um_per_px))
    size = (image.shape[1] // factor, image.shape[0] // factor)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), um_per_px * factor


def painted(polygons: list, shape: tuple[int, ...], scale: float) -> np.ndarray:
    canvas = np.zeros(shape, np.uint8)
    for polygon in polygons:
        corners = np.round(np.array(polygon) * scale * 16).astype(np.int32)
        cv2.fillPoly(canvas, [corners], 1, shift=4)
    return canvas.astype(bool)


def measured(name: str, image: np.ndarray) -> dict[str, float]:
    """Tissue IoU, share of unmarked tissue kept, pen recall; what was left unjudged is left out."""
    reference = json.loads((REFERENCES / f"{name}.json").read_text())
    assert image.shape[:2] == (reference["height"], reference["width"])
    small, um_per_px = shrunk(image, reference["um_per_px"])
    mask = detect_tissue(small, um_per_px, CONFIG).mask
    scale = reference["um_per_px"] / um_per_px
    areas = {
        key: painted(reference[key], mask.shape, scale)
        for key in ("tissue", "holes", "pen", "ignore")
    }
    tissue = areas["tissue"] & ~areas["holes"] & ~areas["pen"]
    judged = ~areas["ignore"] | tissue | areas["pen"]
    found = ((mask == TissueClass.TISSUE) | (mask == TissueClass.FOLD)) & judged
    figures = {
        "iou": (found & tissue).sum() / (found | tissue).sum(),
        "kept": (found & tissue).sum() / tissue.sum(),
    }
    if reference["pen"]:
        figures["pen"] = ((mask == TissueClass.PEN) & areas["pen"]).sum() / areas["pen"].sum()
    return {key: float(value) for key, value in figures.items()}


def documented(section: str) -> dict[str, list[float | None]]:
    """The rows of the table under a heading of docs/tissue.md, as numbers ('–' as None)."""
    text = DOCUMENT.read_text().partition(f"### {section}\n")[2].partition("\n##")[0]
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        values = [re.sub(r"[ %]", "", cell) for cell in cells[1:]]
        if line.startswith("|") and all(re.fullmatch(r"[\d.]+|–", value) for value in values):
            rows[cells[0]] = [None if value == "–" else float(value) for value in values]
    assert rows, f"no table under '{section}' in {DOCUMENT.name}"
    return rows


def check_against_document(name: str, figures: dict[str, float]) -> None:
    iou, kept, pen = documented("Against polygons drawn by hand")[name]
    assert figures["iou"] == pytest.approx(iou, abs=0.01)
    assert figures["kept"] == pytest.approx(kept, abs=0.01)
    assert (figures.get("pen") is None) == (pen is None)
    if pen is not None:
        assert figures["pen"] == pytest.approx(pen, abs=0.01)
        assert figures["pen"] >= 0.9
    assert figures["iou"] >= 0.85
    assert figures["kept"] >= 0.9


def test_the_committed_slide_against_polygons_drawn_by_hand(cmu_slide):
    image = cmu_picture(cmu_slide)
    check_against_document("CMU-1-Small-Region", measured("CMU-1-Small-Region", image))


@pytest.mark.parametrize("name", THUMBNAILS)
def test_thumbnails_against_polygons_drawn_by_hand(name, shared_data):
    image = picture(shared_data / "pen_thumbnails" / f"{name}.png")
    check_against_document(name, measured(name, image))


def tile_shares(shared_data: Path, name: str) -> np.ndarray:
    """Share of each class on a labelled tile, taken to be 1 µm per pixel and seen at 8."""
    image = picture(shared_data / "labelled_tiles" / f"{name}.png")
    small, um_per_px = shrunk(image, 1.0)
    density = smooth_density(
        density_over_glass(small, estimate_glass(small)), CONFIG.sigma_um / um_per_px
    )
    mask = classify_density(density, um_per_px, CONFIG)
    return np.bincount(mask.ravel(), minlength=len(TissueClass)) / mask.size


@pytest.mark.parametrize("name", WITHOUT_TISSUE)
def test_tiles_without_tissue_are_glass_or_pen(name, shared_data):
    shares = tile_shares(shared_data, name)
    assert shares[TissueClass.TISSUE] + shares[TissueClass.FOLD] < 0.01
    if "pen" in name:
        assert shares[TissueClass.PEN] > 0.7
    else:
        assert shares[TissueClass.BACKGROUND] > (0.95 if "line" in name else 0.98)


@pytest.mark.parametrize("name", WITH_TISSUE)
def test_tiles_with_tissue_are_tissue(name, shared_data):
    shares = tile_shares(shared_data, name)
    assert shares[TissueClass.TISSUE] + shares[TissueClass.FOLD] >= WITH_TISSUE[name]
    assert (shares[TissueClass.PEN] > 0.1) == ("pen" in name)


def tiles_of_tcga(shared_data: Path) -> list[np.ndarray]:
    return [picture(path) for path in sorted((shared_data / "tiles_224").glob("*.png"))]


def test_real_tiles_of_many_hospitals_are_tissue_and_never_pen(shared_data):
    """44 regions of 10 projects and 32 hospitals, none of them looked at while tuning."""
    groups: dict[str, list[Path]] = {}
    for path in sorted((shared_data / "tiles_224").glob("*.png")):
        groups.setdefault(path.stem.rsplit("_", 2)[0], []).append(path)
    assert len(groups) == 44
    shares = []
    for paths in groups.values():
        tiles = [picture(path) for path in paths]
        region = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
        small, um_per_px = shrunk(region, 0.5)
        density = smooth_density(
            density_over_glass(small, estimate_glass(small)), CONFIG.sigma_um / um_per_px
        )
        mask = classify_density(density, um_per_px, CONFIG)
        shares.append(np.bincount(mask.ravel(), minlength=len(TissueClass)) / mask.size)
    mean = np.mean(shares, 0)
    assert mean[TissueClass.TISSUE] + mean[TissueClass.FOLD] > 0.99
    assert np.max(shares, 0)[TissueClass.PEN] == 0


INKS = {
    "red": (0.08, 1.0, 0.85),
    "green": (0.6, 0.2, 0.25),
    "blue": (0.6, 0.3, 0.08),
    "black": (1.1, 1.1, 1.1),
}
"""Optical densities (R, G, B): the first three as on the thumbnails, black as neutral ink."""


@pytest.mark.parametrize("ink", INKS)
def test_synthetic_strokes_across_the_committed_slide(ink, cmu_slide):
    """Ink laid over real tissue and glass: absorption adds up. The only data for black."""
    small, um_per_px = shrunk(cmu_picture(cmu_slide), 0.499)
    before = detect_tissue(small, um_per_px, CONFIG).mask
    stroke = np.zeros(small.shape[:2], np.float32)
    cv2.line(stroke, (0, 40), (137, 140), 1.0, thickness=24)
    soft = cv2.GaussianBlur(stroke, (0, 0), 1.5)
    absorbed = 10 ** -(soft[..., None] * np.array(INKS[ink]))
    inked = np.clip(np.round(small * absorbed), 0, 255).astype(np.uint8)
    mask = detect_tissue(inked, um_per_px, CONFIG).mask
    recall = (mask[stroke > 0] == TissueClass.PEN).mean()
    unmarked = (before == TissueClass.TISSUE) & (cv2.GaussianBlur(stroke, (0, 0), 4) < 0.01)
    kept = np.isin(mask[unmarked], (TissueClass.TISSUE, TissueClass.FOLD)).mean()
    expected = documented("Synthetic strokes on the committed slide")[ink]
    assert [recall, kept] == pytest.approx(expected, abs=0.01)
    assert recall >= 0.9
    assert kept >= 0.9


def defocused(rgb: np.ndarray, radius_um: float, um_per_px: float) -> np.ndarray:
    """Geometric defocus: each point becomes a disc, in transmitted light (not in density)."""
    radius = radius_um / um_per_px
    if radius <= 0:
        return rgb
    half, fine = int(np.ceil(radius)) + 1, 8
    axis = (np.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    inside = (axis[:, None] ** 2 + axis[None] ** 2 <= radius**2).astype(np.float64)
    disc = inside.reshape(2 * half + 1, fine, 2 * half + 1, fine).mean((1, 3))
    light = cv2.filter2D(rgb.astype(np.float64), -1, disc / disc.sum())
    return np.clip(np.round(light), 0, 255).astype(np.uint8)


def jpeg(rgb: np.ndarray) -> np.ndarray:
    data = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


@pytest.mark.full
def test_blur_on_synthetically_defocused_tiles(shared_data):
    """176 tiles taken to be 0.5 mpp, defocused, compressed like a slide, seen at 1 µm."""
    tiles = tiles_of_tcga(shared_data)
    assert len(tiles) == 176
    for radius, (expected,) in documented("Blur on synthetically defocused tiles").items():
        values = [
            measure_sharpness(
                shrunk(jpeg(defocused(t, float(radius), 0.5)), 0.5, 1.0)[0], 1.0, FOCUS.min_contrast
            )
            for t in tiles
        ]
        found = 100 * np.mean(np.array(values) < FOCUS.min_sharpness)
        assert found == pytest.approx(expected, abs=2), radius
        if float(radius) == 0:
            assert found <= 1
        if float(radius) >= 4:
            assert found >= 95


def test_a_slide_half_out_of_focus(cmu_slide):
    image = cmu_picture(cmu_slide)
    overview, um_per_px = shrunk(image, 0.499)
    mask = detect_tissue(overview, um_per_px, CONFIG).mask
    half = image.shape[0] // 2
    spoiled = image.copy()
    spoiled[half:] = defocused(image[half:], 5.0, 0.499)
    side = round(FOCUS.patch_um / 0.998)

    def read(pixels: np.ndarray, x_um: float, y_um: float) -> np.ndarray:
        x, y = round(x_um / 0.499), round(y_um / 0.499)
        patch = pixels[max(0, y) : y + 2 * side, max(0, x) : x + 2 * side]
        return cv2.resize(patch, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)

    def marked(pixels: np.ndarray) -> np.ndarray:
        patches = PatchSource(lambda x, y: read(pixels, x, y), 0.998)
        return mark_out_of_focus(mask, um_per_px, patches, FOCUS) == TissueClass.OUT_OF_FOCUS

    tissue = mask == TissueClass.TISSUE
    assert not marked(image).any()
    rows = np.arange(mask.shape[0])[:, None] * um_per_px / 0.499
    found = marked(spoiled)
    assert found[tissue & (rows > half + 600)].mean() > 0.95
    assert found[tissue & (rows < half - 600)].mean() < 0.05


def test_slides_of_other_colours_are_rejected_with_the_reason(cmu_slide):
    small, um_per_px = shrunk(cmu_picture(cmu_slide), 0.499)
    density = optical_density(small, glass_level(small)).mean(0)

    def stained(red: float, green: float, blue: float) -> np.ndarray:
        planes = [245 * 10 ** -(density * share) for share in (red, green, blue)]
        return np.stack(planes, -1).astype(np.uint8)

    grey = np.repeat(small.min(-1, keepdims=True), 3, -1)
    for image, reason in (
        (255 - small, "black"),
        (grey, "no colour"),
        (stained(0.5, 1.0, 1.4), "DAB"),
        (stained(1.6, 1.0, 0.3), "colours of H&E"),
        (stained(1.3, 0.4, 1.0), "colours of H&E"),
    ):
        with pytest.raises(NotHematoxylinEosinError, match=reason):
            detect_tissue(image, um_per_px, CONFIG)


def test_real_fluorescence_is_rejected(shared_data):
    slide = openslide.OpenSlide(shared_data / "slides" / "slideio_test3-DAPI-2-387.ndpi")
    image = np.array(slide.get_thumbnail((800, 800)).convert("RGB"))
    with pytest.raises(NotHematoxylinEosinError, match="fluorescence"):
        detect_tissue(image, 8.0, CONFIG)
