"""The protocols' pages in a real browser: no errors, no network, readable on a phone."""

import json
from pathlib import Path

import pytest
from protocol_data import make_all, make_model, make_world, toy

from evaluate.protocols.run import run_protocol
from evaluate.report.protocol_files import write_protocol_files
from tests.pipeline.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]

_ENCODERS = "encoders=[h-optimus-0,uni2-h]"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("world")
    make_world(root, ("h-optimus-0", "uni2-h"))
    make_model(root)
    more = {
        "table2": [],
        "figure4": ["generations.*.steps=[2,3,4,6]", "columns=[val-in]"],
        "table4": ["leave_out=[pixcell,reference]"],
        "memorisation": [],
    }
    found = {}
    for name, overrides in more.items():
        protocol = toy(root, name, _ENCODERS, *overrides)
        make_all(protocol)
        results = json.loads(json.dumps(run_protocol(protocol)))
        found[name] = write_protocol_files(results, root / name)[0]
    return found


def test_pages_open_without_errors_or_network_and_fit(
    pages: dict[str, Path], tmp_path: Path
) -> None:
    with Browser(tmp_path / "profile") as browser:
        for name, page in pages.items():
            browser.open(page.as_uri())
            browser.wait("[...document.images].every(image => image.complete)")
            assert browser.run("[...document.images].every(image => image.naturalWidth > 0)"), name
            loaded = browser.run(
                "performance.getEntriesByType('resource').map(e => e.name)"
                ".filter(n => !n.startsWith('data:'))"
            )
            assert loaded == [], name
            for width in (1280, 390):
                browser.resize(width, 900)
                # Only tables may be wider than the window, and scroll in themselves.
                assert browser.run("document.documentElement.scrollWidth") <= width, (name, width)
                smallest = browser.run(
                    "Math.min(...[...document.querySelectorAll('td, p, dd, th, figcaption')]"
                    ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
                )
                assert smallest >= 11, (name, width)
            assert browser.errors == [], name
