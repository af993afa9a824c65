"""Feature caches: Parquet layout, reading half, and the `cache` stage.

`train` and `evaluate` use the names below; the stage itself (`pipeline.features.cache`) needs
Dask and an encoder and is imported by the door alone.
"""

from pipeline.features.parquet import (
    FeatureShard,
    cls_table,
    open_writer,
    token_table,
    write_blocks,
)
from pipeline.features.store import (
    FeatureStore,
    encoder_file,
    feature_scope,
    read_encoder_record,
)

__all__ = [
    "FeatureShard",
    "FeatureStore",
    "cls_table",
    "encoder_file",
    "feature_scope",
    "open_writer",
    "read_encoder_record",
    "token_table",
    "write_blocks",
]
