"""A tiny checkpoint for tests of loading."""

import loader_files
import pytest


@pytest.fixture(scope="module")
def config():
    return loader_files.CONFIG


@pytest.fixture(scope="module")
def originals():
    """The tiny checkpoint with the dtypes that it has on disk."""
    return loader_files.originals()


@pytest.fixture
def tensors(originals):
    """A copy of the dictionary, for a test to damage."""
    return dict(originals)
