"""The settings of a sampler as one record; its field names are those of every file on disk.

The defaults are those of CytoSyn (arXiv 2603.18089).

Importing it loads no torch: command lines build their options from the fields.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from common.options import option_field

Solver = Literal["sde", "ode", "heun", "dpm"]
"""The solvers of `model.sampler`, which a test holds equal to its own list."""


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn; the defaults are CytoSyn's (arXiv 2603.18089).

    `steps` is 1 or more, `guidance_scale` 0 or more (up to 1 nothing is guided), and guidance is
    active where `guidance_low` <= t <= `guidance_high`, times in [0, 1] of which 1 is noise.
    Raises `UserError` for a setting out of its range.

    >>> SamplerSettings(steps=50).arguments()["guidance_scale"]
    2.5
    """

    solver: Solver = option_field(
        "sde", "how noise becomes an image; PixCell: dpm", flag="--solver"
    )
    steps: int = option_field(250, "solver steps; PixCell: 50", flag="--steps")
    guidance_scale: float = option_field(2.5, "1 guides nothing; PixCell: 2.0", flag="--scale")
    guidance_low: float = option_field(
        0.0, "earliest time that is guided, 0 is the image", flag="--low"
    )
    guidance_high: float = option_field(
        0.75, "latest time that is guided, 1 is noise", flag="--high"
    )
    legacy_truncate: bool = option_field(
        False,
        "cut grey values down to whole numbers, as REPA-E's script did, instead of rounding them: "
        "half a grey level darker",
    )

    def __post_init__(self) -> None:
        from model.sampler import Guidance, time_nodes

        Guidance(self.guidance_scale, self.guidance_low, self.guidance_high)
        time_nodes(self.solver, self.steps)

    def arguments(self) -> dict[str, Any]:
        """The settings as keyword arguments of `model.sampler.sample`, by their names on disk.

        `legacy_truncate` is the decoder's, not the sampler's.
        """
        return {name: value for name, value in asdict(self).items() if name != "legacy_truncate"}


FIELD_OF_OPTION = {
    item.metadata["option"].flag[2:]: item.name
    for item in fields(SamplerSettings)
    if item.metadata["option"].flag
}
"""Short names, of command lines and protocols, to the fields: `scale` is `guidance_scale`."""
