"""`pipeline weights`: from a hub and a mirror on this machine; refused, cut off, used offline.

There is no network to the real ones here. The hub is an HTTP server on 127.0.0.1 that answers as
the hub's file endpoints do; its client, `torch.hub` and our code are the real ones. The encoders
fetched are entries of the tests' own, small, one for each kind of published file.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import huggingface_hub.constants as hub_constants
import pytest
import torch

from common.errors import UserError
from model.encoders import load_encoder, load_spec, table
from model.encoders.construct import TimmConstruction, frozen
from model.encoders.published import HubFiles, ReleaseFile
from model.perceptual import PerceptualLoss
from model.weights import tensors_sha256
from pipeline.__main__ import main
from pipeline.upkeep import weights

TINY = replace(
    table.UNI,
    name="tiny",
    published=HubFiles("lab/tiny"),
    construction=TimmConstruction("vit_tiny_patch16_224", frozen(img_size=224, depth=1)),
    dim=192,
    token_dim=192,
)
GATED = replace(TINY, name="gated", published=HubFiles("lab/gated"), gating="accept the terms")
FORBIDDEN = replace(TINY, name="forbidden", published=HubFiles("lab/forbidden"))
ABSENT = replace(TINY, name="absent", published=HubFiles("lab/absent"))
PICKLED = replace(TINY, name="pickled", published=HubFiles("lab/pickled"))
WRONG = replace(TINY, name="wrong", published=HubFiles("lab/wrong"))


@dataclass
class Hub:
    """The files of a hub by "owner/name/file", how it refuses, and what was asked of it."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # this many answers break off half-way
    token: str = ""
    asked: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # where each GET wanted to begin


def _answer(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self._serve(body=False)

        def do_GET(self) -> None:
            self._serve(body=True)

        def _serve(self, body: bool) -> None:
            owner, name, _, revision, file = self.path.lstrip("/").split("/", 4)
            repository, key = f"{owner}/{name}", f"{owner}/{name}/{file}"
            hub.asked.append(f"{self.command} {key}")
            authorised = hub.token and self.headers.get("Authorization") == f"Bearer {hub.token}"
            if repository in hub.refusals and not authorised:
                return self._refuse(*hub.refusals[repository])
            if key not in hub.files:
                return self._refuse(404, "EntryNotFound")
            self._send(key, hub.files[key], revision, body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, key: str, data: bytes, revision: str, body: bool) -> None:
            start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if not body:
                return
            hub.starts.append(start)
            if hub.cut.get(key, 0) > 0:
                hub.cut[key] -= 1
                self.wfile.write(data[start : start + (len(data) - start) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(data[start:])

    return Handler


def _bytes(spec: table.EncoderSpec, tmp: Path, suffix: str) -> bytes:
    """A published file with seeded weights."""
    state = load_spec(spec, "random:4").network.state_dict()
    path = tmp / f"published{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    tmp = tmp_path_factory.mktemp("published")
    plain, pickled = (_bytes(TINY, tmp, suffix) for suffix in (".safetensors", ".bin"))
    return {
        "lab/tiny/model.safetensors": plain,
        "lab/gated/model.safetensors": plain,
        "lab/forbidden/model.safetensors": plain,
        "lab/pickled/pytorch_model.bin": pickled,
        "lab/wrong/model.safetensors": _bytes(replace(TINY, construction=TimmConstruction(
            "vit_tiny_patch16_224", frozen(img_size=224, depth=2)
        )), tmp, ".safetensors"),
    }  # fmt: skip


@pytest.fixture
def hub(
    published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Hub]:
    hub = Hub(files=dict(published))
    hub.refusals = {
        "lab/gated": (401, "GatedRepo"),
        "lab/forbidden": (403, ""),
        "lab/absent": (401, "RepoNotFound"),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), _answer(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        hub_constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        template.replace(hub_constants.ENDPOINT, hub.address),
    )
    monkeypatch.setattr(hub_constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch-cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    entries = {s.name: s for s in (TINY, GATED, FORBIDDEN, ABSENT, PICKLED, WRONG)}
    monkeypatch.setattr(table, "ENCODERS", MappingProxyType({**table.ENCODERS, **entries}))
    yield hub
    server.shutdown()
    server.server_close()


def fetch(folder: Path, *arguments: str) -> int:
    return main(["weights", "fetch", *arguments, "--to", str(folder)])


def records(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "weights.json").read_text())


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_fetched_weights_work_offline_and_are_recorded(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    assert fetch(folder, "tiny", "pickled") == 0
    assert "CC BY-NC-ND 4.0" in capsys.readouterr().out
    assert leftovers(folder) == {"tiny.safetensors", "pickled.safetensors", "weights.json"}
    assert (folder / "tiny.safetensors").read_bytes() == hub.files["lab/tiny/model.safetensors"]
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    for name, file in (("tiny", "model.safetensors"), ("pickled", "pytorch_model.bin")):
        record = records(folder)[name]
        data = (folder / record["file"]).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()
        assert record["bytes"] == len(data)
        original = hub.files[f"lab/{name}/{file}"]
        assert record["published_sha256"] == hashlib.sha256(original).hexdigest()
        assert record["licence"] == "CC BY-NC-ND 4.0"
        loaded = load_encoder(name, str(folder / record["file"]))
        assert loaded.weights_sha256 == record["weights_sha256"]
        want = load_spec(replace(TINY, name=name), "random:4").network.state_dict()
        assert tensors_sha256(want) == loaded.weights_sha256


def test_a_second_fetch_asks_for_nothing_and_a_damaged_file_is_fetched_again(
    hub: Hub, tmp_path: Path
) -> None:
    assert fetch(tmp_path, "tiny") == 0
    hub.asked.clear()
    before = (tmp_path / "weights.json").read_bytes()
    assert fetch(tmp_path, "tiny") == 0
    assert hub.asked == []
    assert (tmp_path / "weights.json").read_bytes() == before
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert fetch(tmp_path, "tiny") == 0
    assert path.read_bytes() == hub.files["lab/tiny/model.safetensors"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gated", ("gated", "accept the terms", "HF_TOKEN", "hf auth login")),
        ("absent", ("check the id", "HF_TOKEN")),
        ("forbidden", ("403", "HF_TOKEN")),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    hub: Hub, tmp_path: Path, name: str, words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError) as caught:
        load_encoder(name, "hub")
    message = str(caught.value)
    assert "\n" not in message
    page = f"https://huggingface.co/lab/{name}"
    for word in (*words, page, f"python -m pipeline weights fetch {name} --to DIR"):
        assert word in message
    folder = tmp_path / "weights"
    assert fetch(folder, name, "tiny") == 1  # the other one is fetched all the same
    assert "1 failed" in capsys.readouterr().out
    assert leftovers(folder) == {"tiny.safetensors", "weights.json"}


def test_a_token_opens_what_is_gated(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_test"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch(tmp_path, "gated") == 0


def test_without_a_network_one_line_says_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    assert load_encoder("tiny", "hub").weights == "hub"
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert not load_encoder("tiny", "hub").is_random  # from the client's cache
    with pytest.raises(UserError, match="not loaded") as caught:
        load_encoder("pickled", "hub")
    assert "\n" not in str(caught.value)
    assert "weights fetch pickled" in str(caught.value)


def test_another_repository_and_revision_may_be_named(hub: Hub) -> None:
    hub.asked.clear()
    encoder = load_encoder("tiny", "hub:lab/pickled@v2")
    assert encoder.weights == "hub:lab/pickled@v2"
    assert hub.asked[:2] == [
        "HEAD lab/pickled/model.safetensors",
        "HEAD lab/pickled/pytorch_model.bin",
    ]


def test_a_cut_transfer_goes_on_and_a_dead_one_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between attempts
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it keeps whole chunks
    key = "lab/tiny/model.safetensors"
    hub.cut[key] = 2
    assert fetch(tmp_path / "a", "tiny") == 0
    assert (tmp_path / "a/tiny.safetensors").read_bytes() == hub.files[key]
    size = len(hub.files[key])
    assert len(hub.starts) == 3
    assert hub.starts[1:] == pytest.approx([size / 2, size * 3 / 4], abs=4000)  # it went on
    hub.cut[key] = 10**6
    assert fetch(tmp_path / "b", "tiny") == 1
    assert leftovers(tmp_path / "b") == set()
    hub.cut[key] = 0
    assert fetch(tmp_path / "b", "tiny") == 0


def test_weights_that_do_not_fit_are_not_kept(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fetch(tmp_path, "wrong") == 1
    assert "unexpected blocks.1." in capsys.readouterr().out
    assert leftovers(tmp_path) == set()


def test_an_unknown_name_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tinny' are not known"):
        fetch(tmp_path, "tiny", "tinny")
    assert hub.asked == []


# --- release files, by a mirror -----------------------------------------------------------------


@pytest.fixture
def release(published: dict[str, bytes], tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """A mirror folder with one release file, and an encoder that is published as it."""
    data = published["lab/pickled/pytorch_model.bin"]
    name = f"tiny-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / name).write_bytes(data)
    spec = replace(TINY, name="released", published=ReleaseFile(f"{hub.address}/x/y/z/w/{name}"))
    variant = replace(spec, name="released-variant")
    entries = {s.name: s for s in (spec, variant)}
    monkeypatch.setattr(table, "ENCODERS", MappingProxyType({**table.ENCODERS, **entries}))
    return mirror, mirror / name


def test_a_release_file_comes_from_its_mirror_with_its_sum(
    release: tuple[Path, Path], tmp_path: Path
) -> None:
    mirror, file = release
    folder = tmp_path / "weights"
    assert fetch(folder, "released-variant", "--mirror", mirror.as_uri()) == 0
    assert leftovers(folder) == {"released.safetensors", "weights.json"}  # variants share it
    loaded = load_encoder("released", str(folder / "released.safetensors"))
    assert loaded.weights_sha256 == records(folder)["released"]["weights_sha256"]
    file.write_bytes(file.read_bytes()[:-7])  # as a broken transfer leaves it
    assert fetch(tmp_path / "cut", "released", "--mirror", mirror.as_uri()) == 1
    assert leftovers(tmp_path / "cut") == set()


def test_a_release_that_cannot_be_had_is_one_line(
    release: tuple[Path, Path], hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="404") as caught:
        load_encoder("released", "hub")
    message = str(caught.value)
    assert "\n" not in message
    assert "weights fetch released --to DIR" in message
    assert "--mirror" in message
    with pytest.raises(UserError, match="are not there, but at"):
        load_encoder("released", "hub:lab/tiny")


def test_vgg_and_its_heads_become_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG16's own file has a sum we cannot forge: the item is pointed at a seeded one."""
    seeded = PerceptualLoss("random:3")
    features = {k: v for k, v in seeded.state_dict().items() if k.startswith("features.")}
    torch.save({**features, "classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.pth")
    digest = hashlib.sha256((tmp_path / "vgg16.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "vgg16.pth").rename(tmp_path / f"vgg16-{digest}.pth")
    url = f"https://example.invalid/vgg16-{digest}.pth"
    monkeypatch.setattr(weights, "_LPIPS", replace(weights._LPIPS, published=ReleaseFile(url)))
    folder = tmp_path / "weights"
    assert fetch(folder, "lpips-vgg16", "--mirror", tmp_path.as_uri()) == 0
    loss = PerceptualLoss(str(folder / "lpips-vgg16.safetensors"))
    assert loss.weights_sha256 == records(folder)["lpips-vgg16"]["weights_sha256"]
    for key, value in features.items():
        assert torch.equal(loss.state_dict()[key], value)
    assert not torch.equal(loss.heads[0], seeded.heads[0])  # the package's, not the seeded ones


# --- the command --------------------------------------------------------------------------------


def test_list_names_every_encoder_with_its_terms(capsys: pytest.CaptureFixture) -> None:
    assert main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:]}
    assert set(rows) == {*table.ENCODERS, "lpips-vgg16"}
    for word in ("768", "196x768", "85.7 M", "224 px", "CC BY-NC-ND 4.0", "by hand", "bioptimus"):
        assert word in rows["h0-mini"]
    assert "299 px, torch_bilinear" in rows["inception-v3"]


_DOOR = """
import sys
from dataclasses import replace
from types import MappingProxyType
from model.encoders import table
from model.encoders.construct import TimmConstruction, frozen
from model.encoders.published import HubFiles
tiny = replace(table.UNI, name="tiny", published=HubFiles("lab/tiny"), dim=192, token_dim=192,
    construction=TimmConstruction("vit_tiny_patch16_224", frozen(img_size=224, depth=1)))
table.ENCODERS = MappingProxyType({**table.ENCODERS, "tiny": tiny})
from pipeline.__main__ import main
sys.exit(main(["weights", "fetch", "tiny", "--to", sys.argv[1]]))
"""


@pytest.mark.full
def test_the_hub_is_the_one_that_hf_endpoint_names(hub: Hub, tmp_path: Path) -> None:
    """A process of its own: the client reads the variable when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", _DOOR, str(tmp_path / "weights")],
        env={**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny: wrote" in done.stdout
    assert leftovers(tmp_path / "weights") == {"tiny.safetensors", "weights.json"}
