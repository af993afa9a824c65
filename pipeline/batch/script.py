"""A shipped batch script with what a cluster file says of the jobs."""

from pathlib import Path
from typing import Any

from pipeline.run.cluster import load_cluster, stated

_MARK = "#SBATCH "
_OPTIONS = {
    "queue": "--partition", "account": "--account", "cores": "--cpus-per-task",
    "memory": "--mem", "walltime": "--time",
}  # fmt: skip
_EVERYWHERE = ("account", "prologue")
"""Keys that hold for every script: a queue that tiling wants is not what training wants."""
_FOR_SLIDES = ("tile",)


def for_cluster(script: str, name: str, path: Path) -> str:
    """The script with the file's keys in place of its own `#SBATCH` lines.

    For `tile` all keys of the file count, for the others those under `stages: NAME` and the
    account and prologue. Raises `UserError` naming file and key.
    """
    load_cluster(path, name)
    shared, own = stated(path, name)
    if name not in _FOR_SLIDES:
        shared = {key: value for key, value in shared.items() if key in _EVERYWHERE}
    return with_directives(script, {**shared, **own})


def with_directives(script: str, values: dict[str, Any]) -> str:
    """Replace options that stand in the script, add the others, and put the prologue before all."""
    wanted = [f"{_OPTIONS[key]}={value}" for key, value in values.items()
              if key in _OPTIONS and value != ""]  # fmt: skip
    wanted += list(values.get("directives", ()))
    if any(text.startswith("--mem=") for text in wanted):
        wanted = [text.replace("GB", "G").replace("MB", "M") if text.startswith("--mem=") else text
                  for text in wanted]  # fmt: skip
    replaced = {_name(text) for text in wanted}
    if "--mem" in replaced:
        replaced |= {"--mem-per-cpu"}
    if any(name == "-G" or name.startswith("--gpus") for name in replaced):
        replaced |= {"--gres"}  # two ways to ask for GPUs would be both obeyed
    lines = [
        line
        for line in script.splitlines()
        if not (line.startswith(_MARK) and _name(line.removeprefix(_MARK)) in replaced)
    ]
    last = max(number for number, line in enumerate(lines) if line.startswith(_MARK))
    added = [f"{_MARK}{text}" for text in wanted] + list(values.get("prologue", ()))
    return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :]]) + "\n"


def _name(directive: str) -> str:
    """`--gres` of `--gres=gpu:8`, `-p` of `-p gpu`."""
    return directive.split("=")[0].split()[0]
