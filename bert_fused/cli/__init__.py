"""The commands of ``bert-fused``."""
