"""The detectors by name: `classical`, the default, and `onnx:FILE`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.tissue.classes import TissueClass
from pipeline.tissue.detect import Detection, DetectorConfig, detect_tissue
from pipeline.tissue.focus import FocusConfig


class Detector(Protocol):
    """What makes a mask uint8 [h, w] of an overview; `experimental` classes refuse no tile."""

    experimental: ClassVar[frozenset[TissueClass]]

    @property
    def um_per_px(self) -> float:
        """Resolution of the overview that `detect` wants, in µm per px."""

    def identity(self) -> dict[str, object]:
        """What makes its masks: another value is another dataset."""

    def detect(self, rgb: npt.NDArray[np.uint8], um_per_px: float) -> Detection:
        """Classify an overview uint8 [h, w, 3] at `um_per_px`; the mask has its size."""


@dataclass(frozen=True)
class ClassicalDetector:
    """Optical density and colour, no weights; focus is judged on the slide at about 1 µm per px."""

    experimental: ClassVar[frozenset[TissueClass]] = frozenset({TissueClass.FOLD})
    config: DetectorConfig = field(default_factory=DetectorConfig)
    focus: FocusConfig = field(default_factory=FocusConfig)

    @property
    def um_per_px(self) -> float:
        """Resolution of the overview that `detect` wants, in µm per px."""
        return self.config.um_per_px

    def identity(self) -> dict[str, object]:
        """Name and thresholds."""
        return {**self.config.as_dict(), "focus": asdict(self.focus)}

    def detect(self, rgb: npt.NDArray[np.uint8], um_per_px: float) -> Detection:
        """See `detect_tissue`: of an overview uint8 [h, w, 3]."""
        return detect_tissue(rgb, um_per_px, self.config)


def detector_name(text: str) -> str:
    """The name as the user gave it, its file made absolute: workers run in other folders."""
    kind, _, path = text.partition(":")
    if text == "classical":
        return text
    if kind == "onnx" and path:
        return f"onnx:{Path(path).absolute()}"
    raise UserError(f"--detector {text}: expected 'classical' or 'onnx:FILE'")


def open_detector(name: str) -> Detector:
    """The detector of that name: `classical` or `onnx:FILE`."""
    _, _, path = detector_name(name).partition(":")
    if not path:
        return ClassicalDetector()
    from pipeline.tissue.learned import OnnxDetector

    return OnnxDetector(Path(path))
