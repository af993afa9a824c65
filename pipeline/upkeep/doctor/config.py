"""What `doctor` is asked for."""

from dataclasses import dataclass, field
from pathlib import Path

from common.options import option


@dataclass(frozen=True)
class DoctorConfig:
    """What to check in addition to the machine: a dataset's folder, a slide; how much to write."""

    dataset: Path | None = field(
        default=None,
        metadata=option(
            "a dataset, or where one will be: its file system is checked (under `srun`: from every "
            "task)",
            metavar="DIR",
        ),
    )
    slide: Path | None = field(
        default=None, metadata=option("try the readers on this slide", metavar="FILE")
    )
    size: float = field(
        default=256.0, metadata=option("megabytes written to measure the disk", metavar="MB")
    )
