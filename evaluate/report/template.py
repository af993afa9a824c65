"""The templates of this folder, filled strictly, with the style and images that pages carry."""

import base64
from pathlib import Path

from markupsafe import Markup

from common.templates import load_template
from common.terms import parse_terms
from evaluate.report.images import encode_page_png

_HERE = Path(__file__).parent


def data_uri(data: bytes, kind: str) -> str:
    """Bytes of a MIME type as a URI for a page.

    >>> data_uri(b"tile", "image/png")
    'data:image/png;base64,dGlsZQ=='
    """
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def render_template(name: str, **values: object) -> str:
    """A template of this folder, filled: every value is escaped, a missing one is an error."""
    return load_template(_HERE / name).render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        svg_uri=lambda data: data_uri(data, "image/svg+xml"),
        jpeg_uri=lambda data: data_uri(data, "image/jpeg"),
        describe_terms=lambda records: [one.describe() for one in parse_terms(records)],
        tile_uri=lambda tile: data_uri(encode_page_png(tile), "image/png"),
        **values,
    )
