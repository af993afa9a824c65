"""Runs' logs: one JSON line an event, with slide and worker, and no secret anywhere."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.console import print_line
from common.redact import HIDDEN, redact_secrets
from pipeline.__main__ import main
from pipeline.dataset import Dataset, Entry, Run, read_journal
from pipeline.dataset.events import decode_event, read_events
from pipeline.upkeep.activity import list_running


def test_a_stage_leaves_a_line_an_event(tiled: Dataset) -> None:
    (path,) = tiled.status_dir("tile").glob("*.log")
    events = read_events(path)
    assert [one.event for one in events if one.event != "progress"] == [
        "begin", "tasks", "slide begun", "slide done", "end",
    ]  # fmt: skip
    assert {one.run for one in events} == {path.stem}
    assert {one.stage for one in events} == {"tile"}
    begun, done = (e for e in events if e.event in ("slide begun", "slide done"))
    assert begun.fields["slide"] == done.fields["slide"] == "CMU-1-Small-Region"
    assert begun.fields["worker"] == done.fields["worker"]
    assert "tcp://" in done.fields["worker"]
    assert done.fields["counts"] == {"tiles": 49}
    assert events[0].fields["pid"] == os.getpid()
    assert [one.time for one in events] == sorted(one.time for one in events)


def test_logs_are_no_journals(tiled: Dataset) -> None:
    assert len(read_journal(tiled, "tile")) == 1
    assert main(["verify", "--dataset", str(tiled.root)]) == 0


SECRETS = {
    "HF_TOKEN": "tok-1234567890",
    "AWS_SECRET_ACCESS_KEY": "aws/1234567890",
    "PATH": "/usr/bin-and-more",
}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("wget --header tok-1234567890", "wget --header ***"),
        ("cp aws/1234567890 x", "cp *** x"),
        ("https://me:pass@host/a.svs", "https://***@host/a.svs"),
        ("GET https://h/a?X-Amz-Signature=abcdef&b=1", "GET https://h/a?X-Amz-Signature=***&b=1"),
        ("https://h/a?b=1&sig=abc'", "https://h/a?b=1&sig=***'"),
        ("gdc-client -t FILE --token abcdef -d x", "gdc-client -t FILE --token *** -d x"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("https://me:p@ss@host/a@b.svs", "https://***@host/a@b.svs"),
        ("-H X-Auth-Token: GDC/1= --fail", "-H X-Auth-Token: *** --fail"),
        ("-H 'X-Auth-Token: GDC 1' --fail", "-H 'X-Auth-Token: ***' --fail"),
        ('-H "x-auth-token:GDC" --fail', '-H "x-auth-token:***" --fail'),
        ('-H X-Auth-Token: "GDC 1" --fail', "-H X-Auth-Token: *** --fail"),
        ('-H \\"X-Api-Key: GDC 1\\" --fail', '-H \\"X-Api-Key: ***\\" --fail'),
        ("'--header=X-Client-Secret: GDC 1' x", "'--header=X-Client-Secret: ***' x"),
        ("-HX-Auth-Token:GDC x", "-HX-Auth-Token:*** x"),
        ('{"X-Auth-Token": "GDC 1", "b": 1}', '{"X-Auth-Token": "***", "b": 1}'),
        ("Cookie: a=GDC; b=GDC x", "Cookie: *** x"),
        ("Set-Cookie: a=GDC", "Set-Cookie: ***"),
        ("Authorization: GDC x", "Authorization: *** x"),
        ("Proxy-Authorization: Basic GDC x", "Proxy-Authorization: Basic *** x"),
        ('Authorization: Digest username="G", response="DC" x', "Authorization: Digest *** x"),
        ("get '--token=GDC' x", "get '--token=***' x"),
        ("['--token', 'GDC']", "['--token', ***]"),
        ("get --token 'GDC 1' x", "get --token *** x"),
        ("curl -u me:GDC --user me:GDC x", "curl -u me:*** --user me:*** x"),
        ("env API_KEY=GDC get x", "env API_KEY=*** get x"),
        ("hf_ABCDEFGHIJKLMNOPQRST failed", "*** failed"),
        ("configuration: unknown key: lr", "configuration: unknown key: lr"),
        ("/run/secrets/token: Permission denied", "/run/secrets/token: Permission denied"),
        ("fetch -u https://host/x --tokens int8", "fetch -u https://host/x --tokens int8"),
        ("/usr/bin-and-more/tool: 196 tokens a tile", "/usr/bin-and-more/tool: 196 tokens a tile"),
    ],
)
def test_secrets_are_hidden(text: str, hidden: str) -> None:
    assert redact_secrets(text, SECRETS) == hidden
    assert redact_secrets(hidden, SECRETS) == hidden


def test_a_secret_that_json_escapes_is_hidden_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", 'to"k\\en-1234')
    with Run(Dataset(tmp_path), "scan", {}) as run:
        run.log_event(
            "note", text='with to"k\\en-1234', places=[Path('/to"k\\en-1234')], ranks=(0, 1)
        )
    (path,) = (tmp_path / "status" / "scan").iterdir()
    (note,) = (one for one in read_events(path) if one.event == "note")
    assert note.fields == {"text": f"with {HIDDEN}", "places": [f"/{HIDDEN}"], "ranks": [0, 1]}


@given(st.text(max_size=60), st.text(min_size=8, max_size=30), st.text(max_size=60))
def test_no_named_secret_stays(before: str, secret: str, after: str) -> None:
    if secret not in HIDDEN * 20:
        assert secret not in redact_secrets(before + secret + after, {"MY_API_KEY": secret})


def test_what_is_printed_logged_and_journalled_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "tok-1234567890")
    dataset = Dataset(tmp_path)
    with Run(dataset, "scan", {}) as run:
        run.log_event("note", text="fetching with tok-1234567890")
        run.append([Entry("s", "failed", "f", "curl -H tok-1234567890: 403")])
    print_line("token tok-1234567890")
    written = "".join(p.read_text() for p in (tmp_path / "status" / "scan").iterdir())
    assert written.count(HIDDEN) == 3
    assert "tok-1234567890" not in written + capsys.readouterr().out


@given(st.text(max_size=200))
def test_any_line_is_an_event_or_none(line: str) -> None:
    decode_event(line)


def test_running_dead_and_ended_runs_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset(tmp_path)
    dead = Run(dataset, "tile", {})
    dead.log_event("tasks", slides=1, total=1, unit="slides", engine="local")
    (log,) = dataset.status_dir("tile").glob("*.log")
    (lease,) = dataset.status_dir("tile").glob("*.lease")
    lease.write_text(lease.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    (seen,) = list_running(dataset)
    assert (seen.alive, seen.stage) == (False, "tile")

    time.sleep(0.002)
    run = Run(dataset, "tile", {})
    run.log_event("tasks", slides=3, total=300, unit="tiles", engine="local")
    run.log_begun("a", "0 tcp://w")
    run.log_begun("b", "1 tcp://w")
    run.append([Entry("a", "done", "f")])
    run.log_event("progress", done=100, total=300, unit="tiles", rate=4.0)
    (seen,) = list_running(dataset)
    assert seen.alive, "the dead run's work was begun again"
    assert (seen.done, seen.total, seen.rate, seen.seconds_left) == (100, 300, 4.0, 50.0)
    assert (seen.in_progress, seen.slides) == (1, [{"slide": "b", "worker": "1 tcp://w"}])
    (tmp_path / "dataset.json").write_text('{"identity": {"format_version": 1}, "records": {}}')
    assert main(["status", "--dataset", str(tmp_path)]) == 0
    assert "running: tile on" in capsys.readouterr().out
    run.close()
    assert list_running(dataset) == []
    lines = next(p for p in dataset.status_dir("tile").glob("*.log") if p != log).read_text()
    assert all(json.loads(line)["run"] == run.run_id for line in lines.splitlines())
