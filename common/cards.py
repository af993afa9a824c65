"""Cards: a README.md with the head that the Hugging Face hub reads, for models and datasets."""

import re
from collections.abc import Iterable, Mapping, Sequence

from common.config import write_yaml
from common.escape import escape_markdown
from common.terms import Terms

_HUB_LICENCES = frozenset({
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0", "cc-by-sa-4.0",
})  # fmt: skip
"""The hub's names of licences: the usual ones in lower case, with hyphens."""

_NO_TERMS = "No terms were recorded."


def licence_head(terms: Sequence[Terms]) -> dict[str, str]:
    """The hub's keys for what a thing descends from.

    The hub has one licence for a thing: where there are several, or one it does not know, it is
    "other", and the card has the list.

    >>> licence_head([Terms("slides", "CC0-1.0")])
    {'license': 'cc0-1.0'}
    """
    names = {one.licence for one in terms}
    if len(names) == 1 and (hub_name := _with_hyphens(*names)) in _HUB_LICENCES:
        return {"license": hub_name}
    label = "see-terms" if names - {""} else "not-recorded"
    return {"license": "other", "license_name": label}


def _with_hyphens(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def render_card(
    title: str,
    head: Mapping[str, object],
    sections: Iterable[tuple[str, Sequence[str]]],
    terms: Sequence[Terms],
) -> str:
    """The text of a card: head, title, sections of escaped lines, and the terms by lineage.

    Lines of one section are a list, except where there is one. Empty sections are left out.
    """
    lines = ["---", write_yaml({**licence_head(terms), **head}).rstrip(), "---", ""]
    lines += [f"# {escape_markdown(title)}", ""]
    for heading, texts in sections:
        if texts:
            mark = "- " if len(texts) > 1 else ""
            lines += [f"## {heading}", "", *(mark + escape_markdown(text) for text in texts), ""]
    lines += ["## Terms", ""]
    lines += [f"- {escape_markdown(one.describe())}" for one in terms] or [_NO_TERMS]
    lines += ["", "What these terms allow is not decided here: read them.", ""]
    return "\n".join(lines)
