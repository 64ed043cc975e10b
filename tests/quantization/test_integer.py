"""Integers in groups against their definition stated in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from moe_jax import tag
from moe_jax.quantization import (
    PackedIntegers,
    dequantize_integers,
    fake_quantize_integers,
    quantize_integers,
)
from moe_jax.quantization.codes import pack_codes, unpack_codes

BITS = [2, 4, 8]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
decode_jit = jax.jit(lambda w: w.dequantize(jnp.float32))
encode_jit = jax.jit(quantize_integers, static_argnums=(1, 2, 3, 4))


def codes_of(packed, bits):
    """uint8 [..., bytes] -> [..., codes], the lowest bits first, one at a time."""
    packed = np.asarray(packed)
    each = 8 // bits
    codes = np.zeros((*packed.shape[:-1], packed.shape[-1] * each), np.uint8)
    for place in range(each):
        codes[..., place::each] = packed >> (bits * place) & (2**bits - 1)
    return codes


def decode(codes, scales, zeros, bits):
    """Values {..., in} in float64 of uint8 [..., group, byte], rounded to float32."""
    wide = codes_of(codes, bits).astype(np.float64)
    zeros = 2 ** (bits - 1) if zeros is None else zeros[..., None].astype(np.float64)
    values = (wide - zeros) * scales[..., None].astype(np.float64)
    with np.errstate(over="ignore"):
        return values.astype(np.float32).reshape(*scales.shape[:-1], -1)


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def encode(x, bits, group, zero_points):
    """Codes [..., group, element], scales and zero points; float32 as stated."""
    x = x.astype(np.float32).reshape(*x.shape[:-1], -1, group)
    top = np.float32(2**bits - 1)
    if zero_points:
        low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        scale = (high / 2 - low / 2) / (top / 2)
        zero = np.clip(np.round(-low / np.where(scale > 0, scale, 1)), 0, top)
    else:
        scale = np.abs(x).max(-1) / np.float32(2 ** (bits - 1) - 1)
        zero = np.full(scale.shape, np.float32(2 ** (bits - 1)))
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)
    scale = np.where(np.isfinite(x).all(-1), scale, np.float32(np.nan))
    steps = np.round(x / np.where(scale > 0, scale, 1)[..., None])
    codes = np.clip(steps + zero[..., None], 0, top)
    zero = np.where(scale > 0, zero, 0 if zero_points else zero)
    codes = np.where((scale > 0)[..., None], codes, zero[..., None])
    return codes.astype(np.uint8), scale, zero.astype(np.uint8)


def packed(rng, bits, zero_points=True, dtype=np.float32):
    codes = rng.integers(0, 256, (3, 5, 2, 2 * bits), dtype=np.uint8)  # groups of 16
    scales = rng.uniform(0.1, 2, (3, 5, 2)).astype(dtype)
    zeros = rng.integers(0, 2**bits, (3, 5, 2), dtype=np.uint8)
    axes = "expert", "out", "group"
    return PackedIntegers(
        tag(jnp.asarray(codes), *axes, "byte"),
        tag(jnp.asarray(scales), *axes),
        tag(jnp.asarray(zeros), *axes) if zero_points else None,
        bits,
    )


class TestDecode:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
    def test_every_byte_under_every_zero_point(self, bits, dtype):
        each = 256 * 8 // bits
        zeros = np.arange(2**bits, dtype=np.uint8)
        codes = np.broadcast_to(np.arange(256, dtype=np.uint8), (2**bits, 1, 256))
        scales = np.linspace(0.01, 3, 2**bits, dtype=np.float32)[:, None]
        weights = PackedIntegers(
            tag(jnp.asarray(codes), "out", "group", "byte"),
            tag(jnp.asarray(scales), "out", "group"),
            tag(jnp.asarray(zeros[:, None]), "out", "group"),
            bits,
        )
        assert weights.sizes == {"out": 2**bits, "in": each}
        expected = decode(codes, scales, zeros[:, None], bits)
        for function in (dequantize_integers, jax.jit(dequantize_integers, static_argnums=1)):
            got = function(weights, dtype)
            np.testing.assert_array_equal(np.asarray(got.array), expected.astype(dtype))

    @pytest.mark.parametrize("bits", BITS)
    def test_default_zero_point(self, rng, bits):
        weights = packed(rng, bits, zero_points=False)
        got = decode_jit(weights)
        leaves = np.asarray(weights.codes.array), np.asarray(weights.scales.array)
        np.testing.assert_array_equal(got.array, decode(*leaves, None, bits))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_scales_of_other_floats(self, rng, dtype):
        weights = packed(rng, 4, dtype=dtype)
        leaves = (np.asarray(leaf) for leaf in jax.tree.leaves(weights))
        np.testing.assert_array_equal(decode_jit(weights).array, decode(*leaves, 4))

    @pytest.mark.parametrize("library", [jnp, np])
    def test_lowest_bits_come_first(self, library):
        byte = library.asarray([[0b11_10_01_00]], np.uint8)
        np.testing.assert_array_equal(unpack_codes(byte, 2), [[0, 1, 2, 3]])
        np.testing.assert_array_equal(unpack_codes(byte, 4), [[0b0100, 0b1110]])
        for bits, count in ((2, 5), (4, 3), (8, 2)):
            codes = library.asarray(np.arange(count)[None] % 2**bits, np.uint8)
            whole = pack_codes(codes, bits)
            assert isinstance(whole, type(codes)) and whole.dtype == np.uint8
            assert whole.shape == (1, -(-count * bits // 8))
            np.testing.assert_array_equal(unpack_codes(whole, bits)[:, :count], codes)


class TestPackedIntegers:
    def test_logical_shape(self, rng):
        weights = packed(rng, 2)
        assert weights.sizes == {"expert": 3, "out": 5, "in": 32} and weights.group_size == 16
        assert weights.nbytes == 3 * 5 * 2 * (4 + 4 + 1)

    def test_take_and_rename(self, rng):
        weights = packed(rng, 4)
        chosen = tag(jnp.array([[2, 0], [1, 1]]), "s", "k")
        taken = decode_jit(weights.take(chosen, "expert"))
        assert taken.axes == ("s", "k", "out", "in")
        whole = decode_jit(weights)
        np.testing.assert_array_equal(taken.array, whole.take(chosen, "expert").array)
        assert weights.rename(out="rows", **{"in": "d"}).axes == ("expert", "rows", "d")
        with pytest.raises(ValueError, match="take works along"):
            weights.take(0, "group")

    def test_partition(self, rng):
        weights = packed(rng, 4)
        mesh = jax.make_mesh((3, 2), ("e", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        split = weights.partition(mesh, {"expert": "e", "in": "m"})
        for leaf in (split.scales, split.zero_points):
            assert leaf.array.sharding.spec == PartitionSpec("e", None, "m")

    def test_leaves_that_do_not_belong_together(self, rng):
        good = packed(rng, 4)
        codes, scales, zeros = good.codes, good.scales, good.zero_points
        fewer = scales.take(tag(jnp.array([0]), "group"), "group")
        wrong = [
            (PackedIntegers(codes.astype(np.int8), scales, zeros), TypeError, "codes must be"),
            (PackedIntegers(codes, scales.astype(np.int32), zeros), TypeError, "not int32"),
            (PackedIntegers(codes, scales, zeros.astype(np.int8)), TypeError, "zero_points must"),
            (PackedIntegers(codes, scales, zeros, bits=3), ValueError, "bits must be one of"),
            (PackedIntegers(codes, fewer), ValueError, "a scale a group"),
            (PackedIntegers(codes.rename(out="o"), scales), ValueError, "equal leading axes"),
            (
                PackedIntegers(codes, scales, zeros.rename(out="o")),
                ValueError,
                "a zero point a group",
            ),
        ]
        for weights, error, match in wrong:
            for use in (weights.dequantize, lambda w=weights: w.sizes):
                with pytest.raises(error, match=match):
                    use()


def check_encoding(x, bits, group, zero_points):
    got = encode_jit(tag(jnp.asarray(x), "out", "in"), bits, group, "in", zero_points)
    codes, scales, zeros = encode(x, bits, group or x.shape[-1], zero_points)
    np.testing.assert_array_equal(got.scales.array, scales)
    known = ~np.isnan(scales)
    np.testing.assert_array_equal(codes_of(got.codes.array, bits)[known], codes[known])
    if zero_points:
        np.testing.assert_array_equal(np.asarray(got.zero_points.array)[known], zeros[known])
    return got


class TestEncode:
    @pytest.mark.parametrize("zero_points", [False, True])
    @pytest.mark.parametrize("bits", BITS)
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(data=st.binary(min_size=3 * 32 * 4, max_size=3 * 32 * 4), exponent=st.integers(0, 248))
    def test_any_bits(self, bits, zero_points, data, exponent):
        """Any floats, or with magnitudes within a factor of 64 of each other."""
        words = np.frombuffer(data, np.uint32).reshape(3, 32)
        if exponent:
            words = (words & 0x807FFFFF) | (exponent + (words >> 23 & 0xFF) % 6) << 23
        x = words.view(np.float32)
        tiny = np.abs(x) < np.finfo(np.float32).tiny  # XLA takes subnormal numbers for zeros
        check_encoding(np.where(tiny, 0, x).astype(np.float32), bits, 16, zero_points)

    @pytest.mark.parametrize("bits", BITS)
    def test_error_is_at_most_half_a_step(self, rng, bits):
        x = rng.normal(size=(7, 64)).astype(np.float32) + 0.5
        for zero_points in (False, True):
            got = check_encoding(x, bits, None, zero_points)
            assert got.scales.shape == (7, 1)
            error = np.abs(np.asarray(decode_jit(got).array) - x)
            assert (error <= np.asarray(got.scales.array) * 0.501).all() or zero_points
            assert (error <= np.asarray(got.scales.array) * 1.001).all()

    @pytest.mark.parametrize("zero_points", [False, True])
    def test_zeros_tiny_huge_and_unknown(self, zero_points):
        x = np.zeros((6, 16), np.float32)
        x[1, 0] = 2e-38
        x[2, :2] = 3.4e38, -3.4e38
        x[3, 3], x[4, 5], x[5] = np.nan, -np.inf, 1.5
        got = check_encoding(x, 4, 16, zero_points)
        decoded = np.asarray(decode_jit(got).array)
        np.testing.assert_array_equal(decoded[:2], 0)
        # the zero point is rounded: the range may begin half a step below the least number
        assert np.isfinite(decoded[2]).all() or zero_points
        np.testing.assert_array_equal(np.isnan(decoded).any(1), [0, 0, 0, 1, 1, 0])
        assert np.isnan(decoded[3:5]).all()
        np.testing.assert_allclose(decoded[5], 1.5, rtol=1e-6)

    def test_axis_by_name_and_refusals(self, rng):
        w = tag(jnp.asarray(rng.normal(size=(32, 3, 5)), jnp.float32), "d", "expert", "out")
        assert quantize_integers(w, 4, 16, "d").axes == ("expert", "out", "d")
        for bits, size, match in (
            (3, 16, "bits must be"),
            (4, 12, "divisible by 12"),
            (4, 1, "whole bytes"),
            (2, 2, "whole bytes"),
            (4, 0, "whole bytes"),
        ):
            with pytest.raises(ValueError, match=match):
                quantize_integers(w, bits, size, "d")
        with pytest.raises(TypeError, match="not int32"):
            quantize_integers(w.astype(jnp.int32), 4, 16, "d")


@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_and_its_gradient(rng, bits):
    x = rng.normal(size=(32, 3)).astype(np.float32)
    named, factors = tag(jnp.asarray(x), "in", "s"), jnp.asarray(x[::-1].copy())
    fake_quantize = jax.jit(fake_quantize_integers, static_argnums=(1, 2, 3, 4))
    got = fake_quantize(named, bits, 16, "in", True)
    codes, scales, zeros = encode(x.T, bits, 16, True)
    expected = (codes - zeros[..., None].astype(np.float32)) * scales[..., None]
    assert got.axes == ("in", "s")
    np.testing.assert_array_equal(got.array, expected.reshape(3, 32).T)
    gradient = jax.grad(lambda x: (fake_quantize(x, bits).array * factors).sum())(named)
    np.testing.assert_array_equal(gradient.array, factors)
