"""Warnings in the order of their weight: those that void a report, then those that ask for care."""

from collections.abc import Iterable, Mapping
from typing import TypedDict

VOIDING = {
    "random_encoder_weights": "These numbers mean nothing",
    "random_training_encoder": "This model means nothing",
}
"""Titles of the warnings that make every report void, by their codes."""


class LevelledWarning(TypedDict):
    """A warning as a page shows it; `level` is "danger" or "caution"."""

    code: str
    message: str
    level: str
    title: str


def with_levels(
    warnings: Iterable[Mapping[str, object]], dangers: Mapping[str, str]
) -> list[LevelledWarning]:
    """The warnings with their level and title, worst first; `dangers` are titles by code."""
    levelled = [
        LevelledWarning(
            code=str(one["code"]),
            message=str(one["message"]),
            level="danger" if one["code"] in dangers else "caution",
            title=dangers.get(str(one["code"]), "Read with care"),
        )
        for one in warnings
    ]
    return sorted(levelled, key=lambda one: one["level"] != "danger")
