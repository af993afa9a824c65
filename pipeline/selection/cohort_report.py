"""The page of a planned cohort: what was selected, how it is spread, what was checked."""

import base64
import io
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.dataset import Selection
from pipeline.selection.plan import COLUMNS, TRAIN, VAL_IN, VAL_OUT, count_exclusions

if TYPE_CHECKING:
    from pipeline.selection.config import PlanConfig
    from pipeline.selection.plan_cohort import Planned

Ranks = npt.NDArray[np.int32]

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")
"""Paul Tol's bright scheme: told apart by colour-blind readers as well."""


def cohort_report(table_name: str, model: str, config: "PlanConfig", planned: "Planned") -> str:
    """The page as HTML; the same bytes for the same plan (no times, no machine)."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    plans = {name: one.plan for name, one in planned.selections.items()}
    first = next(iter(plans.values()))
    return environment.get_template("cohort_report.html.j2").render(
        table_name=table_name,
        model=model,
        config=config,
        cohort=first["cohort"],
        exclusions=count_exclusions(planned.excluded),
        outcomes=[outcome(name, plan) for name, plan in plans.items()],
        checks=checks(planned),
        below={name: below_quota(plan) for name, plan in plans.items()},
        projects=project_rows(plans),
        names=list(plans),
        plot=base64.b64encode(shares_plot(plans)).decode(),
    )


def outcome(name: str, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a selection in the table of outcomes."""
    site, project = plan["distribution"]["site"], plan["distribution"]["project"]
    return {
        "name": name,
        "tiles": plan["selected"]["tiles"],
        "slides": plan["selected"]["slides"],
        "patients": plan["selected"]["patients"],
        "sites": site["covered"],
        "of_sites": site["of"],
        "projects": project["covered"],
        "of_projects": project["of"],
        "jsd_site": site["jsd_bits_tiles"],
        "jsd_project": project["jsd_bits_tiles"],
        "jsd_site_slides": site["jsd_bits_slides"],
        "deviation_pp": 100 * plan["largest_share_deviation"],
        "below": plan["strata_below_quota"],
    }


def below_quota(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Strata that give a tile or more less than their share, the furthest below first."""
    rows = [row for row in plan["strata"] if row["quota"] - row["selected"] >= 1]
    return sorted(rows, key=lambda row: (row["selected"] - row["quota"], row["name"]))


def checks(planned: "Planned") -> list[tuple[str, bool]]:
    """What the selections promise, looked up in their rows."""
    by_role: dict[str, list[Selection]] = {TRAIN: [], VAL_IN: [], VAL_OUT: []}
    for one in planned.selections.values():
        by_role[one.plan["role"]].append(one)
    patient = dict(zip(planned.cohort.slide_id, planned.cohort.patient, strict=True))
    held = {patient[slide] for one in by_role[VAL_OUT] for slide in one.slide_ids}
    trained = {
        patient[slide] for one in by_role[TRAIN] + by_role[VAL_IN] for slide in one.slide_ids
    }
    trains = [one for one in by_role[TRAIN] if not one.plan["ties"]["parent"]]
    pairs = [(one, other) for one in by_role[VAL_IN] for other in by_role[TRAIN]]
    parts = [one for one in by_role[TRAIN] if one.plan["ties"]["parent"]]
    nested = all(_contained(a, b) for a, b in pairwise(trains))
    inside = all(_contained(one, planned.selections[one.plan["ties"]["parent"]]) for one in parts)
    return [
        ("no patient of val-out is in a training selection or in val-in", not held & trained),
        ("no tile is in val-in and in a training selection", not any(_meet(*p) for p in pairs)),
        ("each training selection is contained in the next larger, slide by slide", nested),
        ("guidance is contained in its training selection", inside),
    ]


def _contained(part: Selection, whole: Selection) -> bool:
    """Whether every row of `part` is one of `whole`; both ascend in each slide."""
    rows = dict(whole.items())
    nothing = np.zeros(0, np.int32)
    return all(_all_in(ranks, rows.get(slide, nothing)) for slide, ranks in part.items())


def _all_in(ranks: Ranks, whole: Ranks) -> bool:
    if len(ranks) > len(whole):
        return False
    # A prefix is the usual case and the cheap one.
    return bool(np.array_equal(ranks, whole[: len(ranks)]) or np.isin(ranks, whole).all())


def _meet(left: Selection, right: Selection) -> bool:
    """Whether the two have a row in common."""
    rows = dict(right.items())
    return any(slide in rows and _any_in(ranks, rows[slide]) for slide, ranks in left.items())


def _any_in(ranks: Ranks, others: Ranks) -> bool:
    # Reserve and training ranks are apart as ranges: nothing to look up.
    if ranks[-1] < others[0] or others[-1] < ranks[0]:
        return False
    return bool(np.isin(ranks, others).any())


def project_rows(plans: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per project: its share of the cohort's candidates and of each selection, in percent."""
    tables = {name: plan["distribution"]["project"]["rows"] for name, plan in plans.items()}
    some = next(iter(tables.values()))
    total = max(1, sum(row["cohort_tiles"] for row in some))
    sums = {name: max(1, sum(row["tiles"] for row in rows)) for name, rows in tables.items()}
    return [
        {
            "name": row["name"],
            "slides": row["cohort_slides"],
            "share": 100 * row["cohort_tiles"] / total,
            "selected": [100 * tables[name][i]["tiles"] / sums[name] for name in plans],
        }
        for i, row in enumerate(some)
    ]


def shares_plot(plans: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG: each project's and each site's share in the selections over that in the cohort."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=90, layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), COLUMNS, strict=True):
        ends = [1.0, 0.0]
        for colour, (name, plan) in zip(_COLOURS, plans.items(), strict=False):
            rows = plan["distribution"][column]["rows"]
            cohort = np.array([row["cohort_tiles"] for row in rows], float)
            tiles = np.array([row["tiles"] for row in rows], float)
            cohort, tiles = 100 * cohort / cohort.sum(), 100 * tiles / tiles.sum()
            some = (tiles > 0) & (cohort > 0)
            jsd = plan["distribution"][column]["jsd_bits_tiles"]
            label = f"{name}: {some.sum()} {column}s, JSD {jsd:.2g} bits"
            axes.plot(cohort[some], tiles[some], ".", color=colour, alpha=0.6, label=label)
            ends = [min(ends[0], cohort[some].min()), max(ends[1], cohort[some].max())]
        axes.plot(ends, ends, "-", color="0.6", linewidth=0.8, zorder=0)
        axes.set(
            xscale="log", yscale="log", xlabel=f"share of the cohort's candidates by {column}, %"
        )
        axes.set_ylabel("share of the selection's tiles, %")
        axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
