"""Expert layers, and how rows meet experts."""

from moe_jax.experts.base import Expert as Expert
from moe_jax.experts.base import Rows as Rows
from moe_jax.experts.layers import MLP as MLP
from moe_jax.experts.layers import GatedMLP as GatedMLP
from moe_jax.experts.layers import GptOssMLP as GptOssMLP
from moe_jax.experts.layers import Identity as Identity
from moe_jax.experts.quantized import DynamicNVFP4 as DynamicNVFP4
from moe_jax.experts.quantized import QuantizedGatedMLP as QuantizedGatedMLP
from moe_jax.experts.quantized import StaticFP8 as StaticFP8
from moe_jax.experts.t5 import T5FeedForward as T5FeedForward
