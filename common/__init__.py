import os
import sys

# `python -m` searches the working folder first, which may be a dataset or model of others: a module
# there would run in place of Python's own. Before any other import, here and in child processes.
if sys.argv[:1] == ["-m"] and sys.path[0] != __file__.removesuffix("/common/__init__.py"):
    if not sys.flags.safe_path:
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"
