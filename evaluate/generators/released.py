"""What the released models have in common: they are diffusers pipelines that bring their own code.

Their weights are gated and were never available here: what calls them is held to their published
call signatures by tests on small local pipelines, and every dataset made with them records that.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.errors import UserError
from common.terms import Terms
from common.text import one_line
from evaluate.generators.interface import EncoderRecord, Features, Seeds, Tiles
from model.sampler_settings import SamplerSettings
from model.weights import WeightsError, explain_hub_errors, tensors_sha256

UNTESTED = "untested on the gated weights: tested on small pipelines of the published signature"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedPipeline:
    """A diffusers pipeline on its device, and its dtype, such as "bfloat16".

    `chosen` is what else was chosen in loading it and is recorded with its images; `terms` are
    those of networks that another model lends it.
    """

    pipeline: Any
    dtype: str
    chosen: Mapping[str, str] = field(default_factory=dict)
    terms: tuple[Terms, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """The sum of all weights of the pipeline, by component."""
        digest = hashlib.sha256()
        for name, component in sorted(self.pipeline.components.items()):
            if isinstance(component, nn.Module):
                digest.update(f"{name}|{tensors_sha256(component.state_dict())}|".encode())
        return digest.hexdigest()


class ReleasedGenerator:
    """A released model with fixed settings: all of a `Generator` but how its pipeline is called.

    `name` is recorded in datasets, `title` is used in messages; tiles are of 0.5 µm per pixel.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    tile_px: ClassVar[int]
    condition_dim: ClassVar[int]
    encoder: ClassVar[str]
    model_terms: ClassVar[Terms]
    mpp: ClassVar[float] = 0.5

    def __init__(self, loaded: LoadedPipeline, settings: SamplerSettings) -> None:
        self.loaded, self.settings = loaded, settings

    @property
    def encoder_record(self) -> EncoderRecord:
        """The encoder of the publication; the sum of its gated weights is not known here."""
        return {
            "encoder": self.encoder,
            "weights": "hub",
            "weights_sha256": None,
            "random_weights": False,
        }

    @property
    def terms(self) -> tuple[Terms, ...]:
        """The terms of the released weights, of what they borrow, and of the guiding encoder."""
        from model.encoders import encoder_spec

        return (self.model_terms, *self.loaded.terms, encoder_spec(self.encoder).terms)

    def identity(self) -> dict[str, object]:
        """The weights' sum, the call's arguments, and that the weights were never available."""
        return {
            "generator": self.name,
            "generator_note": UNTESTED,
            "model_sha256": self.loaded.sha256,
            **self.settings.arguments(),
            "compute_dtype": self.loaded.dtype,
            **self.loaded.chosen,
        }

    def to_tensor(self, features: Features) -> torch.Tensor:
        """Features [B, d] on the device and in the dtype of the pipeline's networks."""
        rows = torch.from_numpy(np.ascontiguousarray(features))
        return rows.to(self.loaded.pipeline.device, _DTYPES[self.loaded.dtype])

    def draw_tiles(self, seeds: Seeds, **arguments: Any) -> Tiles:
        """Tiles uint8 [B, px, px, 3] of one call; refused if they are not of the published size."""
        tiles = call_pipeline(self.loaded.pipeline, seeds, **arguments)
        if tiles.shape[1:] != (self.tile_px, self.tile_px, 3):
            raise UserError(
                f"{self.title} drew images of {tiles.shape[2]} x {tiles.shape[1]} px, expected "
                f"{self.tile_px}; this is another pipeline than the published one"
            )
        return tiles


def load_pipeline(
    source: str,
    *,
    custom_pipeline: str | None,
    trust_remote_code: bool,
    dtype: str,
    device: torch.device,
    revision: str | None = None,
    subfolder: str | None = None,
    **components: Any,
) -> LoadedPipeline:
    """Load a diffusers pipeline from a folder or the hub, with the code that it brings.

    `custom_pipeline` is where that code is (None: with the model); it runs only with
    `trust_remote_code`. `revision` and `subfolder` choose one of a repository's models. Raises
    `UserError` in one line: diffusers is missing, the code is not trusted, the weights are gated
    (with what to accept and where to put the token) or cannot be loaded.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise UserError(
            f"model {source}: the released models need diffusers, which is not installed; "
            "pip install 'histogen[diffusers]'"
        ) from error
    if not trust_remote_code:
        raise UserError(
            f"model {source} runs code that comes with it ({custom_pipeline or source}); read that "
            "code, then give --trust-remote-code"
        )
    source = _find_folder(source, revision, subfolder)
    # Of a folder there is one revision, and diffusers asks the hub for any other.
    at = {} if revision is None or Path(source).is_dir() else {"revision": revision}
    with explain_pipeline_errors(source):
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            custom_pipeline=custom_pipeline or source,
            trust_remote_code=trust_remote_code,
            torch_dtype=_DTYPES[dtype],
            **at,
            **components,
        )
    # One bar per call would break up this program's own progress line.
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(pipeline.to(device), dtype)


def _find_folder(source: str, revision: str | None, subfolder: str | None) -> str:
    """A repository or folder, or the folder below it of one of its models.

    A pipeline of diffusers has no subfolder of its own: that part of the repository is fetched.
    Raises `UserError` for a subfolder that is not there or leads out of the repository.
    """
    if subfolder is None:
        return source
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise UserError(f"--subfolder {subfolder}: expected a folder within the repository")
    root = Path(source)
    if not root.is_dir():
        with explain_pipeline_errors(source):
            from huggingface_hub import snapshot_download

            wanted = [f"{subfolder}/*"]
            root = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    if not (root / subfolder).is_dir():
        raise UserError(f"--subfolder {subfolder}: {source} has no such folder")
    return str(root / subfolder)


@contextmanager
def explain_pipeline_errors(source: str) -> Iterator[None]:
    """Turn what loading a pipeline raises into one `UserError` with what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if Path(source).is_dir():
            reason = one_line(error, 160) or type(error).__name__
            raise WeightsError(
                f"model {source}: not a diffusers pipeline that loads ({reason}); download "
                "the whole repository again"
            ) from error
        with explain_hub_errors(source, instead="the folder of a downloaded copy as --model"):
            raise _find_hub_error(error)  # noqa: B904 - its chain of causes is the message


def _find_hub_error(error: Exception) -> Exception:
    """The hub's refusal, where the libraries in between have wrapped it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RepositoryNotFoundError):  # a gated repository's is of this kind too
            return inner
        inner = inner.__cause__ or inner.__context__
    return error


def call_pipeline(pipeline: Any, seeds: Seeds, **arguments: Any) -> Tiles:
    """Images uint8 [B, H, W, 3] for seeds [B]: of one call, or of one call per row.

    Each row draws from a generator of its seed where the pipeline takes `generator`. Where it
    does not, rows are drawn one by one: with `seed`, where it takes that, else under PyTorch's
    global generators at its seed. An image depends on its seed alone in any case. Arguments that
    are tensors have a row per image.
    """
    # PyTorch's generators take no negative seeds, so these have 63 bits.
    positive = [int(seed) & (2**63 - 1) for seed in seeds]
    with torch.no_grad():
        taken = inspect.signature(pipeline.__call__).parameters
        if "generator" in taken:
            generators = [torch.Generator().manual_seed(seed) for seed in positive]
            return _to_uint8(pipeline(**arguments, generator=generators), len(seeds))
        tiles = []
        for row, seed in enumerate(positive):
            single = {
                name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            if "num_images_per_prompt" in single:
                single["num_images_per_prompt"] = 1
            if "seed" in taken:
                single["seed"] = seed
            # The caller's random state stays as it was.
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                tiles.append(_to_uint8(pipeline(**single), 1))
        return np.concatenate(tiles)


def _to_uint8(output: Any, rows: int) -> Tiles:
    """The images of a pipeline's output, which are PIL images, or arrays or tensors in [0, 1]."""
    images = output["images"] if isinstance(output, dict) else output.images
    if isinstance(images, torch.Tensor):
        images = images.float().cpu().permute(0, 2, 3, 1).numpy()
    tiles = []
    for image in images:
        is_pil = isinstance(image, Image.Image)
        pixels = np.array(image.convert("RGB")) if is_pil else np.asarray(image)
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
        tiles.append(pixels)
    if len(tiles) != rows:
        raise UserError(f"the pipeline gave {len(tiles)} images where {rows} were requested")
    return np.stack(tiles)


def choose_dtype(requested: str, device: torch.device, on_gpu: str) -> str:
    """The requested dtype; "auto" is `on_gpu` on a GPU and float32 on a CPU."""
    if requested != "auto":
        return requested
    return on_gpu if device.type == "cuda" else "float32"
