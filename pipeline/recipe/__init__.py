"""`pipeline run`: all stages from one file, planned before they run."""
