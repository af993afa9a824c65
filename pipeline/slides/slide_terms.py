"""The terms of slides, as `scan --terms` or a table's columns state them."""

from pathlib import Path

from common.errors import UserError
from common.files import read_regular
from common.plain_yaml import load_yaml
from common.terms import MOST_STATED, Terms, merge_terms, parse_terms
from pipeline.dataset import Dataset, read_terms

_SUFFIXES = (".yaml", ".yml", ".json")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def read_slide_terms(text: str) -> tuple[Terms, ...]:
    """The records of a YAML or JSON file, or one record of a licence's name; of "" none.

    Raises `UserError` for a file that is missing or has no such list.

    >>> read_slide_terms("CC0-1.0")[0].describe()
    'slides: CC0-1.0'
    """
    if not text:
        return ()
    if Path(text).suffix.lower() not in _SUFFIXES:
        return (Terms("slides", " ".join(text.split())),)
    try:
        values = load_yaml(read_regular(Path(text), 1 << 20).decode())
        return parse_terms(values)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"--terms {text}: {error}") from error


def stated_terms(
    dataset: Dataset, stage: str, terms: tuple[Terms, ...], *, others_stay: bool
) -> tuple[Terms, ...] | None:
    """What a stage that brings slides records: its terms; None where none were stated.

    Where slides that it does not name stay in the dataset, what it recorded of them does, too.
    Raises `UserError` for more records than a cohort has.
    """
    if len(terms) > MOST_STATED:
        raise UserError(
            f"the slides' terms: {len(terms)} different records (licence, non_commercial, "
            f"licence_link and project), expected at most {MOST_STATED}; state the terms of "
            "whole cohorts in the table, or by --terms FILE.yaml"
        )
    if not terms:
        return None
    return merge_terms(read_terms(dataset, stage), terms) if others_stay else terms


def terms_of_row(licence: str, non_commercial: str, link: str, project: str) -> Terms | None:
    """The terms that a row of a table states; None for none.

    Raises `ValueError` for a value of `non_commercial` that is neither yes nor no.
    """
    word = non_commercial.lower()
    if word and word not in _TRUE + _FALSE:
        raise ValueError(f"non_commercial '{non_commercial}', expected yes or no")
    if not (licence or word or link):
        return None
    covers = f"slides of {project}" if project else "slides"
    return Terms(covers, licence, non_commercial=word in _TRUE if word else None, link=link)
