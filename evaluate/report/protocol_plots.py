"""A protocol's plots as SVG: the same numbers give the same bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter
from scipy.stats import kendalltau

from common.escape import escape_plot
from common.record import Record
from evaluate.report.plots import COLOURS, INK, MUTED, draw_svg

StepLines = Mapping[str, list[tuple[int, float]]]
"""By solver: (steps, Fréchet distance) in ascending order."""

_GREY = "#aab2bd"


@dataclass(frozen=True)
class ProtocolPlot:
    """A plot: its title (for who cannot see it), its caption, its SVG, whether it is wide."""

    title: str
    caption: str
    svg: bytes
    wide: bool = False


def draw_protocol_plots(results: Record) -> list[ProtocolPlot]:
    """The plots that the protocol lists and has numbers for."""
    makers: dict[str, Callable[[Record], list[ProtocolPlot]]] = {
        "steps": steps_plots,
        "infinity": infinity_plots,
        "cosine": cosine_plots,
        "groups": group_plots,
        "scenarios": scenario_plots,
        "concordance": concordance_plots,
    }
    names = results.part("config").texts("plots")
    return [plot for name in names if name in makers for plot in makers[name](results)]


def _cells_with(results: Record, metric: str, *kinds: str) -> list[Record]:
    """The cells of these kinds that have a result of the metric."""
    cells = results.parts("cells")
    return [cell for cell in cells if cell["kind"] in kinds and cell.part("results").get(metric)]


def _by_column(cells: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """The title of each column (encoder and set) and its cells, in the order of the cells."""
    columns: dict[str, list[Record]] = {}
    for cell in cells:
        columns.setdefault(_column_title(cell), []).append(cell)
    yield from columns.items()


def _column_title(cell: Record) -> str:
    return f"{cell['encoder']}, {cell['column']}"


def _frechet_result(cell: Record) -> Record:
    return cell.part("results").part("frechet_distance")


def _reference_value(
    results: Record, column: str, kind: str, metric: str, key: str
) -> float | None:
    """A number of the first cell of a column that is of this kind of row or control."""
    for cell in results.parts("cells"):
        result = cell.part("results").part(metric)
        if _column_title(cell) == column and result and kind in (cell["kind"], cell["control"]):
            return result.number(key)
    return None


def _row_name(cell: Record) -> str:
    point = ", ".join(str(value) for value in cell.part("point").values())
    return f"{cell['label']} {point}".strip()


def steps_plots(results: Record) -> list[ProtocolPlot]:
    """FD against solver steps, a line per solver, with an inset at the largest number of steps."""
    cells = [
        cell
        for cell in _cells_with(results, "frechet_distance", "model")
        if "steps" in cell.part("point")
    ]
    caption = (
        "Fréchet distance of unconditional images by number of steps. Inset: the right end, "
        "enlarged. Dashed: real guidance tiles against the same reference."
    )
    plots = []
    for title, column_cells in _by_column(cells):
        lines: dict[str, list[tuple[int, float]]] = {}
        for cell in column_cells:
            point = cell.part("point")
            values = (point.count("steps"), _frechet_result(cell).number("value"))
            lines.setdefault(point.text("solver", ""), []).append(values)
        lines = {solver: sorted(points) for solver, points in lines.items()}
        # Real tiles against the same set: what the best sampler could reach.
        reference = _reference_value(results, title, "reference", "frechet_distance", "value")
        svg = draw_svg(
            partial(_draw_steps, lines=lines, reference=reference, title=title), wide=True
        )
        plots.append(
            ProtocolPlot(f"Fréchet distance against steps: {title}", caption, svg, wide=True)
        )
    return plots


def _draw_steps(axes: Axes, lines: StepLines, reference: float | None, title: str) -> None:
    _draw_step_lines(axes, lines)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linestyle="--", linewidth=1, label="guidance tiles")
    ticks = sorted({steps for points in lines.values() for steps, _ in points})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(title=escape_plot(title), xlabel="solver steps", ylabel="Fréchet distance")
    low, high = axes.get_ylim()
    if len(ticks) > 3:
        # Room above the lines for the inset and the legend.
        axes.set_ylim(low, high + 0.95 * (high - low))
        _draw_inset(axes, lines, ticks[len(ticks) // 2])
    axes.legend(loc="upper left")


def _draw_step_lines(axes: Axes, lines: StepLines) -> None:
    for colour, (solver, points) in zip(COLOURS, lines.items(), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            "o-",
            color=colour,
            markersize=4,
            label=escape_plot(solver.upper() or "FD"),
        )


def _draw_inset(axes: Axes, lines: StepLines, least_steps: int) -> None:
    """The lines from so many steps on, in a frame in the upper right corner."""
    shown = {
        solver: [point for point in points if point[0] >= least_steps]
        for solver, points in lines.items()
    }
    frame = axes.inset_axes((0.5, 0.6, 0.48, 0.37))
    _draw_step_lines(frame, {solver: points for solver, points in shown.items() if points})
    frame.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    frame.yaxis.set_major_locator(MaxNLocator(3))
    frame.tick_params(labelsize=7)
    for spine in frame.spines.values():
        spine.set_visible(True)


def infinity_plots(results: Record) -> list[ProtocolPlot]:
    """FD against 1/N with the line whose intercept is FD at infinitely many images."""
    cells = _cells_with(results, "frechet_distance", "model")
    caption = (
        "Fréchet distance of subsets of N images against 1/N; the line meets the axis at the "
        "distance without the bias of a finite set."
    )
    return [
        ProtocolPlot(
            f"Fréchet distance against 1/N: {title}",
            caption,
            draw_svg(partial(_draw_infinity, cells=column_cells[:4], title=title)),
        )
        # Four lines are as many as the colours, and as a reader can tell apart.
        for title, column_cells in _by_column(
            [c for c in cells if _frechet_result(c).part("infinity")]
        )
    ]


def _draw_infinity(axes: Axes, cells: Sequence[Record], title: str) -> None:
    for colour, cell in zip(COLOURS, cells, strict=False):
        line = _frechet_result(cell).part("infinity")
        inverse = 1 / np.array(line.numbers("sizes"), float)
        axes.plot(inverse, line.numbers("values"), "o", color=colour, markersize=3.5)
        # The line is drawn to 1/N = 0, where its value is read.
        ends, intercept = np.array([0.0, inverse.max()]), line.number("value")
        name = _row_name(cell) if len(cells) > 1 else "intercept"
        label = escape_plot(f"{name}: {intercept:.4g}")
        axes.plot(ends, intercept + line.number("slope") * ends, color=colour, label=label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
    axes.set(title=escape_plot(title), xlabel="1 / N", ylabel="Fréchet distance")
    axes.legend(loc="upper left")


def cosine_plots(results: Record) -> list[ProtocolPlot]:
    """Cosines to the sources with the null and two ceilings: the VAE's and a tile of the slide."""
    caption = (
        "Cosines of generated tiles to the tiles that guided them. What the model keeps of "
        "its source is between the shuffled pairing and the reconstruction."
    )
    plots = []
    for title, cells in _by_column(_cells_with(results, "cosine_similarity", "model")):
        # Only the first row is drawn: more histograms would hide the ceilings.
        cosine = cells[0].part("results").part("cosine_similarity")
        lines = {"own source": cosine.number("mean"), "shuffled": cosine.number("null_mean")}
        for name, control in (("VAE reconstruction", "vae"), ("same slide", "neighbour")):
            value = _reference_value(results, title, control, "cosine_similarity", "mean")
            lines |= {} if value is None else {name: value}
        svg = draw_svg(
            partial(_draw_cosine, histogram=cosine.part("histogram"), lines=lines, title=title)
        )
        plots.append(ProtocolPlot(f"Cosine to the source: {title}", caption, svg))
    return plots


def _draw_cosine(axes: Axes, histogram: Record, lines: Mapping[str, float], title: str) -> None:
    edges, counts = (np.array(histogram.numbers(key)) for key in ("edges", "counts"))
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=COLOURS[0], alpha=0.5)
    styles = ("-", "--", ":", "-.")
    for colour, style, (name, value) in zip(COLOURS, styles, lines.items(), strict=False):
        label = f"{name} {value:.3f}"
        axes.axvline(value, color=colour, linestyle=style, linewidth=1.8, label=label)
    low = min(edges[:-1][counts > 0].min(), *lines.values())
    axes.set_xlim(low - 0.03, 1.02)
    axes.set_ylim(0, 1.45 * max(counts.max(), 1))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set(title=escape_plot(title), xlabel="cosine similarity", ylabel="tiles")
    # On white: the lines run up behind it.
    axes.legend(
        loc="upper left", ncols=2, fontsize=7.5, frameon=True, framealpha=1, edgecolor="white"
    )


def group_plots(results: Record) -> list[ProtocolPlot]:
    """FD of each project and of the largest sites, over the closed-form floor of its size."""
    plots = []
    for column, cells in _by_column(_cells_with(results, "groups", "model")):
        by_kind = cells[0].part("results").part("groups")
        for kind in by_kind:
            # More bars than this are not legible on the page.
            groups = by_kind.parts(kind)[:24]
            if len(groups) < 2:
                continue
            title = f"by {kind}: {column}"
            caption = (
                f"Fréchet distance within each {kind}, largest groups first. Grey: what two sets "
                "of these sizes would show by chance."
            )
            svg = draw_svg(
                partial(_draw_groups, groups=groups, title=title), height=1.1 + 0.22 * len(groups)
            )
            plots.append(ProtocolPlot(f"Fréchet distance {title}", caption, svg))
    return plots


def _draw_groups(axes: Axes, groups: Sequence[Record], title: str) -> None:
    names = [f"{group['group']} ({group.count('n_real'):,})" for group in groups]
    for key, colour in (("value", COLOURS[0]), ("noise_floor", _GREY)):
        values = [group.number(key) for group in groups]
        axes.barh(np.arange(len(groups)), values, color=colour, height=0.62)
    _label_bars(axes, names, title)


def _label_bars(axes: Axes, names: list[str], title: str) -> None:
    axes.set_yticks(np.arange(len(names)), list(map(escape_plot, names)), fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title=escape_plot(title), xlabel="Fréchet distance")


def scenario_plots(results: Record) -> list[ProtocolPlot]:
    """FD of every row of a table as bars: the ablations side by side."""
    caption = (
        "Fréchet distance by scenario; light bars are real tiles. Dotted: real halves against "
        "each other, with half as many tiles."
    )
    plots = []
    cells = _cells_with(results, "frechet_distance", "model", "reference")
    for title, column_cells in _by_column(cells):
        # What two sets of real tiles show by chance.
        floor = _reference_value(results, title, "floor-tile", "frechet_distance", "value")
        svg = draw_svg(
            partial(_draw_scenarios, cells=column_cells, floor=floor, title=title),
            wide=True, height=1.2 + 0.26 * len(column_cells),
        )  # fmt: skip
        plots.append(ProtocolPlot(f"Scenarios: {title}", caption, svg, wide=True))
    return plots


def _draw_scenarios(axes: Axes, cells: Sequence[Record], floor: float | None, title: str) -> None:
    values = [_frechet_result(cell).number("value") for cell in cells]
    colours = [COLOURS[0] if cell["kind"] == "model" else _GREY for cell in cells]
    axes.barh(np.arange(len(cells)), values, color=colours, height=0.66)
    _label_bars(axes, [_row_name(cell) for cell in cells], title)
    if floor is not None:
        axes.axvline(floor, color=COLOURS[1], linestyle=":", linewidth=1.5)


def concordance_plots(results: Record) -> list[ProtocolPlot]:
    """Kendall's tau, from -1 to 1, between encoders: do they rank the rows alike?"""
    by_encoder: dict[str, dict[tuple[str, str], float]] = {}
    ranking = {cell["encoder"] for cell in _cells_with(results, "frechet_distance", "model")}
    for cell in _cells_with(results, "frechet_distance", "model", "reference", "control"):
        # An encoder of cosines alone has distances of controls, and no rows to rank.
        if cell["encoder"] in ranking and cell["control"] != "neighbour":
            row = (_row_name(cell), cell.text("column"))
            by_encoder.setdefault(cell.text("encoder"), {})[row] = _frechet_result(cell).number(
                "value"
            )
    shared = sorted(set.intersection(*map(set, by_encoder.values()))) if by_encoder else []
    if len(by_encoder) < 2 or len(shared) < 3:
        return []
    # Only rows that every encoder has measured can be ranked alike.
    ranks = [[values[row] for row in shared] for values in by_encoder.values()]
    matrix = np.array([[float(kendalltau(a, b).statistic) for b in ranks] for a in ranks])
    svg = draw_svg(partial(_draw_matrix, names=list(by_encoder), matrix=matrix))
    caption = (
        f"Kendall’s τ of the Fréchet distances of {len(shared)} rows, controls among them: 1 is "
        "the same order, 0 none, −1 the reverse."
    )
    return [ProtocolPlot("Do the encoders agree?", caption, svg)]


def _draw_matrix(axes: Axes, names: list[str], matrix: npt.NDArray[np.float64]) -> None:
    axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    names = list(map(escape_plot, names))
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(visible=False)
    for (i, j), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.6 else INK
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_title("Rank concordance of encoders")


def draw_ratios(search: Record) -> bytes:
    """SVG of the histograms of d(nearest) / d(second), generated and unseen real tiles, as shares.

    `search` is an entry of `memorisation`.
    """
    names, encoder = search.part("names"), search.text("encoder")
    labels = {"generated": "generated", "val_in": names.text("val_in"),
              "val_out": names.text("val_out")}  # fmt: skip

    def draw_histograms(axes: Axes) -> None:
        lowest = 1.0
        for colour, (key, label) in zip(COLOURS, labels.items(), strict=False):
            histogram = search.part("sets").part(key).part("ratio_histogram")
            edges, counts = (np.array(histogram.numbers(name)) for name in ("edges", "counts"))
            # Shares, since the sets differ in size.
            shares = counts / max(counts.sum(), 1)
            axes.stairs(shares, edges, color=colour, label=escape_plot(label), linewidth=1.6)
            lowest = min(lowest, edges[np.flatnonzero(counts)[0]])
        axes.set_xlim(max(0.0, lowest - 0.05), 1.0)
        axes.set_title(escape_plot(encoder))
        axes.set_xlabel("distance to the nearest / to the second nearest training tile")
        axes.set_ylabel("share of tiles")
        axes.legend(loc="upper left")

    return draw_svg(draw_histograms)
