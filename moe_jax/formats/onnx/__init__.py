"""Layers as ONNX nodes, and back. Needs the package onnx: `pip install moe-jax[onnx]`."""

import importlib

try:
    importlib.import_module("onnx")
except ImportError as error:
    raise ImportError(
        "the ONNX formats need the package onnx: pip install moe-jax[onnx]"
    ) from error
