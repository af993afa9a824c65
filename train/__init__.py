"""The stream over a dataset, the REPA-E trainer and its run directory."""
