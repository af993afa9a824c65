"""Masks and tiles as GeoJSON for QuPath, and QuPath's annotations as masks.

Coordinates are level-0 pixels from the upper left corner of the slide, as QuPath has them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.imports.polygons import Polygon, area, paint, trace
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.overlay import CLASS_COLOURS

UNCLASSIFIED = "unclassified"
_SYNONYMS = {
    "other": TissueClass.OTHER,
    "artifact": TissueClass.OTHER,
    "blur": TissueClass.OUT_OF_FOCUS,
}
_DECIMALS = 3
_FARTHEST_PX = 1e8
"""Of a point from the slide's corner: no slide is a hundred times as large as the largest."""

Feature = dict[str, Any]


def class_of(name: str, own: Mapping[str, TissueClass]) -> TissueClass | None:
    """The class that a name means: as `own` says, else ours in any case; None where unknown."""
    if name in own:
        return own[name]
    plain = " ".join(name.lower().replace("-", " ").replace("_", " ").split())
    known = {text: one for one, text in CLASS_NAMES.items()} | _SYNONYMS
    return known.get(plain)


def parse_classes(pairs: Iterable[str]) -> dict[str, TissueClass]:
    """`NAME=CLASS` pairs of the command line."""
    own = {}
    for pair in pairs:
        name, _, ours = pair.rpartition("=")
        meant = class_of(ours, {})
        if not name or meant is None:
            raise UserError(
                f"--class '{pair}': expected NAME=CLASS, where CLASS is one of "
                f"{', '.join(CLASS_NAMES.values())}"
            )
        own[name] = meant
    return own


def mask_features(mask: npt.NDArray[np.uint8], scale: float) -> list[Feature]:
    """A feature a region of each class but background; `scale` is level-0 pixels a mask pixel."""
    features = []
    for one in TissueClass:
        where = mask == one
        if one != TissueClass.BACKGROUND and where.any():
            features += [
                _feature(polygon.scaled(scale), CLASS_NAMES[one], CLASS_COLOURS[one])
                for polygon in trace(where)
            ]
    return features


def tile_features(
    ranks: npt.NDArray[np.integer],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
) -> list[Feature]:
    """A square a tile, named by its rank; corners and size in level-0 pixels."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    colour = CLASS_COLOURS[TissueClass.TISSUE]
    features = []
    for rank, left, top in zip(ranks.tolist(), x.tolist(), y.tolist(), strict=True):
        feature = _feature(Polygon(corners + np.array([left, top])), "tile", colour)
        feature["properties"] |= {"objectType": "tile", "name": f"rank {rank}"}
        features.append(feature)
    return features


def _feature(polygon: Polygon, name: str, colour: tuple[int, int, int]) -> Feature:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [_closed(r) for r in polygon.rings]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(colour)},
        },
    }


def _closed(ring: npt.NDArray[np.float64]) -> list[list[float]]:
    points = np.round(np.concatenate([ring, ring[:1]]), _DECIMALS)
    return [[_short(x), _short(y)] for x, y in points.tolist()]


def _short(value: float) -> float:
    return int(value) if value.is_integer() else value


def encode(features: Sequence[Feature]) -> bytes:
    """The bytes of a FeatureCollection, one feature a line."""
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in features)
    return f'{{"type":"FeatureCollection","features":[\n{lines}\n]}}\n'.encode()


def read_features(path: Path) -> list[Feature]:
    """The features of a GeoJSON file: a FeatureCollection, a list, or a single one.

    Tiles and cells are no annotations and are left out.
    """
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict):
            document = document.get("features", [document])
        found = [one for one in document if _is_annotation(one)]
        for one in found:
            class_name(one)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path.name} is not GeoJSON with features: {reason}") from error


def _is_annotation(feature: Feature) -> bool:
    properties = feature.get("properties") or {}
    kind = properties.get("objectType", properties.get("object_type", "annotation"))
    return str(kind).lower() in ("annotation", "unknown", "root")


def class_name(feature: Feature) -> str:
    """The name of a feature's classification, `unclassified` without one."""
    found = (feature.get("properties") or {}).get("classification") or {}
    names = found.get("names") or [found.get("name")]
    return ": ".join(str(name) for name in names if name) or UNCLASSIFIED


def unknown_classes(features: Iterable[Feature], own: Mapping[str, TissueClass]) -> list[str]:
    """Names of classes that mean none of ours, sorted."""
    names = {class_name(feature) for feature in features}
    return sorted(name for name in names if class_of(name, own) is None)


def features_mask(
    features: Sequence[Feature],
    shape: tuple[int, int],
    scale: float,
    own: Mapping[str, TissueClass],
) -> npt.NDArray[np.uint8]:
    """Mask of `shape` (h, w) from annotations; `scale` is level-0 pixels a mask pixel.

    Where annotations overlap, of tissue and background the smaller covers the larger (an island
    in a cut-out, a cut-out in tissue), and artifacts cover both. Raises `UserError` for unknown
    classes and for what is no area.
    """
    unknown = unknown_classes(features, own)
    if unknown:
        raise UserError(
            f"unknown classes {', '.join(map(repr, unknown))}: map each with --class NAME=CLASS, "
            f"where CLASS is one of {', '.join(CLASS_NAMES.values())}"
        )
    areas = [
        (class_of(class_name(feature), own) or TissueClass.BACKGROUND, polygon)
        for feature in features
        for polygon in polygons_of(feature)
    ]
    areas.sort(key=lambda pair: (pair[0] > TissueClass.TISSUE, -area(pair[1])))
    mask = np.zeros(shape, np.uint8)
    for value, polygon in areas:
        paint(mask, [polygon.scaled(1 / scale)], int(value))
    return mask


def polygons_of(feature: Feature) -> list[Polygon]:
    """The polygons of a feature, in level-0 pixels."""
    geometry = feature.get("geometry") or {}
    if not isinstance(geometry, dict):
        raise UserError(f"an annotation '{class_name(feature)}' has no geometry")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        raise UserError(
            f"an annotation '{class_name(feature)}' is a {kind}, expected Polygon or MultiPolygon"
        )
    try:
        parts = [coordinates] if kind == "Polygon" else list(coordinates or ())
        rings = [[np.asarray(ring, np.float64)[:, :2] for ring in part] for part in parts if part]
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"an annotation '{class_name(feature)}' has malformed coordinates") from (
            error
        )
    if any(not (np.abs(ring) < _FARTHEST_PX).all() for part in rings for ring in part):
        raise UserError(f"an annotation '{class_name(feature)}' has coordinates of no slide")
    return [
        Polygon(part[0], tuple(ring for ring in part[1:] if len(ring)))
        for part in rings
        if len(part[0])
    ]
