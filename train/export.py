"""A run's model in the form that users share: config.json and safetensors."""

from pathlib import Path
from typing import Any

import torch

from common.console import say
from common.errors import UserError
from model.cytosyn import CytoSyn, Records
from model.interpolant import Interpolant
from model.sit import SiT
from model.vae import VAE
from train.checkpoint import checkpoints_dir, latest_checkpoint, load_network, read_state
from train.config import Config, Weights, load_config
from train.setup import CONFIG_FILE, read_records


def export_run(
    run_dir: Path,
    out: Path,
    *,
    sit: Weights | None = None,
    vae: Weights | None = None,
    step: int | None = None,
) -> None:
    """Write the SiT and VAE of a checkpoint to `out`, averaged or raw as asked.

    Defaults are the configuration's `export` section and the newest checkpoint. Raises
    `UserError` where the run has no such checkpoint or weights.
    """
    config = load_config(_config_file(run_dir))
    checkpoint = _checkpoint(run_dir, step)
    chosen_sit, chosen_vae = sit or config.export.sit, vae or config.export.vae
    model = CytoSyn(
        SiT(config.model.sit),
        VAE(config.model.vae),
        interpolant=Interpolant(config.model.path),
        records=_records(config, run_dir, checkpoint, chosen_sit, chosen_vae),
    )
    load_network(checkpoint, _part("sit", chosen_sit), model.sit)
    # A frozen VAE is its average.
    kept_vae = chosen_vae if config.mode.trains_vae else "raw"
    load_network(checkpoint, _part("vae", kept_vae), model.vae)
    _check_finite(model, checkpoint)
    model.save_pretrained(out)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    say(
        f"exported {checkpoint.name} of {run_dir}: SiT {chosen_sit}, VAE {chosen_vae}, "
        f"{size:.1f} MB: {out}"
    )


def _records(
    config: Config, run_dir: Path, checkpoint: Path, sit: Weights, vae: Weights
) -> Records:
    records = read_records(run_dir)
    encoder: dict[str, Any] = records["encoder"]
    return Records(
        encoder=encoder.get("encoder"),
        encoder_weights=encoder.get("weights"),
        encoder_weights_sha256=encoder.get("weights_sha256"),
        encoder_is_random=encoder.get("random_weights"),
        mpp=records["dataset"].get("mpp"),
        tile_px=config.data.tile_px,
        training_step=read_state(checkpoint).step,
        sit=sit,
        vae=vae,
    )


def _config_file(run_dir: Path) -> Path:
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{run_dir} is not a run: it has no {CONFIG_FILE}")
    return path


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    if step is None:
        latest = latest_checkpoint(run_dir)
        if latest is None:
            raise UserError(f"{run_dir} has no checkpoint yet: nothing to export")
        return latest
    path = checkpoints_dir(run_dir) / f"step-{step:08d}"
    if not path.exists():
        there = ", ".join(sorted(p.name for p in checkpoints_dir(run_dir).glob("step-*")))
        raise UserError(f"{run_dir} has no checkpoint of step {step}; there: {there or 'none'}")
    return path


def _part(network: str, weights: Weights) -> str:
    return f"{network}_ema" if weights == "ema" else network


def _check_finite(model: CytoSyn, checkpoint: Path) -> None:
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"{checkpoint}: {bad[0]} is not finite: export an older step with --step")
