"""The generation loop with a generator that draws each image from its own feature and seed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_data import ALONE, DIM, PX, RECORD, Stripes, tile_hashes

from common.errors import UserError
from evaluate.generate.condition_source import (
    GUIDING_FINGERPRINT,
    SelectionConditions,
    Unconditional,
    check_condition_dim,
    check_encoder,
    check_resolution,
)
from evaluate.generate.run import GenerationOutcome, Request, generate
from pipeline.dataset import (
    GENERATED_SCHEMA,
    Dataset,
    Ledger,
    Run,
    TileStore,
    claim_identity,
    read_candidates,
    read_identity,
    read_selection,
    read_slides,
)
from pipeline.dataset.features import FeatureStore


@pytest.fixture
def run(evaluate_real: Callable[..., Dataset], tmp_path: Path) -> Callable[..., GenerationOutcome]:
    guidance = SelectionConditions.open_selection(evaluate_real(), "train", "h0-mini")

    def call(
        out: str = "syn", *, generator: Stripes | None = None, **request: Any
    ) -> GenerationOutcome:
        return generate(
            generator or Stripes(), guidance, Request(out=tmp_path / out, **request), ALONE
        )

    return call


def test_the_dataset_reads_back_by_the_contract(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    outcome = run(mpp=0.5)
    dataset, real = Dataset(tmp_path / "syn"), Dataset(tmp_path / "real")
    selection = read_selection(dataset, "generated")
    assert outcome.made == outcome.selected == selection.rows == read_selection(real, "train").rows
    (slide,) = read_slides(dataset)
    assert (slide.slide_id, slide.status, slide.reader) == ("gen-00000", "ok", "generated")
    assert slide.mpp == 0.5
    table = read_candidates(dataset, "gen-00000")
    assert table.schema.names == GENERATED_SCHEMA.names
    sources = FeatureStore(real, tile_px=PX, encoder="h0-mini")
    tiles = TileStore(dataset, PX).read("gen-00000", range(selection.rows))
    for row, tile in zip(table.to_pylist(), tiles, strict=True):
        feature = sources.read(row["source_slide_id"], [row["source_rank"]])[0]
        expected = np.clip(feature * 32 + 128, 0, 255).astype(np.uint8)
        assert (tile[:DIM, 0, 0] == expected).all()
    guiding = set(
        zip(table["source_slide_id"].to_pylist(), table["source_rank"].to_pylist(), strict=True)
    )
    wanted = {(s, int(r)) for s, ranks in read_selection(real, "train").items() for r in ranks}
    assert guiding == wanted
    identity = read_identity(dataset)
    assert identity["kind"] == "generated"
    assert identity["guidance_selection_sha256"] == read_selection(real, "train").content_hash
    assert read_selection(dataset, "generated").plan["guidance_selection"] == "train"


def test_no_path_of_this_machine_is_in_the_datasets_identity(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    run(conditions=4)
    assert str(tmp_path) not in (tmp_path / "syn" / "dataset.json").read_text()


def test_the_same_ranks_of_another_dataset_are_other_tiles(
    evaluate_real: Callable[..., Dataset], run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    other = evaluate_real(name="other")
    claim_identity(other, {"seed": 1}, stage="scan", versions={})
    guidance = SelectionConditions.open_selection(other, "train", "h0-mini")
    run()
    with pytest.raises(UserError, match=GUIDING_FINGERPRINT):
        generate(Stripes(), guidance, Request(out=tmp_path / "syn"), ALONE)


def test_features_that_were_made_again_do_not_guide_the_rest_of_the_images(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    """The same ranks of the same selection, by the same encoder, of other tiles."""
    real = Dataset(tmp_path / "real")
    assert run(conditions=16).made == 16
    journal = next(real.status_dir("cache").glob("*.jsonl"))
    sound = journal.read_bytes()

    def go_on() -> int:
        guidance = SelectionConditions.open_selection(real, "train", "h0-mini")
        request = Request(out=tmp_path / "syn", conditions=48)
        return generate(Stripes(), guidance, request, ALONE).made

    lines = [line for line in Ledger.read(real, "cache").lines if line.start >= 0]
    with Run(real, "cache", {}) as again:
        again.append([replace(line, fingerprint="other") for line in lines])
    before = tile_hashes(Dataset(tmp_path / "syn"))
    with pytest.raises(UserError, match=r"images 0 to 15 of gen-00000 in .* were made again since"):
        go_on()
    assert tile_hashes(Dataset(tmp_path / "syn")) == before
    for path in real.status_dir("cache").glob("*.jsonl"):
        path.unlink()
    journal.write_bytes(sound)
    assert go_on() == 32


def test_images_that_did_not_record_the_guiding_dataset_go_on(
    run: Callable[..., GenerationOutcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = SelectionConditions.identity
    with monkeypatch.context() as patch:
        patch.setattr(
            SelectionConditions,
            "identity",
            lambda self: {k: v for k, v in recorded(self).items() if k != GUIDING_FINGERPRINT},
        )
        run(conditions=16)
    assert run(conditions=32).made == 16
    assert GUIDING_FINGERPRINT not in read_identity(Dataset(tmp_path / "syn"))


def test_images_do_not_depend_on_the_batch_and_batches_have_one_shape(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    generators = {batch: Stripes() for batch in (1, 7, 16)}
    for batch, generator in generators.items():
        run(f"b{batch}", generator=generator, micro_batch=batch)
        assert generator.shapes == {batch}
    hashes = [tile_hashes(Dataset(tmp_path / f"b{batch}")) for batch in generators]
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_second_run_makes_nothing_and_changes_no_byte(
    run: Callable[..., GenerationOutcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    before = {p: p.read_bytes() for p in (tmp_path / "syn").rglob("*") if p.is_file()}
    generator = Stripes()
    capsys.readouterr()
    assert run(generator=generator).made == 0
    assert generator.calls == 0
    assert "nothing to make" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in (tmp_path / "syn").rglob("*") if p.is_file()}


def test_an_interrupted_run_goes_on_where_it_was(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    request = {"variations": 5, "micro_batch": 16}  # 310 images: units of 128, 128, 54
    with pytest.raises(KeyboardInterrupt):
        run(generator=Stripes(stop_after=10), **request)
    assert not list((tmp_path / "syn" / ".tmp").iterdir())
    again = Stripes()
    outcome = run(generator=again, **request)
    assert outcome.made == 310 - 128
    assert again.calls == 8 + 4
    run("whole", **request)
    assert tile_hashes(Dataset(tmp_path / "syn")) == tile_hashes(Dataset(tmp_path / "whole"))
    shards = {
        d: sorted(p.name for p in (tmp_path / d / f"tiles/{PX}").iterdir())
        for d in ("syn", "whole")
    }
    assert shards["syn"] == shards["whole"]


def test_a_shard_that_was_lost_is_made_again(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    run(variations=3)
    before = tile_hashes(Dataset(tmp_path / "syn"))
    next((tmp_path / f"syn/tiles/{PX}").glob("*.0-128.tar")).unlink()
    assert run(variations=3).made == 128
    assert tile_hashes(Dataset(tmp_path / "syn")) == before


def test_a_larger_limit_extends_a_smaller_one(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    run(conditions=21)
    small = tile_hashes(Dataset(tmp_path / "syn"))
    assert len(small) == 21
    assert run(conditions=40).made == 48 - 32  # both are rounded up to whole blocks of 16
    run("whole", conditions=40)
    large = tile_hashes(Dataset(tmp_path / "syn"))
    assert large == tile_hashes(Dataset(tmp_path / "whole"))
    assert small.items() <= large.items()
    assert run(conditions=21).made == 0
    assert tile_hashes(Dataset(tmp_path / "syn")) == large


@pytest.mark.parametrize("selection", ["there", "lost"])
def test_a_smaller_limit_keeps_what_is_there_and_says_so(
    run: Callable[..., GenerationOutcome],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    selection: str,
) -> None:
    run(conditions=40)
    dataset = Dataset(tmp_path / "syn")
    before, table = tile_hashes(dataset), dataset.selection_file("generated").read_bytes()
    if selection == "lost":
        dataset.selection_file("generated").unlink()
    capsys.readouterr()
    outcome = run(conditions=16)
    # Of a lost selection the images tell as much: whole blocks of them.
    there = 40 if selection == "there" else 48
    assert (outcome.made, outcome.selected) == (0, there)
    said = capsys.readouterr().out
    assert f"{there} images are there already or were begun, 16 were asked for" in said
    assert read_selection(dataset, "generated").rows == there
    assert before.items() <= tile_hashes(dataset).items()
    if selection == "there":
        assert dataset.selection_file("generated").read_bytes() == table
    # The command as before says nothing of the kind.
    run(conditions=there)
    assert "asked for" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gen-99999999999", "gen-x", "other"])
def test_images_that_a_forged_line_names_are_not_there(
    run: Callable[..., GenerationOutcome], tmp_path: Path, name: str
) -> None:
    """10^14 images were planned, or the name was a traceback."""
    run(conditions=16)
    dataset = Dataset(tmp_path / "syn")
    (entry,) = Ledger.read(dataset, "tile")[str(PX)].written["gen-00000"]
    files = []
    for file in entry.files:
        path = file.path.replace("gen-00000", name)
        shutil.copy2(dataset.root / file.path, dataset.root / path)
        files.append(replace(file, path=path))
    with Run(dataset, "tile", {}) as forged:
        forged.append([replace(entry, slide_id=name, files=tuple(files))])
    dataset.selection_file("generated").unlink()
    outcome = run(conditions=16)
    assert (outcome.made, outcome.selected) == (0, 16)


def test_a_lost_selection_is_the_same_by_the_same_command(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    run(conditions=40)
    path = Dataset(tmp_path / "syn").selection_file("generated")
    rows = read_selection(Dataset(tmp_path / "syn"), "generated")
    path.unlink()
    run(conditions=40)
    assert read_selection(Dataset(tmp_path / "syn"), "generated").content_hash == rows.content_hash


@pytest.mark.parametrize(("conditions", "made"), [(2, 16), (16, 16), (21, 32), (62, 62)])
def test_more_images_than_asked_for_are_announced_before_they_are_made(
    run: Callable[..., GenerationOutcome],
    capsys: pytest.CaptureFixture[str],
    conditions: int,
    made: int,
) -> None:
    """A block may only be cut short where the guidance ends, as features of it are read whole."""

    class Watched(Stripes):
        def generate_tiles(self, *args: Any, **named: Any) -> Any:
            said.append(capsys.readouterr().out)
            return super().generate_tiles(*args, **named)

    said: list[str] = []
    outcome = run(generator=Watched(), conditions=conditions)
    assert (outcome.made, outcome.selected) == (made, conditions)
    clause = f"{made} images for {conditions} selected: whole blocks of 16 are made"
    assert (clause in said[0]) == (made > conditions)
    run(conditions=conditions)
    assert "whole blocks" not in capsys.readouterr().out


def test_an_eta_is_known_after_the_first_steps(
    run: Callable[..., GenerationOutcome],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 100_000, 60))
    monkeypatch.setattr("common.console.time.monotonic", lambda: float(next(clock)))

    class Slow(Stripes):
        def generate_tiles(self, features: Any, seeds: Any, progress: Any = None) -> Any:
            for step in range(50):
                progress(step + 1, 50)
            return super().generate_tiles(features, seeds)

    run(generator=Slow(), conditions=16)
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert len(lines) >= 50
    assert lines[0].startswith("generate: 0/16 images")
    assert "step 1/50" in lines[0]
    assert not any("unknown" in line for line in lines)
    assert "step 25/50" in lines[24]
    assert lines[24].startswith("generate: 0/16 images")


def test_other_values_than_the_datasets_are_refused(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    run(conditions=4)
    with pytest.raises(UserError, match=r"seed is 0 in this dataset, 1 was asked for"):
        run(conditions=4, seed=1)
    with pytest.raises(UserError, match="model_sha256 is 'stripes' in this dataset, 'other'"):
        run(conditions=4, generator=Stripes("other"))


def test_a_real_dataset_is_never_taken_over(
    run: Callable[..., GenerationOutcome], evaluate_real: Callable[..., Dataset]
) -> None:
    real = evaluate_real(name="other")
    before = {path: path.read_bytes() for path in real.root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is a dataset of tiles cut from slides and `generate`"):
        run(out="other")
    assert before == {path: path.read_bytes() for path in real.root.rglob("*") if path.is_file()}


def test_neighbouring_seeds_share_no_image(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    for seed in (0, 1):
        run(f"s{seed}", seed=seed)
    first, second = (set(tile_hashes(Dataset(tmp_path / f"s{seed}")).values()) for seed in (0, 1))
    assert not first & second


def test_variations_of_a_tile_are_different_images_of_one_source(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    run(conditions=16, variations=3)
    dataset = Dataset(tmp_path / "syn")
    rows = read_candidates(dataset, "gen-00000").to_pylist()
    sources = [(row["source_slide_id"], row["source_rank"]) for row in rows]
    assert sources == [sources[i // 3 * 3] for i in range(48)]
    assert len(set(sources)) == 16
    assert len(set(tile_hashes(dataset).values())) == 48


def test_unconditional_images_have_no_source(tmp_path: Path) -> None:
    generate(Stripes(), Unconditional(20), Request(out=tmp_path / "syn"), ALONE)
    rows = read_candidates(Dataset(tmp_path / "syn"), "gen-00000").to_pylist()
    assert {(row["source_slide_id"], row["source_rank"]) for row in rows} == {(None, -1)}


def test_shards_are_journalled_like_those_of_the_tile_stage(
    run: Callable[..., GenerationOutcome], tmp_path: Path
) -> None:
    run(variations=3)
    dataset = Dataset(tmp_path / "syn")
    entries = Ledger.read(dataset, "tile")[str(PX)].written["gen-00000"]
    assert [(e.start, e.stop, e.scope) for e in entries] == [(0, 128, str(PX)), (128, 186, str(PX))]
    names = [[Path(f.path).name for f in e.files] for e in entries]
    assert names[0] == ["gen-00000.0-128.tar", "gen-00000.0-128.idx"]
    assert json.loads((tmp_path / "syn/dataset.json").read_text())["records"]["generate"]


def test_guidance_of_other_encoder_weights_is_refused_unless_forced() -> None:
    other = {**RECORD, "weights_sha256": "b" * 64, "random_weights": False}
    with pytest.raises(UserError, match=r"aaaaaaaaaaaa \(random\).*bbbbbbbbbbbb.*--force"):
        check_encoder(RECORD, other, force=False)
    assert "trained on" in check_encoder(RECORD, other, force=True)
    assert check_encoder(RECORD, dict(RECORD), force=False) == ""
    assert check_encoder(RECORD, None, force=False) == ""
    assert check_encoder(None, other, force=False) == ""


def test_guidance_at_another_resolution_is_refused_unless_forced() -> None:
    with pytest.raises(UserError, match=r"0.25 µm per pixel.*trained at 0.5.*--force"):
        check_resolution(0.25, 0.5, force=False)
    assert "trained at" in check_resolution(0.25, 0.5, force=True)
    assert check_resolution(0.503, 0.5, force=False) == ""
    assert check_resolution(None, 0.5, force=False) == ""


def test_features_of_another_width_are_refused() -> None:
    check_condition_dim(RECORD, DIM)
    check_condition_dim(None, None)
    with pytest.raises(UserError, match="12 values, the model takes 768"):
        check_condition_dim(RECORD, 768)
    with pytest.raises(UserError, match="takes no features"):
        check_condition_dim(RECORD, None)


def test_guidance_without_features_names_the_cache_command(
    evaluate_real: Callable[..., Dataset],
) -> None:
    with pytest.raises(UserError, match=r"pipeline cache .* --encoder uni2-h --selection train`"):
        SelectionConditions.open_selection(evaluate_real(), "train", "uni2-h")
