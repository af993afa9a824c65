"""The three figures: which tiles are in which row and column."""

from collections.abc import Callable

from common.errors import UserError
from evaluate.figures.layout import Sheet
from evaluate.figures.tiles import GeneratedTiles, Tile


def grid_sheet(made: GeneratedTiles, rows: int, columns: int) -> Sheet:
    """Figure 1: generated tiles in the order of their indices, `columns` per row."""
    if made.images < columns:
        raise UserError(
            f"{made.dataset.root} has {made.images} images, a row needs {columns}; give --columns"
        )
    rows = min(rows, made.images // columns)
    tiles = [[made.read_tile(row * columns + c) for c in range(columns)] for row in range(rows)]
    return Sheet(tiles, [""] * columns)


def variations_sheet(
    made: GeneratedTiles,
    rows: int,
    variations: int,
    reconstruct: Callable[[Tile], Tile] | None = None,
) -> Sheet:
    """Figure 2: a real tile and images that it guided, one row per condition.

    With `reconstruct` what the model's autoencoder makes of the real tile is beside it: the best
    that the model could draw.
    """
    if made.variations < variations:
        raise UserError(
            f"{made.dataset.root} has {made.variations} images per tile, not {variations}; "
            "generate with more --variations, or give this command fewer"
        )
    # A dataset cut short by --limit draws the rows that it has.
    rows = min(rows, made.condition_count)
    if not rows:
        raise UserError(f"{made.dataset.root} has no tile with all its {made.variations} images")
    tiles: list[list[Tile]] = []
    for row in range(rows):
        real = made.read_reference(row)
        left = [real] if reconstruct is None else [real, reconstruct(real)]
        tiles.append([*left, *(made.read_variation(row, number) for number in range(variations))])
    left_titles = ["real"] if reconstruct is None else ["real", "reconstructed"]
    titles = [*left_titles, *(f"generated {number + 1}" for number in range(variations))]
    return Sheet(tiles, titles, frozenset(range(len(left_titles))))


def interpolation_sheet(made: GeneratedTiles, rows: int) -> Sheet:
    """Figure 3: between two real tiles, the images at each factor; rows are pairs, variations."""
    pairs: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for condition in range(made.condition_count):
        ends = made.interpolation_ends(condition)
        if ends is not None:
            pair, factor = ends
            pairs.setdefault(pair, []).append((factor, condition))
    if not pairs:
        raise UserError(
            f"{made.dataset.root} contains no interpolation; make one with "
            "`python -m evaluate generate --interpolate A B`"
        )
    factors = [factor for factor, _ in next(iter(pairs.values()))]
    tiles: list[list[Tile]] = []
    for (first, second), points in pairs.items():
        if len(points) != len(factors):
            continue  # --limit may have cut the last pair short
        for number in range(made.variations):
            between = [made.read_variation(condition, number) for _, condition in points]
            tiles.append(
                [made.read_reference_tile(first), *between, made.read_reference_tile(second)]
            )
    titles = ["real", *(f"{factor:g}" for factor in factors), "real"]
    return Sheet(tiles[:rows], titles, frozenset([0, len(factors) + 1]))
