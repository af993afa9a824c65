"""The configuration of `scan`, and of how slides are fetched."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.options import (
    number_within,
    option_field,
    option_metadata,
    parse_count,
    parse_count_or_zero,
    parse_seconds,
)
from pipeline.options import RANK_SEED, TERMS, parse_mpp
from pipeline.slides.readers import reader_choices

JOB_SCRATCH = "$SLURM_TMPDIR"
"""The default scratch folder, where the batch system gives one."""
Resampler = Literal["area", "lanczos", "bicubic"]
MppFrom = Literal["auto", "vendor", "tiff-tags", "ome-xml", "objective"]
IdSource = Literal["stem", "path", "csv"]
"""Where slide ids come from that no table states: the file's name, its path, or nowhere."""

_parse_tolerance = number_within(0.0, 0.3, "a relative tolerance from 0 to 0.3")


@dataclass(frozen=True)
class StageIn:
    """How slides are fetched; without a command they are read where they are.

    In `command`, {uri} is the slide as the table names it, {id} the part before its last '/' (the
    UUID of a row of a GDC manifest), {name} the part after it, {dest} the file to write and {dir}
    its folder. It is run without a shell. `scratch` is a local folder, $NAMES in it are the
    worker's; each slide has a folder there while it is in use. `retries` fetches are tried after
    the first, with doubling pauses; each may take `timeout_s` seconds.
    """

    command: str = field(
        default="",
        repr=False,  # Dask logs the arguments of what raises
        metadata=option_metadata(
            "fetch each slide to local scratch with this command, delete it after; also {id} "
            "(before the last / of the uri), {name}, {dir}",
            flag="--stage-in", metavar="'CMD {uri} {dest}'",
        ),
    )  # fmt: skip
    scratch: str = option_field(
        JOB_SCRATCH,
        "local folder for fetched slides, inside the dataset where that variable is not set; "
        "$NAMES are the worker's",
        metavar="DIR",
    )
    retries: int = option_field(
        3,
        "fetches to try after the first one failed",
        flag="--stage-in-retries",
        metavar="N",
        parse=parse_count_or_zero,
    )
    timeout_s: float = option_field(
        3600.0,
        "seconds after which a fetch is given up",
        flag="--stage-in-timeout",
        metavar="S",
        parse=parse_seconds,
    )

    def __post_init__(self) -> None:
        if self.command and not any("{dest}" in p or "{dir}" in p for p in self._command_parts()):
            raise UserError(
                f"--stage-in '{self.command}': expected a command that writes the file {{dest}} "
                "or into the folder {dir}, such as 'cp {uri} {dest}'"
            )

    def make_command(self, uri: str, dest: Path) -> list[str]:
        """The command for one slide, as a list of arguments.

        >>> StageIn("cp {uri} {dest}").make_command("store/a.svs", Path("/tmp/a.svs"))
        ['cp', 'store/a.svs', '/tmp/a.svs']
        """
        values = {
            "{uri}": uri, "{id}": uri.rpartition("/")[0], "{name}": dest.name,
            "{dest}": str(dest), "{dir}": str(dest.parent),
        }  # fmt: skip
        # In one pass, since a slide's name may itself have braces.
        return [
            re.sub(r"\{\w+\}", lambda match: values.get(match[0], match[0]), part)
            for part in self._command_parts()
        ]

    def _command_parts(self) -> list[str]:
        try:
            return shlex.split(self.command)
        except ValueError as error:
            raise UserError(f"--stage-in '{self.command}': {error}") from error


IN_PLACE = StageIn()
"""Slides are read where they are."""


@dataclass(frozen=True)
class ScanConfig:
    """What to scan, and the resolution (µm per pixel) and size (pixels) of the tiles."""

    inputs: tuple[str, ...] = field(
        metadata=option_metadata(
            "folders, files, globs, a CSV with a path column, or a GDC manifest",
            metavar="SLIDES", positional=True,
        )
    )  # fmt: skip
    mpp: float = option_field(0.5, "target µm per pixel", parse=parse_mpp)
    mpp_tolerance: float = option_field(
        0.02,
        "how far, relatively, a tile's resolution may be from the target",
        parse=_parse_tolerance,
    )
    tile_px: int = option_field(224, "tile side in pixels", parse=parse_count)
    seed: int = option_field(0, RANK_SEED)
    assume_mpp: float | None = option_field(
        None, "µm per pixel where a slide states none", parse=parse_mpp
    )
    mpp_from: MppFrom = option_field(
        "auto",
        "which of a slide's resolutions to believe where they contradict each other; objective: "
        "10 µm by the magnification, also where a slide states nothing else",
    )
    reader: str = option_field(
        "auto",
        "auto: native where its pixels are OpenSlide's, else OpenSlide, else tiffslide",
        choices=reader_choices,
    )
    series: str = option_field(
        "", "which image of a file that has several is the slide", metavar="NAME"
    )
    id_from: IdSource = option_field(
        "stem",
        "what slide ids are made of where a table has none: the file's name, its path below the "
        "folder that is given (siteA__slide1), or nothing, so that a table must have them",
    )
    replace: bool = option_field(
        False, "a slide of the same id at another path takes the place of the one scanned before"
    )
    terms: str = option_field("", TERMS)
    sha256: bool = option_field(False, "recognise slides by their sha256")
    stage_in: StageIn = IN_PLACE

    def identity(self) -> dict[str, object]:
        """The values that every run on a dataset must share: µm per px, tile side in px, seed."""
        from pipeline.dataset.grid import RESERVE_PER_CANDIDATES

        return {
            "mpp": self.mpp,
            "mpp_tolerance": self.mpp_tolerance,
            "tile_px": self.tile_px,
            "grid": "adjacent",
            "seed": self.seed,
            "reserve_per_candidates": RESERVE_PER_CANDIDATES,
        }

    def row_parameters(self) -> dict[str, object]:
        """What a scanned row depends on in addition to the slide's bytes."""
        return {
            "assume_mpp": self.assume_mpp,
            "reader": self.reader,
            "series": self.series,
            # Only where it is given: what was scanned without it stays as it is.
            **({} if self.mpp_from == "auto" else {"mpp_from": self.mpp_from}),
            **self.identity(),
        }
