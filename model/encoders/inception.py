"""InceptionV3 up to its last pooling, in the two forms that published weights were trained as.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv
1512.00567); parameter names are torchvision's. The FID network (TensorFlow's inception-2015-12-05,
as pytorch-fid and torch-fidelity converted it) departs from torchvision's in what its pooling
branches do: averages leave the padding out, and the last block takes maxima.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Variant = Literal["fid", "torchvision"]

POOL3_DIM = 2048

# A convolution is WIDTH@HEIGHTxWIDTH, with /2 for stride 2 (then without padding; else "same");
# `a|b` are two convolutions of the same input, side by side. A branch's convolutions are named
# branchNAME_1, _2 ..., or branchNAME where there is one; `a|b` are numbered 2a and 2b.
_Branches = Sequence[tuple[str, str]]


def _block_a() -> _Branches:
    return (
        ("1x1", "64@1x1"),
        ("5x5", "48@1x1 64@5x5"),
        ("3x3dbl", "64@1x1 96@3x3 96@3x3"),
    )


def _block_c(width: int) -> _Branches:
    w = width
    return (
        ("1x1", "192@1x1"),
        ("7x7", f"{w}@1x1 {w}@1x7 192@7x1"),
        ("7x7dbl", f"{w}@1x1 {w}@7x1 {w}@1x7 {w}@7x1 192@1x7"),
    )


def _block_e() -> _Branches:
    return (
        ("1x1", "320@1x1"),
        ("3x3", "384@1x1 384@1x3|384@3x1"),
        ("3x3dbl", "448@1x1 384@3x3 384@1x3|384@3x1"),
    )


_BLOCK_B: _Branches = (("3x3", "384@3x3/2"), ("3x3dbl", "64@1x1 96@3x3 96@3x3/2"))
_BLOCK_D: _Branches = (
    ("3x3", "192@1x1 320@3x3/2"),
    ("7x7x3", "192@1x1 192@1x7 192@7x1 192@3x3/2"),
)

_max_shrinking = partial(F.max_pool2d, kernel_size=3, stride=2)
_max_same = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_mean_with_padding = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)
_mean_without_padding = partial(_mean_with_padding, count_include_pad=False)


class _Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, width_in: int, width: int, kernel: tuple[int, int], stride: int, padding: str | int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        # keeps the signal's size through 94 layers; only seeded random networks see it
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to [B, width_in, H, W]."""
        return F.relu(self.bn(self.conv(x)))


def _build_convolution(width_in: int, text: str) -> _Convolution:
    size, _, stride = text.partition("/")
    width, _, kernel = size.partition("@")
    height, _, breadth = kernel.partition("x")
    shrinks = stride == "2"
    return _Convolution(
        width_in, int(width), (int(height), int(breadth)), 2 if shrinks else 1,
        padding=0 if shrinks else "same",
    )  # fmt: skip


class _Block(nn.Module):
    """Branches over one input, concatenated; the pooling branch comes last.

    `pooled_width` is the width of the 1x1 convolution after the pooling, 0 for none.
    """

    def __init__(
        self, width_in: int, branches: _Branches, pool: partial[Tensor], pooled_width: int
    ) -> None:
        super().__init__()
        self._branches: list[list[list[str]]] = []
        self.width = pooled_width or width_in
        for name, text in branches:
            self.width += self._add_branch(name, text.split(), width_in)
        self._pool = pool
        if pooled_width:
            self.branch_pool = _build_convolution(width_in, f"{pooled_width}@1x1")
        self._has_pooled = bool(pooled_width)

    def _add_branch(self, name: str, steps: list[str], width_in: int) -> int:
        """Add a branch's convolutions; returns its width."""
        names: list[list[str]] = []
        for number, step in enumerate(steps, 1):
            sides = step.split("|")
            suffix = "" if len(steps) == 1 else f"_{number}"
            keys = [f"branch{name}{suffix}{'ab'[i] if len(sides) > 1 else ''}" for i in (0, 1)]
            names.append(keys[: len(sides)])
            modules = [_build_convolution(width_in, side) for side in sides]
            for key, module in zip(names[-1], modules, strict=True):
                self.add_module(key, module)
            width_in = sum(module.conv.out_channels for module in modules)
        self._branches.append(names)
        return width_in

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to [B, width_in, H, W]; returns [B, width, H', W']."""
        results = []
        for steps in self._branches:
            y = x
            for sides in steps:
                y = torch.cat([self.get_submodule(key)(y) for key in sides], dim=1)
            results.append(y)
        pooled = self._pool(x)
        results.append(self.branch_pool(pooled) if self._has_pooled else pooled)
        return torch.cat(results, dim=1)


class InceptionV3(nn.Module):
    """InceptionV3 from pixels to pool3: [B, 3, 299, 299] to [B, 2048].

    `variant` is "fid", the network FID is defined with, or "torchvision", ImageNet's: their
    features are not comparable. Neither has the classifier.
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        mean = _mean_without_padding if variant == "fid" else _mean_with_padding
        last = _max_same if variant == "fid" else _mean_with_padding
        self.Conv2d_1a_3x3 = _build_convolution(3, "32@3x3/2")
        self.Conv2d_2a_3x3 = _Convolution(32, 32, (3, 3), 1, padding=0)
        self.Conv2d_2b_3x3 = _build_convolution(32, "64@3x3")
        self.Conv2d_3b_1x1 = _build_convolution(64, "80@1x1")
        self.Conv2d_4a_3x3 = _Convolution(80, 192, (3, 3), 1, padding=0)
        width = 192
        # Name, branches, pooling, and the width of the convolution after it (0: none).
        for name, branches, pool, pooled_width in (
            ("5b", _block_a(), mean, 32),
            ("5c", _block_a(), mean, 64),
            ("5d", _block_a(), mean, 64),
            ("6a", _BLOCK_B, _max_shrinking, 0),
            ("6b", _block_c(128), mean, 192),
            ("6c", _block_c(160), mean, 192),
            ("6d", _block_c(160), mean, 192),
            ("6e", _block_c(192), mean, 192),
            ("7a", _BLOCK_D, _max_shrinking, 0),
            ("7b", _block_e(), mean, 192),
            ("7c", _block_e(), last, 192),
        ):
            block = _Block(width, branches, pool, pooled_width)
            self.add_module(f"Mixed_{name}", block)
            width = block.width

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to images [B, 3, H, W] in about [-1, 1], sides of 75 px or more."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_shrinking(x)))
        x = _max_shrinking(x)
        for name, block in self.named_children():
            if name.startswith("Mixed_"):
                x = block(x)
        return x.mean(dim=(2, 3))
