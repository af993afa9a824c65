"""Values without a meaning are refused before they become a dataset's identity."""

from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "x", "--mpp", "0"], "from 0.01 to 100, got '0'"),
        (["scan", "x", "--mpp", "nan"], "from 0.01 to 100, got 'nan'"),
        (["scan", "x", "--mpp", "-0.5"], "from 0.01 to 100, got '-0.5'"),
        (["scan", "x", "--assume-mpp", "half"], "--assume-mpp: expected micrometres per pixel"),
        (["scan", "x", "--mpp-tolerance", "3"], "from 0 to 0.3, got '3'"),
        (["scan", "x", "--tile-px", "0"], "--tile-px: expected a positive whole number"),
        (["scan", "x", "--workers", "0"], "--workers: expected a positive whole number"),
        (["tissue", "--min-tissue", "2"], "--min-tissue: expected a fraction from 0 to 1"),
        (["tissue", "--max-artifact", "-1"], "--max-artifact: expected a fraction"),
        (["tile", "--tile-px", "224.5"], "--tile-px: expected a positive whole number"),
        (["tile", "--stage-in-retries", "-2"], "--stage-in-retries: expected"),
        (["tile", "--stage-in-timeout", "0"], "a number of seconds above 0"),
    ],
)
def test_a_value_without_a_meaning_is_one_line(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        main([*arguments, "--dataset", str(tmp_path / "d")])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d").exists()


def test_zero_retries_and_zero_tolerance_have_one(tmp_path: Path) -> None:
    for more in (["--stage-in-retries", "0"], ["--mpp-tolerance", "0"]):
        with pytest.raises(UserError, match="no such file, folder or match"):
            main(["scan", str(tmp_path / "none"), "--dataset", str(tmp_path / "d"), *more])
