"""What a format can hold of a layer's arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import random_mxfp4

from moe_jax import tag
from moe_jax.formats import FormatError
from moe_jax.formats.arrays import FLOATS, check_all_or_none, check_finite, numpy_of

AXES = ("expert", "in", "out")


@pytest.fixture
def numbers(rng) -> np.ndarray:
    return rng.normal(size=(2, 3, 5)).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_axes_are_put_in_order_and_bits_are_kept(numbers, dtype):
    numbers = numbers.astype(dtype)
    found = numpy_of("up", tag(numbers, *AXES), ("out", "expert", "in"), dtypes=FLOATS)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, numbers.transpose(2, 0, 1))


def test_what_does_not_fit_is_named(rng, numbers):
    up = tag(numbers, *AXES)
    packed, _ = random_mxfp4(rng, 2, 3, 1)
    wrong = [
        (packed, {}, "up is BlockScaled.*dequantize"),
        (numbers, {}, "up must have the axes {expert, in, out}, got"),
        (up.rename(out="d"), {}, "up must have the axes .* got {expert=2, in=3, d=5}"),
        (up, {"sizes": {"expert": 2, "in": 4}}, "up must have {'in': 4}, got"),
        (up, {"dtypes": ("float16",)}, "up is float32: expected float16, cast it"),
    ]
    for value, options, message in wrong:
        with pytest.raises(FormatError, match=message):
            numpy_of("up", value, AXES, **options)
    assert numpy_of("up", up, AXES, sizes={"in": 3}).shape == (2, 3, 5)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_barred_expert_is_refused(numbers, number):
    check_finite("router_weight", numbers)
    numbers[1, 2, 3] = number
    with pytest.raises(FormatError, match="router_weight must be finite"):
        check_finite("router_weight", numbers)


def test_biases_are_all_given_or_none(numbers):
    check_all_or_none({})
    check_all_or_none({"up_bias": None, "down_bias": None})
    check_all_or_none({"up_bias": numbers, "down_bias": numbers})
    with pytest.raises(FormatError, match="up_bias is None and down_bias is not"):
        check_all_or_none({"up_bias": None, "down_bias": numbers})
