"""JSON of others: parsed whole, or refused with one line."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises `ValueError` where it is no JSON or is nested more deeply than Python's stack takes.

    >>> parse_json('{"mpp": 0.5}')
    {'mpp': 0.5}
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
