"""results.json: what was measured, on what, with what, and what to beware of.

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
    metrics          frechet_distance (with `widths`: subsample, slide, patient; and `infinity`),
                     precision_recall, kernel_distance, sliced_distance, feature_likelihood,
                     cosine_similarity: the fields of the result classes of evaluate.metrics,
                     with their seeds; the last two are null where they cannot be taken
    references       real_vs_real: Fréchet distance, precision and recall between two disjoint
                     random halves of the real tiles, means over `splits` such; null where the
                     tiles are too few
    warnings         a list of {code, message}; codes are stable, messages are for people; what a
                     metric says against its own value has the code metric_<its name>
    seconds, versions, hardware
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError

SCHEMA_VERSION = 2
_REQUIRED = (
    "schema_version",
    "real",
    "generated",
    "sampler",
    "encoder",
    "metrics",
    "references",
    "warnings",
)


def warning(code: str, message: str) -> dict[str, str]:
    """One entry of `warnings`."""
    return {"code": code, "message": message}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results.json in one step: a reader sees the old file or the new one."""
    text = json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        staged.write_text(text + "\n", encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def read_results(path: Path) -> dict[str, Any]:
    """Read results.json; a `UserError` says what is wrong with it and how to get one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no results at {path}: run `python -m evaluate measure` first") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a results file: {error}") from error
    if not isinstance(results, dict) or results.get("schema_version") != SCHEMA_VERSION:
        found = results.get("schema_version") if isinstance(results, dict) else None
        raise UserError(
            f"{path} has schema_version {found!r}, this software reads {SCHEMA_VERSION}; "
            "measure again"
        )
    absent = [key for key in _REQUIRED if key not in results]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; measure again")
    return results


def hardware() -> dict[str, Any]:
    """The machine in a few words: processor, cores, GPU."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cpu_count": os.cpu_count(), "gpu": gpu}
