"""What a command decides from the whole dataset is decided and written under one claim.

Two commands that read, decide and write at the same time would each miss what the other writes: a
slide would be lost from slides.parquet, a hold-out's tiles would be drawn for training. A claim is
held for as long as that takes, seconds to minutes, and never while slides are processed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.dataset.layout import Dataset
from pipeline.dataset.lock import hold_lock

SLIDES = "slides"
"""The ids of slides, and slides.parquet."""
SELECTIONS = "selections"
"""Selections with their ties, deny-lists, and what `prune` takes for needed."""
FEATURES = "features"
"""encoder.json: with which weights features are made."""
GENERATED = "generated"
"""The tables of a synthetic dataset."""


@contextmanager
def hold_claim(dataset: Dataset, what: str, doing: str) -> Iterator[None]:
    """Hold the dataset-wide claim on `what`; a claim that others hold is waited for.

    After three seconds of waiting one line, which begins with `doing`, says so. Raises `UserError`
    as `hold_lock` does.
    """
    waiting = f"{doing}: waits for another command that changes the {what} of {dataset.root}"
    with hold_lock(dataset.staging_dir(f"{what}.lock"), waiting):
        yield
