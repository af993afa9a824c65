"""Text of records for other languages: one function per target, used wherever text crosses over.

HTML is escaped by Jinja (`common.templates`) and `markupsafe.escape`.
"""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_BIDI = re.compile(r"[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
          "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "…": r"\ldots{}",
          "“": "``", "”": "''", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
          "→": r"$\to$", "−": "$-$", "’": "'", "₁": "$_1$", "₂": "$_2$"}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$-])")


def escape_terminal(text: str) -> str:
    """Text on one line that steers no terminal: control and bidirectional characters are spaces.

    >>> escape_terminal("a\\x1b[31m\\nb")
    'a [31m b'
    """
    return _BIDI.sub(" ", _CONTROL.sub(" ", text))


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it reads, on one line.

    >>> escape_latex("50 % ± 2")
    '50 \\\\% $\\\\pm$ 2'
    """
    return "".join(_LATEX.get(character, character) for character in escape_terminal(text))


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it reads, on one line: no HTML, link, emphasis or table cell.

    >>> escape_markdown("<b>|a|")
    '\\\\<b\\\\>\\\\|a\\\\|'
    """
    return _MARKDOWN.sub(r"\\\1", escape_terminal(text))


def escape_csv(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: one that begins like one gets a quote.

    >>> escape_csv("=1+1"), escape_csv("TCGA-A1")
    ("'=1+1", 'TCGA-A1')
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
