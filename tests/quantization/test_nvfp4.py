"""NVFP4 against ml_dtypes' tables and against its definition stated in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from mxfp4_oracle import nibbles

from moe_jax import tag
from moe_jax.quantization import (
    PackedNVFP4,
    dequantize_nvfp4,
    fake_quantize_nvfp4,
    quantize_nvfp4,
)
from moe_jax.quantization.nvfp4 import LEAST_GLOBAL_SCALE, nvfp4_global_scale

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
MODES = {"eager": lambda f: f, "jit": jax.jit}
decode_jit = jax.jit(lambda w: w.dequantize(jnp.float32))
encode_jit = jax.jit(quantize_nvfp4, static_argnums=(1, 3))


def decode(blocks, scales, factor):
    """Values {..., in} from ml_dtypes' own types, in float64, rounded to float32."""
    codes = nibbles(blocks)
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    numbers = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    values = elements * numbers[..., None] * factor.astype(np.float64)[..., None]
    with np.errstate(over="ignore"):
        return values.astype(np.float32).reshape(*scales.shape[:-1], -1)


@np.errstate(invalid="ignore", over="ignore", under="ignore")
def encode(x, factor):
    """Codes {..., block, 16} and scales {..., block}; all steps in float32, casts by ml_dtypes."""
    x = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
    amax = np.abs(x).max(-1)
    scales = np.clip(amax / np.float32(6) / factor, np.float32(2**-6), np.float32(448))
    scales = np.where(np.isfinite(amax), scales, np.nan).astype(ml_dtypes.float8_e4m3fn)
    step = scales.astype(np.float32) * factor
    ratio = x / step[..., None]
    codes = ratio.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes, scales.view(np.uint8)


def packed(blocks, scales, factor, lead=("out",)):
    return PackedNVFP4(
        tag(jnp.asarray(blocks), *lead, "block", "byte"),
        tag(jnp.asarray(scales), *lead, "block"),
        tag(jnp.asarray(factor, jnp.float32), *lead[: np.ndim(factor)]),
    )


@pytest.fixture
def weights(rng):
    return packed(
        rng.integers(0, 256, (3, 5, 2, 8), dtype=np.uint8),
        rng.integers(40, 80, (3, 5, 2), dtype=np.uint8),
        np.array([1.0, 0.3, 7.0]),
        ("expert", "out"),
    )


def check_encoding(x, factor, axes=("out", "in")):
    got = encode_jit(tag(jnp.asarray(x), *axes), "in", tag(jnp.float32(factor)))
    codes, scales = encode(x, np.float32(factor))
    known = scales & 0x7F != 0x7F
    np.testing.assert_array_equal(np.asarray(got.scales.array)[known], scales[known])
    np.testing.assert_array_equal(np.asarray(got.scales.array)[~known] & 0x7F, 0x7F)
    np.testing.assert_array_equal(nibbles(np.asarray(got.blocks.array))[known], codes[known])
    return got


class TestDecode:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
    def test_every_code_under_every_scale(self, dtype, mode):
        """All 256 bytes, that is all pairs of codes, under each of the 256 scales."""
        blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(32, 8), (256, 32, 8))
        scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 32))
        blocks, scales = np.ascontiguousarray(blocks), np.ascontiguousarray(scales)
        function = MODES[mode](lambda w: w.dequantize(dtype))
        for factor in (1.0, 0.3, 2.0**-115, 3e38):  # with less some products are subnormal
            got = function(packed(blocks, scales, factor))
            assert got.axes == ("out", "in")
            full = np.full((256, 32), np.float32(factor))
            with np.errstate(over="ignore"):
                expected = decode(blocks, scales, full).astype(dtype)
            np.testing.assert_array_equal(
                np.asarray(got.array).astype(np.float64), expected.astype(np.float64)
            )

    def test_low_four_bits_come_first(self):
        blocks = np.zeros((1, 1, 8), np.uint8)
        blocks[0, 0, :2] = 0x21, 0xF7
        got = packed(blocks, np.array([[0x38]], np.uint8), 2.0).dequantize(jnp.float32).array
        np.testing.assert_array_equal(got[0, :4], [1.0, 2.0, 12.0, -12.0])

    def test_global_scale_of_each_expert(self, weights):
        got = decode_jit(weights)
        factor = np.asarray(weights.global_scale.array)[:, None, None]
        blocks, scales = np.asarray(weights.blocks.array), np.asarray(weights.scales.array)
        expected = decode(blocks, scales, np.broadcast_to(factor, scales.shape))
        assert got.axes == ("expert", "out", "in")
        np.testing.assert_array_equal(got.array, expected)


class TestPackedNVFP4:
    def test_logical_shape(self, weights):
        assert weights.sizes == {"expert": 3, "out": 5, "in": 32}
        assert weights.nbytes == 3 * 5 * 2 * 9 + 3 * 4
        assert weights.size("in") == 32 and weights.shape == (3, 5, 32)

    def test_take_and_rename(self, weights):
        chosen = tag(jnp.array([[2, 0], [1, 1]]), "s", "k")
        taken = weights.take(chosen, "expert")
        assert taken.axes == ("s", "k", "out", "in")
        whole = decode_jit(weights)
        np.testing.assert_array_equal(decode_jit(taken).array, whole.take(chosen, "expert").array)
        np.testing.assert_array_equal(
            decode_jit(weights.take(3, "out")).array, whole.take(3, "out").array
        )
        assert weights.rename(expert="e", **{"in": "d"}).dequantize().axes == ("e", "out", "d")
        with pytest.raises(ValueError, match="take works along"):
            weights.take(0, "in")

    def test_partition(self, rng):
        weights = packed(
            np.zeros((4, 5, 6, 8), np.uint8),
            np.zeros((4, 5, 6), np.uint8),
            np.ones(4),
            ("expert", "out"),
        )
        mesh = jax.make_mesh((4, 2), ("e", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        split = weights.partition(mesh, {"expert": "e", "in": "m"})
        assert split.blocks.array.sharding.spec == PartitionSpec("e", None, "m", None)
        assert split.scales.array.sharding.spec == PartitionSpec("e", None, "m")
        assert split.global_scale.array.sharding.spec == PartitionSpec("e")

    @pytest.mark.parametrize(
        ("leaf", "dtype"), [("blocks", np.int8), ("scales", np.float32), ("global_scale", np.int32)]
    )
    def test_dtypes(self, weights, leaf, dtype):
        leaves = {n: getattr(weights, n) for n in ("blocks", "scales", "global_scale")}
        leaves[leaf] = leaves[leaf].astype(dtype)
        with pytest.raises(TypeError, match=f"NVFP4 {leaf} must be"):
            PackedNVFP4(**leaves).dequantize()

    @pytest.mark.parametrize(
        ("blocks", "scales", "factor"),
        [
            ((3, 5, 2, 7), (3, 5, 2), 3),
            ((3, 5, 2, 8), (3, 5, 3), 3),
            ((3, 5, 2, 8), (3, 5, 2), 4),
        ],
        ids=["7 bytes", "a scale more", "a global scale more"],
    )
    def test_leaves_that_do_not_belong_together(self, blocks, scales, factor):
        weights = packed(
            np.zeros(blocks, np.uint8),
            np.zeros(scales, np.uint8),
            np.ones(factor),
            ("expert", "out"),
        )
        for use in (weights.dequantize, lambda: weights.sizes, lambda: weights.take(0, "out")):
            with pytest.raises(ValueError, match="NVFP4"):
                use()

    def test_global_scale_with_an_axis_of_its_own(self, weights):
        other = PackedNVFP4(weights.blocks, weights.scales, weights.global_scale.rename(expert="e"))
        with pytest.raises(ValueError, match="must have some of the axes"):
            other.check()


class TestEncode:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(data=st.binary(min_size=3 * 32 * 4, max_size=3 * 32 * 4), exponent=st.integers(60, 180))
    def test_any_bits(self, dtype, data, exponent):
        """Magnitudes within a factor of 64 of each other, so that all codes and scales occur."""
        bits = np.frombuffer(data, np.uint32).reshape(3, 32)
        bits = (bits & 0x807FFFFF) | (exponent + (bits >> 23 & 0xFF) % 6) << 23
        x = bits.view(np.float32)
        if dtype == jnp.float16:
            x = np.clip(x, -65504, 65504)
        check_encoding(x.astype(dtype), 2.0 ** (exponent - 127 - 4))

    @pytest.mark.parametrize("factor", [1.0, 0.3, 1e-30, 1e30, 2.0**-118])
    def test_ties_and_their_neighbours_under_every_scale(self, factor):
        """A block's largest is 6 scales; elements lie on, just below and just above the ties."""
        scales = np.arange(8, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        step = scales.astype(np.float32) * np.float32(factor)
        ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
        ties = (ties * step[:, None]).astype(np.float32)
        up, down = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))
        x = np.concatenate([ties, up, down, -ties, -up, -down], 1)
        largest = np.repeat(6 * step[:, None], 6, 1)  # one a block
        blocks = np.concatenate(
            [x.reshape(-1, 6, 7), largest[:, :, None], np.zeros((*largest.shape, 8))], 2
        )
        check_encoding(blocks.reshape(len(step), 96).astype(np.float32), factor)

    def test_saturates_where_the_scale_does(self):
        x = np.zeros((1, 16), np.float32)
        x[0, :3] = 6 * 448, -1e6, 1000
        got = check_encoding(x, 1.0)
        np.testing.assert_array_equal(got.scales.array, [[0x7E]])
        np.testing.assert_array_equal(nibbles(np.asarray(got.blocks.array))[0, 0, :3], [7, 15, 4])

    def test_zeros_and_tiny_blocks(self):
        x = np.zeros((4, 16), np.float32)
        x[1] = -0.0
        x[2] = 2.0**-9  # less than a quarter of the least scale, 2^-6
        x[3, 0] = 1e-44
        got = check_encoding(x, 1.0)
        np.testing.assert_array_equal(got.scales.array, np.full((4, 1), 8))
        np.testing.assert_array_equal(decode_jit(got).array, np.zeros((4, 16)))
        zeros = encode_jit(tag(jnp.zeros((3, 16)), "out", "in"), "in", None)
        assert float(zeros.global_scale.array) == LEAST_GLOBAL_SCALE
        np.testing.assert_array_equal(decode_jit(zeros).array, np.zeros((3, 16)))

    @pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
    def test_nan_and_infinity_make_their_block_nan_and_no_other(self, bad):
        x = np.ones((1, 48), np.float32)
        x[0, 20] = bad
        got = encode_jit(tag(jnp.asarray(x), "out", "in"), "in", None)
        decoded = np.asarray(decode_jit(got).array)
        np.testing.assert_array_equal(np.isnan(decoded[0]), np.repeat([False, True, False], 16))
        np.testing.assert_allclose(decoded[0, :16], 1, rtol=1e-6)

    def test_chosen_global_scale_takes_the_largest_to_the_largest(self, rng):
        w = rng.normal(size=(3, 5, 32)).astype(np.float32) * np.float32([[[1e-3]], [[1]], [[1e4]]])
        got = encode_jit(tag(jnp.asarray(w), "expert", "out", "in"), "in", None)
        amax = np.abs(w).max((1, 2))
        assert got.global_scale.axes == ("expert",)
        np.testing.assert_array_equal(got.global_scale.array, amax / np.float32(6 * 448))
        assert (np.asarray(got.scales.array).max((1, 2)) == 0x7E).all()
        one = nvfp4_global_scale(tag(jnp.asarray(w), "expert", "out", "in"))
        np.testing.assert_array_equal(one.array, amax.max() / np.float32(6 * 448))
        decoded = np.asarray(decode_jit(got).array)
        assert np.abs(decoded - w).max() < amax.max() / 6

    def test_axis_by_name_and_decoded_values_encode_to_themselves(self, rng):
        w = tag(jnp.asarray(rng.normal(size=(32, 3, 5)), jnp.float32), "d", "expert", "out")
        got = encode_jit(w, "d")
        assert got.axes == ("expert", "out", "d")
        first = decode_jit(got)
        again = decode_jit(encode_jit(first, "d", got.global_scale))
        np.testing.assert_array_equal(again.array, first.array)

    def test_refusals(self):
        with pytest.raises(ValueError, match="divisible by 16"):
            quantize_nvfp4(tag(jnp.ones((2, 24)), "out", "in"))
        with pytest.raises(TypeError, match="Tagged"):
            quantize_nvfp4(jnp.ones((2, 16)))  # pyright: ignore[reportArgumentType]
        w = tag(jnp.ones((2, 16)), "out", "in")
        with pytest.raises(ValueError, match="must have some of the axes"):
            quantize_nvfp4(w, "in", tag(jnp.ones(16), "in"))
        with pytest.raises(TypeError, match="global_scale must be float32"):
            quantize_nvfp4(w, "in", tag(jnp.int32(1)))
        with pytest.raises(TypeError, match="must be Tagged"):
            quantize_nvfp4(w, "in", 1.0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="not int8"):
            dequantize_nvfp4(quantize_nvfp4(w), jnp.int8)


class TestFakeQuantize:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
    def test_is_encoding_and_decoding(self, rng, dtype):
        x = rng.normal(size=(32, 3)).astype(dtype)
        function = jax.jit(fake_quantize_nvfp4, static_argnums=1)
        got = function(tag(jnp.asarray(x), "in", "s"), "in", tag(jnp.float32(0.01)))
        assert got.axes == ("in", "s") and got.dtype == dtype
        codes, scales = encode(x.T, np.float32(0.01))
        full = np.full(scales.shape, np.float32(0.01))
        expected = decode(codes[..., 0::2] | codes[..., 1::2] << 4, scales, full)
        np.testing.assert_array_equal(np.asarray(got.array), expected.astype(dtype).T)

    def test_gradient_passes_straight_through(self, rng):
        x = tag(jnp.asarray(rng.normal(size=(3, 32)), jnp.float32), "s", "in")
        factors = jnp.asarray(rng.normal(size=(3, 32)), jnp.float32)

        def loss(x, scale):
            return (fake_quantize_nvfp4(x, "in", scale).array * factors).sum()

        for transform in (jax.grad, jax.jacfwd):
            gradients = jax.jit(transform(loss, (0, 1)))(x, tag(jnp.float32(0.01)))
            np.testing.assert_array_equal(gradients[0].array, factors)
            assert jax.tree.leaves(gradients[1])[0] == 0
