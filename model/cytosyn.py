"""CytoSyn: everything that makes images, in one object and one folder.

Source: the CytoSyn report (arXiv 2603.18089): a SiT over the latents of an SD-VAE, trained end to
end by REPA-E (arXiv 2504.10483), conditioned on the CLS feature of a pathology encoder.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from common.config import build_config, check_setting
from common.errors import UserError
from common.files import read_regular, replacing_folder, write_text
from common.json_text import read_json
from common.terms import Terms, parse_terms
from model.images import from_uint8, to_uint8
from model.interpolant import Interpolant
from model.noise import derive_seeds, seed_tensor
from model.repa_e import read_repa_e
from model.sampler import Progress, Solver, sample
from model.sit import SiT, SiTConfig
from model.vae import VAE, VAEConfig
from model.weights import (
    Module,
    align_weights,
    build_from_tensors,
    explain_hub_errors,
    read_tensors,
    tensors_sha256,
    write_tensors,
)

FORMAT_VERSION = 1
Model = TypeVar("Model", bound="CytoSyn")

_CONFIG, _SIT, _VAE = "config.json", "sit.safetensors", "vae.safetensors"
_TRIES = 3  # to read a folder that others are replacing


@dataclass(frozen=True)
class Records:
    """Where a model's weights come from; None where it is not known.

    `sit` and `vae` say which weights these are: the exponential moving average of training, or
    the last step's. The encoder's sha256 is that of `model.weights.tensors_sha256`. `terms` are
    those of what the model descends from: slides, encoder, weights that it began with.
    """

    encoder: str | None = None
    encoder_weights: str | None = None
    encoder_weights_sha256: str | None = None
    encoder_is_random: bool | None = None
    mpp: float | None = None
    tile_px: int | None = None
    training_step: int | None = None
    sit: Literal["ema", "raw"] | None = None
    vae: Literal["ema", "raw"] | None = None
    terms: tuple[Terms, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The records among these values, which somebody else may have written.

        Those of later versions are left out. Raises UserError for one of another kind.
        """
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in values.items() if key in known - {"terms"}}
        # As they are written: 1 and 1.0 are one number, but two identities.
        build_config(cls, given)
        given["terms"] = parse_terms(values.get("terms"))
        records = cls(**given)  # type: ignore[arg-type]  # which `build_config` has checked
        for name, least in (("mpp", 1e-6), ("tile_px", 1), ("training_step", 0)):
            value = getattr(records, name)
            good = value is None or (not isinstance(value, str) and least <= value < math.inf)
            check_setting(good, name, value, f"a number of {least:g} or more")
        return records


class CytoSyn(nn.Module):
    """SiT, VAE and latent norm (inside the SiT), with what is known of their training.

    Latents here are normalised ones, the SiT's space. The networks are neither copied nor
    changed, so that a trainer can generate with the ones it trains; those that the loaders return
    are frozen.

    Example:
        >>> sit = SiT(SiTConfig.preset("tiny", latent_size=4, condition_dim=3))
        >>> model = CytoSyn(sit, VAE(VAEConfig.preset("tiny")))
        >>> images = model.generate(torch.zeros(2, 3), num_inference_steps=2, seed=7)
        >>> images.shape, images.dtype
        ((2, 32, 32, 3), dtype('uint8'))
    """

    def __init__(
        self,
        sit: SiT,
        vae: VAE,
        *,
        interpolant: Interpolant | None = None,
        records: Records | None = None,
    ) -> None:
        super().__init__()
        if sit.config.latent_channels != vae.config.latent_channels:
            raise UserError(
                f"SiT has {sit.config.latent_channels} latent channels and the VAE "
                f"{vae.config.latent_channels}; they must be equal"
            )
        self.sit = sit
        self.vae = vae
        self.interpolant = interpolant or Interpolant()
        self.records = records or Records()

    @property
    def tile_px(self) -> int:
        """Side of the images that `generate` gives."""
        return self.sit.config.latent_size * self.vae.config.downsampling

    @property
    def device(self) -> torch.device:
        """Where the model is and its outputs will be computed."""
        return self.sit.pos_embed.device

    @torch.no_grad()
    def generate(
        self,
        features: Tensor | np.ndarray | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 250,
        guidance_scale: float = 2.5,
        guidance_low: float = 0.0,
        guidance_high: float = 0.75,
        seed: int | Sequence[int] | Tensor = 0,
        solver: Solver = "sde",
        batch_size: int = 32,
        dtype: torch.dtype | None = None,
        legacy_truncate: bool = False,
        network: Callable[[Tensor, Tensor], Tensor] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Generate RGB images, uint8 [N, H, W, 3].

        `features` is [n, condition_dim] (or labels [n] for a model of classes), each used for
        `num_images_per_prompt` consecutive images; None generates that many without
        condition, where guidance has nothing to do. `seed` is one number from which each
        image's seed is derived by its index, or N seeds. An image is a function of its
        feature and seed alone, up to the rounding of the arithmetic; `batch_size` bounds memory.
        Steps, solver and guidance are those of `model.sample`. `dtype` runs the SiT under
        autocast, `network` replaces `sit.forward_from_condition` by a compiled one. The VAE
        decodes in its parameters' dtype: in bfloat16 it is off by a grey level, to save a
        hundredth of the time of 250 steps. `progress` receives the steps done and all steps, over
        all batches. Values are rounded to integers, or cut with `legacy_truncate` as the reference
        did (half a grey level darker).

        Raises UserError for features of another width, for numbers out of range and for images
        that are not finite.
        """
        prompts = self._repeat_prompts(features, num_images_per_prompt)
        count = num_images_per_prompt if prompts is None else len(prompts)
        seeds = _image_seeds(seed, count)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected 1 or more")
        # Each image has its seed: how the images are batched bounds memory and changes no noise.
        images = []
        starts = range(0, count, batch_size)
        for batch, start in enumerate(starts):
            chosen = slice(start, start + batch_size)
            latents = sample(
                self.sit,
                None if prompts is None else prompts[chosen],
                seeds=seeds[chosen],
                steps=num_inference_steps,
                solver=solver,
                guidance_scale=guidance_scale,
                guidance_low=guidance_low,
                guidance_high=guidance_high,
                interpolant=self.interpolant,
                dtype=dtype,
                network=network,
                progress=_scale_progress(progress, batch, len(starts)),
            )
            images.append(self.decode(latents, legacy_truncate=legacy_truncate))
        return np.concatenate(images)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor | np.ndarray,
        *,
        noise: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Normalised latents [N, C, h, w], float32, of RGB images.

        Images are uint8 [N, H, W, 3] or [N, 3, H, W]. The posterior's mean is taken, or with
        `noise` [N, C, h, w] a sample. Normalised by the running statistics, as in training.
        """
        batch = from_uint8(images).to(self.device)
        # The VAE may be in half precision; its inputs follow its weights.
        with self._use_precision(dtype):
            posterior = self.vae.encode(batch.to(self.vae.quant_conv.weight.dtype))
        latents = posterior.mode() if noise is None else posterior.sample(noise.to(self.device))
        return self.sit.bn.normalise(latents, use_batch=False)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        dtype: torch.dtype | None = None,
        legacy_truncate: bool = False,
    ) -> np.ndarray:
        """RGB images uint8 [N, H, W, 3] of normalised latents [N, C, h, w].

        Raises UserError where an image is not finite, which as bytes would be a black tile.
        """
        raw = self.sit.bn.denormalise(latents.to(self.device))
        with self._use_precision(dtype):
            images = self.vae.decode(raw.to(self.vae.post_quant_conv.weight.dtype))
        # As bytes they would be black tiles that look like a result.
        bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"{len(bad)} of {len(images)} images are not finite (first: {bad[0]}); look for "
                "NaN in the features or the weights, or compute in bfloat16 or float32 instead of "
                "float16"
            )
        return to_uint8(images, legacy_truncate=legacy_truncate).cpu().numpy()

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Write config.json, sit.safetensors and vae.safetensors (CompVis keys) to a folder.

        `card` is the text of its README.md; "" writes none.

        A model that is there is replaced whole: whatever ends this process, the folder has the old
        model or the new one, or says that it is none. The configuration has the weights' sha256, so
        that one that was put together from two models is recognised.
        """
        with replacing_folder(Path(folder), last=_CONFIG) as staged:
            self._write_files(staged)
            if card:
                write_text(staged / "README.md", card)

    def _write_files(self, folder: Path) -> None:
        weights = {_SIT: self.sit.state_dict(), _VAE: self.vae.state_dict()}
        for name, tensors in weights.items():
            write_tensors(folder / name, tensors)
        records = asdict(self.records)
        if not records["terms"]:  # so that a model without any is as it was before there were terms
            del records["terms"]
        config = {
            "format": "cytosyn",
            "format_version": FORMAT_VERSION,
            "path": self.interpolant.path,
            "sit": self.sit.config.to_dict(),
            "vae": self.vae.config.to_dict(),
            "records": records,
            "sha256": {name: tensors_sha256(tensors) for name, tensors in weights.items()},
        }
        write_text(folder / _CONFIG, json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load what `save_pretrained` wrote, from a folder or a hub repository ("owner/name").

        "owner/name@revision" takes a commit, branch or tag. What is in the hub's cache needs no
        network. Weights are loaded to the CPU in float32. Raises UserError, naming the file, if the
        source cannot be found or reached, is of another format, damaged, or does not fit.
        """
        folder = _local_folder(source)
        for _ in range(_TRIES):
            before = _read_sums(folder)
            try:
                return cls._load_folder(folder)
            except UserError:
                # Another export may have replaced it between two files.
                if _read_sums(folder) == before:
                    raise
        return cls._load_folder(folder)

    @classmethod
    def _load_folder(cls, folder: Path) -> Self:
        parts = _read_config(folder / _CONFIG)
        model = cls(
            _load_network(lambda: SiT(parts.sit), folder / _SIT, parts.sums),
            _load_network(lambda: VAE(parts.vae), folder / _VAE, parts.sums),
            interpolant=parts.interpolant,
            records=parts.records,
        )
        return _freeze_model(model)

    @classmethod
    def from_repa_e(cls, checkpoint: str | Path, *, use_ema: bool = True) -> Self:
        """Load a training checkpoint (.pt) of the public REPA-E code, executing no pickled code.

        `use_ema` takes the averaged SiT and latent statistics, else the last step's; the VAE is
        the last step's either way, as that code keeps no average of it. A SiT trained without
        label drop has conditioning "label-only". Raises UserError for a file that is damaged or
        contains something else.
        """
        parts = read_repa_e(checkpoint, use_ema=use_ema)
        source = str(checkpoint)
        sit = build_from_tensors(lambda: SiT(parts.sit_config), parts.sit, source=source)
        vae = build_from_tensors(lambda: VAE(parts.vae_config), parts.vae, source=source)
        records = Records(
            encoder=parts.encoder,
            tile_px=parts.sit_config.latent_size * parts.vae_config.downsampling,
            training_step=parts.step,
            sit="ema" if use_ema else "raw",
            vae="raw",
        )
        model = cls(sit, vae, interpolant=Interpolant(parts.path), records=records)
        return _freeze_model(model)

    def _repeat_prompts(self, features: Tensor | np.ndarray | None, repeats: int) -> Tensor | None:
        """A row of features (or a label) per image, on the model's device."""
        if repeats < 1:
            raise UserError(f"num_images_per_prompt is {repeats}; expected 1 or more")
        if features is None:
            return None
        prompts = torch.as_tensor(features)
        config = self.sit.config
        takes_labels = config.conditioning in ("label", "label-only")
        width = () if takes_labels else (config.condition_dim,)
        if config.conditioning == "none":
            raise UserError("this model was trained without condition; generate without features")
        if tuple(prompts.shape[1:]) != width or prompts.ndim == 0 or len(prompts) == 0:
            wanted = ", ".join(["n", *map(str, width)])
            raise UserError(f"features are {list(prompts.shape)}; this model expects [{wanted}]")
        if takes_labels and not 0 <= prompts.min() <= prompts.max() < config.num_classes:
            raise UserError(f"labels must be in [0, {config.num_classes - 1}]")
        return prompts.to(self.device).repeat_interleave(repeats, dim=0)

    def _use_precision(self, dtype: torch.dtype | None) -> Any:
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def _image_seeds(seed: int | Sequence[int] | Tensor, count: int) -> Tensor:
    """Seeds [count] (int64 bits): derived from one number by image index, or as given."""
    if isinstance(seed, int | np.integer):
        return derive_seeds(int(seed), torch.arange(count))
    seeds = seed_tensor(seed)
    if seeds.shape != (count,):
        raise UserError(f"{seeds.numel()} seeds for {count} images; pass one, or one per image")
    return seeds


def _scale_progress(progress: Progress | None, batch: int, batches: int) -> Progress | None:
    """A batch's progress as part of all batches'."""
    if progress is None:
        return None
    return lambda done, steps: progress(batch * steps + done, batches * steps)


def _local_folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    # What is no folder is an id; a mistyped path is not, and must not reach the network.
    hub_id = str(source).removeprefix("hub:")
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?", hub_id)
    if named is None:
        raise UserError(
            f"model {source}: no such folder; give the folder of an exported model or a hub id "
            "(owner/name, or owner/name@revision)"
        )
    from huggingface_hub import snapshot_download

    repository, revision = named.groups()
    wanted = [_CONFIG, _SIT, _VAE]
    with explain_hub_errors(hub_id, instead=f"the local folder (there is none at {folder})"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))


@dataclass(frozen=True)
class _FolderConfig:
    """What config.json says: the shapes of the networks, and the sha256 of their tensors."""

    sit: SiTConfig
    vae: VAEConfig
    interpolant: Interpolant
    records: Records
    sums: dict[str, str]


def _read_sums(folder: Path) -> bytes:
    """The bytes of a folder's configuration, which has its weights' sums; b"" where it has none."""
    try:
        return read_regular(folder / _CONFIG)
    except OSError:
        return b""


def _read_config(path: Path) -> _FolderConfig:
    if not path.is_file():
        raise UserError(f"model {path.parent}: has no {_CONFIG}; export the model again")
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {path}: not valid JSON ({error}); export the model again"
        ) from error
    if not (isinstance(config, dict) and config.get("format") == "cytosyn"):
        raise UserError(f"model {path}: not a model of this project ('format' is not 'cytosyn')")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"model {path}: format_version is {config.get('format_version')!r}, this version "
            f"reads {FORMAT_VERSION}; update this software or export the model again"
        )
    absent = [key for key in ("path", "sit", "vae", "records", "sha256") if key not in config]
    if absent:
        raise UserError(f"model {path}: lacks {', '.join(absent)}; export the model again")

    # Records of later versions are no obstacle; other shapes of networks are.
    try:
        return _FolderConfig(
            SiTConfig.from_dict(config["sit"]),
            VAEConfig.from_dict(config["vae"]),
            Interpolant(config["path"]),
            Records.from_dict(config["records"]),
            dict(config["sha256"]),
        )
    except UserError as error:
        raise UserError(f"model {path}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"model {path}: a value is of another kind than this software writes ({error}); "
            "export the model again"
        ) from error


def _freeze_model(model: Model) -> Model:
    """Frozen, aligned, and the VAE in channels last."""
    # The same bits as those of a model just trained, and the layout of the fastest convolutions.
    align_weights(model)
    model.vae.to(memory_format=torch.channels_last)
    return model.requires_grad_(False).eval()


def _load_network(build: Callable[[], Module], path: Path, sums: dict[str, str]) -> Module:
    # The fit comes first: its error says more than that the sum differs.
    tensors = read_tensors(path)
    module = build_from_tensors(build, tensors, source=str(path))
    if tensors_sha256(tensors) != sums.get(path.name):
        raise UserError(
            f"model {path}: its sum is not the one in {_CONFIG}; the file is damaged or of "
            "another model, copy or export the folder again"
        )
    return module
