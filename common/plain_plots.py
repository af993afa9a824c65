"""Figures that look alike wherever they are drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def plain_plots(style: dict[Any, Any] | None = None) -> Iterator[None]:
    """Draw with matplotlib's own defaults and these settings inside the block.

    By itself matplotlib takes a `matplotlibrc` of the working folder, which may be a dataset of
    others: it could have LaTeX run on every text.
    """
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(style or {})
        yield
