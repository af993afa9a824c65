"""A learned detector: a small network, trained here, exported to ONNX, run by the stage."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import open_dataset, read_candidates, read_identity, read_journal
from pipeline.tissue.classes import TissueClass
from pipeline.tissue.detector import ClassicalDetector, detector_name, open_detector
from pipeline.tissue.learned import read_description

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs pip install 'histogen[onnx]'")

CLASSES = ["background", "tissue", "pen"]
SIDECAR = {
    "um_per_px": 8.0, "mean": [0.8, 0.7, 0.8], "std": [0.2, 0.2, 0.2], "classes": CLASSES,
    "window_px": 64, "margin_px": 8,
}  # fmt: skip


def network() -> torch.nn.Sequential:
    """Two 3 x 3 convolutions and a classifier of each pixel: 1,100 weights."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 12, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(12, len(CLASSES), 1),
    )  # fmt: skip


def export(trained: torch.nn.Sequential, path: Path, sidecar: dict | None = None) -> Path:
    """The network as an ONNX graph of Conv and Relu, with its JSON beside it."""
    nodes, weights, name = [], [], "rgb"
    for index, layer in enumerate(trained):
        output = "scores" if index == len(trained) - 1 else f"x{index}"
        if isinstance(layer, torch.nn.Conv2d):
            names = [f"weight{index}", f"bias{index}"]
            for tensor, key in zip((layer.weight, layer.bias), names, strict=True):
                weights.append(onnx.numpy_helper.from_array(tensor.detach().numpy(), key))
            pad = layer.padding[0]
            node = onnx.helper.make_node("Conv", [name, *names], [output], pads=[pad] * 4)
        else:
            node = onnx.helper.make_node("Relu", [name], [output])
        nodes.append(node)
        name = output
    shapes = (["rgb", 3], ["scores", trained[-1].out_channels])
    infos = [
        onnx.helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, [1, channels, "h", "w"])
        for key, channels in shapes
    ]
    graph = onnx.helper.make_graph(nodes, "tissue", infos[:1], infos[1:], weights)
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    path.with_suffix(".json").write_text(json.dumps(sidecar or SIDECAR))
    return path


def labelled_tile(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A tile at 8 µm per pixel, with labels that its name gives to all that is not glass.

    Of tiles that show tissue and pen the name does not say which pixel is which: they are
    labelled 255, not to be learned from.
    """
    image = Image.open(path).convert("RGBA")
    rgb = np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]
    small = cv2.resize(rgb, (64, 64), interpolation=cv2.INTER_AREA)
    stained = small.min(-1) < 225
    pen, tissue = "pen" in path.stem, "nuclei" in path.stem
    value = 255 if pen and tissue else TissueClass.PEN if pen else TissueClass.TISSUE
    labels = np.where(stained, value, TissueClass.BACKGROUND)
    if not pen and not tissue:
        labels[:] = TissueClass.BACKGROUND
    return small, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A network trained on the labelled tiles, exported."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "labelled_tiles"
    if not folder.is_dir():
        pytest.skip(f"development data is not at {folder}")
    tiles = [labelled_tile(path) for path in sorted(folder.glob("*.png"))]
    images = np.stack([image for image, _ in tiles]).astype(np.float32) / 255
    normalised = (images - SIDECAR["mean"]) / SIDECAR["std"]
    inputs = torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float32)
    targets = torch.tensor(np.stack([labels for _, labels in tiles]), dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = network()
    counts = torch.bincount(targets[targets < 255], minlength=len(CLASSES)).float()
    loss_of = torch.nn.CrossEntropyLoss(weight=counts.sum() / counts, ignore_index=255)
    optimiser = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(120):
        loss = loss_of(net(inputs), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.4
    return export(net, tmp_path_factory.mktemp("network") / "tissue.onnx")


def test_the_trained_network_tells_glass_tissue_and_pen(trained, shared_data):
    detector = open_detector(f"onnx:{trained}")
    right = total = 0
    for path in sorted((shared_data / "labelled_tiles").glob("*.png")):
        small, labels = labelled_tile(path)
        mask = detector.detect(small, 8.0).mask
        known = labels < 255
        right += (mask[known] == labels[known]).sum()
        total += known.sum()
    assert right / total > 0.9
    thumbnail = Image.open(shared_data / "pen_thumbnails" / "slide-pen.png").convert("RGB")
    mask = detector.detect(np.array(thumbnail), 8.0).mask
    assert mask[60, 440] == mask[195, 530] == TissueClass.PEN
    assert mask[250, 350] == mask[430, 380] == TissueClass.TISSUE
    assert mask[20, 20] == TissueClass.BACKGROUND


def test_the_stage_runs_the_network_and_puts_it_into_the_identity(
    trained, cmu_slide, tmp_path, monkeypatch
):
    monkeypatch.chdir(trained.parent)
    root = tmp_path / "d"
    assert main(["scan", str(cmu_slide), "--dataset", str(root), "--workers", "1"]) == 0
    arguments = ["tissue", "--dataset", str(root), "--workers", "1", "--detector"]
    assert main([*arguments, f"onnx:{trained.name}"]) == 0
    dataset = open_dataset(root)
    parameters = read_identity(dataset)["detector_parameters"]
    assert parameters["sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert parameters["classes"] == CLASSES
    assert str(trained.parent) not in dataset.identity_file.read_text()
    assert 25 < read_candidates(dataset, "CMU-1-Small-Region").num_rows < 70
    (entry,) = read_journal(dataset, "tissue")
    assert set(entry.values["class_mm2"]) <= set(CLASSES)
    with pytest.raises(UserError, match="detector is"):
        main([*arguments, "classical"])


@pytest.fixture
def untrained(tmp_path) -> Path:
    """A network with random weights: enough to test what surrounds it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return export(network(), tmp_path / "net.onnx")


def test_windows_leave_no_seam(untrained):
    """What is seen in windows equals what is seen at once, away from the picture's edge."""
    image = np.random.default_rng(0).integers(0, 256, (150, 170, 3)).astype(np.uint8)
    windowed = open_detector(f"onnx:{untrained}").detect(image, 8.0).mask
    wide = dict(SIDECAR, window_px=512, margin_px=32)
    untrained.with_suffix(".json").write_text(json.dumps(wide))
    whole = open_detector(f"onnx:{untrained}").detect(image, 8.0).mask
    assert np.array_equal(windowed, whole)
    assert len(np.unique(whole)) > 1


def test_scores_are_those_of_the_network_in_torch(untrained):
    image = np.random.default_rng(2).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = network()
    padded = np.full((104, 104, 3), 255, np.uint8)
    padded[32:72, 32:72] = image
    planes = (padded / 255 - np.array(SIDECAR["mean"])) / np.array(SIDECAR["std"])
    with torch.no_grad():
        scores = net(torch.tensor(planes.transpose(2, 0, 1)[None], dtype=torch.float32))[0]
    top = scores.topk(2, 0).values
    clear = (top[0] - top[1] > 1e-4).numpy()[32:72, 32:72]
    expected = scores.argmax(0).numpy()[32:72, 32:72]
    mask = open_detector(f"onnx:{untrained}").detect(image, 8.0).mask
    assert np.array_equal(mask[clear], expected[clear])
    assert clear.mean() > 0.95


@pytest.mark.parametrize("um_per_px", [4.0, 8.1, 16.0])
def test_the_mask_has_the_size_of_the_picture_at_any_resolution(untrained, um_per_px):
    image = np.full((61, 47, 3), 240, np.uint8)
    detector = open_detector(f"onnx:{untrained}")
    assert detector.detect(image, um_per_px).mask.shape == (61, 47)
    assert detector.um_per_px == 8.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["background", "tisue", "pen"]}, ["classes", "tissue", "other artifact"]),
        ({"classes": []}, ["classes", "expected"]),
        ({"mean": [0.5, 0.5]}, ["mean", "three numbers"]),
        ({"std": [0.2, 0.0, 0.2]}, ["std", "above 0"]),
        ({"um_per_px": "8"}, ["um_per_px", "expected a number"]),
        ({"um_per_px": 0.01}, ["um_per_px", "0.2 to 64"]),
        ({"margin_px": 32}, ["margin_px 32", "window_px 64"]),
        ({"windw_px": 64}, ["windw_px", "did you mean 'window_px'"]),
        ({"classes": ["background", "tissue"]}, ["[1, 3,", "expected [1, 2,"]),
    ],
)
def test_a_description_that_does_not_fit_is_refused_by_name(untrained, change, words):
    untrained.with_suffix(".json").write_text(json.dumps(SIDECAR | change))
    with pytest.raises(UserError) as caught:
        open_detector(f"onnx:{untrained}").detect(np.zeros((8, 8, 3), np.uint8), 8.0)
    message = str(caught.value)
    assert "\n" not in message
    for word in [untrained.stem, *words]:
        assert word in message


def test_missing_and_damaged_files_are_named(tmp_path, untrained):
    with pytest.raises(UserError, match=r"nothing\.json is missing"):
        open_detector(f"onnx:{tmp_path / 'nothing.onnx'}")
    lonely = tmp_path / "lonely.onnx"
    lonely.with_suffix(".json").write_text(json.dumps(SIDECAR))
    with pytest.raises(UserError, match=r"lonely\.onnx cannot be read"):
        open_detector(f"onnx:{lonely}")
    lonely.write_bytes(b"no network")
    with pytest.raises(UserError, match="not a network that onnxruntime opens"):
        open_detector(f"onnx:{lonely}")
    untrained.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_detector(f"onnx:{untrained}")
    untrained.with_suffix(".json").write_text("[1]")
    with pytest.raises(UserError, match="expected an object"):
        read_description(untrained.with_suffix(".json"))


@pytest.mark.parametrize("name", ["otsu", "onnx:", "onnx", ""])
def test_unknown_detectors_are_refused(name):
    with pytest.raises(UserError, match="expected 'classical' or 'onnx:FILE'"):
        detector_name(name)


def test_another_network_or_description_is_another_identity(untrained):
    first = open_detector(f"onnx:{untrained}").identity()
    untrained.with_suffix(".json").write_text(json.dumps(SIDECAR | {"um_per_px": 4.0}))
    second = open_detector(f"onnx:{untrained}").identity()
    assert first != second
    assert first["sha256"] == second["sha256"]
    assert isinstance(open_detector("classical"), ClassicalDetector)
