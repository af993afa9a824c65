"""Masks and tiles as GeoJSON for QuPath, and QuPath's annotations as masks.

Coordinates are level-0 pixels. QuPath counts them from the corner of the scanned area where the
slide states one (see `frames`); here they count from that of the whole slide.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.json_text import read_json
from common.text import one_line
from pipeline.imports.polygons import (
    Affine,
    Painted,
    Polygon,
    is_within,
    paint_polygon,
    polygon_area,
    trace_polygons,
)
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.overlay import CLASS_COLOURS

UNCLASSIFIED = "unclassified"
_CLASS_OF_NAME = {name: value for value, name in CLASS_NAMES.items()} | {
    "other": TissueClass.OTHER,
    "artifact": TissueClass.OTHER,
    "blur": TissueClass.OUT_OF_FOCUS,
}
_CLASSES_TEXT = ", ".join(CLASS_NAMES.values())
_DECIMALS = 3
_FRAME_MEMBER = "coordinates_from"
_FARTHEST_PX = 1e8
"""Of a point from the slide's corner: no slide is a hundred times as large as the largest."""

Feature: TypeAlias = dict[str, Any]
"""A GeoJSON feature, as `json` reads it: anything may be in it."""

Area: TypeAlias = tuple[TissueClass, Polygon]
"""A class and where it is, in level-0 pixels."""


def class_of(name: str, class_names: Mapping[str, TissueClass]) -> TissueClass | None:
    """The class that a name means: as `class_names` has it, else ours in any case, or None.

    >>> class_of("Out-of-focus", {}).name
    'OUT_OF_FOCUS'
    """
    if name in class_names:
        return class_names[name]
    return _CLASS_OF_NAME.get(" ".join(name.lower().replace("-", " ").replace("_", " ").split()))


def parse_classes(pairs: Iterable[str]) -> dict[str, TissueClass]:
    """The classes of names by `NAME=CLASS` pairs; raises `UserError` for an unknown class.

    >>> parse_classes(["Tumor=tissue"])["Tumor"].name
    'TISSUE'
    """
    class_names = {}
    for pair in pairs:
        name, _, meaning = pair.rpartition("=")
        value = class_of(meaning, {})
        if not name or value is None:
            raise UserError(
                f"--class '{pair}': expected NAME=CLASS, where CLASS is one of {_CLASSES_TEXT}"
            )
        class_names[name] = value
    return class_names


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise `UserError` where there are names of classes that mean none of ours."""
    if unknown := sorted(names):
        raise UserError(
            f"unknown classes {', '.join(map(repr, unknown))}: map each with --class NAME=CLASS, "
            f"where CLASS is one of {_CLASSES_TEXT}"
        )


def mask_features(
    mask: npt.NDArray[np.uint8], scale: float, corner: tuple[int, int] = (0, 0)
) -> list[Feature]:
    """A feature per region of each class but background, of a mask [h, w] of `TissueClass`.

    `scale` is level-0 pixels per mask pixel; coordinates count from `corner` (x, y), level-0 px.
    """
    to_corner = Affine((scale, scale), (-float(corner[0]), -float(corner[1])))
    return [
        _make_feature(polygon.move_by(to_corner), CLASS_NAMES[value], CLASS_COLOURS[value])
        for value in TissueClass
        if value != TissueClass.BACKGROUND
        for polygon in trace_polygons(mask == value)
    ]


def tile_features(
    ranks: npt.NDArray[np.integer],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
) -> list[Feature]:
    """A square per tile, named by its rank; corners x, y [n] and size in level-0 pixels."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    colour = CLASS_COLOURS[TissueClass.TISSUE]
    features = []
    for rank, left, top in zip(ranks.tolist(), x.tolist(), y.tolist(), strict=True):
        feature = _make_feature(Polygon(corners + np.array([left, top])), "tile", colour)
        feature["properties"] |= {"objectType": "tile", "name": f"rank {rank}"}
        features.append(feature)
    return features


def _make_feature(polygon: Polygon, name: str, colour: tuple[int, int, int]) -> Feature:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [_close_ring(r) for r in polygon.rings]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(colour)},
        },
    }


def _close_ring(ring: npt.NDArray[np.float64]) -> list[list[float]]:
    points = np.round(np.concatenate([ring, ring[:1]]), _DECIMALS)
    # Whole numbers without ".0": a large mask's file is a third smaller.
    return [[int(v) if v.is_integer() else v for v in point] for point in points.tolist()]


def encode_features(features: Sequence[Feature], frame: str = "") -> bytes:
    """The bytes of a FeatureCollection, one feature per line.

    `frame` is where coordinates count from (see `read_annotations`), '' where a slide has one only.
    """
    lines = ",\n".join(json.dumps(feature, separators=(",", ":")) for feature in features)
    # Of a member that GeoJSON does not define QuPath takes no notice.
    stated = f'"{_FRAME_MEMBER}":{json.dumps(frame)},' if frame else ""
    return f'{{"type":"FeatureCollection",{stated}"features":[\n{lines}\n]}}\n'.encode()


def read_features(path: Path) -> list[Feature]:
    """The features of a GeoJSON file: a FeatureCollection, a list, or a single one.

    Tiles and cells are no annotations and are left out.
    """
    return read_annotations(path)[0]


def read_annotations(path: Path) -> tuple[list[Feature], str]:
    """The features of a GeoJSON file, and the frame that it states ('' where it states none).

    Only files that `geojson` wrote state one: `bounds` or `canvas`.
    """
    try:
        document, frame = read_json(path), ""
        if isinstance(document, dict):
            frame = str(document.get(_FRAME_MEMBER, ""))
            document = document.get("features", [document])
        features = []
        for feature in document:
            properties = feature.get("properties") or {}
            kind = properties.get("objectType", properties.get("object_type", "annotation"))
            if str(kind).lower() in ("annotation", "unknown", "root"):
                # A class that cannot be read shall be refused here, where the file is named.
                class_name(feature)
                features.append(feature)
        return features, frame
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error, 120)
        raise UserError(f"{path.name} is not GeoJSON with features: {reason}") from error


def class_name(feature: Feature) -> str:
    """The name of a feature's classification, `unclassified` without one."""
    classification = (feature.get("properties") or {}).get("classification") or {}
    names = classification.get("names") or [classification.get("name")]
    return ": ".join(str(name) for name in names if name) or UNCLASSIFIED


def unknown_classes(
    features: Iterable[Feature], class_names: Mapping[str, TissueClass]
) -> set[str]:
    """Names of classes that mean none of ours."""
    names = {class_name(feature) for feature in features}
    return {name for name in names if class_of(name, class_names) is None}


def features_mask(
    features: Sequence[Feature],
    shape: tuple[int, int],
    scale: float,
    class_names: Mapping[str, TissueClass],
) -> npt.NDArray[np.uint8]:
    """Mask of `shape` (h, w) from annotations in canvas coordinates, see `paint_areas`."""
    return paint_areas(class_areas(features, class_names), shape, scale).mask


def class_areas(features: Sequence[Feature], class_names: Mapping[str, TissueClass]) -> list[Area]:
    """Classes and polygons of annotations, in the order in which they are painted.

    Where annotations overlap, of tissue and background the smaller covers the larger (an island
    in a cut-out, a cut-out in tissue), and artifacts cover both. Raises `UserError` for unknown
    classes and for what is no area.
    """
    refuse_unknown(unknown_classes(features, class_names))
    areas = [
        (class_of(class_name(feature), class_names) or TissueClass.BACKGROUND, polygon)
        for feature in features
        for polygon in polygons_of(feature)
    ]
    # Painted in this order: the large before the small, artifacts last.
    areas.sort(key=lambda pair: (pair[0] > TissueClass.TISSUE, -polygon_area(pair[1])))
    return areas


def paint_areas(
    areas: Sequence[Area], shape: tuple[int, int], scale: float, affine: Affine | None = None
) -> Painted:
    """Mask of `shape` (h, w) from areas; `scale` is level-0 pixels per mask pixel.

    `affine` leads from the areas' coordinates to level-0 pixels of the whole slide.
    """
    mask = np.zeros(shape, np.uint8)
    total = on_slide = 0.0
    is_negative = False
    for value, polygon in areas:
        moved = (polygon if affine is None else polygon.move_by(affine)).scale_by(1 / scale)
        pixels = paint_polygon(mask, moved, int(value))
        # A ring that crosses itself has less of an area than pixels, a small one may have none.
        if value != TissueClass.BACKGROUND:
            area = max(polygon_area(moved), pixels)
            total += area
            on_slide += area if is_within(moved, shape) else pixels
            is_negative |= bool((moved.shell < -1).any())
    return Painted(mask, on_slide / total if total else 1.0, is_negative)


def polygons_of(feature: Feature) -> list[Polygon]:
    """The polygons of a feature, in level-0 pixels."""
    geometry = feature.get("geometry") or {}
    subject = f"an annotation '{class_name(feature)}'"
    if not isinstance(geometry, dict):
        raise UserError(f"{subject} has no geometry")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        raise UserError(f"{subject} is a {kind}, expected Polygon or MultiPolygon")
    try:
        parts = [coordinates] if kind == "Polygon" else list(coordinates or ())
        rings = [[np.asarray(ring, np.float64)[:, :2] for ring in part] for part in parts if part]
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{subject} has malformed coordinates") from error
    if any(not (np.abs(ring) < _FARTHEST_PX).all() for part in rings for ring in part):
        raise UserError(f"{subject} has coordinates of no slide")
    return [
        Polygon(part[0], tuple(ring for ring in part[1:] if len(ring)))
        for part in rings
        if len(part[0])
    ]
