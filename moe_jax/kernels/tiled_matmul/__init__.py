"""Rows times tiled MXFP4 weights of their experts: the kernels that other operations are made of.

`launch` has them as functions of arrays, `configs` how they are tiled. What an operation is, and
its definition in XLA, is said where it is: in `expert_mlp` and in `grouped_matmul`.
"""
