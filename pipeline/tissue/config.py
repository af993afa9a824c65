"""What `tissue` is asked for."""

from dataclasses import dataclass, field
from typing import Any

from common.options import option
from pipeline.options import MAX_ARTIFACT, MIN_TISSUE
from pipeline.slides.config import IN_PLACE, StageIn


@dataclass(frozen=True)
class TissueConfig:
    """Which tiles become candidates (shares from 0 to 1), and the detector that finds tissue.

    `detector` is `classical` or `onnx:FILE` (see `pipeline.tissue.learned`).
    """

    min_tissue: float = field(default=0.5, metadata=MIN_TISSUE)
    max_artifact: float = field(default=0.1, metadata=MAX_ARTIFACT)
    detector: str = field(
        default="classical",
        metadata=option(
            "classical, which needs no weights, or onnx:FILE with a JSON file next to it",
            metavar="NAME",
        ),
    )
    stage_in: StageIn = IN_PLACE

    def identity(self) -> dict[str, Any]:
        """The values that make it this dataset and no other."""
        from pipeline.tissue.detector import open_detector
        from pipeline.tissue.stage import detector_identity

        return {
            **detector_identity(open_detector(self.detector)),
            "min_tissue": self.min_tissue,
            "max_artifact": self.max_artifact,
        }
