"""What the released models have in common: they are diffusers pipelines that bring their own code.

Their weights are gated and were never at hand here: what calls them is held to their published
call signatures by tests on small local pipelines, and every dataset made with them says so.
"""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from common.errors import UserError
from model.weights import WeightsError, explain_hub_errors, tensors_sha256

UNTESTED = "untested on the gated weights: tested on small pipelines of the published signature"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    source: str,
    *,
    custom_pipeline: str | None,
    trust_remote_code: bool,
    dtype: str,
    device: torch.device,
    **components: Any,
) -> Any:
    """Load a diffusers pipeline from a folder or the hub, with the code that it brings.

    `custom_pipeline` is where that code is; it runs only where `trust_remote_code` was asked for.
    Raises `UserError` in one line: diffusers is missing, the code is not trusted, the weights are
    gated (what to accept, where to put the token) or not to be had.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise UserError(
            f"model {source}: the released models need diffusers, which is not installed; "
            "pip install 'histogen[diffusers]'"
        ) from error
    if custom_pipeline is not None and not trust_remote_code:
        raise UserError(
            f"model {source} runs code that comes with it ({custom_pipeline}); read that code, "
            "then give --trust-remote-code"
        )
    custom = {} if custom_pipeline is None else {"custom_pipeline": custom_pipeline}
    with explain_pipeline_errors(source):
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            **custom,
            trust_remote_code=trust_remote_code,
            torch_dtype=_DTYPES[dtype],
            **components,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


class explain_pipeline_errors:  # noqa: N801 - used as a context manager, like its kin
    """Turn what loading a pipeline raises into one `UserError` that says what to do."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        if Path(self._source).is_dir():
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise WeightsError(
                f"model {self._source}: not a diffusers pipeline that loads ({reason}); download "
                "the whole repository again"
            ) from error
        with explain_hub_errors(self._source, instead="the folder of a downloaded copy as --model"):
            raise _hub_error(error)


def _hub_error(error: Exception) -> Exception:
    """The hub's own refusal, where the libraries in between have wrapped it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RepositoryNotFoundError):  # a gated repository's is of this kind too
            return inner
        inner = inner.__cause__ or inner.__context__
    return error


def pipeline_sha256(pipeline: Any) -> str:
    """The sum of all weights of a pipeline, by component."""
    digest = hashlib.sha256()
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            digest.update(f"{name}|{tensors_sha256(component.state_dict())}|".encode())
    return digest.hexdigest()


def call_pipeline(
    pipeline: Any, rows: int, seeds: npt.NDArray[np.int64], **arguments: Any
) -> npt.NDArray[np.uint8]:
    """Images uint8 [rows, H, W, 3] of one call, or of one call a row.

    Each row draws from a generator of its own seed where the pipeline takes `generator`. Where it
    does not, rows are drawn one by one, each under PyTorch's global generators at its seed: an
    image is its own seed's either way. Arguments that are tensors have a row an image.
    """
    with torch.no_grad():
        if "generator" in inspect.signature(pipeline.__call__).parameters:
            generators = [torch.Generator().manual_seed(_positive(seed)) for seed in seeds]
            return as_uint8(pipeline(**arguments, generator=generators), rows)
        tiles = []
        for row, seed in enumerate(seeds):
            one = {
                name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            if "num_images_per_prompt" in one:
                one["num_images_per_prompt"] = 1
            with torch.random.fork_rng():
                torch.manual_seed(_positive(seed))
                tiles.append(as_uint8(pipeline(**one), 1))
        return np.concatenate(tiles)


def _positive(seed: np.int64) -> int:
    """A seed of 63 bits: PyTorch's generators take no negative ones."""
    return int(seed) & (2**63 - 1)


def as_uint8(output: Any, rows: int) -> npt.NDArray[np.uint8]:
    """The `images` of a pipeline's output as uint8 [rows, H, W, 3].

    Pipelines give PIL images, or arrays or tensors in [0, 1]. Raises `UserError` for another
    number of them than was asked for.
    """
    images = output["images"] if isinstance(output, dict) else output.images
    if isinstance(images, torch.Tensor):
        images = images.float().cpu().permute(0, 2, 3, 1).numpy()
    tiles = [_one_uint8(image) for image in images]
    if len(tiles) != rows:
        raise UserError(f"the pipeline gave {len(tiles)} images where {rows} were asked for")
    return np.stack(tiles)


def _one_uint8(image: Any) -> npt.NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8:
        return pixels
    return np.rint(pixels.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)


def check_tile(tiles: npt.NDArray[np.uint8], tile_px: int, name: str) -> npt.NDArray[np.uint8]:
    """The tiles, if they are of the size that the released model is known to draw."""
    if tiles.shape[1:] != (tile_px, tile_px, 3):
        raise UserError(
            f"{name} drew images of {tiles.shape[2]} x {tiles.shape[1]} px, expected {tile_px}; "
            "the pipeline is another one than the published"
        )
    return tiles


def automatic_dtype(asked: str, device: torch.device, on_gpu: str) -> str:
    """The dtype that was asked for; "auto" is `on_gpu` on a GPU and float32 on a CPU."""
    if asked != "auto":
        return asked
    return on_gpu if device.type == "cuda" else "float32"


def rows_of(features: npt.NDArray[np.float32], pipeline: Any, dtype: str) -> torch.Tensor:
    """Features as a tensor where the pipeline's networks are."""
    return torch.from_numpy(np.ascontiguousarray(features)).to(pipeline.device, _DTYPES[dtype])
