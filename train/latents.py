"""The latent statistics that a run on given weights begins with.

Without them the alignment loss of a pretrained VAE would see latents of a wrong scale for the
first steps, and the average, which scales the samples, for tens of thousands. Where the VAE is
frozen they are all that ever normalises its latents, as in REPA (Yu et al., arXiv 2410.06940) and
in REPA-E's second stage (arXiv 2504.10483), which read them from a file.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.console import open_meter, print_line
from common.errors import UserError
from common.json_text import read_json
from common.torch_processes import Processes
from model.images import from_uint8
from model.latent_norm import LatentNorm
from model.vae import VAE
from model.weights import load_archive, read_tensors
from pipeline.dataset import BLOCK_ROWS, Dataset
from train.config import Config
from train.initial import read_archived_part, weights_file
from train.source import BlockSource

_AT_ONCE = 8
"""Tiles of a forward pass: always the same ones together, so that no sum depends on how many
processes share the work."""

_AHEAD = 2  # passes whose tiles are read while another is computed


class LatentScale(NamedTuple):
    """What normalises latents: mean [C] and variance [C] per channel, and in words of what."""

    mean: Tensor
    variance: Tensor
    source: str


def measure_latents(
    vae: VAE,
    dataset: Dataset,
    rows: Sequence[tuple[str, int]],
    config: Config,
    processes: Processes,
) -> LatentScale:
    """Moments (float64 [C]) of the VAE's latents of tiles (slide_id, rank), over all processes.

    The variance is that of posterior samples, unbiased: of the means, and the mean of the
    variances. Networks compute in float32, sums in float64. The result is a function of the
    weights and the rows: not of the batch size, the number of processes, threads or parts.
    Raises `UserError` for a damaged tile (which data.on_error=skip leaves out) and for latents
    that are not finite.
    """
    values, first, second, within = _sum_over_tiles(vae, dataset, rows, config, processes).unbind()
    mean = first / values
    between = (second - values * mean.square()).clamp(min=0) / (values - 1)
    count = round(float(values[0])) // config.model.sit.latent_size**2
    scale = LatentScale(
        mean, between + within / values, f"{count:,} tiles of selection '{config.data.selection}'"
    )
    if not _is_usable(scale):
        raise UserError(
            f"init.vae={config.init.vae}: its latents of the selection's tiles are not finite; "
            "give other weights"
        )
    return scale


def set_latent_scale(norms: Sequence[LatentNorm], scale: LatentScale) -> None:
    """Make the scale the running statistics of the norms.

    Raises `UserError` where it has another number of channels or is not finite.
    """
    for norm in norms:
        channels, given = len(norm.running_mean), scale.mean.numel()
        if given not in (1, channels) or not _is_usable(scale):
            raise UserError(
                f"{scale.source}: has latent statistics of {given} channels that do not fit the "
                f"SiT's {channels} or are not finite: set init.statistics=tiles"
            )
        norm.running_mean.copy_(scale.mean)
        norm.running_var.copy_(scale.variance)


def read_latent_scale(name: str) -> LatentScale:
    """The statistics that come with `init.vae`=`name`, from the first of these that is there.

    Those of the SiT in an exported model's or a checkpoint's folder; of the averaged SiT in a
    training checkpoint of REPA-E; of REPA-E's `NAME-latents-stats.pt` next to `NAME.pt`; the
    `scaling_factor` and `shift_factor` of a diffusers config.json. Raises `UserError` for none.
    """
    path = weights_file(name, "vae")
    folder = path.parent
    if Path(name).is_dir():
        for stem in ("sit_ema", "sit"):
            if (found := folder / f"{stem}.safetensors").exists():
                return _scale_of_sit(read_tensors(found), str(found))
    averaged = read_archived_part(path, "ema")
    if averaged is not None:
        return _scale_of_sit(averaged, str(path))
    beside = path.with_name(f"{path.stem}-latents-stats.pt")
    if beside.exists():
        return _scale_of_file(beside)
    if (scale := _scale_of_config(folder / "config.json")) is not None:
        return scale
    raise UserError(
        f"init.statistics=vae: {name} brings no latent statistics (an exported model's folder, a "
        f"checkpoint of REPA-E, {beside.name} or a config.json with scaling_factor does); set "
        "init.statistics=tiles to compute them"
    )


def describe_latents(norm: LatentNorm, source: str, *, fixed: bool) -> str:
    """One line for the console: mean and standard deviation per channel, and of what."""
    means = " ".join(f"{value:.3g}" for value in norm.running_mean.tolist())
    stds = " ".join(f"{value:.3g}" for value in norm.running_var.sqrt().tolist())
    fate = "fixed from here on" if fixed else "where the running ones begin"
    return f"latent statistics: mean {means}, std {stds}, of {source}; {fate}"


def _is_usable(scale: LatentScale) -> bool:
    return bool(
        torch.isfinite(scale.mean).all()
        and torch.isfinite(scale.variance).all()
        and (scale.variance >= 0).all()
    )


def _scale_of_sit(tensors: Mapping[str, Tensor], source: str) -> LatentScale:
    try:
        return LatentScale(tensors["bn.running_mean"], tensors["bn.running_var"], source)
    except KeyError as error:
        raise UserError(f"{source}: has no {error}: set init.statistics=tiles") from error


def _scale_of_file(path: Path) -> LatentScale:
    """REPA-E's file: latents_scale = running_var^-1/2 and latents_bias = running_mean."""
    content = load_archive(path)
    try:
        scale, bias = content["latents_scale"].flatten(), content["latents_bias"].flatten()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: has no latents_scale and latents_bias tensors") from error
    return LatentScale(bias, scale.double() ** -2, str(path))


def _scale_of_config(path: Path) -> LatentScale | None:
    """What a diffusers VAE's config.json says of all channels alike; None where it says nothing."""
    try:
        values = read_json(path)
        factor, shift = values.get("scaling_factor"), values.get("shift_factor")
        if not factor:
            return None
        mean, variance = float(shift or 0), float(factor) ** -2
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): set init.statistics=tiles") from error
    return LatentScale(torch.tensor(mean), torch.tensor(variance), str(path))


def _sum_over_tiles(
    vae: VAE,
    dataset: Dataset,
    rows: Sequence[tuple[str, int]],
    config: Config,
    processes: Processes,
) -> Tensor:
    """`_sum_moments` of all rows, float64 [4, C], of which each process reads its share."""
    passes = [list(rows[at : at + _AT_ONCE]) for at in range(0, len(rows), _AT_ONCE)]
    mine = range(processes.rank, len(passes), processes.size)
    chosen = [passes[index] for index in mine]
    sums = torch.zeros(len(passes), 4, vae.config.latent_channels, dtype=torch.float64)
    counted = sum(len(each) for each in chosen)
    shown = open_meter("latent statistics", counted, "tiles") if processes.is_main else None
    with shown or nullcontext() as meter, _exact_arithmetic():
        for index, tiles in zip(mine, _read_ahead(dataset, chosen, config), strict=True):
            if len(tiles):
                sums[index] = _sum_moments(vae, tiles)
            if meter is not None:
                meter.advance(len(passes[index]))
    # Each pass has its own row, and the others add 0: one order of summation for all.
    return processes.sum_values(sums.to(processes.device)).cpu().sum(dim=0)


@torch.no_grad()
def _sum_moments(vae: VAE, tiles: npt.NDArray[np.uint8]) -> Tensor:
    """Sums over n tiles uint8 [n, px, px, 3], float64 [4, C]: the number of latent values per
    channel, the posterior means, their squares and the posterior variances."""
    images = from_uint8(torch.from_numpy(tiles).to(next(vae.parameters()).device))
    posterior = vae.encode(images)
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
    count = torch.full_like(mean, 1)
    sums = torch.stack([count, mean, mean.square(), variance]).sum(dim=(1, 3, 4))
    return sums.cpu()


def _read_ahead(
    dataset: Dataset, passes: Sequence[list[tuple[str, int]]], config: Config
) -> Iterator[npt.NDArray[np.uint8]]:
    """The tiles of each pass, uint8 [n, px, px, 3], read and decoded by threads ahead of use."""
    data = config.data
    source = BlockSource(
        dataset, tile_px=data.tile_px, encoder=data.encoder, with_cls=False, with_tokens=False
    )
    skips = data.on_error == "skip"

    def read_tile(row: tuple[str, int]) -> npt.NDArray[np.uint8] | None:
        slide_id, rank = row
        try:
            block = source.open_block(slide_id, rank // BLOCK_ROWS)
            return source.read_sample(block, rank, rank % BLOCK_ROWS).tile
        except UserError as error:
            if not skips:
                raise
            print_line(f"left out of the latent statistics: {error}")
            return None

    with ThreadPoolExecutor(data.threads) as pool:
        waiting: deque[list[Future[npt.NDArray[np.uint8] | None]]] = deque()
        try:
            for rows in [*passes, *[[]] * _AHEAD]:
                waiting.append([pool.submit(read_tile, row) for row in rows])
                if len(waiting) > _AHEAD:
                    read = [future.result() for future in waiting.popleft()]
                    yield np.array([tile for tile in read if tile is not None], np.uint8)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Float32 without TF32, and convolutions that are the same in every process and run."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
