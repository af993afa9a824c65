"""RGB images as bytes and as network inputs.

Source: REPA-E (Leng et al., arXiv 2504.10483) scales by 127.5 and generates by truncation.
"""

import numpy as np
import torch
from torch import Tensor


def as_uint8_nchw(images: Tensor | np.ndarray) -> Tensor:
    """View uint8 RGB images [N, H, W, 3] or [N, 3, H, W] as a tensor [N, 3, H, W].

    Raises `ValueError` for another dtype or shape.
    """
    if isinstance(images, np.ndarray):
        # torch warns about memory it cannot protect from writing; a read-only view is copied
        images = torch.from_numpy(images if images.flags.writeable else images.copy())
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {images.dtype}")
    if images.ndim == 4 and images.shape[3] == 3:
        return images.permute(0, 3, 1, 2)
    if images.ndim == 4 and images.shape[1] == 3:
        return images
    raise ValueError(f"expected [N, H, W, 3] or [N, 3, H, W] images, got {list(images.shape)}")


def from_uint8(images: Tensor | np.ndarray) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1], float32, of uint8 [N, H, W, 3] or [N, 3, H, W]."""
    return as_uint8_nchw(images).float() / 127.5 - 1


def to_uint8(images: Tensor, *, legacy_truncate: bool = False) -> Tensor:
    """RGB images uint8 [N, H, W, 3] of images [N, 3, H, W] in about [-1, 1].

    Values are clamped and rounded; `legacy_truncate` cuts the fraction off instead, which is
    half a grey level darker, as the reference code's images are.
    """
    grey = ((images.float() + 1) * 127.5).clamp(0, 255)
    whole = grey if legacy_truncate else grey.round()
    return whole.to(torch.uint8).permute(0, 2, 3, 1)
