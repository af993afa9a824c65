"""Slides to tissue, selections, tile shards and feature caches, in parallel under Dask."""
