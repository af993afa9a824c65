"""Workers as SLURM jobs, through dask-jobqueue: what a cluster file says, and how many jobs run.

A job is one or several workers. At its walltime a worker leaves in good order; a job that was
lost otherwise (preempted, its node gone) is replaced; jobs that are not needed are given back.
"""

import asyncio
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.config import build_config, read_yaml
from common.console import print_line
from common.errors import UserError
from common.text import one_line

_GPU_DIRECTIVE = re.compile(r"--(gres|tres-per-\w+)[= ]\S*gpu|--gpus(-per-\w+)?[= ]|^-G")
_SHELL_PATH = re.compile(r"[\w./:@%+=,${} -]*", re.ASCII)
_PLAIN_WORD = re.compile(r"[\w./:@%+=,-]+")
"""What neither SLURM nor a shell takes for more than one word."""
_MARGIN_S, _MARGIN_SHARE = 300.0, 0.1
"""A worker leaves this long before its job's walltime (or this share of a short one)."""
_ADAPT_EVERY_S = 2.0
_LOST_AFTER_S = 60.0
"""A job none of whose workers was seen for this long, after one had been there, is replaced."""
_QUERY_QUEUE_EVERY_S = 20.0
_MAX_FAILED_STARTS = 3
"""Jobs in a row that may end before a worker of theirs answered, before the stage gives up."""
_WITHOUT_PAGES = ("--no-dashboard", "--worker-class", "pipeline.run.private.PrivateWorker")
_SECONDS = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}
_SECONDS_AFTER_DAYS = {1: (3600,), 2: (3600, 60), 3: (3600, 60, 1)}
"""Seconds of each part of a time without and with days, by the number of its parts."""


@dataclass(frozen=True)
class ClusterConfig:
    """One stage's jobs; the keys of a cluster file (docs/cluster.md).

    `cores` (at least 1), `memory` (such as 4GB) and `walltime` (see `parse_walltime`) are a job's,
    which has `workers` Dask workers. `directives` are further lines for SLURM (`--gres=gpu:1`),
    `prologue` shell lines before the worker.
    """

    system: str = "slurm"
    queue: str = ""
    account: str = ""
    cores: int = 1
    workers: int = 1
    memory: str = "4GB"
    walltime: str = "04:00:00"
    min_jobs: int = 0
    max_jobs: int = 10
    interface: str = ""
    directives: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()
    log_dir: str = "cluster-logs"
    local_dir: str = ""
    tls: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "system": (
                self.system == "slurm",
                "slurm; other batch systems take job arrays (--array) or Dask workers that you "
                "start there (--scheduler), see docs/cluster.md",
            ),
            "workers": (self.workers >= 1, "at least 1"),
            "cores": (
                self.cores >= 1 and self.workers >= 1 and self.cores % self.workers == 0,
                f"a multiple of workers ({self.workers}): a job's cores are shared out evenly",
            ),
            "max_jobs": (self.max_jobs >= 1, "at least 1"),
            "min_jobs": (0 <= self.min_jobs <= self.max_jobs, "0 to max_jobs"),
        }
        for key, (is_right, expected) in allowed.items():
            if not is_right:
                raise UserError(f"{key} is {getattr(self, key)!r}, expected {expected}")
        parse_walltime(self.walltime)
        self._check_words()

    def _check_words(self) -> None:
        """Refuse what would be another line or word of the batch script that it is written into."""
        for key in ("queue", "account", "interface"):
            text = getattr(self, key)
            if text and not _PLAIN_WORD.fullmatch(text):
                raise UserError(f"{key} is {text!r}, expected one word of letters and digits")
        if not _SHELL_PATH.fullmatch(self.local_dir):
            raise UserError(
                f"local_dir is {self.local_dir!r}, expected a folder, which may name variables of "
                "the job (/scratch/$USER)"
            )
        for text in (self.memory, self.walltime, *self.directives):
            if not text.isprintable():
                raise UserError(f"{text!r}: expected one line without control characters")

    @property
    def asks_for_gpus(self) -> bool:
        """Whether a directive does; that a queue has GPUs without one cannot be seen here."""
        return any(_GPU_DIRECTIVE.search(line) for line in self.directives)

    @property
    def lifetime_s(self) -> int:
        """After how many seconds a worker leaves: 300 s, or a tenth, before the walltime."""
        walltime = parse_walltime(self.walltime)
        return int(walltime - min(_MARGIN_S, _MARGIN_SHARE * walltime))


def parse_walltime(text: str) -> int:
    """Seconds of `MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`, as SLURM reads it.

    Raises `UserError` for anything else and for no time at all.

    >>> parse_walltime("30"), parse_walltime("04:00:00"), parse_walltime("1-12")
    (1800, 14400, 129600)
    """
    # With days the clock begins with hours, without them a single number is minutes.
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        seconds = int(days) * 86400 if dash else 0
    except ValueError:
        parts, seconds = [], 0
    units = (_SECONDS_AFTER_DAYS if dash else _SECONDS).get(len(parts), ())
    total = seconds + sum(part * unit for part, unit in zip(parts, units, strict=False))
    if not units or min(parts) < 0 or seconds < 0 or total <= 0:
        raise UserError(f"walltime is {text!r}, expected a time such as '04:00:00' or '1-12:00'")
    return total


def load_cluster(path: Path, stage: str) -> ClusterConfig:
    """The jobs of one stage: the file's own keys, and over them those under `stages: STAGE:`.

    Raises `UserError` naming the file and key.
    """
    shared, own = read_cluster_file(path, stage)
    try:
        return build_config(ClusterConfig, {**shared, **own})
    except UserError as error:
        raise UserError(f"--cluster {path}: {error}") from None


def read_cluster_file(path: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys that a cluster file states for all stages, and those for this one."""
    try:
        shared = read_yaml(path)
    except UserError as error:
        raise UserError(f"--cluster: {error}") from None
    stages = shared.pop("stages", None) or {}
    own = stages.get(stage) or {} if isinstance(stages, dict) else None
    if not isinstance(own, dict):
        raise UserError(f"--cluster {path}: expected 'stages: {{{stage}: {{key: value}}}}'")
    # A key without a value takes away what the file says for all stages.
    blank = {key: "" for key, value in own.items() if value is None}
    return {key: value for key, value in shared.items() if value is not None}, {**own, **blank}


@contextmanager
def open_cluster(config: ClusterConfig, environment: dict[str, str]) -> Iterator[Any]:
    """A dask-jobqueue cluster without jobs yet; its jobs end with the context.

    `environment` is set in every worker from its start. Raises `UserError` where dask-jobqueue or
    SLURM's commands are missing.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise UserError(
            "--cluster needs dask-jobqueue, which is not installed; pip install 'histogen[slurm]'"
        ) from error
    # dask-jobqueue reports its own mistakes as several kinds of errors.
    options = cluster_options(config, environment)
    # Here: distributed takes a second that other commands save.
    from pipeline.run.private import PrivateScheduler, close_cluster

    if not config.tls:
        print_line(
            "warning: tls is false in the cluster file: whoever reaches this command's scheduler, "
            "or a worker, over the network runs code as you; take that line out"
        )
    try:
        cluster = SLURMCluster(scheduler_cls=PrivateScheduler, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--cluster: {one_line(error)}") from error
    try:
        yield cluster
    finally:
        close_cluster(cluster)


def cluster_options(config: ClusterConfig, environment: dict[str, str]) -> dict[str, Any]:
    """The arguments of dask-jobqueue's cluster class."""
    # Absolute: jobs do not start in this process's folder everywhere.
    logs = Path(config.log_dir).resolve()
    # The job's script has it as it is, also in the worker's options: nothing there can be quoted.
    if not _PLAIN_WORD.fullmatch(str(logs)):
        raise UserError(
            f"--cluster: log_dir is {str(logs)!r}, whose name a batch script cannot have: expected "
            "a folder without blanks, quotes and other characters that a shell reads"
        )
    logs.mkdir(parents=True, exist_ok=True)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    options: dict[str, Any] = {
        "cores": config.cores,
        # Into a script, as it is: the folder of an environment may have blanks in its name.
        "python": shlex.quote(sys.executable),
        "processes": config.workers,
        "memory": config.memory,
        "walltime": config.walltime,
        "interface": config.interface or None,
        "log_directory": str(logs),
        "job_name": "histogen",
        "job_extra_directives": list(config.directives),
        "job_script_prologue": [*exports, *config.prologue, *_private_folder(config.local_dir)],
        "worker_extra_args": ["--lifetime", f"{config.lifetime_s}s", *_WITHOUT_PAGES],
        "scheduler_options": {"dashboard": False, "dashboard_address": None},
        "silence_logs": "critical",
    }
    if config.queue:
        options["queue"] = config.queue
    if config.account:
        options["account"] = config.account
    if config.tls:
        # Anyone who reaches an open Dask scheduler runs code in its workers.
        options |= {"security": True, "protocol": "tls://", "shared_temp_directory": str(logs)}
    return options


def _private_folder(parent: str) -> list[str]:
    """Shell lines that give a job's workers a scratch folder of their own in `parent`, or $TMPDIR.

    Dask's own has a name that another user of the node can take first, and its workers import
    modules from there.
    """
    # `parent` may name variables of the job, as in $SLURM_TMPDIR.
    parent = parent or "${TMPDIR:-/tmp}"
    return [
        f'mkdir -p "{parent}"',
        f'DASK_TEMPORARY_DIRECTORY="$(mktemp -d -p "{parent}" histogen-XXXXXXXX)" || exit 1',
        "export DASK_TEMPORARY_DIRECTORY",
        "trap 'rm -rf \"$DASK_TEMPORARY_DIRECTORY\"' EXIT",
    ]


def make_scaler(
    cluster: Any,
    config: ClusterConfig,
    demand: Callable[[], int],
    busy: Callable[[], set[str]],
    take_seen: Callable[[], set[str]],
) -> "JobWatch":
    """Keep as many jobs as there is work: `demand` workers, none of the `busy` addresses ended.

    `take_seen` gives the names of workers that came since its last call: one may come and be gone
    again between two looks at the jobs.
    """
    # Dask makes the scaler itself, from a class that it is given.
    watch = JobWatch(config, take_seen)
    scaler = partial(_scaler_class(), demand=demand, busy=busy, watch=watch)
    cluster.adapt(
        Adaptive=scaler, minimum_jobs=config.min_jobs, maximum_jobs=config.max_jobs,
        interval=f"{_ADAPT_EVERY_S}s",
    )  # fmt: skip
    return watch


class JobWatch:
    """Sees jobs that have ended: with their workers, or before any worker of theirs answered."""

    def __init__(
        self, config: ClusterConfig, take_seen: Callable[[], set[str]] = lambda: set()
    ) -> None:
        self.config = config
        self.failed_starts = 0
        self._take_seen = take_seen
        self._last_seen: dict[str, float] = {}
        self._queried = time.monotonic()

    def check(self) -> None:
        """Raise `UserError` where at least three jobs in a row ended before a worker answered."""
        if self.failed_starts >= _MAX_FAILED_STARTS:
            raise UserError(
                f"{self.failed_starts} jobs ended before their worker answered: see the logs in "
                f"{Path(self.config.log_dir).resolve()} (a queue, account or directive that is "
                "refused? a node that cannot reach this one? `interface` names the network)"
            )

    def find_lost(self, jobs: dict[str, set[str]], present: set[str]) -> list[str]:
        """Jobs whose workers were there once and have all been gone for 60 seconds.

        `jobs` are the names of each job's workers, `present` the names of workers now there.
        """
        # A job that was never seen may still wait in the queue: it is not lost.
        now = time.monotonic()
        seen = present | self._take_seen()
        came = {job for job, names in jobs.items() if names & seen}
        if came:
            self.failed_starts = 0
        self._last_seen |= dict.fromkeys(came, now)
        gone = [job for job in jobs if now - self._last_seen.get(job, now) > _LOST_AFTER_S]
        for job in gone:
            del self._last_seen[job]
        return gone

    def is_query_due(self) -> bool:
        """Whether the queue may be queried, every 20 s: all users of a cluster share squeue."""
        now = time.monotonic()
        if now - self._queried < _QUERY_QUEUE_EVERY_S:
            return False
        self._queried = now
        return True

    def find_ended(self, job_ids: dict[str, str]) -> list[str]:
        """Of jobs (by name, with SLURM's id), those that neither wait nor run any more."""
        submitted = {name: job_id for name, job_id in job_ids.items() if job_id}
        alive = query_alive_jobs(set(submitted.values())) if submitted else None
        if alive is None:
            return []
        ended = [name for name, job_id in submitted.items() if job_id not in alive]
        self.failed_starts += sum(name not in self._last_seen for name in ended)
        for name in ended:
            self._last_seen.pop(name, None)  # the next job has the same name
        return ended


def query_alive_jobs(job_ids: set[str]) -> set[str] | None:
    """Which of the jobs wait or run; None where squeue does not answer within 30 s."""
    # Only states count from which a job may still run.
    states = "PENDING,CONFIGURING,RUNNING,COMPLETING,SUSPENDED,REQUEUED"
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--states={states}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(answer.stdout.split()) & job_ids


def _scaler_class() -> Any:
    """The class is made here: importing distributed takes a second that other commands save."""
    from distributed.deploy.adaptive import Adaptive

    class JobScaler(Adaptive):
        """Dask's adaptive scaling by our queue, which its scheduler does not see."""

        def __init__(
            self,
            cluster: Any,
            *,
            demand: Callable[[], int],
            busy: Callable[[], set[str]],
            watch: JobWatch,
            **options: Any,
        ) -> None:
            self._demand, self._busy, self._watch = demand, busy, watch
            self._jobs: Any = cluster
            super().__init__(cluster, **options)

        async def target(self) -> int:
            """Workers that have something to do."""
            await self._replace_lost()
            return self._demand()

        async def workers_to_close(self, target: int) -> list[str]:
            """Workers of jobs that are idle as a whole."""
            workers = self.cluster.scheduler_info["workers"]
            busy = {str(workers[at]["name"]) for at in self._busy() if at in workers}
            # A job ends as a whole: workers that idle next to a busy one cost nothing more.
            spare, chosen = len(self.plan) - target, []
            for names in self._worker_names().values():
                if len(names) <= spare and not names & busy:
                    chosen += sorted(names)
                    spare -= len(names)
            return chosen

        def _worker_names(self) -> dict[str, set[str]]:
            """The names of each job's workers, by the job's name."""
            return {
                str(name): {f"{name}{suffix}" for suffix in spec.get("group", [""])}
                for name, spec in self._jobs.worker_spec.items()
            }

        async def _replace_lost(self) -> None:
            """Forget jobs that have ended: the cluster then submits others for them."""
            present = {str(w["name"]) for w in self.cluster.scheduler_info["workers"].values()}
            gone = self._watch.find_lost(self._worker_names(), present)
            if self._watch.is_query_due():
                ids = {name: job.job_id for name, job in self._jobs.workers.items()}
                gone += await asyncio.to_thread(self._watch.find_ended, ids)
            for name in dict.fromkeys(gone):
                job = self._jobs.workers.pop(name, None)
                if job is not None:
                    await job.close()

    return JobScaler
