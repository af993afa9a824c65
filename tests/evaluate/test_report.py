import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluate_data import make_synthetic
from PIL import Image

from common.errors import UserError
from common.record import Record
from common.text import format_number
from evaluate.compare.measure import measure
from evaluate.compare.results import write_results
from evaluate.compare.sides import FeatureSide
from evaluate.generate.condition_source import SelectionConditions, Unconditional
from evaluate.metrics.metric import MetricSettings
from evaluate.report.command import report_command, write_report
from evaluate.report.config import ReportConfig
from evaluate.report.numbers import metric_rows
from evaluate.report.plots import running_median
from evaluate.report.run_curves import read_run
from pipeline.dataset import Dataset

_HOSTILE = "<script>alert('x')</script>&\"'"
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page holds: tags with attributes, text, and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [str(found[name]) for _, found in self.tags if name in found]


def write_run(path: Path) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    lines = [
        {
            "step": step,
            "vae/l1": 0.5 / (1 + step / 20) + 0.02 * rng.random(),
            "sit/denoise": 1.0 + 0.5 / (1 + step / 9) + 0.1 * rng.random(),
            "sit/align": -0.4 * step / 200,
            "vae/align": -0.2 * step / 200,
        }
        for step in range(200)
    ]
    log = "\n".join(json.dumps(line) for line in lines)
    (path / "metrics.jsonl").write_text(log + '\n{"step": 200, "vae/l')
    summary = {
        "steps": 200,
        "seconds": 12.5,
        "images_per_s": 128.0,
        "reconstruction": {
            "tiles": 64,
            "l1_untrained": 0.4321,
            "l1_trained": 0.1234,
            "psnr_untrained": 8.125,
            "psnr_trained": 17.5,
        },
        "encoder_record": {"encoder": "h0-mini", "weights": "random:0", "random_weights": True},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def make_overlay(dataset: Dataset, slide_id: str) -> None:
    image = np.full((300, 220, 3), 235, np.uint8)
    cv2.circle(image, (110, 150), 80, (180, 120, 200), -1)
    file = dataset.overlay_file(slide_id)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(cv2.imencode(".jpg", image)[1].tobytes())


@pytest.fixture
def report(evaluate_real: Callable[..., Dataset], tmp_path: Path) -> Callable[..., str]:
    """Measure and write a report; changes to the results come first. Returns the HTML."""

    def make(change: Callable[[dict], None] = lambda results: None, **options: bool) -> str:
        real = evaluate_real()
        make_overlay(real, "C-2")
        guidance = (
            Unconditional(20)
            if options.get("unconditional")
            else SelectionConditions.open_selection(real, "train", "h0-mini")
        )
        synthetic = make_synthetic(tmp_path / "syn", guidance)
        first = FeatureSide.open_selection(real.root, "train", "h0-mini", like=None)
        second = FeatureSide.open_selection(synthetic.root, "generated", "h0-mini", like=first)
        results = measure(first, second, settings=MetricSettings(draws=2, kid_subsets=2))
        change(results)
        write_results(tmp_path / "results.json", results)
        write_report(
            results_file=tmp_path / "results.json",
            run_dir=None if options.get("no_run") else write_run(tmp_path / "run"),
            real=real.root,
            generated=synthetic.root,
            out=tmp_path / "report.html",
            picture_file=tmp_path / "picture.png",
        )
        return (tmp_path / "report.html").read_text()

    return make


def test_the_page_holds_everything_it_shows(report: Callable[..., str]) -> None:
    html = report()
    page = Page(html)
    for address in page.attributes("src") + page.attributes("href"):
        assert address.startswith("data:")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    visible = re.sub(r"data:[^\"]*", "", html)
    assert "http" not in visible
    kinds = [address.split(";")[0] for address in page.attributes("src")]
    assert kinds.count("data:image/png") == 24  # twelve pairs
    assert kinds.count("data:image/jpeg") == 1  # the overlay
    assert kinds.count("data:image/svg+xml") == 4  # three panels and the histogram
    assert all(page.attributes("alt"))


def test_the_page_shows_the_numbers_and_the_run(report: Callable[..., str]) -> None:
    seen: dict = {}
    text = " ".join("".join(Page(report(seen.update)).text).split())
    distance = seen["metrics"]["frechet_distance"]
    for value in (distance["value"], distance["noise_floor"]):
        assert format_number(value) in text
    for words in ("0.4321", "0.1234", "17.5", "200 steps in 12.5 s", "Precision", "Coverage"):
        assert words in text
    assert "stripes" in text  # the model's sum


def test_random_weights_stand_at_the_top_in_red(report: Callable[..., str]) -> None:
    html = report()
    page = Page(html)
    dangers = [a for _, a in page.tags if "danger" in (a.get("class") or "").split()]
    assert len(dangers) == 2  # the encoder that measured and the one that was trained on
    assert html.index('class="warning danger"') < html.index("<h2>")
    assert "fewer than 1,000" in html
    assert re.search(r"--danger: #b3261e", html)
    assert re.search(r"\.danger \{[^}]*background: var\(--danger\)", html)


def test_without_random_weights_nothing_is_red(report: Callable[..., str]) -> None:
    def drop(results: dict) -> None:
        results["warnings"] = [w for w in results["warnings"] if "random" not in w["code"]]

    assert 'class="warning danger"' not in report(drop, no_run=True)


def test_what_others_named_is_escaped(report: Callable[..., str]) -> None:
    def change(results: dict) -> None:
        results["encoder"]["encoder"] = _HOSTILE
        results["real"]["dataset"] = _HOSTILE
        results["model_sha256"] = _HOSTILE
        results["sampler"]["solver"] = _HOSTILE
        results["warnings"][0]["message"] = _HOSTILE
        results["versions"]["torch"] = _HOSTILE

    html = report(change)
    assert "<script" not in html
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "".join(page.text).count(_HOSTILE) >= 5


def test_unconditional_tiles_are_not_shown_as_pairs(report: Callable[..., str]) -> None:
    html = report(unconditional=True, no_run=True)
    page = Page(html)
    assert "pair" not in page.attributes("class")
    assert page.attributes("alt").count("Real tile") == 12
    assert "without guidance" in html


def test_the_picture_is_small_and_shows_what_the_page_shows(
    report: Callable[..., str], tmp_path: Path
) -> None:
    report()
    data = (tmp_path / "picture.png").read_bytes()
    assert len(data) < 400_000
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert 700 < image.shape[1] < 1400
    assert image.std() > 10


def test_the_same_inputs_give_the_same_page(report: Callable[..., str], tmp_path: Path) -> None:
    first = report()
    for name in ("report.html", "picture.png"):
        (tmp_path / f"first-{name}").write_bytes((tmp_path / name).read_bytes())
    write_report(
        results_file=tmp_path / "results.json",
        run_dir=tmp_path / "run",
        real=tmp_path / "real",
        generated=tmp_path / "syn",
        out=tmp_path / "report.html",
        picture_file=tmp_path / "picture.png",
    )
    assert (tmp_path / "report.html").read_text() == first
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "first-picture.png").read_bytes()


@pytest.mark.full
def test_results_with_values_of_other_kinds_are_a_page_or_one_line(
    report: Callable[..., str], tmp_path: Path
) -> None:
    page, file = report(), tmp_path / "results.json"
    config = ReportConfig(
        results=file, dataset=tmp_path / "real", generated=tmp_path / "syn",
        out=tmp_path / "report.html",
    )  # fmt: skip
    sound, refused = json.loads(file.read_text()), []
    for key in sound.keys() - {"schema_version"}:
        results = sound | {key: {"a": 1} if isinstance(sound[key], dict) else {"a": "x"}}
        file.write_text(json.dumps(results))
        (tmp_path / "report.html").write_text(page)
        try:
            report_command(config)
        except UserError as error:
            refused.append(str(error))
            assert (tmp_path / "report.html").read_text() == page
    assert len(refused) > 2
    assert not any("\n" in line for line in refused)


def test_a_dataset_that_was_not_measured_is_refused(report: Callable[..., str]) -> None:
    def change(results: dict) -> None:
        results["real"]["selection_sha256"] = "0" * 64

    with pytest.raises(UserError, match="not the one that was measured"):
        report(change)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        read_run(tmp_path)


def test_a_torn_line_and_a_repeated_step_of_the_log_are_mended(tmp_path: Path) -> None:
    text = '{"step": 1, "a": 1, "b": 7}\n{"step": 1, "a": 2}\n{"st'
    (tmp_path / "metrics.jsonl").write_text(text)
    series = read_run(tmp_path).series
    for name, expected in (("a", 2.0), ("b", 7.0)):
        steps, values = series[name]
        assert (steps.tolist(), values.tolist()) == ([1.0], [expected])


def test_running_median_follows_a_line_and_drops_a_spike() -> None:
    values = np.arange(200.0)
    assert np.abs(running_median(values) - values).max() <= 2.5
    values[100] = 1e9
    assert running_median(values).max() < 300


def test_each_row_says_what_it_means(report: Callable[..., str]) -> None:
    seen: dict = {}
    report(seen.update)
    table = metric_rows(Record(seen))
    assert len(table) == 13
    assert all(len(row.meaning) > 40 for row in table)
