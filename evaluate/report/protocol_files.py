"""What a protocol leaves beside results.json: the page, and its tables as Markdown and LaTeX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from evaluate.report.images import data_uri, png
from evaluate.report.numbers import show
from evaluate.report.protocol_plots import plots, ratio_plot
from evaluate.report.protocol_text import counts_text, entry_text, latex, markdown
from evaluate.report.protocol_tiles import grids, suspects
from evaluate.report.template import style, template

_SUSPECTS = 8
_DANGERS = {
    "random_encoder_weights": "These numbers mean nothing",
    "random_training_encoder": "This model means nothing",
    "blockiness_mismatch": "A grid of 8 × 8 pixels on one side only",
}


def write_protocol_files(
    results: Mapping[str, Any], folder: Path, page: Path | None = None
) -> list[Path]:
    """Write report.html (or `page`), tables.md and tables.tex; returns what was written."""
    files = {page or folder / "report.html": render(results)}
    if results.get("tables"):
        files |= {folder / "tables.md": markdown(results), folder / "tables.tex": latex(results)}
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another") from error
    return list(files)


def render(results: Mapping[str, Any]) -> str:
    """The page as one HTML string: styles and images inside, no address outside."""
    return template("protocol.html.j2").render(
        style=style(),
        results=results,
        warnings=_levelled(results["warnings"]),
        tables=[_headed(table) for table in results.get("tables", [])],
        plots=plots(results),
        searches=_searches(results),
        grids=grids(results, int(results["config"]["tiles"])),
        card=run_card(results),
        show=show,
        entry_text=entry_text,
        counts_text=counts_text,
        svg_uri=lambda data: data_uri(data, "image/svg+xml"),
        tile_uri=lambda tile: data_uri(png(tile), "image/png"),
    )


def _levelled(warnings: list[dict[str, str]]) -> list[dict[str, str]]:
    found = [
        {
            **one,
            "level": "danger" if one["code"] in _DANGERS else "caution",
            "title": _DANGERS.get(one["code"], "Read with care"),
        }
        for one in warnings
    ]
    return sorted(found, key=lambda one: one["level"] != "danger")


def _headed(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the encoders as spanning heads over their sets."""
    encoders: dict[str, int] = {}
    for one in table["columns"]:
        encoders[one["encoder"]] = encoders.get(one["encoder"], 0) + 1
    return {**table, "encoders": encoders}


def _searches(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    count = min(_SUSPECTS, int(results["config"]["top"]))
    return [
        {
            "found": found,
            "plot": ratio_plot(found),
            "by_ratio": suspects(results, found, "ratio", count),
            "by_score": suspects(results, found, "score", count),
        }
        for found in results.get("memorisation", [])
    ]


_SAMPLER = ("solver", "steps", "guidance_scale", "guidance_low", "guidance_high", "seed",
            "micro_batch", "compute_dtype")  # fmt: skip


def run_card(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The run card: a section a source, an encoder, and the machine; name and value pairs."""
    found = [("Protocol", _protocol_card(results))]
    found += [(name, _source_card(one)) for name, one in results["sources"].items()]
    for name, records in results["encoders"].items():
        found.append((name, _encoder_card(records)))
    machine = results["hardware"]
    versions = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    gpu = machine.get("gpu") or "no GPU"
    found.append(
        ("Machine", [("Hardware", f"{machine.get('cpu_count')} CPU cores, {gpu}"),
                     ("Software", versions), ("Seconds", show(results["seconds"]))])
    )  # fmt: skip
    return found


def _protocol_card(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = results["config"]["settings"]
    return [
        ("Name", results["protocol"]),
        ("Configuration", results["config_sha256"][:16]),
        ("Metrics", ", ".join(f"{key} {value}" for key, value in settings.items())),
    ]


def _source_card(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles, identity = one["tiles"], one["identity"]
    slides = "" if one["kind"] != "real" else f" of {one['slides']:,} slide(s)"
    rows = [
        ("Tiles", f"{one['rows']:,}{slides}, {one['tile_px']} px"),
        ("Dataset", f"{one['dataset']}, selection “{one['selection']}”"),
        ("Selection", one["selection_sha256"][:16]),
        ("Codec, rounding", f"{tiles['codec']}, {tiles['rounding'] or 'from the slide'}"),
        ("Files", str(tiles["files_sha256"] or "gone")[:16]),
        ("Pixels", str(tiles["pixels_sha256"] or "gone")[:16]),
        ("Blockiness", show((tiles["blockiness"] or {}).get("mean"))),
    ]
    if one["kind"] != "real":
        sampler = ", ".join(f"{key} {identity[key]}" for key in _SAMPLER if key in identity)
        view = identity.get("guidance_view")
        rows += [
            ("Model", str(identity.get("model_sha256"))[:16]),
            ("Sampler", sampler),
            ("Guidance", (one["guidance"] or "none") + (f" through {view}" if view else "")),
        ]
    return rows


def _encoder_card(records: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    first = records[0]
    views = sorted({f"{record['view'] or 'plain'} at {record['tile_px']} px" for record in records})
    random = " (RANDOM)" if first.get("random_weights") else ""
    return [
        ("Weights", f"{first['weights']}{random}, {str(first['weights_sha256'])[:16]}"),
        ("Feature", f"{first['dim']} values, {first['compute_dtype']}"),
        ("Input", f"{first['input_px']} px, resize {first['resize'] or 'none'}"),
        ("Seen", ", ".join(views)),
    ]
