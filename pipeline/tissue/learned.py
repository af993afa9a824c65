"""A segmentation network as tissue detector: an ONNX file with a small JSON file next to it.

`model.onnx` takes float32 [1, 3, h, w] and gives class scores [1, classes, h', w'] for the same
field; `model.json` says at which resolution it wants to see the slide, how colours are
normalised and which class of a tissue mask each channel is:

    {"um_per_px": 8.0, "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2],
     "classes": ["background", "tissue", "pen"], "window_px": 512, "margin_px": 32}

Colours are divided by 255, then `mean` is taken off and the rest divided by `std`. The slide is
seen in windows of `window_px` (default 512) of which the outer `margin_px` (default 32) are
discarded, so that memory does not grow with the slide.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.files import read_regular
from common.json_text import read_json
from common.text import find_nearest
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.detect import Detection
from pipeline.tissue.glass import glass_level

_KEYS = ("um_per_px", "mean", "std", "classes", "window_px", "margin_px")


class DetectorFileError(UserError):
    """The network, its JSON or the library that runs it is missing or does not fit."""


@dataclass(frozen=True)
class NetworkDescription:
    """What the JSON file of a network says; `classes[i]` is what channel i means.

    `mean` and `std` are of colours from 0 to 1; `window_px` and `margin_px` are in px.
    """

    um_per_px: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[TissueClass, ...]
    window_px: int = 512
    margin_px: int = 32

    def as_dict(self) -> dict[str, object]:
        """For the dataset's identity; resolution in µm per px."""
        return {**self.__dict__, "classes": [CLASS_NAMES[value] for value in self.classes]}


def read_description(path: Path) -> NetworkDescription:
    """The description in a JSON file; a `DetectorFileError` names file, key and what is wanted."""
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise DetectorFileError(
            f"{path} is missing: a network needs a JSON of its name with {', '.join(_KEYS[:4])}"
        ) from error
    except (OSError, ValueError) as error:
        raise DetectorFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DetectorFileError(f"{path}: expected an object with {', '.join(_KEYS[:4])}")
    for key in values.keys() - set(_KEYS):
        close = find_nearest(key, _KEYS)
        hint = f"; did you mean '{close}'?" if close else f"; known: {', '.join(_KEYS)}"
        raise DetectorFileError(f"{path}: unknown key '{key}'{hint}")
    description = NetworkDescription(
        um_per_px=_parse_number(path, values, "um_per_px", 0.2, 64),
        mean=_parse_triple(path, values, "mean"),
        std=_parse_triple(path, values, "std"),
        classes=_parse_classes(path, values.get("classes")),
        window_px=int(_parse_number(path, {"window_px": 512, **values}, "window_px", 16, 8192)),
        margin_px=int(_parse_number(path, {"margin_px": 32, **values}, "margin_px", 0, 4096)),
    )
    # Each value may be right and both together not.
    if 2 * description.margin_px >= description.window_px:
        raise DetectorFileError(
            f"{path}: margin_px {description.margin_px} leaves nothing of window_px "
            f"{description.window_px}; expected less than half of it"
        )
    if min(description.std) <= 0:
        raise DetectorFileError(f"{path}: std {list(description.std)}, expected numbers above 0")
    return description


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_number(
    path: Path, values: Mapping[str, object], key: str, low: float, high: float
) -> float:
    value = values.get(key)
    if not _is_number(value) or not low <= value <= high:
        raise DetectorFileError(f"{path}: {key} is {value!r}, expected a number of {low} to {high}")
    return float(value)


def _parse_triple(path: Path, values: Mapping[str, object], key: str) -> tuple[float, float, float]:
    value = values.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
        raise DetectorFileError(f"{path}: {key} is {value!r}, expected three numbers (R, G, B)")
    return (float(value[0]), float(value[1]), float(value[2]))


def _parse_classes(path: Path, names: object) -> tuple[TissueClass, ...]:
    known = {name: value for value, name in CLASS_NAMES.items()}
    if not isinstance(names, list) or not names or any(name not in known for name in names):
        raise DetectorFileError(
            f"{path}: classes is {names!r}, expected a list of channel names out of "
            f"{', '.join(known)}"
        )
    return tuple(known[name] for name in names)


_MOST_NETWORK_BYTES = 2 << 30
"""What ONNX allows a file."""


class OnnxDetector:
    """A learned detector, run by onnxruntime on the CPU, one thread: same input, same mask."""

    experimental: ClassVar[frozenset[TissueClass]] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = read_description(path.with_suffix(".json"))
        try:
            data = read_regular(path, _MOST_NETWORK_BYTES)
        except OSError as error:
            raise DetectorFileError(f"{path} cannot be read ({error.strerror})") from error
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.session = _open_session(path, data)
        self.input_name = self.session.get_inputs()[0].name

    @property
    def um_per_px(self) -> float:
        """Resolution of the overview that `detect` wants, in µm per px."""
        return self.description.um_per_px

    def identity(self) -> dict[str, object]:
        """What makes its masks: the network's bytes and its description."""
        return {"name": "onnx-1", "sha256": self.sha256, **self.description.as_dict()}

    def detect(self, rgb: npt.NDArray[np.uint8], um_per_px: float) -> Detection:
        """Classify an overview uint8 [h, w, 3]; the mask has its size."""
        # Resampled only where the scale is off by more than 2 %: resampling blurs.
        shape = rgb.shape[:2]
        scale = um_per_px / self.um_per_px
        if abs(scale - 1) > 0.02:
            size = (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale)))
            kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            overview = np.asarray(cv2.resize(rgb, size, interpolation=kind), np.uint8)
        else:
            overview = rgb
        height, width = overview.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        # White around the picture, so that windows may reach over its edge.
        window, margin = self.description.window_px, self.description.margin_px
        step = window - 2 * margin
        below, right = (-length % step + margin for length in (height, width))
        padded = np.pad(overview, ((margin, below), (margin, right), (0, 0)), constant_values=255)
        for top, left in product(range(0, height, step), range(0, width, step)):
            part = self._classify_window(padded[top : top + window, left : left + window])
            mask[top : top + step, left : left + step] = part[: height - top, : width - left]
        back = cv2.resize(mask, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST)
        return Detection(np.asarray(back, np.uint8), glass_level(rgb))

    def _classify_window(self, field: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Classes of the inner part of a window uint8 [window_px, window_px, 3]."""
        window, margin = self.description.window_px, self.description.margin_px
        scores = self._class_scores(field)
        # Networks often give their classes at a part of the input's resolution.
        if scores.shape[1:] != (window, window):
            scores = np.stack([cv2.resize(plane, (window, window)) for plane in scores])
        channel = scores[:, margin : window - margin, margin : window - margin].argmax(0)
        return np.asarray(np.array(self.description.classes, np.uint8)[channel])

    def _class_scores(self, field: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        mean, std = (np.array(v, np.float32) for v in (self.description.mean, self.description.std))
        planes = ((field.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
        try:
            scores = np.asarray(self.session.run(None, {self.input_name: planes})[0], np.float32)
        except Exception as error:  # onnxruntime's classes derive from several bases
            raise DetectorFileError(
                f"{self.path} cannot classify a field {list(planes.shape)}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        count = len(self.description.classes)
        if scores.ndim != 4 or scores.shape[:2] != (1, count):
            raise DetectorFileError(
                f"{self.path} gives {list(scores.shape)}, expected [1, {count}, h, w]: one "
                f"channel for each of the classes in {self.path.with_suffix('.json').name}"
            )
        return scores[0]


def _open_session(path: Path, data: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DetectorFileError(
            f"{path} needs onnxruntime, which is not installed: pip install 'histogen[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    # One thread: a worker per core runs already, and sums stay in one order.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DetectorFileError(
            f"{path} is not a network that onnxruntime opens: {str(error).splitlines()[0]}"
        ) from error
