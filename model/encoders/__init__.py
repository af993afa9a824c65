"""Frozen encoders: one table, one loader, one output."""

from model.encoders.construct import MissingPackageError
from model.encoders.encoder import (
    Encoder,
    EncoderOutput,
    load_encoder,
    load_spec,
    published_sha256,
)
from model.encoders.resize import antialias_bicubic_matrix, resize_tokens
from model.encoders.table import ENCODERS, EncoderSpec, encoder_spec, is_of_photographs

__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderOutput",
    "EncoderSpec",
    "MissingPackageError",
    "antialias_bicubic_matrix",
    "encoder_spec",
    "is_of_photographs",
    "load_encoder",
    "load_spec",
    "published_sha256",
    "resize_tokens",
]
