"""The classes of a tissue mask."""

from enum import IntEnum


class TissueClass(IntEnum):
    """Pixel values of a tissue mask uint8 [h, w]."""

    BACKGROUND = 0
    TISSUE = 1
    PEN = 2
    OUT_OF_FOCUS = 3
    FOLD = 4
    OTHER = 5


CLASS_NAMES = {
    TissueClass.BACKGROUND: "background",
    TissueClass.TISSUE: "tissue",
    TissueClass.PEN: "pen",
    TissueClass.OUT_OF_FOCUS: "out of focus",
    TissueClass.FOLD: "fold",
    TissueClass.OTHER: "other artifact",
}
