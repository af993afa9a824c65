"""A slide is its bytes, not its name: ids, moved and renamed files, and what is passed over."""

import os
import shutil
from itertools import permutations
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset as DicomDataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import Dataset, Entry, Run, Slide, claim_identity, read_slides
from pipeline.run.summary import Summary
from pipeline.slides.config import IN_PLACE, ScanConfig
from pipeline.slides.entries import SlideEntry, find_slides, slide_id_of
from pipeline.slides.identity import OtherFileError, sample_slide, slide_files
from pipeline.slides.scan import ScanStage, record_slides, scan_slide, slide_values
from pipeline.slides.search import FolderSearch
from pipeline.slides.staging import StageInError, local_slide

SLIDE = Path(__file__).resolve().parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"
WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"
CT = "1.2.840.10008.5.1.4.1.1.2"
PX = 512


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """uint8 [1024, 1024, 3] of the committed slide's tissue, 0.499 µm per px."""
    with tifffile.TiffFile(SLIDE) as slide:
        return slide.pages[0].asarray()[1000:2024, 600:1624]


@pytest.fixture
def write(pixels):
    """Write a slide of 512 px at 0.5 mpp; another `shift` is another part of the tissue.

    Uncompressed ones are all of one size in bytes.
    """

    def write_slide(path: Path, shift: int = 0, compression: str | None = "jpeg") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(
            path, pixels[shift : shift + PX, :PX], photometric="rgb", compression=compression,
            tile=(256, 256), metadata=None, resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )  # fmt: skip
        return path

    return write_slide


def write_dicom(path: Path, series: str, image=None, kind: str = "VOLUME", **tags: str) -> Path:
    """A DICOM file of a series; without an image only its head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = DicomDataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = tags.pop("sop_class", WSI)
    uid = pydicom.uid.generate_uid(entropy_srcs=[series, path.name])
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid
    data.SeriesInstanceUID = data.FrameOfReferenceUID = data.StudyInstanceUID = series
    data.Modality, data.PatientID, data.PatientName = "SM", "anonymous", "anonymous"
    data.ImageType = ["ORIGINAL", "PRIMARY", kind, "NONE"]
    for name, value in tags.items():
        setattr(data, name, value)
    if image is not None:
        _add_pixels(data, image)
    data.save_as(path, enforce_file_format=True)
    return path


def _add_pixels(data: DicomDataset, image: np.ndarray) -> None:
    side = image.shape[0]
    data.TotalPixelMatrixColumns = data.TotalPixelMatrixRows = side
    data.Rows = data.Columns = 256
    data.NumberOfFrames, data.InstanceNumber = (side // 256) ** 2, 1
    data.DimensionOrganizationType, data.SamplesPerPixel = "TILED_FULL", 3
    data.PlanarConfiguration, data.PhotometricInterpretation = 0, "YBR_FULL_422"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.LossyImageCompression = 7, 0, "01"
    data.ImagedVolumeWidth = data.ImagedVolumeHeight = side * 0.5 / 1000
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    measures, shared, optics = DicomDataset(), DicomDataset(), DicomDataset()
    measures.PixelSpacing, measures.SliceThickness = [0.0005, 0.0005], 0.001
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    optics.OpticalPathIdentifier, optics.ObjectiveLensPower = "1", "20"
    data.OpticalPathSequence = [optics]
    tiles = [
        imagecodecs.jpeg8_encode(
            np.ascontiguousarray(image[y : y + 256, x : x + 256]), level=92, subsampling="422"
        )
        for y in range(0, side, 256)
        for x in range(0, side, 256)
    ]
    data.PixelData = encapsulate(tiles)
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True


def scan_into(dataset: Dataset, *inputs: object, **options: object) -> dict[str, Slide]:
    """Scan without workers; the dataset's slides."""
    config = ScanConfig(tuple(map(str, inputs)), **options)  # type: ignore[arg-type]
    stage = ScanStage(dataset, config)
    with Run(dataset, "scan", {}) as run:
        for source in stage.sources:
            fingerprint = stage.item_fingerprint(source)
            run.append(scan_slide(source, config, fingerprint, str(dataset.root / ".tmp")))
        record_slides(dataset, run, Summary("scan"))
    return {slide.slide_id: slide for slide in read_slides(dataset)}


def outcome_of(slides: dict[str, Slide]) -> dict[str, tuple[str, str]]:
    return {k: (s.status, str(Path(s.path).parent.name)) for k, s in slides.items()}


# One id, one slide -----------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["jpeg", None], ids=["other sizes", "one size"])
@pytest.mark.parametrize("is_gone", [False, True], ids=["both there", "first gone"])
def test_a_second_scan_never_replaces_a_slide_of_the_same_name(
    tmp_path, write, compression, is_gone
):
    dataset = Dataset(tmp_path / "d")
    first = write(tmp_path / "batch1" / "1.tif", 0, compression)
    second = write(tmp_path / "batch2" / "1.tif", 300, compression)
    write(tmp_path / "batch2" / "2.tif", 400, compression)
    # Archives and mirrors give all files one time.
    for path in tmp_path.rglob("*.tif"):
        os.utime(path, ns=(10**18, 10**18))
    before = scan_into(dataset, tmp_path / "batch1")["1"]
    if is_gone:
        first.unlink()
    slides = scan_into(dataset, tmp_path / "batch2")
    assert slides["1"] == before
    (refused,) = [slide for slide in slides.values() if slide.status == "failed"]
    assert refused.path == str(second)
    for words in (str(first), str(second), "--id-from path", "--replace"):
        assert words in refused.reason
    assert slides["2"].status == "ok"
    # Again in one go, and again alone: the same.
    again = scan_into(dataset, *sorted(tmp_path.glob("batch*")))
    assert again["1"] == before
    assert scan_into(dataset, second)["1"] == before


def test_the_second_slide_is_taken_under_an_id_of_its_own(tmp_path, write):
    dataset = Dataset(tmp_path / "d")
    for batch, shift in (("batch1", 0), ("batch2", 300)):
        write(tmp_path / "in" / batch / "1.tif", shift)
    scan_into(dataset, tmp_path / "in" / "batch1")
    slides = scan_into(dataset, tmp_path / "in")
    assert sorted(s.status for s in slides.values()) == ["failed", "ok"]
    slides = scan_into(dataset, tmp_path / "in", id_from="path")
    assert outcome_of(slides) == {"1": ("ok", "batch1"), "batch2__1": ("ok", "batch2")}
    table = tmp_path / "t.csv"
    table.write_text("path,slide_id\nin/batch2/1.tif,1\n")
    with_table = scan_into(dataset, table)
    assert outcome_of(with_table)["1"] == ("ok", "batch1"), "a table's ids replace nothing either"


def test_a_slide_keeps_the_id_and_patient_that_a_table_gave_it(tmp_path, write):
    dataset = Dataset(tmp_path / "d")
    write(tmp_path / "in" / "1.tif")
    table = tmp_path / "t.csv"
    table.write_text("path,slide_id,patient,mpp,md5\nin/1.tif,S,P1,0.499,\n")
    before = scan_into(dataset, table)
    assert list(before) == ["S"]
    for id_from in ("stem", "path"):
        after = scan_into(dataset, tmp_path / "in", id_from=id_from)
        assert after == before


def test_replace_says_that_a_file_is_the_new_scan_of_the_slide(tmp_path, write):
    dataset = Dataset(tmp_path / "d")
    write(tmp_path / "old" / "1.tif", 0)
    before = scan_into(dataset, tmp_path / "old")["1"]
    write(tmp_path / "new" / "1.tif", 300)
    slides = scan_into(dataset, tmp_path / "new", replace=True)
    assert outcome_of(slides) == {"1": ("ok", "new")}
    assert slides["1"].content_key != before.content_key


@pytest.mark.parametrize("copy", [shutil.move, shutil.copy, shutil.copy2])
def test_a_moved_slide_is_the_same_slide(tmp_path, write, copy):
    dataset = Dataset(tmp_path / "d")
    before = scan_into(dataset, write(tmp_path / "a" / "1.tif"))["1"]
    (tmp_path / "b").mkdir()
    copy(before.path, tmp_path / "b" / "1.tif")
    shutil.rmtree(tmp_path / "a")
    slides = scan_into(dataset, tmp_path / "b")
    assert outcome_of(slides) == {"1": ("ok", "b")}
    assert slides["1"].sampled_sha256 == before.sampled_sha256
    if copy is not shutil.copy:
        assert slides["1"].content_key == before.content_key, "nothing is tiled again"


def test_a_slide_that_was_fetched_again_keeps_its_name(tmp_path, write):
    dataset = Dataset(tmp_path / "d")
    path = tmp_path / "a" / "1.tif"
    path.parent.mkdir()
    path.write_bytes(b"garbage" * 99)
    assert scan_into(dataset, path)["1"].status == "failed"
    write(path, 300)
    assert outcome_of(scan_into(dataset, path)) == {"1": ("ok", "a")}
    # And one that never could be read makes way once its file is gone.
    broken = tmp_path / "b" / "2.tif"
    broken.parent.mkdir()
    broken.write_bytes(b"garbage" * 99)
    assert scan_into(dataset, broken)["2"].status == "failed"
    whole = write(tmp_path / "c" / "2.tif", 0)
    assert outcome_of(scan_into(dataset, whole))["2"] == ("failed", "b")
    broken.unlink()
    assert outcome_of(scan_into(dataset, whole))["2"] == ("ok", "c")


def test_a_row_of_an_earlier_release_is_recognised_without_samples(tmp_path, write, monkeypatch):
    dataset = Dataset(tmp_path / "d")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.slides.scan.sample_slide", lambda *_: "")
        scan_into(dataset, write(tmp_path / "a" / "1.tif", 0, None))
    write(tmp_path / "b" / "1.tif", 300, None)
    assert outcome_of(scan_into(dataset, tmp_path / "b"))["1"] == ("ok", "a")
    shutil.rmtree(tmp_path / "b")
    shutil.copy(tmp_path / "a" / "1.tif", (tmp_path / "c.tif").with_name("1.tif"))
    assert outcome_of(scan_into(dataset, tmp_path / "1.tif"))["1"] == ("ok", tmp_path.name)


def test_staged_slides_are_told_apart_by_their_sums(tmp_path, write):
    dataset = Dataset(tmp_path / "d")
    table = tmp_path / "t.csv"

    def refused(uri: str, md5: str) -> bool:
        table.write_text(f"path,md5,bytes\n{uri},{md5},77\n")
        (entry,) = ScanStage(dataset, ScanConfig((str(table),))).sources
        return bool(entry.taken_by)

    row = Slide("1", "s3://a/x/1.tif", bytes=77, md5="ab")
    with Run(dataset, "scan", {}) as run:
        run.append([Entry("1", "done", "", values=slide_values(row))])
    assert not refused("s3://a/x/1.tif", "cd"), "the same address"
    assert not refused("s3://b/1.tif", "ab"), "moved"
    assert refused("s3://b/1.tif", "cd")
    assert refused("s3://b/1.tif", ""), "where nothing says that it is the same"


names = st.sampled_from(["1.tif", "1.svs", "2.tif", "a b.tif", "a_b.tif", "._1.tif", "切.tif"])
places = st.sampled_from(["", "x", "y", "x/z", "x__z", ".hidden", "y/._d"])


@given(st.sets(st.tuples(places, names), min_size=1), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_no_two_slides_share_an_id_in_any_order(tmp_path_factory, files, random):
    root = tmp_path_factory.mktemp("tree")
    paths = [root / place / name for place, name in sorted(files)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shuffled = random.sample(paths, len(paths))
    for id_from in ("stem", "path"):
        entries = find_slides(map(str, paths), id_from)
        assert entries == find_slides(map(str, shuffled), id_from)
        assert sorted(entry.path for entry in entries) == sorted(paths), "each path once"
        assert len({entry.slide_id for entry in entries}) == len(entries)
        # Only what is named is taken as it is: a search passes over hidden things.
        searched = find_slides([str(root)], id_from)
        assert {e.path for e in searched} == {
            p for p in paths if not any(q.startswith(".") for q in p.relative_to(root).parts)
        }
        assert not any(e.slide_id == "1" and e.path.name.startswith("._") for e in entries)
    by_path = [e for e in find_slides([str(root)], "path") if e.taken_by]
    assert all(e.path.with_suffix("") == Path(e.taken_by).with_suffix("") for e in by_path)


def test_ids_from_paths(tmp_path):
    for text in ("in/siteA/slide1.svs", "in/siteB/slide1.svs", "in/slide1.ome.tif"):
        (tmp_path / text).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / text).touch()
    (tmp_path / "t.csv").write_text("path\nin/siteA/slide1.svs\n")
    (tmp_path / "ids.csv").write_text("path,slide_id\nin/siteA/slide1.svs,S\n")

    def ids(*inputs: str, id_from: str = "path") -> list[str]:
        return [e.slide_id for e in find_slides([f"{tmp_path}/{i}" for i in inputs], id_from)]

    assert ids("in") == ["siteA__slide1", "siteB__slide1", "slide1"]
    assert ids("in/siteA") == ["slide1"]
    assert ids("in/site*") == ids("in/siteA", "in/siteB") == ["siteA__slide1", "siteB__slide1"]
    assert ids("in/*/*.svs") == ["siteA__slide1", "siteB__slide1"]
    assert ids("in/siteA/slide1.svs") == ["siteA__slide1"]
    assert ids("t.csv") == ["in__siteA__slide1"]
    assert ids("ids.csv") == ids("ids.csv", id_from="csv") == ["S"]
    assert ids("in/siteA", "ids.csv", id_from="csv") == ["S"]
    with pytest.raises(UserError, match=r"siteB/slide1\.svs: no table has a slide_id"):
        ids("in/siteB", "ids.csv", id_from="csv")


@pytest.mark.full
def test_a_selection_is_never_cut_from_another_file(tmp_path, write, capsys):
    root, slides = tmp_path / "d", tmp_path / "slides"
    write(slides / "1.tif", 0)

    def stage(name: str, *more: str) -> int:
        return main([name, "--dataset", str(root), *more])

    def scan_again() -> None:
        scan_into(Dataset(root), slides / "1.tif")
        assert stage("tissue", "--workers", "1") == 0

    scan_into(Dataset(root), slides / "1.tif")
    claim_identity(Dataset(root), ScanConfig(()).identity(), stage="scan", versions={})
    assert stage("tissue", "--workers", "1") == 0
    assert stage("select", "--name", "train") == 0
    # The same image at another time is the same slide: its selection is as good as before.
    os.utime(slides / "1.tif")
    scan_again()
    assert stage("tile", "--workers", "1") == 0
    write(slides / "1.tif", 300)
    capsys.readouterr()
    scan_again()
    assert stage("tile", "--workers", "1") == 1
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "'train' was drawn from another file" in text
    assert stage("select", "--name", "train") == 0
    assert stage("tile", "--workers", "1") == 0


# DICOM: one series, one slide ------------------------------------------------------------------


def test_dicom_slides_in_one_folder_are_all_taken(tmp_path, pixels, write):
    folder = tmp_path / "export"
    for n in range(3):
        image = pixels[170 * n : 170 * n + PX, :PX]
        write_dicom(folder / f"s{n}_0.dcm", f"1.2.{n}", image, ContainerIdentifier="c")
    write(folder / "other.tif", 100)
    slides = scan_into(Dataset(tmp_path / "d"), folder)
    assert [s.status for s in slides.values()] == ["ok"] * 4
    assert len({s.sampled_sha256 for s in slides.values()}) == 4
    dicom = [s for s in slides.values() if s.path.endswith(".dcm")]
    assert [Path(s.path).name for s in sorted(dicom, key=lambda s: s.path)] == [
        "s0_0.dcm", "s1_0.dcm", "s2_0.dcm",
    ]  # fmt: skip
    assert all(s.bytes == Path(s.path).stat().st_size for s in dicom)
    assert all(s.slide_id.startswith("export.") for s in dicom)


def test_a_folder_of_one_series_stays_the_slide_when_others_come(tmp_path, pixels):
    dataset, folder = Dataset(tmp_path / "d"), tmp_path / "case"
    write_dicom(folder / "m.dcm", "1.2.1", pixels[:PX, :PX], ContainerIdentifier="A")
    before = scan_into(dataset, folder)
    assert {k: s.path for k, s in before.items()} == {"case": str(folder)}
    write_dicom(folder / "a.dcm", "1.2.2", pixels[300 : 300 + PX, :PX], ContainerIdentifier="B")
    slides = scan_into(dataset, folder)
    assert {k: Path(s.path).name for k, s in slides.items()} == {
        "case": "m.dcm", "case.B": "a.dcm",
    }  # fmt: skip
    assert slides["case"].content_key == before["case"].content_key
    assert scan_into(dataset, folder) == slides
    (folder / "a.dcm").unlink()
    assert scan_into(dataset, folder)["case"].status == "ok"


def test_dicom_files_are_grouped_named_and_counted(tmp_path):
    heads = [("1.2.1", "A", "1"), ("1.2.2", "B", "1"), ("1.2.3", "B", "2"), ("1.2.4", "", "")]
    ids = []
    for order in permutations(range(4)):
        folder = tmp_path / "".join(map(str, order)) / "F"
        for name, number in enumerate(order):
            series, container, serial = heads[number]
            for part in "01":
                write_dicom(
                    folder / f"{name}{part}.dcm", series, ContainerIdentifier=container,
                    SeriesNumber=serial,
                )  # fmt: skip
        ids.append([e.slide_id for e in find_slides([str(folder)])])
    assert all(these == ids[0] for these in ids)
    assert {"F.A", "F.B.1", "F.B.2"} < set(ids[0])
    assert len(ids[0]) == 4
    write_dicom(folder / "label.dcm", "1.2.5", kind="LABEL")
    write_dicom(folder / "scan.dcm", "1.2.6", sop_class=CT)
    (folder / "._00.dcm").write_bytes(b"\0\5\x16\7")
    search = FolderSearch()
    assert len(search.search_folder(folder)) == 4
    assert search.counts == {
        "._*: companions of files (AppleDouble), as macOS leaves them": 1,
        ".dcm: no whole-slide DICOM image": 1,
        "DICOM files: of series without a VOLUME image": 1,
    }
    # However they are named: by the folder, by one file or by all.
    files = sorted(map(str, folder.glob("[0-9]*.dcm")))
    assert len(find_slides(files)) == len(find_slides([*files, str(folder)])) == 4
    assert len(find_slides([f"{folder}/0*.dcm"])) == 1
    assert [len(slide_files(e.path)) for e in find_slides(files)] == [2, 2, 2, 2]


def test_a_damaged_dicom_folder_fails_by_its_name(tmp_path):
    (tmp_path / "F").mkdir()
    (tmp_path / "F" / "a.dcm").write_bytes(b"garbage")
    assert [e.slide_id for e in find_slides([str(tmp_path)])] == ["F"]


# What is passed over ---------------------------------------------------------------------------

_KINDS = {
    "s.svs": "slide", "t.TIF": "slide", "X.mrxs": "slide", "v.vms": "slide", "w.svs": "slide",
    "v_map2.jpg": ".jpg", "n.png": ".png", "k.kfb": ".kfb", "q.isyntax": ".isyntax",
    "z.zip": ".zip", "._s.svs": "._*", ".DS_Store": ".*", "t.svs.partial": ".svs.partial",
    "u.ndpi.crdownload": ".ndpi.crdownload", "w.svs.aria2": ".svs.aria2", "~$d.docx": "~$*",
    "d.csv": ".csv", "noext": "files without a suffix", "Slidedat.ini": ".ini",
}  # fmt: skip
_FOLDERS = ["", "a", "a/b", "X", "a/X"]
_JUNK = [".Trash-1000", "@eaDir", ".snapshot", "$RECYCLE.BIN", "lost+found", "__MACOSX"]


@given(
    st.sets(st.tuples(st.sampled_from(_FOLDERS), st.sampled_from(sorted(_KINDS))), min_size=1),
    st.sets(st.sampled_from(_JUNK)),
)
@settings(max_examples=80)
def test_every_file_is_taken_a_part_of_a_slide_or_counted(tmp_path_factory, files, junk):
    root = tmp_path_factory.mktemp("tree")
    for place, name in files:
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / name).touch()
    for name in junk:
        (root / name).mkdir()
        (root / name / "s.svs").touch()
    slides, expected = set(), dict.fromkeys(["folders"] if junk else [], len(junk))
    for place, name in files:
        kind = _KINDS[name]
        parent = str(Path(place).parent) if "/" in place else ""
        if name == "w.svs" and (place, "w.svs.aria2") in files:
            kind = ".svs"
        has_vms = name == "v_map2.jpg" and (place, "v.vms") in files
        has_mirax = name == "Slidedat.ini" and place[-1:] == "X" and (parent, "X.mrxs") in files
        if has_vms or has_mirax:
            continue
        if kind == "slide":
            slides.add(root / place / name)
        else:
            expected[kind] = expected.get(kind, 0) + 1
    search = FolderSearch()
    assert {slide.path for slide in search.search_folder(root)} == slides
    counts: dict[str, int] = {}
    for text, count in search.counts.items():
        what = text.partition(": ")[0]
        counts[what] = counts.get(what, 0) + count
    assert counts == expected
    assert all("\n" not in line for line in search.describe_passed())


def test_links_and_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (root / "closed").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "b.svs").touch()
    (root / "a.svs").symlink_to(elsewhere / "b.svs")
    (root / "dead.svs").symlink_to(tmp_path / "nowhere")
    (root / "folder").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.svs")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    # Not by chmod: root reads everything.
    monkeypatch.setattr(os, "scandir", refuse)
    search = FolderSearch()
    assert [slide.path for slide in search.search_folder(root)] == [root / "a.svs"]
    assert search.counts == {
        "links: not followed into folders; name the folder to search it": 2,
        "devices, pipes or sockets: no regular files": 1,
        "folders: cannot be read: Permission denied": 1,
        "links: the target is missing": 1,
    }
    monkeypatch.undo()
    found = find_slides([f"{root}/**/*.svs"])
    assert len(found) == 2, "a glob follows links to folders, in circles once"
    assert {e.path.name for e in found} == {"a.svs", "b.svs"}
    with pytest.raises(UserError, match=r"no slides in .*dead\.svs.*1 link: the target is missing"):
        ScanStage(Dataset(tmp_path / "d"), ScanConfig((str(root / "dead.svs"),)))


def test_a_companion_never_has_the_slide_s_name(tmp_path):
    for name in ("a.svs", "._a.svs", "a.svs.part"):
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_text("path\n._a.svs\na.svs\n")
    assert slide_id_of(tmp_path / "._a.svs") != slide_id_of(tmp_path / "a.svs")
    for inputs in ([tmp_path], [tmp_path / "t.csv"], [tmp_path / "._a.svs", tmp_path / "a.svs"]):
        ids = {e.slide_id: e.path.name for e in find_slides(map(str, inputs))}
        assert ids["a"] == "a.svs"
    assert [e.path.name for e in find_slides([f"{tmp_path}/a*"])] == ["a.svs"]


# What the commands say -------------------------------------------------------------------------


def test_scan_ends_with_what_was_not_taken(tmp_path, write, capsys):
    write(tmp_path / "in" / "a.tif")
    (tmp_path / "in" / "._a.tif").write_bytes(b"\0\5\x16\7" * 99)
    (tmp_path / "in" / "thumb.png").touch()
    (tmp_path / "in" / "line\n\x1b[31mbreak.png").touch()
    arguments = ["scan", str(tmp_path / "in"), "--dataset", str(tmp_path / "d"), "--workers", "1"]
    for _ in range(2):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        head, _, tail = out.partition("scan: not taken:\n")
        assert "scan: slides: " in head
        lines = tail.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("  2 .png: pictures")
        assert lines[1].startswith("  1 ._*: companions")
    for path in (tmp_path / "in").glob("*.tif"):
        path.unlink()
    with pytest.raises(UserError, match=r"no slides in .*; there: 2 \.png: pictures"):
        main(arguments)


def test_scan_fails_where_no_slide_is_usable(tmp_path, write, capsys):
    coarse = ["scan", str(tmp_path / "in"), "--mpp", "0.25", "--workers", "1"]
    arguments = [*coarse, "--dataset", str(tmp_path / "d")]
    write(tmp_path / "in" / "a.tif")
    for _ in range(2):
        assert main(arguments) == 1
        assert "none of the 1 slides can be used" in " ".join(capsys.readouterr().out.split())


def test_a_slide_that_is_gone_or_another_file_is_named_with_its_path(tmp_path, write):
    path = write(tmp_path / "a" / "1.tif", 0, None)
    slide = scan_into(Dataset(tmp_path / "d"), path)["1"]
    with local_slide(slide, IN_PLACE, tmp_path) as found:
        assert found == path
    os.utime(path)
    with local_slide(slide, IN_PLACE, tmp_path) as found:
        assert found == path, "only touched"
    write(path, 300, None)
    with (
        pytest.raises(OtherFileError, match=r"slide 1 is no longer the file that scan recorded"),
        local_slide(slide, IN_PLACE, tmp_path),
    ):
        pass
    path.unlink()
    words = r"slide 1: .*a/1.tif does not exist; if the slide was moved or renamed, scan it again"
    with pytest.raises(StageInError, match=words), local_slide(slide, IN_PLACE, tmp_path):
        pass
    path.symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(StageInError, match="is a link to a file that is missing"),
        local_slide(slide, IN_PLACE, tmp_path),
    ):
        pass


@given(st.binary(max_size=200), st.integers(0, 199), st.integers(1, 255))
def test_samples_see_every_byte_of_a_small_file(tmp_path_factory, data, place, change):
    folder = tmp_path_factory.mktemp("samples")
    (folder / "a.svs").write_bytes(data)
    other = bytearray(data)
    if place < len(other):
        other[place] ^= change
    (folder / "b.svs").write_bytes(other)
    is_same = sample_slide(folder / "a.svs") == sample_slide(folder / "b.svs")
    assert is_same == (data == other)


def test_an_entry_needs_no_folder_to_be_described(tmp_path):
    entry = SlideEntry(tmp_path / "x.svs", "x")
    assert entry.location == str(tmp_path / "x.svs")
