"""What a protocol writes next to results.json: the page, and its tables as Markdown and LaTeX."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from common.files import write_files
from common.record import Record
from common.text import format_number
from evaluate.report.levels import VOIDING, with_levels
from evaluate.report.protocol_plots import draw_protocol_plots, draw_ratios
from evaluate.report.protocol_text import (
    counts_text,
    deviations_text,
    entry_text,
    published_note,
    published_text,
    row_entries,
    tables_as_latex,
    tables_as_markdown,
)
from evaluate.report.protocol_tiles import read_grids, read_suspects
from evaluate.report.template import render_template
from model.sampler_settings import FIELD_OF_OPTION

_SUSPECTS = 8
_DANGERS = VOIDING | {"blockiness_mismatch": "A grid of 8 × 8 pixels on one side only"}
_SAMPLER = (*FIELD_OF_OPTION.values(), "seed", "micro_batch", "compute_dtype")


def write_protocol_files(
    results: Mapping[str, object], folder: Path, page: Path | None = None
) -> list[Path]:
    """Write report.html (or `page`), tables.md and tables.tex; returns what was written."""
    files = protocol_files(results, folder, page)
    write_files(files)
    return list(files)


def protocol_files(
    results: Mapping[str, object], folder: Path, page: Path | None = None
) -> dict[Path, bytes]:
    """What `write_protocol_files` writes: the bytes by path."""
    record = Record(results, "results.json")
    files = {page or folder / "report.html": render_protocol(results)}
    if results.get("tables"):
        files |= {
            folder / "tables.md": tables_as_markdown(record),
            folder / "tables.tex": tables_as_latex(record),
        }
    return {path: text.encode() for path, text in files.items()}


def render_protocol(results: Mapping[str, object]) -> str:
    """The page as one HTML string: styles and images inside, no address outside."""
    record = Record(results, "results.json")
    tables = record.parts("tables")
    suspects = min(_SUSPECTS, record.part("config").count("top"))
    return render_template(
        "protocol.html.j2",
        results=record,
        warnings=with_levels(record.parts("warnings"), _DANGERS),
        # Encoders are spanning heads over their sets.
        tables=[
            (table, Counter(column.text("encoder") for column in table.parts("columns")))
            for table in tables
        ],
        plots=draw_protocol_plots(record),
        searches=[
            {
                "found": search,
                "plot": draw_ratios(search),
                "by_ratio": read_suspects(record, search, "ratio", suspects),
                "by_score": read_suspects(record, search, "score", suspects),
            }
            for search in record.parts("memorisation")
        ],
        grids=read_grids(record, record.part("config").count("tiles")),
        card=protocol_card(record),
        format_number=format_number,
        entry_text=entry_text,
        row_entries=row_entries,
        published_text=published_text,
        deviations_text=deviations_text,
        published_note=published_note,
        counts_text=counts_text,
    )


def protocol_card(results: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """The run card: (name, value) pairs by section: each source, each encoder, the machine."""
    sources, encoders = results.part("sources"), results.part("encoders")
    settings, machine = results.part("config").part("settings"), results.part("hardware")
    gpu = machine.get("gpu") or "no GPU"
    return [
        (
            "Protocol",
            [
                ("Name", results.text("protocol")),
                ("Configuration", results.text("config_sha256")[:16]),
                ("Metrics", _join_items(settings)),
            ],
        ),
        *((name, _source_card(sources.part(name))) for name in sources),
        *((name, _encoder_card(encoders.parts(name))) for name in encoders),
        (
            "Machine",
            [
                ("Hardware", f"{machine.get('cpu_count')} CPU cores, {gpu}"),
                ("Software", _join_items(results.part("versions"))),
                ("Seconds", format_number(results["seconds"])),
            ],
        ),
    ]


def _join_items(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _source_card(source: Record) -> list[tuple[str, str]]:
    tiles, identity = source.part("tiles"), source.part("identity")
    is_real = source["kind"] == "real"
    slides = f" of {source.count('slides'):,} slide(s)" if is_real else ""
    rows = [
        ("Tiles", f"{source.count('rows'):,}{slides}, {source['tile_px']} px"),
        ("Dataset", f"{source['dataset']}, selection “{source['selection']}”"),
        ("Selection", source.text("selection_sha256")[:16]),
        ("Codec, rounding", f"{tiles['codec']}, {tiles['rounding'] or 'from the slide'}"),
        ("Files", tiles.text("files_sha256", "gone")[:16]),
        ("Pixels", tiles.text("pixels_sha256", "gone")[:16]),
        ("Blockiness", format_number(tiles.part("blockiness").optional("mean"))),
    ]
    # A real set was made by no model.
    if is_real:
        return rows
    view = identity.get("guidance_view")
    return [
        *rows,
        ("Model", str(identity.get("model_sha256"))[:16]),
        ("Sampler", _join_items({key: identity[key] for key in _SAMPLER if key in identity})),
        ("Guidance", (source.text("guidance") or "none") + (f" through {view}" if view else "")),
    ]


def _encoder_card(records: list[Record]) -> list[tuple[str, str]]:
    first = records[0]
    views = sorted({f"{record['view'] or 'plain'} at {record['tile_px']} px" for record in records})
    random = " (RANDOM)" if first.get("random_weights") else ""
    return [
        ("Weights", f"{first['weights']}{random}, {first.text('weights_sha256')[:16]}"),
        ("Feature", f"{first['dim']} values, {first['compute_dtype']}"),
        ("Input", f"{first['input_px']} px, resize {first['resize'] or 'none'}"),
        ("Seen", ", ".join(views)),
    ]
