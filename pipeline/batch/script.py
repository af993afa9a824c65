"""A shipped batch script with what a cluster file says of the jobs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.run.cluster import load_cluster, read_cluster_file

_PREFIX = "#SBATCH "
_OPTIONS = {
    "queue": "--partition", "account": "--account", "cores": "--cpus-per-task",
    "memory": "--mem", "walltime": "--time",
}  # fmt: skip
_FOR_ALL_SCRIPTS = ("account", "prologue")
"""Keys that count for every script: a queue that suits tiling does not suit training."""


def adapt_script(script: str, name: str, path: Path) -> str:
    """The script with the file's keys in place of its own `#SBATCH` lines.

    For `tile` all keys of the file count, for the others those under `stages: NAME` and the
    account and prologue. Raises `UserError` naming file and key.
    """
    load_cluster(path, name)  # checks every key
    shared, own = read_cluster_file(path, name)
    if name != "tile":
        shared = {key: value for key, value in shared.items() if key in _FOR_ALL_SCRIPTS}
    return replace_directives(script, {**shared, **own})


def replace_directives(script: str, values: Mapping[str, Any]) -> str:
    """Replace options that the script has, add the others, and put the prologue after them."""
    wanted = [f"{_OPTIONS[key]}={value}" for key, value in values.items()
              if key in _OPTIONS and value != ""]  # fmt: skip
    wanted += list(values.get("directives", ()))
    # dask-jobqueue writes 16GB, SLURM 16G.
    wanted = [text.replace("GB", "G").replace("MB", "M") if text.startswith("--mem=") else text
              for text in wanted]  # fmt: skip
    replaced = {_option_of(text) for text in wanted}
    if "--mem" in replaced:
        replaced |= {"--mem-per-cpu"}
    if any(name == "-G" or name.startswith("--gpus") for name in replaced):
        replaced |= {"--gres"}  # SLURM would obey both ways to request GPUs
    lines = [
        line
        for line in script.splitlines()
        if not (line.startswith(_PREFIX) and _option_of(line.removeprefix(_PREFIX)) in replaced)
    ]
    last = max(number for number, line in enumerate(lines) if line.startswith(_PREFIX))
    added = [f"{_PREFIX}{text}" for text in wanted] + list(values.get("prologue", ()))
    return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :]]) + "\n"


def _option_of(directive: str) -> str:
    """`--gres` of `--gres=gpu:8`, `-p` of `-p gpu`."""
    return directive.split("=")[0].split()[0]
