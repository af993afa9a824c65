"""Options come from the fields of dataclasses: types, defaults, choices and help texts."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from common.console import OneLineParser
from common.errors import UserError
from common.options import (
    add_config_options,
    config_from_options,
    option_field,
    option_metadata,
    parse_count,
)


@dataclass(frozen=True)
class Inner:
    depth: int = field(default=3, metadata=option_metadata("how deep"))


@dataclass(frozen=True)
class Config:
    files: tuple[Path, ...] = field(metadata=option_metadata("files", positional=True))
    out: Path = field(metadata=option_metadata("where to", metavar="DIR"))
    name: str = field(default="a", metadata=option_metadata("100% of the name", flag="--called"))
    rows: int | None = field(default=None, metadata=option_metadata("rows", parse=parse_count))
    share: float = field(default=0.5, metadata=option_metadata("a share"))
    kind: Literal["", "x", "y"] = field(default="", metadata=option_metadata("of what kind"))
    exact: bool = field(default=False, metadata=option_metadata("exactly"))
    skip: tuple[str, ...] = field(default=("z",), metadata=option_metadata("skipped"))
    some: tuple[int, ...] = field(default=(), metadata=option_metadata("several words", many=True))
    listed: tuple[str, ...] = field(default=(), metadata=option_metadata("a list", separator=","))
    inner: Inner = Inner()
    hidden: int = 7


def parse(*arguments: str, **values: object) -> Config:
    parser = OneLineParser()
    add_config_options(parser, Config)
    return config_from_options(Config, parser.parse_args(arguments), **values)


def test_defaults_are_the_dataclass_own():
    assert parse("f", "--out", "o") == Config((Path("f"),), Path("o"))


def test_every_kind_of_field_is_read():
    config = parse(
        "f", "g", "--out=o", "--called=b", "--rows=1_000", "--share=0.25", "--kind=y", "--exact",
        "--skip=1", "--skip=2", "--some", "1", "2", "--some", "3", "--listed= p, q,",
        "--depth=5", hidden=8,
    )  # fmt: skip
    assert config == Config(
        (Path("f"), Path("g")), Path("o"), "b", 1000, 0.25, "y", True, ("1", "2"), (1, 2, 3),
        ("p", "q"), Inner(5), 8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["f"], "required: --out"),
        (["--out", "o"], "required: FILES"),
        (["f", "--out=o", "--kind=z"], "invalid choice: 'z'"),
        (["f", "--out=o", "--rows=0"], "positive whole number, got '0'"),
        (["f", "--out=o", "--listed=,"], "names separated by ',', got ','"),
        (["f", "--out=o", "--hidden=1"], "unrecognized arguments: --hidden"),
    ],
)
def test_a_wrong_value_is_one_line(arguments, words):
    with pytest.raises(UserError, match=words):
        parse(*arguments)


def test_positional_words_may_be_left_out_where_there_are_defaults():
    @dataclass(frozen=True)
    class Optional:
        name: str = option_field("n", "the name", positional=True)
        overrides: tuple[str, ...] = option_field((), "key=value", positional=True)
        given: int = option_field(1, "by the caller")

    parser = OneLineParser()
    add_config_options(parser, Optional, only=("name", "overrides"))
    assert config_from_options(Optional, parser.parse_args([]), given=2) == Optional(given=2)
    options = parser.parse_args(["m", "a=1", "b=2"])
    assert config_from_options(Optional, options, given=2) == Optional("m", ("a=1", "b=2"), 2)


def test_help_shows_texts_and_defaults_that_say_something():
    parser = argparse.ArgumentParser()
    add_config_options(parser, Config)
    text = " ".join(parser.format_help().split())
    assert "100% of the name (default: a)" in text
    assert "skipped (default: z)" in text
    assert "--kind {x,y} of what kind --exact" in text
    assert "--called CALLED" in text
    assert "hidden" not in text


def test_a_group_takes_some_fields():
    parser = argparse.ArgumentParser()
    add_config_options(parser.add_argument_group("outputs"), Config, only=("out", "inner"))
    assert parser.parse_args(["--out", "o", "--depth", "2"]).out == Path("o")
