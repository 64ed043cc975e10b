"""The grouped matmul of tiled MXFP4 weights: the kernel that it becomes, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_mlp_oracle import Packed
from triton_tools import MISSING

import moe_jax
from moe_jax import tag
from moe_jax.kernels.grouped_matmul import grouped_matmul
from moe_jax.kernels.tiled_matmul import launch

SIZES = np.array([4, 0, 9, 2], np.int32)


def operands(rng, dtype=jnp.bfloat16):
    packed = Packed.random(rng, 4, 48, 96)
    rows = jnp.asarray(rng.normal(size=(20, 96)), dtype)
    weight = moe_jax.prepare_experts(packed.ours())
    return tag(rows, "row", "in"), weight, tag(jnp.asarray(SIZES), "expert"), packed.values()


def oracle(rows, values, sizes=SIZES):
    result = np.zeros((len(rows), values.shape[1]))
    for row, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        result[row] = values[expert] @ np.asarray(rows[row], np.float64)
    return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_and_gradient(dtype, rng):
    rows, weight, sizes, values = operands(rng, dtype)
    tolerance = {"bfloat16": 0.02, "float32": 1e-5}[dtype]
    result = jax.jit(grouped_matmul)(rows, weight, sizes)
    np.testing.assert_allclose(
        np.asarray(result.array, np.float64), oracle(rows.array, values), rtol=tolerance, atol=0.02
    )
    cotangent = jnp.asarray(rng.normal(size=(20, 48)), dtype)
    _, pullback = jax.vjp(lambda r: grouped_matmul(r, weight, sizes).array, rows)
    (gradient,) = pullback(cotangent)
    np.testing.assert_allclose(
        np.asarray(gradient.array, np.float64),
        oracle(cotangent, values.transpose(0, 2, 1)),
        rtol=tolerance,
        atol=0.02,
    )


def test_the_weight_has_no_gradient(rng):
    rows, weight, sizes, _ = operands(rng)
    gradient = jax.grad(
        lambda w: grouped_matmul(rows, w, sizes).array.astype(jnp.float32).sum(), allow_int=True
    )(weight)
    assert gradient.words.array.dtype == jax.dtypes.float0
    assert not np.asarray(gradient.factor.array).any()


def test_cuda_gets_the_kernel(monkeypatch, rng):
    pytest.importorskip("triton", reason=MISSING)
    pytest.importorskip("jax_triton", reason=MISSING)
    called = []

    def call(kernel, *_, out_type, **options):
        called.append(kernel.fn.__name__)
        return jnp.zeros(out_type.shape, out_type.dtype)

    monkeypatch.setattr(launch, "_call", call)
    monkeypatch.setattr(launch, "cuda_capability", lambda: 90)
    rows, weight, sizes, _ = operands(rng)
    function = jax.jit(lambda r, w: grouped_matmul(r, w, sizes))
    function.trace(rows, weight).lower(lowering_platforms=("cuda",))
    assert called == ["rows_kernel"]
    function.trace(rows.astype(jnp.float32), weight).lower(lowering_platforms=("cpu",))
    assert called == ["rows_kernel"]
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        grouped_matmul(rows, weight, sizes, implementation="triton")
