"""Runs command lines of the code on PYTHONPATH, all in this process, and reports on each.

    python run_commands.py TREE COMMANDS.json REPORT.json

COMMANDS is a list of command lines such as ["pipeline", "status", ...]; REPORT gets a list of
exit status and output, one each. One process for all: most of a command's time is its imports.
"""

import contextlib
import importlib.util
import io
import json
import runpy
import sys
import traceback
from pathlib import Path


def run_command(module: str, arguments: list[str]) -> dict[str, object]:
    """As `python -m module arguments`."""
    output = io.StringIO()
    status: object = 0
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
    return {"command": [module, *arguments], "status": status, "output": output.getvalue()}


if __name__ == "__main__":
    tree, commands, report = map(Path, sys.argv[1:])
    spec = importlib.util.find_spec("pipeline")
    if not spec or not spec.origin or not Path(spec.origin).is_relative_to(tree):
        sys.exit(f"the code is not that of {tree}: {spec and spec.origin}")
    results = []
    for module, *arguments in json.loads(commands.read_text()):
        results.append(run_command(module, arguments))
        report.write_text(json.dumps(results))
        if results[-1]["status"]:
            break
