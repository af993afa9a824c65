"""The machine: versions, cores, memory, GPU, batch system, the hub's token."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from common.text import format_bytes
from pipeline.upkeep.doctor.finding import Finding, judged

_PYTHON = (3, 11)
_BYTES_A_WORKER = 1 << 30
_OPEN_FILES = 4096
_TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ASK_SECONDS = 20.0


def version_findings() -> list[Finding]:
    """Python, and every package that this project's metadata asks for."""
    found = [
        judged(
            "python", platform.python_version(),
            "" if sys.version_info >= _PYTHON else f"{platform.python_version()} is too old",
            "make setup PYTHON=python3.12",
        )
    ]  # fmt: skip
    try:
        wanted = [Requirement(text) for text in metadata.requires("histogen") or ()]
    except metadata.PackageNotFoundError:
        mend = "make setup (or pip install --editable .)"
        return [*found, Finding("packages", "bad", "histogen is not installed here", mend)]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    problems = [text for one in needed if (text := requirement_problem(one))]
    fits = f"histogen {metadata.version('histogen')}; {len(needed)} required packages fit"
    mend = "make setup (or pip install --constraint constraints.txt --editable .)"
    return [*found, judged("packages", fits, "; ".join(problems), mend)]


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
    short = memory < cores * _BYTES_A_WORKER
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        judged(
            "cores and memory", f"{cores} cores, {format_bytes(memory)}",
            f"{format_bytes(memory)} for {cores} workers of up to 1 GiB" if short else "",
            f"--workers {max(1, memory // _BYTES_A_WORKER)}", "warning",
        ),
        judged(
            "open files", f"up to {files:,}",
            f"only {files:,} at a time" if files < _OPEN_FILES else "",
            f"ulimit -n {_OPEN_FILES}", "warning",
        ),
    ]  # fmt: skip


def _memory_bytes() -> int:
    """What this process may use: the machine's memory, or less where a control group says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return total


def gpu_finding() -> Finding:
    """Whether PyTorch sees the GPUs that the driver shows, and can use the first."""
    import torch

    shown = _driver_gpus()
    if not torch.cuda.is_available():
        if not shown:
            mend = "cache, train and generate there take --device cpu or another node"
            return Finding("GPU", "warning", "none, by driver or PyTorch", mend)
        why = (
            "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        )
        return Finding(
            "GPU", "bad", f"the driver shows {len(shown)}, PyTorch none ({why})",
            "install a CUDA build of PyTorch that this driver can run (nvidia-smi names its CUDA)",
        )  # fmt: skip
    try:
        value = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        worked = float((value @ value).sum()) == 64.0**3
    except RuntimeError as error:
        text = " ".join(str(error).split())[:160]
        return Finding("GPU", "bad", text, "end what else holds the GPU, or restart its node")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(f"{one.name} {format_bytes(one.total_memory)}" for one in names)
    problem = "" if worked else "a bfloat16 product is wrong"
    return judged("GPU", found, problem, "have the GPU checked: its results cannot be trusted")


def _driver_gpus() -> list[str]:
    said = _said("nvidia-smi", "--list-gpus")
    return said.splitlines() if said else []


def _said(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hub_finding() -> Finding:
    """Whether a token for gated weights is at hand; it is never shown, sent or tried."""
    for name in _TOKEN_NAMES:
        if os.environ.get(name, "").strip():
            return Finding("hub token", "ok", f"in {name}")
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    try:
        held = bool(path.read_text().strip())
    except OSError:
        held = False
    return judged(
        "hub token", f"in {path}", "" if held else "none",
        "gated weights (H0-mini) need one: set HF_TOKEN, or run `pipeline weights fetch` where one "
        "is and use --weights FILE", "warning",
    )  # fmt: skip


def batch_finding() -> Finding:
    """Whether SLURM answers, for `--cluster` and `pipeline batch`."""
    if shutil.which("sbatch") is None:
        mend = "needed for --cluster and `pipeline batch` alone; or run this on a login node"
        return Finding("SLURM", "warning", "no sbatch on this machine", mend)
    said = _said("scontrol", "ping")
    problem = "" if said and " UP" in said else "sbatch is here, its controller does not answer"
    mend = "ask who keeps the cluster; SLURM_CONF may be needed"
    return judged("SLURM", _said("sbatch", "--version") or "answers", problem, mend, "warning")
