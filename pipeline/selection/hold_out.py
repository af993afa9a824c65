"""Choosing whole patients to hold out, so that they mirror the cohort: pure functions of arrays."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.selection.allocate import sainte_lague
from pipeline.selection.cohort import Cohort


@dataclass(frozen=True)
class Cover:
    """What a hold-out must cover: every project, and sites in proportion (at least `sites`)."""

    project: bool = False
    site: bool = False
    sites: int = 0


def parse_cover(parts: Sequence[str]) -> Cover:
    """`project`, `site` and `site=N` as a `Cover`.

    >>> parse_cover(["project", "site=20"])
    Cover(project=True, site=True, sites=20)
    """
    cover = Cover()
    for part in parts:
        name, _, number = part.partition("=")
        if name == "project" and not number:
            cover = replace(cover, project=True)
        elif name == "site" and (not number or number.isdigit()):
            cover = replace(cover, site=True, sites=int(number or 0))
        else:
            raise UserError(f"--cover {part}: expected project, site or site=N")
    return cover


@dataclass(frozen=True)
class _Family:
    """Patients that stay together: number of slides, main site, all projects, and hash key."""

    name: str
    slides: int
    site: str
    projects: frozenset[str]
    key: int


@dataclass
class _Site:
    """A site's families in the order of being held out: those that fit its target, then others.

    The last one is held out only where nothing else covers what is to be covered or makes up the
    number, since a site without any patient left would be lost to training.
    """

    name: str
    slides: int
    target: int
    fitting: list[_Family] = field(default_factory=list)
    others: list[_Family] = field(default_factory=list)

    @property
    def families(self) -> list[_Family]:
        return self.fitting + self.others


def choose_hold_out(cohort: Cohort, slides: int, cover: Cover, seed: int) -> npt.NDArray[np.bool_]:
    """Mask [slides] of what to hold out: whole patients, `slides` slides or as near as they allow.

    Sites have targets by Sainte-Laguë over their slides; inside a site patients come in the order
    of a hash of (seed, patient), those that would overshoot the target last. Patients that the
    cover needs come first; the others by w / (2 c + k), the rule's priority for a patient of k
    slides in a site of w with c before it; one is passed over where the number wanted could then
    no longer be reached. So the total is the nearest possible next to the covering patients, and
    row order plays no part. Raises `UserError` where the cover needs more slides than requested.
    """
    if not 0 < slides < len(cohort):
        raise UserError(
            f"--hold-out {slides:,}: expected a number between 1 and {len(cohort) - 1:,}, "
            "fewer than the cohort's eligible slides"
        )
    sites = _make_sites(_group_families(cohort, seed), slides)
    anchors = _find_anchors(sites, cover)
    needed = sum(family.slides for family in anchors)
    if needed > slides:
        raise UserError(
            f"--hold-out {slides:,}: covering what --cover names takes {needed:,} slides in "
            f"{len(anchors):,} patients; hold out that many or cover less"
        )
    chosen = {family.name for family in anchors}
    rest = [family for family in _sort_by_priority(sites) if family.name not in chosen]
    if not rest:
        raise UserError("--cover: covering it would hold out every slide; cover less")
    chosen.update(family.name for family in _reach_total(rest, slides - needed))
    return np.isin(cohort.family, sorted(chosen))


def _group_families(cohort: Cohort, seed: int) -> list[_Family]:
    members: dict[str, list[int]] = {}
    for index, name in enumerate(cohort.family.tolist()):
        members.setdefault(name, []).append(index)
    families = []
    for name, rows in members.items():
        # Several sites per patient are rare: the family counts where most of its slides are.
        places = Counter(str(cohort.site[i]) for i in rows)
        site = min(places, key=lambda place: (-places[place], place))
        projects = frozenset(str(cohort.project[i]) for i in rows)
        digest = hashlib.blake2b(f"{seed}\0hold-out\0{name}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        families.append(_Family(name, len(rows), site, projects, key))
    return families


def _make_sites(families: list[_Family], slides: int) -> list[_Site]:
    """Sites by code, each with its target and its families in order."""
    by_site: dict[str, list[_Family]] = {}
    for family in families:
        by_site.setdefault(family.site, []).append(family)
    names = sorted(by_site)
    weights = np.array([sum(f.slides for f in by_site[name]) for name in names], np.int64)
    targets = sainte_lague(weights, weights, slides)
    sites = []
    for name, weight, target in zip(names, weights.tolist(), targets.tolist(), strict=True):
        site, taken = _Site(name, weight, target), 0
        for family in sorted(by_site[name], key=lambda f: (f.key, f.name)):
            if taken + family.slides <= target:
                site.fitting.append(family)
                taken += family.slides
            else:
                site.others.append(family)
        site.others.sort(key=lambda f: (f.slides, f.key, f.name))
        sites.append(site)
    return sites


def _find_anchors(sites: list[_Site], cover: Cover) -> list[_Family]:
    """The patients without whom the cover fails, one per site or project."""
    anchors: list[_Family] = []
    if cover.site:
        if cover.sites > len(sites):
            raise UserError(f"--cover site={cover.sites}: the cohort has {len(sites)} sites")
        proportional = [site for site in sites if site.target and len(site.families) > 1]
        # Sites of one patient come last: they would be lost to training.
        more = sorted(
            (site for site in sites if not (site.target and len(site.families) > 1)),
            key=lambda site: (len(site.families) == 1, -site.slides, site.name),
        )
        wanted = proportional + more[: max(0, cover.sites - len(proportional))]
        anchors += [site.families[0] for site in wanted]
    if cover.project:
        covered = frozenset[str]().union(*(family.projects for family in anchors))
        for project in sorted({p for site in sites for f in site.families for p in f.projects}):
            if project not in covered:
                anchors.append(_project_anchor(sites, project))
                covered |= anchors[-1].projects
    return anchors


def _project_anchor(sites: list[_Site], project: str) -> _Family:
    """The project's first patient, of its largest site that keeps another one if there is one."""
    options = [
        (len(site.families) == 1, place >= len(site.fitting), -site.slides, site.name, place)
        for site in sites
        for place, family in enumerate(site.families)
        if project in family.projects
    ]
    *_, name, place = min(options)
    return next(site.families[place] for site in sites if site.name == name)


def _sort_by_priority(sites: list[_Site]) -> list[_Family]:
    """All families: those that fit their site's target, by priority; others; a site's last one."""
    ranked: list[tuple[int, float, str, int, _Family]] = []
    for site in sites:
        before = 0
        for place, family in enumerate(site.families):
            priority = site.slides / (2 * before + family.slides)
            tier = 0 if place < len(site.fitting) else 1
            tier = 2 if place == len(site.families) - 1 else tier
            ranked.append((tier, -priority, site.name, place, family))
            before += family.slides
    return [row[4] for row in sorted(ranked, key=lambda row: row[:4])]


def _reach_total(families: list[_Family], slides: int) -> list[_Family]:
    """Families in order whose slides sum to `slides`, or as near as can be; never all of them."""
    counts = Counter(family.slides for family in families)
    # The sum nearest to what is wanted that some of them, not all, make; the smaller of two.
    everything = sum(size * count for size, count in counts.items())
    most = min(slides + max(counts, default=0), everything - 1)
    sums = _subset_sums(counts, most)
    possible = (total for total in range(most + 1) if sums >> total & 1)
    remaining = min(possible, key=lambda total: (abs(total - slides), total))
    chosen = []
    for family in families:
        counts[family.slides] -= 1
        after = remaining - family.slides
        # Enough families of one slide reach any number: no need to look at all the sums.
        if after >= 0 and (counts[1] >= after or _subset_sums(counts, after) >> after & 1):
            chosen.append(family)
            remaining = after
    return chosen


def _subset_sums(counts: Counter[int], most: int) -> int:
    """Bit s is set where some of the sizes sum to s, for s up to `most`.

    >>> bin(_subset_sums(Counter({2: 1, 3: 1}), 6))
    '0b101101'
    """
    sums, mask = 1, (1 << (most + 1)) - 1
    for size, count in sorted(counts.items()):
        step = 1
        while count > 0:
            # 1, 2, 4, ... copies together make any number of copies.
            step = min(step, count)
            sums |= (sums << (size * step)) & mask
            count, step = count - step, step * 2
    return sums
