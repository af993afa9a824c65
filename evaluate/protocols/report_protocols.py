"""`protocol all`: every table and figure of the CytoSyn report under one configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import parse_override, read_yaml
from common.errors import UserError
from evaluate.protocols.config import Protocol, build_protocol, read_shipped
from evaluate.protocols.published_values import published_rows

REPORT_PROTOCOLS = ("table2", "table3", "table4", "table5", "figure4", "figure5")
_NAMED = ("sets", "models", "generations")
"""Sections whose names a protocol may lack: what configures them concerns those that have them."""


def load_report(config: Path | None, overrides: Sequence[str] = ()) -> list[Protocol]:
    """The protocols of the report, each under what concerns it of the user's YAML and overrides.

    Raises `UserError` for a set, model or generation, or a name in `leave_out`, that no protocol
    has, and for whatever else a single protocol refuses.
    """
    values = read_yaml(config) if config else {}
    texts = [text for text in overrides if not text.startswith("leave_out=")]
    for text in overrides:
        if text not in texts:
            values["leave_out"] = parse_override(text.partition("=")[2], "leave_out")
    names = {name: _names_of(read_shipped(name)) for name in REPORT_PROTOCOLS}
    known = set().union(*names.values())
    _check_known(values, texts, known)
    protocols = [
        build_protocol(
            name,
            _concerning(values, names[name]),
            [text for text in texts if _override_name(text) in (None, *names[name])],
        )
        for name in REPORT_PROTOCOLS
    ]
    chosen = {protocol.published_model for protocol in protocols}
    if len(chosen) == 1 and not any(chosen & set(published_rows(one)) for one in protocols):
        raise UserError(f"published_model is '{chosen.pop()}', which no table of the report has")
    return protocols


def _names_of(shipped: Mapping[str, Any]) -> set[str]:
    named = {f"{section}.{name}" for section in _NAMED for name in shipped.get(section, {})}
    return named | {f"columns.{name}" for name in shipped["columns"]}


def _override_name(text: str) -> str | None:
    """`models.x` of `models.x.dtype=...`; None for a key of the protocol itself, or a star."""
    section, _, rest = text.partition("=")[0].partition(".")
    name = rest.partition(".")[0]
    return f"{section}.{name}" if section in _NAMED and name not in ("", "*") else None


def _check_known(values: Mapping[str, Any], texts: Sequence[str], known: set[str]) -> None:
    given = [_override_name(text) for text in texts]
    given += [
        f"{section}.{name}"
        for section in _NAMED
        if isinstance(values.get(section), Mapping)
        for name in values[section]
    ]
    for name in given:
        if name is not None and name not in known:
            section = name.partition(".")[0]
            there = ", ".join(sorted(one for one in known if one.startswith(f"{section}.")))
            raise UserError(f"{name} is in no protocol of the report; there are {there}")
    for name in _leave_out(values):
        if not {f"models.{name}", f"columns.{name}"} & known:
            raise UserError(f"leave_out: no model or column '{name}' in any protocol of the report")


def _leave_out(values: Mapping[str, Any]) -> list[str]:
    names = values.get("leave_out", [])
    return [str(one) for one in names] if isinstance(names, list) else [str(names)]


def _concerning(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The values without the entries of sections, and names left out, that a protocol lacks."""
    kept = dict(values)
    for section in _NAMED:
        entries = values.get(section)
        if isinstance(entries, Mapping):
            kept[section] = {n: v for n, v in entries.items() if f"{section}.{n}" in names}
    if "leave_out" in values:
        kept["leave_out"] = [
            n for n in _leave_out(values) if {f"models.{n}", f"columns.{n}"} & names
        ]
    return kept
