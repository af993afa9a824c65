"""Figures of generated tiles: every tile stands where it belongs, pixel by pixel."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluate_data import (
    ALONE,
    DIM,
    DOOR_PX,
    DOOR_RECORD,
    PX,
    RECORD,
    Stripes,
    export_model,
    make_real,
    real_tile,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from evaluate.__main__ import main
from evaluate.figures.draw import draw_sheet
from evaluate.figures.layout import Sheet, column_lefts, compose_sheet
from evaluate.figures.sheets import grid_sheet, interpolation_sheet, variations_sheet
from evaluate.figures.tiles import GeneratedTiles
from evaluate.generate.condition_source import SelectionConditions, Unconditional
from evaluate.generate.conditions import ConditionList, Reference, conditions_between
from evaluate.generate.run import Request, generate
from model import CytoSyn
from pipeline.dataset import Dataset, claim_identity, read_candidates


def tiles(rows: int, columns: int, px: int = 8) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        [rng.integers(0, 255, (px, px, 3), dtype=np.uint8) for _ in range(columns)]
        for _ in range(rows)
    ]


@given(st.integers(1, 5), st.integers(1, 6), st.sets(st.integers(0, 5)))
def test_tiles_stand_unchanged_on_white(rows: int, columns: int, real: set[int]) -> None:
    grid = tiles(rows, columns)
    canvas = compose_sheet(Sheet(grid, [""] * columns, frozenset(real)))
    gap = 1
    rest = canvas.pixels.copy()
    for r, row in enumerate(grid):
        for left, tile in zip(canvas.lefts, row, strict=True):
            place = slice(r * (8 + gap), r * (8 + gap) + 8), slice(left, left + 8)
            assert (canvas.pixels[place] == tile).all()
            rest[place] = 255
    assert (rest == 255).all()


def test_real_tiles_are_set_apart_by_a_wider_gap() -> None:
    assert column_lefts(4, 100, 5, frozenset([0, 3])) == (0, 115, 220, 335)


def test_a_pixel_of_a_tile_is_a_pixel_of_the_png_and_bytes_are_the_same_every_time() -> None:
    sheet = Sheet(tiles(2, 3, px=320), ["real", "1", "2"], frozenset([0]))
    files = draw_sheet(sheet, ("RANDOM ENCODER WEIGHTS",))
    assert files == draw_sheet(sheet, ("RANDOM ENCODER WEIGHTS",))
    assert files[".pdf"].startswith(b"%PDF-")
    picture = np.array(Image.open(io.BytesIO(files[".png"])).convert("RGB"))
    expected = compose_sheet(sheet).pixels
    left, bottom = 24, 24
    shown = picture[-bottom - len(expected) : -bottom, left : left + expected.shape[1]]
    assert (shown == expected).all()
    assert (picture[:40] != 255).any()  # the banner


@pytest.fixture
def guided(evaluate_real: Callable[..., Dataset], tmp_path: Path) -> tuple[Dataset, Dataset]:
    real = evaluate_real()
    guidance = SelectionConditions.open_selection(real, "train", "h0-mini")
    request = Request(out=tmp_path / "syn", conditions=4, variations=5)
    generate(Stripes(), guidance, request, ALONE)
    return real, Dataset(tmp_path / "syn")


def test_figure_2_has_the_real_tile_and_its_own_variations(
    guided: tuple[Dataset, Dataset],
) -> None:
    real, syn = guided
    made = GeneratedTiles(syn, real)
    sheet = variations_sheet(made, 8, 5)
    rows = read_candidates(syn, "gen-00000").to_pylist()
    assert len(sheet.rows) == made.images // 5
    for number, row in enumerate(sheet.rows):
        source = rows[5 * number]
        expected = real_tile(source["source_slide_id"], source["source_rank"])
        assert (row[0] == expected).all()
        for k in range(5):
            assert (row[k + 1] == made.read_tile(5 * number + k)).all()
    with pytest.raises(UserError, match="give --guidance DATASET"):
        variations_sheet(GeneratedTiles(syn), 8, 5)
    claim_identity(real, {"seed": 1}, stage="scan", versions={})
    with pytest.raises(UserError, match="guided by tiles of another dataset"):
        variations_sheet(GeneratedTiles(syn, real), 8, 5)
    with pytest.raises(UserError, match="5 images per tile, not 6; generate with more"):
        variations_sheet(made, 8, 6)
    with pytest.raises(UserError, match=r"contains no interpolation.*--interpolate A B"):
        interpolation_sheet(made, 8)


def test_a_real_tile_has_its_models_reconstruction_beside_it(tmp_path: Path) -> None:
    folder = export_model(tmp_path / "model", DOOR_PX, DIM, DOOR_RECORD)
    real = make_real(tmp_path / "real", record=DOOR_RECORD)
    syn = tmp_path / "syn"
    assert main(["generate", "--model", str(folder), "--guidance", str(real.root), "--selection",
                 "train", "--steps", "1", "--limit", "2", "--variations", "2", "--out", str(syn),
                 "--device", "cpu"]) == 0  # fmt: skip
    made = GeneratedTiles(Dataset(syn), real)
    model = CytoSyn.from_pretrained(folder)

    def reconstruct(tile: np.ndarray) -> np.ndarray:
        return model.decode(model.encode(tile[None]))[0]

    sheet = variations_sheet(made, 2, 2, reconstruct)
    plain = variations_sheet(made, 2, 2)
    assert sheet.titles == ["real", "reconstructed", "generated 1", "generated 2"]
    assert sheet.set_apart == {0, 1}
    for row, without in zip(sheet.rows, plain.rows, strict=True):
        assert (row[1] == reconstruct(row[0])).all()
        assert len(row) == 4
        assert all((a == b).all() for a, b in zip([row[0], *row[2:]], without, strict=True))
    figure = ["figure", "variations", "--generated", str(syn), "--guidance", str(real.root),
              "--variations", "2", "--out", str(tmp_path / "figure"), "--reconstruct"]  # fmt: skip
    assert main([*figure, str(folder)]) == 0
    assert (tmp_path / "figure.png").stat().st_size > 0
    model.vae.post_quant_conv.bias.data += 0.01
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="other is not the model that made the images of"):
        main([*figure, str(tmp_path / "other")])


def test_figure_3_has_each_pairs_real_tiles_at_both_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ends = [
        Reference(name, real_tile(name, 1), rng.normal(size=12).astype(np.float32))
        for name in ("a", "b", "c")
    ]
    conditions = conditions_between(ends, [(0, 1), (2, 0)], (0.2, 0.4, 0.6, 0.8), "slerp")
    guidance = ConditionList(
        "interpolation", conditions, ends, record=RECORD, tile_px=PX, mpp=0.5, how={}
    )
    generate(Stripes(), guidance, Request(out=tmp_path / "syn", variations=2), ALONE)
    made = GeneratedTiles(Dataset(tmp_path / "syn"))
    sheet = interpolation_sheet(made, 8)
    assert sheet.titles == ["real", "0.2", "0.4", "0.6", "0.8", "real"]
    for number, row in enumerate(sheet.rows):
        pair, variation = divmod(number, 2)
        first, second = [(0, 1), (2, 0)][pair]
        assert (row[0] == ends[first].tile).all()
        assert (row[-1] == ends[second].tile).all()
        for place in range(4):
            assert (row[place + 1] == made.read_tile((4 * pair + place) * 2 + variation)).all()


def test_figure_1_is_one_command_and_says_what_it_must_not_hide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class FromRandom(Stripes):
        def identity(self) -> dict[str, object]:
            return {**super().identity(), "model_encoder_random": True}

    generate(FromRandom(), Unconditional(20), Request(out=tmp_path / "syn"), ALONE)
    sheet = grid_sheet(GeneratedTiles(Dataset(tmp_path / "syn")), 8, 4)
    assert (len(sheet.rows), len(sheet.rows[0])) == (5, 4)
    figure = ["figure", "grid", "--generated", str(tmp_path / "syn"), "--columns", "4"]
    assert main([*figure, "--out", str(tmp_path / "a/figure1.png")]) == 0
    out = capsys.readouterr().out
    assert "RANDOM ENCODER WEIGHTS" in out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["figure1.pdf", "figure1.png"]
    with pytest.raises(UserError, match="has 20 images, a row needs 30; give --columns"):
        main([*figure[:-1], "30"])


def test_a_real_dataset_is_no_synthetic_one(evaluate_real: Callable[..., Dataset]) -> None:
    with pytest.raises(UserError, match="contains no generated images"):
        GeneratedTiles(evaluate_real())
