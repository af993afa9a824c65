"""Options that several commands have in common, for the fields of their configurations.

Like every module of configurations it imports nothing heavy: `--help` reads them all.
"""

from typing import Literal

from common.options import number_within, option_metadata, parse_fraction

Icc = Literal["ignore", "srgb"]
PngEffort = Literal["small", "fast"]

parse_mpp = number_within(0.01, 100.0, "micrometres per pixel from 0.01 to 100")

SELECTIONS = option_metadata(
    "a selection's name; may be given several times (default: all selections)",
    flag="--selection", metavar="NAME",
)  # fmt: skip
TERMS = option_metadata(
    "under whose terms the slides are: a licence such as CC0-1.0, or a YAML file with a list "
    "of covers, licence, source, non_commercial, link; recorded and passed on, not judged",
    metavar="LICENCE|FILE.yaml",
)
RANK_SEED = option_metadata("seed of the tiles' rank order")
PNG = option_metadata(
    "how hard PNG files are compressed: fast encodes five times as fast, 3 to 7% larger"
)
MIN_TISSUE = option_metadata(
    "smallest share of a candidate tile that is tissue", parse=parse_fraction
)
MAX_ARTIFACT = option_metadata(
    "largest share of a candidate tile that is artifact", parse=parse_fraction
)

SLIDE_TIMEOUT_S = 14_400.0
"""Seconds after which a slide fails: 4 h, where a real slide takes minutes (80 core-seconds)."""
CACHE_TIMEOUT_S = 86_400.0
"""The same for `cache`: the largest encoder takes 13 h on one core for a slide of 10,500 tiles."""
