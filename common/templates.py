"""Jinja templates, filled strictly: every value is escaped, one that is missing is an error."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


def load_template(path: Path, filters: Mapping[str, Callable[..., object]] = {}) -> "Template":
    """The template in a file; `filters` are functions that it may use by their names."""
    # Here, not above: commands without a page need not import it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)
