"""The training loop: batches in, steps, what is logged, sampled and saved on the way."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from common.console import EXIT_OK, Meter, meter, say
from common.errors import UserError
from common.text import format_seconds
from common.torch_processes import Processes
from model.sit import SiT
from model.vae import VAE
from train.checkpoint import CheckpointWriter, latest_checkpoint, load_checkpoint
from train.config import Config
from train.lock import RunLock
from train.metrics import Averages, RunLog, read_metrics, write_json
from train.networks import build_parts
from train.online import open_encoder
from train.preview import (
    FixedTiles,
    Reconstruction,
    draw_samples,
    measure_reconstruction,
    read_fixed_tiles,
    save_picture,
)
from train.processes import batch_slots, joined_training
from train.reader import Batch, BatchReader
from train.setup import (
    SUMMARY_FILE,
    Inputs,
    Resume,
    Start,
    is_finished,
    open_inputs,
    open_run,
    run_directory,
)
from train.signals import EXIT_REQUEUE, StopRequests
from train.speed import matrix_rate, peak_memory_gb, step_flop
from train.step import Metrics, TrainingStep
from train.validation import measure_validation

SKIPPED_FILE = "skipped_tiles.jsonl"
_NOTED = ("vae/l1", "sit/denoise", "sit/align")  # what stands at the end of the progress bar


class TrainingDivergedError(UserError):
    """Too many non-finite steps in a row."""


def train(config: Config, resume: Resume = "auto") -> int:
    """Train, or go on with a run, to `run.steps`; the exit status.

    0 when the run is complete (at once, where it already was); 75 when SIGTERM or SIGUSR1 came,
    the state is saved and the same command goes on. Raises `UserError` for what a person can
    mend.
    """
    with StopRequests() as requests, joined_training(config.run.device) as processes:
        if is_finished(config):
            if processes.is_main:
                say(f"{config.run.dir} is finished ({config.run.steps} steps): nothing to do")
            return EXIT_OK
        with RunLock(run_directory(config)) as lock:
            processes.on_main(lock.take)
            inputs = open_inputs(config, processes)
            batch_slots(processes, config.data.batch_size)
            start = open_run(config, inputs, processes, resume)
            try:
                return Training(config, processes, inputs, start, requests).run()
            except torch.OutOfMemoryError as error:
                raise UserError(_out_of_memory(config, error)) from error


def _out_of_memory(config: Config, error: torch.OutOfMemoryError) -> str:
    data, optim = config.data, config.optim
    goes_on = "" if config.run.recompute else "set run.recompute=true to go on with this run, or "
    return (
        f"{str(error).partition('. ')[0]}: {goes_on}begin another with optim.accumulate above "
        f"{optim.accumulate} or data.batch_size below {data.batch_size}, or use more GPUs"
    )


@dataclass
class Window:
    """Counters since the last line of the log."""

    started: float = field(default_factory=time.monotonic)
    images: int = 0
    skipped_steps: int = 0
    waited_before: float = 0.0


class Training:
    """A run in progress on one process."""

    def __init__(
        self,
        config: Config,
        processes: Processes,
        inputs: Inputs,
        start: Start,
        requests: StopRequests,
    ) -> None:
        self.config, self.processes, self.inputs, self.requests = (
            config,
            processes,
            inputs,
            requests,
        )
        self.run_dir = run_directory(config)
        self.encode = open_encoder(config, inputs.source.encoder_record, processes.device)
        self.fixed = self._read_fixed()
        self.parts = build_parts(config, processes.device, self.fixed.tiles)
        if start.checkpoint is not None:
            load_checkpoint(start.checkpoint, self.parts.trainees)
        self.state = start.state
        self.first_step = start.state.step
        self.validation = self._read_validation()
        if not self.state.untrained:
            self.state = replace(self.state, untrained=self._reconstruction().to_dict())
        self.averages = Averages(processes, config.data.batch_size)
        self.window = Window()
        self.checkpoints = CheckpointWriter(self.run_dir, keep=config.checkpoint.keep)
        self._start = start.state
        self._bad_steps = self._skipped_here = 0
        self._started = time.monotonic()
        self._note, self._told = "", set[str]()
        self._flop, self._matrix_rate = 0, self._measured_rate()

    def _measured_rate(self) -> float:
        """TFLOP/s of a matrix product on this device, in the run's precision."""
        if given := self.config.log.matrix_tflop_per_s:
            return given
        dtype = torch.float32 if self.config.run.precision == "fp32" else torch.bfloat16
        return matrix_rate(self.processes.device, dtype) / 1e12

    def run(self) -> int:
        """Train to the last step, or to a request to stop."""
        config, step = self.config, self._training_step()
        self._announce()
        stopping = False
        with (
            self.checkpoints,
            self._log() as log,
            self._reader() as reader,
            self._progress() as progress,
        ):
            if log is not None:
                self._catch_up(log)
            for batch in reader:
                metrics, skipped, stopping = step(batch, stop=self.requests.asked)
                self._count(batch.step + 1, metrics, skipped=skipped)
                self._note_damage(batch)
                self._write_log(log, reader)
                if self._is_due(config.checkpoint.every) or self._is_last or stopping:
                    self._save_checkpoint(log)
                if log is not None and (self._is_last or not stopping):
                    self._preview(log)
                if progress is not None:
                    progress.advance(1, self._note)
                if stopping and not self._is_last:
                    break
        self.processes.wait()  # torchrun ends all with the first: the last checkpoint comes first
        if stopping and not self._is_last:
            return self._stopped()
        self._finish()
        return EXIT_OK

    @property
    def _is_last(self) -> bool:
        return self.state.step >= self.config.run.steps

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self.state.step % interval == 0

    def _training_step(self) -> TrainingStep:
        parts = self.parts
        return TrainingStep(
            self.config,
            self.processes,
            parts.networks,
            parts.optimizers,
            sit_average=parts.sit_average,
            vae_average=parts.vae_average,
            encode=self.encode,
        )

    def _reader(self) -> BatchReader:
        data = self.config.data
        return BatchReader(
            self.inputs.stream,
            self.inputs.source,
            batch_slots(self.processes, data.batch_size),
            first_step=self.first_step,
            stop_step=self.config.run.steps,
            threads=data.threads,
            prefetch=data.prefetch,
            on_error=data.on_error,
            pin_memory=self.processes.device.type == "cuda",
        )

    @contextmanager
    def _log(self) -> Iterator[RunLog | None]:
        """The main process's log; the others have none."""
        if not self.processes.is_main:
            yield None
            return
        with RunLog(self.run_dir, self.config, step=self.first_step) as log:
            yield log

    @contextmanager
    def _progress(self) -> Iterator[Meter | None]:
        steps = self.config.run.steps - self.first_step
        with (
            meter("train", steps, "steps") if self.processes.is_main else nullcontext() as progress
        ):
            yield progress

    def _announce(self) -> None:
        if not self.processes.is_main:
            return
        stream, config = self.inputs.stream, self.config
        if self.first_step:
            say(f"going on from step {self.first_step} of {self.run_dir}")
        if self.inputs.source.encoder_record.get("random_weights"):
            say("the encoder has RANDOM weights: conditions and alignment targets have no meaning")
        if config.run.mode == "repa-e" and self.parts.networks.perceptual is None:
            say("perceptual loss (LPIPS): off by the configuration")
        say(
            f"training on {stream.table.num_rows} tiles, {stream.steps_per_epoch} steps of "
            f"{config.data.batch_size} an epoch, on {self.processes.size} x "
            f"{self.processes.device.type}; "
            f"{stream.table.read_amplification:.2f} tiles are read for each trained on"
        )

    def _note_damage(self, batch: Batch) -> None:
        """Name the tiles that others stood in for: once to the person, each time in a file."""
        self._skipped_here += len(batch.damaged)
        for damage in batch.damaged:
            if damage not in self._told:
                say(f"skipped: {damage}")
            self._told.add(damage)
            line = json.dumps({"step": batch.step + 1, "skipped": damage}) + "\n"
            with (self.run_dir / SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(line)

    def _count(self, done: int, metrics: Metrics, *, skipped: bool) -> None:
        self.state = replace(self.state, step=done)
        self.window.images += self.config.data.batch_size
        if not skipped:
            self._bad_steps = 0
            self.averages.add(metrics)
            return
        self.window.skipped_steps += 1
        self._bad_steps += 1
        if self._bad_steps >= self.config.optim.max_bad_steps:
            self.checkpoints.settle()  # had its write failed, this is still what ends the run
            good = latest_checkpoint(self.run_dir) or "none yet"
            raise TrainingDivergedError(
                f"{self._bad_steps} steps in a row up to step {done} had non-finite gradients; "
                f"last good checkpoint: {good}; lower the learning rates and start another run"
            )

    def _write_log(self, log: RunLog | None, reader: BatchReader) -> None:
        """A line of the window where one is due: before the checkpoint, since a run that goes on
        from that can never write it again."""
        if self.state.step % self.config.log.every and not self._is_last:
            return
        line = self._take_window(reader)
        if log is not None:
            with self._tolerated("the log's line"):
                log.write(self.state.step, line)
            self._take_note(line)

    def _take_note(self, line: dict[str, float]) -> None:
        noted = [f"{name} {line[name]:.3f}" for name in _NOTED if name in line]
        self._note = "  ".join(noted) or self._note

    def _catch_up(self, log: RunLog) -> None:
        """What is measured before the first step, or what a stop right after the checkpoint kept
        from being measured: it is a function of the networks, so nothing is lost."""
        if self.first_step == 0:
            if self.validation:
                with self._tolerated("validation"):
                    log.write(0, self._validate())
            return
        lines = {line["step"]: line for line in read_metrics(self.run_dir)}
        known = lines.get(self.first_step, {})
        wanted = [f"{name}/denoise" for name in self.validation if self._is_validated]
        wanted += ["reconstruction/psnr"] * self._is_due(self.config.log.samples_every)
        if any(name not in known for name in wanted):
            self._preview(log)

    @property
    def _is_validated(self) -> bool:
        return self._is_due(self.config.log.validation_every) or self._is_last

    def _preview(self, log: RunLog) -> None:
        """What the main process alone measures and draws on the networks, while the others wait
        for it at the next step: after the checkpoint, and no failure of it stops the run.

        The line comes last: where it stands, the grid does too.
        """
        line: dict[str, float] = {}
        if self._is_validated:
            with self._tolerated("validation"):
                line |= self._validate()
        if self._is_due(self.config.log.samples_every):
            with self._tolerated("the grid of samples"):
                self._save_samples(log)
                line["reconstruction/psnr"] = self._reconstruction().psnr
        if line:
            with self._tolerated("the log's line"):
                log.write(self.state.step, line)

    @contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """A failure inside the block is one line: nobody loses a night's training to a picture."""
        try:
            yield
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            reason = str(UserError(error))
            if isinstance(error, torch.OutOfMemoryError):
                reason = reason.partition(". ")[0]  # behind it stands a paragraph on allocation
            say(f"warning: {what} of step {self.state.step} failed, training goes on: {reason}")
            if self.processes.device.type == "cuda":
                torch.cuda.empty_cache()

    def _take_window(self, reader: BatchReader) -> dict[str, float]:
        """What happened since the last line; the counters start again."""
        values, skipped_tiles = self.averages.take(), self._skipped_tiles()
        now = time.monotonic()
        window, self.window = self.window, Window(now, waited_before=reader.wait_s)
        line = {
            "epoch": self.state.step / self.inputs.stream.steps_per_epoch,
            "seconds": self._seconds(now),
            "images_per_s": window.images / max(now - window.started, 1e-9),
            "data_wait_s": reader.wait_s - window.waited_before,
            "skipped_steps": window.skipped_steps,
            "skipped_tiles": skipped_tiles,
            "memory_gb": peak_memory_gb(self.processes.device),
            **values,
        }
        return line | self._utilisation(line["images_per_s"])

    def _utilisation(self, images_per_s: float) -> dict[str, float]:
        """TFLOP/s of all processes, and MFU: its share of their matrix rate."""
        if not self.processes.is_main:
            return {}
        if self._flop == 0:
            self._flop = sum(step_flop(self.config, self.parts.networks.perceptual).values())
        reached = images_per_s * self._flop / 1e12
        return {"tflop_per_s": reached, "mfu": reached / (self.processes.size * self._matrix_rate)}

    def _seconds(self, now: float) -> float:
        """Seconds of training up to now, over all restarts."""
        return self._start.seconds + now - self._started

    def _skipped_tiles(self) -> int:
        """Damaged tiles replaced so far, over all processes and restarts."""
        here = torch.tensor(float(self._skipped_here), device=self.processes.device)
        return self._start.skipped_tiles + int(self.processes.total(here).item())

    def _save_checkpoint(self, log: RunLog | None) -> None:
        if log is not None:
            with self._tolerated("the log"):
                log.sync()
        skipped, seconds = self._skipped_tiles(), self._seconds(time.monotonic())
        self.state = replace(self.state, skipped_tiles=skipped, seconds=seconds)
        if self.processes.is_main:
            self.checkpoints.save(self.state, self.parts.trainees)

    def _read_fixed(self) -> FixedTiles:
        return read_fixed_tiles(self.inputs.source, self.inputs.fixed_rows)

    def _read_validation(self) -> dict[str, FixedTiles]:
        """The tiles of each validation selection, on the process that measures on them."""
        if not self.processes.is_main:
            return {}
        found = {
            name: read_fixed_tiles(self.inputs.source, rows)
            for name, rows in self.inputs.validation.items()
        }
        if self.encode is None:
            return found
        return {
            name: replace(fixed, tokens=self.encode(fixed.tiles)) for name, fixed in found.items()
        }

    def _validate(self) -> dict[str, float]:
        """Losses on the validation selections."""
        return {
            f"{selection}/{name}": value
            for selection, fixed in self.validation.items()
            for name, value in measure_validation(
                self.config, *self._exported(), fixed, align=self.config.trains_alignment
            ).items()
        }

    def _exported(self) -> tuple[SiT, VAE]:
        """The networks that the configuration exports, raw or averaged."""
        chosen = self.config.export
        networks, parts = self.parts.networks, self.parts
        sit = parts.sit_average.module if chosen.sit == "ema" else networks.sit
        if chosen.vae == "ema" and parts.vae_average is not None:
            return sit, parts.vae_average.module
        return sit, networks.vae

    def _reconstruction(self) -> Reconstruction:
        tiles = self.fixed.tiles[: self.config.log.fixed_tiles]
        return measure_reconstruction(self._exported()[1], tiles)

    def _save_samples(self, log: RunLog) -> None:
        pixels = draw_samples(self.config, *self._exported(), self.fixed)
        save_picture(self.run_dir / "samples" / f"step-{self.state.step:08d}.png", pixels)
        log.write_picture(self.state.step, "samples", pixels)

    def _stopped(self) -> int:
        if self.processes.is_main:
            say(
                f"stopped on request at step {self.state.step} of {self.config.run.steps}; saved "
                f"in {self.run_dir}; the same command goes on (exit status {EXIT_REQUEUE})"
            )
        return EXIT_REQUEUE

    def _finish(self) -> None:
        """summary.json and the last lines a person reads."""
        if not self.processes.is_main:
            return
        before, after = self.state.untrained, self._reconstruction()
        images = self.state.step * self.config.data.batch_size
        lines = read_metrics(self.run_dir)
        last = lines[-1] if lines else {}
        summary = {
            "steps": self.state.step,
            "seconds": self.state.seconds,
            "images_per_s": images / max(self.state.seconds, 1e-9),
            "skipped_tiles": self.state.skipped_tiles,
            "reconstruction": {
                "tiles": after.tiles,
                "selection": self.config.fixed_selection,
                "vae": self.config.export.vae,
                "l1_untrained": before["l1"],
                "l1_trained": after.l1,
                "psnr_untrained": before["psnr"],
                "psnr_trained": after.psnr,
            },
            "alignment": {
                name: -last[f"{name}/align"] for name in ("vae", "sit") if f"{name}/align" in last
            },
            "encoder_record": self.inputs.source.encoder_record,
        }
        write_json(self.run_dir / SUMMARY_FILE, summary)
        say(
            f"trained {self.state.step} steps, {images} tiles in "
            f"{format_seconds(self.state.seconds)} ({summary['images_per_s']:.3g} tiles/s): "
            f"{self.run_dir}"
        )
        say(
            f"reconstruction: PSNR untrained {before['psnr']:.2f} dB -> trained {after.psnr:.2f} "
            f"dB, L1 {before['l1']:.4f} -> {after.l1:.4f} (grey scale 0 to 1, {after.tiles} tiles "
            f"of selection '{self.config.fixed_selection}')"
        )
