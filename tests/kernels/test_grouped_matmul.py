"""One suite for every backend of the grouped matmul.

A backend joins by its name in IMPLEMENTATIONS, with a mark that skips it where it cannot run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import f32, random_mxfp4
from jax.sharding import PartitionSpec as P

from moe_jax import BlockScaled, Tagged, tag
from moe_jax.kernels.grouped_matmul import grouped_matmul
from moe_jax.kernels.grouped_matmul.reference import choose_block_size, plan_blocks

pytestmark = pytest.mark.usefixtures("little_compiling")

NEEDS_GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
IMPLEMENTATIONS = [
    pytest.param("xla", id="xla_by_name", marks=NEEDS_GPU),  # elsewhere the platform's own choice
    pytest.param(None, id="by_platform"),
    pytest.param("triton", id="triton", marks=NEEDS_GPU),
]
WEIGHTS = {
    "float32": 1e-5,
    "float16": 2e-3,
    "bfloat16": 1.5e-2,
    "mxfp4": 1e-5,
    "mxfp4_bfloat16": 1.5e-2,
}
"""Weight kinds, and the error allowed relative to the largest value."""
FLOATS = ["float32", "float16", "bfloat16"]

GROUPS = {
    "no_rows": (0, [0, 0, 0]),
    "one_row": (1, [0, 1, 0]),
    "one_expert": (9, [9]),
    "one_expert_one_row": (1, [1]),
    "empty_experts": (20, [0, 7, 0, 0, 13, 0]),
    "all_rows_on_one": (33, [0, 0, 33, 0]),
    "odd_sizes": (41, [5, 11, 1, 17, 7]),
    "a_row_each": (5, [1, 1, 1, 1, 1]),
    "rows_past_the_sum": (17, [3, 0, 6]),
    "none_of_the_rows": (7, [0, 0]),
    "more_than_a_block": (300, [150, 0, 137, 13]),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str | None:
    return request.param


def make_weight(rng, kind: str, experts: int) -> tuple[Tagged | BlockScaled, np.ndarray]:
    """A weight with 7 outputs, and its float64 values [expert, out, in]."""
    if kind.startswith("mxfp4"):
        return random_mxfp4(rng, experts, outputs=7, num_blocks=2)
    array = jnp.asarray(rng.normal(size=(experts, 7, 13)), kind)
    return tag(array, "expert", "out", "in"), np.asarray(array, np.float64)


def make_rows(rng, kind: str, rows: int, size: int) -> jax.Array:
    dtype = "float32" if kind == "mxfp4" else kind.removeprefix("mxfp4_")
    return jnp.asarray(rng.normal(size=(rows, size)), dtype)


def owners(rows: int, sizes: list[int]) -> np.ndarray:
    """The expert of each row, -1 past the sum of sizes."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return np.concatenate([owner, np.full(rows - len(owner), -1)]).astype(int)


def oracle(rows: np.ndarray, weight: np.ndarray, owner: np.ndarray) -> np.ndarray:
    result = np.zeros((len(rows), weight.shape[1]))
    for r, e in enumerate(owner):
        if e >= 0:
            result[r] = weight[e] @ rows[r].astype(np.float64)
    return result


def close(ours, expected: np.ndarray, kind: str) -> None:
    tolerance = WEIGHTS[kind] * max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=tolerance)


def multiply(rows: jax.Array, weight, sizes, implementation: str | None) -> Tagged:
    group_sizes = tag(jnp.asarray(sizes, jnp.int32), "expert")
    return grouped_matmul(
        tag(rows, "row", "in"), weight, group_sizes, implementation=implementation
    )


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_values(rng, implementation, kind, case):
    count, sizes = GROUPS[case]
    weight, values = make_weight(rng, kind, len(sizes))
    rows = make_rows(rng, kind, count, values.shape[2])
    ours = multiply(rows, weight, sizes, implementation)
    assert ours.sizes == {"row": count, "out": 7} and ours.dtype == rows.dtype
    close(ours.array, oracle(np.asarray(rows), values, owners(count, sizes)), kind)


@pytest.mark.parametrize("kind", ["float32", "mxfp4"])
def test_xla_can_be_named_everywhere(rng, kind):
    count, sizes = GROUPS["rows_past_the_sum"]
    weight, values = make_weight(rng, kind, len(sizes))
    rows = make_rows(rng, kind, count, values.shape[2])
    ours = multiply(rows, weight, sizes, "xla")
    close(ours.array, oracle(np.asarray(rows), values, owners(count, sizes)), kind)


@pytest.mark.parametrize("kind", ["float32", "mxfp4"])
def test_group_sizes_are_data(rng, implementation, kind):
    """One compiled function serves every way of dividing the rows."""
    weight, values = make_weight(rng, kind, 4)
    rows = make_rows(rng, kind, 24, values.shape[2])
    call = jax.jit(lambda r, w, s: multiply(r, w, s, implementation))
    for sizes in ([24, 0, 0, 0], [0, 0, 0, 24], [6, 6, 6, 6], [1, 2, 3, 4], [0, 23, 1, 0]):
        ours = call(rows, weight, jnp.asarray(sizes))
        close(ours.array, oracle(np.asarray(rows), values, owners(24, sizes)), kind)
    assert call._cache_size() == 1


@pytest.mark.parametrize("case", ["one_row", "empty_experts", "rows_past_the_sum", "no_rows"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients(rng, implementation, kind, case):
    count, sizes = GROUPS[case]
    weight, values = make_weight(rng, kind, len(sizes))
    rows = make_rows(rng, kind, count, values.shape[2])
    cotangent = np.asarray(make_rows(rng, kind, count, 7), np.float64)
    owner = owners(count, sizes)

    def loss(rows, weight):
        y = multiply(rows, weight, sizes, implementation).array
        return (y * jnp.asarray(cotangent, y.dtype)).astype(jnp.float32).sum()

    ours, of_weight = jax.grad(loss, argnums=(0, 1), allow_int=True)(rows, weight)
    assert ours.dtype == rows.dtype
    close(ours, oracle(cotangent, values.transpose(0, 2, 1), owner), kind)
    if kind not in FLOATS:
        assert all(g.dtype == jax.dtypes.float0 for g in jax.tree.leaves(of_weight))
        return
    expected = np.zeros(values.shape)
    for r, e in enumerate(owner):
        if e >= 0:
            expected[e] += np.outer(cotangent[r], np.asarray(rows[r], np.float64))
    assert of_weight.dtype == weight.dtype and of_weight.axes == weight.axes
    close(of_weight.array, expected, kind)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["float32", "mxfp4"])
def test_bad_rows_stay_alone(rng, implementation, kind, bad):
    sizes, owner = [3, 0, 6, 4], owners(15, [3, 0, 6, 4])
    weight, values = make_weight(rng, kind, 4)
    rows = np.array(make_rows(rng, kind, 15, values.shape[2]))
    expected = oracle(rows, values, owner)
    rows[[4, 13], 0] = bad
    ours = np.asarray(multiply(jnp.asarray(rows), weight, sizes, implementation).array)
    assert not np.isfinite(ours[4]).all()
    np.testing.assert_array_equal(ours[13:], 0)
    rest = np.delete(np.arange(13), 4)
    close(ours[rest], expected[rest], kind)


def test_a_bad_weight_stays_with_its_expert(rng, implementation):
    sizes, owner = [3, 2, 0, 4], owners(9, [3, 2, 0, 4])
    weight, values = make_weight(rng, "float32", 4)
    rows = make_rows(rng, "float32", 9, 13)
    spoiled = weight.map(lambda w: w.at[1, 0, 0].set(jnp.nan).at[2].set(jnp.inf))
    ours = np.asarray(multiply(rows, spoiled, sizes, implementation).array)
    np.testing.assert_array_equal(np.isnan(ours).any(1), owner == 1)
    good = owner != 1
    close(ours[good], oracle(np.asarray(rows), values, owner)[good], "float32")


def test_a_nan_scale_stays_with_its_expert(rng, implementation):
    weight, _ = make_weight(rng, "mxfp4", 3)
    scales = weight.scales.map(lambda s: s.at[1, 2, 0].set(jnp.uint8(255)))
    spoiled = BlockScaled(weight.blocks, scales)
    rows = make_rows(rng, "mxfp4", 6, 64)
    ours = np.asarray(multiply(rows, spoiled, [2, 2, 2], implementation).array)
    expected = np.zeros((6, 7), bool)
    expected[2:4, 2] = True
    np.testing.assert_array_equal(np.isnan(ours), expected)


def test_axes_go_by_name(rng, implementation):
    weight, values = make_weight(rng, "float32", 3)
    rows = make_rows(rng, "float32", 6, 13)
    sizes = tag(jnp.array([1, 2, 3]), "expert")

    def total(rows, weight):
        y = grouped_matmul(rows, weight, sizes, implementation=implementation)
        assert y.axes == ("row", "out")
        return (y * y).sum("row").sum("out").array, y

    moved = weight.order("in", "expert", "out")
    gradient, y = jax.grad(total, argnums=1, has_aux=True)(tag(rows.T, "in", "row"), moved)
    close(y.array, oracle(np.asarray(rows), values, owners(6, [1, 2, 3])), "float32")
    plain, _ = jax.grad(total, argnums=1, has_aux=True)(tag(rows, "row", "in"), weight)
    assert gradient.axes == moved.axes
    np.testing.assert_allclose(gradient.untag(*plain.axes), plain.array, rtol=1e-6)


def test_long_sums_are_kept_in_float32(implementation):
    """1 + 1024 x 2^-10: a sum kept in bfloat16 would stay at 1."""
    rows = jnp.ones((1, 1025), jnp.bfloat16)
    row = np.full(1025, 2.0**-10)
    row[0] = 1.0
    weight = tag(jnp.asarray(row[None, None], jnp.bfloat16), "expert", "out", "in")
    assert multiply(rows, weight, [1], implementation).array[0, 0] == 2.0


def test_under_vmap(rng, implementation):
    weight, values = make_weight(rng, "float32", 3)
    rows = jnp.asarray(rng.normal(size=(2, 6, 13)), jnp.float32)
    sizes = jnp.array([[1, 2, 3], [6, 0, 0]])
    ours = jax.vmap(lambda r, s: multiply(r, weight, s, implementation).array)(rows, sizes)
    for y, r, s in zip(ours, rows, sizes, strict=True):
        close(y, oracle(np.asarray(r), values, owners(6, list(s))), "float32")


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("kind", ["float32", "mxfp4"])
def test_under_shard_map(rng, implementation, kind):
    """Rows and their sizes on two devices, one weight for both: its gradient is their sum."""
    weight, values = make_weight(rng, kind, 3)
    rows = make_rows(rng, kind, 12, values.shape[2])
    sizes = [[1, 2, 3], [4, 0, 0]]
    owner = np.concatenate([owners(6, each) for each in sizes])
    mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("device"), P(), P("device")), out_specs=P("device")
    )
    def call(rows, weight, sizes):
        return multiply(rows, weight, sizes, implementation).array

    flat = jnp.asarray(np.concatenate(sizes))
    close(call(rows, weight, flat), oracle(np.asarray(rows), values, owner), kind)
    of_rows, of_weight = jax.grad(
        lambda r, w: call(r, w, flat).sum(), argnums=(0, 1), allow_int=True
    )(rows, weight)
    close(of_rows, oracle(np.ones((12, 7)), values.transpose(0, 2, 1), owner), kind)
    if kind in FLOATS:
        sums = [np.asarray(rows, np.float64)[owner == e].sum(0) for e in range(3)]
        expected = np.broadcast_to(np.stack(sums)[:, None], values.shape)
        close(of_weight.array, expected, kind)


ROWS, WEIGHT = f32(np.ones((4, 5)), "row", "in"), f32(np.ones((2, 3, 5)), "expert", "out", "in")
SIZES = tag(jnp.array([2, 2]), "expert")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ROWS.rename(row="s"), WEIGHT, SIZES), ValueError, "rows must have the axes {row, in}"),
        ((ROWS, WEIGHT.rename(out="d"), SIZES), ValueError, "weight must have the axes"),
        ((ROWS, WEIGHT, SIZES.rename(expert="e")), ValueError, "group_sizes must have the axis"),
        ((f32(np.ones((4, 6)), "row", "in"), WEIGHT, SIZES), ValueError, "axis 'in' has different"),
        ((ROWS, WEIGHT, tag(jnp.ones(3, jnp.int32), "expert")), ValueError, "axis 'expert' has"),
        ((ROWS.astype(jnp.int32), WEIGHT, SIZES), TypeError, "rows must be floats, got int32"),
        ((ROWS, WEIGHT, SIZES.astype(jnp.float32)), TypeError, "group_sizes must be integers"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(*arguments)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation must be one of .* got 'fortran'"):
        grouped_matmul(ROWS, WEIGHT, SIZES, implementation="fortran")


@pytest.mark.parametrize("case", GROUPS)
def test_the_plan_places_every_row_once(case):
    count, sizes = GROUPS[case]
    if not count:
        return
    plan = plan_blocks(jnp.asarray(sizes), count)
    owner, row = owners(count, sizes), np.asarray(plan.row)
    held = row[row < count]
    np.testing.assert_array_equal(np.sort(held), np.arange(sum(sizes)))
    for block in range(int(plan.used)):
        rows = row[block][row[block] < count]
        assert len(rows) and (owner[rows] == plan.expert[block]).all()
    assert (row[int(plan.used) :] == count).all()


def test_block_sizes():
    assert [choose_block_size(n, 4) for n in (1, 32, 36, 300, 9999)] == [8, 8, 16, 128, 128]
