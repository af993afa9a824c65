"""The three figures: which tiles stand in which row and column."""

from common.errors import UserError
from evaluate.figures.layout import Sheet
from evaluate.figures.tiles import Synthetic, Tile


def grid_sheet(made: Synthetic, rows: int, columns: int) -> Sheet:
    """Figure 1: generated tiles in the order of their indices, `columns` a row."""
    if made.images < columns:
        raise UserError(
            f"{made.dataset.root} has {made.images} images, a row needs {columns}; give --columns"
        )
    rows = min(rows, made.images // columns)
    tiles = [[made.tile(row * columns + c) for c in range(columns)] for row in range(rows)]
    return Sheet(tiles, [""] * columns)


def variations_sheet(made: Synthetic, rows: int, variations: int) -> Sheet:
    """Figure 2: a real tile and images that it guided, a row each."""
    if made.variations < variations:
        raise UserError(
            f"{made.dataset.root} has {made.variations} images a tile, not {variations}; "
            "generate with more --variations, or give this command fewer"
        )
    rows = min(rows, made.conditions)
    if not rows:
        raise UserError(f"{made.dataset.root} has no tile with all its {made.variations} images")
    tiles = [
        [made.reference(row), *(made.variation(row, number) for number in range(variations))]
        for row in range(rows)
    ]
    titles = ["real", *(f"generated {number + 1}" for number in range(variations))]
    return Sheet(tiles, titles, frozenset([0]))


def interpolation_sheet(made: Synthetic, rows: int) -> Sheet:
    """Figure 3: between two real tiles, the images at each factor; a row a pair and variation."""
    pairs: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for condition in range(made.conditions):
        ends = made.ends(condition)
        if ends is not None:
            pairs.setdefault(ends[0], []).append((ends[1], condition))
    if not pairs:
        raise UserError(
            f"{made.dataset.root} holds no interpolation; make one with "
            "`python -m evaluate generate --interpolate A B`"
        )
    factors = [factor for factor, _ in next(iter(pairs.values()))]
    whole = {pair: found for pair, found in pairs.items() if len(found) == len(factors)}
    tiles: list[list[Tile]] = []
    for (first, second), found in whole.items():
        for number in range(made.variations):
            between = [made.variation(condition, number) for _, condition in found]
            tiles.append([made.reference_tile(first), *between, made.reference_tile(second)])
    titles = ["real", *(f"{factor:g}" for factor in factors), "real"]
    return Sheet(tiles[:rows], titles, frozenset([0, len(factors) + 1]))
