"""What tests of the command run under, besides what all tests do."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def tiny_layers(little_compiling: None) -> None:
    """Layers are tiny and run once."""
