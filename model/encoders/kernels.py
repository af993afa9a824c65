"""Kernels that resize tiles to an encoder's input, each named after what its users ran.

Every kernel is linear and separable, so a resize is M X Mᵀ with one matrix per axis; kernels
differ by metric-changing amounts (of 224 px tiles at 299 px about 1 grey level on average), so
none is ever chosen silently.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from model.encoders.resize import antialias_bicubic_matrix

KernelName = Literal["torch_bilinear", "tf1_bilinear", "pil_bicubic_clean", "pil_bicubic"]


@dataclass(frozen=True)
class Kernel:
    """A resize: `matrix(size_in, size_out)` [size_out, size_in] float64 for one axis.

    `after_pass` is applied after the horizontal and after the vertical pass, `after_both` at
    the end; both take grey levels.
    """

    matrix: Callable[[int, int], Tensor]
    after_pass: Callable[[Tensor], Tensor] | None = None
    after_both: Callable[[Tensor], Tensor] | None = None


def torch_bilinear_matrix(size_in: int, size_out: int) -> Tensor:
    """`F.interpolate(mode="bilinear", align_corners=False)` in 1-D: half-pixel centres."""
    centres = (torch.arange(size_out, dtype=torch.float64) + 0.5) * (size_in / size_out) - 0.5
    return _linear_matrix(centres.clamp(min=0), size_in)


def tf1_bilinear_matrix(size_in: int, size_out: int) -> Tensor:
    """TensorFlow 1's `resize_bilinear(align_corners=False)` in 1-D: no half-pixel shift."""
    return _linear_matrix(
        torch.arange(size_out, dtype=torch.float64) * (size_in / size_out), size_in
    )


def _linear_matrix(sources: Tensor, size_in: int) -> Tensor:
    """Linear interpolation at the given source positions, edges repeated."""
    lower = sources.floor().long()
    upper = (lower + 1).clamp(max=size_in - 1)
    share = sources - lower
    rows = torch.arange(len(sources))
    matrix = torch.zeros(len(sources), size_in, dtype=torch.float64)
    matrix.index_put_((rows, lower), 1 - share, accumulate=True)
    matrix.index_put_((rows, upper), share, accumulate=True)
    return matrix


def _to_grey_range(grey: Tensor) -> Tensor:
    return grey.clamp(0, 255)


def _to_grey_levels(grey: Tensor) -> Tensor:
    return torch.floor(grey + 0.5).clamp(0, 255)


KERNELS: Mapping[KernelName, Kernel] = MappingProxyType(
    {
        # pytorch-fid and what follows it
        "torch_bilinear": Kernel(torch_bilinear_matrix),
        # torch-fidelity, torchmetrics, the first FID
        "tf1_bilinear": Kernel(tf1_bilinear_matrix),
        # clean-fid: PIL bicubic on float images, clipped, not rounded
        "pil_bicubic_clean": Kernel(antialias_bicubic_matrix, after_both=_to_grey_range),
        # PIL and torchvision on 8-bit images: rounded after each pass
        "pil_bicubic": Kernel(antialias_bicubic_matrix, after_pass=_to_grey_levels),
    }
)


def resize_tiles(grey: Tensor, px: int, kernel: KernelName) -> Tensor:
    """Resize float32 tiles [B, 3, H, W] in grey levels 0 to 255 to [B, 3, px, px]."""
    height, width = grey.shape[2:]
    if (height, width) == (px, px):
        return grey
    # Horizontal first, as PIL does: the rounding in between makes the order matter.
    one = KERNELS[kernel]
    wide = grey @ _matrix(kernel, width, px, grey.device).T
    if one.after_pass is not None:
        wide = one.after_pass(wide)
    resized = _matrix(kernel, height, px, grey.device) @ wide
    for finish in (one.after_pass, one.after_both):
        resized = resized if finish is None else finish(resized)
    return resized


@lru_cache
def _matrix(kernel: KernelName, size_in: int, size_out: int, device: torch.device) -> Tensor:
    if not math.isfinite(size_in / size_out) or size_in < 2:
        raise ValueError(f"cannot resize {size_in} px to {size_out} px")
    return KERNELS[kernel].matrix(size_in, size_out).float().to(device)
