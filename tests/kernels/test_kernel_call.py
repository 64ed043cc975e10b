"""How kernels are compiled and bound; that they run is `test_expert_mlp_gpu.py`'s."""

import jax
import jax.numpy as jnp
import pytest
from triton_tools import MISSING

from moe_jax.kernels import kernel_call

KINDS = ("*bf16", "*i32", "*i32", "*fp32", "*i32", "i32", "*bf16")
CONSTANTS = {
    "IN": 128,
    "OUT": 64,
    "E": 4,
    "OUTPUTS": 64,
    "HEIGHTS": ((8,),),
    "TILES": 1,
    "STAGES": 2,
    "INSTRUCTION": "mma",
}


@pytest.fixture
def kernel():
    pytest.importorskip("triton", reason=MISSING)
    from moe_jax.kernels.tiled_matmul import hopper

    return hopper.rows_kernel


@pytest.mark.compiles
def test_compiles_without_source_lines(kernel):
    options = kernel_call.Options(num_warps=4, max_registers=64)
    code = kernel_call.compile_kernel(kernel, KINDS, tuple(sorted(CONSTANTS.items())), options, 90)
    assert f".entry {code.name}(" in code.ptx
    assert ".target sm_90a" in code.ptx and "mma.sync" in code.ptx
    assert ".maxnreg 64" in code.ptx
    assert ".loc" not in code.ptx and "debug" not in code.ptx
    assert (code.num_warps, code.capability) == (4, 90)
    # two stages of a tile of 8 tokens x 64 inputs
    assert code.shared_bytes >= 2 * 8 * 64 * 2


@pytest.mark.parametrize("missing", ["HEIGHTS", "E"])
def test_refuses_other_constants(kernel, missing):
    constants = {name: value for name, value in CONSTANTS.items() if name != missing}
    with pytest.raises(TypeError, match="rows_kernel takes 7 arguments .* and the constants"):
        kernel_call.kernel_source(kernel, KINDS, constants)


def test_refuses_other_arguments(kernel):
    with pytest.raises(TypeError, match="takes 7 arguments .*, got 6 arguments"):
        kernel_call.kernel_source(kernel, KINDS[1:], CONSTANTS)


def test_refuses_other_dtypes(kernel):
    out = jax.ShapeDtypeStruct((3, 64), jnp.float8_e4m3fn)
    with pytest.raises(
        TypeError, match="arrays of int32, float32, float16, bfloat16, got float8_e4m3fn"
    ):
        kernel_call.kernel_call(
            jnp.zeros(3, jnp.int32), kernel=kernel, out_type=out, grid=(1,), num_warps=4
        )
