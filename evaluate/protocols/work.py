"""What a protocol needs is made where it is missing: images, reconstructions, features.

Images are made in this process, or by the protocol's own command under a launcher
(`torchrun --nproc-per-node 8`); features by `python -m pipeline cache`. Everything that stands is
reused, so a protocol that was killed goes on where it was.
"""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.console import say
from common.errors import UserError
from common.torch_processes import Processes, joined_processes
from evaluate.generate.guidance import (
    Guidance,
    Unconditional,
    check_condition_dim,
    check_encoder,
    check_resolution,
    check_tile_px,
    guiding_mark,
)
from evaluate.generate.plan import source_order
from evaluate.generate.run import Request, final_line, generate
from evaluate.generators import Generator
from evaluate.generators.cytosyn import SamplerSettings
from evaluate.generators.open import Opened, Source, open_generator, settings_for
from evaluate.protocols.config import GenerationSpec, ModelSpec, Protocol, TileSet
from evaluate.protocols.plan import Images, Seen, all_images, expand, parse_vae
from evaluate.protocols.reconstruct import Reconstruction, TileGuidance, ViewGuidance
from model import CytoSyn
from pipeline.dataset import (
    Dataset,
    Ledger,
    Selection,
    identity_value,
    make_selection,
    open_dataset,
    read_selection,
)
from pipeline.dataset.features import FeatureStore, encoder_file, feature_scope, read_encoder_record

GENERATED = "generated"


@dataclass(frozen=True)
class Tiles:
    """A source's tiles on disk: the dataset, the whole selection, and the part that is used."""

    dataset: Dataset
    whole: Selection
    used: Selection
    px: int


class Workshop:
    """Finds and makes what a protocol's sources are."""

    def __init__(self, protocol: Protocol, command: Sequence[str] = ()) -> None:
        """Take a protocol, and the arguments of its command for a launcher to repeat."""
        self.protocol, self.root = protocol, Path(protocol.out)
        self.images = {one.key: one for one in all_images(protocol)}
        self._command = list(command)
        self._opened: dict[str, Opened] = {}
        self._tiles: dict[str, Tiles] = {}

    def tiles(self, source: str) -> Tiles:
        """The tiles of a set, of images or of reconstructions; the latter two once made.

        Raises `UserError` where there are fewer than the protocol asks for.
        """
        if source not in self._tiles:
            self._tiles[source] = self._find(source)
        return self._tiles[source]

    def _find(self, source: str) -> Tiles:
        if source in self.protocol.sets:
            spec = self.protocol.sets[source]
            dataset = open_dataset(self._root(source, spec))
            whole = read_selection(dataset, spec.selection)
            count = self._count(spec.count) or whole.rows
            used = first_tiles(whole, count, f"set {source}")
            return Tiles(dataset, whole, used, spec.tile_px or _px(dataset))
        dataset = open_dataset(self.folder(source))
        whole = read_selection(dataset, GENERATED)
        used = first_images(whole, self._images_count(source), source)
        return Tiles(dataset, whole, used, _px(dataset))

    def _root(self, name: str, spec: TileSet) -> Path:
        root = spec.dataset or self.protocol.dataset
        if not root:
            raise UserError(
                f"where are the tiles of set {name}? give dataset=DIR, or sets.{name}.dataset=DIR"
            )
        return Path(root)

    def _count(self, own: int) -> int:
        """Tiles to take; 0 for all."""
        return 0 if own < 0 else own or self.protocol.count

    def _images_count(self, source: str) -> int:
        if parse_vae(source):
            return self.tiles(source.rpartition(":")[2]).used.rows
        spec = self.images[source].spec
        count = self._count(spec.count)
        return count or (self.tiles(spec.guidance).used.rows if spec.guidance else count)

    def folder(self, source: str) -> Path:
        """Where images lie: named by all that fixes them, so that a change makes a new folder."""
        vae = parse_vae(source)
        if vae:
            set_tiles = self.tiles(vae[1])
            fixed: dict[str, Any] = {"vae": self._model_mark(vae[0]), "px": set_tiles.px,
                                     "set": set_tiles.whole.content_hash,
                                     "dataset": guiding_mark(set_tiles.dataset)}  # fmt: skip
            return self._folder(f"vae-{vae[0]}-{vae[1]}", fixed)
        spec = self.images[source].spec
        if spec.dataset:
            return Path(spec.dataset)
        guide = self.tiles(spec.guidance) if spec.guidance else None
        fixed = {
            "model": self._model_mark(spec.model),
            # As asked: `auto` is another dtype on another machine, and stays one folder.
            "dtype": self.protocol.models[spec.model].dtype,
            "encoder": self.protocol.models[spec.model].encoder if guide else "",
            "guidance": guide.whole.content_hash if guide else "",
            "dataset": guiding_mark(guide.dataset) if guide else "",
            "weights": self.protocol.weights_of(self.protocol.models[spec.model].encoder),
            "view": [spec.guidance_view, spec.guidance_px],
            "sampler": [spec.solver, spec.steps, spec.seed, spec.scale, spec.low, spec.high],
            "batch": spec.batch,
        }
        return self._folder(source, fixed)

    def _folder(self, name: str, fixed: dict[str, Any]) -> Path:
        mark = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]
        return self.root / GENERATED / f"{name}.{mark}"

    def _model_mark(self, name: str) -> str:
        """What a model is, without loading it: its configuration holds its weights' sums."""
        spec = self._model(name)
        config = Path(spec.model) / "config.json"
        if config.exists():
            return hashlib.sha256(config.read_bytes()).hexdigest()
        return f"{spec.generator} {spec.model}"

    def _model(self, name: str) -> ModelSpec:
        spec = self.protocol.models[name]
        if spec.generator == "own" and not spec.model:
            raise UserError(f"which model? give models.{name}.model=DIR, an exported model's "
                            f"folder or a hub id, or leave_out=[{name}]")  # fmt: skip
        return spec

    def missing_images(self, source: str) -> int:
        """How many of a source's images are not on disk; 0 for a set."""
        if source in self.protocol.sets:
            return 0
        count = self._images_count(source)
        dataset = Dataset(self.folder(source))
        if not dataset.selection_file(GENERATED).exists():
            return count
        whole = read_selection(dataset, GENERATED)
        if whole.rows < count:
            return count - whole.rows
        used = first_images(whole, count, source)
        return Ledger.read(dataset, "tile")[str(_px(dataset))].uncovered_rows(used.items())

    def make_images(self, source: str) -> None:
        """Make a source's missing images, under the launcher where there is one."""
        if not self.missing_images(source):
            return
        if source in self.images and self.images[source].spec.dataset:
            raise UserError(
                f"{self.images[source].spec.dataset} has too few images for {source}; make more "
                f"with `python -m evaluate generate`, or leave generations.*.dataset out"
            )
        if not self.protocol.launcher:
            with joined_processes(self.protocol.device, setting="device=") as processes:
                self.generate(source, processes)
            return
        launcher = shlex.split(self.protocol.launcher)
        _run([*launcher, "-m", "evaluate", *self._command, "--generate", source])
        self._tiles.pop(source, None)

    def generate(self, source: str, processes: Processes) -> None:
        """Make a source's images in this process, or in this process's share of many."""
        device = processes.device
        vae = parse_vae(source)
        if vae:
            generator, guidance, seed, batch = self._reconstruction(*vae, device)
        else:
            generator, guidance, seed, batch = self._model_images(self.images[source], device)
        request = Request(
            out=self.folder(source),
            seed=seed,
            conditions=self._images_count(source),
            micro_batch=batch,
            mpp=guidance.mpp if generator.mpp is None else generator.mpp,
        )
        outcome = generate(generator, guidance, request, processes)
        if processes.is_main:
            say(f"{source}: {final_line(outcome, request.out)}")
        self._tiles.pop(source, None)

    def _reconstruction(
        self, model: str, set_name: str, device: Any
    ) -> tuple[Generator, Guidance, int, int]:
        tiles = self.tiles(set_name)
        network = CytoSyn.from_pretrained(self._model(model).model).to(device)
        guidance = TileGuidance(tiles.dataset, tiles.whole, tiles.px)
        return Reconstruction(network, tiles.px), guidance, 0, 16

    def _model_images(self, images: Images, device: Any) -> tuple[Generator, Guidance, int, int]:
        spec, model = images.spec, self._model(images.spec.model)
        settings = sampler_settings(model.generator, spec)
        if images.spec.model not in self._opened:
            self._opened[images.spec.model] = open_generator(
                Source(
                    model.generator,
                    model.model or None,
                    device,
                    dtype=model.dtype,
                    trust_remote_code=model.trust_remote_code,
                    pipeline_code=model.pipeline_code or None,
                    vae=model.vae or None,
                )
            )
        generator = self._opened[images.spec.model].make(settings)
        guidance = self._guidance(images)
        _check_fit(guidance, generator)
        return generator, guidance, spec.seed[0], spec.batch

    def _guidance(self, images: Images) -> Guidance:
        spec = images.spec
        if not spec.guidance:
            return Unconditional(self._images_count(images.key))
        tiles = self.tiles(spec.guidance)
        encoder = self.protocol.models[spec.model].encoder
        store = FeatureStore(
            tiles.dataset,
            tile_px=spec.guidance_px or tiles.px,
            encoder=encoder,
            view=spec.guidance_view,
        )
        return ViewGuidance(tiles.dataset, tiles.whole, store)

    def conditioning_features(self) -> list[tuple[Seen, str]]:
        """(tiles as seen, encoder) of the features that guide."""
        found = {
            (Seen(one.spec.guidance, one.spec.guidance_view, one.spec.guidance_px),
             self.protocol.models[one.spec.model].encoder): None
            for one in self.images.values()
            if one.spec.guidance and self.missing_images(one.key)
        }  # fmt: skip
        return list(found)

    def missing_features(self, seen: Seen, encoder: str, *, whole: bool = False) -> int:
        """How many of the used tiles (or of the whole selection) have no features yet."""
        tiles = self.tiles(seen.source)
        px, wanted = seen.px or tiles.px, tiles.whole if whole else tiles.used
        if not encoder_file(tiles.dataset, px, encoder, seen.view, "cls").exists():
            return wanted.rows
        self._check_record(tiles.dataset, px, encoder, seen.view)
        scope = feature_scope(px, encoder, seen.view, "cls")
        return Ledger.read(tiles.dataset, "cache")[scope].uncovered_rows(wanted.items())

    def _check_record(self, dataset: Dataset, px: int, encoder: str, view: str) -> None:
        """Refuse features that stand but were made with other weights or in another dtype."""
        record = read_encoder_record(dataset, tile_px=px, encoder=encoder, view=view)
        wanted = {"weights": self.protocol.weights_of(encoder),
                  "compute_dtype": self.protocol.dtype}  # fmt: skip
        for key, value in wanted.items():
            if record.get(key) != value:
                raise UserError(
                    f"the features of {encoder} in {dataset.root} were made with {key} "
                    f"{record.get(key)!r}, the protocol asks for {value!r}; set it to the former, "
                    "or use another dataset"
                )

    def cache_command(self, seen: Seen, encoder: str) -> list[str]:
        """The `pipeline cache` that makes the features of a source."""
        tiles, protocol = self.tiles(seen.source), self.protocol
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
            _run([sys.executable, "-m", *self.cache_command(seen, encoder)])


def sampler_settings(kind: str, spec: GenerationSpec) -> SamplerSettings:
    """A generation's settings; what equals the published ones is not asked of a published call."""
    published = asdict(settings_for(kind, {}))
    asked = {
        "solver": spec.solver[0] if spec.solver else None,
        "steps": spec.steps[0] if spec.steps else None,
        "guidance_scale": spec.scale if spec.guidance else 1.0,
        "guidance_low": spec.low,
        "guidance_high": spec.high,
    }
    return settings_for(kind, {k: v for k, v in asked.items() if v != published[k]})


def _check_fit(guidance: Guidance, generator: Generator) -> None:
    """Refuse guidance that the model was not made for: a protocol forces nothing."""
    check_condition_dim(guidance.encoder_record, generator.condition_dim)
    check_tile_px(guidance.tile_px, generator.tile_px)
    check_encoder(guidance.encoder_record, generator.encoder_record, force=False)
    check_resolution(guidance.mpp, generator.mpp, force=False)


def _run(command: list[str]) -> None:
    """Run a command with this terminal; raises `UserError` where it fails."""
    say("$ " + shlex.join(["python" if word == sys.executable else word for word in command]))
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UserError(
            f"`{shlex.join(command)}` ended with status {status}; what it says above must be "
            "mended, then the same protocol goes on from here"
        )


def _px(dataset: Dataset) -> int:
    return int(identity_value(dataset, "tile_px"))


def first_tiles(whole: Selection, count: int, name: str) -> Selection:
    """The first `count` tiles of a selection in the fixed order in which they guide.

    Raises `UserError` where there are fewer.
    """
    if whole.rows < count:
        raise UserError(
            f"{name}: selection '{whole.name}' has {whole.rows:,} tiles, the protocol asks for "
            f"{count:,}; choose a larger selection, or count={whole.rows}"
        )
    if whole.rows == count:
        return whole
    rows = np.sort(source_order(whole.rows, whole.content_hash)[:count])
    slides = np.searchsorted(whole.offsets, rows, side="right") - 1
    ranks = {
        whole.slide_ids[slide]: whole.ranks[rows[slides == slide]] for slide in np.unique(slides)
    }
    return make_selection(whole.name, ranks, {**whole.plan, "first": count})


def first_images(whole: Selection, count: int, name: str) -> Selection:
    """The first `count` images of a synthetic dataset, those of its first conditions."""
    if whole.rows < count:
        raise UserError(f"{name}: {whole.rows:,} images stand, {count:,} are asked for")
    if whole.rows == count:
        return whole
    ranks, left = {}, count
    for slide_id, own in whole.items():
        ranks[slide_id] = own[:left]
        left -= len(ranks[slide_id])
    return make_selection(whole.name, ranks, {**whole.plan, "first": count})


def expand_names(protocol: Protocol, name: str) -> list[str]:
    """The sources that a name of `--generate` means: one, a whole generation, or `all`."""
    keys = [one.key for one in all_images(protocol)]
    if name == "all":
        return keys
    if name in keys or parse_vae(name):
        return [name]
    if name in protocol.generations:
        return [one.key for one in expand(protocol, name)]
    raise UserError(f"--generate {name}: no such images; there are {', '.join(keys)} and all")
