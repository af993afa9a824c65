"""The configurations of `select`, `plan-cohort` and `curate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.options import option_field, option_metadata, parse_count
from pipeline.options import SELECTIONS

Share = Literal["tiles", "slides"]

_STRATIFY = option_metadata(
    "what the budget is divided among", choices=("site", "project", "project+site", "none")
)
_SHARE = option_metadata(
    "whether a stratum's share is that of its candidate tiles or of its slides"
)
_COVER = option_metadata(
    "what a hold-out covers: project, site (in proportion), site=N (at least N)",
    metavar="LIST", separator=",",
)  # fmt: skip
_SAMPLE_TYPES = option_metadata(
    "TCGA sample types to take, such as 01,06 (default: all)", metavar="LIST", separator=","
)
_MIN_CANDIDATES = option_metadata(
    "leave out slides with fewer candidate tiles", metavar="N", parse=parse_count
)
_FROZEN = option_metadata("take frozen sections as well")


@dataclass(frozen=True)
class Rules:
    """Which slides of a cohort are eligible; `sample_types` () takes all."""

    sample_types: tuple[str, ...] = option_field((), _SAMPLE_TYPES)
    min_candidates: int = option_field(1, _MIN_CANDIDATES)
    frozen: bool = option_field(False, _FROZEN)


@dataclass(frozen=True)
class SelectConfig:
    """What a selection is to be; `tiles` None takes all there is."""

    name: str = field(metadata=option_metadata("the selection's name", is_optional=True))
    tiles: int | None = option_field(
        None, "number of tiles (default: all there are)", parse=parse_count
    )
    stratify: str = option_field("site", _STRATIFY)
    pool: Literal["train", "reserve", "all"] = option_field(
        "train", "ranks above the validation reserve, the reserve itself, or both"
    )
    share: Share = option_field("tiles", _SHARE)
    hold_out: int | None = option_field(
        None,
        "hold out about so many slides by whole patients, and take tiles of those",
        metavar="SLIDES",
        parse=parse_count,
    )
    cover: tuple[str, ...] = option_field((), _COVER)
    parent: str = option_field(
        "", "draw from that selection's tiles", flag="--from", metavar="NAME"
    )
    deny: tuple[str, ...] = option_field(
        (), "leave out the tiles of deny-lists", metavar="LIST", separator=","
    )
    split: tuple[str, ...] = option_field(
        (),
        "split into disjoint sets NAME-<part> of --tiles each, e.g. conditioning,reference",
        metavar="LIST",
        separator=",",
    )
    sample_types: tuple[str, ...] = option_field((), _SAMPLE_TYPES)
    min_candidates: int = option_field(1, _MIN_CANDIDATES)
    frozen: bool = option_field(False, _FROZEN)

    @property
    def rules(self) -> Rules:
        """Which slides are eligible."""
        return Rules(self.sample_types, self.min_candidates, self.frozen)

    @property
    def names(self) -> list[str]:
        """The selections that are written."""
        return [f"{self.name}-{part}" for part in self.split] or [self.name]


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for a cohort: budgets in tiles, the hold-out in slides.

    `candidates` is the simulated number of candidate tiles in all. The first of `train` is also
    what guidance is drawn from.
    """

    train: tuple[int, ...] = option_field(
        (40_000_000, 108_000_000),
        "a training budget; may be given several times",
        metavar="TILES",
        parse=parse_count,
    )
    val_tiles: int = option_field(100_000, "tiles of val-in and val-out each", parse=parse_count)
    guidance: int = option_field(100_000, "tiles of guidance", parse=parse_count)
    hold_out: int = option_field(
        1012, "slides to hold out, by whole patients", metavar="SLIDES", parse=parse_count
    )
    cover: tuple[str, ...] = option_field(("project", "site"), _COVER)
    candidates: int = option_field(
        125_000_000,
        "candidate tiles to simulate in all, where the list states none",
        parse=parse_count,
    )
    stratify: str = option_field("site", _STRATIFY)
    share: Share = option_field("tiles", _SHARE)
    rules: Rules = field(default_factory=Rules)
    seed: int = option_field(0, "seed of all draws")

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", tuple(sorted(set(self.train))))

    def select(self, name: str, tiles: int, **more: Any) -> SelectConfig:
        """One selection's configuration, as `select` would have it."""
        return SelectConfig(
            name, tiles, self.stratify, share=self.share, sample_types=self.rules.sample_types,
            min_candidates=self.rules.min_candidates, frozen=self.rules.frozen, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class CurateConfig:
    """Labels, the features to classify by, and what becomes of the selections.

    `name` is that of the deny-list; a selection S is cleaned as S-<name>. `selections` () takes
    all that were drawn without a deny-list. `usable_recall` is the share (0 to 1) of usable
    labelled tiles that the threshold keeps.
    """

    labels: Path = field(
        metadata=option_metadata(
            "columns slide_id, rank, label (usable or artifact)", metavar="CSV"
        )
    )
    encoder: str = field(
        metadata=option_metadata(
            "whose cached CLS features to use", flag="--features", metavar="ENCODER"
        )
    )
    name: str = option_field("curated", "name of the deny-list; selection S is cleaned as S-NAME")
    view: str = option_field("", "preprocessing view of the features (default: none)")
    selections: tuple[str, ...] = option_field((), SELECTIONS)
    folds: int = option_field(5, "folds of the cross-validation")
    usable_recall: float = option_field(0.99, "share of usable tiles to keep", flag="--recall")
