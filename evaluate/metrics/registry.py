"""All metrics by name, found as the modules of `evaluate.metrics` that define `METRIC`."""

import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pkgutil import iter_modules

import evaluate.metrics
from common.errors import UserError
from common.record import Record
from common.text import one_line
from evaluate.metrics.metric import FeaturePair, Metric, MetricSettings, TableQuantity


def discover_metrics() -> dict[str, Metric]:
    """Every metric by its name, in the order of `place`, then of name."""
    names = sorted(module.name for module in iter_modules(evaluate.metrics.__path__))
    modules = [import_module(f"evaluate.metrics.{name}") for name in names]
    metrics = [module.METRIC for module in modules if hasattr(module, "METRIC")]
    return {one.name: one for one in sorted(metrics, key=lambda one: (one.place, one.name))}


METRICS = discover_metrics()


def needed_features(names: Iterable[str]) -> set[str]:
    """Which optional features of a pair ("train", "sources") the named metrics read.

    Names that are no metric need none.
    """
    return {needed for name in names if name in METRICS for needed in METRICS[name].needs}


def compute_metrics(
    pair: FeaturePair, names: Sequence[str], settings: MetricSettings
) -> dict[str, object]:
    """The named metrics' results; raises `UserError` for an unknown name before computing."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"metric '{name}' is not known; expected one of {', '.join(METRICS)}")
    return {name: METRICS[name].compute(pair, settings) for name in names}


def compute_each(
    pair: FeaturePair, names: Sequence[str], settings: MetricSettings
) -> tuple[dict[str, object], dict[str, str]]:
    """The results of the named metrics, and of those that failed the reason: none costs another.

    A result with NaN or infinity, which no results file takes, is a failure too.
    """
    results: dict[str, object] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            results[name] = METRICS[name].compute(pair, settings)
            json.dumps(results[name], allow_nan=False)
        except Exception as error:
            # Whatever it is: the other metrics may have taken hours.
            results[name] = None
            failed[name] = describe_failure(error)
    return results, failed


def describe_failure(error: Exception) -> str:
    """Why a metric has no value, in one line."""
    if isinstance(error, UserError):
        return str(error)
    return one_line(f"{type(error).__name__}: {error}", 300)


def compute_floors(pair: FeaturePair, settings: MetricSettings) -> dict[str, dict[str, object]]:
    """What is compared between halves of real tiles, by the settings of the numbers above it."""
    return {
        name: metric.compute_floor(pair, settings)
        for name, metric in METRICS.items()
        if metric.compute_floor is not None
    }


def summarise_metrics(results: Record) -> list[str]:
    """The measured metrics in a few words each, from results.json."""
    metrics = results.part("metrics")
    return [
        metric.summary(metrics.part(name))
        for name, metric in METRICS.items()
        if metric.summary is not None and metrics.part(name)
    ]


def table_quantities() -> dict[str, tuple[Metric, TableQuantity]]:
    """(metric, quantity) of everything that protocols' tables can show, by the table's name."""
    return {
        quantity.name: (metric, quantity)
        for metric in METRICS.values()
        for quantity in metric.quantities
    }
