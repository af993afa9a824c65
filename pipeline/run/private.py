"""Dask servers that let in only those who hold this run's certificate, and show nothing else.

Whoever can talk to a Dask scheduler or worker runs code as the owner of the run, and every user
of a machine can reach its loopback ports.
"""

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from tempfile import TemporaryDirectory
from typing import Any

import dask
from distributed import Nanny, Scheduler, SpecCluster, Status, Worker
from distributed.security import Security

LOOPBACK = "127.0.0.1"
STARTS_WITHIN_S = 300.0
"""A worker that has not started by then never will: it was stopped, or hangs in a library."""
CLOSES_WITHIN_S = 60.0
"""A nanny asks its worker to end, and kills it after some seconds."""
_WORKER_PROCESS = "Dask Worker process"
_VALID = timedelta(days=365)
_CLOCK_MAY_DIFFER = timedelta(days=2)


class PrivateScheduler(Scheduler):
    """A scheduler without HTTP pages, which know no certificate."""

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Start none."""


class PrivateWorker(Worker):
    """A worker without HTTP pages, which know no certificate."""

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Start none."""


def make_security() -> Security:
    """A new key and certificate, in memory, that every part of one cluster shows and demands.

    Elliptic (P-256): made in under a millisecond, where RSA takes up to half a second.
    """
    # Here: workers import this module too, and need none of it.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "histogen")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_MAY_DIFFER)
        .not_valid_after(now + _VALID)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    shown = certificate.public_bytes(Encoding.PEM).decode()
    roles = ("client", "scheduler", "worker")
    return Security(
        require_encryption=True,
        tls_ca_file=shown,
        **{f"tls_{role}_key": secret for role in roles},
        **{f"tls_{role}_cert": shown for role in roles},
    )


@contextmanager
def open_local_cluster(
    workers: int, environment: Mapping[str, str], silence_logs: int
) -> Iterator[SpecCluster]:
    """A cluster of worker processes on this machine, on loopback, with its own certificate.

    `environment` is set in the workers. Scratch folders are the owner's alone, since a worker
    imports modules from its own. Raises `RuntimeError` where the workers do not start within
    300 s. Closing takes 60 s at most; what does not end by itself is killed.
    """
    server = {"protocol": "tls://", "host": LOOPBACK, "security": make_security()}
    # Not /tmp/dask-scratch-space, a name that another user can take first.
    with (
        TemporaryDirectory(prefix="histogen-", ignore_cleanup_errors=True) as scratch,
        dask.config.set({"temporary-directory": scratch}),
    ):
        nanny = {
            **server,
            "worker_class": PrivateWorker,
            "nthreads": 1,
            "memory_limit": 0,
            "death_timeout": STARTS_WITHIN_S,
            "env": dict(environment),
            "silence_logs": silence_logs,
        }
        cluster = None
        try:
            cluster = SpecCluster(
                workers={number: {"cls": Nanny, "options": nanny} for number in range(workers)},
                scheduler={"cls": PrivateScheduler, "options": {**server, "port": 0}},
                security=server["security"],
                silence_logs=silence_logs,
            )
        except (AssertionError, OSError) as error:
            # Dask's own word for a nanny that gave up is an assertion of its.
            raise RuntimeError(f"no answer within {STARTS_WITHIN_S:.0f} s") from error
        finally:
            if cluster is None:
                _kill_workers()
        try:
            yield cluster
        finally:
            close_cluster(cluster)
            _kill_workers()


def renew_workers(cluster: SpecCluster) -> None:
    """Start, in the background, a new nanny for each that has failed or is gone."""

    def renew() -> None:
        # Dask itself only forgets a nanny whose worker has been away for `lost-worker-timeout`;
        # asking for as many workers as there should be then starts another one.
        for name, nanny in list(cluster.workers.items()):
            if nanny.status in (Status.closed, Status.failed):
                del cluster.workers[name]
        cluster.scale(len(cluster.worker_spec))

    loop: Any = cluster.loop
    loop.add_callback(renew)


def close_cluster(cluster: Any) -> None:
    """Close a cluster within 60 s, or leave it as it is; never an error, the work is done."""
    try:
        cluster.close(timeout=CLOSES_WITHIN_S)
    except Exception:
        # Nothing of it goes on: no nanny starts a worker again, and Python's end waits for none.
        cluster.shutdown_on_close = False
        cluster.loop.add_callback(cluster.loop.stop)


def _kill_workers() -> None:
    """End what a closed cluster has left: Dask asks some to end that do not hear it (SIGSTOP).

    Python waits for its child processes at its end, without a limit.
    """
    for process in multiprocessing.active_children():
        if process.name.startswith(_WORKER_PROCESS):
            process.kill()
            process.join()
