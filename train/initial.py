"""Weights to begin with: `init.vae` and `init.sit`, from this project's files or published ones."""

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from common.errors import UserError
from common.json_text import read_json
from common.terms import Terms, merge_terms, parse_terms
from model.sit import SiT
from model.vae import VAE
from model.weights import Tensors, fit_tensors, load_archive, read_tensors
from train.checkpoint import RECORDS_FILE, checkpoints_dir
from train.config import Config

_ARCHIVES = (".pt", ".pth")


def load_initial_weights(sit: SiT, vae: VAE, config: Config) -> None:
    """Put the weights of `init.vae` and `init.sit` in place, where the configuration names any.

    Either is a safetensors or PyTorch file of that network, a folder of them (an exported model,
    a checkpoint, a diffusers repository's `vae`), or a training checkpoint of the public REPA-E
    code. A VAE is read in CompVis or diffusers keys; a SiT of REPA-E as `published_sit` says.
    Raises `UserError` for a file that is missing, damaged or of another shape.
    """
    if config.init.vae:
        path = weights_file(config.init.vae, "vae")
        published = read_archived_part(path, "vae")
        # No archive of REPA-E's trainer: a file of the network alone.
        if published is None:
            published = dict(VAE.load(path, vae.config).state_dict())
        fit_tensors(vae, published, source=str(path))
    if config.init.sit:
        path = weights_file(config.init.sit, "sit")
        published = read_archived_part(path, "ema")
        tensors = read_tensors(path) if published is None else published_sit(published, sit)
        fit_tensors(sit, tensors, source=str(path))


def initial_terms(config: Config) -> tuple[Terms, ...]:
    """The terms of the weights that a run begins with; not recorded where no model states any."""
    return merge_terms(
        *(
            _weights_terms(f"init.{name}", Path(where))
            for name, where in (("vae", config.init.vae), ("sit", config.init.sit))
            if where
        )
    )


def _weights_terms(key: str, path: Path) -> tuple[Terms, ...]:
    for folder in (path.absolute(), path.absolute().parent):
        files = [folder / "config.json"]
        run_dir = folder.parent.parent
        if folder.parent == checkpoints_dir(run_dir):
            files.append(run_dir / RECORDS_FILE)
        for file in files:
            if terms := _stated_terms(file):
                return terms
    return (Terms(f"weights of {key}", "", path.name),)


def _stated_terms(file: Path) -> tuple[Terms, ...]:
    """The terms in a model's config.json or a run's records.json; none of another's file."""
    with suppress(OSError, ValueError, UserError):
        values = read_json(file)
        # A diffusers repository has a config.json, too, without records.
        records = values.get("records", values) if isinstance(values, dict) else None
        return parse_terms(records.get("terms")) if isinstance(records, dict) else ()
    return ()


def weights_file(name: str, network: str) -> Path:
    """The file itself; of a folder its NETWORK.safetensors, or the one .safetensors in it."""
    path = Path(name)
    if not path.is_dir():
        return path
    named = path / f"{network}.safetensors"
    candidates = [named] if named.exists() else sorted(path.glob("*.safetensors"))
    if len(candidates) != 1:
        raise UserError(
            f"init.{network}={path}: has no {named.name} and {len(candidates)} other .safetensors "
            "files: name the file itself"
        )
    return candidates[0]


def published_sit(given: Mapping[str, Tensor], sit: SiT) -> Tensors:
    """Tensors of a class-conditional REPA-E SiT as this SiT takes them.

    Its class table, with or without a null class, has no counterpart for features: the condition
    keeps its fresh weights. A larger token grid (256 px has 16 x 16) is cut to the positions that
    this one has, which began as the same sines and cosines. All else, latent statistics among it,
    is taken as it is.
    """
    tensors = {key: value for key, value in given.items() if not key.startswith("y_embedder.")}
    fresh = sit.state_dict()
    tensors |= {key: value for key, value in fresh.items() if key.startswith("y_embedder.")}
    # A larger grid of tokens has the same sines and cosines in its first rows and columns.
    positions, side = tensors.get("pos_embed"), sit.config.grid_size  # [1, g * g, D]
    if positions is not None:
        grid = round(positions.shape[1] ** 0.5)
        if grid > side and grid * grid == positions.shape[1]:
            rows = positions.unflatten(1, (grid, grid))
            tensors["pos_embed"] = rows[:, :side, :side].flatten(1, 2)
    return tensors


def read_archived_part(path: Path, part: str) -> Tensors | None:
    """A part of a training checkpoint of REPA-E's code (model, ema, vae); None of other files."""
    if path.suffix not in _ARCHIVES or not path.is_file():
        return None
    content = load_archive(path, safe_types=[argparse.Namespace], mapped=True)
    if not isinstance(content, Mapping) or not {"ema", "vae"} <= content.keys():
        return None
    tensors = content[part]
    return dict(tensors) if isinstance(tensors, Mapping) else None
