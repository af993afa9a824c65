"""Measures the QC page: its bytes, how it loads in Chromium, and how quickly it answers.

    python bench/report_page.py [--slides 1000] [--slides 11000]

Slides are copies of the committed one under other names and with other numbers. Load is the time
from navigation to a drawn table; a sort and a search are the time of one such change. Times are
of a machine that may do other work besides: compare them within one run.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipeline")]

from browser import CHROMIUM, Browser
from report_data import replicate

from bench.common import SLIDES, run_stages
from pipeline.dataset import Dataset
from pipeline.report.write import write_report

_TIMED = """(() => { const from = performance.now(); %s;
document.body.getBoundingClientRect(); return performance.now() - from; })()"""
_TYPE = (
    "const q = document.querySelector('[name=q]'); q.value = 'tcga-06';"
    "q.dispatchEvent(new Event('input', {bubbles: true}))"
)


def measure(dataset: Dataset, profile: Path) -> dict[str, Any]:
    """What the page costs to write, to load and to use."""
    began = time.process_time()
    write_report(dataset)
    first = time.process_time() - began
    began = time.process_time()
    write_report(dataset)
    page = dataset.root / "report" / "index.html"
    found: dict[str, Any] = {
        "first run, CPU s": first,
        "second run, CPU s": time.process_time() - began,
        "page, MB": page.stat().st_size / 1e6,
    }
    if CHROMIUM is None:
        return found
    with Browser(profile) as browser:
        loads = []
        for _ in range(3):
            began = time.perf_counter()
            browser.open(page.as_uri())
            browser.wait("document.querySelectorAll('#rows tr').length > 0")
            loads.append(time.perf_counter() - began)
        metrics = {
            one["name"]: one["value"] for one in browser.call("Performance.getMetrics")["metrics"]
        }
        found |= {
            "load, s (best of 3)": min(loads),
            "DOM elements": browser.run("document.getElementsByTagName('*').length"),
            "table rows in the DOM": browser.run("document.querySelectorAll('#rows tr').length"),
            "JS heap, MB": metrics["JSHeapUsedSize"] / 1e6,
            "sort, ms": browser.run(
                _TIMED % "document.querySelector('[data-sort=tissue]').click()"
            ),
            "search, ms": browser.run(_TIMED % _TYPE),
            "console errors": len(browser.errors),
        }
    return found


def main() -> None:
    """Measure and print one column a number of slides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, action="append", help="may be repeated (1000)")
    parser.add_argument("--dataset", type=Path, help="measure this dataset instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.dataset:
            columns = {
                "slides of the dataset": measure(Dataset(options.dataset), Path(folder, "p"))
            }
        else:
            stages = (["scan", str(SLIDES), "--workers", "1"], ["tissue", "--workers", "1"])
            tiled = run_stages(Path(folder) / "tiled", *stages)
            columns = {
                f"{count:,} slides": measure(
                    replicate(tiled, Path(folder) / str(count), count), Path(folder) / f"p{count}"
                )
                for count in options.slides or [1000]
            }
    for title, found in columns.items():
        print(title)
        for name, value in found.items():
            print(
                f"  {name:24} {value:,.3f}"
                if isinstance(value, float)
                else f"  {name:24} {value:,}"
            )


if __name__ == "__main__":
    main()
