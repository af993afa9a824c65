"""A protocol's tables as Markdown and LaTeX, from the same rows as the page's."""

from collections.abc import Mapping, Sequence
from typing import Any

Table = Mapping[str, Any]

_BETTER = {"lower": "↓", "higher": "↑", "": ""}
_KINDS = {"control": "Controls", "reference": "", "model": "", "published": ""}


def number(value: float | None, *, share: bool = False) -> str:
    """A value of a table: three decimals for shares, else four significant digits."""
    if value is None:
        return "–"
    if share:
        return f"{value:.3f}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def entry_text(entry: Mapping[str, Any] | None, *, share: bool = False) -> str:
    """A value with its spread where it has one: 12.3 ± 0.4."""
    if entry is None:
        return "–"
    text = number(entry["value"], share=share)
    if entry.get("spread") is None:
        return text
    return f"{text} ± {number(entry['spread'], share=share)}"


def counts_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The sample counts of rows, where all their entries agree; else what they range over."""
    found: dict[str, set[int]] = {}
    for row in rows:
        for entry in row["cells"].values():
            for key, count in (entry or {}).get("n", {}).items():
                found.setdefault(key, set()).add(count)
    names = {"n_real": "real", "n_generated": "generated", "n": "tiles"}
    order = [key for key in names if key in found] + [key for key in found if key not in names]
    return ", ".join(f"{_span(found[key])} {names.get(key, key)}" for key in order)


def _span(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def markdown(results: Mapping[str, Any]) -> str:
    """All tables as GitHub's Markdown, with the warnings in front."""
    lines = [f"# {results['title']}", ""]
    if results["source"]:
        lines += [f"Protocol `{results['protocol']}`: {results['source']}.", ""]
    lines += [f"> **Warning.** {one['message']}\n" for one in results["warnings"]]
    for table in results.get("tables", []):
        lines += [*_markdown_table(table), ""]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    heads = [f"{one['encoder']}, {one['set']}" for one in table["columns"]]
    lines = [
        f"## {table['title']} {_BETTER[table['better']]}".rstrip(),
        "",
        "| " + " | ".join(["", *heads, "n"]) + " |",
        "|---|" + "---:|" * len(heads) + "---|",
    ]
    for row in table["rows"]:
        values = [entry_text(one, share=table["share"]) for one in row["cells"].values()]
        label = f"*{row['label']}*" if row["kind"] != "model" else row["label"]
        counts = counts_text([row])
        lines.append("| " + " | ".join([label.replace("|", "\\|"), *values, counts]) + " |")
    return lines


_ESCAPES = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
            "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
            "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "…": r"\ldots{}",
            "“": "``", "”": "''", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
            "→": r"$\to$", "−": "$-$", "’": "'", "₁": "$_1$", "₂": "$_2$"}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it reads."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def latex(results: Mapping[str, Any]) -> str:
    """All tables in booktabs' form, a comment in front saying what to beware of."""
    lines = ["% \\usepackage{booktabs}"]
    lines += [f"% warning: {one['message']}" for one in results["warnings"]]
    for table in results.get("tables", []):
        lines += ["", *_latex_table(results, table)]
    return "\n".join(lines) + "\n"


def _latex_table(results: Mapping[str, Any], table: Table) -> list[str]:
    columns = table["columns"]
    sets = list(dict.fromkeys(one["set"] for one in columns))
    encoders = list(dict.fromkeys(one["encoder"] for one in columns))
    heads = [
        rf"\multicolumn{{{len(sets)}}}{{c}}{{{escape_latex(encoder)}}}" for encoder in encoders
    ]
    below = [escape_latex(one["set"]) for one in columns]
    title = escape_latex(f"{table['title']} {_BETTER[table['better']]}".rstrip())
    rows = []
    before = ""
    for row in table["rows"]:
        if before and row["kind"] == "control" != before:
            rows.append(r"\midrule")
        before = row["kind"]
        values = [entry_text(one, share=table["share"]) for one in row["cells"].values()]
        rows.append(" & ".join(map(escape_latex, [row["label"], *values])) + r" \\")
    return [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{title} ({escape_latex(results['protocol'])}).}}",
        r"\begin{tabular}{l" + "r" * len(columns) + "}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        " & ".join(["", *below]) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
