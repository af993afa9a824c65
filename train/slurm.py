"""A task of `srun --ntasks=N python -m train` as one of N processes, without torchrun."""

import re
from collections.abc import Mapping

_FIRST_OF_BRACKET = re.compile(r"\[([^\],-]+)[^\]]*\]")


def slurm_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for this task of a SLURM step; {} where there is nothing to derive.

    That is: under torchrun (which sets WORLD_SIZE), outside a step (a batch script that starts
    one process, whatever its job's --ntasks), and in a step of one task.
    """
    size = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environ or "SLURM_STEP_ID" not in environ or size == "1":
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    step = int(environ["SLURM_JOB_ID"]) + 97 * int(environ["SLURM_STEP_ID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": environ.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + step % 20000)),
    }


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu03` of `gpu[03-05,09],cpu1`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return _FIRST_OF_BRACKET.sub(r"\1", first)
