"""The training loop: batches in, steps, checkpoints; what it reports is `train.reporter`'s."""

from dataclasses import asdict, replace
from typing import Any

import torch

from common.console import EXIT_OK, EXIT_REQUEUE, print_line
from common.errors import UserError
from common.torch_processes import Processes
from train.checkpoint import CheckpointWriter, latest_checkpoint, load_checkpoint
from train.config import Config
from train.latents import (
    describe_latents,
    measure_latents,
    read_latent_scale,
    set_latent_scale,
)
from train.lock import RunLock
from train.losses import Metrics
from train.networks import build_parts
from train.online import open_encoder
from train.preview import read_fixed_tiles
from train.processes import batch_slots, joined_training
from train.reader import BatchReader
from train.reporter import Reporter
from train.setup import (
    Resume,
    Start,
    TrainingData,
    is_finished,
    open_data,
    open_run,
    refuse_links,
    run_directory,
)
from train.signals import StopRequests
from train.step import TrainingStep


class TrainingDivergedError(UserError):
    """Too many non-finite steps in a row."""


def train(config: Config, resume: Resume = "auto") -> int:
    """Train, or continue a run, to `run.steps`; the exit status.

    0 when the run is complete (at once, where it already was); 75 after SIGINT, SIGTERM, SIGUSR1
    or SIGHUP, when the state is saved and the same command continues (before the first step
    there is none, and `StoppedEarly` is raised). Raises `UserError` for what the user can fix.
    """
    with StopRequests() as requests, joined_training(config.run.device) as processes:
        # Before the lock: a finished run needs neither it nor its dataset.
        if processes.on_main(lambda: is_finished(config)):
            if processes.is_main:
                print_line(
                    f"{config.run.dir} is finished ({config.run.steps} steps): nothing to do"
                )
            return EXIT_OK
        refuse_links(run_directory(config))
        with RunLock(run_directory(config)) as lock:
            processes.on_main(lock.acquire)
            data = open_data(config, processes)
            batch_slots(processes, config.data.batch_size)
            start = open_run(config, data, processes, resume)
            try:
                return Training(config, processes, data, start, requests, lock).run()
            except torch.OutOfMemoryError as error:
                recompute, optim = config.run.recompute, config.optim
                remedy = "" if recompute else "set run.recompute=true to continue this run, or "
                raise UserError(
                    f"{str(error).partition('. ')[0]}: {remedy}begin another with optim.accumulate "
                    f"above {optim.accumulate} or data.batch_size below {config.data.batch_size}, "
                    "or use more GPUs"
                ) from error


class Training:
    """A run in progress on one process."""

    def __init__(
        self,
        config: Config,
        processes: Processes,
        data: TrainingData,
        start: Start,
        requests: StopRequests,
        lock: RunLock | None = None,
    ) -> None:
        self.config, self.processes, self.lock = config, processes, lock
        self.data, self.requests, self.state = data, requests, start.state
        self.first_step = start.state.step
        self.run_dir = run_directory(config)
        # The networks begin at the seed or at published weights, and a checkpoint replaces both.
        self.encode = open_encoder(config, data.source.encoder_record, processes.device)
        fixed = read_fixed_tiles(data.source, data.fixed_rows)
        self.parts = build_parts(config, processes.device)
        if start.checkpoint is not None:
            load_checkpoint(start.checkpoint, self.parts.trainees)
        self.reporter = Reporter(
            config, processes, data, self.parts, start.state, fixed=fixed, encode=self.encode
        )
        # Measured once: a run that is continued compares with its first weights.
        if not {"l1", "psnr"} <= self.state.untrained.keys():
            self._set_state(untrained=asdict(self.reporter.measure_reconstruction()))
        self.checkpoints = CheckpointWriter(self.run_dir, keep=config.checkpoint.keep)
        self._bad_steps = 0

    def run(self) -> int:
        """Train to the last step, or to a request to stop; the exit status."""
        reporter, stopping = self.reporter, False
        self._prepare_latents()
        step = TrainingStep(self.config, self.processes, self.parts, encode=self.encode)
        # All together: what leaves now, on a request to stop, leaves no other process waiting.
        self.processes.wait_for_all()
        self.requests.begin_steps()
        reporter.announce_run()
        with self.checkpoints, reporter.open_log(), self._open_reader() as reader:
            reporter.catch_up()
            for batch in reader:
                # All processes stop after the same step, whichever of them received the signal.
                metrics, skipped, stopping = step(batch, stop=self.requests.received)
                self._count_step(batch.step + 1, metrics, skipped=skipped)
                reporter.note_damage(batch)

                # A line of the log, its checkpoint, then what may fail or be made up for later.
                reporter.write_window(reader.wait_s)
                if reporter.is_due(self.config.checkpoint.every) or self._is_last or stopping:
                    self._save_checkpoint()
                if self._is_last or not stopping:
                    reporter.make_previews()
                reporter.advance_progress()
                if stopping:
                    break
        # torchrun ends all with the first: the last checkpoint comes first.
        self.processes.wait_for_all()
        if stopping and not self._is_last:
            if self.processes.is_main:
                print_line(
                    f"stopped on request at step {self.state.step} of {self.config.run.steps}; "
                    f"saved in {self.run_dir}; the same command continues (exit status "
                    f"{EXIT_REQUEUE})"
                )
            return EXIT_REQUEUE
        reporter.write_summary()
        return EXIT_OK

    def _prepare_latents(self) -> None:
        """Set what normalises the latents of weights that were given, and say so.

        A checkpoint has its own: a run that is continued computes nothing.
        """
        init, fixed = self.config.init, not self.config.mode.trains_vae
        sit, average = self.parts.networks.sit, self.parts.sit_average.module
        source = self.state.latents
        if self.state.step > 0:
            if fixed and not source:
                source = f"this run's batches up to step {self.state.step}, by an older version"
        elif init.sit:  # a given SiT brings the statistics that fit its latents
            source = f"init.sit={init.sit}"
        elif init.vae:
            if init.statistics == "vae":
                scale = read_latent_scale(init.vae)
            else:
                rows = self.data.stream.table.spread_rows(init.statistics_tiles)
                vae, dataset = self.parts.networks.vae, self.data.dataset
                scale = measure_latents(vae, dataset, rows, self.config, self.processes)
            set_latent_scale([sit.bn, average.bn], scale)
            source = scale.source
        if fixed:  # a version that moved them may have let the average's lag behind
            average.bn.load_state_dict(sit.bn.state_dict())
        self._set_state(latents=source)
        if source and self.processes.is_main and (fixed or self.state.step == 0):
            print_line(describe_latents(sit.bn, source, fixed=fixed))

    @property
    def _is_last(self) -> bool:
        return self.state.step >= self.config.run.steps

    def _open_reader(self) -> BatchReader:
        data = self.config.data
        return BatchReader(
            self.data.stream,
            self.data.source,
            batch_slots(self.processes, data.batch_size),
            first_step=self.first_step,
            stop_step=self.config.run.steps,
            threads=data.threads,
            prefetch=data.prefetch,
            on_error=data.on_error,
            pin_memory=self.processes.device.type == "cuda",
        )

    def _set_state(self, **changes: Any) -> None:
        self.state = self.reporter.state = replace(self.state, **changes)

    def _count_step(self, done: int, metrics: Metrics, *, skipped: bool) -> None:
        self._set_state(step=done)
        self.reporter.count_step(metrics, skipped=skipped)
        self._bad_steps = self._bad_steps + 1 if skipped else 0
        if self._bad_steps >= self.config.optim.max_bad_steps:
            self.checkpoints.settle_write()  # had its write failed, this is still what ends the run
            good = latest_checkpoint(self.run_dir) or "none yet"
            raise TrainingDivergedError(
                f"{self._bad_steps} steps in a row up to step {done} had non-finite gradients; "
                f"last good checkpoint: {good}; lower the learning rates and start another run"
            )

    def _save_checkpoint(self) -> None:
        if self.lock is not None:
            self.lock.require()  # on the process that has it
        self.reporter.sync_log()
        skipped, seconds = self.reporter.skipped_tiles(), self.reporter.total_seconds()
        self._set_state(skipped_tiles=skipped, seconds=seconds)
        if self.processes.is_main:
            self.checkpoints.save(self.state, self.parts.trainees)
