"""A JSON object that somebody else wrote, read through typed accessors."""

from collections.abc import Iterator, Mapping

from common.errors import UserError

_MOST = 10**300


class MissingValueError(UserError, KeyError):
    """A key that a record lacks; for `get`, `in` and templates it is merely absent."""

    __str__ = Exception.__str__  # a KeyError's is in quotes


class Record(Mapping[str, object]):
    """A parsed JSON object; what is absent or of another type is an error that names its path.

    An object that is null or absent reads as an empty record, which is false.

    >>> results = Record({"metrics": {"kid": {"value": 0.5, "n": 8}, "fld": None}}, "results.json")
    >>> results.part("metrics").part("kid").number("value")
    0.5
    >>> bool(results.part("metrics").part("fld"))
    False
    """

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        """Wrap `values`; `path` is what errors call it."""
        self._values, self._path = values, path

    def __getitem__(self, key: str) -> object:
        if key not in self._values:
            where = f"{self._path}.{key}".strip(".")
            raise MissingValueError(f"{where} is missing; make the file again")
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def optional(self, key: str) -> int | float | None:
        """A number as it was written, None where it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._mismatch_error(key, "a number")
        if isinstance(value, int) and abs(value) >= _MOST:  # which no float has
            raise self._mismatch_error(key, "a number below 10^300")
        return value

    def number(self, key: str) -> float:
        """A number that must be there."""
        value = self.optional(key)
        if value is None:
            raise self._mismatch_error(key, "a number")
        return float(value)

    def count(self, key: str) -> int:
        """A whole number that must be there."""
        value = self.number(key)
        if not value.is_integer():
            raise self._mismatch_error(key, "a whole number")
        return int(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; `default` where it is null or absent."""
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self._mismatch_error(key, "a text")
        return value

    def part(self, key: str) -> "Record":
        """An object within this one."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._mismatch_error(key, "an object")
        return Record(value or {}, f"{self._path}.{key}")

    def parts(self, key: str) -> "list[Record]":
        """A list of objects; empty where it is null or absent."""
        # Through `part`, whose error names the item that is no object.
        return [
            Record({"": item}, f"{self._path}.{key}[{index}]").part("")
            for index, item in enumerate(self.items_of(key))
        ]

    def items_of(self, key: str) -> list[object]:
        """A list of anything; empty where it is null or absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, list | tuple):
            raise self._mismatch_error(key, "a list")
        return list(value or ())

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; empty where it is null or absent."""
        values = [item for item in self.items_of(key) if isinstance(item, int | float)]
        if len(values) < len(self.items_of(key)):
            raise self._mismatch_error(key, "a list of numbers")
        return values

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where it is null or absent."""
        return [str(item) for item in self.items_of(key)]

    def _mismatch_error(self, key: str, expected: str) -> UserError:
        found = repr(self._values[key]) if key in self._values else "nothing"
        where = f"{self._path}.{key}".strip(".")
        return UserError(f"{where}: expected {expected}, found {found}; make the file again")
