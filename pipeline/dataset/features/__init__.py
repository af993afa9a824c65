"""Feature caches: Parquet layout, reading half, and the `cache` stage.

`train` and `evaluate` use the names below; the stage itself (`pipeline.features.stage`) needs
Dask and an encoder and is imported by the door alone.
"""

from pipeline.dataset.features.parquet import (
    FeatureShard,
    cls_table,
    open_writer,
    token_table,
    write_blocks,
)
from pipeline.dataset.features.ranges import MOST_FEATURE, are_in_range, find_outside
from pipeline.dataset.features.record import MADE, NETWORK, FeatureRecord
from pipeline.dataset.features.store import (
    FeatureStore,
    encoder_file,
    feature_scope,
    read_encoder_record,
    refuse_other_features,
    require_fields,
)

__all__ = [
    "MADE",
    "MOST_FEATURE",
    "NETWORK",
    "FeatureRecord",
    "FeatureShard",
    "FeatureStore",
    "are_in_range",
    "cls_table",
    "encoder_file",
    "feature_scope",
    "find_outside",
    "open_writer",
    "read_encoder_record",
    "refuse_other_features",
    "require_fields",
    "token_table",
    "write_blocks",
]
