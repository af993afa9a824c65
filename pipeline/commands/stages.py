"""Commands that run a stage on a dataset, with the options of its configuration."""

import argparse
from dataclasses import dataclass
from importlib import import_module

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.imports.config import (
    CoordinatesConfig,
    CoordinatesExport,
    H5Config,
    MasksConfig,
    TilesConfig,
)
from pipeline.selection.config import CurateConfig
from pipeline.slides.config import ScanConfig
from pipeline.tiles.config import TileConfig
from pipeline.tissue.config import TissueConfig


@dataclass(frozen=True)
class StageCommand:
    """A command with what a module of `pipeline.commands` has.

    `function` is "module:name" and takes a dataset, a configuration and, where `workers` says so,
    an engine: "" for none, "engine", or "array" where an element of a job array may do a part.
    `is_first` is a stage that may begin a dataset.
    """

    HELP: str
    config: type
    function: str
    workers: str = "engine"
    is_first: bool = False

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """The configuration's options, the dataset, and where tasks run."""
        add_dataset(parser)
        add_config_options(parser, self.config)
        if self.workers:
            add_engine(parser, array=self.workers == "array")

    def run(self, options: argparse.Namespace) -> int:
        """Run the stage; returns the exit status."""
        # Imported here, so that `--help` and one-line errors come at once.
        from pipeline.dataset import Dataset, open_dataset

        module, _, name = self.function.partition(":")
        config: object = config_from_options(self.config, options)
        dataset = (Dataset if self.is_first else open_dataset)(options.dataset)
        arguments: list[object] = [dataset, config]
        if self.workers:
            arguments.append(engine_config(options))
        return int(getattr(import_module(module), name)(*arguments))


STAGE_COMMANDS = {
    "scan": StageCommand(
        "open slides and record them in slides.parquet", ScanConfig, "pipeline.slides.scan:scan",
        workers="array", is_first=True,
    ),
    "tissue": StageCommand(
        "find tissue, draw overlays, rank the candidate tiles", TissueConfig,
        "pipeline.tissue.stage:tissue", workers="array",
    ),
    "tile": StageCommand(
        "write the tile shards that selections need", TileConfig, "pipeline.tiles.stage:tile",
        workers="array",
    ),
    "curate": StageCommand(
        "find tiles with artifacts by a linear classifier on cached features", CurateConfig,
        "pipeline.selection.curate:curate",
    ),
    "geojson": StageCommand(
        "write masks and tiles as GeoJSON for QuPath", CoordinatesExport,
        "pipeline.imports.export:export_geojson",
    ),
}  # fmt: skip

IMPORTS = {
    "coordinates": StageCommand(
        "tables of tile positions become candidates and selections", CoordinatesConfig,
        "pipeline.imports.coordinates:import_coordinates", workers="",
    ),
    "h5": StageCommand(
        "coordinate files of CLAM or TRIDENT become candidates and a selection", H5Config,
        "pipeline.imports.h5:import_h5", workers="",
    ),
    "tiles": StageCommand(
        "folders of pictures of tiles become a dataset", TilesConfig,
        "pipeline.imports.tiles:import_tiles", is_first=True,
    ),
    "masks": StageCommand(
        "masks that others made take the place of the tissue detector", MasksConfig,
        "pipeline.imports.masks:import_masks",
    ),
}  # fmt: skip
"""The kinds of `import`."""
