"""Names of axes: what operations do with them, which transformations keep them, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import Tagged, tag, transforms


def array(*shape: int) -> jax.Array:
    return jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)


def mesh_of(**sizes: int) -> Mesh:
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


@pytest.fixture
def x() -> Tagged:
    return tag(array(2, 3, 4), "a", "b", "c")


def test_tag_keeps_the_array_and_its_sizes(x):
    assert x.axes == ("a", "b", "c") and x.shape == (2, 3, 4) and x.dtype == jnp.float32
    assert x.sizes == {"a": 2, "b": 3, "c": 4} and x.size("c") == 4 and x.position("b") == 1
    assert str(x) == "{a=2, b=3, c=4}"
    assert tag([1, 2], "s").shape == (2,)
    assert tag(2.0).axes == ()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tag(array(2, 3), "s"), ValueError, r"shape \(2, 3\) needs 2 tags, got 1: \{s\}"),
        (lambda: tag(array(3), "s", "d"), ValueError, r"needs 1 tags, got 2: \{s, d\}"),
        (lambda: tag(array(3, 3), "s", "s"), ValueError, r"repeated axis names \['s'\]"),
        (lambda: tag(array(3), 0), TypeError, "non-empty string, got 0"),
        (lambda: tag(array(3), ""), TypeError, "non-empty string, got ''"),
        (lambda: tag(tag(array(3), "s"), "s"), TypeError, "already tagged: {s=3}. Use rename"),
    ],
)
def test_tag_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_untag_and_order_transpose_by_name(x):
    np.testing.assert_array_equal(x.untag("c", "a", "b"), np.transpose(x.array, (2, 0, 1)))
    assert x.order("b", "c", "a").sizes == {"b": 3, "c": 4, "a": 2}
    assert x.order("a", "b", "c") is x


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "z"), ("a", "b", "c", "d"), ()])
def test_untag_must_name_every_axis(x, names):
    with pytest.raises(ValueError, match=r"expected the axes .* got \{a=2, b=3, c=4\}"):
        x.untag(*names)
    with pytest.raises(ValueError, match="repeated axis names"):
        x.untag("a", "a", "b")


def test_rename(x):
    assert x.rename(a="s", c="d").axes == ("s", "b", "d")
    assert x.rename(a="b", b="a").axes == ("b", "a", "c")
    with pytest.raises(ValueError, match=r"no axis 'z' among \{a, b, c\}"):
        x.rename(z="s")
    with pytest.raises(ValueError, match=r"repeated axis names \['b'\]"):
        x.rename(a="b")


def test_astype_map_sum(x):
    assert x.astype(jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(x.map(jnp.square).array, np.asarray(x.array) ** 2)
    with pytest.raises(ValueError, match=r"must keep the shape \(2, 3, 4\), it returned \(2, 3\)"):
        x.map(lambda v: v.sum(-1))
    total = x.sum("b")
    assert total.axes == ("a", "c")
    np.testing.assert_array_equal(total.array, np.asarray(x.array).sum(1))
    with pytest.raises(ValueError, match="no axis 'z'"):
        x.sum("z")


def test_arithmetic_broadcasts_by_name(x):
    bias = tag(array(4, 2), "c", "a")
    expected = np.asarray(x.array) + np.asarray(bias.array).T[:, None, :]
    for result in (x + bias, bias + x):
        assert result.axes == ("a", "b", "c")
        np.testing.assert_array_equal(result.array, expected)
    np.testing.assert_array_equal((x - bias).array, -(bias - x).array)
    np.testing.assert_array_equal((x * 2).array, (2 * x).array)
    np.testing.assert_array_equal((1 - x).array, (-(x - 1)).array)
    np.testing.assert_array_equal((1 + x).array, (x + 1).array)
    np.testing.assert_array_equal((x / 4).array, np.asarray(x.array) / 4)
    same = tag(array(3, 2, 4), "b", "a", "c")
    np.testing.assert_array_equal(
        (x * same).array, np.asarray(x.array) * np.asarray(same.array).transpose(1, 0, 2)
    )


def test_arithmetic_refuses_other_axes_other_sizes_and_bare_arrays(x):
    with pytest.raises(ValueError, match=r"neither of \{a=2, b=3, c=4\} and \{a=2, z=3\}"):
        x + tag(array(2, 3), "a", "z")
    with pytest.raises(ValueError, match=r"axis 'c' has different sizes in \{c=5\} and \{a=2"):
        x + tag(array(5), "c")
    with pytest.raises(ValueError, match="axis 'c' has different sizes"):
        x + tag(array(1), "c")
    for bare in (array(4), np.ones((2, 3, 4), np.float32)):
        for operation in (lambda b: x + b, lambda b: b - x, lambda b: b * x, lambda b: x / b):
            with pytest.raises(TypeError, match="without names: tag it, or use untag"):
                operation(bare)


def test_names_are_checked_where_sizes_agree(record_property):
    """Three axes of one size: positions would multiply without complaint."""
    record_property("row", "N1")
    record_property("with", "unit tests")
    x, w = tag(array(3, 3), "s", "in"), tag(array(3, 3), "out", "in")
    with pytest.raises(ValueError, match="no axis 'in' among {in_, out}"):
        x.dot(w.rename(**{"in": "in_"}).order("in_", "out"), "in")
    with pytest.raises(ValueError, match="neither of"):
        x + w
    with pytest.raises(ValueError, match="expected the axes {s, d}"):
        x.untag("s", "d")
    np.testing.assert_array_equal(
        x.dot(w.order("in", "out"), "in").array, np.asarray(x.array) @ np.asarray(w.array).T
    )


def test_dot_batch_free_and_contracted_axes(rng):
    a = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    b = rng.normal(size=(5, 6, 2, 4)).astype(np.float32)
    result = tag(jnp.asarray(a), "e", "s", "i", "j").dot(
        tag(jnp.asarray(b), "i", "o", "e", "j"), ("i", "j")
    )
    assert result.axes == ("e", "s", "o")
    expected = np.einsum("esij,ioej->eso", a.astype(float), b.astype(float))
    np.testing.assert_allclose(result.array, expected, rtol=1e-5, atol=1e-5)
    wide = tag(jnp.ones((2, 4), jnp.bfloat16), "s", "i").dot(
        tag(jnp.ones((4,), jnp.bfloat16), "i"), "i", preferred_element_type=jnp.float32
    )
    assert wide.dtype == jnp.float32 and wide.axes == ("s",)


def test_dot_refuses(x):
    with pytest.raises(ValueError, match=r"axis 'a' has different sizes in .*a=2.* and .*a=5"):
        x.dot(tag(array(5), "a"), "a")
    with pytest.raises(ValueError, match="axis 'b' is in both .* rename one"):
        x.dot(tag(array(2, 5), "a", "b"), "a")
    with pytest.raises(ValueError, match="no axis 'z'"):
        x.dot(tag(array(2), "z"), "z")
    with pytest.raises(ValueError, match="repeated axis names"):
        x.dot(x, ("a", "a"))
    with pytest.raises(TypeError, match="without names: tag it"):
        x.dot(array(2), "a")


def test_take_puts_the_axes_of_the_indices_in_place(x):
    picked = x.take(tag(jnp.array([[2, 0], [1, 1]]), "s", "k"), "b")
    assert picked.axes == ("a", "s", "k", "c")
    np.testing.assert_array_equal(picked.array, np.asarray(x.array)[:, [[2, 0], [1, 1]]])
    np.testing.assert_array_equal(x.take(1, "c").array, np.asarray(x.array)[..., 1])
    clipped = x.take(tag(jnp.array([-7, -1, 99]), "s"), "a")
    np.testing.assert_array_equal(clipped.array, np.asarray(x.array)[[0, 0, 1]])


def test_take_refuses(x):
    with pytest.raises(ValueError, match="indices with axes must be Tagged"):
        x.take(jnp.array([0, 1]), "a")
    with pytest.raises(TypeError, match="indices must be integers, got float32"):
        x.take(tag(array(2), "s"), "a")
    with pytest.raises(ValueError, match=r"repeated axis names \['c'\]"):
        x.take(tag(jnp.array([0]), "c"), "a")
    with pytest.raises(ValueError, match="index 0 is outside axis .s. of {s=0}"):
        tag(array(0), "s").take(0, "s")
    with pytest.raises(ValueError, match="axis 's' of {s=0}, which is empty"):
        tag(array(0), "s").take(tag(jnp.zeros(1, jnp.int32), "t"), "s")
    assert tag(array(0), "s").take(tag(jnp.zeros(0, jnp.int32), "t"), "s").sizes == {"t": 0}


def test_top_k_breaks_ties_by_the_lowest_index():
    x = tag(jnp.array([[1.0, 5.0], [5.0, 5.0], [5.0, 2.0], [0.0, 5.0]]), "e", "s")
    values, ids = x.top_k(2, "e", "k")
    assert values.axes == ids.axes == ("s", "k") and ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids.array, [[1, 2], [0, 1]])
    np.testing.assert_array_equal(values.array, np.full((2, 2), 5.0))
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"size 4 of axis 'e', got {k}"):
            x.top_k(k, "e", "k")


def test_split_and_merge_are_inverse(x):
    parts = x.split("c", block=-1, lane=2)
    assert parts.sizes == {"a": 2, "b": 3, "block": 2, "lane": 2}
    np.testing.assert_array_equal(parts.merge(("block", "lane"), "c").array, x.array)
    swapped = x.merge(("c", "a"), "z")
    assert swapped.sizes == {"z": 8, "b": 3}
    np.testing.assert_array_equal(
        swapped.array, np.asarray(x.array).transpose(2, 0, 1).reshape(8, 3)
    )
    empty = tag(array(0, 3), "r", "d").split("r", s=0, k=2)
    assert empty.sizes == {"s": 0, "k": 2, "d": 3}
    assert empty.merge(("s", "k"), "r").sizes == {"r": 0, "d": 3}


@pytest.mark.parametrize(
    "parts",
    [
        {"p": 3, "q": 2},
        {"p": -1, "q": 3},
        {"p": -1, "q": -1},
        {"p": 0, "q": -1},
        {"p": -2, "q": -2},
    ],
)
def test_split_refuses_parts_that_do_not_fit(x, parts):
    with pytest.raises(ValueError, match="axis 'c' of size 4 does not split into"):
        x.split("c", **parts)


def test_split_and_merge_refuse_wrong_names(x):
    with pytest.raises(ValueError, match="repeated axis names"):
        x.split("c", a=2, q=2)
    with pytest.raises(ValueError, match="no axis 'z'"):
        x.merge(("a", "z"), "q")
    with pytest.raises(ValueError, match="repeated axis names"):
        x.merge(("a", "b"), "c")
    with pytest.raises(ValueError, match="got none"):
        x.merge((), "q")


def test_jit_and_grad_keep_names(x):
    doubled = jax.jit(lambda v: v * 2)(x)
    assert doubled.axes == x.axes
    gradient = jax.grad(lambda v: (v * v).sum("a").sum("b").sum("c").array)(x)
    assert gradient.axes == x.axes
    np.testing.assert_array_equal(gradient.array, 2 * np.asarray(x.array))


def test_abstract_values_keep_names(x):
    shape = jax.eval_shape(lambda v: v.rename(a="z").sum("b"), x)
    assert shape.sizes == {"z": 2, "c": 4}
    assert tag(jax.ShapeDtypeStruct((2, 3), jnp.float32), "s", "d").sizes == {"s": 2, "d": 3}


TEACHING = r"array of 2 axes carries the 3 names \{a, b, c\}.*moe_jax.transforms.vmap"
USES = {
    "add": lambda v: v + 1,
    "dot": lambda v: v.dot(tag(array(3), "b"), "b"),
    "sum": lambda v: v.sum("b"),
    "map": lambda v: v.map(jnp.exp),
    "order": lambda v: v.order("c", "b", "a"),
    "untag": lambda v: v.untag("a", "b", "c"),
    "size": lambda v: v.size("b"),
    "take": lambda v: v.take(0, "b"),
    "split": lambda v: v.split("c", p=2, q=2),
    "merge": lambda v: v.merge(("a", "b"), "z"),
    "top_k": lambda v: v.top_k(1, "c", "k"),
}


@pytest.mark.parametrize("use", USES)
def test_raw_vmap_and_scan_are_told_what_to_do(x, use):
    with pytest.raises(ValueError, match=TEACHING):
        jax.vmap(USES[use])(x)
    with pytest.raises(ValueError, match=TEACHING):
        jax.lax.scan(lambda carry, v: (carry, USES[use](v)), 0, x)


def test_a_wrongly_sized_tagged_prints_without_failing():
    assert str(Tagged(array(2), ("a", "b"))) == "{a, b}"


def test_vmap_by_name(x):
    other = tag(array(4, 3), "c", "b")
    bare = tag(array(3), "b")

    def inner(v: Tagged, w: Tagged, u: Tagged, scale: float):
        assert v.axes == ("a", "c") and w.axes == ("c",) and u.axes == ()
        return v.dot(w, "c") * scale, u, v.array.sum()

    result, scalars, totals = transforms.vmap(inner, "b")(x, other, bare, 2.0)
    expected = 2 * np.einsum("abc,cb->ba", np.asarray(x.array), np.asarray(other.array))
    assert result.axes == ("b", "a") and scalars.axes == ("b",)
    np.testing.assert_allclose(result.array, expected)
    np.testing.assert_allclose(totals, np.asarray(x.array).sum((0, 2)))
    whole = transforms.vmap(lambda v, w: v.sum("c") + w.sum("z"), "b")(x, tag(array(5), "z"))
    np.testing.assert_allclose(whole.array, np.asarray(x.array).sum(2).T + 10)
    with pytest.raises(ValueError, match="no argument has the axis 'z'"):
        transforms.vmap(lambda v: v, "z")(x)


def test_scan_by_name(x):
    def step(carry: Tagged, v: Tagged):
        assert v.axes == ("a", "c")
        carry = carry + v
        return carry, (carry, v.array.sum())

    carry, (steps, totals) = transforms.scan(step, tag(jnp.zeros((2, 4)), "a", "c"), x, "b")
    cumulative = np.asarray(x.array).cumsum(1)
    assert carry.axes == ("a", "c") and steps.axes == ("b", "a", "c")
    np.testing.assert_array_equal(carry.array, cumulative[:, -1])
    np.testing.assert_array_equal(steps.array, cumulative.transpose(1, 0, 2))
    np.testing.assert_array_equal(totals, np.asarray(x.array).sum((0, 2)))
    with pytest.raises(ValueError, match="no axis 'z'"):
        transforms.scan(step, carry, x, "z")
    with pytest.raises(TypeError, match="scan over axis 'b' needs Tagged arrays"):
        transforms.scan(step, carry, (x, x.array), "b")


def test_raw_scan_with_a_tagged_carry(x):
    carry, _ = jax.lax.scan(lambda c, _: (c * 2, None), x, length=3)
    np.testing.assert_array_equal(carry.array, 8 * np.asarray(x.array))


def test_shard_map_keeps_names():
    mesh = mesh_of(devices=8)
    x, w = tag(array(16, 3), "s", "d"), tag(array(5, 3), "out", "d")

    def local(x: Tagged, w: Tagged) -> Tagged:
        assert x.sizes == {"s": 2, "d": 3}
        return x.dot(w, "d")

    call = jax.shard_map(local, mesh=mesh, in_specs=(P("devices"), P()), out_specs=P("devices"))
    result = jax.jit(call)(x, w)
    assert result.sizes == {"s": 16, "out": 5}
    np.testing.assert_array_equal(result.array, np.asarray(x.array) @ np.asarray(w.array).T)


def test_partition_places_and_constrains():
    mesh = mesh_of(data=4, model=2)
    x = tag(array(8, 6, 3), "s", "d", "k")
    rules = {"s": "data", "d": ("model",), "k": None}
    assert x.spec(rules) == P("data", ("model",), None)
    for placed in (x.partition(mesh, rules), jax.jit(lambda v: v.partition(mesh, rules))(x)):
        assert placed.array.addressable_shards[0].data.shape == (2, 3, 3)
        np.testing.assert_array_equal(placed.array, x.array)
    both = x.partition(mesh, {"s": ("data", "model")})
    assert both.array.addressable_shards[0].data.shape == (1, 6, 3)


def test_partition_refuses():
    mesh = mesh_of(data=4, model=2)
    x = tag(array(8, 6), "s", "d")
    with pytest.raises(ValueError, match="axis 'd' of size 6 cannot be split over 4 devices"):
        x.partition(mesh, {"d": "data"})
    with pytest.raises(ValueError, match="axis 'd' to mesh axis 'nowhere'"):
        x.partition(mesh, {"d": "nowhere"})


def test_take_by_a_plain_int_counts_from_the_end_or_refuses():
    x = tag(jnp.arange(4), "s")
    assert int(x.take(-1, "s").array) == 3
    for outside in (4, -5):
        with pytest.raises(ValueError, match=f"index {outside} is outside axis 's' of {{s=4}}"):
            x.take(outside, "s")


def test_numpy_arrays_become_jax_arrays():
    assert isinstance(tag(np.zeros(3, np.float32), "s").array, jax.Array)
