"""Plots as inline SVG: coloured by the page's style sheet, so that they follow its scheme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from common.templates import escape_html
from pipeline.report.distributions import Distribution, round_step
from pipeline.report.selections import Shares

_WIDTH = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40
_HEIGHT = 210
_MIN_BAR = 2.0
_BARS = 30
_ROW = 17
_NAMED_DOTS = 40
_ON_THE_LINE = 0.025
"""Half the relative difference that two shares may have and still be taken for equal."""
_ZERO_GAP = 34.0


def histogram_svg(distribution: Distribution) -> Markup:
    """Bars of slides per bin; each links to the table's rows of that range."""
    quantity, bins = distribution.quantity, distribution.histogram
    # The bar of what is beyond stands apart: its width means nothing.
    slots = len(bins.counts) + (2 if bins.beyond else 0)
    slot = (_WIDTH - _LEFT - _RIGHT) / slots
    top = max(int(bins.counts.max()), bins.beyond, 1)
    floor, span = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP

    def number(value: float) -> str:
        return f"{100 * value:.4g}%" if quantity.is_share else f"{value:.5g}"

    def bar(index: int, count: int, low: float, high: float) -> str:
        height = max(_MIN_BAR, span * count / top)
        is_last = not math.isfinite(high)
        words = f"{number(low)} or more" if is_last else f"{number(low)} to {number(high)}"
        label = escape_html(f"{count:,} slide{'' if count == 1 else 's'}: {words}")
        ends = f"{low:.6g}:" if is_last else f"{low:.6g}:{high:.6g}"
        return (
            f'<a href="#range={quote(quantity.key)}:{ends}" aria-label="{label}">'
            f"<title>{label}</title>"
            f'<rect class="bar{" far" if is_last else ""}" '
            f'x="{_LEFT + index * slot + 0.5:.2f}" y="{floor - height:.2f}" '
            f'width="{max(1.0, slot - 1):.2f}" height="{height:.2f}"/></a>'
        )

    edges = bins.edges
    bars = [bar(i, int(n), edges[i], edges[i + 1]) for i, n in enumerate(bins.counts) if n]
    if bins.beyond:
        bars.append(bar(slots - 1, bins.beyond, edges[-1], math.inf))
    # Half a dozen numbers fit under the axis.
    every = max(1, math.ceil(len(edges) / 6))
    ticks = "".join(
        f'<text x="{_LEFT + i * slot:.2f}" y="{floor + 16}" text-anchor="middle">'
        f"{number(edges[i])}</text>"
        for i in range(0, len(edges), every)
    )
    axis = f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" ' \
           f'text-anchor="middle">{escape_html(quantity.unit)}</text>'  # fmt: skip
    title = f"Histogram: {quantity.title}, {quantity.unit}"
    return _wrap_chart(_HEIGHT, title, _draw_y_grid(top) + "".join(bars) + ticks + axis)


def _draw_y_grid(top: int) -> str:
    floor, span = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP
    step = max(1.0, round_step(top / 4))
    lines = []
    for i in range(int(top / step) + 1):
        y = floor - span * i * step / top
        lines.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.2f}" text-anchor="end">{i * step:,.0f}</text>'
        )
    return "".join(lines)


def share_bars_svg(shares: Shares, what: str) -> Markup:
    """Two bars per group: its share of the cohort, and of the selection."""
    rows = _list_bars(shares)
    left, right, top = 130, 92, 4
    widest = max([share for _, *both in rows for share in both] or [1.0]) or 1.0
    span = _WIDTH - left - right
    parts = []
    for index, (name, cohort, selected) in enumerate(rows):
        y = top + index * _ROW
        shown = name if len(name) <= 18 else name[:17] + "…"
        parts.append(
            f"<g><title>{escape_html(name)}: {cohort:.2%} of the candidates, {selected:.2%} of the "
            f"selection</title>"
            f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape_html(shown)}</text>'
            f'<rect class="cohort" x="{left}" y="{y + 1}" width="{span * cohort / widest:.2f}" '
            'height="6"/>'
            f'<rect class="bar" x="{left}" y="{y + 8}" width="{span * selected / widest:.2f}" '
            'height="6"/>'
            f'<text x="{_WIDTH - right + 6}" y="{y + 11}">{cohort:.1%} → {selected:.1%}</text></g>'
        )
    label = f"Share of each {what} in the candidates and in the selection"
    return _wrap_chart(top + len(rows) * _ROW + 4, label, "".join(parts))


def _list_bars(shares: Shares) -> list[tuple[str, float, float]]:
    """The largest groups; the others together in one row."""
    named = [
        (name or "(none)", float(cohort), float(selected))
        for name, cohort, selected in zip(
            shares.names, shares.cohort_share, shares.selected_share, strict=True
        )
    ]
    if len(named) <= _BARS:
        return named
    rest = named[_BARS - 1 :]
    return [
        *named[: _BARS - 1],
        (f"{len(rest)} others", sum(r[1] for r in rest), sum(r[2] for r in rest)),
    ]


@dataclass(frozen=True)
class _Square:
    """Two logarithmic axes of shares, from 10^`low` to 1; a share of 0 is on the edge."""

    low: int
    left: float = 58.0
    floor: float = 342.0
    side: float = 330.0

    @classmethod
    def around(cls, shares: Shares) -> "_Square":
        both = np.concatenate([shares.cohort_share, shares.selected_share])
        return cls(min(-1, math.floor(math.log10(both[both > 0].min(initial=1.0)))))

    def _axis_position(self, share: float) -> float:
        if share <= 0:
            return 0.0
        return _ZERO_GAP + (self.side - _ZERO_GAP) * (1 - math.log10(share) / self.low)

    def x(self, share: float) -> float:
        return self.left + self._axis_position(share)

    def y(self, share: float) -> float:
        return self.floor - self._axis_position(share)

    def draw_frame(self) -> str:
        """Decades of both axes, their names, and the line on which shares are equal."""
        end, middle = 10.0**self.low, self.left + self.side / 2
        lines = [
            self._draw_decade(0.0),
            *(self._draw_decade(10.0**power) for power in range(self.low, 1)),
        ]
        return (
            "".join(lines) + f'<line class="even" x1="{self.x(end):.1f}" y1="{self.y(end):.1f}" '
            f'x2="{self.x(1):.1f}" y2="{self.y(1):.1f}"/>'
            f'<text x="{middle}" y="{self.floor + 34}" text-anchor="middle">'
            "share of the candidates</text>"
            f'<text transform="rotate(-90)" x="{-self.floor + self.side / 2}" y="12" '
            'text-anchor="middle">share of the selection</text>'
        )

    def _draw_decade(self, share: float) -> str:
        x, y, words = self.x(share), self.y(share), f"{100 * share:g}%" if share else "0"
        return (
            f'<line class="grid" x1="{self.left}" x2="{self.left + self.side}" y1="{y:.1f}" '
            f'y2="{y:.1f}"/><line class="grid" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{self.floor - self.side}" y2="{self.floor}"/>'
            f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
            f'<text x="{x:.1f}" y="{self.floor + 16}" text-anchor="middle">{words}</text>'
        )


def share_scatter_svg(shares: Shares, what: str) -> Markup:
    """A dot per group, both shares on logarithmic axes; on the line they are equal.

    Groups without any selected tile are on the floor, groups outside the cohort at the left. The
    dots furthest off the line in tiles, and more than 5% off it, are named and lead to the group's
    slides.
    """
    square = _Square.around(shares)
    cohort, selected = shares.cohort_share, shares.selected_share
    apart = np.abs(cohort - selected)
    is_off = apart > _ON_THE_LINE * (cohort + selected)
    far = [int(i) for i in np.argsort(-apart, kind="stable") if is_off[i]][:_NAMED_DOTS]
    near = sorted(set(range(len(cohort))) - set(far))
    # A stroke of no length with a round cap is a dot: all of them are one element.
    dots = "".join(f"M{square.x(cohort[i]):.1f} {square.y(selected[i]):.1f}h0" for i in near)
    parts = [square.draw_frame(), f'<path class="dots" d="{dots}"/>']
    for i in far:
        kind = "short" if selected[i] < cohort[i] else "dot"
        label = escape_html(
            f"{what} {shares.names[i] or '(none)'}: {cohort[i]:.3%} of the candidates, "
            f"{selected[i]:.3%} of the selection"
        )
        parts.append(
            f'<a href="#{what}={quote(shares.names[i], safe="")}" aria-label="{label}">'
            f'<title>{label}</title><circle class="{kind}" '
            f'cx="{square.x(cohort[i]):.1f}" cy="{square.y(selected[i]):.1f}" r="4"/></a>'
        )
    title = f"Share of each {what}, candidates against selection"
    return _wrap_chart(square.floor + 42, title, "".join(parts))


def stacked_svg(parts: Sequence[tuple[str, int, str]]) -> Markup:
    """One bar of (name, count, colour) side by side, in proportion."""
    total = max(1, sum(count for _, count, _ in parts))
    left, drawn = 0.0, []
    for name, count, colour in parts:
        width = 1000 * count / total
        drawn.append(
            f'<rect x="{left:.2f}" y="0" width="{width:.2f}" height="14" fill="{colour}">'
            f"<title>{escape_html(name)}: {count:,}</title></rect>"
        )
        left += width
    label = escape_html(", ".join(f"{name} {count:,}" for name, count, _ in parts))
    return Markup(
        f'<svg class="stack" viewBox="0 0 1000 14" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(drawn)}</svg>'
    )


def _wrap_chart(height: float, label: str, body: str) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:g}" role="group" '
        f'aria-label="{escape_html(label)}">{body}</svg>'
    )
