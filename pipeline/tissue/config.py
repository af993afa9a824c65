"""The configuration of `tissue`."""

from dataclasses import dataclass

from common.options import option_field
from pipeline.options import MAX_ARTIFACT, MIN_TISSUE
from pipeline.slides.config import IN_PLACE, StageIn


@dataclass(frozen=True)
class TissueConfig:
    """Which tiles become candidates (shares from 0 to 1), and the detector that finds tissue.

    `detector` is `classical` or `onnx:FILE` (see `pipeline.tissue.learned`).
    """

    min_tissue: float = option_field(0.5, MIN_TISSUE)
    max_artifact: float = option_field(0.1, MAX_ARTIFACT)
    detector: str = option_field(
        "classical",
        "classical, which needs no weights, or onnx:FILE with a JSON file next to it",
        metavar="NAME",
    )
    stage_in: StageIn = IN_PLACE

    def identity(self) -> dict[str, object]:
        """The values that every run on a dataset must share; shares are from 0 to 1."""
        from pipeline.tissue.detector import open_detector
        from pipeline.tissue.stage import detector_identity

        return {
            **detector_identity(open_detector(self.detector)),
            "min_tissue": self.min_tissue,
            "max_artifact": self.max_artifact,
        }
