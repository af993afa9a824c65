"""A protocol's plots as SVG: the same numbers give the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter
from scipy.stats import kendalltau

from evaluate.report.plots import COLOURS, INK, MUTED, draw_svg

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A plot: its title (for who cannot see it), its caption, its SVG, whether it is a wide one."""

    title: str
    caption: str
    svg: bytes
    wide: bool = False


def plots(results: Mapping[str, Any]) -> list[Drawn]:
    """The plots that the protocol asks for and has numbers for."""
    makers: dict[str, Callable[[Mapping[str, Any]], list[Drawn]]] = {
        "steps": steps_plots,
        "infinity": infinity_plots,
        "cosine": cosine_plots,
        "groups": group_plots,
        "scenarios": scenario_plots,
        "concordance": concordance_plots,
    }
    asked = results["config"]["plots"]
    return [one for name in asked if name in makers for one in makers[name](results)]


def _models(results: Mapping[str, Any], metric: str) -> list[Cell]:
    return [
        cell
        for cell in results.get("cells", [])
        if cell["kind"] == "model" and cell["results"].get(metric)
    ]


def _columns(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell["encoder"], cell["column"]) for cell in cells))


def _of(cells: Sequence[Cell], column: tuple[str, str]) -> list[Cell]:
    return [cell for cell in cells if (cell["encoder"], cell["column"]) == column]


def _level(results: Mapping[str, Any], column: tuple[str, str], kind: str) -> float | None:
    """The Fréchet distance of the reference row of a column, or of its floor by tile."""
    for cell in _of(results.get("cells", []), column):
        frechet = cell["results"].get("frechet_distance")
        if frechet and (cell["kind"] == kind or cell["control"] == kind):
            return float(frechet["value"])
    return None


def steps_plots(results: Mapping[str, Any]) -> list[Drawn]:
    """FD against solver steps, a line a solver, with an inset at the largest number of steps."""
    cells = [c for c in _models(results, "frechet_distance") if "steps" in c["point"]]
    found = []
    for column in _columns(cells):
        mine = _of(cells, column)
        lines = {
            solver: sorted((c["point"]["steps"], c["results"]["frechet_distance"]["value"])
                           for c in mine if c["point"].get("solver", "") == solver)
            for solver in dict.fromkeys(c["point"].get("solver", "") for c in mine)
        }  # fmt: skip
        reference = _level(results, column, "reference")
        title = f"{column[0]}, {column[1]}"
        svg = draw_svg(partial(_steps, lines=lines, reference=reference, title=title), wide=True)
        caption = (
            "Fréchet distance of unconditional images by number of steps. Inset: the right end, "
            "enlarged. Dashed: real guidance tiles against the same reference."
        )
        found.append(Drawn(f"Fréchet distance against steps: {title}", caption, svg, wide=True))
    return found


def _steps(
    axes: Axes, lines: Mapping[str, list[tuple[int, float]]], reference: float | None, title: str
) -> None:
    _step_lines(axes, lines)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linestyle="--", linewidth=1, label="guidance tiles")
    ticks = sorted({steps for points in lines.values() for steps, _ in points})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_title(title)
    axes.set_xlabel("solver steps")
    axes.set_ylabel("Fréchet distance")
    low, high = axes.get_ylim()
    if len(ticks) > 3:
        # Room above the lines for the inset and the legend.
        axes.set_ylim(low, high + 0.95 * (high - low))
        _inset(axes, lines, ticks[len(ticks) // 2 :])
    axes.legend(loc="upper left")


def _step_lines(axes: Axes, lines: Mapping[str, list[tuple[int, float]]]) -> None:
    for colour, (solver, points) in zip(COLOURS, lines.items(), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, "o-", color=colour, markersize=4, label=solver.upper() or "FD")


def _inset(axes: Axes, lines: Mapping[str, list[tuple[int, float]]], ticks: list[int]) -> None:
    """The lines from `ticks` on, in a frame in the upper right corner."""
    kept = {s: [p for p in points if p[0] >= ticks[0]] for s, points in lines.items()}
    kept = {solver: points for solver, points in kept.items() if points}
    if not kept:
        return
    frame = axes.inset_axes((0.5, 0.6, 0.48, 0.37))
    _step_lines(frame, kept)
    frame.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    frame.yaxis.set_major_locator(MaxNLocator(3))
    frame.tick_params(labelsize=7)
    for spine in frame.spines.values():
        spine.set_visible(True)


def infinity_plots(results: Mapping[str, Any]) -> list[Drawn]:
    """FD against 1/N with the line whose intercept is FD at infinitely many images."""
    cells = [
        cell
        for cell in _models(results, "frechet_distance")
        if cell["results"]["frechet_distance"].get("infinity")
    ]
    found = []
    for column in _columns(cells):
        mine = _of(cells, column)[:4]
        title = f"{column[0]}, {column[1]}"
        svg = draw_svg(partial(_infinity, cells=mine, title=title))
        caption = (
            "Fréchet distance of subsets of N images against 1/N; the line meets the axis at the "
            "distance without the bias of a finite set."
        )
        found.append(Drawn(f"Fréchet distance against 1/N: {title}", caption, svg))
    return found


def _infinity(axes: Axes, cells: Sequence[Cell], title: str) -> None:
    for colour, cell in zip(COLOURS, cells, strict=False):
        line = cell["results"]["frechet_distance"]["infinity"]
        inverse = 1 / np.array(line["sizes"], float)
        axes.plot(inverse, line["values"], "o", color=colour, markersize=3.5)
        ends = np.array([0.0, inverse.max()])
        name = _short(cell) if len(cells) > 1 else "intercept"
        label = f"{name}: {line['value']:.4g}"
        axes.plot(ends, line["value"] + line["slope"] * ends, color=colour, label=label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
    axes.set_title(title)
    axes.set_xlabel("1 / N")
    axes.set_ylabel("Fréchet distance")
    axes.legend(loc="upper left")


def _short(cell: Cell) -> str:
    point = ", ".join(str(value) for value in cell["point"].values())
    return f"{cell['label']} {point}".strip()


def cosine_plots(results: Mapping[str, Any]) -> list[Drawn]:
    """Cosines to the sources with the null and two ceilings: the VAE's and a tile of the slide."""
    cells = _models(results, "cosine_similarity")
    found = []
    for column in _columns(cells):
        cell = _of(cells, column)[0]
        others = {
            "VAE reconstruction": _cosine_level(results, column, "vae"),
            "same slide": _cosine_level(results, column, "neighbour"),
        }
        title = f"{column[0]}, {column[1]}"
        svg = draw_svg(partial(_cosine, cell=cell, others=others, title=title))
        caption = (
            "Cosines of generated tiles to the tiles that guided them. What the model keeps of "
            "its source lies between the shuffled pairing and the reconstruction."
        )
        found.append(Drawn(f"Cosine to the source: {title}", caption, svg))
    return found


def _cosine_level(
    results: Mapping[str, Any], column: tuple[str, str], control: str
) -> float | None:
    for cell in _of(results["cells"], column):
        cosine = cell["results"].get("cosine_similarity")
        if cell["control"] == control and cosine:
            return float(cosine["mean"])
    return None


def _cosine(axes: Axes, cell: Cell, others: Mapping[str, float | None], title: str) -> None:
    cosine = cell["results"]["cosine_similarity"]
    edges, counts = (np.array(cosine["histogram"][key]) for key in ("edges", "counts"))
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=COLOURS[0], alpha=0.5)
    lines = {"own source": cosine["mean"], "shuffled": cosine["null_mean"], **others}
    styles = ("-", "--", ":", "-.")
    shown = [(name, value) for name, value in lines.items() if value is not None]
    for colour, style, (name, value) in zip(COLOURS, styles, shown, strict=False):
        axes.axvline(value, color=colour, linestyle=style, linewidth=1.8,
                     label=f"{name} {value:.3f}")  # fmt: skip
    used = edges[:-1][counts > 0]
    low = min(used.min(), *(value for _, value in shown))
    axes.set_xlim(low - 0.03, 1.02)
    axes.set_ylim(0, 1.45 * max(counts.max(), 1))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(title)
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("tiles")
    # On white: the lines run up behind it.
    axes.legend(
        loc="upper left", ncols=2, fontsize=7.5, frameon=True, framealpha=1, edgecolor="white"
    )


def group_plots(results: Mapping[str, Any]) -> list[Drawn]:
    """FD of each project and of the largest sites, over the closed-form floor of its size."""
    found = []
    cells = _models(results, "groups")
    for column in _columns(cells):
        for kind, groups in _of(cells, column)[0]["results"]["groups"].items():
            if len(groups) < 2:
                continue
            title = f"by {kind}: {column[0]}, {column[1]}"
            svg = draw_svg(
                partial(_groups, groups=groups[:24], title=title),
                height=1.1 + 0.22 * min(len(groups), 24),
            )
            caption = (
                f"Fréchet distance within each {kind}, largest groups first. Grey: what two sets "
                "of these sizes would show by chance."
            )
            found.append(Drawn(f"Fréchet distance {title}", caption, svg))
    return found


def _groups(axes: Axes, groups: Sequence[Mapping[str, Any]], title: str) -> None:
    names = [f"{one['group']} ({one['n_real']:,})" for one in groups]
    places = np.arange(len(groups))
    axes.barh(places, [one["value"] for one in groups], color=COLOURS[0], height=0.62)
    axes.barh(places, [one["noise_floor"] for one in groups], color="#aab2bd", height=0.62)
    axes.set_yticks(places, names, fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title(title)
    axes.set_xlabel("Fréchet distance")


def scenario_plots(results: Mapping[str, Any]) -> list[Drawn]:
    """FD of every row of a table as bars: the ablations side by side."""
    found = []
    cells = [
        cell
        for cell in results.get("cells", [])
        if cell["kind"] != "control" and cell["results"].get("frechet_distance")
    ]
    for column in _columns(cells):
        mine = _of(cells, column)
        title = f"{column[0]}, {column[1]}"
        floor = _level(results, column, "floor-tile")
        svg = draw_svg(
            partial(_scenarios, cells=mine, floor=floor, title=title),
            wide=True, height=1.2 + 0.26 * len(mine),
        )  # fmt: skip
        caption = (
            "Fréchet distance by scenario; light bars are real tiles. Dotted: real halves against "
            "each other, with half as many tiles."
        )
        found.append(Drawn(f"Scenarios: {title}", caption, svg, wide=True))
    return found


def _scenarios(axes: Axes, cells: Sequence[Cell], floor: float | None, title: str) -> None:
    places = np.arange(len(cells))
    values = [cell["results"]["frechet_distance"]["value"] for cell in cells]
    colours = [COLOURS[0] if cell["kind"] == "model" else "#aab2bd" for cell in cells]
    axes.barh(places, values, color=colours, height=0.66)
    axes.set_yticks(places, [_short(cell) for cell in cells], fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    if floor is not None:
        axes.axvline(floor, color=COLOURS[1], linestyle=":", linewidth=1.5)
    axes.set_title(title)
    axes.set_xlabel("Fréchet distance")


def concordance_plots(results: Mapping[str, Any]) -> list[Drawn]:
    """Kendall's tau between encoders: do they rank the rows alike?"""
    cells = [
        cell
        for cell in results.get("cells", [])
        if cell["control"] != "neighbour" and cell["results"].get("frechet_distance")
    ]
    encoders = list(dict.fromkeys(cell["encoder"] for cell in cells))
    tables = {
        encoder: {
            (_short(cell), cell["column"]): cell["results"]["frechet_distance"]["value"]
            for cell in cells
            if cell["encoder"] == encoder
        }
        for encoder in encoders
    }
    shared = set.intersection(*(set(one) for one in tables.values())) if tables else set()
    if len(encoders) < 2 or len(shared) < 3:
        return []
    keys = sorted(shared)
    ranks = [[tables[encoder][key] for key in keys] for encoder in encoders]
    matrix = np.array([[float(kendalltau(a, b).statistic) for b in ranks] for a in ranks])
    svg = draw_svg(partial(_matrix, names=encoders, matrix=matrix))
    caption = (
        f"Kendall’s τ of the Fréchet distances of {len(keys)} rows, controls among them: 1 is the "
        "same order, 0 none, −1 the reverse."
    )
    return [Drawn("Do the encoders agree?", caption, svg)]


def _matrix(axes: Axes, names: list[str], matrix: Any) -> None:
    axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(visible=False)
    for (i, j), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.6 else INK
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_title("Rank concordance of encoders")


def ratio_plot(found: Mapping[str, Any]) -> bytes:
    """Histograms of d(nearest) / d(second) for generated and for unseen real tiles, as shares."""
    labels = {"generated": "generated", "val_in": found["names"]["val_in"],
              "val_out": found["names"]["val_out"]}  # fmt: skip

    def draw(axes: Axes) -> None:
        for colour, (key, label) in zip(COLOURS, labels.items(), strict=False):
            one = found["sets"][key]["ratio_histogram"]
            edges, counts = np.array(one["edges"]), np.array(one["counts"], float)
            axes.stairs(counts / max(counts.sum(), 1), edges, color=colour, label=label,
                        linewidth=1.6)  # fmt: skip
        lowest = min(_first_edge(found["sets"][key]["ratio_histogram"]) for key in labels)
        axes.set_xlim(max(0.0, lowest - 0.05), 1.0)
        axes.set_title(found["encoder"])
        axes.set_xlabel("distance to the nearest / to the second nearest training tile")
        axes.set_ylabel("share of tiles")
        axes.legend(loc="upper left")

    return draw_svg(draw)


def _first_edge(histogram: Mapping[str, Any]) -> float:
    """The left edge of the first bin that holds anything."""
    return float(histogram["edges"][int(np.flatnonzero(histogram["counts"])[0])])
