"""Jinja templates, filled strictly: every value is escaped, one that is missing is an error."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from common.escape import escape_terminal

if TYPE_CHECKING:
    from jinja2 import Template


def escape_html(text: str) -> Markup:
    """Text for HTML or SVG outside of a template: an element's text or an attribute in quotes.

    Control characters, which no document may contain, and marks that turn the direction of what
    follows are spaces.

    >>> escape_html("<b>\\u202e")
    Markup('&lt;b&gt; ')
    """
    return escape(escape_terminal(text))


def load_template(path: Path, filters: Mapping[str, Callable[..., object]] = {}) -> "Template":
    """The template in a file; `filters` are functions that it may use by their names."""
    # Here, not above: commands without a page need not import it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)


def _finalize(value: object) -> object:
    """What a template shows of a value, before it is escaped; `Markup` is passed on."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return escape_terminal(value)
    return value
