"""Fixtures that every room's tests may use."""

import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SLIDES = REPOSITORY / "tests" / "data" / "slides"
CMU = SLIDES / "CMU-1-Small-Region.svs"
SHARED = REPOSITORY.parent / "shared" / "data"


# A shell that runs `make test &` lets it ignore Ctrl-C, and the commands that tests send one to
# would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cmu_slide() -> Path:
    """The committed real slide: 2220 x 2967 px at 0.499 mpp, JPEG, one level."""
    return CMU


@pytest.fixture
def shared_data() -> Path:
    """Real slides that may not be committed; tests that want them skip without."""
    if not SHARED.is_dir():
        pytest.skip(f"development data is not at {SHARED}")
    return SHARED
