"""JSON of others: parsed whole, or refused with one line."""

import json
from pathlib import Path
from typing import Any

from common.files import MOST_TEXT_BYTES, read_regular

MOST_DEPTH = 100
"""Lists and objects inside each other; what walks through them calls itself as often."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises `ValueError` where it is no JSON, or has more than 100 lists and objects in each other.

    >>> parse_json('{"mpp": 0.5}')
    {'mpp': 0.5}
    """
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        value = json.loads(text)
    except RecursionError:
        value = None
        is_deep = True
    else:
        # Few brackets cannot be deep: most texts end here.
        is_deep = text.count("[") + text.count("{") > MOST_DEPTH and _is_deep(value)
    if is_deep:
        raise ValueError("it is nested too deeply")
    return value


def read_json(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> Any:
    """The value of a JSON file; raises what `read_regular` and `parse_json` raise."""
    return parse_json(read_regular(path, most_bytes))


def _is_deep(value: Any) -> bool:
    """Whether more than `MOST_DEPTH` lists and objects are inside each other, level by level."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
