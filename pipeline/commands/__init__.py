"""The commands of `pipeline`: light modules with their options and how they are run.

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
"""In the order of a dataset's life: entries of `stages.STAGE_COMMANDS`, or modules of these names.

`import` is a keyword of Python: its module is import_.
"""
