"""Opening a run: every check that can fail is made before the first network is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from common.config import read_yaml
from common.console import print_line
from common.errors import UserError
from common.files import read_regular, write_json, write_text
from common.json_text import parse_json, read_json
from common.record import Record
from common.terms import merge_terms, parse_terms, plain_terms
from common.torch_processes import ALONE, Processes
from pipeline.dataset import (
    Dataset,
    open_dataset,
    read_identity,
    read_selection,
    read_terms,
    software_versions,
)
from pipeline.dataset.features import refuse_other_features
from pipeline.dataset.hold_outs import check_held_out, honoured, is_hold_out
from train.checkpoint import (
    RECORDS_FILE,
    DamagedCheckpointError,
    RunState,
    check_sums,
    checkpoints_dir,
    find_sound_checkpoint,
    latest_checkpoint,
    list_damaged,
    newest_state,
    read_state,
    remove_unfinished,
)
from train.config import Config, differing_keys, has_same_keys, load_config
from train.initial import initial_terms
from train.source import BlockSource, check_coverage
from train.stream import BlockTable, Stream, compile_blocks, map_blocks, write_blocks

Resume = Literal["auto", "never"]
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.yaml"
BLOCKS_DIR = "blocks"  # of a run on several processes
_WRITTEN_IN_PLACE = (
    ".lock", ".lease", ".lease.lock", BLOCKS_DIR, "checkpoints", "metrics.jsonl", "samples",
    "skipped_tiles.jsonl", "tensorboard", "wandb", "wandb_id.txt",
)  # fmt: skip
"""Names of a run directory that are opened to be written, or folders of such; the others are
replaced, also where they are links."""


Rows = list[tuple[str, int]]
"""Tiles of a dataset as (slide_id, rank)."""


@dataclass(frozen=True)
class TrainingData:
    """The data of a run: its stream and where it is read, and the rows of the fixed tiles and of
    each validation selection."""

    dataset: Dataset
    stream: Stream
    source: BlockSource
    fixed_rows: Rows
    validation: dict[str, Rows]


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or at a checkpoint."""

    state: RunState
    checkpoint: Path | None


def open_data(config: Config, processes: Processes = ALONE) -> TrainingData:
    """The run's data; raises `UserError` with the command to run for what is missing.

    Of several processes the main one alone reads the selection, of which there may be 100 million
    rows, and checks that all of it is there.
    """
    if not config.data.dataset:
        raise UserError("data.dataset is not set: add data.dataset=DIR, a dataset directory")
    dataset, data, log = open_dataset(Path(config.data.dataset)), config.data, config.log
    table = _share_table(config, dataset, processes)
    stream = Stream(table, seed=config.run.seed, batch_size=data.batch_size, cursors=data.cursors)
    source = BlockSource(
        dataset,
        tile_px=data.tile_px,
        encoder=data.encoder,
        view=data.view,
        with_cls=config.uses_condition,
        with_tokens=config.reads_tokens,
        tokens_kind=config.tokens_kind,
    )
    _check_features(config, source)

    # A run must not find out after days that the last slides of a selection were never cached.
    others = {log.fixed_selection, *log.validation} - {"", data.selection}
    tables = {name: compile_blocks(read_selection(dataset, name)) for name in sorted(others)}
    tables[data.selection] = table
    kinds = ["cls"] * config.uses_condition + [config.tokens_kind] * config.reads_tokens

    def check_tables() -> None:
        held = {name for name in log.validation if is_hold_out(dataset, name)}
        held |= honoured(dataset, data.selection)
        check_held_out(dataset, data.selection, table.slide_ids, held)
        for wanted in tables.values():
            check_coverage(
                dataset,
                wanted,
                tile_px=data.tile_px,
                encoder=data.encoder,
                view=data.view,
                kinds=kinds,
            )

    processes.on_main(check_tables)

    # Spread over the selection: neighbouring tiles of one slide would say little.
    fixed = tables[config.fixed_selection].spread_rows(max(log.fixed_tiles, log.samples))
    validation = {name: tables[name].spread_rows(log.validation_tiles) for name in log.validation}
    return TrainingData(dataset, stream, source, fixed, validation)


def _share_table(config: Config, dataset: Dataset, processes: Processes) -> BlockTable:
    """The selection's blocks: compiled by the main process, mapped by the others."""

    def compile_selection() -> BlockTable:
        return compile_blocks(read_selection(dataset, config.data.selection))

    if processes.size == 1:
        return compile_selection()
    folder = run_directory(config) / BLOCKS_DIR
    processes.on_main(lambda: write_blocks(compile_selection(), folder))
    return map_blocks(folder)


def _check_features(config: Config, source: BlockSource) -> None:
    """The encoder's widths must be those that the SiT is built for."""
    record, sit = source.encoder_record, config.model.sit
    dim = record.get("dim")
    if config.uses_condition and dim is not None and dim != sit.condition_dim:
        raise UserError(
            f"configuration key 'model.sit.condition_dim': the features of {config.data.encoder} "
            f"have {dim} values, got {sit.condition_dim}; leave the key out to take the encoder's"
        )
    shape = record.get("tokens_shape")
    if config.reads_tokens and shape and list(shape) != [sit.num_tokens, sit.token_dim]:
        raise UserError(
            f"patch tokens of {config.data.encoder} are {list(shape)}, but the SiT aligns "
            f"{[sit.num_tokens, sit.token_dim]}: leave model.sit.token_dim out to take the "
            "encoder's, and set latent_size and patch_size to match its number of tokens"
        )


def open_run(config: Config, data: TrainingData, processes: Processes, resume: Resume) -> Start:
    """Claim the run directory and find where to begin.

    A damaged checkpoint is set aside for the one before it. Raises `UserError` for the directory of
    another configuration or selection, for one of which all checkpoints are damaged, and with
    resume="never" for one that has checkpoints.
    """
    run_dir = run_directory(config)
    if resume == "never" and (latest_checkpoint(run_dir) or list_damaged(run_dir)):
        raise UserError(f"{run_dir} has checkpoints: use --resume auto, or another run.dir")

    inputs = cache(partial(_input_records, config, data))  # on the main process alone, and once

    def find_checkpoint() -> str:
        # Before anything is written or renamed: the files of another run stay as they are.
        _check_same_configuration(config, run_dir)
        if latest_checkpoint(run_dir):
            _check_same_inputs(run_dir, inputs())
        sound = find_sound_checkpoint(run_dir, checkpoint_files(config))
        return sound.name if sound else ""

    name = processes.on_main(find_checkpoint)
    checkpoint = checkpoints_dir(run_dir) / name if name else None
    damage = damaged_file(run_dir)
    table = data.stream.table
    state = RunState(0, table.content_hash, config.hash)
    if checkpoint is not None:
        state = read_state(checkpoint)
        if state.blocks_sha256 != table.content_hash:
            raise UserError(
                f"{checkpoint} was trained on another selection than '{config.data.selection}' of "
                f"{config.data.dataset} now has: restore that selection, or use another run.dir"
            )
    processes.wait_for_all()  # all have read before the main process writes

    def claim_directory() -> None:
        if damage:
            print_line(f"{damage}: writing it again")
        remove_unfinished(run_dir)
        record = data.source.encoder_record
        named = [record.get(key) for key in ("encoder", "weights")]
        header = f"# encoder {named[0]}, weights {named[1]}\n" if record else ""
        # Where a reader of the configuration cannot miss it.
        if record.get("random_weights"):
            header += "# RANDOM encoder weights: conditions and alignment targets have no meaning\n"
        write_text(run_dir / CONFIG_FILE, header + config.to_yaml())
        records = {
            **inputs(),
            "dataset": read_identity(data.dataset),
            "rows": table.num_rows,
            "steps_per_epoch": data.stream.steps_per_epoch,
            "blocks_sha256": table.content_hash,
            "config_sha256": config.hash,
            "versions": software_versions("torch", "numpy"),
        }
        write_json(run_dir / RECORDS_FILE, records)

    processes.on_main(claim_directory)
    return Start(replace(state, config_sha256=config.hash), checkpoint)


def checkpoint_files(config: Config) -> list[str]:
    """The safetensors files of a checkpoint of that configuration."""
    trained = ["sit", *["vae"] * config.mode.trains_vae]
    kept = ["sit", "vae", *(f"{name}_ema" for name in trained)]
    if config.uses_loss("generator"):
        trained, kept = [*trained, "discriminator"], [*kept, "discriminator"]
    return [f"{name}.safetensors" for name in (*kept, *(f"optimizer_{name}" for name in trained))]


def _input_records(config: Config, data: TrainingData) -> dict[str, Any]:
    """What a run trains on beside its selection: the features' encoder, and a sum of the tiles."""
    return {
        "encoder": data.source.encoder_record,
        "terms": plain_terms(
            merge_terms(
                read_terms(data.dataset),
                parse_terms(data.source.encoder_record.get("terms")),
                initial_terms(config),
            )
        ),
        "tiles_sha256": data.source.hash_tiles(data.stream.table.slide_ids),
    }


def _check_same_inputs(run_dir: Path, now: dict[str, Any]) -> None:
    """Refuse to go on with tiles or features that were made otherwise since the run began.

    What releases did not record is not judged, nor what a damaged records.json had.
    """
    path = run_dir / RECORDS_FILE
    if not path.exists() or damaged_file(run_dir, (RECORDS_FILE,)):
        return
    before = read_records(run_dir)
    encoder = before.get("encoder")
    if isinstance(encoder, dict):
        remedy = "make the former features again, or use another run.dir"
        refuse_other_features(path, encoder, now["encoder"], remedy=remedy)
    if before.get("tiles_sha256", now["tiles_sha256"]) != now["tiles_sha256"]:
        raise UserError(
            f"{path}: the selection's tiles were made again since the run began, from other slide "
            "files or candidates: use another run.dir (if they are the same for certain, remove "
            "tiles_sha256 from that file)"
        )


def run_directory(config: Config) -> Path:
    """The run directory; raises `UserError` where none is set."""
    if not config.run.dir:
        raise UserError("run.dir is not set: add run.dir=DIR, where the run is written")
    return Path(config.run.dir)


def refuse_links(run_dir: Path) -> None:
    """Raise `UserError` where something that a run writes or removes is a link.

    A run directory that somebody else made must lead nowhere else.
    """
    for path in (run_dir / name for name in _WRITTEN_IN_PLACE):
        if path.is_symlink():
            raise UserError(
                f"{path} is a link, and training writes or removes nothing behind links in a run "
                "directory, which may lead anywhere: put a folder or file in its place (one on "
                "another disk: mount it there), or use another run.dir"
            )


def is_finished(config: Config) -> bool:
    """Whether this very run is complete in its directory; refuses another configuration.

    A run whose last checkpoint is damaged is not.
    """
    run_dir = run_directory(config)
    _check_same_configuration(config, run_dir)
    checkpoint = latest_checkpoint(run_dir)
    # The summary is the last file that a run writes. What a power loss emptied, opening the run
    # writes again.
    if checkpoint is None or not (run_dir / SUMMARY_FILE).exists() or damaged_file(run_dir):
        return False
    try:
        is_last = read_state(checkpoint).step >= config.run.steps
        if is_last:  # "nothing to do" is true only while the weights are there
            check_sums(checkpoint)
        return is_last
    except DamagedCheckpointError:
        return False


def damaged_file(
    run_dir: Path, names: Sequence[str] = (CONFIG_FILE, RECORDS_FILE, SUMMARY_FILE)
) -> str:
    """The first of a run's files that cannot be read, and why.

    "" where those that are there can be read. Releases that did not sync them left them empty
    after a power loss.
    """
    for path in (run_dir / name for name in names):
        try:
            data = read_regular(path)
            if not data.strip(b"\0 \r\n"):
                return f"{path} is empty"
            if path.suffix == ".json":
                parse_json(data)
                continue
            load_config(path)
            # Its last keys: with defaults in place of what was cut off it would be another run.
            export = read_yaml(path).get("export")
            if not (isinstance(export, dict) and {"sit", "vae"} <= export.keys()):
                return f"{path} is cut short"
        except FileNotFoundError:
            continue
        except (OSError, UserError, ValueError) as error:
            return f"{path} cannot be read ({error})"
    return ""


def read_config(run_dir: Path) -> Config:
    """The configuration of a run; a `UserError` says how to have a damaged one again."""
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{run_dir} is not a run: it has no {CONFIG_FILE}")
    if damage := damaged_file(run_dir, (CONFIG_FILE, RECORDS_FILE)):
        raise UserError(
            f"{damage}: run `python -m train` with the configuration that the run was begun with "
            f"and run.dir={run_dir}, which writes it again and goes on where the run was"
        )
    return load_config(path)


def read_records(run_dir: Path) -> Record:
    """records.json of a run: the encoder's record, the dataset's identity, versions."""
    path = run_dir / RECORDS_FILE
    try:
        records = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): is {run_dir} a run?") from error
    if not (isinstance(records, dict) and {"encoder", "dataset"} <= records.keys()):
        raise UserError(f"{path} has no encoder and dataset: is {run_dir} a run?")
    return Record(records, str(path))


def _check_same_configuration(config: Config, run_dir: Path) -> None:
    path = run_dir / CONFIG_FILE
    if not path.exists():
        return
    damage = damaged_file(run_dir, (CONFIG_FILE,))
    differing = [] if damage else differing_keys(config, load_config(path))
    newest = newest_state(run_dir)
    if not damage and not differing:
        if newest is not None:
            _refuse_edited(config, path, *newest)
        return
    # The checkpoint knows whose it is. The file may be damaged, and is written again.
    if newest is not None and newest[1].config_sha256 == config.hash:
        return
    if not damage:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{run_dir} is the run of another configuration ({'; '.join(differing[:3])}{more}): "
            f"use another run.dir, or --config {path} to continue it"
        )
    if newest is not None:
        raise UserError(
            f"{damage}, and {newest[0]} is of another configuration than this: give the one that "
            f"the run was begun with; if it is this one for certain, remove {path}"
        )


def _refuse_edited(config: Config, path: Path, checkpoint: Path, state: RunState) -> None:
    """Refuse a config.yaml that was edited after the checkpoint was written, and agrees with us.

    Where it has other keys than ours, another release wrote it, whose sums are not comparable; nor
    are they where records.json, of the last start, has another than the checkpoint.
    """
    if state.config_sha256 == config.hash or not has_same_keys(config, read_yaml(path)):
        return
    try:
        recorded = read_records(path.parent).get("config_sha256")
    except UserError:
        return
    if recorded == state.config_sha256:
        raise UserError(
            f"{path} was changed after {checkpoint} was written: give the values that the run was "
            "trained with, or use another run.dir for the new ones"
        )
