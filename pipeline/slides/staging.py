"""Slides fetched one at a time to local scratch: a cohort may be larger than any disk at hand.

A command of the user's brings a slide (`aws s3 cp {uri} {dest}`, `rsync {uri} {dest}`,
`gdc-client download {uri} -d {dir}`); it is checked, used and deleted.
"""

import ctypes
import hashlib
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
from common.processes import is_process_alive
from common.redact import HIDDEN, redact, secrets_in
from pipeline.dataset import Slide
from pipeline.slides.config import JOB_SCRATCH, StageIn

_PREFIX = "histogen-stage-in"
_FIRST_PAUSE_S = 2.0
_HASH_CHUNK = 1 << 22
_SAID_CHARACTERS = 200


class StageInError(UserError):
    """A slide could not be fetched, or what came is not the slide."""


@contextmanager
def local_slide(slide: Slide, stage_in: StageIn, folder: Path) -> Iterator[Path]:
    """The slide as a local path, for as long as the context lasts.

    `folder` is used where no scratch was named. Raises `StageInError` naming slide and command.
    """
    if not stage_in.command:
        path = Path(slide.path)
        if not slide.mtime_ns and not path.exists():
            raise StageInError(
                f"slide {slide.slide_id} is at {slide.path}, which is not a local file: "
                "give --stage-in 'CMD {uri} {dest}' to fetch it"
            )
        yield path
        return
    scratch = _scratch(stage_in, folder)
    _make_folder(scratch)
    _remove_abandoned(scratch)
    own = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{_host()}-{os.getpid()}-", dir=scratch))
    try:
        yield _fetch(slide, stage_in, own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _scratch(stage_in: StageIn, folder: Path) -> Path:
    """The scratch folder on this machine: a batch job's own is known to the job alone."""
    named = os.path.expandvars(stage_in.scratch)
    if not named or named == JOB_SCRATCH:
        return folder
    if "$" in named:
        raise StageInError(f"--scratch {stage_in.scratch}: no such variable on {_host()}")
    return Path(named)


def _make_folder(scratch: Path) -> None:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageInError(
            f"--scratch {scratch}: {error.strerror}; choose a folder that can be written"
        ) from error


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:24]


def _remove_abandoned(scratch: Path) -> None:
    """Copies of processes that were killed on this machine: nobody else would remove them."""
    for left in scratch.glob(f"{_PREFIX}-{_host()}-*"):
        pid = left.name.removeprefix(f"{_PREFIX}-{_host()}-").split("-")[0]
        if pid.isdigit() and not is_process_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _fetch(slide: Slide, stage_in: StageIn, own: Path) -> Path:
    name = slide.path.rstrip("/").rpartition("/")[2]
    if name in ("", ".", ".."):
        name = slide.slide_id
    dest, problem, pause = own / name, "", _FIRST_PAUSE_S
    for attempt in range(stage_in.retries + 1):
        if attempt:
            sleep(pause)
            pause *= 2
            _empty(own)
        problem = _run(stage_in.argv(slide.path, dest), stage_in.timeout_s)
        if not problem:
            found = _fetched(own, dest)
            problem = _wrong(found, slide) if found else f"it ended well but wrote no {name}"
            if found and not problem:
                return found
    argv = stage_in.argv(slide.path, dest)
    raise StageInError(
        f"slide {slide.slide_id}: `{_without_secrets(argv, shlex.join(argv))}` failed "
        f"{stage_in.retries + 1} times, last: {_without_secrets(argv, problem)}"
    )


def _without_secrets(argv: list[str], text: str) -> str:
    """The command, or what it said, without the secrets of its arguments.

    Hidden here, where it is known where an argument ends.
    """
    for secret in secrets_in(shlex.join(argv)):
        text = text.replace(secret, HIDDEN)
    return redact(text)


def _empty(folder: Path) -> None:
    for one in folder.iterdir():
        shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()


def _run(argv: list[str], timeout_s: float) -> str:
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
    said = (done.stderr or done.stdout).strip().splitlines()
    # Hidden before it is cut: a half of a secret would not be recognised.
    last = _without_secrets(argv, said[-1].strip())[:_SAID_CHARACTERS] if said else ""
    return f"exit status {done.returncode}" + (f": {last}" if last else "")


_PR_SET_PDEATHSIG = 1
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
"""Looked up here: between fork and exec nothing may be imported or allocated at length."""


def _end_with_worker() -> None:
    """In the command's process: end when the worker ends, whatever ends it (Linux only).

    A download that went on after Ctrl-C would fill the scratch disk for nobody.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _fetched(own: Path, dest: Path) -> Path | None:
    """What came: the file asked for, or one of its name in a folder of the tool's own making."""
    if dest.exists():
        return dest
    return next(iter(sorted(own.rglob(dest.name))), None)


def _wrong(path: Path, slide: Slide) -> str:
    """Why what came is not the slide, or ''."""
    if path.is_dir():
        return ""
    size = path.stat().st_size
    if slide.bytes and size != slide.bytes:
        return f"{size:,} bytes came, {slide.bytes:,} were expected"
    if slide.md5:
        found = file_md5(path)
        if found != slide.md5:
            return f"md5 is {found}, {slide.md5} was expected"
    return ""


def file_md5(path: Path) -> str:
    """md5 of a file in hex: to recognise a damaged copy, not against forgery."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as data:
        while chunk := data.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
