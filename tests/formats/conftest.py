"""What tests of formats run under, besides what all tests do."""

import importlib.util
from collections.abc import Iterator

import jax
import pytest

if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "openvino")):
    # the other formats are tested where the dependency group `systems` is not installed
    collect_ignore_glob = [
        "test_every_format.py",
        "test_mixing_ort.py",
        "test_number_formats.py",
        "test_onnx_*.py",
        "test_tensorrt_numerics.py",
    ]


@pytest.fixture(autouse=True, scope="module")
def little_compiling() -> Iterator[None]:
    """XLA optimizes little: layers are tiny, run once, and to compile them is what takes time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
