"""The QC page: its numbers against the files, its text against mischief, its use in a browser."""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, Browser
from report_data import replicate
from scipy.spatial.distance import jensenshannon

from common.errors import UserError
from common.escape import script_safe_json
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Run,
    Slide,
    claim_identity,
    commit_bytes,
    read_candidates,
    read_identity,
    read_journal,
    read_slides,
    write_slides,
)
from pipeline.report.data import code_words, round_short
from pipeline.report.distributions import make_histogram
from pipeline.report.facts import last_entries, read_facts, reason_kind
from pipeline.report.page import count_totals, selection_part
from pipeline.report.selections import compare_shares, list_shortfalls, read_selections
from pipeline.report.stages import stage_outcomes
from pipeline.report.write import write_report
from pipeline.selection.config import SelectConfig
from pipeline.selection.select import select
from pipeline.tissue.stage import tissue_fingerprint

SLIDE = "CMU-1-Small-Region"
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"alert(1)\">&'`"
PAGE_ROWS = 100


class Page(HTMLParser):
    """Tags with their attributes, and the data that the table is drawn from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(html)
        self.data = json.loads(self._json)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words.append(data)
        elif self._inside == "script" and self.tags[-1][1].get("id") == "data":
            self._json = data

    def column(self, name: str) -> list[Any]:
        """A field of every slide, coded or not."""
        if name in self.data["plain"]:
            return self.data["plain"][name]
        field = self.data["coded"][name]
        return [field["values"][code] for code in field["codes"]]

    def of(self, slide_id: str, name: str) -> Any:
        return self.column(name)[self.column("slide").index(slide_id)]


def page_of(dataset: Dataset) -> Page:
    write_report(dataset, workers=2)
    return Page((dataset.root / "report" / "index.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def many(tiled: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """1,000 slides with three selections and their report. Do not write to it."""
    dataset = replicate(tiled, tmp_path_factory.mktemp("many") / "cohort #1", 1000)
    select(dataset, SelectConfig("train"))
    select(dataset, SelectConfig("small", tiles=3000, stratify="project"))
    select(dataset, SelectConfig("reserve", pool="reserve"))
    write_report(dataset, workers=2)
    return dataset


@pytest.fixture(scope="module")
def many_page(many: Dataset) -> Page:
    return Page((many.root / "report" / "index.html").read_text("utf-8"))


def test_numbers_of_the_real_slide_are_those_of_its_files(own_tiled: Dataset) -> None:
    page = page_of(own_tiled)
    table = read_candidates(own_tiled, SLIDE)
    assert page.column("slide") == [SLIDE]
    assert page.of(SLIDE, "status") == "ok"
    assert page.of(SLIDE, "candidates") == table.num_rows
    (kept,) = (one["tiles"][0] for one in page.data["verdicts"] if one["name"] == "kept")
    assert kept == table.num_rows
    assert sum(one["tiles"][0] for one in page.data["verdicts"]) == page.of(SLIDE, "grid")
    mask = cv2.imread(str(own_tiled.mask_file(SLIDE)), cv2.IMREAD_UNCHANGED)
    um_per_px = 2220 * 0.499 / mask.shape[1]
    for value, one in enumerate(page.data["classes"], 1):
        area = (mask == value).sum() * um_per_px**2 / 1e6
        assert one["mm2"][0] == pytest.approx(area, rel=0.02, abs=1e-4), one["name"]
    selected = pq.read_table(own_tiled.selection_file("train")).num_rows
    assert page.data["selections"] == [{"name": "train", "tiles": [selected]}]
    for words in ("0.5 µm per pixel, ± 2.0%", "224 × 224 px (112 µm)", "classical-3", "png, area"):
        assert words in page.text


def test_the_line_of_an_encoders_record_is_no_stage_that_slides_wait_for(
    own_tiled: Dataset,
) -> None:
    with Run(own_tiled, "cache", {}) as run:
        for slide_id, scope in ((SLIDE, "224/e/cls"), ("-", "224/e/cls/encoder.json")):
            run.append([Entry(slide_id, "done", "f", scope=scope, start=0, stop=16)])
    found = stage_outcomes(read_facts(own_tiled), read_selections(own_tiled))
    (cached,) = [one for one in found if one.name.startswith("cache")]
    assert (cached.name, cached.done, cached.waiting) == ("cache 224/e/cls", 1, 0)


def test_every_kind_of_features_says_how_many_tiles_it_has(own_tiled: Dataset) -> None:
    """In the journal one kind alone has the count."""
    tiles = {"counts": {"tiles": 49}, "start": 0, "stop": 49, "scope": "224/e/cls"}
    tokens = {"start": 0, "stop": 49, "scope": "224/e/tokens-float16"}
    with Run(own_tiled, "cache", {}) as run:
        run.append(
            [Entry("CMU-1-Small-Region", "done", "a" * 32, **one) for one in (tiles, tokens)]
        )
    outcomes = stage_outcomes(read_facts(own_tiled), read_selections(own_tiled))
    cached = [one for one in outcomes if one.name.startswith("cache")]
    assert [one.result for one in cached] == ["49 tiles", "49 tiles"]


def test_totals_are_sums_over_the_files(many: Dataset, many_page: Page) -> None:
    files = {path.stem: pq.read_metadata(path).num_rows for path in
             (many.root / "candidates").glob("*.parquet")}  # fmt: skip
    found = dict(zip(many_page.column("slide"), many_page.column("candidates"), strict=True))
    assert {name: count for name, count in found.items() if count is not None} == files
    rows = read_slides(many)
    by_status = Counter(many_page.column("status"))
    assert by_status["failed"] == sum(one.status == "failed" for one in rows)
    waiting = {one.slide_id for one in rows if one.status == "ok"} - files.keys()
    black = {s for s, r in zip(many_page.column("slide"), many_page.column("reason"), strict=True)
             if "black" in r}  # fmt: skip
    assert by_status["waiting"] == len(waiting - black)
    sums = count_totals(read_facts(many))
    assert sums.candidates == sum(files.values())
    assert sums.by_status == {"ok": 0, "rejected": 0, "failed": 0, "waiting": 0} | by_status
    assert f"{sum(files.values()):,} candidate tiles" in many_page.text
    assert f"{len({one.site for one in rows})} sites" in many_page.text


def test_selected_tiles_are_counted_in_the_selections(many: Dataset, many_page: Page) -> None:
    assert [one["name"] for one in many_page.data["selections"]] == many.selection_names()
    for one in many_page.data["selections"]:
        column = pq.read_table(many.selection_file(one["name"]))["slide_id"]
        counts = Counter(column.to_pylist())
        assert dict(zip(many_page.column("slide"), one["tiles"], strict=True)) == {
            slide: counts[slide] for slide in many_page.column("slide")
        }


def test_divergence_is_that_of_an_independent_implementation(many: Dataset) -> None:
    facts = read_facts(many)
    (small,) = (one for one in read_selections(many) if one.name == "small")
    part = selection_part(facts, small)
    assert [plot.what for plot in part.plots] == ["project", "site"]
    for plot in part.plots:
        cohort: Counter[str] = Counter()
        picked: Counter[str] = Counter()
        for slide in read_slides(many):
            if many.candidates_file(slide.slide_id).exists():
                rows = pq.read_metadata(many.candidates_file(slide.slide_id)).num_rows
                cohort[getattr(slide, plot.what)] += rows
                picked[getattr(slide, plot.what)] += small.tiles_by_slide.get(slide.slide_id, 0)
        names = [name for name in cohort if cohort[name] or picked[name]]
        assert sorted(names) == sorted(plot.shares.names)
        distance = jensenshannon([cohort[n] for n in names], [picked[n] for n in names], base=2)
        assert plot.shares.divergence_bits == pytest.approx(distance**2, abs=1e-12)
    assert part.plots[1].shares.divergence_bits > 1e-4


def test_shares_lists_the_largest_group_first_and_keeps_text() -> None:
    found = compare_shares(["02", "NA", "", "NA", "x"], [5, 3, 1, 4, 0], [0, 1, 1, 0, 0])
    assert found.names == ("NA", "02", "")
    assert found.cohort.tolist() == [7, 5, 1]
    assert found.selected.tolist() == [1, 0, 1]


def test_a_plan_is_read_with_care() -> None:
    row = {"name": "AA", "slides": 2, "candidates": 10, "quota": 12.5, "selected": 9}
    near = {**row, "name": "BB", "selected": 12}
    for plan in ({}, {"strata": None}, {"strata": [1, {"name": "x"}, {**row, "quota": "many"}]}):
        assert list_shortfalls(plan) == []
    assert [one.name for one in list_shortfalls({"strata": [near, row, None]})] == ["AA"]


@pytest.mark.parametrize("median", [0.0, 0.25, 400.0])
def test_every_value_is_in_one_bin(median: float) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.lognormal(0, 1, 500) * median, np.full(20, median), [352.8]])
    found = make_histogram(values)
    assert found.counts.sum() + found.beyond == len(values)
    assert np.allclose(np.diff(found.edges), np.diff(found.edges)[0])
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        slack = 1e-9 * (high - low)
        assert count == ((values >= low - slack) & (values < high - slack)).sum()
    assert len(found.counts) <= 50


def test_like_reasons_meet() -> None:
    one = Slide("a-17", "/x/a-17.svs")
    other = Slide("b", "C:\\y\\b.svs")
    assert reason_kind("slide a-17.svs: cannot read at x=10, /x/a-17.svs is bad", one) == (
        reason_kind("slide b.svs: cannot read at x=9,999.5, C:\\y\\b.svs is bad", other)
    )


def test_the_page_is_the_same_again_and_for_any_number_of_workers(
    own_tiled: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(own_tiled.root, tmp_path / "twin")
    write_report(own_tiled, workers=1)
    files = sorted(path for path in (own_tiled.root / "report").rglob("*") if path.is_file())
    assert len(files) == 2
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    capsys.readouterr()
    write_report(own_tiled, workers=2)
    assert "nothing to redo" in capsys.readouterr().out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    write_report(Dataset(tmp_path / "twin"), workers=3)
    for path in files:
        twin = tmp_path / "twin" / path.relative_to(own_tiled.root)
        assert twin.read_bytes() == path.read_bytes()
    assert not (own_tiled.root / "report" / ".tmp").exists()


def test_small_pictures_follow_their_overlays(own_tiled: Dataset) -> None:
    write_report(own_tiled)
    thumb = own_tiled.root / "report" / "thumbs" / f"{SLIDE}.jpg"
    assert 8_000 < thumb.stat().st_size <= 20_000
    small = cv2.imread(str(thumb))
    assert max(small.shape) == 288
    assert small.shape[1] / small.shape[0] == pytest.approx(2220 / 2967, abs=0.01)
    before = thumb.stat().st_ino
    # Times say nothing: a dataset may have been copied, a clock wrong.
    for when in (0, time.time_ns() + 10**12):
        os.utime(own_tiled.overlay_file(SLIDE), ns=(when, when))
        write_report(own_tiled)
    assert thumb.stat().st_ino == before


def test_a_small_picture_never_shows_the_slide_that_was_there_before(own_tiled: Dataset) -> None:
    write_report(own_tiled)
    thumb = own_tiled.root / "report" / "thumbs" / f"{SLIDE}.jpg"
    old = cv2.imread(str(thumb))
    # The stage drew another overlay, and its file is older than the small picture.
    overlay = own_tiled.overlay_file(SLIDE)
    negative = cv2.imencode(".jpg", 255 - cv2.imread(str(overlay)))[1].tobytes()
    last = Ledger.read(own_tiled, "tissue")[""].by_slide[SLIDE][-1]
    with Run(own_tiled, "tissue", {}) as run:
        record = commit_bytes(own_tiled, run.run_id, overlay, negative)
        others = tuple(file for file in last.files if file.path != record.path)
        run.append([replace(last, files=(*others, record))])
    os.utime(overlay, ns=(0, 0))
    write_report(own_tiled)
    new = cv2.imread(str(thumb))
    assert abs(float(new.mean()) - (255 - float(old.mean()))) < 5
    ino = thumb.stat().st_ino
    write_report(own_tiled)
    assert thumb.stat().st_ino == ino


def test_a_damaged_overlay_costs_its_picture_only(own_tiled: Dataset, capsys: Any) -> None:
    overlay = own_tiled.overlay_file(SLIDE)
    overlay.write_bytes(bytes(overlay.stat().st_size))
    page = page_of(own_tiled)
    assert page.data["picture"] == [0]
    assert page.of(SLIDE, "candidates") > 0
    assert f"no small picture of {SLIDE}" in " ".join(capsys.readouterr().out.split())


def test_another_folder_still_leads_to_the_overlays(own_tiled: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "shared pages" / "qc"
    write_report(own_tiled, out)
    page = Page((out / "index.html").read_text("utf-8"))
    link = out / unquote(page.data["overlays"]) / f"{SLIDE}.jpg"
    assert link.resolve() == own_tiled.overlay_file(SLIDE).resolve()
    assert (out / "thumbs" / f"{SLIDE}.jpg").exists()
    assert not (own_tiled.root / "report").exists()


def test_a_slide_that_changed_waits_for_tissue(own_tiled: Dataset) -> None:
    (slide,) = read_slides(own_tiled)
    with Run(own_tiled, "scan", {}) as run:
        write_slides(own_tiled, run.run_id, [replace(slide, mtime_ns=slide.mtime_ns + 1)])
    page = page_of(own_tiled)
    assert page.of(SLIDE, "status") == "waiting"
    assert page.of(SLIDE, "candidates") is None
    assert page.data["picture"] == [0]


def test_what_was_imported_counts_as_it_does_for_select(own_tiled: Dataset) -> None:
    (slide,) = read_slides(own_tiled)
    (line,) = read_journal(own_tiled, "tissue")
    mark = tissue_fingerprint(slide, read_identity(own_tiled), "5ad0")
    with Run(own_tiled, "tissue", {}) as run:
        run.append([replace(line, fingerprint=mark, values={"source": "5ad0"})])
    page = page_of(own_tiled)
    assert (page.of(SLIDE, "status"), page.of(SLIDE, "candidates")) == (
        "ok", line.counts["candidate tiles"],
    )  # fmt: skip
    assert "imported" in page.of(SLIDE, "note")
    assert page.data["classes"][0]["mm2"] == [None]


def test_a_failure_stands_until_the_stage_succeeds(own_tiled: Dataset) -> None:
    lines = last_entries(Entry(SLIDE, outcome, "m") for outcome in ("failed", "done", "failed"))
    assert lines[""][SLIDE].outcome == "failed"
    with Run(own_tiled, "tile", {}) as run:
        run.append([Entry(SLIDE, "failed", "m", "the disk burnt down", scope="224")])
    page = page_of(own_tiled)
    assert (page.of(SLIDE, "status"), page.of(SLIDE, "stage")) == ("failed", "tile")
    assert "the disk burnt down" in page.text
    assert "tries failed slides again" in page.text
    with Run(own_tiled, "tile", {}) as run:
        run.append([Entry(SLIDE, "done", "m", scope="224", start=0, stop=16)])
    assert page_of(own_tiled).of(SLIDE, "status") == "ok"


def test_a_failure_without_a_scope_stands_until_any_scope_succeeds(own_tiled: Dataset) -> None:
    with Run(own_tiled, "cache", {}) as run:
        run.append([Entry(SLIDE, "failed", "m", "the disk burnt down")])
    assert page_of(own_tiled).of(SLIDE, "status") == "failed"
    with Run(own_tiled, "cache", {}) as run:
        run.append([Entry(SLIDE, "done", "m", scope="224/h0-mini/cls", start=0, stop=16)])
    page = page_of(own_tiled)
    assert page.of(SLIDE, "status") == "ok"
    assert "the disk burnt down" not in page.text
    with Run(own_tiled, "cache", {}) as run:
        run.append([Entry(SLIDE, "failed", "m", "it burnt again", scope="224/h0-mini/cls")])
    assert page_of(own_tiled).of(SLIDE, "status") == "failed"


@pytest.fixture
def hostile(tmp_path: Path) -> Dataset:
    """Slides whose every word is an attack."""
    dataset = Dataset(tmp_path / "hostile")
    identity = {"mpp": 0.5, "mpp_tolerance": 0.02, "tile_px": 224, "grid": HOSTILE, "seed": 0}
    claim_identity(dataset, identity, stage="scan", versions={})
    slide = Slide(
        "hostile", path=HOSTILE, status="failed", reason=HOSTILE, reader=HOSTILE, mpp=None,
        mpp_source=HOSTILE, patient=HOSTILE, site=HOSTILE, project=HOSTILE,
    )  # fmt: skip
    with Run(dataset, "scan", {}) as run:
        write_slides(dataset, run.run_id, [slide])
        run.append([Entry("../../x", "done", "m", HOSTILE)])
    return dataset


def test_what_others_named_is_text(hostile: Dataset) -> None:
    page = page_of(hostile)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, given in page.tags for name in given if name.startswith("on")]
    assert page.of("hostile", "reason") == HOSTILE
    assert "document.title='owned'" in page.text
    assert not (hostile.root.parent / "x.jpg").exists()


def test_an_id_that_is_a_way_out_of_the_folder_is_refused(hostile: Dataset) -> None:
    with Run(hostile, "scan", {}) as run:
        write_slides(hostile, run.run_id, [Slide("../../x", path="", reason="")])
    with pytest.raises(UserError, match="is not usable"):
        write_report(hostile)


def test_script_data_cannot_end_its_element() -> None:
    said = {"a": "</script><!--<script>\u2028&", "b": [1, None]}
    text = script_safe_json(said)
    assert not {"<", ">", "&", "\u2028"} & set(text)
    assert json.loads(text) == said
    assert code_words(["b", "a", "b"]) == {"values": ["a", "b"], "codes": [1, 0, 1]}
    assert [round_short(value) for value in (None, float("inf"), 3.0, 0.22817505590)] == [
        None, None, 3, 0.2281751,
    ]  # fmt: skip


def test_a_dataset_of_generated_tiles_is_refused(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "made")
    claim_identity(dataset, {"tile_px": 224}, stage="generate", versions={})
    with Run(dataset, "tile", {}) as run:
        write_slides(dataset, run.run_id, [Slide("gen-00000", path="", reader="generated")])
    with pytest.raises(UserError, match="evaluate report"):
        write_report(dataset)


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: the page is not looked at in a browser")
    with Browser(tmp_path_factory.mktemp("chromium")) as one:
        yield one


def address(dataset: Dataset, **state: str) -> str:
    hash_ = "&".join(f"{key}={quote(value, safe='')}" for key, value in state.items())
    return (dataset.root / "report" / "index.html").as_uri() + (f"#{hash_}" if hash_ else "")


def shown(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('#rows .id')].map(e => e.textContent)")


def test_the_page_loads_without_an_error_and_with_few_rows(browser: Browser, many: Dataset) -> None:
    browser.errors.clear()
    browser.open(address(many))
    assert len(shown(browser)) == PAGE_ROWS
    assert browser.run("document.getElementsByTagName('*').length") < 9000
    assert browser.run("document.title").startswith("cohort #1")
    browser.run("document.getElementById('sheet').scrollIntoView()")
    browser.wait("document.querySelector('#sheets img').naturalWidth > 0")
    for width in (1280, 400):
        browser.resize(width, 900)
        assert browser.run("document.documentElement.scrollWidth") <= width
    browser.resize(1280, 900, dark=True)
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", colour)[:3]) < 60
    browser.resize(1280, 900)
    assert browser.errors == []


def test_sorting_and_filters_come_from_the_address(
    browser: Browser, many: Dataset, many_page: Page
) -> None:
    slides, counts = many_page.column("slide"), many_page.column("candidates")
    best = sorted((-(count or 0), slide) for slide, count in zip(slides, counts, strict=True))
    browser.open(address(many, sort="-candidates"))
    assert shown(browser) == [slide for _, slide in best[:PAGE_ROWS]]
    browser.open(address(many, sort="-candidates", page="2"))
    assert shown(browser) == [slide for _, slide in best[PAGE_ROWS : 2 * PAGE_ROWS]]
    browser.open(address(many, status="rejected"))
    rejected = [s for s, status in zip(slides, many_page.column("status"), strict=True)
                if status == "rejected"]  # fmt: skip
    assert shown(browser) == rejected
    said = browser.run("document.getElementById('shown').textContent")
    assert said == f"{len(rejected)} of 1,000 slides"
    site, project = many_page.of(slides[7], "site"), many_page.of(slides[7], "project")
    browser.open(address(many, site=site, project=project, q=slides[7][:12].lower()))
    assert shown(browser) == [slides[7]]
    kind = next(kind for kind in many_page.column("kind") if "black" in kind)
    browser.open(address(many, kind=kind))
    assert len(shown(browser)) == many_page.column("kind").count(kind)


def test_controls_change_rows_and_address(browser: Browser, many: Dataset) -> None:
    browser.open(address(many))
    browser.run("document.querySelector('[data-sort=tissue]').focus()")
    browser.run("document.activeElement.click()")
    assert browser.run("document.activeElement.dataset.sort") == "tissue"
    assert browser.run("location.hash") == "#sort=-tissue"
    assert browser.run("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == (
        "descending"
    )
    browser.run(
        "(() => { const f = document.getElementById('filters').elements; f.status.value ="
        " '=failed'; f.status.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    assert browser.run("location.hash") == "#status=failed&sort=-tissue"
    rows = shown(browser)
    browser.open(browser.run("location.href"))
    assert shown(browser) == rows
    browser.run("document.getElementById('slides').scrollIntoView()")
    place = browser.run("scrollY")
    browser.run("document.querySelector('#filters [type=reset]').click()")
    assert browser.run("location.hash") == ""
    assert browser.run("scrollY") == place > 0
    assert len(shown(browser)) == PAGE_ROWS


def test_a_bar_leads_to_as_many_slides(browser: Browser, many: Dataset) -> None:
    browser.open(address(many))
    wrong = browser.run(
        """[...document.querySelectorAll('#distributions .chart')].flatMap(chart =>
            [...chart.querySelectorAll('a')].reverse().filter((_, i) => i % 4 < 2)
        ).map(bar => {
            bar.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}));
            const rows = document.getElementById('shown').textContent.split(' of ')[0];
            return [rows, bar.getAttribute('aria-label')];
        }).filter(([rows, label]) => label.split(' ')[0] !== rows)"""
    )
    assert wrong == []


def test_the_viewer_walks_by_keys(browser: Browser, many: Dataset) -> None:
    browser.errors.clear()
    browser.open(address(many, sort="-candidates", status="ok"))
    first, second = shown(browser)[:2]
    browser.run("document.querySelector('#rows .shot').click()")
    title = "document.getElementById('viewer-title').textContent"
    assert browser.run(title) == first
    browser.wait("document.querySelector('#viewer-picture img').naturalWidth > 100")
    browser.key("ArrowRight")
    assert browser.run(title) == second
    assert f"slide={second}" in unquote(browser.run("location.hash"))
    facts = browser.run("document.getElementById('viewer-facts').textContent")
    assert "Grid tiles" in facts
    assert "kept" in facts
    browser.key("ArrowLeft")
    assert browser.run(title) == first
    browser.key("Escape")
    browser.wait("!document.getElementById('viewer').open")
    browser.wait("!location.hash.includes('slide=')")
    browser.open(address(many, slide=second))
    assert browser.run(title) == second
    assert browser.errors == []


def test_hostile_words_stay_words_in_a_browser(browser: Browser, hostile: Dataset) -> None:
    write_report(hostile)
    browser.errors.clear()
    browser.open(address(hostile, slide="hostile", sort="reason"))
    assert browser.run("document.title") != "owned"
    assert browser.run("document.querySelector('.reason-full').textContent") == HOSTILE
    assert browser.run("document.querySelector('#rows .reason').textContent") == HOSTILE
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.querySelector('#rows .absent').textContent") == "no picture"
    assert browser.errors == []
