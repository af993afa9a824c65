"""Dense, overlapping tile positions on the tissue of one slide, for `import coordinates`.

    python tests/dense_positions.py DATASET OUT --step 16

reads DATASET's slide and tissue mask (`scan` and `tissue` made them) and writes OUT/train.csv,
tiles of the upper four fifths of the slide that the tissue stage would keep, and
OUT/val-below.csv, those that lie wholly below: no pixel of theirs is in a tile of train.csv.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.dataset import identity_value, open_dataset, read_slides
from pipeline.tissue.config import TissueConfig
from pipeline.tissue.verdict import judge_tiles

TRAIN_SHARE = 0.8
"""Of the slide's height; what lies below is held out."""


def main() -> None:
    """Write the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=int, default=16, help="pixels from tile to tile")
    args = parser.parse_args()
    dataset = open_dataset(args.dataset)
    (slide,) = read_slides(dataset)
    side, tissue = int(identity_value(dataset, "tile_px")), TissueConfig()
    mask = np.asarray(Image.open(dataset.root / "tissue" / f"{slide.slide_id}.png"))
    scale, border = mask.shape[1] / slide.width, int(slide.height * TRAIN_SHARE)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, top, bottom in (("train", 0, border), ("val-below", border, slide.height)):
        xs, ys = range(0, slide.width - side, args.step), range(top, bottom - side, args.step)
        corners = np.array([(x, y) for y in ys for x in xs], np.float64).reshape(-1, 2)
        judged = judge_tiles(
            mask, *(corners * scale).T, side * scale,
            min_tissue=tissue.min_tissue, max_artifact=tissue.max_artifact,
        )  # fmt: skip
        kept = corners[judged.kept].astype(int)
        with (args.out / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["slide_id", "x_level0", "y_level0"])
            rows.writerows([slide.slide_id, *corner] for corner in kept.tolist())
        print(f"{args.out / name}.csv: {len(kept):,} positions")


if __name__ == "__main__":
    main()
