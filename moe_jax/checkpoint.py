"""Safetensors checkpoints: what a folder holds, and the slices of it that are asked for."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or do not hold what was expected of them."""


class ConfigError(ValueError):
    """A configuration has a missing, mistyped or unsupported value."""
