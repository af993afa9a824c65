"""SLURM batch scripts, printed by `python -m pipeline batch NAME`."""
