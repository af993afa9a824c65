"""Every command that the documentation shows is one that the programs understand."""

import argparse
import dataclasses
import pkgutil
import re
import typing
from pathlib import Path
from typing import Any

import pytest

import evaluate.__main__ as evaluate_door
import pipeline.__main__ as pipeline_door
import train.__main__ as train_door
from common.errors import UserError
from evaluate.protocols.config import load_protocol
from evaluate.protocols.report_protocols import load_report
from tests.docs.doc_commands import PAGES, ROOT, Block, blocks, call_of, words
from train.config import Config, load_config

SHOWN = [
    pytest.param(block, command, id=f"{block.page}:{block.line}-{number}")
    for block in blocks()
    if block.is_shell
    for number, command in enumerate(block.commands())
]


class RefusedError(Exception):
    pass


def parser_of(room: str, arguments: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    if room == "pipeline":
        return pipeline_door.make_parser(), arguments
    if room == "evaluate":
        return evaluate_door.make_parser(), arguments
    if arguments[:1] == ["export"]:
        return train_door.export_parser(), arguments[1:]
    return train_door.train_parser(), arguments


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All option strings of a parser and of its subcommands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found |= options_of(one)
    return found


def is_synopsis(command: str) -> bool:
    return "[" in command or "..." in command


def understood(command: str) -> None:
    """Raise `RefusedError` with the parser's word if the command would not be understood."""
    call = call_of(command)
    if call is None:
        return
    parser, arguments = parser_of(*call)
    if is_synopsis(command):
        for word in re.findall(r"--[a-z][\w-]*", command):
            if word not in options_of(parser):
                raise RefusedError(f"no option {word}")
        return
    try:
        parsed = (
            parser.parse_intermixed_args(arguments)
            if call[0] == "train" and arguments == call[1]
            else parser.parse_args(arguments)
        )
    except SystemExit as error:
        raise RefusedError(f"exit {error.code}") from error
    except UserError as error:
        raise RefusedError(str(error)) from error
    if call[0] == "evaluate" and parsed.command == "protocol" and parsed.name != "list":
        if parsed.name == "all":
            load_report(None, parsed.overrides)
        else:
            load_protocol(parsed.name, None, parsed.overrides)
    elif call[0] == "train" and hasattr(parsed, "overrides"):
        load_config(train_door._find_config(parsed.config), list(parsed.overrides))


@pytest.mark.parametrize(("block", "command"), SHOWN)
def test_the_programs_know_the_command(
    block: Block, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        understood(command)
    except RefusedError as refused:
        said = f"{refused}\n{capsys.readouterr().err}"
        pytest.fail(f"{block.page}, line {block.line}: {command}\n{said}")


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks():
        for command in block.commands() if block.is_shell else ():
            split = words(command)
            if split[0] == "make":
                named = [w for w in split[1:] if "=" not in w]
                assert set(named) <= targets, f"{block.page}, line {block.line}: {command}"


def test_the_check_sees_a_wrong_option_and_a_wrong_key() -> None:
    with pytest.raises(RefusedError):
        understood("python -m pipeline select --dataset D --name train --tyles 5")
    with pytest.raises(RefusedError):
        understood("python -m pipeline verify --dataset D [--leekage]")
    with pytest.raises(Exception, match=r"optim\.lr_sit'"):
        understood("python -m train --config tiny optim.lr_sitt=1")


def test_pages_are_reachable_and_links_lead_somewhere() -> None:
    """Every relative link of README and CONTRIBUTING; mkdocs --strict holds those of docs/."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    nav = (ROOT / "mkdocs.yml").read_text()
    for found in sorted((ROOT / "docs").rglob("*.md")):
        assert str(Path(found).relative_to(ROOT / "docs")) in nav, f"{found.name} is in no menu"


_PACKAGES = "common|pipeline|model|train|evaluate"
_PATH = re.compile(rf"(?<![\w./])(?:{_PACKAGES}|tests|bench)/[\w./-]*\w(?!\w)")
_TEST = re.compile(r"(?<![\w./])tests/[\w/]+\.(?:py|sh)")
_DOTTED = re.compile(rf"`((?:{_PACKAGES})(?:\.\w+)+)")
_NOT_A_MODULE = (".md", ".sbatch", ".csv", ".yaml")


def test_code_that_is_named_exists() -> None:
    """Paths such as `model/encoders/table.py`, and dotted names such as `pipeline.dataset.grid`."""
    for page in PAGES:
        text = page.read_text()
        # Comments above a block may name a module that the reader is to write.
        shown = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        for path in _PATH.findall(shown) + _TEST.findall(text):
            if not path.startswith("bench/out/"):
                assert (ROOT / path).exists(), f"{page.name}: {path}"
        for name in _DOTTED.findall(shown):
            if not name.endswith(_NOT_A_MODULE) and not _is_config_key(name):
                pkgutil.resolve_name(name)


def _is_config_key(name: str) -> bool:
    """Whether it is a key of the training configuration, whose `model` is not the package."""
    cls: Any = Config
    for part in name.split("."):
        types = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in types:
            return False
        cls = types[part]
    return True
