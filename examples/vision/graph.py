"""`VisionMoE` as ONNX nodes, module by module."""

from collections.abc import Sequence

import numpy as np
from flax import nnx
from onnx import FunctionProto, ModelProto

from moe_jax.formats.onnx.common import AddLayer
from moe_jax.formats.onnx.writer import Writer
from vision.model import Block, PatchEmbedding, VisionMoE, WindowAttention


def to_onnx(
    model: VisionMoE, add_moe: AddLayer, functions: Sequence[FunctionProto] = ()
) -> ModelProto:
    """The model from `images` [batch, h, w, c] to `logits` [batch, class], float32.

    Args:
        model: the model; its MoE layers are named by their paths, such as `blocks.0.mlp`.
        add_moe: how an MoE layer is written, such as `add_dense` or `add_custom`.
        functions: definitions of operators that the file is to carry.
    """
    writer = Writer(np.dtype(np.float32))
    config = model.config
    images = ("batch", config.image_size, config.image_size, config.channels)
    x = _embedding(writer, model.embedding, writer.input("images", images))
    for index, block in enumerate(model.blocks):
        x = _block(writer, block, x, f"blocks.{index}", add_moe)
    x = writer.op("ReduceMean", _norm(writer, model.norm, x, "norm"), axes=[1], keepdims=0)
    logits = _linear(writer, model.head, x, "head")
    writer.output(logits, "logits", ("batch", config.num_classes))
    return writer.model(functions)


def _embedding(writer: Writer, embedding: PatchEmbedding, images: str) -> str:
    n, p, c = (getattr(embedding.config, f) for f in ("patches", "patch_size", "channels"))
    patches = writer.op("Reshape", images, writer.integers(-1, n, p, n, p, c))
    patches = writer.op("Transpose", patches, perm=[0, 1, 3, 2, 4, 5])
    flat = writer.op("Reshape", patches, writer.integers(-1, n * n, p * p * c))
    return _linear(writer, embedding.projection, flat, "embedding.projection")


def _block(writer: Writer, block: Block, x: str, name: str, add_moe: AddLayer) -> str:
    normed = _norm(writer, block.norm1, x, f"{name}.norm1")
    with writer.scope(f"{name}.attention"):
        attended = _attention(writer, block.attention, normed, f"{name}.attention")
    x = writer.op("Add", x, attended)
    normed = _norm(writer, block.norm2, x, f"{name}.norm2")
    return writer.op("Add", x, add_moe(writer, block.mlp, normed, f"{name}.mlp"))


def _attention(writer: Writer, attention: WindowAttention, x: str, name: str) -> str:
    order, mask = attention.windows()
    heads, hidden = attention.config.num_heads, attention.config.hidden_size
    size = hidden // heads
    qkv = _linear(writer, attention.qkv, x, f"{name}.qkv")
    grouped = writer.op("Gather", qkv, writer.constant(f"{name}.order", order), axis=1)
    parts = writer.op("Reshape", grouped, writer.integers(-1, *order.shape, 3, heads, size))
    first = writer.op("Transpose", parts, perm=[3, 0, 1, 4, 2, 5])
    q, k, v = (
        writer.op("Squeeze", part, writer.integers(0))
        for part in writer.ops("Split", 3, first, axis=0)
    )
    products = writer.op("MatMul", q, writer.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
    scaled = writer.op("Mul", products, writer.number(size**-0.5))
    scores = writer.op("Add", scaled, writer.constant(f"{name}.mask", mask[:, None]))
    mixed = writer.op("MatMul", writer.op("Softmax", scores, axis=-1), v)
    merged = writer.op("Transpose", mixed, perm=[0, 1, 3, 2, 4])
    tokens = writer.op("Reshape", merged, writer.integers(-1, order.size, hidden))
    inverse = writer.constant(f"{name}.inverse", np.argsort(order, axis=None))
    restored = writer.op("Gather", tokens, inverse, axis=1)
    return _linear(writer, attention.output, restored, f"{name}.output")


def _linear(writer: Writer, linear: nnx.Linear, x: str, name: str) -> str:
    product = writer.op("MatMul", x, _parameter(writer, linear.kernel, f"{name}.kernel"))
    return writer.op("Add", product, _parameter(writer, linear.bias, f"{name}.bias"))


def _norm(writer: Writer, norm: nnx.LayerNorm, x: str, name: str) -> str:
    scale = _parameter(writer, norm.scale, f"{name}.scale")
    bias = _parameter(writer, norm.bias, f"{name}.bias")
    return writer.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.epsilon)


def _parameter(writer: Writer, parameter: nnx.Param | None, name: str) -> str:
    assert parameter is not None  # these modules are made with biases and scales
    return writer.constant(name, parameter.get_value())
