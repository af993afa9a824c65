"""Slides fetched by a command, one at a time, checked and deleted."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.processes import ProcessIdentity, identify_process
from pipeline.__main__ import main
from pipeline.dataset import Dataset, Entry, Slide, read_slides
from pipeline.run.summary import Summary, report_summary
from pipeline.slides import staging
from pipeline.slides.config import StageIn
from pipeline.slides.entries import find_slides
from pipeline.slides.scan import _slide_of_entry
from pipeline.slides.staging import StageInError, local_slide

SLIDE = Path(__file__).resolve().parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"
MD5 = hashlib.md5(SLIDE.read_bytes(), usedforsecurity=False).hexdigest()

FETCH = """
import pathlib, shutil, sys
store, uri, dest = sys.argv[1:]
with open(pathlib.Path(store) / "log", "a") as log:
    log.write(uri + "\\n")
tries = len((pathlib.Path(store) / "log").read_text().split())
if "flaky" in uri and tries < 3:
    pathlib.Path(dest).write_bytes(b"half of it")
    sys.exit("connection reset" if tries == 1 else 0)
shutil.copy(pathlib.Path(store) / uri.rpartition("/")[2], dest)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A far store with the slide under several names, and the command that fetches from it."""
    folder = tmp_path / "store"
    folder.mkdir()
    for name in ("one.svs", "flaky.svs"):
        shutil.copy(SLIDE, folder / name)
    (folder / "fetch.py").write_text(FETCH)
    return folder


def command(store: Path) -> str:
    return f"{sys.executable} {store}/fetch.py {store} {{uri}} {{dest}}"


def far(name: str, **values: object) -> Slide:
    given = {"bytes": SLIDE.stat().st_size, "md5": MD5} | values
    return Slide(name.removesuffix(".svs"), f"far://bucket/{name}", **given)  # type: ignore[arg-type]


def test_a_slide_is_there_while_it_is_used_and_gone_after(store: Path, tmp_path: Path) -> None:
    stage_in = StageIn(command(store), str(tmp_path / "scratch"))
    with local_slide(far("one.svs"), stage_in, tmp_path) as path:
        assert path.name == "one.svs"
        assert path.read_bytes() == SLIDE.read_bytes()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_broken_fetch_is_tried_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(staging, "sleep", pauses.append)
    with local_slide(far("flaky.svs"), StageIn(command(store)), tmp_path / "s") as path:
        assert path.stat().st_size == SLIDE.stat().st_size
    assert pauses == [2.0, 4.0]


@pytest.mark.parametrize(
    ("slide", "said"),
    [
        (far("one.svs", md5="0" * 32), "md5 is"),
        (far("one.svs", bytes=17), "17 were expected"),
        (far("missing.svs"), "FileNotFoundError"),
    ],
)
def test_what_is_not_the_slide_is_refused_with_its_reason(
    store: Path, tmp_path: Path, slide: Slide, said: str
) -> None:
    stage_in = StageIn(command(store), retries=0)
    with (
        pytest.raises(StageInError, match=said),
        local_slide(slide, stage_in, tmp_path / "scratch"),
    ):
        pass
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_command_without_a_destination_is_refused() -> None:
    with pytest.raises(UserError, match="writes the file"):
        StageIn("cp {uri}")


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    stage_in = StageIn(
        f"{sys.executable} -c 'import time; time.sleep(60)' {{dest}}", retries=0, timeout_s=0.2
    )
    with (
        pytest.raises(StageInError, match="no end within"),
        local_slide(far("one.svs"), stage_in, tmp_path),
    ):
        pass


def test_a_name_with_braces_and_spaces_is_one_argument() -> None:
    argv = StageIn("fetch {uri} {dest}").make_command("far://b/{dest} x.svs", Path("/d/{uri}"))
    assert argv == ["fetch", "far://b/{dest} x.svs", "/d/{uri}"]


def test_copies_left_by_a_killed_process_are_removed(store: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = staging._host_name()
    dead = tmp_path / f"histogen-stage-in-{host}-{ended.pid}-abc"
    mine = tmp_path / f"histogen-stage-in-{host}-{os.getpid()}-abc"
    other_host = tmp_path / f"histogen-stage-in-elsewhere-{ended.pid}-abc"
    for folder in (dead, mine, other_host):
        folder.mkdir()
    with local_slide(far("one.svs"), StageIn(command(store)), tmp_path):
        assert not dead.exists()
        assert mine.exists()
        assert other_host.exists()


def test_a_copy_with_a_lease_lives_by_it(store: Path, tmp_path: Path) -> None:
    """Scratch may be shared with a container that has this host's name and ids of its own."""
    prefix = f"histogen-stage-in-{staging._host_name()}-leased-"
    here = identify_process()
    leases = {
        "dead": replace(here, pid=2**22 + 1), "mine": here,
        "contained": replace(here, namespace="pid:[1]"), "late": replace(here, boot="another"),
    }  # fmt: skip
    for name, holder in leases.items():
        folder = tmp_path / f"{prefix}{name}"
        folder.mkdir()
        (folder / ".lease").write_text(holder.to_json())
    (tmp_path / f"{prefix}made").mkdir()
    os.utime(tmp_path / f"{prefix}late" / ".lease", (0, 0))
    with local_slide(far("one.svs"), StageIn(command(store)), tmp_path) as path:
        names = {each.name.removeprefix(prefix) for each in tmp_path.glob(f"{prefix}*")}
        (own,) = names - {"mine", "contained", "made"}
        assert path.is_relative_to(tmp_path / f"{prefix}{own}")
        assert ProcessIdentity.from_json((path.parents[1] / ".lease").read_text()) == here


def test_a_manifest_of_the_gdc_is_understood(tmp_path: Path) -> None:
    name = "TCGA-CR-7395-01A-01-TS1.0a1b.svs"
    manifest = tmp_path / "gdc_manifest.txt"
    manifest.write_text(
        f"id\tfilename\tmd5\tsize\tstate\n1f-2e\t{name}\t{MD5.upper()}\t42\treleased\n"
    )
    (source,) = find_slides([str(manifest)])
    assert source.location == f"1f-2e/{name}"
    assert (source.md5, source.bytes) == (MD5, 42)
    argv = StageIn("curl -o {dest} https://host/data/{id}").make_command(
        source.location, Path("/d/x")
    )
    assert argv[-1] == "https://host/data/1f-2e"


@pytest.mark.full
def test_the_stages_fetch_and_give_the_same_tiles(
    store: Path, tmp_path: Path, tiled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cohort.csv").write_text(
        "path,slide_id,md5,size_bytes\n"
        f"far://bucket/one.svs,CMU-1-Small-Region,{MD5},{SLIDE.stat().st_size}\n"
    )
    root, scratch = tmp_path / "dataset", tmp_path / "scratch"
    fetch = ["--stage-in", command(store), "--scratch", str(scratch), "--workers", "1"]

    def run(stage: str, *more: str) -> int:
        return main([stage, "--dataset", str(root), *more])

    assert run("scan", str(tmp_path / "cohort.csv"), *fetch) == 0
    (slide,) = read_slides(Dataset(root))
    assert (slide.path, slide.mtime_ns, slide.md5) == ("far://bucket/one.svs", 0, MD5)
    assert run("tissue", "--workers", "1") == 1
    assert "give --stage-in" in capsys.readouterr().out
    assert run("tissue", *fetch) == 0
    assert run("select", "--name", "train") == 0
    assert run("tile", *fetch) == 0
    assert list(scratch.iterdir()) == []
    (made,) = Dataset(root).tiles_dir(224).glob("*.tar")
    (expected,) = tiled.tiles_dir(224).glob("*.tar")
    assert made.read_bytes() == expected.read_bytes()


SECRETS = {
    "header": "GDC7Qx.Zk_31", "option": "ABC0123456xyz", "bearer": "BEAR.s3cr-et/9",
    "cookie": "C00KIEvalue", "password": "pa55word-long", "phrase": "of two Words!!",
}  # fmt: skip

REFUSES = """
import sys
said = sys.argv[sys.argv.index("--token") + 1]
sys.exit(f"{sys.argv[2]}: refused, and {'x' * 190}{said}" if "late" in sys.argv[-2] else said)
"""


def refusing(script: Path) -> str:
    """A command with a secret of every kind, which fails and repeats one without its name."""
    return (
        f'{sys.executable} {script} -H "X-Auth-Token: {SECRETS["header"]}" '
        f'--token {SECRETS["option"]} -H "Authorization: Bearer {SECRETS["bearer"]}" '
        f"-H 'Cookie: a=1; b={SECRETS['cookie']}' --user me:{SECRETS['password']} "
        f"-H 'X-Api-Key: {SECRETS['phrase']}' {{uri}} {{dest}}"
    )


def test_no_secret_of_a_command_is_printed_or_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the whole dataset and all output, whatever way a command's words might take."""
    (tmp_path / "refuses.py").write_text(REFUSES)
    (tmp_path / "cohort.csv").write_text("path,slide_id\nfar://b/one.svs,a\nfar://b/late.svs,b\n")
    root = tmp_path / "dataset"
    fetch = ["--stage-in", refusing(tmp_path / "refuses.py"), "--stage-in-retries", "0"]
    for _ in range(2):
        line = ["scan", str(tmp_path / "cohort.csv"), "--dataset", str(root), "--workers", "1"]
        assert main([*line, *fetch]) == 1
    assert main(["status", "--dataset", str(root), "--json"]) == 0
    assert main(["report", "--dataset", str(root)]) == 0
    said = "".join(capfd.readouterr())
    slides = read_slides(Dataset(root))
    assert [slide.status for slide in slides] == ["failed", "failed"]
    assert all("-H 'X-Auth-Token: ***' --token ***" in slide.reason for slide in slides)
    assert "-H 'X-Auth-Token: ***' --token ***" in said
    written = [path for path in root.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".jsonl", ".log", ".parquet", ".html"}
    for name, secret in SECRETS.items():
        assert secret not in said + repr(slides), f"{name} is printed, or in slides.parquet"
        holders = [path.name for path in written if secret.encode() in path.read_bytes()]
        assert not holders, f"{name} is in {holders}"


def test_arguments_that_dask_logs_show_no_command(tmp_path: Path) -> None:
    assert SECRETS["header"] not in repr(StageIn(refusing(tmp_path)))


def test_reasons_of_older_journals_are_shown_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = Summary("scan", rejected=[("s", "curl -H 'X-Auth-Token: GDC' [/x] [red] failed")])
    report_summary(summary, tmp_path)
    assert "curl -H 'X-Auth-Token: ***' [/x] [red] failed" in capsys.readouterr().out
    slide = {"slide_id": "s", "path": "p", "status": "rejected", "reason": "--token GDC"}
    assert (
        _slide_of_entry(Entry("s", "rejected", "f", "--token GDC", values=slide)).reason
        == "--token ***"
    )
