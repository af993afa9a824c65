"""Patch tokens in eight bits: one float16 scale a token, the largest magnitude in it."""

import numpy as np
import numpy.typing as npt

_LEVELS = 127.0

Int8 = npt.NDArray[np.int8]
Half = npt.NDArray[np.float16]


def quantise_tokens(tokens: npt.NDArray[np.floating]) -> tuple[Int8, Half]:
    """int8 [..., d] and the scale float16 [...]: value = int8 * scale / 127.

    The scale is the token's largest magnitude, rounded up to float16 so that nothing is clipped;
    a token of zeros has scale 0. Magnitudes above float16's largest (65,504) are refused.
    """
    values = np.asarray(tokens, np.float32)
    largest = np.abs(values).max(-1)
    if not np.isfinite(largest).all() or (largest > np.finfo(np.float16).max).any():
        raise ValueError("tokens contain values that are not finite or exceed float16's range")
    scale = largest.astype(np.float16)
    scale = np.where(
        scale.astype(np.float32) < largest, np.nextafter(scale, np.float16(np.inf)), scale
    )
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    return np.rint(values * (_LEVELS / divisor)[..., None]).astype(np.int8), scale


def dequantise_tokens(values: Int8, scale: Half) -> Half:
    """float16 [..., d] of int8 values and their scales."""
    step = scale.astype(np.float32) / np.float32(_LEVELS)
    return (values * step[..., None]).astype(np.float16)
