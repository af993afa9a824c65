"""The QC page of a dataset: one HTML file and small pictures that a group looks at together."""
