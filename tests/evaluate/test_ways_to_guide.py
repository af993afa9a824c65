"""Every way to guide, through the door: cached tiles, a slide's, image files, means, in between."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluate_data import (
    DIM,
    DOOR_PX,
    DOOR_RECORD,
    RECORD,
    export_model,
    make_real,
    real_tile,
    tile_hashes,
    write_features,
)
from PIL import Image

from common.errors import UserError
from evaluate.__main__ import main
from evaluate.generate.condition_source import SelectionConditions
from evaluate.generate.means import mean_conditions
from model.encoders import load_encoder
from pipeline.dataset import (
    Dataset,
    TileStore,
    read_candidates,
    read_identity,
    read_journal,
    read_selection,
)
from pipeline.dataset.features import FeatureStore
from pipeline.slides.open import open_slide
from pipeline.slides.region import read_region
from pipeline.slides.resolution import resolve_mpp

SLIDE = Path(__file__).resolve().parents[1] / "data/slides/CMU-1-Small-Region.svs"


def without(arguments: list[str], *names: str) -> list[str]:
    """The arguments without these options and their values."""
    kept = list(arguments)
    for name in names:
        at = kept.index(name)
        del kept[at : at + 2]
    return kept


def listing(root: Path) -> dict:
    return json.loads((root / "guidance/conditions.json").read_text())


def test_interpolation_between_cached_tiles_and_its_figure(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = without(command("syn"), "--selection")
    pairs = ["--interpolate", "A.b-1:3", "C-2:5", "--interpolate", "C-2:5", "A.b-1:7"]
    assert main([*arguments, *pairs]) == 0
    assert read_selection(Dataset(tmp_path / "syn"), "generated").rows == 2 * 4
    found = listing(tmp_path / "syn")
    assert [tile["name"] for tile in found["tiles"]] == ["A.b-1:3", "C-2:5", "A.b-1:7"]
    assert [one["factor"] for one in found["conditions"]] == 2 * [0.2, 0.4, 0.6, 0.8]
    kept = np.array(Image.open(tmp_path / "syn/guidance/tile-00001.png"))
    assert (kept == real_tile("C-2", 5, DOOR_PX)).all()
    rows = read_candidates(Dataset(tmp_path / "syn"), "gen-00000").to_pylist()
    assert {row["source_rank"] for row in rows} == {-1}
    figure = ["figure", "interpolation", "--generated", str(tmp_path / "syn")]
    assert main([*figure, "--out", str(tmp_path / "figure3")]) == 0
    assert (tmp_path / "figure3.png").exists()
    assert (tmp_path / "figure3.pdf").exists()
    straight = [*arguments, *pairs, "--kind", "lerp"]
    with pytest.raises(UserError, match="slerp"):
        main(straight)  # another dataset than the one that stands there
    with pytest.raises(UserError, match="'C-2' is no tile of a dataset; expected SLIDE_ID:RANK"):
        main([*arguments, "--interpolate", "A.b-1:3", "C-2"])


def test_means_are_of_the_selections_features(real: Dataset) -> None:
    selection = SelectionConditions.open_selection(real, "train", "h0-mini")
    chosen = read_selection(real, "train")
    store = FeatureStore(real, tile_px=DOOR_PX, encoder="h0-mini")
    everything = store.read_selection(chosen).astype(np.float64)
    whole, slides = mean_conditions(selection, "all"), mean_conditions(selection, "slide")
    assert (whole.count, slides.count) == (1, len(chosen.slide_ids))
    np.testing.assert_allclose(
        whole.read_features(np.array([0]))[0], everything.mean(axis=0), rtol=1e-5, atol=1e-6
    )
    for row, (slide_id, ranks) in zip(
        slides.read_features(np.arange(2)), chosen.items(), strict=True
    ):
        mean = store.read(slide_id, ranks).mean(axis=0)
        np.testing.assert_allclose(row, mean, rtol=1e-5, atol=1e-6)


def test_a_slides_mean_guides_its_variations(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert main(command("syn", "--mean", "slide", "--variations", "3")) == 0
    dataset = Dataset(tmp_path / "syn")
    assert len(set(tile_hashes(dataset).values())) == 2 * 3
    assert read_identity(dataset)["guidance"] == "mean of slide"
    names = [one["name"] for one in listing(tmp_path / "syn")["conditions"]]
    assert names == ["mean of 39 tiles of A.b-1", "mean of 23 tiles of C-2"]


def test_a_selection_that_is_cached_in_part_is_refused_before_sampling(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    part = make_real(tmp_path / "part", record=DOOR_RECORD)
    for journal in part.status_dir("cache").iterdir():
        journal.unlink()
    write_features(part, {"A.b-1": np.zeros((40, DIM), np.float32)}, DOOR_RECORD)
    arguments = command("syn")
    arguments[2] = str(part.root)
    expected = (
        r"slide C-2, rank \d+: no cls features.*python -m pipeline cache .*--selection train`"
    )
    with pytest.raises(UserError, match=expected):
        main(arguments)
    assert not (tmp_path / "syn").exists()


def test_features_of_another_width_are_refused(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    wide = make_real(tmp_path / "wide", record={**DOOR_RECORD, "dim": 24})
    arguments = command("syn")
    arguments[2] = str(wide.root)
    with pytest.raises(UserError, match="h0-mini have 24 values, the model takes 12"):
        main([*arguments, "--force"])


@pytest.fixture(scope="module")
def tile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 224 px tiles, trained with H0-mini's random weights as it says."""
    encoder = load_encoder("h0-mini", "random:0")
    record = {**RECORD, "weights_sha256": encoder.weights_sha256}
    return export_model(tmp_path_factory.mktemp("tile-model"), 224, encoder.spec.dim, record)


@pytest.fixture
def guided(tile_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(out: str, *more: str) -> list[str]:
        fixed = ["--model", str(tile_model), "--out", str(tmp_path / out), "--steps", "1"]
        return ["generate", *fixed, "--batch", "2", "--device", "cpu", *more]

    return make


@pytest.mark.full
def test_a_slides_tiles_and_the_same_tiles_as_files_make_the_same_images(
    guided: Callable[..., list[str]], tmp_path: Path
) -> None:
    places = ["400,900", "800,1300.5"]
    on_slide = ["--slide", str(SLIDE), *[part for at in places for part in ("--at", at)]]
    assert main(guided("slide", *on_slide)) == 0
    kept = sorted((tmp_path / "slide/guidance").glob("*.png"))
    with open_slide(SLIDE) as reader:
        mpp = resolve_mpp(reader.resolution, table=None, assumed=None).value
        for path, at in zip(kept, places, strict=True):
            x, y = (float(part) for part in at.split(","))
            expected = read_region(reader, mpp, x, y, 224, 0.5, tolerance=0.02)
            assert (np.array(Image.open(path)) == expected).all()
    files = ["--images", *map(str, kept), "--images-mpp", "0.5"]
    assert main(guided("files", *files)) == 0
    hashes = [tile_hashes(Dataset(tmp_path / name)) for name in ("slide", "files")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].values())) == 2
    identity = read_identity(Dataset(tmp_path / "slide"))
    assert identity["guidance"] == "tiles"
    assert identity["mpp"] == 0.5
    figure = ["figure", "variations", "--generated", str(tmp_path / "slide")]
    assert main([*figure, "--variations", "1", "--out", str(tmp_path / "figure2")]) == 0


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[int], str]:
    def make(side: int) -> str:
        path = tmp_path / f"tile{side}.png"
        Image.fromarray(real_tile("A", 1, side)).save(path)
        return str(path)

    return make


def test_tiles_that_do_not_fit_the_model_are_refused(
    guided: Callable[..., list[str]], picture: Callable[[int], str], tmp_path: Path
) -> None:
    good, small = picture(224), picture(200)
    half = ["--images-mpp", "0.5"]
    slide = ["--slide", str(SLIDE), "--at"]
    cases: list[tuple[list[str], str]] = [
        (["--images", small, *half], "is 200 x 200 px, the model's tiles are 224 x 224; cut it"),
        (["--images", good], r"give --images-mpp.*trained at 0.5"),
        (["--images", good, "--images-mpp", "0.25"], r"0.25 µm per pixel.*trained at 0.5.*--force"),
        (["--images", "/nowhere.png", *half], "image /nowhere.png: no such file"),
        (["--images", str(SLIDE.parent / "README.md"), *half], "not a readable image"),
        ([*slide, "1e6,0"], r"CMU-1-Small-Region.svs: a tile of .* is not within it; it is"),
        ([*slide, "12"], "'12' is not a place on a slide; expected x,y"),
        (["--slide", "/nowhere.svs", "--at", "0,0"], "slide /nowhere.svs: no such file"),
        (["--slide", str(SLIDE)], "--slide needs --at x,y"),
        (["--images", good, *half, "--weights", "random:1"], r"trained on h0-mini .*--force"),
        ([], "nothing guides: give --guidance"),
    ]
    for more, message in cases:
        with pytest.raises(UserError, match=message):
            main(guided("syn", *more))
        assert not (tmp_path / "syn").exists(), more


def test_the_journal_of_a_dataset_names_what_guided_it(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = without(command("syn"), "--selection")
    assert main([*arguments, "--interpolate", "A.b-1:3", "C-2:5"]) == 0
    named = [
        Path(file.path).name
        for entry in read_journal(Dataset(tmp_path / "syn"), "generate")
        for file in entry.files
    ]
    assert {"conditions.json", "tile-00000.png", "tile-00001.png"} <= set(named)
    store = TileStore(Dataset(tmp_path / "syn"), DOOR_PX)
    assert len(store.read("gen-00000", range(4))) == 4
