"""Command-line options made from the fields of a dataclass: one field is one option.

The field has the type, the default and, in its metadata, the words of the option; the parser and
the dataclass are then filled from that one place:

    @dataclass(frozen=True)
    class CropConfig:
        files: tuple[str, ...] = field(metadata=option_metadata("pictures", positional=True))
        mpp: float = option_field(0.5, "µm per pixel", parse=parse_mpp)
        mode: Literal["fast", "exact"] = option_field("fast", "how to crop")
        skip: tuple[str, ...] = option_field((), "left out; may be given several times")

    parser = argparse.ArgumentParser()
    add_config_options(parser, CropConfig)
    config = config_from_options(CropConfig, parser.parse_args(["a.png", "--mpp", "0.25"]))

| field | option |
|---|---|
| `name: T` without a default | required; a positional one with a default may be left out |
| `bool = False` | a flag |
| `Literal[...]` | its values are the choices ("" is none of them) |
| `T or None` | as T |
| `tuple[T, ...]` | may be given several times (see `Option` for lists in one word) |
| a dataclass | its own fields' options, at the same level |
| no metadata | not an option: it keeps its default, or is given to `config_from_options` |

A default that says something is shown at the end of the help text. `option_field(default, ...)`
is short for `field(default=default, metadata=option_metadata(...))`; a field without a default is
written out, so that type checkers know that it must be given.
"""

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What a field does not say of its option.

    `flag` is the option's name where it is not the field's. `parse` turns one word into one value
    and raises `argparse.ArgumentTypeError` with what was expected. Of a tuple's values, `many`
    takes several words after one flag, and `separator` splits one word. `choices` are for types
    that state none; as a function they are looked up when the parser is made. `is_optional` lets
    an option without a default be left out, where the command itself checks it.
    """

    help: str
    flag: str = ""
    metavar: str | None = None
    parse: Callable[[str], object] | None = None
    choices: Iterable[str] | Callable[[], Iterable[str]] = ()
    positional: bool = False
    many: bool = False
    is_optional: bool = False
    separator: str = ""


def option_metadata(help: str, **more: Any) -> Mapping[str, Option]:
    """Metadata of a field that is an option; the keywords are the fields of `Option`.

    >>> option_metadata("target µm per pixel", metavar="MPP")["option"].metavar
    'MPP'
    """
    return {_KEY: Option(help, **more)}


def option_field(default: T, help: str | Mapping[str, Option], **more: Any) -> T:
    """A field with a default that is an option; `help` may be `option_metadata` from elsewhere."""
    metadata = option_metadata(help, **more) if isinstance(help, str) else help
    return field(default=default, metadata=metadata)


def add_config_options(
    parser: argparse._ActionsContainer, config: type, only: Collection[str] = (), prefix: str = ""
) -> None:
    """Add an option to the parser, or to a group of it, for each field that has one.

    Args:
        parser: a parser or an argument group.
        config: the dataclass.
        only: names of the fields to add, all by default: a group takes some of them.
        prefix: of the values' names in the namespace; nested dataclasses have one.
    """
    for item, hint in _option_fields(config):
        if only and item.name not in only:
            continue
        if is_dataclass(hint) and isinstance(hint, type):
            add_config_options(parser, hint, prefix=f"{prefix}{item.name}.")
        else:
            _add_option(parser, item, hint, prefix + item.name)


def config_from_options(
    config: type[T], options: argparse.Namespace, prefix: str = "", **values: object
) -> T:
    """The dataclass as the parsed options have it, but for fields that `values` gives."""
    for item, hint in _option_fields(config):
        name = prefix + item.name
        if item.name in values:
            continue
        if is_dataclass(hint) and isinstance(hint, type):
            values[item.name] = config_from_options(hint, options, f"{name}.")
        # None was not given: the dataclass's default then holds.
        elif (value := getattr(options, name)) is not None:
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return config(**values)


def _option_fields(config: type) -> Iterator[tuple[Field[Any], Any]]:
    """The fields that are options or dataclasses of options, with their types."""
    hints = get_type_hints(config)
    for item in fields(config):
        hint = hints[item.name]
        if _KEY in item.metadata or (is_dataclass(hint) and any(_option_fields(hint))):  # type: ignore[arg-type]
            yield item, hint


def _add_option(parser: argparse._ActionsContainer, item: Field[Any], hint: Any, dest: str) -> None:
    words: Option = item.metadata[_KEY]
    flag = words.flag or "--" + item.name.replace("_", "-")
    factory = item.default_factory
    default = item.default if factory is MISSING else factory()
    is_required = default is MISSING
    settings: dict[str, Any] = {"help": _help_text(words, default)}
    kind, is_tuple = _value_type(hint)
    if kind is bool:
        settings |= {"action": "store_true"}
    else:
        choices = _list_choices(words, kind)
        shown = None if choices else flag.strip("-").replace("-", "_").upper()
        settings |= {"type": _word_parser(words, kind), "choices": choices}
        settings["metavar"] = words.metavar or shown
        # A tuple's default stays with the dataclass: argparse would append to it.
        settings["default"] = None if is_required or is_tuple else default
    # A tuple's values are collected, unless one word has them all.
    if is_tuple and not words.separator:
        if words.positional or words.many:
            settings["nargs"] = "+" if is_required or words.many else "*"
        if not words.positional:
            settings["action"] = "extend" if words.many else "append"
    elif words.positional and not is_required:
        settings["nargs"] = "?"
    if words.positional:
        parser.add_argument(dest, **settings)
        return
    parser.add_argument(flag, dest=dest, required=is_required and not words.is_optional, **settings)


def _value_type(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether the field is a tuple of them."""
    choices = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is tuple:
        return choices[0], True
    is_optional = NoneType in get_args(hint)
    return _value_type(choices[0]) if is_optional else (hint, False)


def _word_parser(words: Option, kind: Any) -> Callable[[str], object]:
    parse = words.parse or (str if get_origin(kind) is Literal else kind)
    if not words.separator:
        return parse

    def parse_list(text: str) -> tuple[object, ...]:
        parts = [part.strip() for part in text.split(words.separator)]
        if not any(parts):
            raise argparse.ArgumentTypeError(
                f"expected names separated by '{words.separator}', got '{text}'"
            )
        return tuple(parse(part) for part in parts if part)

    return parse_list


def _list_choices(words: Option, kind: Any) -> list[str] | None:
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if value != ""]
    return list(words.choices() if callable(words.choices) else words.choices) or None


def _help_text(words: Option, default: object) -> str:
    text = words.help
    if not (default is MISSING or default is None or default is False or default in ("", ())):
        shown = []
        for value in default if isinstance(default, tuple) else (default,):
            is_large = isinstance(value, int) and value >= 10_000
            is_float = isinstance(value, float)
            shown.append(f"{value:_}" if is_large else f"{value:g}" if is_float else str(value))
        text += f" (default: {(words.separator or ' ').join(shown)})"
    return text.replace("%", "%%")  # argparse formats help texts


def number_within(least: float, most: float, expected: str) -> Callable[[str], float]:
    """A parser of numbers from `least` to `most`; `expected` says in words what they are.

    >>> number_within(0, 1, "a fraction from 0 to 1")("0.25")
    0.25
    """

    def parse_number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            # Within no limits, so that words are refused below like numbers out of range.
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
        return value

    return parse_number


parse_fraction = number_within(0.0, 1.0, "a fraction from 0 to 1")
parse_seconds = number_within(0.001, float("inf"), "a number of seconds above 0")


def parse_count(text: str, least: int = 1) -> int:
    """A whole number of at least `least`, from 1 up by default.

    >>> parse_count("40_000_000"), parse_count("40,000,000")
    (40000000, 40000000)
    """
    try:
        value = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = least - 1
    if value < least:
        expected = "a positive whole number" if least else "0 or a positive whole number"
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    return value


def parse_count_or_zero(text: str) -> int:
    """A whole number from 0 up."""
    return parse_count(text, least=0)


def parse_byte_count(text: str) -> int:
    """A number of bytes in decimal units, as disks are sold.

    >>> parse_byte_count("1.5 TB"), parse_byte_count("1_000_000")
    (1500000000000, 1000000)
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
    parts = re.fullmatch(r"([0-9][0-9_,.]*)\s*([A-Za-z]*)", text.strip())
    try:
        if parts is None:
            raise ValueError
        return int(float(parts[1].replace("_", "").replace(",", "")) * units[parts[2].upper()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(
            f"expected bytes such as 500GB or 2TB, got '{text}'"
        ) from None
