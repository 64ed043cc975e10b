"""TensorRT's mixture-of-experts layer, `IMoELayer`: an object like it, and what to tell TensorRT.

TensorRT cannot be run here, and NVIDIA prints no formula for the parameters of SwiGLU of this layer
nor the arithmetic of its double quantisation. So all of this is a reference, from what its
documentation says, and never was compared with TensorRT itself. Parts of it were compared with
ONNX Runtime, which names the same parameters.

    layer = MoELayer()
    layer.set_gated_weights(gate, up, down, MoEActType.SILU)      [E, H, I], [E, H, I], [E, I, H]
    y = layer(hidden_states, selected_experts, scores)            [B, S, H], [B, S, K], [B, S, K]
    calls = recipe(layer)                                         what to call in TensorRT

Sources: TensorRT's page "MoE (Mixture of Experts)" and the API reference of `IMoELayer`, versions
10.16 and 11; names are those of its Python API. The formula is that of the same three parameters
in TensorRT-LLM.
"""

from moe_jax.formats.tensorrt.experts import from_experts as from_experts
from moe_jax.formats.tensorrt.experts import to_gpt_oss as to_gpt_oss
from moe_jax.formats.tensorrt.layer import MoELayer as MoELayer
from moe_jax.formats.tensorrt.recipe import Call as Call
from moe_jax.formats.tensorrt.recipe import Result as Result
from moe_jax.formats.tensorrt.recipe import recipe as recipe
from moe_jax.formats.tensorrt.recipe import replay as replay
from moe_jax.formats.tensorrt.settings import DataType as DataType
from moe_jax.formats.tensorrt.settings import MoEActType as MoEActType
from moe_jax.formats.tensorrt.settings import Quantization as Quantization
