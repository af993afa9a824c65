"""Generators behind one small interface: features and seeds in, uint8 tiles out."""

from evaluate.generators.interface import Generator

__all__ = ["Generator"]
