"""The picture a person judges by."""

import cv2
import numpy as np
import pytest

from pipeline.tissue.classes import TissueClass
from pipeline.tissue.overlay import VERDICT_COLOURS, draw_overlay, encode_jpeg
from pipeline.tissue.verdict import Verdict

GLASS = (243, 243, 243)


def overlay_of(verdicts: list[Verdict], size: float, columns: int, title: str = "slide") -> tuple:
    """An overlay of empty glass whose grid has these verdicts, row by row."""
    rows = -(-len(verdicts) // columns)
    rgb = np.full((round(rows * size), round(columns * size), 3), GLASS, np.uint8)
    mask = np.zeros(rgb.shape[:2], np.uint8)
    index = np.arange(len(verdicts))
    x, y = (index % columns) * size, (index // columns) * size
    values = np.array(verdicts, np.uint8)
    return rgb, draw_overlay(rgb, mask, x, y, size, values, title)


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(-1).any())


def test_every_tile_is_boxed_in_the_colour_of_its_verdict():
    verdicts = list(Verdict)
    rgb, picture = overlay_of(verdicts, 100.0, 7)
    for index, verdict in enumerate(verdicts):
        box = picture[:100, index * 100 : index * 100 + 100]
        assert has(box, VERDICT_COLOURS[verdict])
        others = set(VERDICT_COLOURS.values()) - {VERDICT_COLOURS[verdict]}
        assert not any(has(box[3:97, 3:97], other) for other in others)
        assert tuple(box[50, 50]) == GLASS, "the tile itself stays to be seen"
    assert (rgb == 243).all(), "the picture given is left alone"


def test_the_legend_names_the_verdicts_that_occur_and_no_other():
    _, picture = overlay_of([Verdict.KEPT, Verdict.PEN, Verdict.NO_TISSUE], 300.0, 3)
    legend = picture[300:]
    assert 20 < legend.shape[0] < 80
    for verdict in Verdict:
        expected = verdict in (Verdict.KEPT, Verdict.PEN, Verdict.NO_TISSUE)
        assert has(legend, VERDICT_COLOURS[verdict]) == expected, verdict


def test_artifacts_are_tinted_and_tissue_is_not():
    rgb = np.full((200, 700, 3), (220, 150, 180), np.uint8)
    mask = np.full((20, 70), TissueClass.TISSUE, np.uint8)
    mask[:, 30:60] = TissueClass.PEN
    none = np.zeros(0)
    picture = draw_overlay(rgb, mask, none, none, 10.0, np.zeros(0, np.uint8), "slide")
    assert tuple(picture[100, 150]) == (220, 150, 180)
    assert tuple(picture[100, 450]) != (220, 150, 180)
    assert picture[100, 450, 2] > picture[100, 450, 0]


def test_tiles_too_small_for_a_box_are_tinted():
    verdicts = [Verdict.KEPT] * 200 * 100 + [Verdict.NO_TISSUE] * 200 * 100
    _, picture = overlay_of(verdicts, 4.0, 200)
    kept, empty = picture[100, 400], picture[700, 400]
    assert tuple(empty) == GLASS
    assert kept[1] > kept[0]
    assert kept[1] > kept[2]


@pytest.mark.parametrize("title", ["Schnitt µ-Ü 7", "x" * 400, ""])
def test_any_title_can_be_written(title):
    overlay_of([Verdict.KEPT], 50.0, 1, title)


def test_a_jpeg_stays_within_its_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3)).astype(np.uint8)
    small = encode_jpeg(noise, 600_000)
    assert len(small) <= 600_000
    assert cv2.imdecode(np.frombuffer(small, np.uint8), cv2.IMREAD_COLOR).shape == noise.shape
    assert len(encode_jpeg(noise, 10**9)) > len(small), "quality is given up only where it must be"
    assert encode_jpeg(noise, 600_000) == small
