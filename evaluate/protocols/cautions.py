"""What makes a protocol's numbers doubtful: warnings with stable codes, worst first."""

from collections.abc import Iterator, Mapping
from typing import Any

from evaluate.compare.results import make_warning
from evaluate.compare.warnings import FEW_TILES, blockiness_warnings, metric_warnings
from evaluate.metrics.registry import METRICS
from evaluate.protocols.config import Protocol
from evaluate.protocols.tables import row_label

Warnings = list[dict[str, str]]
Results = Mapping[str, Any]
"""results.json."""
_NO_LINE = {"infinity": None}


def find_cautions(protocol: Protocol, results: Results) -> Warnings:
    """What makes the numbers doubtful, worst first, each once."""
    warnings = _random_warnings(results) + _size_warnings(results) + _grid_warnings(results)
    changed = ", ".join(
        f"{key} {old!r} → {new!r}" for key, (old, new) in protocol.deviations.items()
    )
    if changed:
        warnings.append(
            make_warning("not_the_protocol", f"this is not the protocol as shipped: {changed}")
        )
    # Only this project's own models can reconstruct.
    released = [name for name, spec in protocol.models.items() if spec.generator != "own"]
    if "vae" in protocol.controls and set(released) - set(protocol.leave_out):
        message = "no reconstruction ceiling of a released model, whose autoencoder is its own"
        warnings.append(make_warning("no_ceiling", f"{message}: {', '.join(released)}"))
    for name in protocol.leave_out:
        warnings.append(
            make_warning("left_out", f"the rows of {name} were left out, as configured")
        )
    warnings += _failure_warnings(results)
    # Last, since a sentence that is covered by a warning above is left out.
    warnings += metric_warnings(_shown_metrics(results), warnings)
    return list({entry["message"]: entry for entry in warnings}.values())


def _shown_metrics(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, results by metric) of all that is shown."""
    for cell in results.get("cells", []):
        metrics = cell["results"]
        if cell["kind"] == "control" and "frechet_distance" in metrics:
            # The line through a control's distances is not shown.
            metrics = metrics | {"frechet_distance": metrics["frechet_distance"] | _NO_LINE}
        yield f"{row_label(cell)}, {cell['encoder']}, {cell['column']}", metrics
    for search in results.get("memorisation", []):
        for key in ("generated", "val_in"):
            sentences = {"fld_gap": {"warnings": search["sets"][key]["warnings"]}}
            yield f"{search['names'][key]}, {search['encoder']}", sentences


def _random_warnings(results: Results) -> Warnings:
    identities = {name: source["identity"] for name, source in results["sources"].items()}
    random_encoders = [
        f"{encoder} ({records[0]['weights']})"
        for encoder, records in results["encoders"].items()
        if any(record.get("random_weights") for record in records)
    ]
    random_training = [
        name for name, identity in identities.items() if identity.get("model_encoder_random")
    ]
    warnings = [
        make_warning(code, f"{message}: {', '.join(named)}")
        for code, message, named in (
            ("random_encoder_weights",
             "encoders with random weights, whose numbers say nothing about image quality",
             random_encoders),
            ("random_training_encoder",
             "made by a model that learned from an encoder with random weights",
             random_training),
        )
        if named
    ]  # fmt: skip
    notes = {name: identity.get("generator_note") for name, identity in identities.items()}
    return warnings + [
        make_warning("untested", f"{name}: {note}") for name, note in notes.items() if note
    ]


def _failure_warnings(results: Results) -> Warnings:
    """What could not be computed, and why, with the first place where that was so."""
    first: dict[tuple[str, str], str] = {}
    for cell in results.get("cells", []):
        for name, reason in cell["results"].get("failed", {}).items():
            place = f"{row_label(cell)}, {cell['encoder']}, {cell['column']}"
            first.setdefault((name, reason), place)
    return [
        make_warning("not_measured", f"{METRICS[name].title}: not measured: {reason} ({place})")
        for (name, reason), place in first.items()
    ]


def _size_warnings(results: Results) -> Warnings:
    warnings = []
    rows_of = {name: source["rows"] for name, source in results["sources"].items()}
    few = [f"{name} ({rows:,})" for name, rows in rows_of.items() if rows < FEW_TILES]
    if few:
        message = "fewer than 1,000 tiles, so that numbers are noisy and biased"
        warnings.append(make_warning("few_tiles", f"{message}: {', '.join(few)}"))
    # The smallest set decides: any comparison with it has a singular covariance.
    rows = min(rows_of.values(), default=0)
    dims = {encoder: records[0]["dim"] for encoder, records in results["encoders"].items()}
    wide = [f"{encoder} ({dim})" for encoder, dim in dims.items() if dim >= rows]
    if wide:
        warnings.append(
            make_warning(
                "fewer_tiles_than_dimensions",
                f"{rows:,} tiles are no more than the feature dimensions of {', '.join(wide)} "
                "(n <= d): the covariance is singular, Fréchet distances are mostly the bias of "
                "small samples",
            )
        )
    return warnings


def _grid_warnings(results: Results) -> Warnings:
    """One warning of all comparisons without views where only one side has an 8 x 8 grid."""
    sources, named = results["sources"], {}
    for cell in results.get("cells", []):
        # A view resamples the pixels, and with them the grid.
        if cell["kind"] != "model" or cell["real"]["view"] or cell["generated"]["view"]:
            continue
        real, made = cell["real"]["source"], cell["generated"]["source"]
        if blockiness_warnings({"real": sources[real], "generated": sources[made]}):
            means = {x: sources[x]["tiles"]["blockiness"]["mean"] for x in (made, real)}
            named[made, real] = f"{made} {means[made]:.3f} against {real} {means[real]:.3f}"
    if not named:
        return []
    message = (
        "steps between blocks of 8 x 8 pixels are larger on one side (1 is no grid): it was saved "
        "as JPEG (a slide's own tiles are, too) and the other was not, or a decoder draws a grid; "
        "distances measure that as well"
    )
    return [make_warning("blockiness_mismatch", f"{message}: {'; '.join(named.values())}")]
