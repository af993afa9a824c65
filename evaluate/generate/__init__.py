"""`generate`: a model and guidance become a synthetic dataset in the contract of real ones.

Nothing here needs dask, openslide, tiffslide or zarr.
"""
