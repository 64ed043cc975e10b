"""The checkpoints that ship with the repository."""

from pathlib import Path

NANO = Path(__file__).parent / "gpt-oss-nano"
"""A model of 9 million parameters; its README.md is the model card."""
