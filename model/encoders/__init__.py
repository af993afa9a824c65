"""Frozen pathology encoders: one table, one loader, one output."""

from model.encoders.encoder import Encoder, EncoderOutput, load_encoder
from model.encoders.resize import antialias_bicubic_matrix, resize_tokens
from model.encoders.table import ENCODERS, EncoderSpec, encoder_spec

__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderOutput",
    "EncoderSpec",
    "antialias_bicubic_matrix",
    "encoder_spec",
    "load_encoder",
    "resize_tokens",
]
