"""What tests of formats run under, besides what all tests do."""

import importlib.util

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
def tiny_layers(little_compiling: None) -> None:
    """Layers are tiny and run once."""
