"""Text for users: one-line reasons, suggestions, durations and sizes."""

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

EXACTLY = "exact:"
"""What a table puts before a name that is to be compared character by character."""


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


@lru_cache(1 << 16)
def same_identity_key(text: str) -> str:
    """What names of one patient, slide, site or group share, however they are written.

    Compared are names under Unicode's NFKC and case folding, without invisible characters (zero
    width, soft hyphens, marks of direction), with one blank for any white space inside and none
    around, and one hyphen for all dashes. Letters that only look alike (Latin A, Cyrillic А) stay
    different. A name that begins with `exact:` is compared as it is written. A name of invisible
    characters alone is none: ''.

    >>> {same_identity_key(name) for name in ("ABC-9", " abc\u20119 ", "ＡＢＣ－９", "a\u00adbc-9")}
    {'abc-9'}
    >>> same_identity_key("exact:ABC-9")
    'exact:ABC-9'
    """
    if text.startswith(EXACTLY):
        return text
    if text.isascii():  # the many; printable ones need no table
        return " ".join(text.translate(_ASCII_CONTROLS).split()).lower()
    folded = text
    # Folding may compose what is to be folded again: twice is enough, three times is sure.
    for _ in range(3):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", folded).casefold())
        folded = "".join(_identity_character(one) for one in folded)
        folded = " ".join(folded.split())
    return folded


_ASCII_CONTROLS = {code: None for code in (*range(32), 127) if not chr(code).isspace()}
# Default ignorable code points (Unicode, DerivedCoreProperties) that are not of category Cf.
_IGNORED = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2065\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)


def _identity_character(one: str) -> str:
    category = unicodedata.category(one)
    if category in ("Cf", "Cn") or one in _IGNORED:
        return ""
    if one.isspace():
        return " "
    if category == "Cc":
        return ""
    # All dashes, and the minus sign, which NFKC leaves as they are.
    return "-" if category == "Pd" or one in "\u2212\u2043\u02d7" else one


def first_forms(names: Iterable[str]) -> dict[str, str]:
    """By the key of each identity, the form of its name that sorts first.

    >>> first_forms(["abc-9", "ABC-9", "DEF"])
    {'abc-9': 'ABC-9', 'def': 'DEF'}
    """
    first: dict[str, str] = {}
    for name in sorted(set(names)):
        first.setdefault(same_identity_key(name), name)
    return first


def joined_names(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of one identity that are written in several ways, sorted, by their key.

    >>> joined_names(["ABC-9", "abc-9", "DEF"])
    {'abc-9': ['ABC-9', 'abc-9']}
    """
    forms: dict[str, set[str]] = {}
    for name in names:
        if key := same_identity_key(name):
            forms.setdefault(key, set()).add(name)
    return {key: sorted(forms[key]) for key in sorted(forms) if len(forms[key]) > 1}


def describe_joined(what: str, joined: Mapping[str, Sequence[str]]) -> str:
    """One line that says which names count as one, '' where none do.

    >>> describe_joined("patients", {"abc-9": ["ABC-9", "abc-9"]})
    "patients that differ only in form count as one: 'ABC-9' = 'abc-9' (exact:NAME keeps one apart)"
    """
    if not joined:
        return ""
    some = [" = ".join(ascii(name) for name in names) for names in joined.values()]
    return (
        f"{what} that differ only in form count as one: {list_some(some, 3)} "
        f"({EXACTLY}NAME keeps one apart)"
    )


def list_some(names: Sequence[str], most: int = 20) -> str:
    """The first names, at most 20 by default, and how many more there are.

    >>> list_some(["a", "b", "c"], 2), list_some([])
    ('a, b and 1 more', 'none')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def is_whole_number(text: str, most_digits: int = 18) -> bool:
    """Whether a text is a whole number from 0 up, in ASCII, of no more digits.

    18 digits fit into an int64; Python refuses to read a number of thousands.

    >>> is_whole_number("0042"), is_whole_number("-1"), is_whole_number("4" * 19)
    (True, False, False)
    """
    return text.isascii() and text.isdigit() and len(text) <= most_digits


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
