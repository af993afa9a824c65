"""What images and numbers descend from: from the model and what guides to the report."""

import json
from pathlib import Path

from evaluate_data import DIM, DOOR_PX, DOOR_RECORD, export_model, make_real
from huggingface_hub import DatasetCard
from test_report import Page

from common.terms import Terms
from evaluate.__main__ import main
from evaluate.generators import pixcell
from evaluate.generators.open import KINDS, settings_for
from evaluate.generators.pixcell import PixCell
from evaluate.generators.released import LoadedPipeline
from evaluate.generators.released_cytosyn import ReleasedCytoSyn
from model.encoders import ENCODERS
from pipeline.dataset import claim_identity, read_selection, read_terms

SLIDES, COHORT = Terms("slides", "CC0-1.0"), Terms("slides of P", "", non_commercial=True)
ENCODER = Terms("encoder h0-mini", "CC BY-NC-ND 4.0", "bioptimus/H0-mini", True, "https://x")


def test_terms_go_from_model_and_guidance_to_the_report(tmp_path: Path) -> None:
    model = export_model(tmp_path / "model", DOOR_PX, DIM, DOOR_RECORD)
    config = json.loads((model / "config.json").read_text())
    config["records"]["terms"] = [vars(SLIDES), vars(ENCODER)]
    (model / "config.json").write_text(json.dumps(config))
    real = make_real(tmp_path / "real", record={**DOOR_RECORD, "terms": [vars(ENCODER)]})
    claim_identity(real, {}, stage="scan", versions={}, terms=[COHORT])
    synthetic = tmp_path / "synthetic"
    assert main(["generate", "--model", str(model), "--guidance", str(real.root), "--selection",
                 "train", "--steps", "1", "--limit", "16", "--out", str(synthetic), "--device",
                 "cpu"]) == 0  # fmt: skip
    from pipeline.dataset import Dataset

    assert read_terms(Dataset(synthetic)) == (SLIDES, ENCODER, COHORT)
    card = (synthetic / "README.md").read_text()
    head = DatasetCard(card).data.to_dict()
    assert (head["license"], head["configs"][0]["config_name"]) == ("other", "32px")
    for line in ("Guided by features of h0-mini", "Selection generated: 16 tiles", "slides: CC0",
                 "never for diagnosis", "steps: 1", "RANDOM weights"):  # fmt: skip
        assert line in card, line
    selection = read_selection(real, "train")
    tiles = [f"{slide}:{ranks[0]}" for slide, ranks in selection.items()][:2]
    for name, guides in (
        ("mean", ["--selection", "train", "--mean", "all"]),
        ("between", ["--interpolate", *tiles]),
    ):
        guided = ["--guidance", str(real.root), *guides, "--out", str(tmp_path / name)]
        assert main(["generate", "--model", str(model), *guided, "--steps", "1", "--device",
                     "cpu"]) == 0  # fmt: skip
        assert read_terms(Dataset(tmp_path / name)) == (SLIDES, ENCODER, COHORT)
    free = tmp_path / "free"
    assert main(["generate", "--model", str(model), "--unconditional", "--count", "16", "--steps",
                 "1", "--out", str(free), "--device", "cpu"]) == 0  # fmt: skip
    assert read_terms(Dataset(free)) == (SLIDES, ENCODER)


def test_the_report_lists_what_its_numbers_descend_from(tmp_path: Path) -> None:
    from evaluate.report.template import render_template

    text = " ".join(Page(render_template("terms.html.j2", terms=[vars(ENCODER)])).text)
    assert "encoder h0-mini: CC BY-NC-ND 4.0, non-commercial use only (bioptimus/H0-mini" in text
    assert render_template("terms.html.j2", terms=None).strip() == ""


def test_released_models_state_theirs() -> None:
    assert set(KINDS) == {"own", "cytosyn", "pixcell"}
    assert ReleasedCytoSyn.model_terms.licence == "CC BY-NC-ND 4.0"
    assert ReleasedCytoSyn.model_terms.non_commercial
    assert PixCell.model_terms.licence == ""  # not established: its page has it
    loaded = LoadedPipeline(None, "float32", terms=pixcell._vae_terms(None))
    model, vae, encoder = PixCell(loaded, settings_for("pixcell", {})).terms
    assert (model.covers, encoder.covers) == ("model PixCell-256", "encoder uni2-h")
    assert vae.describe() == (
        "VAE of PixCell-256: Stability AI Community License "
        "(stabilityai/stable-diffusion-3.5-large, "
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-large)"
    )
    assert pixcell._vae_terms("none") == ()  # its own
    assert pixcell._vae_terms("mine/vae") == (Terms("VAE of PixCell-256", "", "mine/vae"),)


def test_encoders_terms_say_what_is_known() -> None:
    known = {name: spec.terms.non_commercial for name, spec in ENCODERS.items()}
    assert known["h0-mini"] is known["phikon-v2"] is known["lunit-vit-s16"] is True
    assert known["hibou-b"] is known["midnight"] is known["efficientnet-lite0"] is False
    assert known["prov-gigapath"] is None  # research only
