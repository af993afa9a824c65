"""README.md of an exported model."""

from pathlib import Path

from common.cards import render_card
from common.json_text import read_json
from common.record import Record
from model.cytosyn import Records
from train.config import Config
from train.setup import SUMMARY_FILE

_TAGS = ["histology", "pathology", "diffusion", "repa-e"]


def model_card(config: Config, records: Record, weights: Records, run_dir: Path) -> str:
    """The card of a run's model: data, encoder, training, use, limits, what was measured, terms."""
    name = f"histogen {config.run.mode} model, step {weights.training_step}"
    head = {
        "library_name": "histogen",
        "tags": _TAGS,
        "pipeline_tag": "unconditional-image-generation",
    }
    sections = [
        ("Data", _describe_data(config, records, weights)),
        ("Encoder", _describe_encoder(weights)),
        ("Training", _describe_training(config, weights)),
        ("Measured", _describe_measured(run_dir)),
        ("How to use it", _describe_use(weights)),
        (
            "Intended use",
            ["For research: images of tissue that no patient has, never for diagnosis"],
        ),
        ("Limits", _describe_limits(weights)),
    ]
    return render_card(name, head, sections, weights.terms)


def _describe_data(config: Config, records: Record, weights: Records) -> list[str]:
    rows = records.get("rows")
    tiles = f"{rows:,} tiles" if isinstance(rows, int) else "tiles"
    mpp = f"{weights.mpp:g} µm per pixel" if weights.mpp else "unknown resolution"
    return [f"{tiles} of {config.data.tile_px} px at {mpp}, selection {config.data.selection}"]


def _describe_encoder(weights: Records) -> list[str]:
    if weights.encoder is None:
        return ["None: the model is not conditioned"]
    sha = (weights.encoder_weights_sha256 or "unknown")[:16]
    return [f"{weights.encoder}, weights {weights.encoder_weights} (sha256 {sha})"]


def _describe_use(weights: Records) -> list[str]:
    guide = (
        "--guidance DATASET --selection NAME" if weights.encoder else "--unconditional --count 64"
    )
    return [
        f"Images: python -m evaluate generate --model FOLDER {guide} --out IMAGES, where FOLDER "
        "is a copy of this one",
        'In Python: CytoSyn.from_pretrained("FOLDER"), from the module model.cytosyn of histogen',
    ]


def _describe_training(config: Config, weights: Records) -> list[str]:
    optim, sit = config.optim, config.model.sit
    batch = config.data.batch_size
    return [
        f"Mode {config.run.mode}, {weights.training_step:,} steps of {batch} tiles",
        f"SiT: {sit.depth} blocks of {sit.hidden_size}; VAE: {config.model.vae.downsampling} px "
        f"to a latent, {sit.latent_channels} channels",
        f"Learning rates: SiT {optim.lr_sit:g}, VAE {optim.lr_vae:g}",
        f"Weights: SiT {weights.sit}, VAE {weights.vae} (ema: moving average)",
    ]


def _describe_measured(run_dir: Path) -> list[str]:
    """What the run itself measured; a report measures more."""
    try:
        summary = Record(read_json(run_dir / SUMMARY_FILE), SUMMARY_FILE)
        psnr = summary.part("reconstruction").optional("psnr_trained")
    except (OSError, ValueError):
        return []
    return [f"Reconstruction of training tiles: PSNR {psnr:.2f} dB"] if psnr is not None else []


def _describe_limits(weights: Records) -> list[str]:
    from model.encoders import is_of_photographs  # torchvision takes seconds to import

    lines = ["Draws the kinds of tissue that it was trained on, at their resolution and stain"]
    if is_of_photographs(weights.encoder or ""):
        lines.append(f"{weights.encoder} was trained on photographs, not on tissue")
    if weights.encoder_is_random:
        lines.append("The encoder had RANDOM weights: a dry run, its images mean nothing")
    return lines
