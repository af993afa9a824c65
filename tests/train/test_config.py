"""The configuration: complete, reloadable, and strict in one clear line."""

from pathlib import Path

import pytest
from conftest import DIM, TOKENS, small_config
from hypothesis import given
from hypothesis import strategies as st

from common.config import dotted_keys
from common.errors import UserError
from model.encoders import ENCODERS
from pipeline.dataset import Dataset
from train.config import Config, differing_keys, load_config

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
PAPER = CONFIGS / "cytosyn-40m.yaml"
NEEDED = {name: ["init.vae=vae.safetensors"] for name in ("repa-posttrain", "ldm-baseline")}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_load_and_the_written_configuration_reads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["run.dir=somewhere", *NEEDED.get(path.stem, ())])
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config
    assert load_config(written).hash == config.hash


def test_the_papers_preset_holds_the_papers_values() -> None:
    config = load_config(CONFIGS / "cytosyn-40m.yaml")
    assert config.data.batch_size == 640
    assert config.optim.lr_sit == config.optim.lr_vae == config.optim.lr_discriminator == 1e-4
    assert config.optim.betas == (0.9, 0.999)
    assert config.optim.clip == 1.0
    assert (config.loss.sit_align, config.loss.vae_align) == (0.5, 1.5)
    assert config.loss.condition_dropout == 0.1
    assert config.ema.sit == 0.9999
    assert not config.ema.warmup
    assert config.loss.generator_start == 0
    assert (config.model.sit.hidden_size, config.model.sit.depth) == (1152, 28)
    assert config.model.sit.train_pos_embed, "REPA-E's loop makes every parameter trainable"
    assert config.export == type(config.export)(sit="ema", vae="raw")


def test_the_second_version_differs_by_length_and_the_averaged_vae() -> None:
    one, two = (load_config(CONFIGS / f"cytosyn-{name}.yaml") for name in ("40m", "v2"))
    assert differing_keys(two, one) == []  # steps and export may change when a run goes on
    assert (two.export.sit, two.export.vae) == ("ema", "ema")
    assert two.run.steps * 40 == pytest.approx(one.run.steps * 108)  # the same epochs


@pytest.mark.parametrize(("name", "mode"), [("repa-posttrain", "repa"), ("ldm-baseline", "ldm")])
def test_frozen_presets_train_the_papers_sit(name: str, mode: str) -> None:
    with pytest.raises(UserError, match=r"set init\.vae"):
        load_config(CONFIGS / f"{name}.yaml")
    config, paper = load_config(CONFIGS / f"{name}.yaml", NEEDED[name]), load_config(PAPER)
    assert config.run.mode == mode
    assert config.uses_alignment is config.uses_loss("sit_align") is (mode == "repa")
    assert (config.model, config.optim, config.ema) == (paper.model, paper.optim, paper.ema)
    assert (config.data, config.checkpoint) == (paper.data, paper.checkpoint)


def test_overrides_take_the_type_of_their_key() -> None:
    config = load_config(
        None, ["run.dir=007", "optim.lr_sit=1e-5", "optim.betas=[0.5, 0.6]", "ema.warmup=true"]
    )
    assert config.run.dir == "007"
    assert config.optim.lr_sit == 1e-5
    assert config.optim.betas == (0.5, 0.6)
    assert config.ema.warmup is True


def test_a_whole_section_and_then_its_key() -> None:
    config = load_config(None, ["model.sit={depth: 9, num_heads: 8}", "model.sit.depth=10"])
    assert (config.model.sit.depth, config.model.sit.num_heads) == (10, 8)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "optim.lr_sitt=1",
            "unknown configuration key 'optim.lr_sitt': did you mean 'optim.lr_sit'",
        ),
        ("optm={}", "did you mean 'optim'"),
        ("data.steps=4", "did you mean 'run.steps'"),
        ("data.batch_size=ten", "'data.batch_size': expected a whole number, got 'ten'"),
        ("data.batch_size=2.5", "'data.batch_size': expected a whole number"),
        ("optim.lr_sit=fast", "'optim.lr_sit': expected a number, got 'fast'"),
        ("ema.warmup=1", "'ema.warmup': expected true or false"),
        ("run.mode=gan", "'run.mode': expected one of repa-e, repa, ldm"),
        ("run=3", "'run': expected a section of keys"),
        ("optim.betas=[0.9]", "'optim.betas': expected a list of 2 values"),
        ("run.steps", "expected key=value"),
        ("run.seed=-1", "'run.seed': expected a whole number in"),
        ("model.sit.depth=0", "depth"),
        ("model.sit.latent_size=32", "'model.sit.latent_size': expected data.tile_px"),
        ("run.mode=repa", "set init.vae"),
        ("config_version=9", "'config_version': expected 1"),
        ("run.dir.x=1", "expected text"),
        ("optim.weight_decay=-0.1", "'optim.weight_decay': expected a number of 0 or more"),
        ("log.guidance_scale=-1", "'log.guidance_scale': expected a number of 0 or more"),
    ],
)
def test_mistakes_get_one_line_that_names_the_key(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_off_is_a_word_and_not_false(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {compile: off}\n")
    assert load_config(tmp_path / "c.yaml").run.compile == "off"
    assert load_config(None, ["run.compile=off"]).run.compile == "off"


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(UserError, match="not YAML"):
        load_config(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="expected keys and values, got a list"):
        load_config(broken)


def test_a_yaml_file_cannot_run_code(tmp_path: Path) -> None:
    evil = tmp_path / "evil.yaml"
    evil.write_text("run: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not YAML"):
        load_config(evil)


@given(st.sampled_from(dotted_keys(Config)), st.integers(0, 50), st.text("abcxyz", min_size=1))
def test_a_misspelt_key_is_never_accepted(key: str, at: int, extra: str) -> None:
    wrong = key[: at % (len(key) + 1)] + extra + key[at % (len(key) + 1) :]
    if wrong not in dotted_keys(Config):
        with pytest.raises(UserError):
            load_config(None, [f"{wrong}=1"])


def test_what_may_change_when_a_run_goes_on() -> None:
    base = Config()
    longer = load_config(None, ["run.steps=9", "log.every=3", "data.threads=1", "run.device=cpu"])
    other = load_config(None, ["optim.lr_sit=0.5", "run.seed=4"])
    assert longer.hash == base.hash
    assert differing_keys(longer, base) == []
    assert other.hash != base.hash
    assert differing_keys(other, base) == [
        "run.seed is 0 there, 4 here",
        "optim.lr_sit is 0.0001 there, 0.5 here",
    ]


def test_widths_are_those_of_the_cached_features(train_dataset: Dataset, tmp_path: Path) -> None:
    """Of the table where nothing is cached; a width that is given stays, and is refused later."""
    sit = small_config(train_dataset, tmp_path).model.sit
    assert (sit.condition_dim, sit.token_dim) == (DIM, TOKENS[1])
    other = small_config(train_dataset, tmp_path, "model.sit.token_dim=5").model.sit
    assert (other.condition_dim, other.token_dim) == (DIM, 5)
    for name in ("phikon-v2", "efficientnet-lite0"):
        sit = load_config(PAPER, [f"data.encoder={name}"]).model.sit
        assert (sit.condition_dim, sit.token_dim) == (ENCODERS[name].dim, ENCODERS[name].token_dim)
    begun = small_config(train_dataset, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(begun.to_yaml())
    again = small_config(train_dataset, tmp_path / "run", "data.dataset=/gone")
    assert again.hash == begun.hash
    whole = load_config(None, ["data.encoder=phikon-v2", "model.sit={depth: 9}"]).model.sit
    assert (whole.depth, whole.condition_dim) == (9, 1024)


def test_the_ungated_preset_is_the_papers_but_for_the_encoder() -> None:
    ungated, paper = load_config(CONFIGS / "ungated.yaml"), load_config(PAPER)
    spec = ENCODERS[ungated.data.encoder]
    assert spec.gating == ""
    assert ungated.model.sit.num_tokens == spec.num_tokens == spec.native_grid**2
    differing = {text.partition(" ")[0].rstrip(":") for text in differing_keys(ungated, paper)}
    assert differing == {"data.encoder", "model.sit.condition_dim", "model.sit.token_dim"}
