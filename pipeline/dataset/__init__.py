"""The contract: a dataset directory of tiles and features, real or generated.

Shards and caches are immutable facts that a journal line names; a selection is a view on them.
"""

from pipeline.dataset.commit import (
    FileRecord,
    HashingFile,
    commit_bytes,
    commit_file,
    commit_json,
    new_run_id,
)
from pipeline.dataset.fingerprint import fingerprint_of
from pipeline.dataset.identity import (
    DatasetKind,
    claim_identity,
    identity_value,
    kind_of,
    lineage_terms,
    open_dataset,
    read_identity,
    read_terms,
    software_versions,
)
from pipeline.dataset.journal import Entry, Run, begun_stages, files_present, read_journal
from pipeline.dataset.layout import (
    BLOCK_ROWS,
    Dataset,
    ShardName,
    check_name,
    check_slide_id,
    covering_blocks,
    parse_shard_name,
    safe_slide_id,
)
from pipeline.dataset.ledger import Ledger, Missing, ScopeLedger
from pipeline.dataset.tables.candidates import (
    CANDIDATES_SCHEMA,
    GENERATED_SCHEMA,
    candidate_count,
    read_candidates,
    write_candidates,
)
from pipeline.dataset.tables.selections import (
    Selection,
    make_selection,
    read_selection,
    read_selection_rows,
    write_selection,
)
from pipeline.dataset.tables.slides import (
    MOST_SLIDES,
    Slide,
    bounds_from,
    read_slides,
    write_slides,
)
from pipeline.dataset.tiles.png_tar import decode_png, encode_png, write_tar
from pipeline.dataset.tiles.store import TileStore

__all__ = [
    "BLOCK_ROWS",
    "CANDIDATES_SCHEMA",
    "GENERATED_SCHEMA",
    "MOST_SLIDES",
    "Dataset",
    "DatasetKind",
    "Entry",
    "FileRecord",
    "HashingFile",
    "Ledger",
    "Missing",
    "Run",
    "ScopeLedger",
    "Selection",
    "ShardName",
    "Slide",
    "TileStore",
    "begun_stages",
    "bounds_from",
    "candidate_count",
    "check_name",
    "check_slide_id",
    "claim_identity",
    "commit_bytes",
    "commit_file",
    "commit_json",
    "covering_blocks",
    "decode_png",
    "encode_png",
    "files_present",
    "fingerprint_of",
    "identity_value",
    "kind_of",
    "lineage_terms",
    "make_selection",
    "new_run_id",
    "open_dataset",
    "parse_shard_name",
    "read_candidates",
    "read_identity",
    "read_journal",
    "read_selection",
    "read_selection_rows",
    "read_slides",
    "read_terms",
    "safe_slide_id",
    "software_versions",
    "write_candidates",
    "write_selection",
    "write_slides",
    "write_tar",
]
