"""The configuration of `doctor`."""

from dataclasses import dataclass
from pathlib import Path

from common.options import option_field


@dataclass(frozen=True)
class DoctorConfig:
    """What to check in addition to the machine: a dataset's folder, a slide; how much to write."""

    dataset: Path | None = option_field(
        None,
        "a dataset, or where one will be: its file system is checked (under `srun`: from every "
        "task)",
        metavar="DIR",
    )
    slide: Path | None = option_field(None, "try the readers on this slide", metavar="FILE")
    size: float = option_field(256.0, "megabytes written to measure the disk", metavar="MB")
