"""Generators behind one small interface: features and seeds in, uint8 tiles out."""

from evaluate.generators.interface import EncoderRecord, Generator

__all__ = ["EncoderRecord", "Generator"]
