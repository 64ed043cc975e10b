"""The command `moe-jax`: what layers files hold, and files of one system made of another's.

The packages of other systems are imported where they are used.
"""

from moe_jax.command_line.main import main as main
