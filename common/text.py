"""Text for users: one-line reasons, suggestions, durations and sizes."""

import difflib
from collections.abc import Iterable, Sequence


def one_line(reason: object, most: int = 200) -> str:
    """An error or text on one line of at most `most` characters.

    >>> one_line(ValueError("no tiles\\n  of this slide"), most=14)
    'no tiles of th'
    """
    return " ".join(str(reason).split())[:most]


def find_nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word that is most like the given one, "" where none is like it.

    Likeness is that of `difflib`, from 0 to 1; below `cutoff` a word is not offered.

    >>> find_nearest("bacth_size", ["batch_size", "seed"]), find_nearest("x", ["batch_size"])
    ('batch_size', '')
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return close[0] if close else ""


def list_some(names: Sequence[str], most: int = 20) -> str:
    """The first names, at most 20 by default, and how many more there are.

    >>> list_some(["a", "b", "c"], 2), list_some([])
    ('a, b and 1 more', 'none')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def format_seconds(seconds: float) -> str:
    """Seconds as people read a duration, in days from 48 hours on.

    >>> [format_seconds(seconds) for seconds in (8.24, 185, 7_620, 273_600)]
    ['8.2 s', '3 min 05 s', '2 h 07 min', '3 d 04 h']
    """
    if seconds == float("inf"):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    # Rounded before it is divided, so that no duration ends in 60 s.
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks are sold, with three digits.

    >>> format_bytes(999), format_bytes(301_056), format_bytes(12e12)
    ('999 B', '301 kB', '12 TB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError("unreachable")


def format_number(value: object, digits: int = 4) -> str:
    """A number with that many significant digits, thousands separated; a dash for None.

    >>> [format_number(value) for value in (0.123456, 12345.6, 12345, None)]
    ['0.1235', '12,346', '12,345', '–']
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if abs(value) < 10_000 else f"{value:,.0f}"


def format_share(value: float | None) -> str:
    """A share in [0, 1] or a cosine in [-1, 1] with three decimals; a dash for None.

    >>> format_share(0.5)
    '0.500'
    """
    return "–" if value is None else f"{value:.3f}"
