"""The commands of `pipeline`: one light module each, with its options and how it is run.

A module has `HELP` (one line), `add_options(parser)` and `run(options) -> exit status`; what the
command needs is imported in `run`, so that `--help` and one-line errors come at once.
"""

COMMANDS = (
    "scan",
    "import_",
    "tissue",
    "select",
    "plan_cohort",
    "tile",
    "cache",
    "curate",
    "status",
    "verify",
    "prune",
    "report",
    "geojson",
    "weights",
    "batch",
    "doctor",
    "run",
)
"""In the order of a dataset's life; modules have these names (`import`, a keyword, import_)."""
