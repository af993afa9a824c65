"""What the metrics themselves say against their values, gathered for readers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evaluate.compare.results import warning

_TITLES = {
    "frechet_distance": "Fréchet distance",
    "frechet_infinity": "Fréchet distance at infinitely many images",
    "feature_likelihood": "Feature likelihood divergence",
    "kernel_distance": "Kernel distance (KID)",
    "fld_gap": "FLD gap",
}
_NAMED = 3
"""Places named in a warning; of more their number is enough."""


def metric_warnings(
    found: Iterable[tuple[str, Mapping[str, Any]]], known: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """One warning a metric and sentence, with the places where it holds.

    `found` are (place, results by metric), the place "" where there is one alone. The code is
    `metric_` and the metric's name. `known` are warnings that stand: what they say of all
    sets, that there are no more tiles than dimensions, is not said again for each distance.
    """
    singular = any(one["code"] == "fewer_tiles_than_dimensions" for one in known)
    places: dict[tuple[str, str], dict[str, None]] = {}
    for place, metrics in found:
        for name, text in _sentences(metrics):
            if not (singular and name == "frechet_distance" and "singular" in text):
                places.setdefault((name, text), {})[place] = None
    return [
        warning(f"metric_{name}", f"{_TITLES.get(name, name)}: {text}{_where(list(named))}")
        for (name, text), named in places.items()
    ]


def _sentences(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, result in metrics.items():
        if not isinstance(result, Mapping):
            continue
        for text in result.get("warnings") or ():
            yield name, str(text)
        for text in (result.get("infinity") or {}).get("warnings") or ():
            yield "frechet_infinity", str(text)


def _where(places: list[str]) -> str:
    if places == [""]:
        return ""
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return f" ({'; '.join(places[:_NAMED])}{more})"
