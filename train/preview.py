"""Previews of a run: reconstruction of fixed tiles, grids of samples under their guides."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from common.files import replacing_file
from model.cytosyn import CytoSyn
from model.images import from_uint8
from model.interpolant import Interpolant
from model.sit import SiT
from model.vae import VAE
from pipeline.dataset import BLOCK_ROWS
from train.config import Config
from train.source import BlockSource

_AT_ONCE = 8  # tiles of a forward pass: previews must fit into memory next to a training step


@dataclass(frozen=True)
class FixedTiles:
    """Tiles that stay the same over the run: uint8 [n, px, px, 3], and where the run uses them
    CLS [n, d] and patch tokens [n, t, d]."""

    tiles: Tensor
    cls: Tensor | None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class ReconstructionQuality:
    """How well a VAE reconstructs tiles, on the grey scale [0, 1].

    `l1` is the mean absolute error, `psnr` the mean over tiles of the peak signal-to-noise ratio
    in dB, of posterior means decoded and clamped.
    """

    tiles: int
    l1: float
    psnr: float


def read_fixed_tiles(source: BlockSource, rows: Iterable[tuple[str, int]]) -> FixedTiles:
    """The tiles and features of rows (slide_id, rank), in their order, on the CPU: tiles uint8
    [n, px, px, 3], CLS float32 [n, d], tokens float16 [n, t, d]."""
    samples = []
    for slide_id, rank in rows:
        block = source.open_block(slide_id, rank // BLOCK_ROWS)
        samples.append(source.read_sample(block, rank, rank % BLOCK_ROWS))
    cls = [torch.tensor(sample.cls) for sample in samples if sample.cls is not None]
    tokens = [torch.tensor(sample.tokens) for sample in samples if sample.tokens is not None]
    tiles = torch.from_numpy(np.stack([sample.tile for sample in samples]))
    return FixedTiles(
        tiles, torch.stack(cls) if cls else None, torch.stack(tokens) if tokens else None
    )


@torch.no_grad()
def measure_reconstruction(vae: VAE, tiles: Tensor) -> ReconstructionQuality:
    """L1 and PSNR of tiles uint8 [n, px, px, 3] through posterior mean and decoder."""
    errors, psnrs = [], []
    with evaluation_mode(vae):
        for part in tiles.split(_AT_ONCE):
            images = from_uint8(part.to(next(vae.parameters()).device))
            decoded = vae.decode(vae.encode(images).mode()).clamp(-1, 1)
            # Images span 2, from -1 to 1, while errors are given on the scale from 0 to 1.
            difference = (decoded - images) / 2
            errors.append(difference.abs().mean(dim=(1, 2, 3)))
            mse = difference.square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
            psnrs.append(-10 * torch.log10(mse))
    return ReconstructionQuality(
        len(tiles), float(torch.cat(errors).mean()), float(torch.cat(psnrs).mean())
    )


def draw_samples(config: Config, sit: SiT, vae: VAE, fixed: FixedTiles) -> npt.NDArray[np.uint8]:
    """A picture uint8 [2 px, n px, 3]: the fixed tiles that guide, and a sample below each.

    The seeds are fixed, so that grids of different steps show one and the same images growing.
    """
    guides = fixed.tiles[: config.log.samples].numpy()
    features = None if fixed.cls is None else fixed.cls[: len(guides)]
    model = CytoSyn(sit, vae, interpolant=Interpolant(config.model.path))
    # Without a condition, too, the row is as wide as that of the guides above it.
    with evaluation_mode(sit), evaluation_mode(vae):
        images = model.generate(
            features,
            num_images_per_prompt=1 if features is not None else len(guides),
            num_inference_steps=config.log.sample_steps,
            guidance_scale=config.log.guidance_scale,
            seed=config.run.seed,
            solver="ode",
            batch_size=_AT_ONCE,
        )
    return np.concatenate([np.hstack(list(guides)), np.hstack(list(images))])


def save_picture(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write an RGB picture uint8 [h, w, 3] as PNG, whole or not at all."""
    with replacing_file(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode inside the block, then as it was."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
