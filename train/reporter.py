"""What a run reports: its log, previews, validation, summary and lines on the console.

All processes take part in the sums; the main one alone measures, draws and writes.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.console import Meter, open_meter, print_line
from common.errors import UserError
from common.files import append_text, write_json
from common.text import format_seconds
from common.torch_processes import Processes
from model.sit import SiT
from model.vae import VAE
from train.checkpoint import RunState
from train.config import Config
from train.losses import Metrics
from train.metrics_log import SKIPPED_FILE, MetricsLog, read_metrics
from train.networks import Parts
from train.preview import (
    FixedTiles,
    ReconstructionQuality,
    draw_samples,
    measure_reconstruction,
    read_fixed_tiles,
    save_picture,
)
from train.processes import batch_slots
from train.reader import Batch
from train.setup import SUMMARY_FILE, TrainingData, run_directory
from train.speed import matrix_rate, peak_memory_gb, step_flop
from train.step import Encode
from train.validation import measure_validation

_NOTED = ("vae/l1", "sit/denoise", "sit/align")  # shown at the end of the progress bar


class Averages:
    """Means of metrics over steps, float32 on the device so that no step waits for the host.

    Every process must add the same names in the same order.
    """

    def __init__(self, processes: Processes, batch_size: int) -> None:
        self._processes = processes
        self._share = len(batch_slots(processes, batch_size)) / batch_size
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add_step(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's local batch means (0-dim), as float32."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take_means(self) -> dict[str, float]:
        """The float32 means since the last call, weighted over processes by their tiles.

        Starts again. All processes call it, and wait for each other once.
        """
        if not self._sums:
            return {}
        # One exchange for all names: a line of the log must not cost a round trip per metric.
        means = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
        values = self._processes.sum_values(means * self._share).tolist()
        result = dict(zip(self._sums, values, strict=True))
        self._sums, self._counts = {}, {}
        return result


@dataclass
class Window:
    """Counters since the last line of the log; `started` and `waited_before` are in seconds."""

    started: float = field(default_factory=time.monotonic)
    images: int = 0
    skipped_steps: int = 0
    waited_before: float = 0.0


class Reporter:
    """Reports a run in progress.

    `state` is where the run begins, and is kept up to date from outside; `fixed` are the tiles of
    previews; `encode` computes patch tokens where they are not cached.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        data: TrainingData,
        parts: Parts,
        state: RunState,
        *,
        fixed: FixedTiles,
        encode: Encode | None,
    ) -> None:
        self.config, self.processes, self.data, self.parts = config, processes, data, parts
        self.run_dir, self.state, self._start = run_directory(config), state, state
        self._fixed = fixed
        self._validation = self._read_validation(encode)
        self._averages = Averages(processes, config.data.batch_size)
        self._window, self._started = Window(), time.monotonic()
        self._damaged_here, self._damage_said = 0, set[str]()
        self._failing: set[str] = set()
        self._note, self._flop = "", 0
        # MFU is a share of this rate, in TFLOP/s.
        self._matrix_rate = config.log.matrix_tflop_per_s
        if not self._matrix_rate:
            dtype = torch.float32 if config.run.precision == "fp32" else torch.bfloat16
            self._matrix_rate = matrix_rate(processes.device, dtype) / 1e12
        self._log: MetricsLog | None = None
        self._meter: Meter | None = None

    @contextmanager
    def open_log(self) -> Iterator[None]:
        """Keep the log and the progress open inside the block; the main process has both."""
        if not self.processes.is_main:
            yield
            return
        first = self._start.step
        with (
            MetricsLog(self.run_dir, self.config, step=first) as self._log,
            open_meter("train", self.config.run.steps - first, "steps") as self._meter,
        ):
            yield

    def announce_run(self) -> None:
        """Say on the console what is about to be trained."""
        if not self.processes.is_main:
            return
        stream, config = self.data.stream, self.config
        if self._start.step:
            print_line(f"going on from step {self._start.step} of {self.run_dir}")
        # Such a run looks like any other until somebody trusts its images.
        if self.data.source.encoder_record.get("random_weights"):
            print_line(
                "the encoder has RANDOM weights: conditions and alignment targets have no meaning"
            )
        if "perceptual" in config.mode.losses and self.parts.networks.perceptual is None:
            print_line("perceptual loss (LPIPS): off by the configuration")
        print_line(
            f"training on {stream.table.num_rows} tiles, {stream.steps_per_epoch} steps of "
            f"{config.data.batch_size} an epoch, on {self.processes.size} x "
            f"{self.processes.device.type}; {stream.table.read_amplification:.2f} tiles are read "
            "for each trained on"
        )

    def note_damage(self, batch: Batch) -> None:
        """Name the tiles that were replaced: each once on the console, each time in a file."""
        self._damaged_here += len(batch.damaged)
        lines = ""
        for damage in batch.damaged:
            if damage not in self._damage_said:
                print_line(f"skipped: {damage}")
            self._damage_said.add(damage)
            lines += json.dumps({"step": batch.step + 1, "skipped": damage}) + "\n"
        if lines:
            with self._tolerate_failure(f"the line of {SKIPPED_FILE}"):
                append_text(self.run_dir / SKIPPED_FILE, lines)

    def count_step(self, metrics: Metrics, *, skipped: bool) -> None:
        """Count a finished step; the metrics of a skipped one are left out."""
        self._window.images += self.config.data.batch_size
        if skipped:
            self._window.skipped_steps += 1
        else:
            self._averages.add_step(metrics)

    def write_window(self, wait_s: float) -> None:
        """Write a line of the steps since the last one, where it is due.

        `wait_s` is how many seconds the run has waited for data. The line comes before the
        checkpoint, since a run that continues from that can never write it again.
        """
        if self.state.step % self.config.log.every and not self._is_last:
            return
        line = self._close_window(wait_s)
        if self._log is not None:
            with self._tolerate_failure("the log's line"):
                self._log.write_line(self.state.step, line)
            noted = [f"{name} {line[name]:.3f}" for name in _NOTED if name in line]
            self._note = "  ".join(noted) or self._note

    def sync_log(self) -> None:
        """Let the log survive a power loss; before the checkpoint of the same step."""
        if self._log is not None:
            with self._tolerate_failure("the log"):
                self._log.sync_file()

    def catch_up(self) -> None:
        """Measure before the first step, or what a stop right after the checkpoint prevented.

        Previews are a function of the networks, so nothing is lost.
        """
        if self._log is None:
            return
        # Step 0 is where the curves begin; later ones are repeated only where they are missing.
        if self._start.step == 0:
            if self._validation:
                with self._tolerate_failure("validation"):
                    self._log.write_line(0, self._validate_selections())
            return
        lines = {line["step"]: line for line in read_metrics(self.run_dir)}
        known = lines.get(self._start.step, {})
        wanted = [f"{name}/denoise" for name in self._validation if self._is_validated]
        wanted += ["reconstruction/psnr"] * self.is_due(self.config.log.samples_every)
        if any(name not in known for name in wanted):
            self.make_previews()

    def make_previews(self) -> None:
        """Measure and draw what is due on the main process; the others wait at the next step.

        It comes after the checkpoint, and no failure of it stops the run. The line comes last:
        where it is in the log, the grid of samples exists too.
        """
        if self._log is None:
            return
        line: dict[str, float] = {}
        if self._is_validated:
            with self._tolerate_failure("validation"):
                line |= self._validate_selections()
        if self.is_due(self.config.log.samples_every):
            with self._tolerate_failure("the grid of samples"):
                self._save_samples(self._log)
                line["reconstruction/psnr"] = self.measure_reconstruction().psnr
        if line:
            with self._tolerate_failure("the log's line"):
                self._log.write_line(self.state.step, line)

    def advance_progress(self) -> None:
        """Show a finished step in the progress."""
        if self._meter is not None:
            self._meter.advance(1, self._note)

    def total_seconds(self) -> float:
        """How many seconds the run has trained up to now, over all restarts."""
        return self._start.seconds + time.monotonic() - self._started

    def skipped_tiles(self) -> int:
        """Damaged tiles replaced so far, over all processes (which all call this) and restarts."""
        here = torch.tensor(float(self._damaged_here), device=self.processes.device)
        return self._start.skipped_tiles + int(self.processes.sum_values(here).item())

    def is_due(self, interval: int) -> bool:
        """Whether what happens every `interval` >= 1 steps happens now; never for 0."""
        return interval > 0 and self.state.step % interval == 0

    def measure_reconstruction(self) -> ReconstructionQuality:
        """How well the exported VAE reconstructs the fixed tiles: L1 in [0, 1], PSNR in dB."""
        tiles = self._fixed.tiles[: self.config.log.fixed_tiles]
        return measure_reconstruction(self._exported_networks()[1], tiles)

    def write_summary(self) -> None:
        """Write summary.json and the last lines on the console."""
        if not self.processes.is_main:
            return
        state, before, after = self.state, self.state.untrained, self.measure_reconstruction()
        selection = self.config.fixed_selection
        images = state.step * self.config.data.batch_size
        images_per_s = images / max(state.seconds, 1e-9)
        # The alignment loss is a negative cosine; the summary gives the cosine.
        last = next(reversed(read_metrics(self.run_dir)), {})
        summary = {
            "steps": state.step,
            "seconds": state.seconds,
            "images_per_s": images_per_s,
            "skipped_tiles": state.skipped_tiles,
            "reconstruction": {
                "tiles": after.tiles,
                "selection": selection,
                "vae": self.config.export.vae,
                "l1_untrained": before["l1"],
                "l1_trained": after.l1,
                "psnr_untrained": before["psnr"],
                "psnr_trained": after.psnr,
            },
            "alignment": {
                name: -last[f"{name}/align"] for name in ("vae", "sit") if f"{name}/align" in last
            },
            "latents": {
                "source": state.latents,
                "mean": self._exported_networks()[0].bn.running_mean.tolist(),
                "variance": self._exported_networks()[0].bn.running_var.tolist(),
            },
            "encoder_record": self.data.source.encoder_record,
        }
        write_json(self.run_dir / SUMMARY_FILE, summary)
        print_line(
            f"trained {state.step} steps, {images} tiles in {format_seconds(state.seconds)} "
            f"({images_per_s:.3g} tiles/s): {self.run_dir}"
        )
        print_line(
            f"reconstruction: PSNR untrained {before['psnr']:.2f} dB -> trained {after.psnr:.2f} "
            f"dB, L1 {before['l1']:.4f} -> {after.l1:.4f} (grey scale 0 to 1, {after.tiles} tiles "
            f"of selection '{selection}')"
        )

    @property
    def _is_last(self) -> bool:
        return self.state.step >= self.config.run.steps

    @property
    def _is_validated(self) -> bool:
        return self.is_due(self.config.log.validation_every) or self._is_last

    def _close_window(self, wait_s: float) -> dict[str, float]:
        """What happened since the last line; the counters start again."""
        # Sums over processes first: all of them take part, the main one alone writes.
        means, skipped_tiles = self._averages.take_means(), self.skipped_tiles()
        now = time.monotonic()
        window, self._window = self._window, Window(now, waited_before=wait_s)
        images_per_s = window.images / max(now - window.started, 1e-9)
        line = {
            "epoch": self.state.step / self.data.stream.steps_per_epoch,
            "seconds": self.total_seconds(),
            "images_per_s": images_per_s,
            "data_wait_s": wait_s - window.waited_before,
            "skipped_steps": window.skipped_steps,
            "skipped_tiles": skipped_tiles,
            "memory_gb": peak_memory_gb(self.processes.device),
            **means,
        }
        if self.processes.is_main:
            if self._flop == 0:
                self._flop = sum(step_flop(self.config, self.parts.networks.perceptual).values())
            # MFU is the share of all processes' matrix rate.
            line["tflop_per_s"] = images_per_s * self._flop / 1e12
            line["mfu"] = line["tflop_per_s"] / (self.processes.size * self._matrix_rate)
        return line

    @contextmanager
    def _tolerate_failure(self, what: str) -> Iterator[None]:
        """A failure inside the block is one line: a picture must not cost a night of training.

        One that goes on, as on a full disk, is reported when it begins.
        """
        try:
            yield
            self._failing.discard(what)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            reason = str(UserError(error))
            if isinstance(error, torch.OutOfMemoryError):
                reason = reason.partition(". ")[0]  # a paragraph on allocation follows
            if what not in self._failing:
                print_line(
                    f"warning: {what} of step {self.state.step} failed, training goes on: {reason}"
                )
            self._failing.add(what)
            if self.processes.device.type == "cuda":
                torch.cuda.empty_cache()

    def _read_validation(self, encode: Encode | None) -> dict[str, FixedTiles]:
        """The tiles of each validation selection, on the process that measures on them."""
        if not self.processes.is_main:
            return {}
        selections = {}
        for name, rows in self.data.validation.items():
            tiles = read_fixed_tiles(self.data.source, rows)
            selections[name] = replace(tiles, tokens=encode(tiles.tiles)) if encode else tiles
        return selections

    def _validate_selections(self) -> dict[str, float]:
        """Losses on the validation selections, as `selection/name`."""
        return {
            f"{selection}/{name}": value
            for selection, fixed in self._validation.items()
            for name, value in measure_validation(
                self.config,
                *self._exported_networks(),
                fixed,
                align=self.config.uses_loss("sit_align"),
            ).items()
        }

    def _exported_networks(self) -> tuple[SiT, VAE]:
        """The networks that the configuration exports, raw or averaged."""
        chosen, parts = self.config.export, self.parts
        sit = parts.sit_average.module if chosen.sit == "ema" else parts.networks.sit
        if chosen.vae == "ema" and parts.vae_average is not None:
            return sit, parts.vae_average.module
        return sit, parts.networks.vae

    def _save_samples(self, log: MetricsLog) -> None:
        pixels = draw_samples(self.config, *self._exported_networks(), self._fixed)
        save_picture(self.run_dir / "samples" / f"step-{self.state.step:08d}.png", pixels)
        log.write_picture(self.state.step, "samples", pixels)
