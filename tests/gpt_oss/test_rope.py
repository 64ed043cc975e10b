"""Rotary positions against float64 NumPy and against transformers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
import tiny_model

from gpt_oss.rope import cos_sin, frequencies, rotate
from gpt_oss.yarn import YarnScaling
from moe_jax import tag

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))
POSITIONS = np.asarray([0, 1, 255, 256, 257, 4095, 4096, 65535, 100_003, 131_071], np.int32)

each_config = pytest.mark.parametrize("name", tiny.CONFIGS)


@each_config
def test_frequencies(name: str) -> None:
    expected, _ = oracle.rope_frequencies(tiny.config(name))
    np.testing.assert_allclose(frequencies(tiny_model.config(name)), expected, rtol=1e-13)
    golden = GOLDENS[f"{name}/rope/frequencies"]
    np.testing.assert_allclose(frequencies(tiny_model.config(name)), golden, rtol=5e-7)


@each_config
def test_every_position_is_right_in_float32(name: str) -> None:
    tables = cos_sin(tiny_model.config(name), tag(jnp.asarray(POSITIONS), "s"))
    for table, expected in zip(
        tables, oracle.rope_tables(tiny.config(name), POSITIONS), strict=True
    ):
        assert table.dtype == jnp.float32
        np.testing.assert_allclose(table.untag("s", "pair"), expected, rtol=0, atol=5e-7)


def test_halves_are_paired() -> None:
    config = tiny_model.config("released_numbers")
    x = np.random.default_rng(0).standard_normal((3, 2, config.head_dim)).astype(np.float32)
    angles = oracle.rope_tables(tiny.config("released_numbers"), [5, 77, 5000])
    expected = oracle.rotate(x.astype(np.float64), *angles)
    at = cos_sin(config, tag(jnp.asarray([5, 77, 5000], jnp.int32), "s"))
    out = rotate(tag(jnp.asarray(x), "s", "h", "hd"), at)
    np.testing.assert_allclose(out.untag("s", "h", "hd"), expected, rtol=0, atol=2e-6)
    moved = rotate(tag(jnp.asarray(x.transpose(2, 0, 1)), "hd", "s", "h"), at)
    assert moved.axes == ("hd", "s", "h")
    np.testing.assert_array_equal(moved.untag("s", "h", "hd"), out.array)


def test_dtype_is_kept() -> None:
    config = tiny_model.config("released_numbers")
    x = tag(jnp.ones((3, config.head_dim), jnp.bfloat16), "s", "hd")
    assert rotate(x, cos_sin(config, tag(jnp.arange(3), "s"))).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("factor", "given", "expected"), [(32.0, None, 1.3465736), (1.0, None, 1.0), (8.0, 1.25, 1.25)]
)
def test_factor_of_cosine(factor: float, given: float | None, expected: float) -> None:
    scaling = YarnScaling(factor, 4096, attention_factor=given)
    assert scaling.cosine_factor == pytest.approx(expected, abs=1e-7)
