"""How far a stage is: what workers report on the way, and whole slides as they end."""

import threading

from common.console import Meter
from pipeline.run.tasks import SlideTask


class SlideProgress:
    """Advances a meter by what workers report, and to the task's size when it ends."""

    def __init__(self, meter: Meter, slides: int) -> None:
        self._meter, self._slides, self._ended = meter, slides, 0
        self._reported: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin_slide(self, task: SlideTask) -> None:
        """A first or further attempt: what an earlier one reported is taken back."""
        with self._lock:
            taken_back = self._reported.pop(task.slide_id, 0)
            self._meter.advance(-taken_back, note=self._progress_note(task.slide_id))
            self._reported[task.slide_id] = 0

    def report_units(self, slide_id: str, units: int) -> None:
        """More units of a slide in progress are done."""
        with self._lock:
            if slide_id in self._reported:
                self._reported[slide_id] += units
                self._meter.advance(units, note=self._progress_note(slide_id))

    def end_slide(self, task: SlideTask) -> None:
        """The slide has ended, well or not."""
        with self._lock:
            # Reports may be lost with a worker: at its end a slide counts in full.
            reported = self._reported.pop(task.slide_id, 0)
            self._ended += 1
            self._meter.advance(task.units - reported, note=self._progress_note(task.slide_id))

    def report_state(self) -> dict[str, int | float | str]:
        """How far the stage is: done, total, unit, and units per second."""
        meter = self._meter
        rate = meter.done / meter.seconds if meter.seconds > 0 else 0.0
        return {
            "done": meter.done, "total": meter.total, "unit": meter.unit, "rate": round(rate, 4),
        }  # fmt: skip

    def _progress_note(self, slide_id: str) -> str:
        """The slide, and how many have ended where the meter counts something else."""
        if self._meter.unit == "slides":
            return slide_id
        return f"{self._ended}/{self._slides} slides  {slide_id}"
