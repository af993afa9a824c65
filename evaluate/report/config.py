"""What `report` shows, and where: its fields are the command's options."""

from dataclasses import dataclass, field
from pathlib import Path

from common.options import option_metadata


@dataclass(frozen=True)
class ReportConfig:
    """Results, the training run and the datasets they belong to, and the files to write."""

    results: Path = field(metadata=option_metadata("results.json of measure or of a protocol"))
    run_dir: Path | None = field(
        default=None, metadata=option_metadata("training run", flag="--run", metavar="RUN")
    )
    dataset: Path | None = field(
        default=None,
        metadata=option_metadata("real dataset (for results of measure)", metavar="DATASET"),
    )
    generated: Path | None = field(
        default=None,
        metadata=option_metadata("synthetic dataset (for results of measure)", metavar="SYN"),
    )
    out: Path = field(default=Path("report.html"), metadata=option_metadata("page to write"))
    picture: Path | None = field(
        default=None, metadata=option_metadata("small picture to write as well", metavar="FILE.png")
    )
