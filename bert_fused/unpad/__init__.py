"""Encoders that compute nothing at padding and no last-layer rows that nobody reads. Needs transformers."""
