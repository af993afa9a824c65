"""Tissue and artifact detection, overlays, and the `tissue` stage."""
