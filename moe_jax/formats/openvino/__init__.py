"""OpenVINO: its internal operation `MOE`, and graphs of public operations that it fuses.

    operation = from_experts(experts, order="alpha_is_limit")      # as data
    y = operation(x, routing_weights, indices, form="compact")     # by moe_jax.fused_experts
    write("layer.xml", {"mlp": layer})                             # a file that OpenVINO runs
    layers = read("layer.xml")

`read`, `write` and what is in `moe_jax.formats.openvino.model` need the package `openvino`
(`pip install moe-jax[openvino]`).
"""

from moe_jax.formats.openvino.attributes import MoeAttributes as MoeAttributes
from moe_jax.formats.openvino.files import read as read
from moe_jax.formats.openvino.files import write as write
from moe_jax.formats.openvino.operation import MoeOperation as MoeOperation
from moe_jax.formats.openvino.operation import from_experts as from_experts
from moe_jax.formats.openvino.operation import from_inputs as from_inputs
from moe_jax.formats.openvino.routing import from_openvino_routing as from_openvino_routing
from moe_jax.formats.openvino.routing import to_openvino_routing as to_openvino_routing
