"""Encoders that skip padding and, in the last layer, rows that no head reads. Needs transformers."""
