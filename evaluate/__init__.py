"""Generation of synthetic datasets, their measured distance to real ones, and the report."""
