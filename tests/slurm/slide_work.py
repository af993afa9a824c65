"""What workers do in the SLURM tests: every begin and end leaves a line in a folder."""

import os
import signal
import time
from pathlib import Path

from pipeline.dataset import Entry


def note(folder: str, slide_id: str, what: str) -> None:
    with (Path(folder) / f"{slide_id}.log").open("a") as log:
        log.write(f"{what} {os.environ.get('SLURM_JOB_ID', '')}\n")


def work(slide_id: str, folder: str, seconds: float) -> list[Entry]:
    note(folder, slide_id, "begin")
    time.sleep(seconds)
    note(folder, slide_id, "end")
    return [Entry(slide_id, "done", "f")]


def work_or_die(slide_id: str, folder: str, seconds: float) -> list[Entry]:
    """As `work`; the slide named `killer` takes its worker with it."""
    note(folder, slide_id, "begin")
    if slide_id == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    note(folder, slide_id, "end")
    return [Entry(slide_id, "done", "f")]
