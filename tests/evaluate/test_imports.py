"""Generation and measuring run where the pipeline's machinery is not installed."""

import subprocess
import sys

_BLOCK = """
import sys

BLOCKED = {"dask", "distributed", "openslide", "tiffslide", "zarr"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
        return None


sys.meta_path.insert(0, Blocker())
"""

_IMPORTS = """
import evaluate.__main__
import evaluate.generate.command
import evaluate.compare.measure
import evaluate.report.command

assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
try:
    import dask
except ImportError:
    print("blocked as meant")
"""


def test_the_commands_import_without_dask_openslide_tiffslide_and_zarr() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCK + _IMPORTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked as meant"
