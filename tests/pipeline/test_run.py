"""`pipeline run`: one file for all stages, the same as its commands, planned before it runs."""

import filecmp
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.options import parse_byte_count
from pipeline.__main__ import main
from pipeline.dataset import Dataset, read_journal
from pipeline.dataset.ledger import current_entries
from pipeline.features.plan import stored_bytes
from pipeline.recipe.plan import measure_rate, plan_recipe, plan_training
from pipeline.recipe.steps import load_recipe

SLIDES = Path(__file__).resolve().parents[1] / "data" / "slides"


def recipe_file(folder: Path, *steps: str, dataset: str = "dataset") -> Path:
    path = folder / "recipe.yaml"
    lines = [f"dataset: {folder / dataset}", "workers: 1", "steps:", *(f"  - {s}" for s in steps)]
    path.write_text("\n".join(lines) + "\n")
    return path


STAGES = (
    f"scan: {{slides: {SLIDES}}}",
    "tissue",
    "select: {name: train}",
    "tile: {selection: train}",
)


def test_a_recipe_does_what_its_commands_do_and_nothing_twice(
    tiled: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, *STAGES, "verify")
    assert main(["run", str(path), "--dry-run"]) == 0
    assert "about" in capsys.readouterr().out
    assert not (tmp_path / "dataset").exists(), "a plan writes nothing"
    with pytest.raises(UserError, match="--max-bytes is 100 kB: `tile` takes"):
        main(["run", str(path), "--max-bytes", "100kB"])
    assert not (tmp_path / "dataset").exists(), "a plan that is refused begins nothing"

    assert main(["run", str(path), "--max-bytes", "1GB"]) == 0
    made = [p.relative_to(tiled.root) for p in sorted(tiled.root.rglob("*")) if p.is_file()]
    made = [str(p) for p in made if p.parts[0] != "status"]
    assert filecmp.cmpfiles(tiled.root, tmp_path / "dataset", made, shallow=False)[0] == made
    log = next((tmp_path / "dataset" / "status" / "run").glob("*.log")).read_text().splitlines()
    ended = [row for line in log if (row := json.loads(line))["event"] == "step ended"]
    assert [row["status"] for row in ended] == [0] * 5

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").rglob("*.tar")}
    capsys.readouterr()
    assert main(["run", str(path)]) == 0
    assert capsys.readouterr().out.count("nothing to redo") == 4
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").rglob("*.tar")} == before

    plans = {step.name: plan for step, plan in plan_recipe(load_recipe(path))}
    assert [plans[name].bytes for name in ("tissue", "select", "tile")] == [0, 0, 0]
    assert plans["tile"].basis == "all done"


def test_a_plan_counts_what_is_left_at_the_datasets_own_rate(
    tiled: Dataset, tmp_path: Path
) -> None:
    path = recipe_file(tmp_path, "cache: {encoder: uni2-h}", "cache: {tokens: float16}")
    path.write_text(path.read_text().replace(str(tmp_path / "dataset"), str(tiled.root)))
    uni, mini = (plan for _, plan in plan_recipe(load_recipe(path)))
    # 49 tiles in 4 blocks: whole blocks are written.
    assert 64 * 1536 * 4 < uni.bytes < 72 * 1536 * 4 + 8000
    assert (uni.files, mini.files, uni.worker_s) == (1, 2, None)
    assert 64 * 301_056 < mini.bytes < 73 * (301_056 + 3072) + 20_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [scan", "cannot be read"),
        ("dataset: d", "expected a key 'steps'"),
        ("steps: []", "expected a key 'steps'"),
        ("- scan", "expected a key 'steps'"),
        ("steps: [tissue]\nworker: 2", r"unknown key 'worker' \(did you mean workers"),
        ("dataset: d\nsteps: [tisue]", r"'tisue' is no command \(did you mean tissue"),
        ("steps: [tissue]", r"step 1 \(tissue\).*--dataset"),
        ("dataset: d\nsteps: [scan]", "step 'scan' has no 'slides'"),
        ("dataset: d\nsteps: [{tissue: {min-tisue: 1}}]", "did you mean --min-tissue"),
        ("dataset: d\nsteps: [{tile: {format: jpg}}]", "invalid choice: 'jpg'"),
        ("dataset: d\nsteps: [{tile: [a]}]", "expected options"),
        ("dataset: d\nsteps: [{tile: {selection: {a: 1}}}]", "expected a text or a number"),
        ("dataset: d\nsteps: [{tile: {processes: 2}}]", "one process"),
        ("steps: [{train: {config: tiny, processes: '2'}}]", "expected 1 or more"),
        ("dataset: d\nsteps: [{tissue: {help: true}}]", "no option here"),
        ("steps: ['rm -rf x']", "is no command"),
        ("steps: [{python: {c: x}}]", "is no command"),
        ("dataset: d\nsteps: [!!python/object/apply:os.system [true]]", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_one_line_before_anything_runs(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        main(["run", str(path)])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_values_are_words_of_their_own_and_never_a_shells(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "dataset: d\nsteps:\n"
        "  - scan: {slides: ['a b', '--help', $(touch x)], sha256: true, workers: 2}\n"
        "  - train: {config: tiny, run.dir: r, model.vae: {base: 4}, log.tensorboard: false,"
        " processes: 4}\n"
        "  - train export: {run: r, out: m, sit: ema}\n"
        "  - evaluate generate: {model: m, limit: 32, processes: 2}\n"
    )
    scan, train, export, generate = load_recipe(path, {"workers": 3}).steps
    assert scan.arguments == (
        "scan", "--sha256", "--workers=2", "--dataset=d", "--", "a b", "--help", "$(touch x)",
    )  # fmt: skip
    assert train.arguments == (
        "--config=tiny", "run.dir=r", "model.vae={base: 4}", "log.tensorboard=false",
    )  # fmt: skip
    assert train.command()[1:6] == ["-m", "common.launch", "4", "train", "--config=tiny"]
    assert export.command()[1:] == ["-m", "train", "export", "--sit=ema", "--", "r", "m"]
    assert generate.command()[-5:] == ["2", "evaluate", "generate", "--model=m", "--limit=32"]


def test_steps_of_other_rooms_run_as_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, "train export: {run: nowhere, out: m}", "tissue")
    assert main(["run", str(path)]) == 2
    said = capfd.readouterr()
    assert "error:" in said.err
    assert "step 1 (train export) ended with status 2: stopped there" in said.out


def test_what_is_left_of_training_is_at_its_own_rate(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {steps: 1000}\ndata: {batch_size: 64}\n")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 400, "images_per_s": 32.0}\n{"step": 401, "psnr": 1}\n{"step": 50'
    )
    step = f"train: {{config: tiny, run.dir: {tmp_path}, processes: 2}}"
    (train,) = load_recipe(recipe_file(tmp_path, step)).steps
    assert plan_training(train).worker_s == pytest.approx(600 * 64 / 32 * 2)


@pytest.mark.parametrize(
    ("text", "value"), [("500GB", 5e11), ("1.5 TB", 1.5e12), ("1_000", 1000), ("2kb", 2000)]
)
def test_bytes_are_read_as_disks_are_sold(text: str, value: float) -> None:
    assert parse_byte_count(text) == value


def test_hours_are_those_of_the_datasets_own_journal(tiled: Dataset, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "tile: {tile-px: 256}", "tile: {tile-px: 224}")
    path.write_text(path.read_text().replace(str(tmp_path / "dataset"), str(tiled.root)))
    other, _ = (plan for _, plan in plan_recipe(load_recipe(path)))
    assert other.worker_s is None, "no tile of that size was ever cut here"
    done = current_entries(read_journal(tiled, "tile"), "224")
    entries = [entry for rows in done.values() for entry in rows]
    tiles = sum(entry.stop - entry.start for entry in entries)
    rate = measure_rate(entries, 1.0, per_tile=True)
    assert rate.seconds == pytest.approx(sum(entry.seconds for entry in entries) / tiles)
    size = sum(file.bytes for entry in entries for file in entry.files)
    assert rate.bytes == pytest.approx(size / tiles)


COUNTS = st.integers(1, 10**9)


@given(COUNTS, COUNTS, st.integers(1, 10**5))
def test_bytes_grow_with_the_tiles(tiles: int, more: int, slides: int) -> None:
    for kind in ("cls", "tokens-float16", "tokens-int8"):
        size = stored_bytes(kind, tiles, slides, 768, (196, 768))
        assert stored_bytes(kind, tiles + more, slides, 768, (196, 768)) > size


def test_the_papers_tokens_are_12_tb() -> None:
    size = stored_bytes("tokens-float16", 40_000_000, 11_893, 768, (196, 768))
    assert size == pytest.approx(12.1e12, rel=0.01)
