"""Data runs no code and leaves no folder: each way in is tried.

Pages that escape what others named are tried in test_qc_report and evaluate's test_report, weights
that would run code in model's test_weights; damaged files in test_fuzz.
"""

import ast
import csv
import io
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from evaluate.generators.released import load_pipeline
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Run,
    Slide,
    TileStore,
    make_selection,
    read_journal,
    read_selection,
    safe_slide_id,
    write_selection,
)
from pipeline.dataset.layout import ShardName, check_slide_id, is_inside
from pipeline.dataset.tiles.png_tar import TarShard
from pipeline.slides.config import StageIn
from pipeline.slides.entries import find_slides
from pipeline.slides.staging import StageInError, local_slide

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("pipeline", "model", "train", "evaluate")
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load",
    "pickle.loads", "marshal.loads", "shelve.open", "dill.load", "joblib.load", "runpy.run_path",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "tarfile.open", "shutil.unpack_archive",
    "pd.read_pickle", "torch.jit.load", "torch.hub.load",
}  # fmt: skip
ALLOWED = {
    ("common/plain_yaml.py", "yaml.load"),  # with a SafeLoader
}


def calls() -> list[tuple[str, ast.Call]]:
    return [
        (path.relative_to(ROOT).as_posix(), node)
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_nothing_that_runs_code_from_data_is_called() -> None:
    wrong = []
    for path, call in calls():
        name = ast.unparse(call.func)
        if name in RUNS_CODE and (path, name) not in ALLOWED:
            wrong.append(f"{path}:{call.lineno} {name}")
        for keyword in call.keywords:
            value = ast.unparse(keyword.value)
            if (keyword.arg, value) in {
                ("shell", "True"), ("allow_pickle", "True"), ("trust_remote_code", "True"),
                ("weights_only", "False"), ("autoescape", "False"),
            }:  # fmt: skip
                wrong.append(f"{path}:{call.lineno} {keyword.arg}={value}")
        if name.endswith("Environment") and "autoescape" not in {k.arg for k in call.keywords}:
            wrong.append(f"{path}:{call.lineno} a page without autoescape")
    assert not wrong


def test_code_of_a_model_runs_only_when_it_is_asked_for(tmp_path: Path) -> None:
    import torch

    mark, model = tmp_path / "owned", tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": ["pipeline", "Evil"]}')
    (model / "pipeline.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for custom in (None, str(model / "pipeline.py")):
        with pytest.raises(UserError):
            load_pipeline(
                str(model), custom_pipeline=custom, trust_remote_code=False, dtype="float32",
                device=torch.device("cpu"),
            )  # fmt: skip
    assert not mark.exists()


def test_no_command_trusts_code_unasked() -> None:
    from evaluate.__main__ import make_parser

    options = make_parser().parse_args(
        ["generate", "--model", "m", "--guidance", "g", "--out", "o"]
    )
    assert options.trust_remote_code is False


LEAVING = [
    "../x",
    "..",
    ".",
    "a/b",
    "/etc/passwd",
    "a\\..\\b/c",
    "x\n",
    "x\0",
    "",
    "-rf",
    ".x",
    "x" * 300,
]


@pytest.mark.parametrize("slide_id", LEAVING)
def test_no_slide_id_becomes_another_folders_file(slide_id: str, tmp_path: Path) -> None:
    dataset = Dataset(tmp_path)
    for path_of in (dataset.mask_file, dataset.overlay_file, dataset.candidates_file):
        with pytest.raises(UserError, match="not usable"):
            path_of(slide_id)
    with pytest.raises(UserError, match="not usable"):
        str(ShardName(slide_id, 0, 16, "tar"))
    with pytest.raises(UserError, match="not usable"):
        dataset.selection_file(slide_id)
    assert check_slide_id(safe_slide_id(slide_id)) == safe_slide_id(slide_id)


def test_long_names_stay_apart() -> None:
    one, other = safe_slide_id("x" * 300 + "1"), safe_slide_id("x" * 300 + "2")
    assert one != other
    assert len(f"{one}.00000000-00000000.parquet") < 255


def test_a_selection_of_others_names_no_other_folder(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path)
    ranks = {"../../x": np.arange(3, dtype=np.int32)}
    write_selection(dataset, "r", make_selection("evil", ranks, {}))
    with pytest.raises(UserError, match="not usable"):
        read_selection(dataset, "evil")


def slides_csv(folder: Path, row: dict[str, str]) -> Path:
    path = folder / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"path": "../secret.svs"},
        {"path": "a/../../secret.svs"},
        {"path": "-o/etc/cron.d/x"},
        {"path": "s3://b/x.svs\n--delete"},
        {"path": "x.svs", "slide_id": "../../x"},
        {"id": "..", "filename": "x.svs", "md5": "", "size": "1"},
        {"id": "u", "filename": "../x.svs", "md5": "", "size": "1"},
        {"id": "u", "filename": "..", "md5": "", "size": "1"},
        {"id": "--config=x", "filename": "x.svs", "md5": "", "size": "1"},
    ],
)
def test_a_table_names_nothing_outside_its_folder(row: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"table\.csv, line 2|not usable"):
        find_slides([str(slides_csv(tmp_path, row))])


def test_tables_of_tiles_stay_below_their_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    table = slides_csv(inside, {"path": "../secret.png", "slide": "s"})
    options = ["--dataset", str(tmp_path / "d"), "--mpp", "0.5", "--workers", "1"]
    with pytest.raises(UserError, match="leaves the table's folder"):
        main(["import", "tiles", str(table), *options])


@pytest.mark.parametrize("uri", ["s3://b/..", "s3://b/.", "s3://b/../", "s3://.."])
def test_a_fetched_slide_lies_in_its_own_folder(uri: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    stage_in = StageIn("cp /dev/null {dest}", str(scratch), retries=0)
    slide = Slide("s", uri)
    with local_slide(slide, stage_in, tmp_path) as path:
        assert path.name == "s"
        assert scratch in path.parents
    assert list(scratch.iterdir()) == []


def test_a_stage_in_command_is_no_shells(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    stage_in = StageIn("cp {uri} {dest}", str(tmp_path / "scratch"), retries=0)
    slide = Slide("s", f"$(touch {mark}); `touch {mark}` && touch {mark}")
    with pytest.raises(StageInError), local_slide(slide, stage_in, tmp_path):
        pass
    assert not mark.exists()


def hostile_tar(path: Path, name: str, **attributes: object) -> None:
    png = b"x" * 100
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(png)
        for key, value in attributes.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(png))
    path.with_suffix(".idx").write_text(f"v1.2 1\npng 512 {len(png)} {name}\n")


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/tmp/evil.png", "t/00000000.png", "s/../00000000.png",
             "s/00000001.png", "s/0.png", "s/00000000.sh", "s"],
)  # fmt: skip
def test_a_tars_members_are_its_slides_tiles_and_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "s.0-1.tar"
    hostile_tar(path, name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="verify"):
        TarShard.open(path).read_block(0)
    assert sorted(tmp_path.rglob("*")) == before
    hostile_tar(path, "s/00000000.png")
    assert list(TarShard.open(path).read_block(0)) == [0]


@pytest.mark.parametrize("path", ["../x.tar", "/x.tar", "tiles/../../x.tar", "a//b", "", "a\0b"])
def test_a_journal_names_nothing_outside_the_dataset(path: str, tmp_path: Path) -> None:
    assert not is_inside(path)
    dataset = Dataset(tmp_path)
    record = FileRecord(path, 1, "0")
    with Run(dataset, "tile", {}) as run:
        run.append([Entry("s", "done", "f", scope="224", start=0, stop=16, files=(record,))])
    assert read_journal(dataset, "tile") == []
    assert TileStore(dataset, 224).slide_ids() == []
    assert len(read_journal(dataset, "tile", outside=True)) == 1, "verify reports it"


HOSTILE = "</td><script>document.title='owned'</script><img src=x onerror=alert(1)>&'\""


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_cohorts_page_escapes_what_its_list_names(tmp_path: Path) -> None:
    table = tmp_path / f"cohort{HOSTILE.replace('/', '')}.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient", "site", "project", "candidates"])
        for number in range(12):
            hostile = f"{HOSTILE}{number % 3}"
            writer.writerow([f"s{number}", f"{HOSTILE}{number}", hostile, hostile, 5000])
    options = ["--train", "100", "--val-tiles", "20", "--guidance", "20", "--hold-out", "3"]
    assert main(["plan-cohort", str(table), "--out", str(tmp_path / "plan"), *options]) == 0
    page = (tmp_path / "plan" / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert "script" not in {tag for tag, _ in tags.found}
    assert not [name for _, given in tags.found for name in given if name.startswith("on")]
    assert "document.title=" in page, "the name is there, as text"
