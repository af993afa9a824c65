"""A grid of sampler settings: its points, and the datasets and table that it makes."""

import csv
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from evaluate_data import DOOR_PX, tile_hashes

from common.errors import UserError
from evaluate.__main__ import main
from evaluate.generate.sweep import parse_sweep
from model import sampler, sampler_settings
from model.sampler_settings import SamplerSettings
from pipeline.dataset import Dataset, TileStore, read_identity


def test_the_solvers_to_choose_from_are_the_samplers() -> None:
    assert get_args(sampler_settings.Solver) == get_args(sampler.Solver)
    names = inspect.signature(sampler.sample).parameters
    assert set(SamplerSettings().arguments()) <= set(names)


def test_truncated_images_are_a_dataset_of_their_own(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And those that are rounded are recorded as before there was the option."""
    for name, more in (("rounded", ()), ("truncated", ("--legacy-truncate",))):
        assert main(command(name, "--limit", "4", *more)) == 0
    rounded, truncated = (Dataset(tmp_path / name) for name in ("rounded", "truncated"))
    assert read_identity(rounded)["rounding"] == "nearest"
    assert read_identity(truncated)["rounding"] == "down"
    differences = [
        tile.astype(int) - other
        for slide in TileStore(rounded, DOOR_PX).slide_ids()
        for tile, other in zip(
            TileStore(rounded, DOOR_PX).read(slide, range(4)),
            TileStore(truncated, DOOR_PX).read(slide, range(4)),
            strict=True,
        )
    ]
    assert set(np.unique(differences)) == {0, 1}
    assert 0.3 < float(np.mean(differences)) < 0.7
    with pytest.raises(UserError, match="rounding is 'nearest' in this dataset, 'down' was asked"):
        main(command("rounded", "--limit", "4", "--legacy-truncate"))
    with pytest.raises(UserError, match="rounding is 'down' in this dataset, 'nearest' was asked"):
        main(command("truncated", "--limit", "4"))


def test_the_last_key_turns_fastest() -> None:
    points = parse_sweep(["steps=20,50", "solver=sde,ode"])
    assert [point.name for point in points] == [
        "steps-20_solver-sde", "steps-20_solver-ode", "steps-50_solver-sde", "steps-50_solver-ode"
    ]  # fmt: skip
    assert points[1].sampler_settings() == {"steps": 20, "solver": "ode"}
    assert parse_sweep(["scale=2.5"])[0].sampler_settings() == {"guidance_scale": 2.5}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["step=4"], "expected KEY=A,B with KEY of steps, solver, scale, low, high"),
        (["steps=a"], "'a' are no values of steps"),
        (["solver=euler"], "no values of solver"),
        (["steps=4,4"], "given twice"),
        (["steps=4", "steps=5"], "steps is given twice"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sweep(texts)


def test_a_sweep_makes_a_dataset_a_point_with_the_same_seeds_and_a_table(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("sweep", "--limit", "16", "--sweep", "steps=2,3", "scale=1,4")
    assert main(arguments) == 0
    with (tmp_path / "sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["steps"], row["scale"], row["solver"], row["images"]) for row in rows] == [
        (steps, scale, "sde", "16") for steps in ("2", "3") for scale in ("1.0", "4.0")
    ]
    datasets = [Dataset(tmp_path / "sweep" / row["dataset"]) for row in rows]
    assert len({read_identity(dataset)["seed"] for dataset in datasets}) == 1
    assert len({value for one in datasets for value in tile_hashes(one).values()}) == 4 * 16
    alone = command("alone", "--limit", "16", "--scale", "4")
    alone[alone.index("--steps") + 1] = "3"
    assert main(alone) == 0
    assert tile_hashes(Dataset(tmp_path / "alone")) == tile_hashes(datasets[3])
    table = (tmp_path / "sweep/sweep.csv").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("nothing to redo") == 4
    assert (tmp_path / "sweep/sweep.csv").read_bytes() == table


def test_bfloat16_draws_nearly_the_same_images(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Through weights that were cast once, with the bits of autocast itself."""
    tiles = []
    for dtype in ("float32", "bfloat16"):
        assert main(command(dtype, "--limit", "16", "--dtype", dtype)) == 0
        store = TileStore(Dataset(tmp_path / dtype), DOOR_PX)
        tiles.append(np.stack(store.read("gen-00000", range(16))).astype(int))
    assert not (tiles[0] == tiles[1]).all()
    assert np.abs(tiles[0] - tiles[1]).mean() < 2


@pytest.mark.full
def test_a_compiled_network_draws_the_same_images_and_says_so(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    tiles = []
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert main(command(name, "--limit", "16", *more)) == 0
        store = TileStore(Dataset(tmp_path / name), DOOR_PX)
        tiles.append(np.stack(store.read("gen-00000", range(16))).astype(int))
    difference = np.abs(tiles[0] - tiles[1])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert read_identity(Dataset(tmp_path / "compiled"))["compiled"] is True
    with pytest.raises(UserError, match="--compile is for this project's models"):
        main([*command("x"), "--generator", "pixcell", "--compile"])
