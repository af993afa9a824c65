import csv

import pytest

from pipeline.slides.barcode import parse_barcode, project_of_site


def test_a_diagnostic_slide():
    found = parse_barcode("TCGA-CR-7395-01A-01-TS1")
    assert found is not None
    assert (found.patient, found.site, found.sample_type) == ("TCGA-CR-7395", "CR", "01")
    assert found.project == "TCGA-HNSC"


@pytest.mark.parametrize("site", ["NA", "02", "05", "2E", "3E", "4E"])
def test_codes_stay_text(site):
    found = parse_barcode(f"TCGA-{site}-A1B2-01Z-00-DX1.0000")
    assert found is not None
    assert found.site == site
    assert project_of_site(site).startswith("TCGA-")


def test_other_names_are_no_barcodes():
    assert parse_barcode("CMU-1-Small-Region") is None
    assert parse_barcode("TCGA-1") is None


def test_every_slide_of_the_real_list(shared_data):
    with (shared_data / "cohort" / "tcga_slides.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11_893
    for row in rows:
        found = parse_barcode(row["slide_id"])
        assert found is not None
        assert (found.patient, found.site, found.project) == (
            row["patient"],
            row["tss"],
            row["project"],
        )
