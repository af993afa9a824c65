"""Makes what a protocol's sources lack: images, reconstructions, features.

Images are made in this process, or by the protocol's command under a launcher
(`python -m common.launch 8`); features by `python -m pipeline cache`.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence

import torch

from common.console import print_line
from common.errors import UserError
from common.following import tied_children
from common.torch_processes import Processes, joined_processes
from evaluate.generate.condition_source import (
    ConditionSource,
    SelectionConditions,
    Unconditional,
    check_fit,
)
from evaluate.generate.run import Request, final_line, generate
from evaluate.generators import Generator
from evaluate.generators.interface import ModelSource
from evaluate.generators.open import OpenedModel, open_generator
from evaluate.protocols.config import Protocol
from evaluate.protocols.plan import Images, Seen, parse_vae
from evaluate.protocols.reconstruct import Reconstruction, TileConditions
from evaluate.protocols.sources import ProtocolSources, sampler_settings
from model import CytoSyn

_RECONSTRUCTION_BATCH = 16


class SourceMaker(ProtocolSources):
    """A protocol's sources with what makes them; models stay loaded from one to the next.

    `command` is the arguments of the protocol's command, for a launcher to repeat.
    """

    def __init__(self, protocol: Protocol, command: Sequence[str] = ()) -> None:
        super().__init__(protocol)
        self._command = list(command)
        self._opened: dict[str, OpenedModel] = {}

    def make_images(self, source: str) -> None:
        """Make a source's missing images, under the launcher where there is one."""
        if not self.missing_images(source):
            return
        if source in self.images and self.images[source].spec.dataset:
            raise UserError(
                f"{self.images[source].spec.dataset} has too few images for {source}; make more "
                "with `python -m evaluate generate`, or leave generations.*.dataset out"
            )
        if self.protocol.launcher:
            launcher = shlex.split(self.protocol.launcher)
            _run_command([*launcher, "-m", "evaluate", *self._command, "--generate", source])
            self.forget_tiles(source)  # another process has made them
            return
        with joined_processes(self.protocol.device, setting="device=") as processes:
            self.generate_images(source, processes)

    def generate_images(self, source: str, processes: Processes) -> None:
        """Make a source's images in this process, or in this process's share of many."""
        vae = parse_vae(source)
        conditions: ConditionSource
        generator: Generator
        if vae:
            tiles = self.select_tiles(vae[1])
            network = CytoSyn.from_pretrained(self.find_model(vae[0]).model).to(processes.device)
            generator = Reconstruction(network, tiles.px)
            conditions = TileConditions(tiles.dataset, tiles.whole, tiles.px)
            seed, batch = 0, _RECONSTRUCTION_BATCH
        else:
            images = self.images[source]
            generator = self._open_generator(images, processes.device)
            conditions = self._open_conditions(images)
            check_fit(conditions, generator)  # a protocol forces nothing
            seed, batch = images.spec.seed[0], images.spec.batch
        request = Request(
            out=self.image_folder(source),
            seed=seed,
            conditions=self.required_images(source),
            micro_batch=batch,
            mpp=conditions.mpp if generator.mpp is None else generator.mpp,
        )
        outcome = generate(generator, conditions, request, processes)
        if processes.is_main:
            print_line(f"{source}: {final_line(outcome, request.out)}")
        self.forget_tiles(source)

    def _open_generator(self, images: Images, device: torch.device) -> Generator:
        name, spec = images.spec.model, self.find_model(images.spec.model)
        if name not in self._opened:
            self._opened[name] = open_generator(
                ModelSource(
                    spec.generator,
                    spec.model or None,
                    device,
                    dtype=spec.dtype,
                    trust_remote_code=spec.trust_remote_code,
                    pipeline_code=spec.pipeline_code or None,
                    vae=spec.vae or None,
                    vae_dtype=spec.vae_dtype,
                    revision=spec.revision or None,
                    subfolder=spec.subfolder or None,
                )
            )
        return self._opened[name].make(sampler_settings(spec.generator, images.spec))

    def _open_conditions(self, images: Images) -> ConditionSource:
        spec = images.spec
        if not spec.guidance:
            return Unconditional(self.required_images(images.key))
        tiles = self.select_tiles(spec.guidance)
        seen = Seen(spec.guidance, spec.guidance_view, spec.guidance_px)
        store = self.feature_store(seen, self.protocol.models[spec.model].encoder)
        return SelectionConditions(tiles.dataset, tiles.whole, store)

    def cache_command(self, seen: Seen, encoder: str) -> list[str]:
        """The `pipeline cache` that makes the features of a source."""
        tiles, protocol = self.select_tiles(seen.source), self.protocol
        px = ["--tile-px", str(seen.px)] if seen.px else []
        view = ["--view", seen.view] if seen.view else []
        return [
            "pipeline", "cache", "--dataset", str(tiles.dataset.root),
            "--selection", tiles.whole.name, "--encoder", encoder,
            "--weights", protocol.weights_of(encoder), "--dtype", protocol.dtype,
            "--tokens", "none", "--device", protocol.device, *px, *view, *protocol.cache_options,
        ]  # fmt: skip

    def make_features(self, seen: Seen, encoder: str, *, whole: bool = False) -> None:
        """Cache the features that are missing, by the pipeline's own command."""
        if self.missing_features(seen, encoder, whole=whole):
            _run_command([sys.executable, "-m", *self.cache_command(seen, encoder)])


def _run_command(command: list[str]) -> None:
    """Run a command with this terminal; raises `UserError` where it fails."""
    print_line(
        "$ " + shlex.join(["python" if word == sys.executable else word for word in command])
    )
    with tied_children() as tie:
        status = subprocess.run(command, check=False, **tie.options()).returncode
    if status:
        raise UserError(
            f"`{shlex.join(command)}` ended with status {status}; fix what it reports above, then "
            "the same protocol goes on from here"
        )
