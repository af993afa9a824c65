"""What a metric is: one record, from which results, report, tables and warnings are made.

A module of this package that defines `METRIC` is a metric; nothing else names it. The record's
`name` is the key in results.json and in a protocol's rows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.record import Record
from common.text import format_number, format_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Features = NDArray[np.floating]
Labels = NDArray[np.str_]
Better = Literal["lower", "higher", ""]
Reader = Callable[[Record], float | None]


@dataclass(frozen=True)
class MetricSettings:
    """How the metrics are computed; the defaults are the paper's where it states them.

    `draws` resamples of `subsample` rows give the paper's interval; 0 draws leave all out.
    Seeds are from 0 to 2**32 - 1, `k` is at least 1, `fld_dtype` is "float64" or "float32".
    """

    max_generated: int = 50_000
    draws: int = 50
    subsample: int = 50_000
    seed: int = 0
    k: int = 3
    fld_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fld_dtype: str = "float64"
    fld_max_generated: int = 10_000
    kid_subsets: int = 100
    kid_subset_size: int = 1000

    def __post_init__(self) -> None:
        """Refuse, before anything is read, what no metric accepts."""
        for seed in (self.seed, *self.fld_seeds):
            if not 0 <= seed < 2**32:
                raise UserError(f"seed is {seed}; expected a whole number from 0 to 4294967295")
        if self.draws < 0 or self.k < 1:
            raise UserError(f"draws is {self.draws} and k is {self.k}; expected at least 0 and 1")


@dataclass(frozen=True)
class FeaturePair:
    """Real features ``[n, d]`` and generated ones ``[m, d]``, and what some metrics also read.

    Attributes:
        clusters: labels ``[m]`` of the generated rows by kind ("slide", "patient").
        real_clusters: the same of the real rows, ``[n]``.
        train: what the model was trained on, ``[t, d]``.
        sources: the source tile of each generated row, ``[m, d]``.
        device: where distances are computed. Precision and recall do not depend on it, FLD by
            rounding alone. It is no setting, so that results are not named by the machine.
    """

    real: Features
    generated: Features
    clusters: dict[str, Labels] | None = None
    real_clusters: dict[str, Labels] | None = None
    train: Features | None = None
    sources: Features | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class WarningKind:
    """A sentence on what makes a metric's value doubtful, with a stable code.

    results.json keeps the sentences alone, so the template that writes one also recognises it.

    Attributes:
        code: stable name.
        template: the sentence, with `{names}` in place of its values.
        covered_by: code of a warning about all sets with the same message, "" if there is none.

    >>> kind = WarningKind("constant", "{count} of {dim} dimensions are constant")
    >>> kind.matches_sentence(kind.format_sentence(count=2, dim=768))
    True
    """

    code: str
    template: str
    covered_by: str = ""

    def format_sentence(self, **values: object) -> str:
        """The sentence with these values."""
        return self.template.format(**values)

    def matches_sentence(self, sentence: str) -> bool:
        """Whether this kind wrote the sentence."""
        return self._sentence_pattern.fullmatch(sentence) is not None

    @cached_property
    def _sentence_pattern(self) -> re.Pattern[str]:
        return re.compile(".+".join(map(re.escape, re.split(r"\{[^}]*\}", self.template))))


@dataclass(frozen=True)
class MetricPart:
    """A result within a metric's result, whose warnings have another name and title."""

    key: str
    name: str
    title: str


@dataclass(frozen=True)
class MetricRow:
    """A line of the report: a value, what to compare it with, and what it means."""

    name: str
    better: Better
    value: str
    reference: str
    reference_name: str
    meaning: str


@dataclass(frozen=True)
class ContextEntry:
    """A number that a result brings along for a table's controls: a floor or a null."""

    label: str
    value: float
    counts: dict[str, int]


@dataclass(frozen=True)
class TableQuantity:
    """A number of a metric's result, as a protocol's table and the report show it.

    Attributes:
        name: of the table, as a protocol's `tables` lists it.
        better: which way is better.
        value: reads the number.
        spread: reads its uncertainty, shown after "±".
        share: whether it is shown with three decimals, as shares and cosines are.
        in_controls: whether rows of controls have it.
        context: reads a control row that comes with it.
        meaning: what it means, in plain words; keys of the result in braces.
        ideal: the value of a perfect generator and why; without it the report compares with the
            context or, if there is none, with the real halves.
    """

    name: str
    title: str
    better: Better
    value: Reader
    spread: Reader = lambda result: None
    share: bool = False
    in_controls: bool = True
    context: Callable[[Record], ContextEntry] | None = None
    meaning: str = ""
    ideal: tuple[float, str] | None = None

    def report_row(self, result: Record, halves: Record) -> MetricRow:
        """The quantity's line in the report."""
        as_text = format_share if self.share else format_number
        text, spread = as_text(self.value(result)), self.spread(result)
        if spread is not None:
            text += f" ± {format_share(spread) if self.share else format_number(spread, 2)}"
        # A known ideal says more than a null, and a null more than the halves of real tiles.
        if self.ideal is not None:
            reference, name = format_share(self.ideal[0]), self.ideal[1]
        elif self.context is not None:
            entry = self.context(result)
            reference, name = as_text(entry.value), entry.label.lower()
        else:
            reference = as_text(self.value(halves))
            name = "real halves" if halves else "too few real tiles"
        meaning = self.meaning.format_map(result)
        return MetricRow(self.title, self.better, text, reference, name, meaning)


@dataclass(frozen=True)
class MetricPlot:
    """A plot of a metric's result, for the report."""

    draw: "Callable[[Axes, Record], None]"
    alt: str
    caption: str

    def bind_result(self, result: Record) -> "Callable[[Axes], None]":
        """A function that draws this result on axes."""
        return lambda axes: self.draw(axes, result)


@dataclass(frozen=True)
class Metric:
    """A metric as the rest of the house sees it.

    Attributes:
        name: key in results.json and in a protocol's rows; stable.
        title: what people call it.
        place: where it is in tables, ascending.
        compute: the result as plain JSON values, from a pair and the settings.
        needs: which optional features of the pair it reads.
        reads: which of the pair's two sets it reads besides.
        reads_directions: whether a row of zeros, which has no direction, is refused.
        reads_clusters: whether it reads the pair's labels, if there are draws.
        depends_on_device: whether its value depends on the device by rounding.
        compute_floor: the part of the result that is also computed between two halves of the
            real tiles; None leaves it out.
        rows: lines of the report, from the result and from that of the real halves; by default
            one for each quantity.
        quantities: what a protocol's tables show of it.
        warnings: the sentences that its result may have.
        parts: parts of the result with separate warnings.
        summary: the result in a few words.
    """

    name: str
    title: str
    place: int
    compute: Callable[[FeaturePair, MetricSettings], dict[str, object]]
    rows: Callable[[Record, Record], list[MetricRow]] | None = None
    quantities: tuple[TableQuantity, ...] = ()
    needs: tuple[Literal["train", "sources"], ...] = ()
    reads: tuple[Literal["real", "generated"], ...] = ("real", "generated")
    reads_directions: bool = False
    reads_clusters: bool = False
    depends_on_device: bool = False
    compute_floor: Callable[[FeaturePair, MetricSettings], dict[str, object]] | None = None
    warnings: tuple[WarningKind, ...] = ()
    parts: tuple[MetricPart, ...] = ()
    summary: Callable[[Record], str] | None = None
    plot: MetricPlot | None = None

    def report_rows(self, result: Record, halves: Record) -> list[MetricRow]:
        """The report's lines on a result; `halves` is that of the real halves, if any."""
        if self.rows is not None:
            return self.rows(result, halves)
        shown = [quantity for quantity in self.quantities if quantity.value(result) is not None]
        return [quantity.report_row(result, halves) for quantity in shown]


def value_at(*keys: str) -> Reader:
    """A reader of the number under these nested keys, None where it is absent.

    >>> value_at("infinity", "value")(Record({"infinity": {"value": 2.5}}))
    2.5
    """

    def read_number(result: Record) -> float | None:
        for key in keys[:-1]:
            result = result.part(key)
        return result.optional(keys[-1])

    return read_number


def plain_fields(result: object) -> dict[str, object]:
    """The numbers and texts of a metric's result class; arrays, one value per row, are left out."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(result).items()
        if value is None or isinstance(value, int | float | str | tuple)
    }
