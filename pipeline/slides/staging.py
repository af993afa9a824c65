"""Slides fetched one at a time to local scratch: a cohort may be larger than any disk at hand.

A command of the user's brings a slide (`aws s3 cp {uri} {dest}`, `rsync {uri} {dest}`,
`gdc-client download {uri} -d {dir}`); it is checked, used and deleted.
"""

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

from common.errors import UserError
from common.files import hash_file
from common.leases import Lease, file_server_time, is_lease_alive
from common.processes import is_process_alive
from common.redact import HIDDEN, redact_secrets, secrets_in
from pipeline.dataset import Slide
from pipeline.slides.config import JOB_SCRATCH, StageIn
from pipeline.slides.identity import sample_slide, slide_state

_PREFIX = "histogen-stage-in"
_LEASE, _LEASED = ".lease", "leased-"
_SILENT_S = 24 * 3600.0
_FIRST_PAUSE_S = 2.0
_REASON_CHARACTERS = 200
_PR_SET_PDEATHSIG = 1
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
"""Looked up here: between fork and exec nothing may be imported or allocated at length."""


class StageInError(UserError):
    """A slide could not be fetched, or what came is not the slide."""


@contextmanager
def local_slide(slide: Slide, stage_in: StageIn, folder: Path) -> Iterator[Path]:
    """The slide as a local path, for as long as the context lasts.

    `folder` is used where no scratch was named. A copy of another size in bytes, or another MD5,
    than the table states is fetched again. Raises `StageInError` naming slide and command, or a
    path that has no file any more, or another file than the one that was scanned.
    """
    if not stage_in.command:
        path = Path(slide.path)
        _check_present(slide, path)
        yield path
        return
    scratch = _make_scratch(stage_in, folder)
    prefix = f"{_PREFIX}-{_host_name()}-"
    _remove_abandoned(scratch, prefix)
    slide_folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{_LEASED}", dir=scratch))
    lease = Lease(slide_folder / _LEASE)
    try:
        # Below the lease: the command may be given the folder, and retries empty it.
        below = slide_folder / "slide"
        below.mkdir()
        yield _fetch_slide(slide, stage_in, below)
    finally:
        lease.end()
        shutil.rmtree(slide_folder, ignore_errors=True)


def _remove_abandoned(scratch: Path, prefix: str) -> None:
    """Remove copies of processes that were killed: nothing else would.

    A process id alone proves nothing: scratch may be shared with containers that have this name.
    """
    for abandoned in scratch.glob(f"{prefix}*"):
        lease, owner = abandoned / _LEASE, abandoned.name.removeprefix(prefix)
        if lease.exists():
            is_dead = not is_lease_alive(lease, lambda: file_server_time(scratch))
        elif owner.startswith(_LEASED):
            # It is being made or removed, or it was killed just then.
            is_dead = _is_silent(abandoned, scratch)
        else:
            # An older release's, which named the process and had no lease.
            pid = owner.split("-")[0]
            is_dead = pid.isdigit() and not is_process_alive(int(pid))
        if is_dead:
            shutil.rmtree(abandoned, ignore_errors=True)


def _is_silent(folder: Path, scratch: Path) -> bool:
    """Whether nothing was written into a folder for a day, by the clock of its file server."""
    try:
        written = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return False
    now = file_server_time(scratch)
    return now is not None and now - written > _SILENT_S


def _check_present(slide: Slide, path: Path) -> None:
    """Refuse a slide that is not where `scan` found it, or is another file by now."""
    try:
        is_there = path.exists()
    except OSError as error:
        raise StageInError(f"slide {slide.slide_id}: {path}: {error.strerror}") from error
    if not is_there:
        if not path.is_absolute() or "://" in slide.path:
            raise StageInError(
                f"slide {slide.slide_id} is at {slide.path}, which is not a local file: "
                "give --stage-in 'CMD {uri} {dest}' to fetch it"
            )
        what = "is a link to a file that is missing" if path.is_symlink() else "does not exist"
        raise StageInError(
            f"slide {slide.slide_id}: {path} {what}; if the slide was moved or renamed, scan it "
            "again where it is now"
        )
    # Earlier releases took no samples, and counted all files in a DICOM slide's folder.
    if not slide.mtime_ns or not slide.sampled_sha256:
        return
    size, mtime_ns = slide_state(path, slide.series)
    is_same = size == slide.bytes and (
        mtime_ns == slide.mtime_ns or sample_slide(path, slide.series) == slide.sampled_sha256
    )
    if size and not is_same:
        raise StageInError(
            f"slide {slide.slide_id}: {path} is not the file that was scanned ({size:,} bytes, "
            f"{slide.bytes:,} then); scan it again, then run the later stages"
        )


def _make_scratch(stage_in: StageIn, folder: Path) -> Path:
    """The scratch folder on this machine: a batch job's is known to the job alone."""
    # Expanded on the worker: the variable is the batch job's, not the submitting shell's.
    named = os.path.expandvars(stage_in.scratch)
    if not named or named == JOB_SCRATCH:
        named = str(folder)
    elif "$" in named:
        raise StageInError(f"--scratch {stage_in.scratch}: no such variable on {_host_name()}")
    try:
        Path(named).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageInError(
            f"--scratch {named}: {error.strerror}; choose a folder that can be written"
        ) from error
    return Path(named)


def _host_name() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:24]


def _fetch_slide(slide: Slide, stage_in: StageIn, folder: Path) -> Path:
    name = slide.path.rstrip("/").rpartition("/")[2]
    if name in ("", ".", ".."):
        name = slide.slide_id
    # Under the slide's name, by which tools that write into a folder call it.
    dest, problem = folder / name, ""
    argv = stage_in.make_command(slide.path, dest)
    for attempt in range(stage_in.retries + 1):
        if attempt:
            sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            # Half a file of the attempt before must not be taken for the slide.
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        problem = _run_command(argv, stage_in.timeout_s)
        if not problem:
            # Some tools write the file into a folder that they make.
            fetched = dest if dest.exists() else min(folder.rglob(name), default=None)
            if not fetched:
                problem = f"it ended well but wrote no {name}"
            elif not (problem := _copy_problem(fetched, slide)):
                return fetched
    raise StageInError(
        f"slide {slide.slide_id}: `{_without_secrets(argv, shlex.join(argv))}` failed "
        f"{stage_in.retries + 1} times, last: {_without_secrets(argv, problem)}"
    )


def _without_secrets(argv: list[str], text: str) -> str:
    """The command, or what it printed, without the secrets of its arguments.

    Hidden here, where it is known where an argument ends.
    """
    for secret in secrets_in(shlex.join(argv)):
        text = text.replace(secret, HIDDEN)
    return redact_secrets(text)


def _run_command(argv: list[str], timeout_s: float) -> str:
    """Run the command; why it failed, or ''."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=timeout_s, check=False, preexec_fn=_end_with_worker,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end within {timeout_s:.0f} s"
    except OSError as error:
        return f"{argv[0]}: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    # Hidden before it is cut: a half of a secret would not be recognised.
    last = _without_secrets(argv, lines[-1].strip())[:_REASON_CHARACTERS] if lines else ""
    return f"exit status {done.returncode}" + (f": {last}" if last else "")


def _end_with_worker() -> None:
    """In the command's process: end when the worker ends, however it ends (Linux only).

    A download that went on after Ctrl-C would fill the scratch disk for nothing.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _copy_problem(path: Path, slide: Slide) -> str:
    """Why what came is not the slide, or ''."""
    if path.is_dir():
        return ""
    size = path.stat().st_size
    if slide.bytes and size != slide.bytes:
        return f"{size:,} bytes came, {slide.bytes:,} were expected"
    # To recognise a damaged copy, not against forgery.
    if slide.md5 and (md5 := hash_file(path, "md5")) != slide.md5:
        return f"md5 is {md5}, {slide.md5} was expected"
    return ""
