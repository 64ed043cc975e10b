"""The command `moe-jax`: what layers files hold, and files of one system made of another's.

What takes long to import, the rest of the library first of all, is imported where it is used:
`moe-jax --help` answers at once.
"""

from moe_jax.command_line.main import main as main
