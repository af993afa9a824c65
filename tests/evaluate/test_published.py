"""Published values: in which cells, compared when, judged how; `protocol all` and its sheet."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from protocol_data import COUNT, SECOND_COHORT, SMALL_PIXCELL, make_all, make_model, make_world, toy
from test_report import Page

from common.config import read_yaml
from common.errors import UserError
from common.record import Record
from evaluate.__main__ import main
from evaluate.metrics.registry import table_quantities
from evaluate.protocols.config import Protocol, load_protocol
from evaluate.protocols.plan import all_images, plan_cells
from evaluate.protocols.published_values import (
    FILE,
    cell_deviations,
    check_published_model,
    published_name,
    published_values,
)
from evaluate.protocols.report_protocols import REPORT_PROTOCOLS, load_report
from evaluate.protocols.reproduction import difference_bound, reproduction_sheet
from evaluate.protocols.run import run_protocol
from evaluate.protocols.tables import build_tables
from evaluate.report.protocol_files import protocol_files, render_protocol
from evaluate.report.protocol_text import tables_as_latex, tables_as_markdown

UNREPEATED = re.compile(r"published row '(.*)' is not repeated here")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root, ("uni2-h", "virchow2"))
    make_model(root)
    return root


@pytest.fixture(scope="module")
def table2(world: Path) -> dict[str, Any]:
    protocol = toy(world, "table2", "encoders=[uni2-h]", "controls=[]")
    make_all(protocol)
    return json.loads(json.dumps(run_protocol(protocol)))


def test_published_values_are_compared_only_where_nothing_deviates(
    world: Path, table2: dict[str, Any]
) -> None:
    protocol, measured = toy(world, "table2", "encoders=[uni2-h]"), table2["cells"]

    def entries(deviations: dict[str, Any], model: str = "CytoSyn-40M") -> dict[str, Any]:
        changed = replace(protocol, deviations=deviations, published_model=model, weights="hub")
        (fd, *_) = build_tables(changed, measured)
        return {row["label"]: row["cells"]["uni2-h/val-in"] for row in fd["rows"]}

    ours = entries({})["Model"]
    assert (ours["published"]["value"], ours["published"]["row"]) == (10.9, "CytoSyn-40M")
    assert ours["published"]["difference"] == pytest.approx(ours["value"] - 10.9)
    assert entries({}, "CytoSyn-108M-EMA")["Model"]["published"]["value"] == 9.4
    assert "published" not in entries({}, "another")["Model"]
    # What concerns the images alone leaves the row of real tiles comparable, and another set both.
    for key, model, guidance in (
        ("count", True, True), ("generations.from-guidance.scale", True, False),
        ("models.model.dtype", True, False), ("sets.val-in.count", True, True),
        ("sets.val-out.count", False, False), ("generations.from-val-out.scale", False, False),
    ):  # fmt: skip
        found = entries({key: (1, 2)})
        for label, deviates in (("Model", model), ("Guidance tiles", guidance)):
            published = found[label]["published"]
            assert (published["difference"] is None) == deviates, (key, label)
            assert published["deviations"] == ([f"{key} is 2, not 1"] if deviates else [])


@pytest.mark.parametrize(
    ("name", "overrides", "greyed"),
    [
        ("table2", ["settings.draws=0"], set()),
        ("table2", ["settings.fld_dtype=float32", "settings.fld_seeds=[0]"], {"fld"}),
        ("table2", ["settings.k=5"], {"precision", "recall"}),
        ("table2", ["settings.kid_subsets=9", "group_tiles=9", "controls=[]"], set()),
        ("table2", ["settings.seed=1"], {"fd", "fld", "precision", "recall", "cosine"}),
        ("table5", ["settings.draws=9"], {"variability"}),
        ("table5", ["generations.from-guidance.seed=[0]"], set()),
        ("table5", ["generations.from-guidance.seed=[0,7]"], {"variability"}),
    ],
)
def test_a_deviation_concerns_the_numbers_that_it_can_change(
    name: str, overrides: list[str], greyed: set[str]
) -> None:
    protocol = load_protocol(name, None, overrides)
    assert protocol.deviations
    found = {
        value.quantity
        for value in published_values(name)
        for images in all_images(protocol)
        if cell_deviations(protocol, value.quantity, value.encoder, images.key, value.column)
    }
    assert found == greyed


def test_each_point_of_a_list_is_compared_by_itself() -> None:
    """Steps that the report names stay comparable when others are left out or added."""
    for steps, expected in (
        ([250], {"250": True}),
        ([50, 250, 9], {"50": True, "250": True, "9": False}),
    ):
        protocol = load_protocol("table4", None, [f"generations.pixcell-png.steps={steps}"])
        found = {
            cell.published: not cell_deviations(
                protocol, "fd", cell.encoder, cell.generated.source, cell.column
            )
            for cell in plan_cells(protocol)
            if cell.label == "PixCell 256 cropped; PNG"
        }
        assert found == {f"PixCell 256px PNG all, {n} steps": ok for n, ok in expected.items()}
    # Given images that were made with steps of another of the report's rows.
    given = replace(protocol, deviations={"generations.pixcell-png.steps": ([50, 250], [50])})
    for images in all_images(given):
        if images.generation == "pixcell-png":
            deviations = cell_deviations(given, "fd", "uni2-h", images.key, "val-out")
            assert bool(deviations) == (images.spec.steps != (50,))


@pytest.mark.parametrize("model", ["CytoSyn-v2", "CytoSyn-108M-EMA"])
def test_a_model_of_two_names_is_compared_in_every_table(model: str) -> None:
    names = {
        protocol.name: {published_name(protocol, cell.published) for cell in plan_cells(protocol)}
        for protocol in load_report(None, [f"published_model={model}"])
    }
    assert "CytoSyn-108M-EMA" in names["table2"]
    assert "CytoSyn-v2" in names["table3"] & names["table4"]
    # Table 5 has CytoSyn-40M alone.
    assert not names["table5"] & {value.row for value in published_values("table5")}
    check_published_model(load_protocol("table3", None, [f"published_model={model}"]))


def test_random_weights_are_no_equals(world: Path, table2: dict[str, Any]) -> None:
    """Of an encoder by the configuration, of a model by what its images record."""
    protocol = replace(toy(world, "table2", "encoders=[uni2-h]"), deviations={})
    for given, expected in (
        ({"weights": "random:0"}, "uni2-h has random weights (random:0)"),
        ({"weights": "hub", "encoder_weights": ("uni2-h=random:7",)}, "weights (random:7)"),
    ):
        (fd, *_) = build_tables(replace(protocol, **given), table2["cells"])
        for row in fd["rows"][:2]:
            published = row["cells"]["uni2-h/val-in"]["published"]
            assert published["difference"] is None
            assert expected in published["deviations"][0]
    assert table2["deviations"]["models.model.encoder_weights"] == ["published", "random"]


def test_fewer_columns_are_no_mistake_and_an_unknown_published_model_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for table, column in (("table3", "reference"), ("table4", "val-out")):
        protocol = load_protocol(table, None, [f"columns=[{column}]"])
        assert {cell.column for cell in plan_cells(protocol)} == {column}
    with pytest.raises(UserError, match="published_model is 'CytoSyn-40'; the table has CytoSyn-"):
        main(["protocol", "table2", "--dry-run", "published_model=CytoSyn-40"])
    with pytest.raises(UserError, match="'CytoSyn-40', which no table of the report has"):
        main(["protocol", "all", "--dry-run", "published_model=CytoSyn-40"])


def table_with(published: dict[str, Any]) -> dict[str, Any]:
    entry = {"value": 48.4, "spread": 0.2, "n": {"n": 9}, "published": published}
    row = {"label": "A [b]", "kind": "model", "note": "", "cells": {"e/s": entry}}
    return {"name": "fd", "title": "FD", "better": "lower", "share": False,
            "columns": [{"encoder": "e", "set": "s"}], "rows": [row]}  # fmt: skip


def test_a_deviating_number_is_never_shown_as_an_equal(table2: dict[str, Any]) -> None:
    equal = {"row": "r", "value": 48.1, "spread": None, "approximate": False, "difference": 0.3,
             "deviations": []}  # fmt: skip
    other = {**equal, "difference": None, "deviations": ["count is 9, not 100000"]}
    texts = []
    for published in (equal, other):
        results = table2 | {"tables": [table_with(published)]}
        record, html = Record(results), render_protocol(results)
        texts.append((tables_as_markdown(record), tables_as_latex(record), html))
    assert "48.4 ± 0.2 (48.1, +0.3)" in texts[0][0]
    assert "deviating" not in texts[0][2].partition("<body>")[2]
    assert "48.4 ± 0.2 [48.1]" in texts[1][0].replace("\\", "")
    assert r"\textcolor{gray}{[48.1" in texts[1][1]
    assert 'class="published deviating" title="count is 9, not 100000"' in texts[1][2]
    assert all("count is 9, not 100000" in text for text in texts[1])


def test_every_published_row_is_named_by_a_dry_run(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = read_yaml(FILE)
    assert set(values) == {"table2", "table3", "table4", "table5"}
    settings = [f"dataset={world / 'real'}", f"out={world / 'out'}", "count=64", "weights=random:0",
                f"models.*.model={world / 'model'}", *SECOND_COHORT]  # fmt: skip
    unrepeated = set()
    for table, quantities in values.items():
        concerned = [text for text in settings if "cond" not in text and "reference" not in text]
        more = settings if table in ("table3", "table4") else concerned
        assert main(["protocol", table, "--dry-run", *more]) == 0
        said = capsys.readouterr().out
        for quantity in quantities.values():
            for row in quantity["rows"]:
                assert f"'{row}'" in said, (table, row)
        unrepeated |= set(UNREPEATED.findall(said))
    # Other models' rows are chosen by published_model; PixCell's paper used other data.
    assert unrepeated == {"CytoSyn-40M", "CytoSyn-108M", "PixCell original paper, in-domain"}


@pytest.mark.parametrize("table", ["table2", "table3", "table4", "table5"])
def test_every_published_cell_has_a_comparison_that_fills_it(table: str) -> None:
    """By the plan: a cell of that row, encoder and column that computes the quantity's metric."""
    quantities = table_quantities()
    models = ("CytoSyn-40M", "CytoSyn-108M", "CytoSyn-108M-EMA") if table == "table2" else ("",)
    planned = set()
    for model in models:
        protocol = load_protocol(table, None, [f"published_model={model}"] if model else [])
        for cell in plan_cells(protocol):
            row = published_name(protocol, cell.published)
            planned |= {(row, cell.encoder, cell.column, metric) for metric in cell.metrics}
    for value in published_values(table):
        fd = value.quantity == "variability"
        metric = "frechet_distance" if fd else quantities[value.quantity][0].name
        place = (value.row, value.encoder, value.column, metric)
        assert place in planned or value.row == "PixCell original paper, in-domain", place


@pytest.mark.full
def test_toy_runs_fill_every_published_cell(tmp_path: Path) -> None:
    """By all encoders, every published row; the tables share their images, as `all` does."""
    make_world(tmp_path, load_protocol("table4").encoders)
    make_model(tmp_path)
    pixcell = (*SMALL_PIXCELL, "generations.pixcell-png.steps=[50,250]")
    for table, more in (
        ("table2", ()), ("table3", SECOND_COHORT), ("table4", (*SECOND_COHORT, *pixcell)),
        ("table5", ("generations.*.seed=0",)),
    ):  # fmt: skip
        draws = () if table == "table5" else ("settings.draws=0",)
        small = ("count=16", "settings.subsample=8", "controls=[]", "plots=[]")
        shipped = toy(tmp_path, table, *more, *draws, *small)
        rows = tuple(row for row in shipped.rows if row.published)
        protocol = replace(shipped, rows=rows)
        make_all(protocol)
        measured = run_protocol(protocol)["cells"]
        filled = set()
        for model in ("CytoSyn-40M", "CytoSyn-108M", "CytoSyn-v2"):
            for shown in build_tables(replace(protocol, published_model=model), measured):
                filled |= {
                    (shown["name"], number["published"]["row"], *place.split("/"))
                    for row in shown["rows"]
                    for place, number in row["cells"].items()
                    if number and "published" in number
                }
        original = "PixCell original paper, in-domain"  # of other data
        wanted = {value[1:5] for value in published_values(table) if value.row != original}
        assert filled == wanted, table


@pytest.mark.full
def test_all_runs_every_protocol_over_one_folder_and_compares(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = f"out={tmp_path}"
    settings = [
        f"dataset={world / 'real'}", out, f"count={COUNT}", "weights=random:0", "device=cpu",
        f"models.*.model={world / 'model'}", "models.*.generator=own", "models.*.encoder=h0-mini",
        "generations.*.steps=[2]", "settings.draws=3", "settings.subsample=32",
        "settings.fld_seeds=[0,1]", "group_tiles=8", "tiles=2", "encoders=[uni2-h,virchow2]",
        *SMALL_PIXCELL, *SECOND_COHORT,
    ]  # fmt: skip
    for protocol in load_report(None, settings):
        make_all(protocol)
    capsys.readouterr()
    assert main(["protocol", "all", "--dry-run", *settings]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert main(["protocol", "all", *settings]) == 0
    said = capsys.readouterr().out
    assert "6 of 6 protocols done; 0 of" in said
    sheet = json.loads((tmp_path / "reproduction.json").read_text())["rows"]
    wanted = [row for row in sheet if row["encoder"] in ("uni2-h", "virchow2")]
    assert len(sheet) == sum(len(published_values(name)) for name in REPORT_PROTOCOLS)
    # Only other models' rows, PixCell's own, and rows of other steps are without ours.
    absent = {row["row"] for row in wanted if row["ours"] is None}
    assert absent == {"CytoSyn-40M", "CytoSyn-108M", "PixCell original paper, in-domain",
                      "PixCell 256px PNG all, 250 steps", "PixCell 256px PNG all, 50 steps",
                      "PixCell 256px JPEG val-out only, 250 steps",
                      "PixCell 256px JPEG val-out only, 50 steps"}  # fmt: skip
    verdicts = [r["verdict"] for r in wanted if r["ours"] is not None]
    assert all(text.startswith("not comparable: ") and "count is" in text for text in verdicts)
    assert linked_pages(tmp_path) == list(REPORT_PROTOCOLS)
    # One alone keeps what the others have.
    assert main(["protocol", "all", *settings, "--only", "table2"]) == 0
    assert "6 of 6 protocols done" in capsys.readouterr().out
    assert json.loads((tmp_path / "reproduction.json").read_text())["rows"] == sheet
    # One that fails costs no other, whatever it fails of, and what it had before is not shown.
    nowhere = [*settings, "sets.reference.selection=nowhere"]
    assert main(["protocol", "all", *nowhere]) == 1
    said = capsys.readouterr().out
    assert "3 of 6 protocols done (table3: failed; table4: failed; figure5: failed)" in said
    assert linked_pages(tmp_path) == ["table2", "table5", "figure4"]

    def run_out_of_memory(protocol: Protocol, arguments: Sequence[str]) -> dict[str, Any]:
        if protocol.name == "table2":
            raise RuntimeError("CUDA out of memory")
        return run_protocol(protocol, arguments)

    monkeypatch.setattr("evaluate.protocols.run_files.run_protocol", run_out_of_memory)
    assert main(["protocol", "all", *nowhere, "--only", "table2"]) == 1
    printed = capsys.readouterr()
    assert "table2: failed: RuntimeError: CUDA out of memory" in printed.out
    assert "Traceback" in printed.err
    assert "2 of 6 protocols done (table2: failed; " in printed.out
    assert "table3: not run under this configuration" in printed.out
    assert linked_pages(tmp_path) == ["table5", "figure4"]
    kept = json.loads((tmp_path / "reproduction.json").read_text())["rows"]
    assert {row["table"] for row in kept if row["ours"] is not None} == {"table5"}
    for name in REPORT_PROTOCOLS:
        compile_latex((tmp_path / name / "tables.tex").read_text(), tmp_path / name)


def linked_pages(folder: Path) -> list[str]:
    page = Page((folder / "report.html").read_text())
    return [address.removesuffix("/report.html") for address in page.attributes("href")]


@pytest.mark.full
@pytest.mark.parametrize("name", ["memorisation", "ood"])
def test_latex_of_the_other_protocols_compiles(world: Path, tmp_path: Path, name: str) -> None:
    protocol = toy(world, name, "encoders=[uni2-h]", *(SECOND_COHORT if name == "ood" else ()))
    make_all(protocol)
    folder = tmp_path / name
    folder.mkdir()
    for path, text in protocol_files(run_protocol(protocol), folder).items():
        path.write_bytes(text)
    compile_latex((folder / "tables.tex").read_text(), folder)


def compile_latex(tables: str, folder: Path) -> None:
    """The tables as a document, by pdflatex where there is one."""
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed (texlive-latex-base, texlive-latex-recommended)")
    document = "\n".join([
        r"\documentclass{article}", r"\usepackage{booktabs,xcolor}",
        r"\usepackage[landscape,margin=1cm]{geometry}", r"\begin{document}", tables,
        r"\end{document}", "",
    ])  # fmt: skip
    (folder / "document.tex").write_text(document, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"],
        cwd=folder, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["models.dalle.model=x"], "models.dalle is in no protocol of the report"),
        (["leave_out=[dalle]"], "no model or column 'dalle' in any protocol"),
        (["counts=3"], "unknown configuration key 'counts'"),
        (["leave_out=[pixcell"], "leave_out=[pixcell: not a YAML value"),
    ],
)
def test_what_no_protocol_of_all_has_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_report(None, overrides)


def test_all_gives_each_protocol_what_concerns_it(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("dataset: d\nmodels: {pixcell: {model: p}, model: {model: m}}\n")
    found = {
        p.name: p for p in load_report(config, ["leave_out=[reference]", "sets.val-in.selection=v"])
    }
    assert tuple(found) == REPORT_PROTOCOLS
    assert found["table4"].models["pixcell"].model == "p"
    assert all(one.models["model"].model == "m" for one in found.values())
    assert found["table2"].sets["val-in"].selection == "v"
    assert "reference" not in found["table3"].columns
    assert all(one.deviations == {} for one in found.values())


def test_a_difference_is_judged_by_what_chance_gives() -> None:
    value = next(v for v in published_values("table2") if v.row == "CytoSyn-40M"
                 and (v.encoder, v.column, v.quantity) == ("uni2-h", "val-in", "fd"))  # fmt: skip

    def verdict(ours: float, spread: float | None, deviations: list[str]) -> tuple[Any, ...]:
        published = {"row": value.row, "value": value.value, "spread": None, "approximate": False,
                     "difference": None, "deviations": deviations}  # fmt: skip
        entry = {"value": ours, "spread": spread, "n": {"n": 100}, "published": published}
        table = {"name": "fd", "rows": [{"label": "Model", "kind": "model", "note": "",
                                         "cells": {"uni2-h/val-in": entry}}]}  # fmt: skip
        sheet = reproduction_sheet({"table2": {"tables": [table]}})
        (row,) = [r for r in sheet if r.ours is not None]
        return row.verdict, row.difference, row.bound_of

    # Ours and the published number are of a draw each: 0.2 x sqrt(2) and half of the last digit.
    assert verdict(11.2, 0.2, []) == ("within chance", pytest.approx(0.3), "interval of ours")
    assert verdict(11.3, 0.2, [])[0] == "beyond chance"
    # Table 5 has 0.04 for it: 1.96 x sqrt(2) x 0.04 and half of the last printed digit.
    assert verdict(11.05, None, [])[::2] == ("within chance", "spread of table 5")
    assert verdict(11.1, None, [])[0] == "beyond chance"
    floor = next(v for v in published_values("table2") if v.row == "guidance-vs-val")
    assert difference_bound(floor, Record({"value": 4.0, "n": {"n": 9}})) == (None, "")
    assert verdict(11.0, 0.2, ["count is 9, not 1"])[:2] == (
        "not comparable: count is 9, not 1", None
    )  # fmt: skip
