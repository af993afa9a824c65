"""results.json of a protocol.

Schema 1, one JSON object:

    schema_version   1
    kind             "protocol"
    protocol, title, source, left_out
    config           the whole configuration that was used; config_sha256 is its sum
    deviations       key -> [as shipped, as used] of what was changed of the protocol itself
    published        names of the published rows of this table, [] where none
    sources          name -> what tiles: kind (real, generated, reconstruction), dataset,
                     selection, selection_sha256 of the rows used, selection_rows, rows, slides,
                     tile_px, guidance (the set that guided), identity (of dataset.json:
                     model_sha256, solver, steps, guidance_scale, seed, ...) and tiles: codec,
                     rounding to eight bits, files_sha256, pixels_sha256, blockiness; null where
                     the tiles are gone
    encoders         name -> encoder.json of each feature set that was read: weights,
                     weights_sha256, random_weights, dim, resize, mean, std, input_px, view,
                     tile_px, compute_dtype
    cells            one comparison each: label, kind (model, reference, control), control,
                     encoder, column (the set it is held against), point (swept values), published
                     (the report's name of the row; {model} is config's published_model), real
                     and generated (source, view, px), train, basis (all that must agree within a
                     table, n_real, n_generated and k among it) and results: by metric the fields
                     of the result classes of evaluate.metrics with their seeds, `groups`, and
                     `failed`, the reason by metric, where one could not be computed
    tables           name, title, better, columns (encoder, set) and rows: label, kind, cells by
                     "encoder/set" of value, spread, n; null where there is no number; published,
                     where the report has the cell: row, value, spread, approximate, difference
                     (ours less it; null where the two cannot be compared), deviations
    memorisation     in place of cells: one search per encoder
    warnings         a list of {code, message}; codes are stable, messages are for people
    seconds, versions, hardware
"""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.json_text import read_json

SCHEMA_VERSION = 1
KIND = "protocol"
_REQUIRED = ("config", "sources", "encoders", "warnings", "versions", "hardware")


def read_protocol_results(path: Path) -> dict[str, Any] | None:
    """results.json of a protocol, or None where the file is of another command.

    Raises `UserError` for one of another schema or with parts missing.
    """
    try:
        results = read_json(path)
    except (OSError, ValueError):
        return None  # `measure`'s reader says what is wrong
    if not isinstance(results, dict) or results.get("kind") != KIND:
        return None
    if results.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {results.get('schema_version')!r}, this software reads "
            f"{SCHEMA_VERSION}; run the protocol again"
        )
    absent = [key for key in _REQUIRED if key not in results]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; run the protocol again")
    return results
