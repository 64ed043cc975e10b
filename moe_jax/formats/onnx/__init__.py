"""Layers as ONNX nodes, and back. Needs the package onnx: `pip install moe-jax[onnx]`."""
