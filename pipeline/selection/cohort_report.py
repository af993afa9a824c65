"""The page of a planned cohort: what was selected, how it is spread, what was checked."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from common.escape import escape_plot
from common.plain_plots import plain_plots
from common.templates import load_template
from pipeline.dataset import Selection
from pipeline.selection.cohort import identity_keys
from pipeline.selection.config import PlanConfig
from pipeline.selection.outcome import outcome_of
from pipeline.selection.plan import (
    COLUMNS,
    TRAIN,
    VAL_IN,
    VAL_OUT,
    SelectionPlan,
    StratumRow,
    count_exclusions,
    plan_of,
)
from pipeline.selection.plan_cohort import Planned

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")
"""Paul Tol's bright scheme, which colour-blind readers can tell apart as well."""


@dataclass(frozen=True)
class ProjectRow:
    """A project's slides and its shares of the cohort's candidates and each selection, percent."""

    name: str
    slides: int
    share: float
    selected: list[float]


def render_cohort(table_name: str, model: str, config: PlanConfig, planned: Planned) -> str:
    """The page as HTML; the same bytes for the same plan (no times, no machine)."""
    plans = {name: plan_of(selection) for name, selection in planned.selections.items()}
    template = load_template(Path(__file__).with_name("cohort_report.html.j2"))
    return template.render(
        table_name=table_name,
        model=model,
        config=config,
        cohort=next(iter(plans.values()))["cohort"],
        exclusions=count_exclusions(planned.excluded),
        outcomes=[outcome_of(selection) for selection in planned.selections.values()],
        checks=check_selections(planned),
        below={name: _list_below_quota(plan) for name, plan in plans.items()},
        projects=_list_projects(plans),
        names=list(plans),
        plot=base64.b64encode(plot_shares(plans)).decode(),
    )


def _list_below_quota(plan: SelectionPlan) -> list[StratumRow]:
    """Strata that give a tile or more less than their share, the furthest below first."""
    rows = [row for row in plan["strata"] if row["quota"] - row["selected"] >= 1]
    return sorted(rows, key=lambda row: (row["selected"] - row["quota"], row["name"]))


def check_selections(planned: Planned) -> list[tuple[str, bool]]:
    """What the selections promise, looked up in their rows."""
    # From the rows, not from the plans: a check of the planner's own words would prove nothing.
    by_role: dict[str, list[Selection]] = {TRAIN: [], VAL_IN: [], VAL_OUT: []}
    for selection in planned.selections.values():
        by_role[plan_of(selection)["role"]].append(selection)
    keys = identity_keys(planned.cohort.patient)
    patient = dict(zip(planned.cohort.slide_id, keys, strict=True))
    held, trained = (
        {patient[slide] for selection in group for slide in selection.slide_ids}
        for group in (by_role[VAL_OUT], by_role[TRAIN] + by_role[VAL_IN])
    )
    parents = {train.name: plan_of(train)["ties"]["parent"] for train in by_role[TRAIN]}
    wholes = [train for train in by_role[TRAIN] if not parents[train.name]]
    parts = [train for train in by_role[TRAIN] if parents[train.name]]
    mixed = any(_share_rows(held, seen) for held in by_role[VAL_IN] for seen in by_role[TRAIN])
    nested = all(_is_contained(smaller, larger) for smaller, larger in pairwise(wholes))
    inside = all(_is_contained(part, planned.selections[parents[part.name]]) for part in parts)
    return [
        ("no patient of val-out is in a training selection or in val-in", not held & trained),
        ("no tile is in val-in and in a training selection", not mixed),
        ("each training selection is contained in the next larger, slide by slide", nested),
        ("guidance is contained in its training selection", inside),
    ]


def _is_contained(part: Selection, whole: Selection) -> bool:
    """Whether every row of `part` is one of `whole`; both ascend in each slide."""
    rows = dict(whole.items())
    for slide, ranks in part.items():
        others = rows.get(slide, np.zeros(0, np.int32))
        # A prefix is the usual case and the cheap one.
        is_prefix = np.array_equal(ranks, others[: len(ranks)])
        if not is_prefix and not np.isin(ranks, others).all():
            return False
    return True


def _share_rows(left: Selection, right: Selection) -> bool:
    """Whether the two have a row in common."""
    rows = dict(right.items())
    for slide, ranks in left.items():
        others = rows.get(slide)
        # Reserve and training ranks are apart as ranges: mostly nothing to look up.
        if others is None or ranks[-1] < others[0] or others[-1] < ranks[0]:
            continue
        if np.isin(ranks, others).any():
            return True
    return False


def _list_projects(plans: Mapping[str, SelectionPlan]) -> list[ProjectRow]:
    tables = {name: plan["distribution"]["project"]["rows"] for name, plan in plans.items()}
    cohort = next(iter(tables.values()))
    total = max(1, sum(row["cohort_tiles"] for row in cohort))
    sums = {name: max(1, sum(row["tiles"] for row in rows)) for name, rows in tables.items()}
    return [
        ProjectRow(
            row["name"], row["cohort_slides"], 100 * row["cohort_tiles"] / total,
            [100 * tables[name][i]["tiles"] / sums[name] for name in plans],
        )
        for i, row in enumerate(cohort)
    ]  # fmt: skip


def plot_shares(plans: Mapping[str, SelectionPlan]) -> bytes:
    """PNG: each project's and each site's share in the selections over that in the cohort."""
    with plain_plots():
        return _draw_shares(plans)


def _draw_shares(plans: Mapping[str, SelectionPlan]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=90, layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), COLUMNS, strict=True):
        ends = [1.0, 0.0]
        for colour, (name, plan) in zip(_COLOURS, plans.items(), strict=False):
            spread = plan["distribution"][column]
            cohort = np.array([row["cohort_tiles"] for row in spread["rows"]], float)
            tiles = np.array([row["tiles"] for row in spread["rows"]], float)
            cohort, tiles = 100 * cohort / cohort.sum(), 100 * tiles / tiles.sum()
            some = (tiles > 0) & (cohort > 0)
            bits = f"JSD {spread['jsd_bits_tiles']:.2g} bits"
            label = escape_plot(f"{name}: {some.sum()} {column}s, {bits}")
            axes.plot(cohort[some], tiles[some], ".", color=colour, alpha=0.6, label=label)
            ends = [min(ends[0], cohort[some].min()), max(ends[1], cohort[some].max())]
        # On this line a selection has the cohort's own share.
        axes.plot(ends, ends, "-", color="0.6", linewidth=0.8, zorder=0)
        axes.set(
            xscale="log", yscale="log", xlabel=f"share of the cohort's candidates by {column}, %"
        )
        axes.set_ylabel("share of the selection's tiles, %")
        axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
