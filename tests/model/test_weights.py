"""Weights on disk: every network's round-trip, and what a file that does not fit comes to."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from model.discriminator import Discriminator, DiscriminatorConfig
from model.perceptual import PerceptualLoss
from model.sit import SiT, SiTConfig
from model.vae import VAE, VAEConfig
from model.weights import (
    WeightsError,
    build_from_tensors,
    fit_tensors,
    read_tensors,
    tensors_sha256,
    write_tensors,
)

SIT = SiTConfig.preset("tiny", latent_size=4, depth=1, encoder_depth=1)
VAE_TINY = VAEConfig.preset("tiny")
DISCRIMINATOR = DiscriminatorConfig.preset("tiny")
FOREIGN = {"conv.weight": torch.zeros(2, 3), "conv.bias": torch.zeros(2)}


@dataclass(frozen=True)
class Case:
    """A network: how to build it and to read a file to it, its first key, its published names."""

    build: Callable[[], nn.Module]
    load: Callable[[Path], nn.Module]
    key: str
    publish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def tensors(self) -> dict[str, Tensor]:
        """Tensors as a published file names them."""
        return self.publish(self.build().state_dict())


def fitted(build: Callable[[], nn.Module]) -> Callable[[Path], nn.Module]:
    """As a trainer loads: into a network that is there already."""

    def load(path: Path) -> nn.Module:
        network = build()
        before = tensors_sha256(network.state_dict())
        try:
            fit_tensors(network, read_tensors(path), source=str(path))
        except UserError:
            assert tensors_sha256(network.state_dict()) == before  # nothing half loaded
            raise
        return network

    return load


def sit() -> SiT:
    return SiT(SIT)


def discriminator() -> Discriminator:
    return Discriminator(DISCRIMINATOR)


def published_lpips(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """VGG16 and heads under the names and shapes of torchvision and lpips."""
    return {
        f"lin{key[-1]}.model.1.weight" if key.startswith("heads") else key: (
            value.view(1, -1, 1, 1) if key.startswith("heads") else value
        )
        for key, value in state.items()
    }


CASES = {
    "SiT": Case(sit, fitted(sit), "pos_embed"),
    "VAE": Case(
        lambda: VAE(VAE_TINY), lambda path: VAE.load(path, VAE_TINY), "encoder.conv_in.weight"
    ),
    "Discriminator": Case(discriminator, fitted(discriminator), "main.0.weight"),
    "LPIPS": Case(
        lambda: PerceptualLoss("random:0"),
        lambda path: PerceptualLoss(str(path)),
        "features.0.weight",
        published_lpips,
    ),
}
BY_NETWORK = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Trap:
    """A pickle that would run code when it is loaded the ordinary way."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def bad_files(folder: Path, case: Case) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Files that must be refused, each with the words that the refusal must have."""
    tensors = case.tensors()
    save_file(tensors, folder / "whole.safetensors")
    torch.save(tensors, folder / "whole.pt")
    for suffix in (".safetensors", ".pt"):
        content = (folder / f"whole{suffix}").read_bytes()
        (folder / f"cut{suffix}").write_bytes(content[: len(content) * 2 // 3])
        (folder / f"empty{suffix}").write_bytes(b"")
        (folder / f"noise{suffix}").write_bytes(random.Random(0).randbytes(4096))
        for name in ("cut", "empty", "noise"):
            yield folder / f"{name}{suffix}", ("damaged, incomplete or not a plain weights file",)

    def other(name: str, changed: dict[str, Tensor], *words: str) -> tuple[Path, tuple[str, ...]]:
        save_file(changed, folder / name)
        return folder / name, words

    yield other("foreign.safetensors", FOREIGN, f"missing {case.key}", "unexpected conv.bias")
    less = {key: value for key, value in tensors.items() if key != case.key}
    yield other("less.safetensors", less, f"missing {case.key}")
    yield other("more.safetensors", tensors | FOREIGN, "unexpected conv.bias, conv.weight")
    wrong = tensors | {case.key: torch.zeros(7)}
    yield other("shape.safetensors", wrong, f"other shape: {case.key} [7] where [")
    codes = tensors | {case.key: tensors[case.key].to(torch.int8)}
    yield other("codes.safetensors", codes, f"other dtype: {case.key} int8 where floating point")
    torch.save({**tensors, "trap": Trap(folder / "ran")}, folder / "trap.pt")
    yield folder / "trap.pt", ("not a plain weights file",)
    torch.save({**tensors, "epoch": 3}, folder / "epoch.pt")
    yield folder / "epoch.pt", ("epoch is something else",)
    (folder / "weights.onnx").write_bytes(b"\0")
    yield folder / "weights.onnx", ("unknown file type '.onnx'",)
    yield folder / "absent.pt", ("no such file",)


@BY_NETWORK
def test_a_file_that_does_not_fit_is_one_line_with_the_first_keys(
    case: Case, tmp_path: Path
) -> None:
    for path, words in bad_files(tmp_path, case):
        with pytest.raises(UserError) as caught:
            case.load(path)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in (path.name, *words)), message
    assert not (tmp_path / "ran").exists()


@BY_NETWORK
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_round_trip(case: Case, suffix: str, tmp_path: Path) -> None:
    network = case.build()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": case.publish(network.state_dict())}, path)
    else:
        write_tensors(path, case.publish(network.state_dict()))
    # networks without a seed of their own are built differently each time
    assert tensors_sha256(case.load(path).state_dict()) == tensors_sha256(network.state_dict())


def refusal(path: Path) -> str:
    """The message with which a file is refused; "" where it is read."""
    try:
        read_tensors(path)
    except WeightsError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_archive_never_ends_in_another_error(tmp_path: Path) -> None:
    """Bytes of a PyTorch file in both its formats changed at random: read, or refused."""
    generator, small = random.Random(1), Discriminator(DiscriminatorConfig(base_channels=1))
    for zipped in (True, False):
        whole = tmp_path / "whole.pt"
        torch.save(small.state_dict(), whole, _use_new_zipfile_serialization=zipped)
        content = whole.read_bytes()
        refused = 0
        for _ in range(100):
            changed = bytearray(content)
            for _ in range(generator.choice((1, 3, 10))):
                changed[generator.randrange(min(4000, len(content)))] = generator.randrange(256)
            (tmp_path / "changed.pt").write_bytes(changed)
            message = refusal(tmp_path / "changed.pt")
            refused += bool(message)
            assert not message or "changed.pt" in message
            assert "\n" not in message
        assert refused > 20


def test_half_precision_files_are_built_in_float32(tmp_path: Path) -> None:
    write_tensors(tmp_path / "half.safetensors", discriminator().half().state_dict())
    tensors = read_tensors(tmp_path / "half.safetensors")
    built = build_from_tensors(discriminator, tensors, source="half")
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    assert built.state_dict()["main.3.num_batches_tracked"].dtype == torch.int64


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, FOREIGN)
    before = path.read_bytes()
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared})  # safetensors refuses these
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_sum_sees_names_shapes_dtypes_and_values_alone() -> None:
    tensors = {"a": torch.arange(6.0).reshape(1, 2, 3, 1), "b": torch.tensor(3)}
    same = {"b": torch.tensor(3), "a": tensors["a"].to(memory_format=torch.channels_last)}
    assert tensors_sha256(same) == tensors_sha256(tensors)
    for changed in (
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"].reshape(2, 3), "b": tensors["b"]},
        {"a": tensors["a"].double(), "b": tensors["b"]},
        {"a": tensors["a"] + 1, "b": tensors["b"]},
    ):
        assert tensors_sha256(changed) != tensors_sha256(tensors)
