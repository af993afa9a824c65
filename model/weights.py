"""Weights as named tensors: where they come from, how they are read, fitted, summed and written.

Nothing here executes pickled code: files are safetensors, or PyTorch archives read
with `weights_only=True`.
"""

import errno
import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError
from common.files import replacing_path

Tensors = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

_ALIGNMENT_BYTES = 64
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NAMED_KEYS = 3  # how many offending keys an error spells out


class WeightsError(UserError):
    """Weights that cannot be found, read or fitted to the network they were given for."""


@dataclass(frozen=True)
class WeightsSource:
    """A parsed weights string.

    `kind` is "hub" (`value` a repository id, or empty for the network's default), "package" (the
    file that an installed Python package contains), "file" (`value` a path), "random" (`value` the
    seed in decimal) or "none" (the term is off).
    """

    kind: Literal["hub", "package", "file", "random", "none"]
    value: str

    @property
    def seed(self) -> int:
        """The seed of a "random" source."""
        return int(self.value)


def parse_weights(weights: str) -> WeightsSource:
    """Read "hub", "hub:ID", "package", "random:SEED", "none" or a file path.

    Raises `WeightsError` for an empty string and for "random" without a seed that is
    a whole number from 0 up; whether a file exists is checked when it is read.
    """
    head, _, tail = weights.partition(":")
    if head == "hub":
        return WeightsSource("hub", tail)
    if head == "random":
        # '²' is a digit for Python, but no number.
        if not (tail.isascii() and tail.isdigit()):
            raise WeightsError(
                f"weights {weights!r}: random weights need a seed, a whole number from 0 up, "
                "for example random:0"
            )
        return WeightsSource("random", tail)
    if weights == "none":
        return WeightsSource("none", "")
    if weights == "package":
        return WeightsSource("package", "")
    if not weights:
        raise WeightsError("weights: empty; give hub, hub:ID, package, a file path or random:SEED")
    return WeightsSource("file", weights)


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Run module constructors with the CPU generator at `seed`, then put its state back.

    Modules built inside get the same initial values after any other code, and code that runs
    later is not affected by it.
    """
    generator = torch.random.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def read_tensors(
    path: str | Path, *, containers: Sequence[str] = ("state_dict",), mapped: bool = False
) -> Tensors:
    """Read the tensors of a .safetensors or PyTorch file onto the CPU, by name.

    A PyTorch file may have the tensors at its top or under one of `containers`. With `mapped` they
    are views of the file, as safetensors' always are: read as they are touched, so that large
    weights need no memory until they are copied. Raises `WeightsError` if the file is
    missing, of another kind, damaged, or has anything but named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"weights {path}: no such file; give an existing .safetensors or .pt file, "
            "hub, hub:ID or random:SEED"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(_describe_damage(path, error)) from error
    if path.suffix in _TORCH_SUFFIXES:
        return _named_tensors(load_archive(path, mapped=mapped), path, containers)
    raise WeightsError(
        f"weights {path}: unknown file type {path.suffix!r}; expected .safetensors or one of "
        + ", ".join(_TORCH_SUFFIXES)
    )


def load_archive(path: Path, *, safe_types: Sequence[type] = (), mapped: bool = False) -> Any:
    """Load a PyTorch archive onto the CPU without executing pickled code.

    `safe_types` are plain record classes the file may contain besides tensors and containers. With
    `mapped` the tensors are views of the file where its format allows it (the one before PyTorch
    1.6 does not). Raises `WeightsError` if the file is damaged or wants other classes.
    """
    try:
        with torch.serialization.safe_globals(list(safe_types)):
            mapped = mapped and zipfile.is_zipfile(path)
            if mapped:  # mapping would not compare the records with their checksums
                with zipfile.ZipFile(path) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise ValueError(f"record {damaged} differs from its checksum")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle also fails as an assertion, a type, an index, ...
        raise WeightsError(_describe_damage(path, error)) from error


def _describe_damage(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"weights {path}: damaged, incomplete or not a plain weights file "
        f"({reason[:160]}); fetch or export it again"
    )


def _named_tensors(content: Any, path: Path, containers: Sequence[str]) -> Tensors:
    for name in containers:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights {path}: contains {type(content).__name__}, not named tensors")
    strange = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(
            f"weights {path}: expected named tensors only, but {_list_keys(strange)} "
            "is something else; extract the network's own state_dict"
        )
    return dict(content)


def fit_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `tensors` into `module`, which must name exactly these keys and shapes.

    The values take the module's dtype and device. Raises `WeightsError` that names
    `source` and the first missing, unexpected and misshapen keys; the module is then
    unchanged.
    """
    _refuse_misfit(module, tensors, source)
    module.load_state_dict(dict(tensors), strict=True)


def build_from_tensors(
    build: Callable[[], Module], tensors: Mapping[str, Tensor], *, source: str
) -> Module:
    """Build a module around `tensors`, in float32, without first initialising it at random.

    `build` makes the module; every parameter and buffer of it must be in its state. Raises
    `WeightsError` as `fit_tensors` does.
    """
    with torch.device("meta"):
        module = build()
    assign_tensors(module, tensors, source=source)
    return module


def assign_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Make `tensors`, in float32, the parameters and buffers of a module on the meta device.

    Raises `WeightsError` as `fit_tensors` does.
    """
    # Integer counters keep their type; everything else becomes float32.
    _refuse_misfit(module, tensors, source)
    single = {
        key: tensors[key].float() if value.is_floating_point() else tensors[key].to(value.dtype)
        for key, value in module.state_dict().items()
    }
    module.load_state_dict(single, strict=True, assign=True)


def align_weights(module: nn.Module) -> None:
    """Move parameters and buffers, one by one, to addresses such as torch's allocator gives.

    Views of a file begin where its header ends, and products on a CPU round differently there: the
    same weights would give other bits when loaded than when just trained.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def _refuse_misfit(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    problem = describe_misfit(module.state_dict(), tensors)
    if problem:
        raise WeightsError(f"weights {source}: do not fit {type(module).__name__}: {problem}")


def describe_misfit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Say in one line how `given` differs from `expected` in keys and shapes; "" if it fits.

    Any real floating-point dtype fits another; whole numbers do not fit where those are expected:
    they are quantised codes, whose scales this software knows nothing of.
    """
    # The four ways not to fit, each with the keys that show it.
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    misshapen = [
        f"{key} {list(given[key].shape)} where {list(tensor.shape)} is expected"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    ]
    unreal = [
        f"{key} {str(given[key].dtype).removeprefix('torch.')} where floating point is expected"
        for key, tensor in expected.items()
        if key in given and tensor.is_floating_point() > given[key].is_floating_point()
    ]
    parts = [
        f"{label} {_list_keys(keys)}"
        for label, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("other shape:", misshapen),
            ("other dtype:", unreal),
        )
        if keys
    ]
    return "; ".join(parts)


def _list_keys(keys: Sequence[str]) -> str:
    named = ", ".join(keys[:_NAMED_KEYS])
    rest = len(keys) - _NAMED_KEYS
    return named if rest <= 0 else f"{named} and {rest} more"


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Sum up named tensors independently of the file that they come from.

    Returns the hex sha256 over the keys in sorted order, each followed by dtype, shape
    and raw little-endian bytes, so that a safetensors file, a PyTorch archive and
    seeded random values with equal tensors have equal sums.
    """
    # Keys, types and shapes are part of the sum: equal bytes of other tensors must differ.
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors; the file appears whole and synced, or not at all.

    Tensors are moved to the CPU and made contiguous. The bytes depend on the tensors only. Raises
    `UserError` naming the file where the disk is full or not writable.
    """
    packed = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with replacing_path(Path(path)) as staged:
        try:
            save_file(packed, staged)
        except SafetensorError as error:
            # The library's own kind of error, in which the system's is only words.
            text = str(error)
            number = re.search(r"os error (\d+)", text)
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else text) from error


@contextmanager
def explain_hub_errors(hub_id: str, *, instead: str) -> Iterator[None]:
    """Turn a hub's refusal or absence into one `WeightsError` that says what to do.

    `instead` names what the caller accepts in place of the hub.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/{hub_id.partition('@')[0]}"
    token = "put a token of that account in HF_TOKEN or run `hf auth login`"
    try:
        yield
    except WeightsError:
        raise
    except GatedRepoError as error:
        raise WeightsError(
            f"weights hub:{hub_id}: refused, they are gated; accept the terms at {page} (some are "
            f"approved by hand), {token}, or give {instead}"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"weights hub:{hub_id}: refused or not there; check the id, accept the terms at "
            f"{page}, {token}, or give {instead}"
        ) from error
    except Exception as error:  # the client's transport, and so its errors, differ by version
        deepest: BaseException = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        text = (str(deepest).strip() or "no reason given").splitlines()[0]
        reason = f"{type(deepest).__name__}: {text}"[:120]
        raise WeightsError(
            f"weights hub:{hub_id}: not loaded ({reason}); on a machine with a network accept the "
            f"terms at {page} where it has any, {token} and download the weights, then give "
            f"{instead}"
        ) from error
