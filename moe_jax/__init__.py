"""Mixture-of-experts layers for JAX, with tagged axes and block-scaled FP4 experts."""

from moe_jax.activations import GPT_OSS_ACTIVATION as GPT_OSS_ACTIVATION
from moe_jax.activations import Activation as Activation
from moe_jax.dispatch import DispatchReport as DispatchReport
from moe_jax.dispatch import choose_algorithm as choose_algorithm
from moe_jax.experts import MLP as MLP
from moe_jax.experts import Expert as Expert
from moe_jax.experts import GatedMLP as GatedMLP
from moe_jax.experts import GptOssMLP as GptOssMLP
from moe_jax.experts import Identity as Identity
from moe_jax.layer import MoE as MoE
from moe_jax.layer import MoEConfig as MoEConfig
from moe_jax.layer import RouterStatistics as RouterStatistics
from moe_jax.losses import load_balance_loss as load_balance_loss
from moe_jax.losses import router_z_loss as router_z_loss
from moe_jax.mixture_of_experts import fused_experts as fused_experts
from moe_jax.mixture_of_experts import mixture_of_experts as mixture_of_experts
from moe_jax.quantization import BlockScaled as BlockScaled
from moe_jax.quantization import dequantize_mxfp4 as dequantize_mxfp4
from moe_jax.quantization import fake_quantize_mxfp4 as fake_quantize_mxfp4
from moe_jax.quantization import quantize_mxfp4 as quantize_mxfp4
from moe_jax.routing import Router as Router
from moe_jax.routing import Routing as Routing
from moe_jax.routing import route as route
from moe_jax.tagged import Tagged as Tagged
from moe_jax.tagged import tag as tag
