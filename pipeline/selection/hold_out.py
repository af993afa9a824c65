"""Choosing whole patients to hold out, so that they mirror the cohort: pure functions of arrays."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.selection.allocate import sainte_lague
from pipeline.selection.cohort import Cohort


@dataclass(frozen=True)
class Cover:
    """What a hold-out must reach: every project, and sites in proportion (at least `sites`)."""

    project: bool = False
    site: bool = False
    sites: int = 0


@dataclass(frozen=True)
class _Family:
    """Patients that stay together: number of slides, main site, all projects, and their key."""

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
    """Mask of the slides to hold out: whole patients, `slides` slides or as near as they allow.

    Sites have targets by Sainte-Laguë over their slides; inside a site patients come in the order
    of a hash of (seed, patient), those that would overshoot the target last. Patients that the
    cover needs come first; the others by w / (2 c + k), the rule's priority for a patient of k
    slides in a site of w with c before it; one is passed over where the number wanted could then
    no longer be reached. So the total is the nearest possible beside the covering patients, and
    row order plays no part. Raises `UserError` where the cover needs more slides than asked for.
    """
    if not 0 < slides < len(cohort):
        raise UserError(
            f"--hold-out {slides:,}: expected a number between 1 and {len(cohort) - 1:,}, "
            "fewer than the cohort's eligible slides"
        )
    sites = _sites(_family_table(cohort, seed), slides)
    anchors = _anchors(sites, cover)
    needed = sum(family.slides for family in anchors)
    if needed > slides:
        raise UserError(
            f"--hold-out {slides:,}: covering what --cover names takes {needed:,} slides in "
            f"{len(anchors):,} patients; ask for that many or cover less"
        )
    chosen = {family.name for family in anchors}
    rest = [family for family in _by_priority(sites) if family.name not in chosen]
    if not rest:
        raise UserError("--cover: covering it would hold out every slide; cover less")
    chosen.update(family.name for family in _reach(rest, slides - needed))
    return np.isin(cohort.family, sorted(chosen))


def _family_table(cohort: Cohort, seed: int) -> list[_Family]:
    members: dict[str, list[int]] = {}
    for index, name in enumerate(cohort.family.tolist()):
        members.setdefault(name, []).append(index)
    table = []
    for name, rows in members.items():
        # Several sites a patient are rare: the family counts where most of its slides are.
        places = Counter(str(cohort.site[i]) for i in rows)
        site = min(places, key=lambda place: (-places[place], place))
        projects = frozenset(str(cohort.project[i]) for i in rows)
        table.append(_Family(name, len(rows), site, projects, _key(seed, name)))
    return table


def _key(seed: int, family: str) -> int:
    text = f"{seed}\0hold-out\0{family}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _sites(families: list[_Family], slides: int) -> list[_Site]:
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


def _anchors(sites: list[_Site], cover: Cover) -> list[_Family]:
    """The patients without whom the cover fails, one a site or project."""
    anchors: list[_Family] = []
    if cover.site:
        several = [site for site in sites if len(site.families) > 1]
        proportional = [site for site in several if site.target]
        more = sorted(
            (site for site in sites if not (site.target and len(site.families) > 1)),
            key=lambda site: (len(site.families) == 1, -site.slides, site.name),
        )
        if cover.sites > len(sites):
            raise UserError(f"--cover site={cover.sites}: the cohort has {len(sites)} sites")
        wanted = proportional + more[: max(0, cover.sites - len(proportional))]
        anchors += [site.families[0] for site in wanted]
    if cover.project:
        covered = frozenset[str]().union(*(family.projects for family in anchors))
        wanted_projects = {p for site in sites for f in site.families for p in f.projects}
        for project in sorted(wanted_projects):
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
    best = min(options)
    return next(site.families[best[4]] for site in sites if site.name == best[3])


def _by_priority(sites: list[_Site]) -> list[_Family]:
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


def _reach(families: list[_Family], slides: int) -> list[_Family]:
    """Families in order whose slides sum to `slides`, or as near as can be; never all of them."""
    counts = Counter(family.slides for family in families)
    left = _nearest(counts, slides)
    chosen = []
    for family in families:
        counts[family.slides] -= 1
        if family.slides <= left and _can_sum(counts, left - family.slides):
            chosen.append(family)
            left -= family.slides
    return chosen


def _nearest(counts: Counter[int], total: int) -> int:
    """The sum nearest to `total` that some of these sizes, not all, make; the smaller of two."""
    everything = sum(size * count for size, count in counts.items())
    most = min(total + max(counts, default=0), everything - 1)
    sums = _sums(counts, most)
    return min((s for s in range(most + 1) if sums >> s & 1), key=lambda s: (abs(s - total), s))


def _can_sum(counts: Counter[int], total: int) -> bool:
    if counts[1] >= total:
        return True
    return bool(_sums(counts, total) >> total & 1)


def _sums(counts: Counter[int], most: int) -> int:
    """Bit s is set where some of the sizes sum to s, for s up to `most`."""
    sums, mask = 1, (1 << (most + 1)) - 1
    for size, count in sorted(counts.items()):
        step = 1
        while count > 0:
            # 1, 2, 4, ... copies together make any number of copies.
            step = min(step, count)
            sums |= (sums << (size * step)) & mask
            count, step = count - step, step * 2
    return sums
