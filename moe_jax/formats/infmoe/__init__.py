"""Layers of InfMoE (first called mow-infer), a TensorRT plugin whose experts lie in an npz file.

A layer is the plugin's attributes, here `InfMoEPlugin`, and a file with an array for each expert
`n` and parameter:

    n/layer_norm_weight  [d]           n/wi_0_weight  [hidden_size, d]
    n/layer_norm_bias    [d]           n/wi_1_weight  [hidden_size, d]
                                       n/wo_weight    [d, hidden_size]

Every token goes to the expert with the nearest centroid, the lowest of equals. `read_layer` makes a
`moe_jax.MoE` of both, `write_layer` makes both of an `MoE`, all of it in float32 without rounding.

Two things the plugin leaves open:

    - Which norm. Its description states the RMS norm of T5 (`DESCRIBED_NORM`), its kernel subtracts
      the mean (`KERNEL_NORM`). Nothing in the file tells which a model was trained with, so that
      whoever reads must say it. The plugin uses one norm throughout, and eps is 1e-6.
    - Whether there is a bias in the norm. The first description lists it; what was implemented
      never reads it. It is read and written where it is there.

The sub-layers are a table, so that others can be added to it, as in the plugin: see `Sublayer`.

Source: https://github.com/Harry-Chen/InfMoE
"""

from moe_jax.formats.infmoe.attributes_file import read_attributes as read_attributes
from moe_jax.formats.infmoe.attributes_file import write_attributes as write_attributes
from moe_jax.formats.infmoe.layer import read_layer as read_layer
from moe_jax.formats.infmoe.layer import write_layer as write_layer
from moe_jax.formats.infmoe.plugin import DESCRIBED_NORM as DESCRIBED_NORM
from moe_jax.formats.infmoe.plugin import KERNEL_NORM as KERNEL_NORM
from moe_jax.formats.infmoe.plugin import VARIANTS as VARIANTS
from moe_jax.formats.infmoe.plugin import InfMoEPlugin as InfMoEPlugin
from moe_jax.formats.infmoe.plugin import Variant as Variant
from moe_jax.formats.infmoe.sublayers import SUBLAYERS as SUBLAYERS
from moe_jax.formats.infmoe.sublayers import Sublayer as Sublayer
