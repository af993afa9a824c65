"""The named resize kernels against the code whose results they stand for."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model.encoders.kernels import KERNELS, resize_tiles

SLIDE = Path(__file__).parents[1] / "data/slides/CMU-1-Small-Region.svs"
SIZES = [(224, 299), (256, 299), (224, 448), (512, 299)]


def tile(px: int) -> np.ndarray:
    with openslide.OpenSlide(str(SLIDE)) as slide:
        return np.asarray(slide.read_region((900, 450), 0, (px, px)).convert("RGB"))


def grey(px: int) -> torch.Tensor:
    return torch.from_numpy(tile(px).copy()).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize(("px_in", "px_out"), SIZES)
def test_torch_bilinear_is_interpolate(px_in: int, px_out: int) -> None:
    exact = grey(px_in).double()
    want = F.interpolate(exact, (px_out, px_out), mode="bilinear", align_corners=False).float()
    got = resize_tiles(grey(px_in), px_out, "torch_bilinear")
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("px_in", "px_out"), SIZES)
def test_tf1_bilinear_is_its_definition(px_in: int, px_out: int) -> None:
    """Output row i samples source row i · in / out, without a half-pixel shift."""
    image = tile(px_in).astype(np.float64)
    position = np.arange(px_out) * px_in / px_out
    low = np.floor(position).astype(int)
    high, share = np.minimum(low + 1, px_in - 1), position - low
    rows = image[low] * (1 - share)[:, None, None] + image[high] * share[:, None, None]
    want = rows[:, low] * (1 - share)[:, None] + rows[:, high] * share[:, None]
    got = resize_tiles(grey(px_in), px_out, "tf1_bilinear")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize(("px_in", "px_out"), SIZES)
def test_pil_bicubic_clean_is_pil_on_floats(px_in: int, px_out: int) -> None:
    channels = [Image.fromarray(tile(px_in)[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((px_out, px_out), Image.Resampling.BICUBIC)) for c in channels]
    want = np.clip(np.stack(resized), 0, 255)
    got = resize_tiles(grey(px_in), px_out, "pil_bicubic_clean")[0].numpy()
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize(("px_in", "px_out"), SIZES)
def test_pil_bicubic_is_pil_on_bytes(px_in: int, px_out: int) -> None:
    """PIL's weights are fixed-point: a tie may fall to the other side, never further."""
    image = Image.fromarray(tile(px_in)).resize((px_out, px_out), Image.Resampling.BICUBIC)
    got = resize_tiles(grey(px_in), px_out, "pil_bicubic")[0].permute(1, 2, 0).numpy()
    difference = np.abs(got - np.asarray(image, np.float32))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999


def test_the_kernels_are_not_each_other() -> None:
    results = {name: resize_tiles(grey(224), 299, name) for name in KERNELS}
    names = list(results)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (results[one] - results[other]).abs().mean() > 0.1
    assert torch.equal(resize_tiles(grey(224), 224, "pil_bicubic"), grey(224))
