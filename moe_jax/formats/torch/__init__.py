"""MoE layers in the state dicts of PyTorch modules, read and written without PyTorch.

A state dict maps names to tensors; here the tensors are NumPy arrays, or anything with PyTorch's
`detach`, `cpu` and `numpy`. A `Layout` says which tensor holds what. It is data: for a model with
other settings, replace its fields.

    layout = dataclasses.replace(MIXTRAL, router=Router(order="before_top_k"))
    layers = read("model.safetensors", layout, experts_per_token=2)     # by their paths
    layer = import_state(state, layout, experts_per_token=2, prefix="layers.0.mlp.")

A state dict holds neither the number of experts a token has nor an activation: these come from the
caller and from the layout.
"""

from moe_jax.formats.torch.layouts import DROPLESS as DROPLESS
from moe_jax.formats.torch.layouts import GPT_OSS as GPT_OSS
from moe_jax.formats.torch.layouts import MIXTRAL as MIXTRAL
from moe_jax.formats.torch.layouts import MIXTRAL_CHECKPOINT as MIXTRAL_CHECKPOINT
from moe_jax.formats.torch.layouts import Layout as Layout
from moe_jax.formats.torch.layouts import Tensor as Tensor
from moe_jax.formats.torch.state import export_state as export_state
from moe_jax.formats.torch.state import import_state as import_state
from moe_jax.formats.torch.state import read as read
from moe_jax.formats.torch.state import write as write
from moe_jax.formats.torch.tensors import load_tensors as load_tensors
from moe_jax.formats.torch.tensors import to_numpy as to_numpy
from moe_jax.formats.torch.tensors import to_torch as to_torch
