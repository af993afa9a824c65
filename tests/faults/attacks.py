"""The tests that docs/reliability.md names, for pytest: `attacks.py [FOLDER of tests]`."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def named_tests() -> Iterator[tuple[str, str]]:
    """File and function of each attack's tests; "" for a whole file."""
    for line in PAGE.read_text().splitlines():
        cell = line.rstrip(" |").rpartition(" | ")[2] if line.startswith("| ") else ""
        for file, functions in re.findall(r"`(tests/[^`]+)`((?:(?:<br>|, )`test_\w+`)*)", cell):
            for function in re.findall(r"`(\w+)`", functions) or [""]:
                yield file, function


if __name__ == "__main__":
    folder = sys.argv[1]
    found = {"::".join(filter(None, pair)): None for pair in named_tests()}
    print(*(name for name in found if name.startswith(f"tests/{folder}/")))
