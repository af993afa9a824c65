"""Where tasks run: local processes, batch jobs, or a Dask scheduler that already runs."""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from common.console import print_line
from common.errors import UserError
from common.text import one_line
from pipeline.options import SLIDE_TIMEOUT_S
from pipeline.run.cluster import ClusterConfig, open_cluster

RETURNS_WITHIN_S = 60.0
"""A nanny that is alive has its worker back by then; else the job itself is gone."""
_STARTS = 3
_CONNECT_WITHIN_S = 10.0
_ANSWERS_WITHIN_S = 60.0
_ASKED = 5
"""More than once: where this process itself was stopped meanwhile, its own clock went on."""
_ASKED_AGAIN_AFTER_S = 1.0


@dataclass(frozen=True)
class EngineConfig:
    """Where tasks run: local processes, batch jobs (`cluster`), or a running Dask scheduler.

    `threads` is what numerical libraries may use inside a local worker: 1 where slides are cut,
    more where a network runs on a CPU. `array` is (i, n): of all slides, the i-th of n parts.
    A slide that takes longer than `slide_timeout_s` fails, 0 for no limit.
    """

    workers: int | None = None
    scheduler: str = ""
    threads: int = 1
    cluster: ClusterConfig | None = None
    array: tuple[int, int] = (0, 1)
    slide_timeout_s: float = SLIDE_TIMEOUT_S

    @property
    def is_part(self) -> bool:
        """Whether other elements of a job array do the rest."""
        return self.array[1] > 1

    @property
    def description(self) -> str:
        """In a few words, for the log."""
        if self.cluster:
            return f"{self.cluster.system}: up to {self.cluster.max_jobs} jobs"
        if self.scheduler:
            return f"scheduler {self.scheduler}"
        part = f", part {self.array[0]} of {self.array[1]}" if self.is_part else ""
        return f"local, {self.workers or 'all'} workers{part}"

    def includes_slide(self, slide_id: str) -> bool:
        """Whether a slide is this array element's: by 8 bytes of its hash, not by what is done."""
        element, elements = self.array
        digest = hashlib.blake2b(slide_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % elements == element

    def job_environment(self) -> dict[str, str]:
        """The same for a worker in a batch job, which reads Dask's settings from there too."""
        # A stage that uses threads at all gets its share of the job's cores, any other one each.
        threads = self.cluster.cores // self.cluster.workers if self.cluster else self.threads
        variables = replace(self, threads=threads if self.threads > 1 else 1).worker_environment()
        return variables | {
            "PYTHONSAFEPATH": "1",
            "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
            "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
        }

    def worker_count(self, tasks: int) -> int:
        """Local workers, at least one: as requested, else one per core, never more than tasks."""
        cores = len(os.sched_getaffinity(0))
        return max(1, min(self.workers or cores, tasks))

    def worker_environment(self) -> dict[str, str]:
        """Variables that a worker's environment must have before it starts.

        Freed memory goes back to the system above 64 KiB, or a worker keeps its peak for ever.
        """
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return {"MALLOC_TRIM_THRESHOLD_": "65536"} | dict.fromkeys(names, str(self.threads))


@contextmanager
def dask_client(config: EngineConfig, tasks: int) -> Iterator[Any]:
    """A Dask client; a local cluster lives as long as the context.

    Raises `UserError` where a running scheduler does not answer within 10 s.
    """
    import dask
    from distributed import Client

    # What dies and what that breaks is said by the stage, in lines of its own.
    for name in ("asyncio", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Dask's profiler looks at every worker's stack a hundred times per second and keeps an hour.
    options = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.daemon": False,
        "distributed.worker.profile.enabled": False,
        "distributed.comm.timeouts.connect": "10s",
        "distributed.admin.low-level-log-length": 1000,
        "distributed.deploy.lost-worker-timeout": f"{RETURNS_WITHIN_S}s",
        "distributed.nanny.pre-spawn-environ": config.worker_environment(),
    }
    with dask.config.set(options):
        if config.cluster:
            with (
                open_cluster(config.cluster, config.job_environment()) as cluster,
                _closing(Client(cluster)) as client,
            ):
                yield client
            return
        if config.scheduler:
            try:
                client = Client(config.scheduler, timeout=_CONNECT_WITHIN_S)
            except (OSError, TimeoutError, ValueError) as error:
                raise UserError(
                    f"--scheduler {config.scheduler}: no Dask scheduler answers there"
                ) from error
            with _closing(client):
                _warn_open(str(getattr(client.scheduler, "address", config.scheduler)))
                _check_scheduler(client, config.scheduler)
                yield client
            return
        with _local_cluster(config, tasks) as cluster, _closing(Client(cluster)) as client:
            yield client


@contextmanager
def _closing(client: Any) -> Iterator[Any]:
    """Close a client at the end; that its scheduler does not answer is no error, the work is done.

    It takes twice the time to connect at most.
    """
    try:
        yield client
    finally:
        with suppress(Exception):
            client.close()


def list_workers(client: Any) -> dict[str, Any]:
    """The workers that the scheduler has, by address.

    Raises `UserError` where the scheduler is gone, or does not answer for 300 s.
    """
    reason = ""
    for _ in range(_ASKED):
        try:
            # Not `scheduler_info`, which waits without a limit.
            answer = client.sync(
                client.scheduler.identity, n_workers=-1, callback_timeout=_ANSWERS_WITHIN_S
            )
            return dict(answer["workers"])
        except TimeoutError:
            reason = f"it has not answered for {_ASKED * _ANSWERS_WITHIN_S:.0f} s"
        except OSError as error:
            reason = one_line(error, 160)
            time.sleep(_ASKED_AGAIN_AFTER_S)
        except (AttributeError, RuntimeError):
            # Dask's client gave up, and has taken itself apart.
            reason = "the connection to it was lost"
            break
    raise UserError(
        f"the Dask scheduler, which hands out the slides, is gone ({reason}): what was committed "
        "stays; run the same command again to go on"
    )


@cache
def _warn_open(address: str) -> None:
    """Say, once, that a scheduler lets everybody in."""
    if not address.startswith("tls://"):
        print_line(
            f"warning: --scheduler {address}: without TLS whoever reaches it runs code as its "
            "owner; start it with certificates (docs/cluster.md)"
        )


def _check_scheduler(client: Any, address: str) -> None:
    """Refuse a scheduler that would itself wait for a task's dead worker.

    A task is bound to its worker's address, which never comes back: only where no failure is
    allowed does the engine learn of the death, and can count it.
    """
    start = "start it with DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=0 in its environment"
    try:
        # By value: the scheduler need not have this package.
        allowed = client.run_on_scheduler(
            lambda dask_scheduler: dask_scheduler.allowed_failures,
            callback_timeout=_ANSWERS_WITHIN_S,
        )
    except Exception as error:
        reason = one_line(error)
        raise UserError(
            f"--scheduler {address}: does not say its allowed-failures ({reason}); {start}, and "
            "let it run functions"
        ) from error
    if allowed != 0:
        raise UserError(
            f"--scheduler {address}: its allowed-failures is {allowed}, expected 0, or a slide "
            f"that kills its worker is begun again for ever; {start}"
        )


@contextmanager
def _local_cluster(config: EngineConfig, tasks: int) -> Iterator[Any]:
    """A local cluster; a worker that is killed while it starts costs another try, not the stage."""
    try:
        # Here: distributed takes a second that other commands save.
        from pipeline.run.private import open_local_cluster
    except ImportError as error:
        raise UserError(
            f"the local workers need a package that is not installed ({one_line(error)}): install "
            "histogen's dependencies again"
        ) from error
    workers, reason = config.worker_count(tasks), ""
    with ExitStack() as stack:
        for _ in range(_STARTS):
            try:
                cluster = stack.enter_context(
                    open_local_cluster(workers, config.worker_environment(), logging.CRITICAL)
                )
                break
            except RuntimeError as error:
                reason = one_line(error)
        else:
            raise UserError(
                f"the local workers did not start, {_STARTS} times ({reason}): is memory short? "
                "Try fewer with --workers"
            )
        yield cluster


def count_workers(config: EngineConfig) -> int:
    """Workers that a running scheduler has now, at least one that is to come.

    Raises `UserError` where no scheduler answers.
    """
    with dask_client(config, 0) as client:
        return max(1, len(list_workers(client)))
