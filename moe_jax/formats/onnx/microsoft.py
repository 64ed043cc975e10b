"""Layers as `com.microsoft.MoE` and `QMoE`, the operators of onnxruntime.

    write("layer.onnx", layer)      # an MoE, several by name, or a Flax model that holds some
    read("layer.onnx")              # {"moe": MoE}

Experts of floats become MoE nodes, packed experts (MXFP4, integers) QMoE nodes. Weights are always
written [expert, out, in]: onnxruntime also takes [expert, in, out], from older exporters, and
multiplies it untransposed. What a layer or the target cannot say raises `FormatError` here.

Where onnxruntime's CPU kernels (1.31.1) compute otherwise than the layer does here:

    - 8-bit weights in blocks, MXFP4 among them, meet activations rounded to 8 bits, an error of
      about 1e-2, unless the environment has `ORT_QMOE_CPU_QNBIT_GEMM=fp32` when the session is
      made. So do 2-bit weights in blocks of 32 or more where the rows are a multiple of 128, about
      5e-3, always.
    - QMoE without `router_weights` normalises the weights even where the attribute says not to, so
      that `write` gives it `router_weights` then.
    - A NaN or +inf among a token's logits gives a row of zeros there, and NaN here.
    - Equal logits go to the expert with the highest index there, to the lowest here.
"""

from moe_jax.formats.onnx.microsoft_read import Node as Node
from moe_jax.formats.onnx.microsoft_read import read as read
from moe_jax.formats.onnx.microsoft_read import read_experts as read_experts
from moe_jax.formats.onnx.microsoft_schema import CPU as CPU
from moe_jax.formats.onnx.microsoft_schema import CUDA as CUDA
from moe_jax.formats.onnx.microsoft_schema import Target as Target
from moe_jax.formats.onnx.microsoft_write import to_model as to_model
from moe_jax.formats.onnx.microsoft_write import write as write
