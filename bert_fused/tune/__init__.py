"""Measure which configuration is fastest on this GPU."""
