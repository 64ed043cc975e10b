"""`python -m moe_jax` is the command `moe-jax`."""

import sys

from moe_jax.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
