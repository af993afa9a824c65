"""Workers as batch jobs, through dask-jobqueue: what a cluster file says, and how many jobs run.

A job is one or several workers. At its walltime a worker leaves in good order; a job that was
lost otherwise (preempted, its node gone) is replaced; jobs that are not needed are given back.
"""

import asyncio
import difflib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.plain_yaml import load_yaml

SYSTEMS = ("slurm", "pbs", "lsf", "sge", "oar", "htcondor", "moab")
_CLASSES = {
    "slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster",
    "oar": "OARCluster", "htcondor": "HTCondorCluster", "moab": "MoabCluster",
}  # fmt: skip
_GPU_DIRECTIVE = re.compile(
    r"--(gres|tres-per-\w+)[= ]\S*gpu|--gpus(-per-\w+)?[= ]|^-G"  # SLURM
    r"|\bn?gpus?(_\w+)?\s*="  # of -l: select=1:ngpus=1, nodes=1:gpus=1, gpu=1
    r"|^-gpu\b|\brequest_gpus\b"  # LSF, HTCondor
)
_MARGIN_S, _MARGIN_SHARE = 300.0, 0.1
"""A worker leaves this long before its job's walltime (or this share of a short one)."""
_ADAPT_EVERY_S = 2.0
_LOST_AFTER_S = 60.0
"""A job none of whose workers was seen for this long, after one had been there, is replaced."""
_ASK_QUEUE_EVERY_S = 20.0
_MAX_STILLBORN = 3
"""Jobs that may end before their worker came, before the stage gives up."""


@dataclass(frozen=True)
class ClusterConfig:
    """One stage's jobs; the keys of a cluster file (docs/cluster.md).

    `cores`, `memory` and `walltime` are a job's, which runs `workers` Dask workers. `directives`
    are further lines for the scheduler (`--gres=gpu:1`), `prologue` shell lines before the worker.
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
        _check(self.system in SYSTEMS, "system", self.system, f"one of {', '.join(SYSTEMS)}")
        for key in ("cores", "workers", "max_jobs"):
            _check(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        _check(
            self.cores % self.workers == 0, "cores", self.cores,
            f"a multiple of workers ({self.workers}): a job's cores are shared out evenly",
        )  # fmt: skip
        _check(0 <= self.min_jobs <= self.max_jobs, "min_jobs", self.min_jobs, "0 to max_jobs")
        walltime_seconds(self.walltime)

    @property
    def asks_for_gpus(self) -> bool:
        """Whether a directive does; that a queue has GPUs by itself is not to be seen here."""
        return any(_GPU_DIRECTIVE.search(line) for line in self.directives)

    @property
    def lifetime_s(self) -> int:
        """After how many seconds a worker leaves of itself."""
        walltime = walltime_seconds(self.walltime)
        return int(walltime - min(_MARGIN_S, _MARGIN_SHARE * walltime))


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"cluster file: {key} is {value!r}, expected {expected}")


def walltime_seconds(text: str) -> int:
    """Seconds of `MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`, as SLURM reads it.

    Raises `UserError` for anything else and for no time at all.
    """
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        total = int(days) * 86400 if dash else 0
    except ValueError:
        parts, total = [], 0
    if dash and 1 <= len(parts) <= 3:
        units: tuple[int, ...] = (3600, 60, 1)
    else:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}.get(len(parts), ())
    seconds = total + sum(part * unit for part, unit in zip(parts, units, strict=False))
    if not units or min(parts) < 0 or total < 0 or seconds <= 0:
        raise UserError(
            f"cluster file: walltime is {text!r}, expected a time such as '04:00:00' or '1-12:00'"
        )
    return seconds


def load_cluster(path: Path, stage: str) -> ClusterConfig:
    """The jobs of one stage: the file's own keys, and over them those under `stages: STAGE:`.

    Raises `UserError` naming the file and key.
    """
    shared, own = stated(path, stage)
    try:
        config = ClusterConfig(**{**shared, **own})
    except UserError as error:
        raise UserError(f"--cluster {path}: {error}") from None
    return config


def stated(path: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a cluster file states: for all stages, and for this one; each value in its type."""
    try:
        read = load_yaml(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--cluster {path}: cannot be read ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(read, dict):
        raise UserError(f"--cluster {path}: expected keys such as queue, memory and walltime")
    stages = read.pop("stages", None) or {}
    own = stages.get(stage) or {} if isinstance(stages, dict) else None
    if not isinstance(own, dict):
        raise UserError(f"--cluster {path}: expected 'stages: {{{stage}: {{key: value}}}}'")
    shared = {key: _typed(path, key, value) for key, value in read.items()}
    return shared, {key: _typed(path, key, value) for key, value in own.items()}


def _typed(path: Path, key: object, value: object) -> Any:
    """The value of a key in its field's type; numbers and texts are not mixed up."""
    known = {one.name: one for one in fields(ClusterConfig)}
    if key not in known:
        near = difflib.get_close_matches(str(key), known, 1)
        advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise UserError(f"--cluster {path}: unknown key '{key}'; {advice}")
    expected: type = type(known[str(key)].default)
    if expected is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if value is None and expected is str:
        return ""
    if type(value) is not expected:
        advice = ": put it in quotes" if expected is str else ""
        names = {"tuple": "a list of texts", "str": "a text", "int": "a whole number"}
        wanted = names.get(expected.__name__, "true or false")
        raise UserError(f"--cluster {path}: {key} is {value!r}, expected {wanted}{advice}")
    return value


@contextmanager
def open_cluster(config: ClusterConfig, environment: dict[str, str]) -> Iterator[Any]:
    """A dask-jobqueue cluster without jobs yet; its jobs end with the context.

    `environment` is set in every worker from its start. Raises `UserError` where dask-jobqueue or
    the batch system's commands are missing.
    """
    try:
        import dask_jobqueue
    except ImportError as error:
        raise UserError(
            "--cluster needs dask-jobqueue, which is not installed; pip install 'histogen[slurm]'"
        ) from error
    kind = getattr(dask_jobqueue, _CLASSES[config.system])
    options = cluster_options(config, environment)
    try:
        cluster = kind(**options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--cluster: {' '.join(str(error).split())}") from error
    with cluster:
        yield cluster


def cluster_options(config: ClusterConfig, environment: dict[str, str]) -> dict[str, Any]:
    """The arguments of dask-jobqueue's cluster class."""
    logs = Path(config.log_dir).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    exports = [f"export {name}={value}" for name, value in environment.items()]
    lifetime = config.lifetime_s
    options: dict[str, Any] = {
        "cores": config.cores,
        "processes": config.workers,
        "memory": config.memory,
        "walltime": config.walltime,
        "interface": config.interface or None,
        "local_directory": config.local_dir or None,
        "log_directory": str(logs),
        "job_name": "histogen",
        "job_extra_directives": list(config.directives),
        "job_script_prologue": [*exports, *config.prologue],
        "worker_extra_args": ["--lifetime", f"{lifetime}s"],
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
        "silence_logs": "critical",
    }
    if config.queue:
        options["queue"] = config.queue
    if config.account:
        options["account"] = config.account
    if config.system not in ("slurm", "pbs", "lsf", "oar", "moab", "sge"):
        del options["walltime"]
    if config.tls:
        # Whoever reaches an open Dask scheduler runs code in its workers.
        options |= {"security": True, "protocol": "tls://", "shared_temp_directory": str(logs)}
    return options


def make_scaler(
    cluster: Any,
    config: ClusterConfig,
    demand: Callable[[], int],
    busy: Callable[[], set[str]],
    take_seen: Callable[[], set[str]],
) -> "Watch":
    """Keep as many jobs as there is work: `demand` workers, none of the `busy` addresses ended.

    `take_seen` gives the names of workers that came since it was last asked: one may come and
    be gone again between two looks at the jobs.
    """
    watch = Watch(config, take_seen)
    kind = partial(_scaler_class(), demand=demand, busy=busy, watch=watch)
    cluster.adapt(
        Adaptive=kind, minimum_jobs=config.min_jobs, maximum_jobs=config.max_jobs,
        interval=f"{_ADAPT_EVERY_S}s",
    )  # fmt: skip
    return watch


class Watch:
    """Sees jobs that have ended: with their workers, or before a worker came out of them."""

    def __init__(
        self, config: ClusterConfig, take_seen: Callable[[], set[str]] = lambda: set()
    ) -> None:
        self.config = config
        self.stillborn = 0
        """Jobs in a row that ended before a worker came."""
        self._take_seen = take_seen
        self._seen: dict[str, float] = {}
        self._asked = time.monotonic()

    def check(self) -> None:
        """Raise `UserError` where jobs end without ever becoming a worker."""
        if self.stillborn >= _MAX_STILLBORN:
            raise UserError(
                f"{self.stillborn} jobs ended before their worker answered: see the logs in "
                f"{Path(self.config.log_dir).resolve()} (a queue, account or directive that is "
                "refused? a node that cannot reach this one? `interface` names the network)"
            )

    def lost(self, jobs: dict[str, set[str]], present: set[str]) -> list[str]:
        """Jobs whose workers were there once and have all been gone for a while.

        `jobs` are the names of each job's workers, `present` the names of workers now there.
        """
        now = time.monotonic()
        seen = present | self._take_seen()
        came = {job for job, names in jobs.items() if names & seen}
        if came:
            self.stillborn = 0
        self._seen |= dict.fromkeys(came, now)
        gone = [job for job in jobs if now - self._seen.get(job, now) > _LOST_AFTER_S]
        for job in gone:
            del self._seen[job]
        return gone

    def due(self) -> bool:
        """Whether the queue may be asked again."""
        now = time.monotonic()
        if self.config.system != "slurm" or now - self._asked < _ASK_QUEUE_EVERY_S:
            return False
        self._asked = now
        return True

    def ended(self, job_ids: dict[str, str]) -> list[str]:
        """Of jobs (by name, with SLURM's id), those that neither wait nor run any more."""
        sent = {name: one for name, one in job_ids.items() if one}
        alive = slurm_alive(set(sent.values())) if sent else None
        ended = [] if alive is None else [name for name, one in sent.items() if one not in alive]
        self.stillborn += sum(name not in self._seen for name in ended)
        for name in ended:
            self._seen.pop(name, None)  # the next job has the same name
        return ended


def slurm_alive(job_ids: set[str]) -> set[str] | None:
    """Which of the jobs wait or run; None where squeue does not answer."""
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
            watch: Watch,
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
            there = self.cluster.scheduler_info["workers"]
            busy = {str(there[one]["name"]) for one in self._busy() if one in there}
            spare, chosen = len(self.plan) - target, []
            for names in self._names().values():
                if len(names) <= spare and not names & busy:
                    chosen += sorted(names)
                    spare -= len(names)
            return chosen

        def _names(self) -> dict[str, set[str]]:
            """The names of each job's workers, by the job's own."""
            return {
                str(name): {f"{name}{suffix}" for suffix in spec.get("group", [""])}
                for name, spec in self._jobs.worker_spec.items()
            }

        async def _replace_lost(self) -> None:
            """Forget jobs that have ended: the cluster then submits others for them."""
            present = {str(w["name"]) for w in self.cluster.scheduler_info["workers"].values()}
            gone = self._watch.lost(self._names(), present)
            if self._watch.due():
                ids = {name: job.job_id for name, job in self._jobs.workers.items()}
                gone += await asyncio.to_thread(self._watch.ended, ids)
            for name in dict.fromkeys(gone):
                job = self._jobs.workers.pop(name, None)
                if job is not None:
                    await job.close()

    return JobScaler
