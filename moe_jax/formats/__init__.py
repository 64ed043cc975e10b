"""Mixture-of-experts layers of other systems: read, run and written.

One module a system, imported by its name (`import moe_jax.formats.onnx`), for most need a package
that is not among the library's own dependencies. Names and layouts of the other system are turned
into the library's at this border and nowhere else: weights are {expert, out, in}, `alpha`, `beta`
and `limit` are those of `moe_jax.Activation`. What a system cannot say is refused with a
`FormatError` that names it.
"""

from moe_jax.formats.errors import FormatError as FormatError
