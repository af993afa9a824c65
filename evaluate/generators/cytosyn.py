"""This project's own models as generators."""

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from common.terms import Terms
from common.torch_processes import one_thread
from evaluate.generators.interface import EncoderRecord, Features, Seeds, StepProgress, Tiles
from evaluate.generators.released import choose_dtype
from model import CytoSyn, SiT
from model.sampler import sample
from model.sampler_settings import SamplerSettings
from model.weights import tensors_sha256

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CytoSynGenerator:
    """A `model.CytoSyn` that draws with fixed settings on one device.

    `dtype` is "float32", "bfloat16" or "auto": bfloat16 on a GPU, float32 on a CPU. `compiles`
    draws with a compiled SiT: faster after the first call, which compiles for a minute or so.
    """

    def __init__(
        self,
        model: CytoSyn,
        settings: SamplerSettings,
        *,
        device: torch.device,
        dtype: str,
        compiles: bool = False,
    ) -> None:
        self._model, self._settings, self._compiles = model.to(device), settings, compiles
        self._dtype = choose_dtype(dtype, device, "bfloat16")
        self._network = _prepare_network(model, self._dtype, compiles)

    @property
    def tile_px(self) -> int:
        """Side of the tiles in pixels."""
        return self._model.tile_px

    @property
    def mpp(self) -> float | None:
        """Resolution (mpp) of the model's training tiles, where it is known."""
        return self._model.records.mpp

    @property
    def condition_dim(self) -> int | None:
        """Width d of the features ``[n, d]``, or None for a model that takes none."""
        config = self._model.sit.config
        return config.condition_dim if config.conditioning == "feature" else None

    @property
    def encoder_record(self) -> EncoderRecord | None:
        """What the model records of the encoder that it was trained on."""
        records = self._model.records
        if records.encoder_weights_sha256 is None:
            return None
        return {
            "encoder": records.encoder,
            "weights": records.encoder_weights,
            "weights_sha256": records.encoder_weights_sha256,
            "random_weights": records.encoder_is_random,
        }

    @property
    def terms(self) -> tuple[Terms, ...]:
        """The terms of what the model descends from, as it was exported with."""
        return self._model.records.terms

    def identity(self) -> dict[str, object]:
        """The model's sum, the sampler's settings and the arithmetic."""
        # Keys with a default are left out, so that datasets from before they existed go on.
        # Images of a model whose encoder was random mean nothing, which every reader must know.
        random = self._model.records.encoder_is_random
        return {
            "model_sha256": model_sha256(self._model),
            **({} if random is None else {"model_encoder_random": random}),
            **self._settings.arguments(),
            **({"rounding": "down"} if self._settings.legacy_truncate else {}),
            "compute_dtype": self._dtype,
            **({"compiled": True} if self._compiles else {}),
        }

    def generate_tiles(
        self, features: Features | None, seeds: Seeds, progress: StepProgress | None = None
    ) -> Tiles:
        """Tiles uint8 [B, px, px, 3] for features [B, d] (None: unconditional), seeds [B]."""
        latents = sample(
            self._model.sit,
            None if features is None else torch.from_numpy(features),
            seeds=torch.from_numpy(seeds),
            **self._settings.arguments(),
            interpolant=self._model.interpolant,
            dtype=None if self._dtype == "float32" else torch.bfloat16,
            network=self._network,
            progress=progress,
        )
        # The decoder alone sums in an order that depends on the number of threads.
        with _one_thread_on(self._model.device):
            return self._model.decode(latents, legacy_truncate=self._settings.legacy_truncate)


def _one_thread_on(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU, compute in one thread: the VAE's decoder sums in as many parts as there are.

    Its images differed between 1, 2 and 3 threads, and torchrun gives each process another
    number than a single process has. Next to the sampling of an XL/2 the decoder costs nothing.
    """
    return one_thread() if device.type == "cpu" else nullcontext()


_Network = Callable[[Tensor, Tensor], Tensor]
_NETWORKS: WeakKeyDictionary[CytoSyn, dict[tuple[str, bool], _Network]] = WeakKeyDictionary()
"""The networks of models that are in use: a sweep makes many generators of one model."""


def _prepare_network(model: CytoSyn, dtype: str, compiles: bool) -> _Network | None:
    """What the sampler evaluates: None is the SiT as it is."""
    if dtype == "float32" and not compiles:
        return None
    known = _NETWORKS.setdefault(model, {})
    if (dtype, compiles) not in known:
        sit = model.sit if dtype == "float32" else with_cast_weights(model.sit, torch.bfloat16)
        call: _Network = sit.forward_from_condition
        known[dtype, compiles] = torch.compile(call, fullgraph=True) if compiles else call
    return known[dtype, compiles]


def with_cast_weights(sit: SiT, dtype: torch.dtype) -> SiT:
    """A copy of a SiT whose products have their weights in `dtype`, for use under autocast.

    Autocast would cast the float32 weights at every evaluation, to the same bits: 4 GB of traffic
    for an XL/2. What autocast leaves in float32, the residual stream among it, stays so.
    """
    copied = copy.deepcopy(sit)
    for module in copied.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return copied


_SUMS: WeakKeyDictionary[CytoSyn, str] = WeakKeyDictionary()
"""Sums of models that are in use: a sweep makes many generators of one model."""


def model_sha256(model: CytoSyn) -> str:
    """Sum of the weights and of what else decides what the networks compute."""
    if model not in _SUMS:
        shape = {
            "path": model.interpolant.path,
            "sit": model.sit.config.to_dict(),
            "vae": model.vae.config.to_dict(),
            "weights": tensors_sha256(model.state_dict()),
        }
        _SUMS[model] = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return _SUMS[model]
