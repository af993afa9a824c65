"""What `select` and `plan-cohort` are asked for."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rules:
    """Which slides of a cohort are eligible; `sample_types` () takes all."""

    sample_types: tuple[str, ...] = ()
    min_candidates: int = 1
    frozen: bool = False


@dataclass(frozen=True)
class SelectConfig:
    """What a selection is to be; `tiles` None takes all there is.

    Pool `train` is every rank above the validation reserve, `reserve` the reserve, `all` both.
    `hold_out` chooses that many slides by whole patients and takes tiles of them alone, covering
    what `cover` names (`project`, `site`, `site=N`). `parent` draws from the rows of another
    selection, `deny` leaves out the ranks of those deny-lists, `split` splits the rows into
    several disjoint selections of `tiles` each, named <name>-<part>.
    """

    name: str
    tiles: int | None = None
    stratify: str = "site"
    pool: str = "train"
    share: str = "tiles"
    hold_out: int | None = None
    cover: tuple[str, ...] = ()
    parent: str = ""
    deny: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    sample_types: tuple[str, ...] = ()
    min_candidates: int = 1
    frozen: bool = False

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

    train: tuple[int, ...] = (40_000_000, 108_000_000)
    val_tiles: int = 100_000
    guidance: int = 100_000
    hold_out: int = 1012
    cover: tuple[str, ...] = ("project", "site")
    candidates: int = 125_000_000
    stratify: str = "site"
    share: str = "tiles"
    rules: Rules = field(default_factory=Rules)
    seed: int = 0

    def select(self, name: str, tiles: int, **more: Any) -> SelectConfig:
        """One selection's configuration, as `select` would have it."""
        return SelectConfig(
            name, tiles, self.stratify, share=self.share, sample_types=self.rules.sample_types,
            min_candidates=self.rules.min_candidates, frozen=self.rules.frozen, **more,
        )  # fmt: skip
