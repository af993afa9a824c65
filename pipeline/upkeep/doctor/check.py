"""All findings, printed as lines or as JSON."""

import json
import os
import tempfile
from pathlib import Path

from common.console import EXIT_FAILURES, EXIT_OK, print_line, stdout
from common.redact import redact_secrets
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
from pipeline.upkeep.doctor.storage import meet_other_tasks, storage_findings

_SIGNS = {"ok": "ok      ", "warning": "warning ", "bad": "BAD     "}


def doctor(config: DoctorConfig, *, as_json: bool = False) -> int:
    """Print every finding; the exit status is 1 where something is bad."""
    findings = _collect_findings(config)
    bad, warnings = (sum(f.state == state for f in findings) for state in ("bad", "warning"))
    if as_json:
        print(json.dumps([finding.as_json() for finding in findings], indent=2))
        return EXIT_FAILURES if bad else EXIT_OK
    for finding in findings:
        # The subject is ours: "hub token: " before a result would pass for a secret's header.
        line = f"{_SIGNS[finding.state]} {finding.subject}: {redact_secrets(finding.result)}"
        stdout.print(line)
        if finding.fix:
            print_line(f"          fix: {finding.fix}")
    host = os.uname().nodename
    print_line(f"doctor: {len(findings)} findings, {bad} bad, {warnings} warnings on {host}")
    return EXIT_FAILURES if bad else EXIT_OK


def _collect_findings(config: DoctorConfig) -> list[Finding]:
    findings = [*version_findings(), *machine_findings()]
    with tempfile.TemporaryDirectory(prefix="histogen-doctor-") as folder:
        findings += reader_findings(Path(folder), config.slide)
    findings += [*codec_findings(), gpu_finding(), hub_finding(), batch_finding()]
    if config.dataset is not None:
        findings += storage_findings(config.dataset, int(config.size * 1e6))
        # Under `srun` every task runs this command: together they try the shared folder.
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        if tasks > 1:
            job = f"{os.environ.get('SLURM_JOB_ID')}-{os.environ.get('SLURM_STEP_ID')}"
            task = int(os.environ.get("SLURM_PROCID", "0"))
            findings.append(meet_other_tasks(config.dataset, task, tasks, job))
    return findings
