"""Tiled MXFP4 against the layout's formulas, code by code, and against what it was made of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from mxfp4_oracle import nibbles

from moe_jax import BlockScaled, Tagged, TiledMXFP4, tag, tile_mxfp4, transforms

ALGORITHMS = ("per_token", "dense", "grouped", "fixed_budget")
EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 8, 64, 96, 12


def packed(blocks, scales) -> BlockScaled:
    return BlockScaled(
        tag(blocks, "expert", "out", "block", "byte"), tag(scales, "expert", "out", "block")
    )


def random_bytes(rng, experts: int, outputs: int, blocks: int, scales=(0, 256)) -> BlockScaled:
    return packed(
        rng.integers(0, 256, (experts, outputs, blocks, 16), dtype=np.uint8),
        rng.integers(*scales, (experts, outputs, blocks), dtype=np.uint8),
    )


def code_of_half(half: int, o: int) -> int:
    """Code o of the four in a 16-bit half."""
    if o == 3:
        return (half >> 14 & 1) << 3 | (half >> 13 & 1) << 2 | (half >> 10 & 3)
    sign, magnitude = ((15, 6), (12, 3), (9, 0))[o]
    return (half >> sign & 1) << 3 | (half >> magnitude & 7)


def codes_of_tile(words: np.ndarray) -> np.ndarray:
    """int32 [lane, word] -> the codes [row, input] of one tile."""
    codes = np.full((16, 64), -1)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for word in range(4):
            a, r = divmod(word, 2)
            bits = int(words[lane, word]) & 0xFFFFFFFF
            for b in range(2):
                for o in range(4):
                    p, h = divmod(o, 2)
                    k = 32 * a + 16 * p + 8 * h + 2 * t + b
                    assert codes[2 * g + r, k] == -1
                    codes[2 * g + r, k] = code_of_half(bits >> (16 * b) & 0xFFFF, o)
    return codes


class TestLayout:
    @pytest.mark.parametrize(("outputs", "blocks"), [(32, 4), (21, 3)])
    def test_codes_lie_where_the_formulas_say(self, rng, outputs, blocks):
        weight = random_bytes(rng, 2, outputs, blocks)
        words = np.asarray(tile_mxfp4(weight).words.untag(*WORDS))
        codes = nibbles(np.asarray(weight.blocks.array)).reshape(2, outputs, 32 * blocks)
        whole = np.zeros((2, words.shape[1] * 16, words.shape[2] * 64), np.int64)
        whole[:, :outputs, : 32 * blocks] = codes
        for e, i, j in np.ndindex(words.shape[:3]):
            expected = whole[e, 16 * i : 16 * i + 16, 64 * j : 64 * j + 64]
            np.testing.assert_array_equal(codes_of_tile(words[e, i, j]), expected)

    @pytest.mark.parametrize("top", [0, 128, 129, 254])
    def test_scales_lie_where_the_formulas_say(self, rng, top):
        weight = random_bytes(rng, 2, 21, 3, (0, top + 1))
        raw = np.asarray(weight.scales.array).copy()
        raw[0, 5, 1], raw[1, 7, 2], raw[1, 8, 0] = 255, top, 0
        tiled = tile_mxfp4(packed(np.asarray(weight.blocks.array), raw))
        offset = [max([int(s) for s in one.ravel() if s != 255]) - 128 for one in raw]
        offset = np.maximum(offset, 0)
        np.testing.assert_array_equal(tiled.offset.array, offset)
        words = np.asarray(tiled.scales.array).astype(np.int64)
        for e, row, block in np.ndindex(raw.shape):
            g, r = divmod(row % 16, 2)
            word = words[e, row // 16, block // 2, g]
            byte = word >> (8 * (2 * (block % 2) + r)) & 255
            s = raw[e, row, block]
            assert byte == (255 if s == 255 else int(s) + 126 - offset[e])
        factor = np.exp2(offset.astype(np.float64))[:, None].repeat(21, 1)
        factor[0, 5] = np.nan
        np.testing.assert_array_equal(tiled.factor.array, factor)

    def test_what_fills_tiles_up_is_zero(self, rng):
        weight = random_bytes(rng, 1, 17, 1, (200, 201))
        tiled = tile_mxfp4(weight)
        assert int(tiled.offset.array[0]) == 72
        last = np.asarray(tiled.scales.array)[0, 1, 0]
        # row 0 of the last tile has block 0, nothing else is real: scale 0, less the offset
        expected = np.full(8, 0x36363636)
        expected[0] = 0x363636FE
        np.testing.assert_array_equal(last, expected)
        assert not codes_of_tile(np.asarray(tiled.words.array)[0, 1, 0])[1:].any()

    def test_a_half_read_as_bfloat16_is_the_value(self):
        """The reason for the layout: a mask, a shift, a product with the scale's power of two."""
        values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        blocks = np.zeros((1, 16, 2, 16), np.uint8)
        blocks[0, 0, 0, 0::4] = 5  # input 8o, of every o: code 5 is 3.0
        tiled = tile_mxfp4(packed(blocks, np.full((1, 16, 2), 127, np.uint8)))
        half = np.uint16(int(tiled.words.array[0, 0, 0, 0, 0]) & 0xFFFF)
        last = (half << 1 & 0x8000) | (half >> 5 & 0x100) | (half >> 4 & 0xC0)
        parts = [half, half << 3, half << 6, last]
        scale = np.exp2(float(int(tiled.scales.array[0, 0, 0, 0]) & 255) - 127)
        for part in parts:
            one = np.array([part & 0x81C0], np.uint16).view(jnp.bfloat16).astype(np.float64)
            assert one[0] * scale == values[5]


WORDS = ("expert", "tile_out", "tile_in", "lane", "word")


class TestTiledMXFP4:
    @settings(max_examples=30, deadline=None)
    @given(
        st.sampled_from([0, 1, 3]),
        st.sampled_from([0, 1, 16, 17, 33]),
        st.sampled_from([0, 1, 2, 3]),
        st.integers(0, 2**32),
    )
    def test_untile_is_the_inverse(self, experts, outputs, blocks, seed):
        weight = random_bytes(np.random.default_rng(seed), experts, outputs, blocks)
        tiled = tile_mxfp4(weight).check()
        assert (tiled.axes, tiled.sizes, tiled.shape) == (weight.axes, weight.sizes, weight.shape)
        assert_same(tiled.untile(), weight)

    def test_every_code_with_every_scale(self):
        """One scale an expert, so that the offset takes all of its values; and all in one."""
        codes = np.arange(16, dtype=np.uint8).repeat(2).reshape(2, 16) * 17
        blocks = np.broadcast_to(codes[:, None], (256, 2, 3, 16)).copy()
        scales = np.arange(256, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(3, 2)
        for weight in (
            packed(blocks, scales),
            packed(blocks.reshape(1, 512, 3, 16), scales.reshape(1, 512, 3)),
        ):
            tiled = tile_mxfp4(weight)
            assert_same(tiled.untile(), weight)
            for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
                assert_same(tiled.dequantize(dtype), weight.dequantize(dtype))

    def test_is_packed_tight(self, rng):
        weight = random_bytes(rng, 3, 48, 4)
        tiled = tile_mxfp4(weight)
        assert tiled.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tiled))
        assert tiled.nbytes == weight.nbytes + 4 * 3 * 48 + 4 * 3

    @pytest.mark.parametrize(("outputs", "blocks"), [(256, 64), (250, 63)])
    def test_takes_no_large_temporaries(self, rng, outputs, blocks):
        weight = random_bytes(rng, 4, outputs, blocks)
        tiled = tile_mxfp4(weight)
        for function, argument in ((tile_mxfp4, weight), (TiledMXFP4.untile, tiled)):
            memory: Any = jax.jit(function).lower(argument).compile().memory_analysis()
            assert memory.output_size_in_bytes > 0.9 * weight.nbytes
            assert memory.temp_size_in_bytes < 1.3 * weight.nbytes

    def test_jit_vmap_and_other_leading_axes(self, rng):
        weight = random_bytes(rng, 6, 17, 3)
        expected = tile_mxfp4(weight)
        assert_same(jax.jit(tile_mxfp4)(weight), expected)
        assert_same(jax.jit(TiledMXFP4.untile)(expected), weight)
        assert_same(transforms.vmap(TiledMXFP4.untile, "expert")(expected), weight)
        assert_same(transforms.vmap(tile_mxfp4, "expert")(weight), expected)
        split = BlockScaled(
            weight.blocks.split("expert", layer=2, expert=3),
            weight.scales.split("expert", layer=2, expert=3),
        )
        tiled = tile_mxfp4(split)
        assert tiled.sizes == {"layer": 2, "expert": 3, "out": 17, "in": 96}
        assert_same(tiled.untile(), split)

    def test_take(self, rng):
        weight = random_bytes(rng, 5, 17, 3)
        tiled = tile_mxfp4(weight)
        for indices in (3, -1, jnp.asarray(2), tag(jnp.array([[4, 0], [1, 1]]), "s", "top")):
            got = tiled.take(indices, "expert")
            assert_same(got.untile(), weight.take(indices, "expert"))
            assert got.axes == weight.take(indices, "expert").axes
        for axis in ("out", "in", "lane"):
            with pytest.raises(ValueError, match=f"got '{axis}'"):
                tiled.take(0, axis)

    def test_rename(self, rng):
        weight = random_bytes(rng, 2, 17, 3)
        names = {"out": "rows", "in": "columns", "expert": "e"}
        got = tile_mxfp4(weight).rename(**names)
        assert got.sizes == {"e": 2, "rows": 17, "columns": 96}
        assert_same(got.untile(), weight.rename(**names))
        assert got.size("columns") == 96
        with pytest.raises(ValueError, match="no axis 'd'"):
            got.rename(d="in")

    @pytest.mark.parametrize(
        ("rules", "outputs", "blocks"),
        [
            ({"expert": "e"}, 17, 3),
            ({"expert": ("e", "m")}, 17, 3),
            ({"expert": "e", "out": "m"}, 64, 2),
            ({"expert": "e", "in": "m"}, 16, 8),
        ],
    )
    def test_partition(self, rng, rules, outputs, blocks):
        mesh = jax.make_mesh((4, 2), ("e", "m"), axis_types=(AxisType.Auto,) * 2)
        weight = random_bytes(rng, 8, outputs, blocks)
        placed = tile_mxfp4(weight).partition(mesh, rules)
        expected = PartitionSpec(*(rules.get(axis) for axis in ("expert", "out", "in")), None, None)
        assert placed.words.array.sharding.spec == expected
        assert_same(placed.untile(), weight)
        # a weight that is spread already is tiled where it lies
        again = tile_mxfp4(weight.partition(mesh, rules))
        assert_same(again, tile_mxfp4(weight))
        if "out" not in rules and "in" not in rules:
            sharding = placed.words.array.sharding
            assert again.words.array.sharding.is_equivalent_to(sharding, 5)
            assert again.factor.array.sharding.spec == PartitionSpec(rules["expert"])

    def test_tiling_a_spread_weight_moves_nothing_between_devices(self, rng):
        mesh = jax.make_mesh((8,), ("e",), axis_types=(AxisType.Auto,))
        weight = random_bytes(rng, 8, 17, 3).partition(mesh, {"expert": "e"})
        program: Any = jax.jit(tile_mxfp4).lower(weight).compile().as_text()
        assert not any(name in program for name in ("all-gather", "all-to-all", "all-reduce"))

    def test_tiles_are_not_cut(self, rng):
        mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))
        tiled = tile_mxfp4(random_bytes(rng, 2, 16, 2))
        for axis in ("out", "in"):
            with pytest.raises(ValueError, match=f"axis 'tile_{axis}' of size 1"):
                tiled.partition(mesh, {axis: "m"})

    def test_refusals(self, rng):
        tiled = tile_mxfp4(random_bytes(rng, 2, 17, 3))
        leaves: dict[str, Any] = {
            "words": tiled.words,
            "scales": tiled.scales,
            "offset": tiled.offset,
        }
        leaves |= {"factor": tiled.factor, "in_size": 96}
        for name, dtype in (("words", jnp.float32), ("factor", jnp.bfloat16)):
            with pytest.raises(TypeError, match=f"tiled MXFP4 {name} must be"):
                TiledMXFP4(**{**leaves, name: leaves[name].astype(dtype)}).check()
        for name, leaf in (
            ("words", tiled.words.rename(lane="byte")),
            ("offset", tiled.offset.rename(expert="e")),
            ("factor", tiled.offset.astype(jnp.float32)),
        ):
            with pytest.raises(ValueError, match="equal leading axes"):
                TiledMXFP4(**{**leaves, name: leaf}).size("in")
        for name, leaf in (
            ("in_size", 128 + 32),
            ("in_size", 100),
            ("factor", Tagged(tiled.factor.array[:, :16], tiled.factor.axes)),
            ("factor", Tagged(tiled.factor.array[:1], tiled.factor.axes)),
            ("scales", Tagged(tiled.scales.array[:, :1], tiled.scales.axes)),
        ):
            with pytest.raises(ValueError, match="tiles of 16 outputs and 64 inputs"):
                TiledMXFP4(**{**leaves, name: leaf}).untile()
        with pytest.raises(ValueError, match="no axis 'd'"):
            tiled.size("d")
        with pytest.raises(TypeError, match="float64"):
            tiled.dequantize(np.float64)
        with pytest.raises(ValueError, match="needs? an axis of outputs"):
            tile_mxfp4(
                BlockScaled(
                    tag(np.zeros((2, 16), "u1"), "block", "byte"), tag(np.zeros(2, "u1"), "block")
                )
            )
        assert "words={expert=2, tile_out=2, tile_in=2, lane=32, word=4}" in str(tiled)
