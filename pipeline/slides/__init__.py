"""Whole-slide images: one reader a file, resolution, barcodes, the `scan` stage."""
