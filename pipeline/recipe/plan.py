"""What a recipe would still do: slides, tiles, files, bytes and hours of each step.

Counts come from the dataset where a stage has run, before that from the sizes of the slides. Bytes
and seconds are those of the dataset's own journal; before its first entry, sizes are those of
docs/scaling.md and hours are unknown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import MOST_YAML_BYTES
from common.files import open_regular, read_regular
from common.json_text import parse_json
from common.options import parse_count
from common.plain_yaml import load_yaml
from pipeline.dataset import BLOCK_ROWS, Dataset, Entry, Ledger, read_journal
from pipeline.dataset.ledger import covered_blocks
from pipeline.recipe.steps import Recipe, Step
from pipeline.tiles.stage import needed_blocks

_DEFAULT_TILE_PX = 224
_SCAN_BYTES_PER_SLIDE = 1500.0
_TISSUE_BYTES_PER_SLIDE, _BYTES_PER_CANDIDATE = 2.0e6, 13.0
_TILE_BYTES, _SELECTION_BYTES_PER_TILE = 100e3, 0.05
_SLIDE_BYTES_PER_CANDIDATE = 104e3
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class StepPlan:
    """What one step would still do.

    `bytes` and `files` go to disk. `worker_s` are seconds of one worker (a core, or a GPU for
    `cache` and `train`), None where no rate was measured yet. `basis` says what is missing and
    where the figures come from.
    """

    name: str
    bytes: float = 0.0
    files: int = 0
    worker_s: float | None = 0.0
    basis: str = ""
    is_known: bool = True


@dataclass(frozen=True)
class MeasuredRate:
    """Bytes and seconds of one worker per slide or tile; seconds are None where not measured."""

    bytes: float
    seconds: float | None
    source: str


def measure_rate(
    entries: Iterable[Entry], assumed_bytes: float, *, per_tile: bool = False
) -> MeasuredRate:
    """The rate of the entries that are done, per slide or per tile.

    >>> measure_rate([Entry("s", "done", "", start=0, stop=16, seconds=2.0)], 1.0, per_tile=True)
    MeasuredRate(bytes=1.0, seconds=0.125, source='measured on 16 tiles')
    """
    timed = [entry for entry in entries if entry.outcome == "done" and entry.seconds > 0]
    tiles = sum(max(0, entry.stop - entry.start) for entry in timed)
    amount = tiles if per_tile else len(timed)
    if not amount:
        return MeasuredRate(assumed_bytes, None, "no rate measured yet")
    size = sum(record.bytes for entry in timed for record in entry.files)
    seconds = sum(entry.seconds for entry in timed)
    source = f"measured on {amount:,} {'tiles' if per_tile else 'slides'}"
    return MeasuredRate(size / amount or assumed_bytes, seconds / amount, source)


def plan_recipe(recipe: Recipe) -> list[tuple[Step, StepPlan]]:
    """What each step would still do, in the recipe's order; nothing is written."""
    planners: dict[Path, DatasetPlanner] = {}
    plans = []
    for step in recipe.steps:
        if step.dataset is not None:
            if step.dataset not in planners:
                steps = [other for other in recipe.steps if other.dataset == step.dataset]
                planners[step.dataset] = DatasetPlanner(step.dataset, steps)
            plans.append((step, planners[step.dataset].plan_step(step)))
        elif step.name == "train":
            plans.append((step, plan_training(step)))
        else:
            plans.append((step, StepPlan(step.name, basis="not planned", is_known=False)))
    return plans


class DatasetPlanner:
    """Plans the steps on one dataset, which need not exist yet."""

    def __init__(self, root: Path, steps: Sequence[Step]) -> None:
        self.dataset = Dataset(root)
        sizes = _slide_sizes(steps)
        scanned = Ledger.read(self.dataset, "scan")[""].by_slide
        tissue = Ledger.read(self.dataset, "tissue")[""].by_slide
        self.slides = max(len(sizes), len(scanned))
        self.unscanned = self.slides - len(scanned)
        self.without_tissue = max(0, self.slides - len(tissue))
        counts = [
            sum(entry.counts.get("candidate tiles", 0) for entry in entries)
            for entries in tissue.values()
        ]
        # Slides without a count have as many as the others, or as many as their bytes suggest.
        if counts:
            self.candidates = sum(counts) + self.without_tissue * sum(counts) // len(counts)
        else:
            self.candidates = int(sum(sizes.values()) / _SLIDE_BYTES_PER_CANDIDATE)
        self.is_exact = bool(counts) and not self.without_tissue
        self.planned_tiles = {
            str(step.values.get("name")): parse_count(step.option_texts("tiles")[0])
            if "tiles" in step.values
            else self.candidates
            for step in steps
            if step.name == "select"
        }
        stated_px = [
            px for step in steps if step.name == "scan" for px in step.option_texts("tile-px")
        ]
        self.tile_px = int(stated_px[0]) if stated_px else _DEFAULT_TILE_PX

    def plan_step(self, step: Step) -> StepPlan:
        """What the step would still do."""
        match step.name:
            case "scan":
                return self._plan_slides(step, self.unscanned, 1, _SCAN_BYTES_PER_SLIDE)
            case "tissue":
                per_slide = self.candidates / max(1, self.slides)
                size = _TISSUE_BYTES_PER_SLIDE + per_slide * _BYTES_PER_CANDIDATE
                return self._plan_slides(step, self.without_tissue, 3 * self.without_tissue, size)
            case "select":
                name = str(step.values.get("name"))
                if name in self.dataset.selection_names():
                    return StepPlan(step.name, basis=f"'{name}' is done")
                tiles = self.planned_tiles.get(name, self.candidates)
                basis = f"'{name}': {self._about_prefix}{tiles:,} tiles"
                return StepPlan(step.name, tiles * _SELECTION_BYTES_PER_TILE, 2, basis=basis)
            case "tile":
                return self._plan_tile(step)
            case "cache":
                return self._plan_cache(step)
        return StepPlan(step.name, basis="not planned", is_known=False)

    def _plan_slides(self, step: Step, slides: int, files: int, assumed_bytes: float) -> StepPlan:
        """The plan of a stage that works slide by slide."""
        if not slides:
            return StepPlan(step.name, basis="all done")
        rate = measure_rate(read_journal(self.dataset, step.name), assumed_bytes)
        seconds = None if rate.seconds is None else slides * rate.seconds
        basis = f"{slides:,} slides, {rate.source}"
        return StepPlan(step.name, slides * rate.bytes, files, seconds, basis)

    def _plan_tile(self, step: Step) -> StepPlan:
        px = int(str(step.values.get("tile-px", self.tile_px)))
        done = Ledger.read(self.dataset, step.name)[str(px)].by_slide
        tiles, slides, basis = self._count_missing(step, done)
        if not tiles:
            return StepPlan(step.name, basis="all done")
        # By what these tiles took so far: size and speed depend on codec, slides and machine.
        entries = (entry for rows in done.values() for entry in rows)
        rate = measure_rate(entries, _TILE_BYTES, per_tile=True)
        seconds = None if rate.seconds is None else tiles * rate.seconds
        return StepPlan(
            step.name, tiles * rate.bytes, 2 * slides, seconds, f"{basis}, {rate.source}"
        )

    def _plan_cache(self, step: Step) -> StepPlan:
        """All kinds of the step's features; one forward pass gives all of them."""
        from model.encoders import encoder_spec
        from pipeline.features.config import CacheConfig
        from pipeline.features.plan import stored_bytes

        config = CacheConfig(
            str(step.values.get("encoder", "h0-mini")), view=str(step.values.get("view", "")),
            tokens=str(step.values.get("tokens", "auto")),
        ).resolve_tokens()  # fmt: skip
        name, spec = f"cache {config.encoder}", encoder_spec(config.encoder)
        px = int(str(step.values.get("tile-px", self.tile_px)))
        ledger = Ledger.read(self.dataset, step.name)
        # Kinds are stored apart, and may be complete for different tiles.
        size, files, most, words = 0, 0, 0, ""
        for kind in config.kinds:
            done = ledger[config.scope(px, kind)].by_slide
            tiles, slides, basis = self._count_missing(step, done)
            if tiles:
                shape = (spec.num_tokens, spec.token_dim)
                size += stored_bytes(kind, tiles, slides, spec.dim, shape)
                files += slides
            if tiles > most:
                most, words = tiles, basis
        if not most:
            return StepPlan(name, basis="all done")
        cls_scope = config.scope(px, "cls")
        rate = measure_rate((e for e in ledger.lines if e.scope == cls_scope), 0.0, per_tile=True)
        seconds = None if rate.seconds is None else most * rate.seconds
        return StepPlan(name, size, files, seconds, f"{words}, {rate.source}")

    @property
    def _about_prefix(self) -> str:
        return "" if self.is_exact else "about "

    def _count_missing(self, step: Step, done: Mapping[str, list[Entry]]) -> tuple[int, int, str]:
        """Tiles that a stage still lacks, in how many slides, and both in words."""
        existing = set(self.dataset.selection_names())
        wanted = set(step.option_texts("selection")) or existing | set(self.planned_tiles)
        new = wanted - existing
        coming = sum(self.planned_tiles.get(name, self.candidates) for name in new)
        # Selections overlap: together they have no more tiles than there are candidates.
        if self.is_exact:
            coming = min(coming, self.candidates)
        tiles = slides = 0
        if wanted & existing:
            selections = tuple(sorted(wanted & existing))
            for slide, blocks in needed_blocks(self.dataset, selections).items():
                covered = covered_blocks(e for e in done.get(slide, ()) if e.outcome == "done")
                if lacking := len(blocks - covered):
                    tiles, slides = tiles + lacking * BLOCK_ROWS, slides + 1
        if not coming:
            return tiles, slides, f"{tiles:,} tiles of {slides:,} slides"
        # Whole blocks are written: on average half a block more per slide than was selected.
        tiles += coming + self.slides * BLOCK_ROWS // 2
        return tiles, self.slides, f"{self._about_prefix}{coming:,} tiles planned"


def _slide_sizes(steps: Iterable[Step]) -> dict[str, int]:
    """Bytes of the slides that the recipe's scan would find; 0 where that is unknown."""
    from pipeline.slides.entries import find_slides

    inputs = [text for step in steps if step.name == "scan" for text in step.option_texts("slides")]
    sizes = {}
    # A planned dataset may not exist yet: sizes are all that is known of its slides.
    for slide in find_slides(inputs):
        try:
            sizes[slide.slide_id] = slide.bytes or slide.path.stat().st_size
        except OSError:
            sizes[slide.slide_id] = slide.bytes
    return sizes


def plan_training(step: Step) -> StepPlan:
    """GPU-seconds left at the training run's own rate; unknown before it has begun."""
    folder = Path(str(step.values.get("run.dir", "")))
    try:
        config = load_yaml(read_regular(folder / "config.yaml", MOST_YAML_BYTES).decode())
        last = _last_metrics(folder / "metrics.jsonl")
        total, batch = int(config["run"]["steps"]), int(config["data"]["batch_size"])
        done, rate = int(str(last["step"])), float(str(last["images_per_s"]))
    except (OSError, KeyError, TypeError, ValueError):
        return StepPlan(step.name, worker_s=None, basis="no rate measured yet: it has not begun")
    left = max(0, total - done)
    seconds = left * batch / rate * step.processes if rate > 0 else None
    basis = f"step {done:,} of {total:,}, measured {rate:.3g} tiles/s"
    return StepPlan(step.name, worker_s=seconds, basis=basis)


def _last_metrics(path: Path) -> dict[str, object]:
    """The last whole line of a metrics file that has a rate; {} where there is none."""
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "images_per_s" in row:
            return row
    return {}
