"""A run's model in the form that users share: config.json and safetensors."""

from pathlib import Path

import torch

from common.console import print_line
from common.errors import UserError
from common.files import find_link
from model.cytosyn import CytoSyn, Records
from model.interpolant import Interpolant
from model.sit import SiT
from model.vae import VAE
from model.weights import build_from_tensors, read_tensors
from train.card import model_card
from train.checkpoint import (
    RECORDS_FILE,
    DamagedCheckpointError,
    check_sums,
    checkpoints_dir,
    latest_checkpoint,
    list_checkpoints,
    read_state,
)
from train.config import Config, Weights
from train.setup import read_config, read_records


def export_run(
    run_dir: Path,
    out: Path,
    *,
    sit: Weights | None = None,
    vae: Weights | None = None,
    step: int | None = None,
) -> None:
    """Write the SiT and VAE of a checkpoint to `out`, averaged (ema) or raw.

    Defaults are the configuration's `export` section and the newest checkpoint. Raises
    `UserError` where the run has no such checkpoint or weights.
    """
    if (link := find_link(run_dir, out)) is not None:
        raise UserError(
            f"cannot write {out}: {link} is a link in the run directory, which may lead anywhere; "
            "name another folder"
        )
    config, checkpoint = read_config(run_dir), _find_checkpoint(run_dir, step)
    chosen_sit, chosen_vae = sit or config.export.sit, vae or config.export.vae
    # A frozen VAE has no average in the checkpoint: it is its average.
    averaged = chosen_vae == "ema" and config.mode.trains_vae
    sit_file = checkpoint / f"{'sit_ema' if chosen_sit == 'ema' else 'sit'}.safetensors"
    vae_file = checkpoint / f"{'vae_ema' if averaged else 'vae'}.safetensors"
    try:
        state = read_state(checkpoint)
        check_sums(checkpoint, [sit_file.name, vae_file.name])
    except DamagedCheckpointError as error:
        raise UserError(
            f"{error}: run the same training command again, which goes on from the checkpoint "
            "before it, or choose another with --step"
        ) from error
    # Around the tensors: the configuration alone may ask for any amount of memory.
    records = _describe_weights(run_dir, config, state.step, sit=chosen_sit, vae=chosen_vae)
    model = CytoSyn(
        build_from_tensors(
            lambda: SiT(config.model.sit), read_tensors(sit_file), source=str(sit_file)
        ),
        build_from_tensors(
            lambda: VAE(config.model.vae), read_tensors(vae_file), source=str(vae_file)
        ),
        interpolant=Interpolant(config.model.path),
        records=records,
    )
    # Non-finite weights would only show as black images, far from here.
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{checkpoint}: {name} is not finite: export an older step with --step")
    model.save_pretrained(out, card=model_card(config, read_records(run_dir), records, run_dir))
    size = sum(path.lstat().st_size for path in out.iterdir()) / 1e6
    print_line(
        f"exported {checkpoint.name} of {run_dir}: SiT {chosen_sit}, VAE {chosen_vae}, "
        f"{size:.1f} MB: {out}"
    )


def _describe_weights(
    run_dir: Path, config: Config, step: int, *, sit: Weights, vae: Weights
) -> Records:
    records = read_records(run_dir)
    encoder = records.part("encoder")
    try:
        return Records.from_dict(
            {
                "encoder": encoder.get("encoder"),
                "encoder_weights": encoder.get("weights"),
                "encoder_weights_sha256": encoder.get("weights_sha256"),
                "encoder_is_random": encoder.get("random_weights"),
                "mpp": records.part("dataset").get("mpp"),
                "tile_px": config.data.tile_px,
                "training_step": step,
                "sit": sit,
                "vae": vae,
                "terms": records.get("terms"),
            }
        )
    except UserError as error:
        raise UserError(f"{run_dir / RECORDS_FILE}: {error}") from error


def _find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of that step, or the newest."""
    if step is None:
        latest = latest_checkpoint(run_dir)
        if latest is None:
            raise UserError(f"{run_dir} has no checkpoint yet: nothing to export")
        return latest
    path = checkpoints_dir(run_dir) / f"step-{step:08d}"
    if not path.exists():
        there = ", ".join(path.name for path in list_checkpoints(run_dir))
        raise UserError(f"{run_dir} has no checkpoint of step {step}; there: {there or 'none'}")
    return path
