"""The machine: versions, cores, memory, GPU, batch system, the hub's token."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from common.text import format_bytes, one_line
from pipeline.upkeep.doctor.finding import Finding, make_finding

_PYTHON = (3, 11)
_BYTES_PER_WORKER = 1 << 30
_OPEN_FILES = 4096
_TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_COMMAND_SECONDS = 20.0


def version_findings() -> list[Finding]:
    """Python, and every package that this project's metadata requires."""
    version = platform.python_version()
    problem = "" if sys.version_info >= _PYTHON else f"{version} is too old"
    python = make_finding("python", version, problem, "make setup PYTHON=python3.12")
    try:
        texts = metadata.requires("histogen") or ()
    except metadata.PackageNotFoundError:
        fix = "make setup (or pip install --editable .)"
        return [python, Finding("packages", "bad", "histogen is not installed here", fix)]
    needed = [
        requirement
        for requirement in map(Requirement, texts)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    problems = [text for requirement in needed if (text := requirement_problem(requirement))]
    fits = f"histogen {metadata.version('histogen')}; {len(needed)} required packages fit"
    fix = "make setup (or pip install --constraint constraints.txt --editable .)"
    return [python, make_finding("packages", fits, "; ".join(problems), fix)]


def requirement_problem(requirement: Requirement) -> str:
    """Why the installed version does not fit, or ''."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, expected {requirement.specifier}"


def machine_findings() -> list[Finding]:
    """Cores that may be used, memory for as many workers, open files."""
    cores = len(os.sched_getaffinity(0))
    memory = _memory_bytes()
    is_short = memory < cores * _BYTES_PER_WORKER
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        make_finding(
            "cores and memory", f"{cores} cores, {format_bytes(memory)}",
            f"{format_bytes(memory)} for {cores} workers of up to 1 GiB" if is_short else "",
            f"--workers {max(1, memory // _BYTES_PER_WORKER)}", "warning",
        ),
        make_finding(
            "open files", f"up to {files:,}",
            f"only {files:,} at a time" if files < _OPEN_FILES else "",
            f"ulimit -n {_OPEN_FILES}", "warning",
        ),
    ]  # fmt: skip


def _memory_bytes() -> int:
    """What this process may use: the machine's memory, or less where a control group says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text()))
    return total


def gpu_finding() -> Finding:
    """Whether PyTorch sees the GPUs that the driver shows, and can use the first."""
    import torch

    driver_gpus = _driver_gpus()
    if not torch.cuda.is_available():
        if not driver_gpus:
            fix = "cache, train and generate there take --device cpu or another node"
            return Finding("GPU", "warning", "none, by driver or PyTorch", fix)
        cuda = torch.version.cuda
        why = "a CPU build" if cuda is None else f"built for CUDA {cuda}"
        return Finding(
            "GPU", "bad", f"the driver shows {len(driver_gpus)}, PyTorch none ({why})",
            "install a CUDA build of PyTorch that this driver can run (nvidia-smi names its CUDA)",
        )  # fmt: skip
    try:
        value = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        is_right = float((value @ value).sum()) == 64.0**3
    except RuntimeError as error:
        fix = "end what else holds the GPU, or restart its node"
        return Finding("GPU", "bad", one_line(error, 160), fix)
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = ", ".join(f"{device.name} {format_bytes(device.total_memory)}" for device in devices)
    problem = "" if is_right else "a bfloat16 product is wrong"
    return make_finding("GPU", names, problem, "have the GPU checked: its results are wrong")


def _driver_gpus() -> list[str]:
    return (_command_output("nvidia-smi", "--list-gpus") or "").splitlines()


def _command_output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hub_finding() -> Finding:
    """Whether there is a token for gated weights; it is never shown, sent or tried."""
    for name in _TOKEN_NAMES:
        if os.environ.get(name, "").strip():
            return Finding("hub token", "ok", f"found in {name} (not shown)")
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    problem = "none"
    with suppress(OSError):
        problem = "" if path.read_text().strip() else "none"
    return make_finding(
        "hub token", f"found in {path} (not shown)", problem,
        "gated weights (H0-mini) need one: set HF_TOKEN, or run `pipeline weights fetch` where one "
        "is and use --weights FILE", "warning",
    )  # fmt: skip


def batch_finding() -> Finding:
    """Whether SLURM answers, for `--cluster` and `pipeline batch`."""
    if shutil.which("sbatch") is None:
        fix = "needed for --cluster and `pipeline batch` alone; or run this on a login node"
        return Finding("SLURM", "warning", "no sbatch on this machine", fix)
    is_up = " UP" in (_command_output("scontrol", "ping") or "")
    return make_finding(
        "SLURM", _command_output("sbatch", "--version") or "answers",
        "" if is_up else "sbatch is here, its controller does not answer",
        "ask who keeps the cluster; SLURM_CONF may be needed", "warning",
    )  # fmt: skip
