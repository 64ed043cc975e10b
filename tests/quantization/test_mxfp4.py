"""MXFP4 against ml_dtypes' tables and against the specification stated in NumPy float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from mxfp4_oracle import decode_mxfp4, nibbles

from moe_jax import Tagged, tag, transforms
from moe_jax.quantization import (
    BlockScaled,
    dequantize_mxfp4,
    fake_quantize_mxfp4,
    quantize_mxfp4,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
MODES = {"eager": lambda f: f, "jit": jax.jit}
jitted_quantize = jax.jit(quantize_mxfp4, static_argnums=1)
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TRANSFORMERS = dict(np.load(Path(__file__).with_name("goldens_mxfp4.npz")))


@np.errstate(divide="ignore", invalid="ignore")
def encode(values):
    """Codes {..., block, 32} and scales {..., block}: the OCP specification, section 6.3."""
    x = values.astype(np.float64).reshape(*values.shape[:-1], -1, 32)
    largest = np.abs(x).max(-1)
    finite = np.isfinite(largest)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1 - 2, -127)
    exponent = np.clip(exponent, -127, 127)
    ratio = np.where(finite[..., None], np.abs(x) / np.exp2(exponent)[..., None], 0)
    distance = np.abs(np.minimum(ratio, 6)[..., None] - GRID)
    nearest = distance == distance.min(-1, keepdims=True)
    even = np.where(nearest & (np.arange(8) % 2 == 0), 0, 1)
    codes = np.argmin(np.where(nearest, even, 2), -1)
    codes = codes | np.where(np.signbit(x), 8, 0)
    return codes.astype(np.uint8), np.where(finite, exponent + 127, 255).astype(np.uint8)


def same_floats(got, expected):
    """Bit for bit the same, but for the bits of NaN."""
    assert got.dtype == expected.dtype
    bits = f"u{got.itemsize}"
    nan = np.isnan(expected.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float64)), nan)
    np.testing.assert_array_equal(got.view(bits)[~nan], expected.view(bits)[~nan])


def packed(blocks, scales):
    lead = ("expert", "out")[3 - scales.ndim :]
    return BlockScaled(
        tag(jnp.asarray(blocks), *lead, "block", "byte"), tag(jnp.asarray(scales), *lead, "block")
    )


@pytest.fixture
def weights(rng):
    return packed(
        rng.integers(0, 256, (3, 5, 2, 16), dtype=np.uint8),
        rng.integers(100, 140, (3, 5, 2), dtype=np.uint8),
    )


def every_code_and_scale():
    """All 256 bytes, that is all pairs of codes, under each of the 256 scales."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))
    return np.ascontiguousarray(blocks), np.ascontiguousarray(scales)


class TestDecode:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
    def test_every_code_under_every_scale(self, dtype, mode):
        blocks, scales = every_code_and_scale()
        weights = packed(blocks, scales)
        got = MODES[mode](lambda w: w.dequantize(dtype))(weights)
        assert got.axes == ("out", "in")
        with np.errstate(over="ignore"):
            expected = decode_mxfp4(blocks, scales).astype(dtype)
        same_floats(np.asarray(got.array), expected)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
    def test_q1_decodes_as_transformers_do(self, dtype, record_property):
        """Bit for bit up to 2^127; byte 255 is NaN here, as specified, and 2^128 there."""
        blocks = np.broadcast_to(np.arange(16, dtype=np.uint8) * 17, (256, 1, 16))
        weights = packed(blocks, np.arange(256, dtype=np.uint8)[:, None])
        got = np.asarray(jax.jit(lambda w: w.dequantize(dtype))(weights).order("in", "out").array)
        theirs = TRANSFORMERS[jnp.dtype(dtype).name]
        np.testing.assert_array_equal(got.view(theirs.dtype)[:, :255], theirs[:, :255])
        assert np.isnan(got[:, 255].astype(np.float64)).all()
        assert np.isinf(theirs.view(got.dtype)[4:16, 255].astype(np.float64)).all()
        record_property("row", "Q1")
        record_property("with", str(TRANSFORMERS["versions"]))
        record_property("error", 0.0)
        record_property("trap", "7")

    def test_low_four_bits_come_first(self):
        blocks = np.zeros((1, 16), np.uint8)
        blocks[0, :2] = 0x21, 0xF7
        got = packed(blocks, np.array([128], np.uint8)).dequantize(jnp.float32).array
        np.testing.assert_array_equal(got[:4], [1.0, 2.0, 12.0, -12.0])

    def test_float16_is_rounded_once_from_float32(self):
        blocks, scales = np.full((2, 16), 0x77, np.uint8), np.array([142, 103], np.uint8)
        got = np.asarray(packed(blocks, scales).dequantize(jnp.float16).array)
        assert np.isinf(got[0])  # 6 x 2^15
        assert got[32] == 6 * 2.0**-24

    @pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.complex64])
    def test_other_dtypes_are_refused(self, weights, dtype):
        with pytest.raises(TypeError, match="float32, bfloat16 and float16"):
            dequantize_mxfp4(weights, dtype)

    def test_vmap_over_experts(self, weights):
        whole = weights.dequantize(jnp.float32)
        mapped = transforms.vmap(lambda w: w.dequantize(jnp.float32), "expert")(weights)
        assert mapped.axes == ("expert", "out", "in")
        np.testing.assert_array_equal(mapped.array, whole.array)
        bare = jax.vmap(lambda b, s: packed(b, s).dequantize(jnp.float32).array)(
            jnp.asarray(weights.blocks.array), jnp.asarray(weights.scales.array)
        )
        np.testing.assert_array_equal(bare, whole.array)

    def test_zero_sizes(self):
        empty = packed(np.zeros((0, 4, 2, 16), np.uint8), np.zeros((0, 4, 2), np.uint8))
        assert empty.dequantize().sizes == {"expert": 0, "out": 4, "in": 64}


class TestBlockScaled:
    def test_logical_shape(self, weights):
        assert weights.axes == ("expert", "out", "in")
        assert weights.sizes == {"expert": 3, "out": 5, "in": 64}
        assert weights.shape == (3, 5, 64)
        assert weights.size("in") == 64
        assert weights.nbytes == 3 * 5 * 2 * 17
        with pytest.raises(ValueError, match="no axis 'block'"):
            weights.size("block")

    @pytest.mark.parametrize("mode", MODES)
    def test_take(self, weights, mode):
        chosen = tag(jnp.array([[2, 0], [1, 1]]), "s", "k")
        taken = MODES[mode](lambda w, i: w.take(i, "expert"))(weights, chosen)
        assert taken.axes == ("s", "k", "out", "in")
        expected = weights.dequantize(jnp.float32).take(chosen, "expert")
        np.testing.assert_array_equal(taken.dequantize(jnp.float32).array, expected.array)
        one = weights.take(1, "expert")
        assert one.axes == ("out", "in")
        np.testing.assert_array_equal(one.blocks.array, weights.blocks.array[1])

    @pytest.mark.parametrize("axis", ["in", "block", "byte"])
    def test_take_leaves_blocks_whole(self, weights, axis):
        with pytest.raises(ValueError, match="take works along"):
            weights.take(0, axis)

    def test_rename(self, weights):
        renamed = weights.rename(out="rows", **{"in": "d"})
        assert renamed.axes == ("expert", "rows", "d")
        assert renamed.dequantize(jnp.float32).axes == ("expert", "rows", "d")

    def test_partition_spreads_both_leaves_alike(self, rng):
        weights = packed(
            rng.integers(0, 256, (4, 5, 6, 16), dtype=np.uint8),
            rng.integers(100, 140, (4, 5, 6), dtype=np.uint8),
        )
        mesh = jax.make_mesh((4, 2), ("e", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        split = weights.partition(mesh, {"expert": "e", "in": "m"})
        assert split.blocks.array.sharding.spec == PartitionSpec("e", None, "m", None)
        assert split.scales.array.sharding.spec == PartitionSpec("e", None, "m")
        np.testing.assert_array_equal(split.blocks.array, weights.blocks.array)

    def test_survives_jax_transformations(self, weights):
        leaves, treedef = jax.tree.flatten(weights)
        assert [leaf.shape for leaf in leaves] == [(3, 5, 2, 16), (3, 5, 2)]
        assert jax.tree.unflatten(treedef, leaves).axes == weights.axes
        shapes = jax.eval_shape(lambda w: w, weights)
        assert shapes.sizes == weights.sizes

    @pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float32])
    @pytest.mark.parametrize("leaf", ["blocks", "scales"])
    def test_only_uint8(self, weights, leaf, dtype, record_property):
        record_property("bad_input", "MXFP4 dtype")
        leaves = {"blocks": weights.blocks, "scales": weights.scales}
        leaves[leaf] = leaves[leaf].astype(dtype)
        with pytest.raises(TypeError, match=f"MXFP4 {leaf} must be uint8"):
            BlockScaled(**leaves).dequantize()

    @pytest.mark.parametrize(
        ("blocks", "scales"),
        [
            (tag(np.zeros((2, 3, 15), np.uint8), "out", "block", "byte"), (2, 3)),
            (tag(np.zeros((2, 4, 16), np.uint8), "out", "block", "byte"), (2, 3)),
            (tag(np.zeros((3, 3, 16), np.uint8), "out", "block", "byte"), (2, 3)),
            (tag(np.zeros((2, 3, 16), np.uint8), "rows", "block", "byte"), (2, 3)),
            (tag(np.zeros((2, 16, 3), np.uint8), "out", "byte", "block"), (2, 3)),
        ],
        ids=["15 bytes", "a block more", "a row more", "other name", "other order"],
    )
    def test_leaves_that_do_not_belong_together(self, blocks, scales, record_property):
        record_property("bad_input", "MXFP4 blocks/scales mismatch")
        weights = BlockScaled(blocks, tag(np.zeros(scales, np.uint8), "out", "block"))
        for method in (weights.dequantize, lambda: weights.sizes, lambda: weights.take(0, "out")):
            with pytest.raises(ValueError, match="MXFP4 needs"):
                method()


def check_encoding(values):
    got = jitted_quantize(tag(jnp.asarray(values), "out", "in"))
    codes, scales = encode(values)
    np.testing.assert_array_equal(got.scales.array, scales)
    known = scales != 255
    np.testing.assert_array_equal(nibbles(np.asarray(got.blocks.array))[known], codes[known])


class TestEncode:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.binary(min_size=3 * 64 * 4, max_size=3 * 64 * 4), exponent=st.integers(-1, 249))
    def test_any_bits(self, dtype, data, exponent):
        """Any floats, subnormal numbers, infinities and NaN among them.

        With an exponent, all magnitudes of float32 and bfloat16 are pulled within a factor of 64,
        so that all codes occur.
        """
        bits = np.frombuffer(data, np.uint32).reshape(3, 64)
        if exponent >= 0:
            bits = (bits & 0x807FFFFF) | (exponent + (bits >> 23 & 0xFF) % 6) << 23
        if jnp.dtype(dtype).itemsize == 2:
            bits = (bits >> 16).astype(np.uint16)
        check_encoding(bits.view(dtype))

    @pytest.mark.parametrize("exponent", [*range(-149, -118), -1, 0, 1, 60, *range(120, 128)])
    def test_ties_and_their_neighbours_at_every_scale(self, exponent):
        """A block's largest is 2^exponent; elements lie on, just below and just above the ties."""
        ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5]) * 2.0 ** (exponent - 2)
        ties = ties.astype(np.float32)
        near = np.stack(
            [np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(9))]
        )
        largest = np.float32(2.0**exponent)
        block = np.concatenate([near.ravel(), [largest], np.zeros(13, np.float32)])
        block = np.where(np.abs(block) <= largest, block, 0)
        check_encoding(np.stack([block, -block]))

    @pytest.mark.parametrize(
        "largest", [1.0, 1.5, 1.75, 1.9999999, 2.0, 6.0, 7.0, 7.9999995, 3.4028235e38]
    )
    def test_largest_magnitude(self, largest):
        values = np.linspace(-largest, largest, 32, dtype=np.float32)[None]
        check_encoding(values)
        decoded = jitted_quantize(tag(jnp.asarray(values), "out", "in")).dequantize(jnp.float32)
        assert np.isfinite(decoded.array).all()

    def test_saturates_at_six_scales(self):
        values = np.zeros((1, 32), np.float32)
        values[0, :3] = 7.9, -7.9, 5.5
        got = jitted_quantize(tag(jnp.asarray(values), "out", "in"))
        np.testing.assert_array_equal(got.scales.array, [[127]])
        np.testing.assert_array_equal(nibbles(np.asarray(got.blocks.array))[0, 0, :3], [7, 15, 7])

    def test_block_of_zeros(self):
        got = jitted_quantize(tag(jnp.array([[0.0, -0.0] * 16]), "out", "in"))
        np.testing.assert_array_equal(got.scales.array, [[0]])
        np.testing.assert_array_equal(got.blocks.array, np.full((1, 1, 16), 0x80))
        np.testing.assert_array_equal(got.dequantize(jnp.float32).array, np.zeros((1, 32)))

    @pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
    def test_nan_and_infinity_make_their_block_nan_and_no_other(self, bad):
        values = np.ones((1, 96), np.float32)
        values[0, 40] = bad
        got = jitted_quantize(tag(jnp.asarray(values), "out", "in"))
        np.testing.assert_array_equal(got.scales.array, [[125, 255, 125]])
        decoded = np.asarray(got.dequantize(jnp.float32).array)
        np.testing.assert_array_equal(np.isnan(decoded[0]), np.repeat([False, True, False], 32))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
    def test_decoded_values_encode_to_the_same_values(self, rng, dtype):
        blocks = rng.integers(0, 256, (256, 7, 16), dtype=np.uint8)
        scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 7, 1)
        first = packed(blocks, scales).dequantize(dtype)
        again = jitted_quantize(first).dequantize(dtype)
        finite = np.abs(decode_mxfp4(blocks, scales).reshape(256, 7, 32)).max(-1) < 2.0**128
        assert finite.sum() > 250 * 7
        finite = np.repeat(finite, 32, -1)
        got, expected = np.asarray(again.array), np.asarray(first.array)
        np.testing.assert_array_equal(
            got.view("u1").reshape(256, 224, -1)[finite],
            expected.view("u1").reshape(256, 224, -1)[finite],
        )

    def test_axis_by_name(self, rng):
        values = rng.standard_normal((64, 3, 5)).astype(np.float32)
        got = jitted_quantize(tag(jnp.asarray(values), "d", "expert", "out"), axis="d")
        assert got.axes == ("expert", "out", "d")
        codes, scales = encode(values.transpose(1, 2, 0))
        np.testing.assert_array_equal(nibbles(np.asarray(got.blocks.array)), codes)
        np.testing.assert_array_equal(got.scales.array, scales)

    def test_jit_and_vmap(self, rng):
        w = tag(
            jnp.asarray(rng.standard_normal((3, 5, 64)).astype(np.float32)), "expert", "out", "in"
        )
        expected = quantize_mxfp4(w)
        for other in (jax.jit(quantize_mxfp4)(w), transforms.vmap(quantize_mxfp4, "expert")(w)):
            assert other.axes == expected.axes
            np.testing.assert_array_equal(other.blocks.array, expected.blocks.array)
            np.testing.assert_array_equal(other.scales.array, expected.scales.array)

    def test_refusals(self, record_property):
        record_property("bad_input", "MXFP4 in not divisible by 32")
        with pytest.raises(ValueError, match="divisible by 32"):
            quantize_mxfp4(tag(jnp.ones((2, 48)), "out", "in"))
        with pytest.raises(ValueError, match="no axis 'in'"):
            quantize_mxfp4(tag(jnp.ones((2, 64)), "out", "d"))
        with pytest.raises(TypeError, match="int32"):
            quantize_mxfp4(tag(jnp.ones((2, 64), jnp.int32), "out", "in"))
        with pytest.raises(TypeError, match="Tagged"):
            quantize_mxfp4(jnp.ones((2, 64)))  # pyright: ignore[reportArgumentType]


class TestFakeQuantize:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
    def test_is_encoding_and_decoding(self, rng, dtype):
        values = rng.standard_normal((64, 3)).astype(dtype)
        got = fake_quantize_mxfp4(tag(jnp.asarray(values), "in", "out"))
        assert got.axes == ("in", "out") and got.dtype == dtype
        codes, scales = encode(values.T)
        expected = decode_mxfp4(codes[..., 0::2] | codes[..., 1::2] << 4, scales)
        np.testing.assert_array_equal(np.asarray(got.array).astype(np.float64), expected.T)

    def test_gradient_passes_straight_through(self, rng):
        w = tag(jnp.asarray(rng.standard_normal((3, 64)).astype(np.float32)), "out", "in")
        factors = tag(jnp.asarray(rng.standard_normal((3, 64)).astype(np.float32)), "out", "in")

        def loss(w: Tagged) -> jax.Array:
            return (fake_quantize_mxfp4(w) * factors).array.sum()

        for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.jacfwd(loss)):
            np.testing.assert_array_equal(jax.tree.leaves(gradient(w))[0], factors.array)
