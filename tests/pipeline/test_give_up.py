"""The rule by which a slide is given up, without a cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.give_up import (
    MAX_JOB_LOSSES,
    MAX_WASTED_LIVES,
    MAX_WORKER_DEATHS,
    Attempts,
)


def test_the_third_death_ends_a_slide() -> None:
    attempts = Attempts()
    for _ in range(MAX_WORKER_DEATHS - 1):
        attempts = attempts.after_death()
        assert attempts.reason_to_give_up() == ""
    assert "killed its worker 3 times" in attempts.after_death().reason_to_give_up()


def test_the_tenth_lost_job_ends_a_slide() -> None:
    attempts = Attempts()
    for _ in range(MAX_JOB_LOSSES - 1):
        attempts = attempts.after_job_loss()
        assert attempts.reason_to_give_up() == ""
    assert "its job ended 10 times" in attempts.after_job_loss().reason_to_give_up()


@given(st.lists(st.floats(0, 10_000), max_size=60), st.floats(1, 10_000))
def test_departures_count_by_the_life_they_waste(waits: list[float], life_s: float) -> None:
    attempts, lives = Attempts(), 0.0
    for seconds in waits:
        attempts = attempts.after_departure(seconds, life_s)
        lives += min(1.0, seconds / life_s)
        assert bool(attempts.reason_to_give_up()) == (attempts.wasted_lives >= MAX_WASTED_LIVES)
    assert attempts.wasted_lives == pytest.approx(lives)
    assert attempts.departures == len(waits)
    assert attempts.longest_s == max(waits, default=0.0)


def test_a_walltime_that_is_too_short_is_named_with_what_to_do() -> None:
    attempts = Attempts()
    for _ in range(5):
        attempts = attempts.after_departure(3600.0, 3600.0)
    assert attempts.wasted_a_whole_life
    reason = attempts.reason_to_give_up()
    assert "5 times before it ended, up to 1 h 00 min" in reason
    assert "longer walltime" in reason


@given(st.lists(st.sampled_from(["death", "loss"]), max_size=20))
def test_kinds_of_trouble_are_counted_apart(kinds: list[str]) -> None:
    attempts = Attempts()
    for kind in kinds:
        attempts = attempts.after_death() if kind == "death" else attempts.after_job_loss()
    ends = kinds.count("death") >= MAX_WORKER_DEATHS or kinds.count("loss") >= MAX_JOB_LOSSES
    assert bool(attempts.reason_to_give_up()) == ends
