from hypothesis import given
from hypothesis import strategies as st

from evaluate.generate.plan import (
    IMAGES_PER_SLIDE,
    Unit,
    micro_batches,
    missing_units,
    plan_units,
    slide_spans,
    source_order,
    unit_images,
    whole_blocks,
)
from pipeline.dataset import BLOCK_ROWS

images = st.integers(1, 3 * IMAGES_PER_SLIDE)
batches = st.integers(1, 70)


def indices(units: list[Unit]) -> list[int]:
    return [unit.image_index(rank) for unit in units for rank in range(unit.start, unit.stop)]


@given(images, batches)
def test_units_hold_every_image_once_and_begin_on_blocks(count: int, batch: int) -> None:
    units = plan_units(count, batch)
    assert indices(units) == list(range(count))
    assert all(unit.start % BLOCK_ROWS == 0 for unit in units)
    assert all(unit.stop % BLOCK_ROWS == 0 or unit == units[-1] for unit in units)
    assert all(unit.image_count <= unit_images(batch) for unit in units)


@given(images, batches)
def test_whole_units_are_whole_micro_batches(count: int, batch: int) -> None:
    if unit_images(batch) < IMAGES_PER_SLIDE:
        assert unit_images(batch) % batch == 0


def test_pseudo_slides_hold_1024_images_each() -> None:
    assert slide_spans(2100) == [(0, 1024), (1024, 2048), (2048, 2100)]
    assert plan_units(1025, 16)[-1] == Unit(1, 0, 1)
    assert Unit(1, 0, 1).slide_id == "gen-00001"


@given(images, batches, st.data())
def test_missing_is_what_no_span_holds(count: int, batch: int, data: st.DataObject) -> None:
    units = plan_units(count, batch)
    held = [unit for unit in units if data.draw(st.booleans())]
    spans: dict[str, list[tuple[int, int]]] = {}
    for unit in held:
        spans.setdefault(unit.slide_id, []).append((unit.start, unit.stop))
    missing = missing_units(units, spans)
    assert sorted(indices(missing) + indices(held)) == list(range(count))


@given(images, st.integers(0, 100))
def test_only_the_end_of_the_guidance_cuts_a_block(count: int, more: int) -> None:
    assert whole_blocks(count, None) % BLOCK_ROWS == 0
    assert count <= whole_blocks(count, count + more) <= count + more
    rounded = whole_blocks(count, count + more)
    assert rounded % BLOCK_ROWS == 0 or rounded == count + more


@given(images, batches)
def test_an_image_keeps_its_row_whatever_part_it_is_made_in(count: int, batch: int) -> None:
    for unit in plan_units(count, batch)[:3]:
        for part in (unit, Unit(unit.slide, unit.start + unit.image_count // 2, unit.stop)):
            kept = []
            for call in micro_batches(part, batch):
                assert call.images.shape == (batch,)
                for row in range(call.begin, call.end):
                    assert call.images[row] % IMAGES_PER_SLIDE % batch == row
                kept += call.images[call.begin : call.end].tolist()
            assert kept == [part.image_index(rank) for rank in range(part.start, part.stop)]


@given(st.integers(1, 500))
def test_source_order_is_a_permutation_that_depends_on_its_key(rows: int) -> None:
    assert sorted(source_order(rows, "a").tolist()) == list(range(rows))


def test_source_order_is_the_same_on_every_machine() -> None:
    assert source_order(8, "a").tolist() != source_order(8, "b").tolist()
    assert source_order(8, "a").tolist() == [3, 6, 4, 5, 2, 1, 0, 7]
