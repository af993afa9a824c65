"""Dataclasses from YAML and `key=value` overrides, strictly: wrong keys and types are refused.

Values are numbers, strings and their lists; no class path, no callable: a YAML file cannot run
code.
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common.errors import UserError
from common.files import read_regular
from common.plain_yaml import load_yaml
from common.text import one_line

T = TypeVar("T")


MOST_YAML_BYTES = 4 << 20
"""YAML is parsed at 1 MB per second; no configuration has a hundredth of that."""


class _Raw(str):
    """An override's text: what it means depends on the type of the key that it sets."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UserError` where there is none."""
    try:
        values = load_yaml(read_regular(path, MOST_YAML_BYTES).decode())
    except FileNotFoundError as error:
        raise UserError(f"configuration {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path}: cannot be read ({one_line(error)})") from error
    except ValueError as error:
        raise UserError(f"configuration {path}: not YAML: {error}") from error
    # An empty file is a configuration of defaults.
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else type(values).__name__
        raise UserError(f"configuration {path}: expected keys and values, got a {kind}")
    return values


def write_yaml(values: Mapping[str, object]) -> str:
    """YAML text of plain values, in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def with_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of nested values with `section.key=value` texts set in it.

    >>> with_overrides({"optim": {"lr": 0.1}}, ["optim.lr=2e-4", "seed=3"])
    {'optim': {'lr': '2e-4'}, 'seed': '3'}
    """
    result = _copy_nested(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"'{text}' is not an override; expected key=value, as in run.steps=100")
        *sections, leaf = key.split(".")
        place = result
        for section in sections:
            below = place.setdefault(section, {})
            if isinstance(below, _Raw):  # section={...} and then section.key=value
                below = place[section] = parse_override(below, section)
            if not isinstance(below, dict):
                raise UserError(f"override '{text}': '{section}' is not a section")
            place = below
        place[leaf] = _Raw(value)
    return result


def keys_given(values: Mapping[str, Any], *sections: str) -> set[str]:
    """The keys that nested values, with overrides set in them, give in a section.

    >>> sorted(keys_given(with_overrides({"model": {"depth": 2}}, ["model.width=3"]), "model"))
    ['depth', 'width']
    """
    place: Any = values
    for section in sections:
        place = place.get(section, {})
        if isinstance(place, _Raw):
            place = parse_override(place, section)
    return set(place)


def build_config(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with these nested values, its defaults elsewhere.

    A dataclass with `takes_single_values = True` takes a single value where a list is meant.
    Raises `UserError` naming the dotted key for an unknown key (with the nearest known one) and
    for a value of another type.
    """
    return _build_section(cls, values, "", dotted_keys(cls))


def check_setting(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise `UserError` naming the dotted key, its value and what is expected, unless it holds."""
    if not condition:
        raise _mismatch_error(key, expected, value)


def dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """Every key of nested dataclasses, dotted: `run.steps`, `model.sit.depth`, ..."""
    keys: list[str] = []
    hints = get_type_hints(cls)
    for field in _settable_fields(cls):
        if is_dataclass(hints[field.name]):
            keys += dotted_keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            keys.append(f"{prefix}{field.name}")
    return keys


def to_plain_values(config: Any) -> dict[str, Any]:
    """Nested plain values of a dataclass, ready for YAML and JSON."""
    return _tuples_to_lists(asdict(config))


def _settable_fields(cls: type) -> list["Field[Any]"]:
    """The fields that a configuration may set: all but those marked as derived."""
    return [field for field in fields(cls) if not field.metadata.get("derived")]


def _build_section(cls: type[T], values: Any, prefix: str, known: list[str]) -> T:
    if isinstance(values, _Raw):
        values = parse_override(values, prefix.rstrip("."))
    if not isinstance(values, Mapping):
        raise _mismatch_error(prefix.rstrip("."), "a section of keys", values)
    hints = get_type_hints(cls)
    names = [field.name for field in _settable_fields(cls)]
    # Unknown keys come first: a misspelt key would else be reported as a missing one.
    for name in values:
        if name not in names:
            raise UserError(_unknown_key_message(f"{prefix}{name}", known))
    for field in _settable_fields(cls):
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if field.name not in values and not has_default:
            raise UserError(f"configuration key '{prefix}{field.name}' is missing: it must be set")
    settings = dict(values)
    if getattr(cls, "takes_single_values", False):
        settings = {
            name: _as_list(hints[name], value, prefix + name) for name, value in settings.items()
        }
    built = {
        name: _build_value(hints[name], value, prefix + name, known)
        for name, value in settings.items()
    }
    return cls(**built)


def _as_list(hint: Any, value: Any, key: str) -> Any:
    """A single value of a field that is a list of any length, as a list of one."""
    if get_origin(hint) is not tuple or Ellipsis not in get_args(hint):
        return value
    if isinstance(value, _Raw):
        value = parse_override(value, key)
    return value if isinstance(value, list | tuple) else [value]


def _build_value(hint: Any, value: Any, key: str, known: list[str]) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return _build_section(hint, value, f"{key}.", known)
    if isinstance(value, _Raw):
        if hint is str:
            return str(value)
        value = parse_override(value, key)
    origin, args = get_origin(hint), get_args(hint)
    if hint is object:  # anything: no type says what is right
        entries = value.items() if isinstance(value, Mapping) else ()
        return {
            name: _build_value(object, item, f"{key}.{name}", known) for name, item in entries
        } or value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch_error(key, "names and their values", value)
        return {name: _build_entry(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if origin is tuple and is_dataclass(args[0]):
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(
            _build_entry(args[0], item, f"{key}[{index}]") for index, item in enumerate(items)
        )
    return _check_scalar(hint, value, key)


def _build_entry(hint: Any, value: Any, key: str) -> Any:
    """A value of a mapping or list, where nearest keys are searched among its alone."""
    is_section = is_dataclass(hint) and isinstance(hint, type)
    return _build_value(hint, value, key, dotted_keys(hint, f"{key}.") if is_section else [])


def _check_scalar(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value is False and "off" in args:
            value = "off"  # which YAML takes for false
        # True equals 1: a boolean must not pass for a number among the choices.
        if value not in args or isinstance(value, bool) not in {isinstance(a, bool) for a in args}:
            raise _mismatch_error(key, "one of " + ", ".join(map(str, args)), value)
        return value
    if origin in (Union, types.UnionType):
        rest = [arg for arg in args if arg is not type(None)]
        return (
            None if value is None and len(rest) < len(args) else _check_scalar(rest[0], value, key)
        )
    if origin is tuple:
        return _check_tuple(args, value, key)
    if hint is float:
        return _parse_number(value, key)
    expected = {bool: "true or false", int: "a whole number", str: "text"}
    if hint not in expected:
        raise TypeError(f"{key}: configuration fields of type {hint} are not supported")
    # Not isinstance: a bool is an int.
    if type(value) is not hint:
        raise _mismatch_error(key, expected[hint], value)
    return value


def _check_tuple(args: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _mismatch_error(key, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise _mismatch_error(key, f"a list of {len(args)} values", value)
    return tuple(_check_scalar(arg, item, key) for arg, item in zip(args, value, strict=True))


def _parse_number(value: Any, key: str) -> float:
    """A float; YAML 1.1 reads 1e-4 as text, which people write for a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _mismatch_error(key, "a number", value)
    try:
        return float(value)
    except ValueError as error:
        raise _mismatch_error(key, "a number", value) from error


def parse_override(text: str, key: str) -> Any:
    """The value of an override's text; a `UserError` names the key where it is no YAML."""
    try:
        return load_yaml(str(text))
    except ValueError as error:
        raise UserError(f"{key}={text}: not a YAML value: {error}") from error


def _unknown_key_message(key: str, known: list[str]) -> str:
    sections = sorted({name.partition(".")[0] for name in known})
    near = difflib.get_close_matches(key, known if "." in key else known + sections, n=1)
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    # The same key in another section is likelier meant than a similar spelling.
    best = (same_leaf or near)[:1]
    hint = f"did you mean '{best[0]}'?" if best else f"sections are {', '.join(sections)}"
    return f"unknown configuration key '{key}': {hint}"


def _mismatch_error(key: str, expected: str, value: Any) -> UserError:
    shown = str(value) if isinstance(value, str) else repr(value)
    return UserError(f"configuration key '{key}': expected {expected}, got '{shown}'")


def _copy_nested(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy_nested(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, tuple | list) else value
