"""A protocol's tables as Markdown and LaTeX, from the same rows as the page's."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from common.escape import escape_latex, escape_markdown
from common.record import Record
from common.text import format_number, format_share

_BETTER = {"lower": "↓", "higher": "↑", "": ""}


def entry_text(entry: Record, *, share: bool = False) -> str:
    """A value with its spread where it has one, a dash for an empty entry.

    >>> entry_text(Record({"value": 12.3, "spread": 0.4})), entry_text(Record({}))
    ('12.3 ± 0.4', '–')
    """
    if not entry:
        return "–"
    numbers = [entry.number("value")]
    if entry.optional("spread") is not None:
        numbers.append(entry.number("spread"))
    return " ± ".join(map(format_share if share else format_number, numbers))


def published_text(entry: Record, *, share: bool = False) -> str:
    """The published value with the difference to ours, where the two can be compared.

    >>> number = {"value": 48.1, "spread": None, "approximate": False, "difference": 0.31}
    >>> published_text(Record({"published": number}))
    '48.1, +0.31'
    """
    number = entry.part("published")
    if not number:
        return ""
    show = format_share if share else format_number
    text = ("about " if number["approximate"] else "") + show(number.number("value"))
    if number.optional("spread") is not None:
        text += f" ± {show(number.number('spread'))}"
    difference = number.optional("difference")
    if difference is None:
        return text
    return f"{text}, {signed_text(float(difference), show)}"


def signed_text(value: float, show: Callable[[float], str]) -> str:
    """A difference with its sign, as `show` writes numbers.

    >>> signed_text(-0.31, format_number)
    '−0.31'
    """
    return ("+" if value >= 0 else "−") + show(abs(value))


def deviations_text(entry: Record) -> str:
    """Why the published value of an entry cannot be compared with ours; "" where it can."""
    return "; ".join(entry.part("published").texts("deviations"))


def with_published(entry: Record, *, share: bool = False) -> str:
    """A value and, in parentheses, the published one; in brackets where they cannot be compared."""
    text, published = entry_text(entry, share=share), published_text(entry, share=share)
    if not published:
        return text
    return f"{text} [{published}]" if deviations_text(entry) else f"{text} ({published})"


_PUBLISHED_NOTE = (
    "In parentheses: the published value, and ours less it. In brackets: a published value that "
    "cannot be compared, since this run deviates from the protocol: {}."
)


def published_note(table: Record) -> str:
    """What the published values in a table are, with the deviations; "" where it has none."""
    entries = [entry for row in table.parts("rows") for entry in row_entries(row)]
    if not any(entry.part("published") for entry in entries):
        return ""
    named = dict.fromkeys(
        text for entry in entries for text in entry.part("published").texts("deviations")
    )
    note = _PUBLISHED_NOTE.format("; ".join(named))
    return note if named else note.partition(" In brackets")[0]


def row_entries(row: Record) -> list[Record]:
    """The entries of a table's row in the order of its columns, empty where it has no number."""
    cells = row.part("cells")
    return [cells.part(column) for column in cells]


def counts_text(row: Record) -> str:
    """The sample counts of a row's entries, as a range where they differ."""
    counts: dict[str, set[int]] = {}
    for entry in row_entries(row):
        for key in entry.part("n"):
            counts.setdefault(key, set()).add(entry.part("n").count(key))
    # Known counts first, in a fixed order; others as the protocol names them.
    names = {"n_real": "real", "n_generated": "generated", "n": "tiles"}
    order = [key for key in names if key in counts] + [key for key in counts if key not in names]
    return ", ".join(
        f"{' to '.join(f'{n:,}' for n in sorted({min(counts[key]), max(counts[key])}))} "
        f"{names.get(key, key)}"
        for key in order
    )


def tables_as_markdown(results: Record) -> str:
    """All tables as GitHub's Markdown, with the warnings in front."""
    lines = [f"# {escape_markdown(results.text('title'))}", ""]
    if results["source"]:
        source = escape_markdown(results.text("source"))
        lines += [f"Protocol {_code_markdown(results.text('protocol'))}: {source}.", ""]
    lines += [
        f"> **Warning.** {escape_markdown(one.text('message'))}\n"
        for one in results.parts("warnings")
    ]
    for table in results.parts("tables"):
        lines += [*_markdown_table(table), ""]
    return "\n".join(lines)


def _code_markdown(name: str) -> str:
    """A name as code; as text where it has what ends code or means something in it."""
    return f"`{name}`" if re.fullmatch(r"[\w.+-]+", name, re.ASCII) else escape_markdown(name)


def _table_heading(table: Record) -> str:
    return f"{table['title']} {_BETTER.get(table.text('better'), '')}".rstrip()


def _texts_by_row(table: Record) -> Iterator[tuple[Record, list[str]]]:
    share = bool(table["share"])
    for row in table.parts("rows"):
        yield row, [with_published(entry, share=share) for entry in row_entries(row)]


def _markdown_table(table: Record) -> list[str]:
    heads = [escape_markdown(f"{one['encoder']}, {one['set']}") for one in table.parts("columns")]
    lines = [
        f"## {escape_markdown(_table_heading(table))}",
        "",
        "| " + " | ".join(["", *heads, "n"]) + " |",
        "|---|" + "---:|" * len(heads) + "---|",
    ]
    for row, values in _texts_by_row(table):
        label = escape_markdown(row.text("label"))
        # Stars around nothing would be stars.
        cells = [f"*{label}*" if label and row["kind"] != "model" else label]
        cells += map(escape_markdown, [*values, counts_text(row)])
        lines.append("| " + " | ".join(cells) + " |")
    note = published_note(table)
    return [*lines, "", escape_markdown(note)] if note else lines


def tables_as_latex(results: Record) -> str:
    """All tables in booktabs' form, the warnings in front as comments."""
    lines = ["% \\usepackage{booktabs,xcolor}"]
    # Escaped in comments too: they are there to be made text of.
    lines += [
        f"% warning: {escape_latex(one.text('message'))}" for one in results.parts("warnings")
    ]
    for table in results.parts("tables"):
        lines += ["", *_latex_table(results.text("protocol"), table)]
    return "\n".join(lines) + "\n"


def _latex_table(protocol: str, table: Record) -> list[str]:
    columns = table.parts("columns")
    spans = Counter(column.text("encoder") for column in columns)
    heads = [
        rf"\multicolumn{{{span}}}{{c}}{{{escape_latex(encoder)}}}"
        for encoder, span in spans.items()
    ]
    # Two rows of heads: each encoder over the sets that it was compared on.
    below = [escape_latex(column.text("set")) for column in columns]
    rows, kind_before = [], ""
    for row, values in _texts_by_row(table):
        if kind_before and row["kind"] == "control" != kind_before:
            rows.append(r"\midrule")
        kind_before = row.text("kind")
        rows.append(
            " & ".join([escape_latex(row.text("label")), *map(_latex_entry, values)]) + r" \\"
        )
    return [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(_table_heading(table))} ({escape_latex(protocol)}).}}",
        r"\begin{tabular}{l" + "r" * len(columns) + "}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        " & ".join(["", *below]) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        *([rf"\par\small {escape_latex(note)}"] if (note := published_note(table)) else []),
        r"\end{table}",
    ]


def _latex_entry(text: str) -> str:
    """Escaped, with a bracketed published value in grey."""
    value, bracket, published = text.partition(" [")
    grey = rf" \textcolor{{gray}}{{[{escape_latex(published)}}}" if bracket else ""
    return escape_latex(value) + grey
