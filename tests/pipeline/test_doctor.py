"""`pipeline doctor` finds what is broken, and says how to mend it."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from packaging.requirements import Requirement

from pipeline.__main__ import main
from pipeline.slides.readers import ReaderEntry
from pipeline.upkeep.doctor import check, machine, reading, storage
from pipeline.upkeep.doctor.check import doctor
from pipeline.upkeep.doctor.config import DoctorConfig
from pipeline.upkeep.doctor.finding import Finding


def test_this_machine_is_fit(
    tmp_path: Path, cmu_slide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "dataset"
    options = ["--dataset", str(root), "--size", "8", "--slide", str(cmu_slide)]
    assert main(["doctor", "--json", *options]) == 0
    found = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    assert {"python", "packages", "GPU", "hub token", "rename", "locking", "disk speed"} <= set(
        found
    )
    assert found["slide CMU-1-Small-Region.svs"]["found"].startswith("aperio, 2220x2967 px, 0.499")
    for one in found.values():
        assert one["state"] == "ok" or one["mend"], f"{one} has no mend"
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def by_subject(found: list[Finding]) -> dict[str, Finding]:
    return {one.subject: one for one in found}


def test_a_reader_that_shows_other_pixels_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {one.state for one in reading.reader_findings(tmp_path)} == {"ok"}
    real = ReaderEntry.open

    def broken(entry: ReaderEntry, path: Path, *series: str) -> object:
        if "tiffslide" in entry.location:
            raise ImportError("libsomething.so.1: cannot open shared object file")
        reader = real(entry, path, *series)
        if "openslide" in entry.location:
            read = reader.read
            monkeypatch.setattr(reader, "read", lambda *a: np.zeros_like(read(*a)), raising=False)
        return reader

    monkeypatch.setattr(ReaderEntry, "open", broken)
    found = by_subject(reading.reader_findings(tmp_path))
    assert found["reader native"].state == "ok"
    assert "grey levels" in found["reader openslide"].result
    assert "libsomething" in found["reader tiffslide"].result
    assert found["reader tiffslide"].fix


def test_a_codec_that_loses_pixels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import imagecodecs

    monkeypatch.setattr(
        imagecodecs, "jpeg2k_decode", lambda data: np.zeros((512, 512, 3), np.uint8)
    )
    found = by_subject(reading.codec_findings())
    assert found["codec jpeg2000"].state == "bad"
    assert found["codec jpeg"].state == "ok"


@pytest.mark.parametrize(
    ("text", "problem"),
    [("numpy>=1", ""), ("numpy>=99", "expected >=99"), ("no-such-package-here", "is missing")],
)
def test_versions_are_compared(text: str, problem: str) -> None:
    said = machine.requirement_problem(Requirement(text))
    assert problem in said
    assert bool(problem) == bool(said)


def test_a_folder_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = storage.storage_findings(tmp_path / "file" / "dataset", 1 << 20)
    assert (found.state, bool(found.fix)) == ("bad", True)


Fault = Callable[[pytest.MonkeyPatch], None]


def no_locks(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    patch.setattr(fcntl, "lockf", refuse)


def locks_that_hold_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fcntl, "lockf", lambda *_: None)


def rename_that_copies(patch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> None:
        with Path(target).open("r+b") as file:
            file.write(self.read_bytes())
        self.unlink()

    patch.setattr(Path, "replace", replace)


def clock_of_yesterday(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage.time, "time", lambda: 86_400.0)


@pytest.mark.parametrize(
    ("fault", "subject"),
    [
        (no_locks, "locking"),
        (locks_that_hold_nobody, "locking"),
        (rename_that_copies, "rename"),
        (clock_of_yesterday, "clock"),
    ],
)
def test_a_file_systems_faults_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, subject: str
) -> None:
    fault(monkeypatch)
    checks = {
        "locking": storage.check_locks,
        "rename": storage.check_rename,
        "clock": storage.check_clock,
    }
    found = checks[subject](tmp_path)
    assert found.subject == subject
    assert found.state != "ok"
    assert found.fix


def test_tasks_of_other_nodes_meet_or_miss_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = "import sys; from pathlib import Path; from pipeline.upkeep.doctor import storage; "
    call += "print(storage.meet_other_tasks(Path(sys.argv[1]), int(sys.argv[2]), 2, 'job').state)"
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", call, str(tmp_path), str(i)], stdout=subprocess.PIPE
        )
        for i in range(2)
    ]
    assert [task.communicate(timeout=120)[0].strip() for task in tasks] == [b"ok", b"ok"]
    assert not (tmp_path / ".tmp" / "doctor-meeting-job").exists()
    monkeypatch.setattr(storage, "_MEET_WITHIN_S", 0.2)
    alone = storage.meet_other_tasks(tmp_path, 0, 2, "other")
    assert (alone.state, "[1]" in alone.result) == ("bad", True)


def test_a_driver_whose_gpu_pytorch_does_not_see_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_driver_gpus", lambda: ["GPU 0: A100"])
    assert machine.gpu_finding().state == "bad"
    monkeypatch.setattr(machine, "_driver_gpus", list)
    assert machine.gpu_finding().state == "warning"


def test_the_hubs_token_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    assert machine.hub_finding() == Finding("hub token", "ok", "found in HF_TOKEN (not shown)")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert machine.hub_finding().state == "warning"
    (tmp_path / "token").write_text("hf_abcdefghijklmnopqrst")
    found = machine.hub_finding()
    assert found.state == "ok"
    assert "hf_" not in found.result


def test_what_is_said_of_the_token_is_readable_and_no_secret_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_abcdefghijklmnopqrst"
    leak = Finding("readers", "bad", f"cannot open https://user:{secret}@host/x, Token: {secret}")
    monkeypatch.setattr(check, "_collect_findings", lambda config: [machine.hub_finding(), leak])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    doctor(DoctorConfig())
    said = capsys.readouterr().out
    assert "warning  hub token: none\n" in said
    monkeypatch.setenv("HF_TOKEN", secret)
    doctor(DoctorConfig())
    said += capsys.readouterr().out
    assert "ok       hub token: found in HF_TOKEN (not shown)\n" in said
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(secret)
    doctor(DoctorConfig())
    said += capsys.readouterr().out
    assert f"ok       hub token: found in {tmp_path}/token (not shown)\n" in said
    assert secret not in said


def test_something_bad_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Finding("disk", "bad", "broken", "buy another")
    monkeypatch.setattr(check, "_collect_findings", lambda config: [bad])
    assert doctor(DoctorConfig()) == 1
    said = capsys.readouterr().out
    assert "BAD      disk: broken" in said
    assert "fix: buy another" in said


def test_slurm_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "shutil", SimpleNamespace(which=lambda name: "/usr/bin/sbatch"))
    monkeypatch.setattr(machine, "_command_output", lambda *command: None)
    assert machine.batch_finding().state == "warning"
