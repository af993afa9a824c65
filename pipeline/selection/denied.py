"""Deny-lists: tiles that later selections leave out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from pipeline.dataset import Dataset, check_name
from pipeline.dataset.tables.selections import read_rows
from pipeline.selection.draw import Ranks


def curation_dir(dataset: Dataset, name: str) -> Path:
    """The folder of a curation's deny-list, scores, classifier and report."""
    return dataset.root / "curation" / check_name(name, "deny-list")


def deny_file(dataset: Dataset, name: str) -> Path:
    """The deny-list: rows of (slide_id, rank)."""
    return curation_dir(dataset, name) / "deny.parquet"


def read_denied(dataset: Dataset, names: Sequence[str]) -> tuple[dict[str, Ranks], dict[str, str]]:
    """The denied ranks of each slide (int32, ascending), all lists together; each list's hash.

    Raises `UserError` with the lists that there are where one is missing.
    """
    parts: dict[str, list[Ranks]] = {}
    hashes = {}
    for name in names:
        path = deny_file(dataset, name)
        if not path.exists():
            lists = (dataset.root / "curation").glob("*/deny.parquet")
            known = ", ".join(sorted(path.parent.name for path in lists)) or "none"
            raise UserError(
                f"no deny-list '{name}' in {dataset.root}; there: {known}; "
                "make one with `python -m pipeline curate`"
            )
        rows = read_rows(path, name, "make it again with `python -m pipeline curate`")
        # By content: a deny-list that is made again alike changes no selection's fingerprint.
        hashes[name] = rows.content_hash
        for slide_id, ranks in rows.items():
            parts.setdefault(slide_id, []).append(ranks)
    return {slide: np.unique(np.concatenate(some)) for slide, some in parts.items()}, hashes
