"""The widths of features that the networks are built for: the encoder's, not the user's to set."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import read_yaml
from common.errors import UserError
from pipeline.dataset import Dataset, open_dataset
from pipeline.dataset.features import read_encoder_record

if TYPE_CHECKING:
    from train.config import Config


def encoder_widths(config: "Config") -> dict[str, int]:
    """`condition_dim` and `token_dim` of the features that a run reads.

    Widths are those that the run was begun with, else of the dataset's encoder.json, else the
    encoder table's. What none says is left out: that the features are missing is reported where
    they are opened.
    """
    # A finished run needs no dataset, and one that goes on is held against its features.
    if config.run.dir and (begun := _begun_widths(config.run.dir)):
        return begun
    widths: dict[str, int] = {}
    if config.data.dataset:
        with contextlib.suppress(UserError):  # opening the data raises it, with what to do
            widths = _cached_widths(open_dataset(Path(config.data.dataset)), config)
    if len(widths) < 2:
        widths = _table_widths(config.data.encoder) | widths
    return {key: width for key, width in widths.items() if width > 0}


def _begun_widths(run_dir: str) -> dict[str, int]:
    """The widths in the configuration of a run that is there; {} where that cannot be read."""
    with contextlib.suppress(UserError, LookupError, TypeError):
        sit = read_yaml(Path(run_dir) / "config.yaml")["model"]["sit"]
        widths = {key: sit[key] for key in ("condition_dim", "token_dim")}
        return widths if all(type(width) is int for width in widths.values()) else {}
    return {}


def _table_widths(encoder: str) -> dict[str, int]:
    from model.encoders import encoder_spec  # torchvision takes seconds to import

    try:
        spec = encoder_spec(encoder)
    except UserError:
        return {}
    return {"condition_dim": spec.dim, "token_dim": spec.token_dim}


def _cached_widths(dataset: Dataset, config: "Config") -> dict[str, int]:
    data, widths = config.data, {}
    for kind, is_read in (
        ("cls", config.uses_condition),
        (config.tokens_kind, config.reads_tokens),
    ):
        if not is_read:
            continue
        try:
            record = read_encoder_record(
                dataset, tile_px=data.tile_px, encoder=data.encoder, kind=kind, view=data.view
            )
        except UserError:
            continue
        shape = record.get("tokens_shape") or []
        if kind == "cls" and "dim" in record:
            widths["condition_dim"] = int(record["dim"])
        elif kind != "cls" and len(shape) == 2 and isinstance(shape[1], int):
            widths["token_dim"] = shape[1]
    return widths
