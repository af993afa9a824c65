"""Text of records for other languages: one function per target, used wherever text crosses over.

Records, file names, labels and errors of others may contain anything. HTML is escaped by Jinja
(`common.templates`) and `markupsafe.escape`; what goes to a terminal by `common.console`.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_UNSEEN = re.compile(
    # Marks of direction; characters without width; annotations; tags; halves of surrogate pairs.
    "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u00ad\u180e\u200b\u2060-\u2065\u206a-\u206f"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
          "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
          "|": r"\textbar{}", "`": r"\textasciigrave{}", '"': "{''}",
          # The `\\` that ends a row would take them for its own argument.
          "[": "{[}", "]": "{]}", "*": "{*}",
          "±": r"$\pm$", "×": r"$\times$", "−": "$-$", "≤": r"$\leq$", "≥": r"$\geq$",
          "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\to$", "µ": r"$\mu$", "μ": r"$\mu$",
          "°": r"$^\circ$", "²": "$^2$", "³": "$^3$", "₁": "$_1$", "₂": "$_2$",
          "–": "--", "—": "---", "…": r"\ldots{}", "“": "``", "”": "''", "‘": "`", "’": "'",
          "\u00a0": " ", "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "œ": r"\oe{}",
          "Œ": r"\OE{}", "ø": r"\o{}", "Ø": r"\O{}", "ł": r"\l{}", "Ł": r"\L{}"}  # fmt: skip
_LATEX_ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=",
                  "\u0306": "u", "\u0307": ".", "\u0308": '"', "\u030a": "r", "\u030b": "H",
                  "\u030c": "v", "\u0323": "d", "\u0327": "c", "\u0331": "b"}  # fmt: skip
_LATEX_LIGATURE = re.compile(r"([-,'])(?=\1)")
_MARKDOWN = re.compile(
    r"(?P<backslash>[\\`*{}\[\]])"
    # A backslash before these is not read by every Markdown, an entity is.
    r"|(?P<entity>[<>|~$]|&(?=#?\w+;)|:(?=//)|(?<=\bwww)\.|(?<=\w)@(?=\w))"
    # Within a word, as in slide_12, an underscore means nothing.
    r"|(?P<underscore>(?<![^\W_])_|_(?![^\W_]))",
    re.ASCII,
)
# Headings, lists and rules; blocks of extensions (`!!! note`, `::: name`, `=== "tab"`).
_MARKDOWN_BLOCK = re.compile(
    r"(?P<backslash>#|[-+](?=[-+\s]|$)|!)|(?P<number>\d{1,9})(?P<point>[.)])(?=\s|$)"
    r"|(?P<entity>[=:?/])",
    re.ASCII,
)
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


def escape_terminal(text: str) -> str:
    """Text on one line that steers no terminal.

    Control characters become a space, and so do those that are not seen or turn the direction of
    what follows.

    >>> escape_terminal("a\\x1b[31m\\nb")
    'a [31m b'
    """
    # A name of plain letters, as nearly all are, is passed on as it is.
    return (
        text if text.isascii() and text.isprintable() else _UNSEEN.sub(" ", _CONTROL.sub(" ", text))
    )


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it reads, on one line, also as a comment or a table's cell.

    What pdflatex has no character for is set as its code point.

    >>> escape_latex("50 % ± 2"), escape_latex("é 中")
    ('50 \\\\% $\\\\pm$ 2', "\\\\'{e} U+4E2D")
    """
    whole = unicodedata.normalize("NFC", escape_terminal(text))
    # Two of these alike are one other character to TeX.
    return "".join(map(_latex_character, _LATEX_LIGATURE.sub("\\1\0", whole)))


def _latex_character(character: str) -> str:
    if character == "\0":
        return "{}"
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii():
        return character
    letter, *accents = list(unicodedata.normalize("NFD", character))
    if len(accents) == 1 and accents[0] in _LATEX_ACCENTS and letter.isascii():
        return rf"\{_LATEX_ACCENTS[accents[0]]}{{{letter}}}"
    return f"U+{ord(character):04X}"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it reads, on one line: no HTML, link, emphasis, cell or block.

    Escaped is only what would mean something: people read the file as it is, too.

    >>> escape_markdown("<b>|a|"), escape_markdown("0.5 mpp (train-val)")
    ('&lt;b&gt;&#124;a&#124;', '0.5 mpp (train-val)')
    """
    inline = _MARKDOWN.sub(_escape_match, escape_terminal(text).strip())
    first = _MARKDOWN_BLOCK.match(inline)
    if first is None:
        return inline
    if first["number"]:
        return f"{first['number']}\\{inline[first.start('point') :]}"
    return _escape_match(first) + inline[1:]


def _escape_match(match: re.Match[str]) -> str:
    character = match[0]
    if match["entity"]:
        return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(character, f"&#{ord(character)};")
    return f"\\{character}"


def escape_plot(text: str) -> str:
    """Text of a figure that matplotlib draws as it reads, on one line: no formula, never hidden.

    >>> escape_plot("$x$"), escape_plot("_a")
    ('\\\\$x\\\\$', ' _a')
    """
    shown = escape_terminal(text).replace("$", r"\$")
    # A legend leaves out labels that begin with an underscore.
    return f" {shown}" if shown.startswith("_") else shown


def escape_csv(text: str) -> str:
    """A cell on one line that no spreadsheet takes for a formula; a number stays one.

    One that begins like a formula gets a quote in front.

    >>> escape_csv("=1+1"), escape_csv("TCGA-A1"), escape_csv("-0.5")
    ("'=1+1", 'TCGA-A1', '-0.5')
    """
    cell = escape_terminal(text)
    # Spreadsheets pass over blanks before a formula.
    begins = text[:1] in _FORMULA or cell.lstrip()[:1] in _FORMULA
    return f"'{cell}" if begins and text[:1] and not _NUMBER.fullmatch(text) else cell


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, lines ended by a newline; text is escaped, numbers are as `str` writes them.

    >>> csv_text([["slide", "mpp"], ["@a", -0.5]])
    "slide,mpp\\n'@a,-0.5\\n"
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([escape_csv(cell) if isinstance(cell, str) else cell for cell in row])
    return buffer.getvalue()


def script_safe_json(document: object) -> str:
    """JSON for the inside of a script element: nothing in it can end that element.

    >>> script_safe_json({"id": "</script>"})
    '{"id":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
