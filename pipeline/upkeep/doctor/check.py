"""All findings, said as lines or as JSON."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from common.console import EXIT_FAILURES, EXIT_OK, say
from pipeline.upkeep.doctor.config import DoctorConfig
from pipeline.upkeep.doctor.finding import Finding
from pipeline.upkeep.doctor.machine import (
    batch_finding,
    gpu_finding,
    hub_finding,
    machine_findings,
    version_findings,
)
from pipeline.upkeep.doctor.reading import codec_findings, reader_findings
from pipeline.upkeep.doctor.storage import meeting, storage_findings

_SIGNS = {"ok": "ok      ", "warning": "warning ", "bad": "BAD     "}


def find(config: DoctorConfig) -> list[Finding]:
    """Everything that can be found out here."""
    found = [*version_findings(), *machine_findings()]
    with tempfile.TemporaryDirectory(prefix="histogen-doctor-") as folder:
        found += reader_findings(Path(folder), config.slide)
    found += codec_findings()
    found += [gpu_finding(), hub_finding(), batch_finding()]
    if config.dataset is not None:
        found += storage_findings(config.dataset, int(config.size * 1e6))
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        if tasks > 1:
            job = f"{os.environ.get('SLURM_JOB_ID')}-{os.environ.get('SLURM_STEP_ID')}"
            task = int(os.environ.get("SLURM_PROCID", "0"))
            found.append(meeting(config.dataset, task, tasks, job))
    return found


def doctor(config: DoctorConfig, *, as_json: bool = False) -> int:
    """Say what was found; the exit status is 1 where something is bad."""
    found = find(config)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        _say_findings(found)
    return EXIT_FAILURES if any(one.state == "bad" for one in found) else EXIT_OK


def _say_findings(found: list[Finding]) -> None:
    for one in found:
        say(f"{_SIGNS[one.state]} {one.subject}: {one.found}")
        if one.mend:
            say(f"          mend: {one.mend}")
    bad, warnings = (sum(one.state == state for one in found) for state in ("bad", "warning"))
    say(f"doctor: {len(found)} findings, {bad} bad, {warnings} warnings on {os.uname().nodename}")
