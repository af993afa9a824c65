"""Under whose terms something may be used: records that travel with what they cover.

Nothing here decides what is allowed. A dataset, a run, a model and results say what they descend
from, so that a person can.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from common.errors import UserError
from common.text import one_line

_LONGEST = 300
MOST_STATED = 200
"""Of the slides of one dataset; a cohort has a handful."""
_MOST = 10_000
"""Of a list that somebody else wrote: lineages add up."""


@dataclass(frozen=True)
class Terms:
    """The terms of one thing: what it `covers`, under which `licence`, from which `source`.

    `non_commercial` is None where it is not known. `link` leads to the terms; texts may be empty.
    """

    covers: str
    licence: str
    source: str = ""
    non_commercial: bool | None = None
    link: str = ""

    @classmethod
    def parse(cls, values: object) -> Self:
        """The record of parsed JSON, which somebody else may have written; texts are cut short.

        Raises `UserError` for one without its kinds of values.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"terms: expected an object, got {one_line(repr(values), 60)}")
        texts = {key: values.get(key, "") for key in ("covers", "licence", "source", "link")}
        free = values.get("non_commercial")
        if not all(isinstance(t, str) for t in texts.values()) or free not in (None, True, False):
            raise UserError(
                "terms: expected texts covers, licence, source, link, and non_commercial true, "
                f"false or null; got {one_line(repr(dict(values)), 80)}"
            )
        cut = {key: one_line(text, _LONGEST) for key, text in texts.items()}
        return cls(**cut, non_commercial=free)

    def describe(self) -> str:
        """The record in a line.

        >>> Terms("encoder x", "MIT", "lab/x", False).describe()
        'encoder x: MIT (lab/x)'
        >>> Terms("slides", "", non_commercial=True).describe()
        'slides: licence not recorded, non-commercial use only'
        """
        text = f"{self.covers}: {self.licence or 'licence not recorded'}"
        if self.non_commercial:
            text += ", non-commercial use only"
        where = ", ".join(part for part in (self.source, self.link) if part)
        return f"{text} ({where})" if where else text


def merge_terms(*lists: Iterable[Terms]) -> tuple[Terms, ...]:
    """All records in their order, each once."""
    return tuple(dict.fromkeys(one for records in lists for one in records))


def parse_terms(values: object) -> tuple[Terms, ...]:
    """The records of a list in parsed JSON; of nothing (an older release's file) none.

    Raises `UserError` for what is no such list.
    """
    if values is None:
        return ()
    if not isinstance(values, list | tuple) or len(values) > _MOST:
        raise UserError(f"terms: expected a list of at most {_MOST} objects")
    return merge_terms(Terms.parse(one) for one in values)


def plain_terms(records: Iterable[Terms]) -> list[dict[str, str | bool | None]]:
    """The records as JSON has them."""
    return [asdict(record) for record in records]
