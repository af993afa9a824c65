"""When a slide is given up: a pure rule over what its attempts have cost so far.

Nothing is tried for ever, and no slide pays for another's fault:

- A slide that kills its worker while it is alone on it fails the third time.
- A worker whose whole job was lost without a warning is no slide's fault, but a slide may cause it
  (memory); the tenth loss ends it.
- A worker that leaves in good order (its walltime) wastes the part of its life that the slide had.
  Time is summed, not departures: as the workers of one hour end one by one, a short slide may go
  from one to the next. A slide that wasted five whole lives needs a longer walltime.
"""

from dataclasses import dataclass, replace

from common.text import format_seconds

MAX_WORKER_DEATHS = 3
MAX_JOB_LOSSES = 10
MAX_WASTED_LIVES = 5.0
_WHOLE_LIFE = 0.9


@dataclass(frozen=True)
class Attempts:
    """What a slide's unfinished attempts have cost.

    `wasted_lives` sums the parts of its workers' lives that it had in vain, from 0 to 1 each;
    `longest_s` is the longest of these attempts in seconds.
    """

    deaths: int = 0
    job_losses: int = 0
    departures: int = 0
    wasted_lives: float = 0.0
    longest_s: float = 0.0

    def after_death(self) -> "Attempts":
        """The slide was alone on a worker that died, and the worker's job goes on."""
        return replace(self, deaths=self.deaths + 1)

    def after_job_loss(self) -> "Attempts":
        """The job of its worker ended without a warning."""
        return replace(self, job_losses=self.job_losses + 1)

    def after_departure(self, seconds: float, life_s: float) -> "Attempts":
        """A worker that lives `life_s` left in good order, `seconds` after the slide began."""
        return replace(
            self,
            departures=self.departures + 1,
            wasted_lives=self.wasted_lives + min(1.0, seconds / max(life_s, 1e-3)),
            longest_s=max(self.longest_s, seconds),
        )

    @property
    def wasted_a_whole_life(self) -> bool:
        """Whether a worker's walltime may be too short for this slide: >= 0.9 lives in vain."""
        return self.wasted_lives >= _WHOLE_LIFE

    def reason_to_give_up(self) -> str:
        """Why the slide is not tried again; "" with < 3 deaths, < 10 lost jobs and < 5 lives."""
        if self.deaths >= MAX_WORKER_DEATHS:
            return f"killed its worker {MAX_WORKER_DEATHS} times (out of memory, or a crash)"
        if self.job_losses >= MAX_JOB_LOSSES:
            return f"its job ended {MAX_JOB_LOSSES} times meanwhile (out of memory? too short?)"
        if self.wasted_lives >= MAX_WASTED_LIVES:
            return (
                f"its workers' time was up {self.departures} times before it ended, up to "
                f"{format_seconds(self.longest_s)} after it began: give them a longer walltime "
                "(lifetime) and run the stage again"
            )
        return ""
