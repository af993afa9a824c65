"""The templates of this folder, filled strictly, and the style that their pages share."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

_HERE = Path(__file__).parent


def template(name: str) -> Template:
    """A template by its file's name: every value is escaped, one that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def style() -> Markup:
    """The style sheet, to stand inside the page."""
    return Markup((_HERE / "page.css").read_text(encoding="utf-8"))
