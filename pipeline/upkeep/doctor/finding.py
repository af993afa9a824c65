"""One thing that `doctor` checked."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """What was checked, what was found, and how to fix it.

    `bad`: a stage will fail or its result cannot be trusted. `warning`: something will be slow,
    or one way of working is closed. `fix` is '' where nothing is to be done.
    """

    subject: str
    state: State
    result: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """The finding as `doctor --json` has always written it."""
        return {
            "subject": self.subject, "state": self.state, "found": self.result, "mend": self.fix,
        }  # fmt: skip


def make_finding(
    subject: str, result: str, problem: str, fix: str, state: State = "bad"
) -> Finding:
    """`ok` with the result where there is no problem; else the problem with its fix.

    >>> make_finding("cores", "8 cores", "", "").state
    'ok'
    """
    return Finding(subject, state, problem, fix) if problem else Finding(subject, "ok", result)
