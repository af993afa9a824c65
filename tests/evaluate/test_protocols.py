"""Protocols from their YAML to the page, on a toy world with the real generator and metrics."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_data import random_features
from protocol_data import (
    COUNT,
    SECOND_COHORT,
    SMALL_PIXCELL,
    make_all,
    make_model,
    make_pixel_model,
    make_world,
    record_of,
    toy,
)
from test_report import Page

from common.errors import UserError
from common.record import Record
from evaluate.__main__ import main, parse_arguments
from evaluate.metrics import cosine_similarity, frechet_distance
from evaluate.metrics.registry import METRICS
from evaluate.protocols import cells as cells_module
from evaluate.protocols.cautions import find_cautions
from evaluate.protocols.cells import Measurer
from evaluate.protocols.comparable import check_sides, check_table, number_basis
from evaluate.protocols.config import load_protocol, protocol_names
from evaluate.protocols.controls import (
    grouped_distances,
    halves_by_label,
    neighbour_cosines,
    split_in_halves,
)
from evaluate.protocols.image_checks import given_deviations
from evaluate.protocols.making import SourceMaker
from evaluate.protocols.memorisation import CopySearch
from evaluate.protocols.plan import all_images, plan_cells, vae_key
from evaluate.protocols.run import list_missing, run_protocol
from evaluate.protocols.sources import first_tiles
from evaluate.protocols.store import ResultStore
from evaluate.protocols.tables import quantity_table, variability_table
from evaluate.report.protocol_files import render_protocol, write_protocol_files
from evaluate.report.protocol_text import tables_as_latex, tables_as_markdown
from pipeline.dataset import (
    Dataset,
    claim_identity,
    make_selection,
    new_run_id,
    read_slides,
    write_slides,
)

ENCODERS = ("h-optimus-0", "uni2-h")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root, (*ENCODERS, "virchow2"))
    make_model(root)
    return root


@pytest.fixture(scope="module")
def table2(world: Path) -> dict[str, Any]:
    protocol = toy(world, "table2", f"encoders=[{','.join(ENCODERS)}]")
    make_all(protocol)
    return json.loads(json.dumps(run_protocol(protocol)))


def cells(results: dict[str, Any], **wanted: str) -> list[dict[str, Any]]:
    return [c for c in results["cells"] if all(c[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("name", protocol_names())
def test_a_shipped_protocol_is_the_papers_and_has_no_deviation(name: str) -> None:
    protocol = load_protocol(name, None, ["dataset=/x", "out=/y", "weights=random:0", "device=cpu"])
    assert protocol.deviations == {}
    assert protocol.rows
    of_table_2 = {"h-optimus-0", "virchow2", "uni2-h", "inception-v3"}
    of_cosines = {"uni", "conch-v1", "phikon-v2"} if name in ("table4", "figure5") else set()
    assert set(protocol.encoders) == of_table_2 | of_cosines
    assert load_protocol(name, None, ["count=99"]).deviations["count"][1] == 99


def test_table_2_is_as_the_paper_has_it() -> None:
    protocol = load_protocol("table2")
    assert protocol.count == 100_000
    assert protocol.settings.max_generated == 50_000
    made = {one.generation: one.spec for one in all_images(protocol)}
    assert set(made) == {"from-guidance", "from-val-in", "from-val-out"}
    for spec in made.values():
        assert (spec.solver, spec.steps, spec.scale) == (("sde",), (250,), 2.5)
        assert (spec.low, spec.high) == (0.0, 0.75)
    cosine = [c for c in plan_cells(protocol) if c.metrics == ("cosine_similarity",)]
    assert {(c.column, c.generated.source) for c in cosine} == {
        ("val-in", "from-val-in"), ("val-out", "from-val-out")
    }  # fmt: skip


def test_figure_4_is_a_grid_of_unconditional_images() -> None:
    images = all_images(load_protocol("figure4"))
    assert len(images) == 16
    assert {one.point["solver"] for one in images} == {"ode", "sde"}
    assert (min(i.point["steps"] for i in images), max(i.point["steps"] for i in images)) == (
        20, 250
    )  # fmt: skip
    assert all(one.spec.guidance == "" for one in images)


def test_table_4_holds_each_arm_and_the_control() -> None:
    protocol = load_protocol("table4")
    rows = {row.label: row for row in protocol.rows}
    control = rows["CytoSyn 224; JPEG validation (negative control)"]
    assert (control.real_view, control.generated) == ("jpeg70", "from-guidance")
    assert protocol.generations["pixcell-jpeg"].guidance_view == "jpeg70+resize224"
    assert sum("jpeg75" in row.generated_view for row in rows.values()) == 4
    left = plan_cells(replace(protocol, leave_out=("pixcell",)))
    assert not [cell for cell in left if "PixCell" in cell.label]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["counts=3"], "unknown configuration key 'counts'"),
        (["sets.val-in.selektion=a"], "unknown configuration key 'sets.val-in.selektion'"),
        (["columns=[elsewhere]"], "no set 'elsewhere'"),
        (["leave_out=[dalle]"], "no model or column 'dalle'"),
        (["count=3"], "expected 8 tiles or more"),
        (["generations.from-guidance.model=other"], "no model 'other'"),
        (["generations.from-guidance.steps=[20"], "steps=[20: not a YAML value"),
        (["settings.fld_seeds=[0"], "settings.fld_seeds=[0: not a YAML value"),
        (["settings.seed=-1"], "seed is -1; expected a whole number from 0"),
    ],
)
def test_a_wrong_key_is_one_line_that_names_it(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_protocol("table2", None, overrides)


@pytest.mark.parametrize("generated", ["from-{col}", "from-{0}", "from-{", "{column.x}"])
def test_braces_hold_the_column_alone(tmp_path: Path, generated: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f'rows: [{{label: Ours, generated: "{generated}"}}]')
    with pytest.raises(UserError, match=r"row 'Ours': generated is .* only \{column\} may stand"):
        load_protocol("table2", file)


def test_a_rows_encoder_is_one_of_the_protocols(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rows: [{label: Ours, generated: from-guidance, encoders: [uni2h]}]")
    with pytest.raises(UserError, match=r"row 'Ours'\.encoders: no encoder .*'uni2h'; there are"):
        load_protocol("table2", file)
    # Table 4's rows name encoders that a shorter run leaves out.
    assert load_protocol("table4", None, ["encoders=[uni2-h]"]).encoders == ("uni2-h",)


def test_a_row_without_a_key_that_it_needs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rows: [{label: Ours}]")
    with pytest.raises(UserError, match=r"'rows\[0\]\.generated' is missing"):
        load_protocol("table2", file)


def test_a_persons_yaml_and_stars_lie_over_the_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: /data\nsets: {val-in: {dataset: /other}}\n")
    protocol = load_protocol("table2", file, ["generations.*.steps=20"])
    assert protocol.sets["val-in"].dataset == "/other"
    assert protocol.sets["val-in"].selection == "val-in"
    assert {one.spec.steps for one in all_images(protocol)} == {(20,)}
    with pytest.raises(UserError, match="no protocol 'table9'"):
        load_protocol("table9")


def test_numbers_are_those_of_the_metrics(world: Path, table2: dict[str, Any]) -> None:
    (cell,) = cells(table2, label="Guidance tiles", encoder="uni2-h", column="val-out")
    protocol = toy(world, "table2", f"encoders=[{','.join(ENCODERS)}]")
    on_disk = SourceMaker(protocol)
    used = {name: on_disk.select_tiles(name).used for name in ("guidance", "val-out")}
    assert used["guidance"].rows == COUNT
    assert cell["results"]["frechet_distance"]["n_generated"] == COUNT
    from pipeline.dataset.features import FeatureStore

    store = FeatureStore(on_disk.select_tiles("val-out").dataset, tile_px=32, encoder="uni2-h")
    real, made = (store.read_selection(used[name]) for name in ("val-out", "guidance"))
    expected = frechet_distance(real, made)
    assert cell["results"]["frechet_distance"]["value"] == expected.value


def test_every_number_has_its_floor_ceiling_and_null(table2: dict[str, Any]) -> None:
    tables = {table["name"]: table for table in table2["tables"]}
    labels = {name: [row["label"] for row in table["rows"]] for name, table in tables.items()}
    assert labels["fd"][:2] == ["Model", "Guidance tiles"]
    assert "Real against real, split by tile" in labels["fd"]
    assert "Real against real, split by patient" in labels["recall"]
    assert "Reconstructed by the VAE of model" in labels["fd"]
    assert {"Sources shuffled", "Another real tile of the same slide"} <= set(labels["cosine"])
    values = {
        row["label"]: [entry["value"] for entry in row["cells"].values()]
        for row in tables["cosine"]["rows"]
    }
    for low, mid, high in zip(
        values["Sources shuffled"], values["Model"],
        values["Reconstructed by the VAE of model"], strict=True,
    ):  # fmt: skip
        assert low < mid < high
    for row in tables["fd"]["rows"]:
        for entry in row["cells"].values():
            assert entry["value"] >= 0
            assert entry["n"]
    fld = {row["label"]: row for row in tables["fld"]["rows"]}
    assert list(fld) == ["Model"]
    assert fld["Model"]["cells"]["uni2-h/val-in"]["spread"] is not None


def test_results_say_what_they_are_of(table2: dict[str, Any]) -> None:
    assert table2["schema_version"] == 1
    one = table2["sources"]["from-guidance"]
    assert one["kind"] == "generated"
    assert one["guidance"] == "guidance"
    assert len(one["identity"]["model_sha256"]) == 64
    assert (one["identity"]["steps"], one["identity"]["rounding"]) == (2, "nearest")
    for source in table2["sources"].values():
        assert len(source["tiles"]["pixels_sha256"]) == len(source["selection_sha256"]) == 64
    assert table2["encoders"]["uni2-h"][0]["weights_sha256"] == "u" * 64
    assert {"torch", "numpy", "scipy"} <= set(table2["versions"])
    codes = {one["code"] for one in table2["warnings"]}
    assert {"random_encoder_weights", "few_tiles", "not_the_protocol"} <= codes
    said = [one["message"] for one in table2["warnings"] if one["code"].startswith("metric_")]
    (line,) = (one for one in said if "not linear in 1/N" in one)
    assert line.startswith("Fréchet distance at infinitely many images: the smallest subset has 6")
    assert "Reconstructed" not in line  # whose line no table shows
    assert line in " ".join(Page(render_protocol(table2)).text)
    assert line in tables_as_markdown(Record(table2))
    (cell,) = cells(table2, label="Model", column="val-in", encoder="uni2-h", note="")[:1]
    groups = cell["results"]["groups"]
    assert {one["group"] for one in groups["project"]} == {"T-0", "T-1"}


def test_run_again_computes_nothing_and_gives_the_same(
    world: Path, table2: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = toy(world, "table2", f"encoders=[{','.join(ENCODERS)}]")
    again = json.loads(json.dumps(run_protocol(protocol)))
    assert "0 results computed" in capsys.readouterr().out
    shutil.rmtree(world / "out" / "cells")
    fresh = json.loads(json.dumps(run_protocol(protocol)))
    for results in (again, fresh):
        assert {**results, "seconds": 0} == {**table2, "seconds": 0}


def test_a_set_too_small_is_refused_before_anything_is_made(world: Path, tmp_path: Path) -> None:
    protocol = toy(world, "table2", "encoders=[uni2-h]", "count=65", f"out={tmp_path}")
    with pytest.raises(UserError, match=r"'val-in' has 64 tiles, the protocol asks for 65"):
        run_protocol(protocol)
    assert not (tmp_path / "generated").exists()


def test_differing_counts_are_refused_in_one_table(world: Path, table2: dict[str, Any]) -> None:
    protocol = toy(world, "table2", "encoders=[uni2-h]", "sets.guidance.count=40")
    make_all(protocol)
    with pytest.raises(UserError, match=r"n_generated is 64 in 'Model.* and 40 in 'Guidance"):
        run_protocol(protocol)


def test_other_weights_are_refused_not_mixed(world: Path, table2: dict[str, Any]) -> None:
    protocol = toy(world, "table2", "encoders=[uni2-h]", "weights=hub")
    with pytest.raises(UserError, match="made with weights 'random:0', the protocol asks for"):
        run_protocol(protocol)


def test_images_in_another_dtype_are_made_anew_and_never_mixed(world: Path, tmp_path: Path) -> None:
    where = [*SECOND_COHORT, "leave_out=[val-out]", f"out={tmp_path}", "controls=[]",
             "encoders=[uni2-h]"]  # fmt: skip
    half, full = (
        toy(world, "table3", *where, f"models.model.dtype={dtype}")
        for dtype in ("bfloat16", "float32")
    )
    make_all(half)
    on_disk = SourceMaker(full)
    assert on_disk.missing_images("from-conditioning") == COUNT
    shutil.move(
        SourceMaker(half).image_folder("from-conditioning"),
        on_disk.image_folder("from-conditioning"),
    )
    with pytest.raises(UserError, match=r"dtype is 'bfloat16' in .*asks for 'float32'"):
        run_protocol(full)


def test_the_guiding_dataset_is_in_the_names_of_images_and_of_neighbours(
    world: Path, tmp_path: Path
) -> None:
    real = shutil.copytree(world / "real", tmp_path / "real")
    protocol = toy(world, "memorisation", "encoders=[uni2-h]", f"dataset={real}")

    def marks() -> list[Any]:
        on_disk = SourceMaker(protocol)
        measurer = Measurer(protocol, on_disk, ResultStore(tmp_path / "cells"))
        search = CopySearch(measurer, "uni2-h", "from-guidance")
        sources = ("from-guidance", vae_key("model", "val-in"))
        return [
            *(str(on_disk.image_folder(one)) for one in sources),
            str(search.train_fingerprint()),
        ]

    before = marks()
    assert marks() == before
    claim_identity(Dataset(real), {"seed": 1}, stage="scan", versions={})
    assert not set(marks()) & set(before)


def test_how_given_images_were_made_is_held_against_the_protocol(
    world: Path, tmp_path: Path
) -> None:
    where = [*SECOND_COHORT, "leave_out=[val-out]", f"out={tmp_path}", "controls=[]",
             "encoders=[uni2-h]"]  # fmt: skip
    key = "generations.from-conditioning"
    made = toy(world, "table3", *where, f"{key}.steps=3", f"{key}.seed=7", f"{key}.scale=1.5")
    make_all(made)
    syn = SourceMaker(made).image_folder("from-conditioning")
    given = toy(world, "table3", *where, f"{key}.dataset={syn}", f"{key}.steps=250")
    assert [name for name in given.deviations if name.startswith(key)] == [f"{key}.count"]
    results = run_protocol(given)
    found = {k: v for k, v in results["deviations"].items() if k.startswith(key)}
    assert found.pop(f"{key}.count") == [50_000, 0]
    assert found == {f"{key}.steps": [[250], [3]], f"{key}.seed": [[0], [7]],
                     f"{key}.scale": [2.5, 1.5]}  # fmt: skip
    (told,) = (one for one in results["warnings"] if one["code"] == "not_the_protocol")
    assert f"{key}.seed [0] → [7]" in told["message"]
    same = toy(world, "table3", *where, f"{key}.dataset={syn}", f"{key}.steps=3")
    assert given_deviations(SourceMaker(same))[f"{key}.steps"] == ([250], [3])
    with pytest.raises(UserError, match="seed has 3 values"):
        load_protocol("table5", None, ["generations.from-guidance.dataset=syn"])
    other = shutil.copytree(world / "real", tmp_path / "real")
    claim_identity(Dataset(other), {"seed": 1}, stage="scan", versions={})
    foreign = replace(same, dataset=str(other))
    with pytest.raises(UserError, match=f"{key}.dataset: .* tiles of another dataset"):
        run_protocol(foreign)


def test_a_table_holds_only_what_belongs_together() -> None:
    n = {"n_real": 5, "n_generated": 5, "k": 3}
    first = number_basis(record_of("uni2-h"), record_of("uni2-h"), n)
    other = number_basis(record_of("inception-v3"), record_of("inception-v3"), n)
    check_table("t", [("a", first), ("b", first), ("c", other)], [])
    for key, value in (
        ("weights_sha256", "x"), ("resize", "tf1"), ("compute_dtype", "bfloat16"),
        ("generated_view", "jpeg75"), ("n_real", 6), ("k", 5),
    ):  # fmt: skip
        changed = {**first, key: value}
        with pytest.raises(UserError, match=f"{key} is .* in 'a' and {value!r} in 'b'"):
            check_table("t", [("a", first), ("b", changed)], [])
        check_table("t", [("a", first), ("b", changed)], [key])
    with pytest.raises(UserError, match="compute_dtype is 'float32' on the real side"):
        check_sides(record_of("a"), {**record_of("a"), "compute_dtype": "bfloat16"}, "here")


def test_table_3_gives_the_floor_that_the_paper_omits(world: Path, table2: Any) -> None:
    protocol = toy(world, "table3", "encoders=[uni2-h]", *SECOND_COHORT)
    make_all(protocol)
    results = run_protocol(protocol)
    rows = {row["label"]: row["cells"]["uni2-h/reference"] for row in results["tables"][0]["rows"]}
    assert rows["Conditioning tiles"]["value"] > 0
    (relative,) = [table for table in results["tables"] if table["name"] == "fd_relative"]
    assert list(relative["rows"][0]["cells"]) == ["uni2-h/reference", "uni2-h/val-out"]
    (cosine,) = [table for table in results["tables"] if table["name"] == "cosine"]
    assert set(cosine["rows"][0]["cells"]) == {"uni2-h/reference", "uni2-h/val-out"}
    alone = toy(world, "table3", "encoders=[uni2-h]", *SECOND_COHORT, "leave_out=[val-out]")
    assert {cell.column for cell in plan_cells(alone)} == {"reference"}
    # The two cohorts may differ in size, two numbers against one of them may not.
    smaller = ["sets.reference.count=32", "sets.conditioning.count=32",
               "generations.from-conditioning.count=32"]  # fmt: skip
    run_protocol(toy(world, "table3", "encoders=[uni2-h]", *SECOND_COHORT, *smaller))
    mixed = toy(world, "table3", "encoders=[uni2-h]", *SECOND_COHORT,
                "generations.from-guidance.count=32")  # fmt: skip
    with pytest.raises(UserError, match=r"n_generated is 32 in .*val-out.* and 64"):
        run_protocol(mixed)


def test_figure_4_has_a_point_for_each_solver_and_number_of_steps(world: Path) -> None:
    protocol = toy(world, "figure4", "encoders=[uni2-h]", "generations.*.steps=[2,3,4,6]",
                   "columns=[val-in]", "settings.draws=0")  # fmt: skip
    make_all(protocol)
    results = json.loads(json.dumps(run_protocol(protocol)))
    points = [c["point"] for c in cells(results, label="Model")]
    assert len(points) == 8
    assert {"solver": "ode", "steps": 6} in points
    labels = [row["label"] for row in results["tables"][0]["rows"]]
    assert "Model, 6 steps, SDE" in labels or "Model, SDE, 6 steps" in labels
    page = Page(render_protocol(results))
    assert any("Fréchet distance against steps" in alt for alt in page.attributes("alt"))


@pytest.mark.full
def test_table_4_sees_tiles_through_views_and_in_two_sizes(world: Path) -> None:
    # PixCell's part is played by the toy model, whose guiding tiles have its own size.
    protocol = toy(world, "table4", "encoders=[uni2-h,virchow2]", *SMALL_PIXCELL, *SECOND_COHORT,
                   "generations.pixcell-png.steps=[2,3]")  # fmt: skip
    make_all(protocol)
    results = json.loads(json.dumps(run_protocol(protocol)))
    (fd, *_) = results["tables"]
    assert sum(row["kind"] == "model" for row in fd["rows"]) == 18
    (cosine,) = [table for table in results["tables"] if table["name"] == "cosine"]
    assert sum(row["kind"] == "model" for row in cosine["rows"]) == 4
    measured = {key for key, number in cosine["rows"][0]["cells"].items() if number}
    assert measured == {"virchow2/val-out", "virchow2/reference"}  # controls have the others
    saved = cells(results, label="CytoSyn 224; PNG, saved as JPEG q75")[0]["basis"]
    assert (saved["generated_view"], saved["real_view"]) == ("jpeg75", "")
    both = cells(results, label="PixCell 256 resized; JPEG both")[0]["basis"]
    assert (both["real_view"], both["real_px"]) == ("jpeg70+resize224", 256)
    assert both["generated_view"] == "resize224"
    made = {name: one["identity"] for name, one in results["sources"].items()}
    assert made["from-jpeg"]["guidance_view"] == "jpeg70"
    assert made["pixcell-png_steps-2"]["guidance_view"] == "resize224"
    with pytest.raises(UserError, match="real_view is '' in"):
        run_protocol(replace(protocol, varies=()))
    without = run_protocol(replace(protocol, leave_out=("pixcell",)))
    assert sum(row["kind"] == "model" for row in without["tables"][0]["rows"]) == 6
    assert {one["code"] for one in without["warnings"]} >= {"left_out"}


def test_table_5_has_each_kind_of_width(world: Path) -> None:
    protocol = toy(world, "table5", "encoders=[uni2-h]")
    make_all(protocol)
    (table, *_) = run_protocol(protocol)["tables"]
    rows = {row["label"]: row["cells"]["uni2-h/val-in"] for row in table["rows"]}
    drawn, corrected, *_ = rows.values()
    assert corrected["spread"] == pytest.approx(np.sqrt(2) * drawn["spread"])
    assert {"cluster bootstrap by slide", "cluster bootstrap by patient"} <= set(rows)
    assert rows["seeds of the sampler"]["n"] == {"seeds": 3}


def distance_cell(label: str, value: float, **more: Any) -> dict[str, Any]:
    """A model's cell that holds a Fréchet distance alone."""
    frechet = {"value": value, "noise_floor": more.pop("floor", 0.5), "n_real": 9, "widths": {},
               "n_generated": 9}  # fmt: skip
    cell = {"label": label, "kind": "model", "encoder": "uni2-h", "column": "val-in", "note": "",
            "point": {}, "basis": {"n_generated": 9}}  # fmt: skip
    return {**cell, "results": {"frechet_distance": frechet}, **more}


def test_the_spread_over_seeds_is_over_seeds_alone() -> None:
    protocol = load_protocol("table5", None, ["encoders=[uni2-h]", "columns=[val-in]"])
    grid = [(label, steps, seed) for label in ("A", "B") for steps in (20, 50) for seed in (0, 1)]
    found = variability_table(
        protocol,
        [
            distance_cell(label, 100 * (label == "B") + steps + seed, point={"steps": steps,
                          "seed": seed})
            for label, steps, seed in grid
        ],
    )  # fmt: skip
    entries = {row["label"]: row["cells"]["uni2-h/val-in"] for row in found["rows"]}
    assert list(entries) == [
        f"{label}, {steps} steps: seeds of the sampler" for label in "AB" for steps in (20, 50)
    ]
    assert [entry["spread"] for entry in entries.values()] == pytest.approx([np.sqrt(0.5)] * 4)
    assert {entry["n"]["seeds"] for entry in entries.values()} == {2}


def test_a_floor_of_each_row_stands_by_itself() -> None:
    protocol = load_protocol("table2", None, ["encoders=[uni2-h]", "columns=[val-in]"])

    def controls(*floors: float) -> dict[str, float]:
        cells = [distance_cell(f"row {i}", 2.0, floor=floor) for i, floor in enumerate(floors)]
        rows = quantity_table(protocol, "fd", cells)["rows"]
        return {
            row["label"]: row["cells"]["uni2-h/val-in"]["value"]
            for row in rows
            if row["kind"] == "control"
        }

    name = "Noise floor of these sizes (closed form)"
    assert controls(0.5, 0.7) == {f"{name}: row 0": 0.5, f"{name}: row 1": 0.7}
    assert controls(0.5, 0.5) == {name: 0.5}


def test_the_page_needs_nothing_and_holds_the_tables(
    table2: dict[str, Any], tmp_path: Path
) -> None:
    hostile = json.loads(json.dumps(table2))
    hostile["config"]["plots"] = ["concordance"]  # the others are drawn in a browser's test
    hostile["cells"][0]["label"] = hostile["tables"][0]["rows"][0]["label"] = "<script>&_%"
    written = write_protocol_files(hostile, tmp_path)
    html = written[0].read_text()
    page = Page(html)
    assert "<script>" not in html
    for name in ("src", "href"):
        assert all(value.startswith("data:") for value in page.attributes(name))
    text = " ".join(page.text)
    for word in ("These numbers mean nothing", "Run card", "Do the encoders agree?", "val-out"):
        assert word in text or word in " ".join(page.attributes("alt"))
    assert render_protocol(hostile) == html
    assert [path.name for path in written] == ["report.html", "tables.md", "tables.tex"]
    assert r"\textless{}script\textgreater{}\&\_\%" in tables_as_latex(Record(hostile))
    line = next(
        one for one in tables_as_markdown(Record(table2)).splitlines() if one.startswith("| Model")
    )
    assert line.count("|") == 2 + 1 + 2 * len(ENCODERS)


def test_the_plan_says_what_is_missing_as_commands(world: Path, tmp_path: Path) -> None:
    protocol = toy(world, "table2", "encoders=[uni2-h,phikon-v2]", f"out={tmp_path}")
    lines = list_missing(SourceMaker(protocol), plan_cells(protocol))
    assert any(line.startswith("from-guidance: 64 images into") for line in lines)
    (command,) = [line for line in lines if "pipeline cache" in line and "val-out" in line]
    assert "--encoder phikon-v2 --weights random:0 --dtype float32 --tokens none" in command


@pytest.mark.full
def test_a_command_that_fails_is_named(world: Path, tmp_path: Path) -> None:
    protocol = toy(world, "table2", "encoders=[no-such-encoder]", f"out={tmp_path}", "controls=[]")
    with pytest.raises(UserError, match=r"--encoder no-such-encoder.* ended with status 2"):
        run_protocol(protocol)


def test_the_door_reports_and_lists(
    world: Path, table2: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["protocol", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in protocol_names())
    results = tmp_path / "results.json"
    results.write_text(json.dumps(table2))
    assert main(["report", "--results", str(results), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").exists()
    results.write_text(json.dumps({**table2, "schema_version": 0}))
    with pytest.raises(UserError, match="schema_version 0"):
        main(["report", "--results", str(results)])


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_arguments(
        ["protocol", "table2", "count=9", "--dry-run", "dataset=/x", "out=/y"]
    )
    assert options.overrides == ["count=9", "dataset=/x", "out=/y"]
    assert options.dry_run
    for wrong in (["protocol", "table2", "--fast=1"], ["generate", "--out", "x", "count=9"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_halves_share_no_patient_and_are_about_equal() -> None:
    labels = np.repeat([f"p{i}" for i in range(11)], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    for seed in range(5):
        first = split_in_halves(labels, seed)
        assert not set(labels[first]) & set(labels[~first])
        assert abs(int(first.sum()) - int((~first).sum())) <= 11
    features = random_features("x", len(labels))
    found = halves_by_label(features, labels)
    assert found is not None
    assert found["frechet_distance"]["value"] > 0
    assert halves_by_label(features, np.repeat(["one"], len(labels))) is None


def test_a_slide_effect_shows_in_the_split_by_patient_and_in_the_neighbours() -> None:
    labels = np.repeat([f"p{i}" for i in range(8)], 20)
    centres = np.repeat(3 * random_features("c", 8), 20, axis=0)
    alike = random_features("x", 160) + centres
    apart = halves_by_label(alike, labels)
    mixed = halves_by_label(alike, np.array([str(i) for i in range(160)]))
    assert apart is not None
    assert mixed is not None
    assert apart["frechet_distance"]["value"] > 2 * mixed["frechet_distance"]["value"]
    near = neighbour_cosines(alike, labels)
    assert near is not None
    assert near["mean"] > cosine_similarity(alike, np.roll(alike, 40, axis=0)).mean
    assert neighbour_cosines(alike, np.array([str(i) for i in range(160)])) is None


def test_floors_have_the_k_of_the_rows_that_they_stand_under(world: Path, tmp_path: Path) -> None:
    for k in (3, 5):
        more = (f"out={tmp_path}", f"settings.k={k}")
        protocol = toy(world, "table2", "encoders=[uni2-h]", *more)
        measurer = Measurer(protocol, SourceMaker(protocol), ResultStore(tmp_path / "cells"))
        floors = [cell for cell in plan_cells(protocol) if cell.control.startswith("floor")]
        found = [measurer.measure_cell(cell)["precision_recall"]["k"] for cell in floors]
        assert found == [k] * 4


def test_the_floor_by_patient_is_kept_under_the_patients(world: Path, tmp_path: Path) -> None:
    real = Dataset(shutil.copytree(world / "real", tmp_path / "real"))
    protocol = toy(world, "table2", "encoders=[uni2-h]", f"dataset={real.root}")
    (cell,) = (one for one in plan_cells(protocol) if one.control == "floor-patient"
               and one.column == "val-out")  # fmt: skip

    def measured() -> dict[str, Any]:
        store = ResultStore(tmp_path / "cells")
        return Measurer(protocol, SourceMaker(protocol), store).measure_cell(cell)

    assert measured()["labels"] == 4
    slides = [replace(slide, patient=slide.slide_id) for slide in read_slides(real)]
    write_slides(real, new_run_id(), slides)
    assert measured()["labels"] == 8


def test_a_protocol_measures_on_its_device_and_names_only_fld_by_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = toy(world, "table2", "encoders=[uni2-h]")
    (cell,) = (one for one in plan_cells(protocol) if one.label == "Guidance tiles"
               and one.column == "val-out")  # fmt: skip
    names = {}
    for device in ("cpu", "cuda"):
        chosen = torch.device(device)
        monkeypatch.setattr(cells_module, "choose_device", lambda *_, chosen=chosen, **__: chosen)
        measurer = Measurer(protocol, SourceMaker(protocol), ResultStore(tmp_path))
        opened = {
            name: measurer.open_side(seen, cell.encoder)
            for name, seen in cell.compared_sides().items()
        }
        pair = measurer._make_pair(cell, opened)
        assert pair.device == device
        names[device] = [
            measurer._result_inputs(METRICS[metric], pair, opened, protocol.settings)
            for metric in ("precision_recall", "feature_likelihood")
        ]
    assert names["cpu"][0] == names["cuda"][0]
    assert names["cpu"][1] | {"device": "cuda"} == names["cuda"][1]


def test_a_protocols_images_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MKL_CBWR", "")
    monkeypatch.delenv("MKL_CBWR")
    assert main(["protocol", "list"]) == 0
    assert os.environ["MKL_CBWR"] == "AUTO,STRICT"


def test_groups_are_measured_apart() -> None:
    real, made = random_features("r", 60), random_features("g", 60)
    labels = np.repeat(["A", "B", ""], 20)
    made[20:40] += 2
    found = {one["group"]: one for one in grouped_distances(real, made, (labels, labels), least=8)}
    assert set(found) == {"A", "B"}
    assert found["B"]["mean_term"] > found["A"]["mean_term"] + 3
    assert grouped_distances(real, made, (labels, labels), least=21) == []


def test_a_result_is_kept_under_all_that_it_depends_on(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    assert store.get_or_compute({"a": 1}, lambda: [1.5]) == [1.5]
    assert store.get_or_compute({"a": 1}, lambda: pytest.fail("computed again")) == [1.5]
    assert store.get_or_compute({"a": 2}, lambda: {"x": None}) == {"x": None}
    next(tmp_path.glob("*.json")).write_text('{"inputs": {"a"')  # a full disk
    store.get_or_compute({"a": 1}, lambda: [1.5])
    store.get_or_compute({"a": 2}, lambda: {"x": None})
    assert (store.computed, store.reused) == (3, 2)


def test_the_first_tiles_are_a_fixed_sample() -> None:
    ranks = {f"s{i}": np.arange(30, dtype=np.int32) for i in range(9)}
    whole = make_selection("w", ranks, {})
    small, large = first_tiles(whole, 20, "w"), first_tiles(whole, 50, "w")
    held = {(s, int(r)) for s, rows in large.items() for r in rows}
    assert {(s, int(r)) for s, rows in small.items() for r in rows} < held
    assert len(held) == 50
    assert len(small.slide_ids) > 5


@pytest.mark.full
def test_kill_9_while_measuring_loses_no_result(world: Path, tmp_path: Path) -> None:
    """The process is killed after its third result; the next one reuses all three."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from protocol_data import SECOND_COHORT, make_all, toy
from evaluate.protocols import run, store
protocol = toy(Path({str(world)!r}), "table3", "encoders=[uni2-h]", *SECOND_COHORT,
    "leave_out=[val-out]", "out={tmp_path}")
make_all(protocol)
real = store.write_results
def write(path, results):
    real(path, results)
    if len(list(path.parent.glob("*.json"))) == 3 and sys.argv[1] == "kill":
        os.kill(os.getpid(), 9)
store.write_results = write
run.run_protocol(protocol)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    killed = subprocess.run([*command, "kill"], env=environment, check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert len(list((tmp_path / "cells").glob("*.json"))) == 3
    done = subprocess.run(
        [*command, "go"], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 reused" in done.stdout


@pytest.mark.full
def test_from_a_slide_to_a_page_with_nothing_written_by_hand(tmp_path: Path) -> None:
    """The whole chain on the committed slide: tiles, `cache` and two that generate, page."""
    slides = Path(__file__).parents[1] / "data" / "slides"
    dataset = tmp_path / "dataset"
    pipeline = [sys.executable, "-m", "pipeline"]
    where = ["--dataset", str(dataset)]
    for stage, *more in (
        ["scan", str(slides)], ["tissue"], ["select", "--name", "guidance"],
        ["select", "--name", "split", "--from", "guidance", "--split", "a,b", "--tiles", "16"],
        ["tile"],
    ):  # fmt: skip
        subprocess.run([*pipeline, stage, *more, *where], check=True)
    make_pixel_model(tmp_path / "model")
    arguments = [
        "protocol", "ood", f"dataset={dataset}", f"out={tmp_path / 'out'}", "count=16",
        "encoders=[inception-v3]", "weights=random:0", "device=cpu",
        f"models.model.model={tmp_path / 'model'}", "models.model.encoder=inception-v3",
        "sets.conditioning.selection=split-a", "sets.reference.selection=split-b",
        "generations.*.steps=2", "settings.draws=2", "settings.fld_seeds=[0]",
        f"launcher={sys.executable} -m common.launch 2",
    ]  # fmt: skip
    run = [sys.executable, "-m", "evaluate", *arguments]
    first = subprocess.run(run, check=False, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("pipeline cache") >= 3
    results = json.loads((tmp_path / "out/ood/results.json").read_text())
    assert results["cells"][0]["results"]["frechet_distance"]["n_generated"] == 16
    assert results["cells"][0]["results"]["cosine_similarity"]["n"] == 16
    again = subprocess.run(run, check=True, capture_output=True, text=True)
    assert " 0 results computed" in again.stdout
    assert "$ " not in again.stdout


def test_one_metric_s_failure_costs_no_other_of_a_protocol(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> dict[str, object]:
        raise UserError("no such luck")

    protocol = toy(world, "table2", "encoders=[uni2-h]")
    cell = next(one for one in plan_cells(protocol) if one.kind == "reference")
    broken = replace(METRICS["precision_recall"], compute=fail)
    monkeypatch.setitem(METRICS, "precision_recall", broken)
    measurer = Measurer(protocol, SourceMaker(protocol), ResultStore(tmp_path / "cells"))
    results = measurer.measure_cell(cell)
    assert results["failed"] == {"precision_recall": "no such luck"}
    assert "precision_recall" not in results
    assert results["frechet_distance"]["value"] > 0
    shown = {"cells": [asdict(cell) | {"basis": {}, "results": results}]}
    shown |= {"sources": {}, "encoders": {}}
    said = [one["message"] for one in find_cautions(protocol, shown)]
    assert any("Precision and recall: not measured: no such luck (" in one for one in said)
