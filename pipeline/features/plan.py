"""What caching would cost: files, bytes and hours, from sizes that are known and measured rates."""

from dataclasses import dataclass

from rich.table import Table

from common.console import print_line, stdout
from common.text import format_bytes, format_seconds
from pipeline.dataset import BLOCK_ROWS, Dataset, Entry, read_journal
from pipeline.features.config import STAGE, CacheConfig

_FILE_OVERHEAD = 4_000
_BLOCK_OVERHEAD = {"cls": 300, "tokens": 250}
"""Bytes of overhead: a footer, and a page header and its description for every block."""
_H0_MINI_GFLOP, _STEP_GFLOP = 47.1, 2890.0
"""Per tile: a forward pass of H0-mini, and a whole training step of SiT-XL/2 and VAE with it."""


@dataclass(frozen=True)
class Rate:
    """Tiles per second of one worker, and where the figure is from."""

    tiles_per_s: float
    source: str


def bytes_per_tile(kind: str, dim: int, tokens_shape: tuple[int, int]) -> int:
    """Bytes that a tile's features take, without Parquet's overhead.

    >>> bytes_per_tile("cls", 768, (196, 768)), bytes_per_tile("tokens-int8", 768, (196, 768))
    (3076, 150920)
    """
    count, width = tokens_shape
    return {
        "cls": 4 * dim + 4,
        "tokens-float16": 2 * count * width,
        "tokens-int8": count * width + 2 * count,
    }[kind]


def stored_bytes(kind: str, tiles: int, files: int, dim: int, tokens_shape: tuple[int, int]) -> int:
    """Bytes on disk of that many tiles' features in that many files.

    `dim` and `tokens_shape` [t, d] are those of the encoder.
    """
    blocks = -(-tiles // BLOCK_ROWS)
    overhead = _BLOCK_OVERHEAD["cls" if kind == "cls" else "tokens"]
    return (
        tiles * bytes_per_tile(kind, dim, tokens_shape) + blocks * overhead + files * _FILE_OVERHEAD
    )


def journal_rate(entries: list[Entry], scope: str) -> Rate | None:
    """Tiles per second of one worker over the journal's lines of the scope, or None."""
    done = [e for e in entries if e.scope == scope and e.outcome == "done" and e.seconds > 0]
    tiles = sum(entry.stop - entry.start for entry in done)
    seconds = sum(entry.seconds for entry in done)
    if not tiles or not seconds:
        return None
    return Rate(tiles / seconds, f"measured here on {tiles:,} tiles")


def print_plan(
    dataset: Dataset,
    config: CacheConfig,
    tile_px: int,
    tiles: dict[str, int],
    files: dict[str, int],
    *,
    workers: int,
) -> None:
    """Print what would be written, in bytes, how long it would take, and the way without tokens.

    `tiles` and `files` are counts by kind of features; `tile_px` is the tile side in px.
    """
    from model.encoders import encoder_spec

    spec = encoder_spec(config.encoder)
    shape = (spec.num_tokens, spec.token_dim)
    table = Table("kind", "tiles", "files", "bytes", title=f"cache {config.encoder}: would write")
    for kind in config.kinds:
        size = stored_bytes(kind, tiles[kind], files[kind], spec.dim, shape)
        table.add_row(kind, f"{tiles[kind]:,}", f"{files[kind]:,}", format_bytes(size))
    stdout.print(table)
    # All kinds come from one forward pass per tile, so that the largest count decides.
    most = max(tiles.values(), default=0)
    rate = journal_rate(read_journal(dataset, STAGE), config.scope(tile_px, "cls"))
    if rate is None:
        print_line(
            "cache: no rate is measured yet for this encoder, view and tile size: cache a small "
            "selection first, then ask again"
        )
    else:
        seconds = most / (rate.tiles_per_s * workers)
        print_line(
            f"cache: {format_seconds(seconds)} with {workers} worker{'s' if workers > 1 else ''} "
            f"at {rate.tiles_per_s:.3g} tiles/s each ({rate.source})"
        )
    if any(kind != "cls" for kind in config.kinds) and config.encoder == "h0-mini":
        share = 100 * _H0_MINI_GFLOP / _STEP_GFLOP
        again = f"{format_seconds(most / rate.tiles_per_s)} of one worker" if rate else "that time"
        print_line(
            f"instead of storing tokens, training can compute them (alignment.source=online): "
            f"no bytes, {_H0_MINI_GFLOP:.0f} of {_STEP_GFLOP:,.0f} GFLOP per tile ({share:.1f} % "
            f"of a step's operations), {again} for every epoch"
        )
