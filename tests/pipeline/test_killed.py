"""kill -9 of workers and of whole stages at random moments: a rerun gives the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.dataset import Dataset, read_journal
from tests.pipeline.faults import ROOT, contents, pipeline

SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"

DRIVER = """
import sys
from pipeline.__main__ import main
slides, root, workers = sys.argv[1:]
if __name__ == "__main__":
    for stage in (["scan", slides], ["tissue"], ["select", "--name", "train"], ["tile"]):
        engine = [] if stage[0] == "select" else ["--workers", workers]
        status = main([stage[0], "--dataset", root, *stage[1:], *engine])
        if status:
            sys.exit(status)
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides of one picture."""
    folder = tmp_path_factory.mktemp("slides")
    for name in ("a", "b", "c"):
        shutil.copy(SLIDE, folder / f"{name}.svs")
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages in one process."""
    path = tmp_path_factory.mktemp("driver") / "stages.py"
    path.write_text(DRIVER)
    return path


def start(driver: Path, slides: Path, root: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(driver), str(slides), str(root), str(workers)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def finish(driver: Path, slides: Path, root: Path, workers: int = 2) -> float:
    """Run all stages to their end; how many seconds they took."""
    began = time.monotonic()
    assert start(driver, slides, root, workers).wait(timeout=300) == 0
    return time.monotonic() - began


@pytest.fixture(scope="module")
def uninterrupted(
    driver: Path, slides: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], float]:
    """What the dataset holds when nothing goes wrong, and how long that takes."""
    root = tmp_path_factory.mktemp("whole") / "dataset"
    seconds = finish(driver, slides, root)
    return contents(root), seconds


def kill_stage(process: subprocess.Popen[bytes]) -> bool:
    """The coordinator and all its workers at once, as when a node fails."""
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def kill_worker(process: subprocess.Popen[bytes], choice: random.Random) -> bool:
    """One of the processes below the coordinator; False where none is there just now."""
    try:
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]
    except psutil.NoSuchProcess:
        return False
    if not workers:
        return False
    victim = choice.choice(workers)
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def round_of_kills(
    what: str, seed: int, driver: Path, slides: Path, root: Path, seconds: float
) -> int:
    """Start, kill at a random moment, run to the end; how many kills struck (0 or 1)."""
    choice = random.Random(f"{what} {seed}")
    process = start(driver, slides, root)
    moment = time.monotonic() + choice.uniform(0.1, 0.95) * seconds
    while time.monotonic() < moment and process.poll() is None:
        time.sleep(0.01)
    if what == "stage":
        struck = kill_stage(process)
    else:
        struck = kill_worker(process, choice)
        # A slide whose worker died is tried again in the same run.
        assert process.wait(timeout=300) == 0
    # One worker is started faster than two, and the bytes know nothing of their number.
    finish(driver, slides, root, workers=1)
    return int(struck)


def run_kills(
    what: str, wanted: int, driver: Path, slides: Path, folder: Path,
    uninterrupted: tuple[dict[str, str], float],
) -> None:  # fmt: skip
    whole, seconds = uninterrupted
    struck = 0
    for seed in range(4 * wanted):
        root = folder / f"{what}-{seed}"
        struck += round_of_kills(what, seed, driver, slides, root, seconds)
        assert contents(root) == whole, f"after killing a {what}, seed {seed}"
        assert not list((Dataset(root).root / "tiles").rglob("*.tmp*"))
        shutil.rmtree(root)
        if struck == wanted:
            return
    pytest.fail(f"only {struck} of {wanted} kills found something to kill")


@pytest.mark.full
@pytest.mark.parametrize("what", ["stage", "worker"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    what: str, driver: Path, slides: Path, tmp_path: Path,
    uninterrupted: tuple[dict[str, str], float],
) -> None:  # fmt: skip
    run_kills(what, 1, driver, slides, tmp_path, uninterrupted)


@pytest.mark.full
@pytest.mark.parametrize("what", ["stage", "worker"])
def test_twenty_kills_at_random_moments(
    what: str, driver: Path, slides: Path, tmp_path: Path,
    uninterrupted: tuple[dict[str, str], float],
) -> None:  # fmt: skip
    run_kills(what, 20, driver, slides, tmp_path, uninterrupted)


CACHE = ("cache", "--weights", "random:0", "--batch", "16", "--device", "cpu")


@pytest.mark.full
def test_a_killed_cache_goes_on_to_the_same_bytes(
    driver: Path, slides: Path, tmp_path: Path
) -> None:
    """Two slides of one block each, H0-mini's architecture with seeded weights."""
    begun = tmp_path / "begun"
    assert start(driver, slides, begun).wait(timeout=300) == 0
    few = ("--name", "few", "--tiles", "36")
    assert pipeline("select", "--dataset", str(begun), *few).returncode == 0

    def cache(root: Path) -> subprocess.Popen[bytes]:
        command = (*CACHE, "--selection", "few", "--dataset", str(root))
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *command], cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    whole = tmp_path / "whole"
    shutil.copytree(begun, whole)
    began = time.monotonic()
    assert cache(whole).wait(timeout=600) == 0
    seconds = time.monotonic() - began
    expected = contents(whole)
    for seed in range(3):
        root = tmp_path / f"killed-{seed}"
        shutil.copytree(begun, root)
        process = cache(root)
        time.sleep(random.Random(seed).uniform(0.2, 0.95) * seconds)
        kill_stage(process)
        entries = read_journal(Dataset(root), "cache")
        named = {record.path for entry in entries for record in entry.files}
        there = {path for path in contents(root) if "features" in path and path.endswith("parquet")}
        for path in there - named:
            assert (root / path).stat().st_size == (whole / path).stat().st_size, "whole, unnamed"
        assert cache(root).wait(timeout=600) == 0
        assert contents(root) == expected, f"seed {seed}"
