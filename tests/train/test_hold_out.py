"""Training refuses patients that its hold-outs have by the table of slides as it is now."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, make_dataset

from common.errors import UserError
from pipeline.dataset import Slide, make_selection, write_selection, write_slides
from train.config import load_config
from train.setup import open_data


@pytest.mark.parametrize("is_named", [True, False])
def test_a_patient_who_was_moved_into_the_hold_out_is_refused(
    tmp_path: Path, is_named: bool
) -> None:
    """The hold-out is one that training honours, or one that it validates on."""
    dataset = make_dataset(tmp_path / "dataset")
    one, other = Slide("S.0-x", "a.svs", patient="P0"), Slide("S.1-x", "b.svs", patient="P1")
    honours = {} if is_named else {"val-out": "hash"}
    for name, slide, ties in (
        ("train", "S.0-x", {"role": "train", "honours": honours}),
        ("val-out", "S.1-x", {"role": "val-out", "patients": ["P1"]}),
    ):
        plan = {"ties": ties}
        ranks = {slide: np.arange(16, dtype=np.int32)}
        write_selection(dataset, "test", make_selection(name, ranks, plan))
    more = ["log.validation=[val-out]"] if is_named else []
    config = load_config(None, [f"data.dataset={dataset.root}", *SMALL, *more])
    write_slides(dataset, "test", [one, other])
    open_data(config)
    write_slides(dataset, "test", [one, replace(other, patient="p0 ")])
    with pytest.raises(UserError, match=r"'train' has .* P0 \(slide S.0-x; held out: S.1-x\)"):
        open_data(config)
