"""One thing that was looked at."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it.

    `bad`: a stage will fail or its result cannot be trusted. `warning`: something will be slow,
    or one way of working is closed. `mend` is '' where nothing is to be done.
    """

    subject: str
    state: State
    found: str
    mend: str = ""


def judged(subject: str, found: str, problem: str, mend: str, state: State = "bad") -> Finding:
    """`ok` where there is no problem; else the problem with its mend."""
    if problem:
        return Finding(subject, state, problem, mend)
    return Finding(subject, "ok", found)
