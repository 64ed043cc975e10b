"""The layer on several devices: which holds what, and how rows travel between them."""

from moe_jax.sharding.communication import choose_communication as choose_communication
from moe_jax.sharding.mesh import SHARDING_RULES as SHARDING_RULES
from moe_jax.sharding.mesh import Sharding as Sharding
from moe_jax.sharding.mesh import make_mesh as make_mesh
