"""What makes a protocol's numbers doubtful: warnings with stable codes, worst first."""

from collections.abc import Iterator
from typing import Any

from evaluate.compare.results import warning
from evaluate.compare.warnings import FEW_TILES, blockiness_warnings, metric_warnings
from evaluate.protocols.config import Protocol
from evaluate.protocols.tables import row_label

_NO_LINE = {"infinity": None}


def cautions(protocol: Protocol, results: dict[str, Any]) -> list[dict[str, str]]:
    """What makes the numbers doubtful, worst first, each once."""
    found = _random_warnings(results) + _size_warnings(results)
    found += _grid_warnings(results)
    if protocol.deviations:
        changed = ", ".join(
            f"{key} {old!r} → {new!r}" for key, (old, new) in protocol.deviations.items()
        )
        found.append(warning("not_the_protocol", f"this is not the protocol as shipped: {changed}"))
    others = [name for name, one in protocol.models.items() if one.generator != "own"]
    if "vae" in protocol.controls and set(others) - set(protocol.leave_out):
        message = "no reconstruction ceiling of a released model, whose autoencoder is its own"
        found.append(warning("no_ceiling", f"{message}: {', '.join(others)}"))
    for name in protocol.leave_out:
        found.append(warning("left_out", f"the rows of {name} were left out, as was asked"))
    found += metric_warnings(_measured(results), found)
    return list({one["message"]: one for one in found}.values())


def _measured(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _random_warnings(results: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    random = [
        f"{encoder} ({records[0]['weights']})"
        for encoder, records in results["encoders"].items()
        if any(record.get("random_weights") for record in records)
    ]
    if random:
        message = "encoders with random weights, whose numbers say nothing about image quality"
        found.append(warning("random_encoder_weights", f"{message}: {', '.join(random)}"))
    made = {name: one["identity"] for name, one in results["sources"].items()}
    taught = [name for name, identity in made.items() if identity.get("model_encoder_random")]
    if taught:
        message = "made by a model that learned from an encoder with random weights"
        found.append(warning("random_training_encoder", f"{message}: {', '.join(taught)}"))
    for name, identity in made.items():
        if identity.get("generator_note"):
            found.append(warning("untested", f"{name}: {identity['generator_note']}"))
    return found


def _size_warnings(results: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    few = {n: one["rows"] for n, one in results["sources"].items() if one["rows"] < FEW_TILES}
    if few:
        named = ", ".join(f"{name} ({rows:,})" for name, rows in few.items())
        message = "fewer than 1,000 tiles, so that numbers are noisy and biased"
        found.append(warning("few_tiles", f"{message}: {named}"))
    rows = min((one["rows"] for one in results["sources"].values()), default=0)
    wide = {e: r[0]["dim"] for e, r in results["encoders"].items() if r[0]["dim"] >= rows}
    if wide:
        named = ", ".join(f"{encoder} ({dim})" for encoder, dim in wide.items())
        found.append(
            warning(
                "fewer_tiles_than_dimensions",
                f"{rows:,} tiles are no more than the feature dimensions of {named} (n <= d): the "
                "covariance is singular, Fréchet distances are mostly the bias of small samples",
            )
        )
    return found


def _grid_warnings(results: dict[str, Any]) -> list[dict[str, str]]:
    """One warning of all plain comparisons where only one side bears an 8 x 8 grid."""
    sources, named = results["sources"], {}
    for cell in results.get("cells", []):
        if cell["kind"] != "model" or cell["real"]["view"] or cell["generated"]["view"]:
            continue
        real, made = cell["real"]["source"], cell["generated"]["source"]
        if blockiness_warnings({"real": sources[real], "generated": sources[made]}):
            one, other = (sources[x]["tiles"]["blockiness"]["mean"] for x in (made, real))
            named[made, real] = f"{made} {one:.3f} against {real} {other:.3f}"
    if not named:
        return []
    message = (
        "steps between blocks of 8 x 8 pixels are larger on one side (1 is no grid): it was saved "
        "as JPEG (a slide's own tiles are, too) and the other was not, or a decoder draws a grid; "
        "distances measure that as well"
    )
    return [warning("blockiness_mismatch", f"{message}: {'; '.join(named.values())}")]
