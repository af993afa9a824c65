"""results.json: what was measured, on what, with what, and what makes it doubtful.

Schema 2, one JSON object:

    schema_version   2
    real, generated  dataset, selection, selection_sha256, rows, slides, and `tiles`: codec,
                     rounding to eight bits, files_sha256, pixels_sha256, blockiness (mean,
                     standard_error, tiles), null where the tiles are gone; `generated` also has
                     `identity`, the identity section of its dataset.json
    train            the same of the tiles that FLD took for training tiles, or null
    model_sha256     sum of the model's weights and configuration, null if unknown
    sampler          solver, steps, guidance_scale, guidance_low, guidance_high, compute_dtype,
                     micro_batch, seed, variations, guidance; null where unknown
    encoder          encoder.json of the features that were compared: weights_sha256, view, dtype
    settings         how the metrics were taken: draws, seeds, k, dtypes, caps
    metrics          by the names of `evaluate.metrics.registry`: the fields of each metric's result
                     class, with its seeds; those that need more than two sets (feature_likelihood,
                     cosine_similarity) are null where they cannot be computed. frechet_distance
                     also has `widths` (subsample, slide, patient) and `infinity`
    failed           reason by name of a metric (or real_vs_real) that could not be computed, whose
                     result is then null; {} where all were, absent in older files
    references       real_vs_real: Fréchet distance, precision and recall between two disjoint
                     random halves of the real tiles, means over `splits` such; null where the
                     tiles are too few
    warnings         a list of {code, message}; codes are stable, messages are for readers; what
                     makes a metric's value doubtful has the code metric_<its name>
    seconds, versions, hardware
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from common.errors import UserError
from common.files import write_bytes
from common.json_text import read_json
from common.record import Record

SCHEMA_VERSION = 2
_REQUIRED = (
    "schema_version", "real", "generated", "sampler", "encoder", "metrics", "references",
    "warnings",
)  # fmt: skip


def make_warning(code: str, message: str) -> dict[str, str]:
    """One entry of `warnings`."""
    return {"code": code, "message": message}


def write_results(path: Path, results: Mapping[str, object]) -> None:
    """Write results.json in one step: a reader sees the old file or the new one."""
    write_bytes(path, results_bytes(results))


def results_bytes(results: Mapping[str, object]) -> bytes:
    """The bytes of results.json; raises `ValueError` for a number that is not finite."""
    text = json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def check_writable(path: Path) -> None:
    """Refuse, before hours of computing, a path that no results file can be written to."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "it is a folder" if path.is_dir() else f"{folder} cannot be written to"
        raise UserError(f"--out {path}: {why}; give another file")


def read_results(path: Path) -> Record:
    """Read results.json; a `UserError` names what is wrong with it and how to get one."""
    try:
        results = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"no results at {path}: run `python -m evaluate measure` first") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a results file: {error}") from error
    # Older results lack keys that reports read; a clear refusal beats a half-empty page.
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version!r}, this software reads {SCHEMA_VERSION}; "
            "measure again"
        )
    absent = [key for key in _REQUIRED if key not in results]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; measure again")
    return Record(results, str(path))


def describe_hardware() -> dict[str, object]:
    """The machine in a few words: processor, cores, GPU."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cpu_count": os.cpu_count(), "gpu": gpu}
