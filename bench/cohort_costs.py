"""What a cohort costs: bytes, files, core-hours and GPU-hours, from counts and rates.

Pure arithmetic behind the tables of docs/scaling.md; `bench/scaling.py` prints them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.dataset import BLOCK_ROWS
from pipeline.features.plan import stored_bytes


@dataclass(frozen=True)
class Rates:
    """What one slide or tile costs. Seconds are of one core, or one GPU where it says so.

    The defaults of CPU work are of docs/scaling.md (`bench/scaling.py`, `bench/tiling.py`: one
    core of the development machine; a slide of 10,500 tiles at 0.25 µm/px for what grows with
    the slide). Those of GPU work are operations over `gpu_flops`, which nobody measured.
    """

    scan_s_per_slide: float = 0.1
    tissue_s_per_slide: float = 5.0
    tissue_bytes_per_slide: float = 2.0e6
    candidate_bytes: float = 13.0
    selection_bytes_per_tile: float = 0.05
    tile_s: float = 1 / 132
    tile_bytes: float = 100e3
    journal_bytes_per_line: float = 1200.0
    slide_bytes_per_candidate: float = 104e3
    encoder_flop_per_tile: float = 47.1e9
    training_flop_per_tile: float = 2843e9
    gpu_flops: float = 125e12

    @property
    def cache_gpu_s(self) -> float:
        """Seconds of a GPU for the encoder's forward pass of a tile."""
        return self.encoder_flop_per_tile / self.gpu_flops

    @property
    def training_gpu_s(self) -> float:
        """Seconds of a GPU for a training step's share of one tile."""
        return self.training_flop_per_tile / self.gpu_flops


@dataclass(frozen=True)
class Cost:
    """What a stage takes: bytes and files on disk, seconds of cores and of GPUs.

    `known` says where the figures come from; seconds are None where no rate is known.
    """

    stage: str
    bytes: float = 0.0
    files: int = 0
    core_s: float | None = 0.0
    gpu_s: float | None = 0.0
    known: str = ""


@dataclass(frozen=True)
class CohortSize:
    """How much there is: slides, candidate tiles in all, tiles to store; what of their features.

    `kinds` maps a kind of features (`cls`, `tokens-float16`, `tokens-int8`) to the encoder's
    (width of CLS, (tokens, width of a token)); `epochs` of training over the tiles.
    """

    slides: int
    candidates: int
    tiles: int
    kinds: Mapping[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    epochs: float = 0.0


def cohort_costs(cohort: CohortSize, rates: Rates) -> list[Cost]:
    """The stages' costs in their order, training last."""
    costs = [
        scan_cost(cohort.slides, rates),
        tissue_cost(cohort.slides, cohort.candidates, rates),
        select_cost(cohort.tiles, rates),
        tile_cost(cohort.slides, cohort.tiles, rates),
    ]
    forward = cohort.tiles * rates.cache_gpu_s
    for kind, (dim, shape) in cohort.kinds.items():
        cost = feature_cost(kind, cohort.slides, cohort.tiles, dim, shape, rates)
        # One forward pass gives every kind: it is counted with the first.
        costs.append(Cost(cost.stage, cost.bytes, cost.files, 0.0, forward, cost.known))
        forward = 0.0
    if cohort.epochs:
        seconds = cohort.tiles * cohort.epochs * rates.training_gpu_s
        costs.append(Cost("train", 0.0, 0, 0.0, seconds, f"{cohort.epochs:g} epochs"))
    return costs


def scan_cost(slides: int, rates: Rates) -> Cost:
    """Rows of slides.parquet (up to 300 bytes each) and lines of the journal and the log."""
    size = slides * (300 + rates.journal_bytes_per_line)
    return Cost("scan", size, 1, slides * rates.scan_s_per_slide)


def tissue_cost(slides: int, candidates: int, rates: Rates) -> Cost:
    """A mask, an overlay and a table of candidates a slide."""
    size = slides * (rates.tissue_bytes_per_slide + rates.journal_bytes_per_line)
    size += candidates * rates.candidate_bytes
    return Cost("tissue", size, 3 * slides, slides * rates.tissue_s_per_slide)


def select_cost(tiles: int, rates: Rates) -> Cost:
    """A table and a list of what was left out."""
    return Cost("select", tiles * rates.selection_bytes_per_tile, 2)


def tile_cost(slides: int, tiles: int, rates: Rates) -> Cost:
    """A tar with its index a slide; whole blocks are written."""
    stored = tiles + slides * BLOCK_ROWS // 2
    size = stored * rates.tile_bytes + slides * rates.journal_bytes_per_line
    return Cost("tile", size, 2 * slides, stored * rates.tile_s)


def feature_cost(
    kind: str, slides: int, tiles: int, dim: int, shape: tuple[int, int], rates: Rates
) -> Cost:
    """A file a slide and kind, without the forward pass."""
    size = stored_bytes(kind, tiles + slides * BLOCK_ROWS // 2, slides, dim, shape)
    return Cost(f"cache {kind}", size + slides * rates.journal_bytes_per_line, slides)


def total(costs: list[Cost]) -> Cost:
    """The sum; seconds of which some are unknown are unknown."""
    cores = [cost.core_s for cost in costs]
    gpus = [cost.gpu_s for cost in costs]
    return Cost(
        "total",
        sum(cost.bytes for cost in costs),
        sum(cost.files for cost in costs),
        None if None in cores else sum(s for s in cores if s is not None),
        None if None in gpus else sum(s for s in gpus if s is not None),
    )
