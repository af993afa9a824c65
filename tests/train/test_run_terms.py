"""What a run descends from is in its records and in the exported model."""

import json
from pathlib import Path

from conftest import make_dataset, small_config
from huggingface_hub import ModelCard

from common.json_text import read_json
from common.terms import Terms, parse_terms
from model import CytoSyn
from pipeline.dataset import claim_identity
from train.config import load_config
from train.export import export_run
from train.initial import initial_terms
from train.loop import train

SLIDES = Terms("slides", "CC0-1.0")


def test_terms_go_from_the_dataset_to_the_model_and_on_to_what_begins_with_it(
    tmp_path: Path,
) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    claim_identity(dataset, {}, stage="scan", versions={}, terms=[SLIDES])
    encoder = Terms("encoder h0-mini", "CC BY-NC-ND 4.0", "bioptimus/H0-mini", True, "https://x")
    for path in dataset.root.glob("features/**/encoder.json"):
        record = read_json(path)
        path.write_text(json.dumps({**record, "terms": [vars(encoder)]}))
    run = tmp_path / "run"
    train(small_config(dataset, run, "run.steps=1", "log.every=1"))
    assert parse_terms(read_json(run / "records.json")["terms"]) == (SLIDES, encoder)
    export_run(run, tmp_path / "model")
    assert CytoSyn.from_pretrained(tmp_path / "model").records.terms == (SLIDES, encoder)
    card = (tmp_path / "model" / "README.md").read_text()
    head = ModelCard(card).data.to_dict()
    assert (head["license"], head["library_name"]) == ("other", "histogen")
    for line in ("slides: CC0-1.0", "1 steps of 5 tiles", "Reconstruction of training tiles: PSNR",
                 "h0-mini, weights random:0", "RANDOM weights",
                 "evaluate generate --model FOLDER"):  # fmt: skip
        assert line in card, line

    # A run that begins with that model descends from the same, and one of other weights says so.
    bare = make_dataset(tmp_path / "bare")
    for source, expected in (
        (tmp_path / "model", (SLIDES, encoder)),
        (tmp_path / "model" / "vae.safetensors", (SLIDES, encoder)),
    ):
        begun = tmp_path / f"begun-{source.name}"
        train(small_config(bare, begun, "run.steps=1", "log.every=1", f"init.vae={source}"))
        assert parse_terms(read_json(begun / "records.json")["terms"]) == expected
    (tmp_path / "model" / "vae.safetensors").rename(tmp_path / "vae.safetensors")
    begun = tmp_path / "begun-alone"
    alone = f"init.vae={tmp_path / 'vae.safetensors'}"
    train(small_config(bare, begun, "run.steps=1", "log.every=1", alone))
    (unknown,) = parse_terms(read_json(begun / "records.json")["terms"])
    assert unknown.describe() == "weights of init.vae: licence not recorded (vae.safetensors)"


def test_weights_of_a_diffusers_folder_and_of_a_checkpoint_have_their_terms(tmp_path: Path) -> None:
    """A config.json of other software has no records, and a checkpoint's run states them."""
    other, run = tmp_path / "diffusers", tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (run / "records.json").write_text(json.dumps({"terms": [vars(SLIDES)]}))
    other.mkdir()
    for text in ('{"_class_name": "AutoencoderKL"}', "[]", '{"records": 3}', "not JSON"):
        (other / "config.json").write_text(text)
        config = load_config(None, [f"init.vae={other}"])
        assert initial_terms(config) == (Terms("weights of init.vae", "", "diffusers"),)
    assert initial_terms(load_config(None, [f"init.vae={checkpoint}"])) == (SLIDES,)
