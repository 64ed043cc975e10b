"""One primitive, two functions: which one a platform gets, and what transformations see."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.kernels import lowering


def halves(x, y, *, factor):
    return {"sum": x + y * factor, "rows": x.sum(1)}


def on_cuda(x, y, *, factor):
    return {"sum": jnp.sin(x) + y * factor, "rows": x.sum(1)}


OPERATION = lowering.per_platform("halves", halves, on_cuda)
X = np.arange(12, dtype=np.float32).reshape(3, 4)
Y = np.float32(np.linspace(1, 2, 12)).reshape(3, 4)
EXPECTED = {"sum": X + 3 * Y, "rows": X.sum(1)}


def call(x, y, implementation=None):
    return OPERATION(x, y, factor=3, implementation=implementation)


def check(results, expected=EXPECTED):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-6)


def lowered_for(platform: str, implementation=None) -> str:
    traced = jax.jit(lambda x, y: call(x, y, implementation)).trace(X, Y)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_eagerly_and_under_jit():
    check(call(X, Y))
    check(jax.jit(call)(X, Y))
    check(jax.jit(jax.checkpoint(call))(X, Y))


def test_shapes_and_dtypes_are_those_of_the_default():
    shapes = jax.eval_shape(call, jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16))
    assert shapes["sum"].shape == (3, 4) and shapes["rows"].shape == (3,)
    assert all(s.dtype == jnp.bfloat16 for s in jax.tree.leaves(shapes))


def test_in_loops():
    def body(carry, y):
        results = call(carry, y)
        return results["sum"], results["rows"]

    last, rows = jax.lax.scan(body, jnp.asarray(X), jnp.stack([Y, 2 * Y]))
    np.testing.assert_allclose(last, X + 9 * Y, rtol=1e-6)
    np.testing.assert_allclose(rows, [X.sum(1), (X + 3 * Y).sum(1)], rtol=1e-6)
    last = jax.lax.fori_loop(0, 4, lambda i, x: call(x, Y)["sum"], jnp.asarray(X))
    np.testing.assert_allclose(last, X + 12 * Y, rtol=1e-6)


@pytest.mark.parametrize("axes", [(0, None), (None, 2), (1, 0)])
def test_under_vmap(axes):
    def place(array, axis):
        return array if axis is None else jnp.stack([array, 2 * array], axis)

    results = jax.vmap(call, axes)(place(X, axes[0]), place(Y, axes[1]))
    for i, scale in enumerate((1, 2)):
        x, y = (a if axis is None else scale * a for a, axis in zip((X, Y), axes, strict=True))
        check({k: v[i] for k, v in results.items()}, {"sum": x + 3 * y, "rows": x.sum(1)})


@pytest.mark.parametrize("vmapped", [False, True])
def test_under_shard_map(vmapped):
    mesh = jax.make_mesh((4,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    function = jax.vmap(call, (0, None)) if vmapped else call
    x = np.stack([X, X + 1]) if vmapped else X
    spec = P(None, None, "device") if vmapped else P(None, "device")

    def local(x, y):
        return function(x, y[:, :1])["sum"]

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(x, Y), x + 3 * Y[:, :1], rtol=1e-6)


def test_cuda_gets_its_own_function():
    pytest.importorskip("jax_triton", reason="the kernel is taken where jax-triton is installed")
    assert "sine" in lowered_for("cuda") and "sine" in lowered_for("cuda", "triton")
    assert "sine" not in lowered_for("cpu") and "sine" not in lowered_for("tpu")


def test_a_forced_kernel_needs_an_nvidia_gpu():
    message = "implementation='triton' needs an NVIDIA GPU, but is lowered for 'cpu'"
    with pytest.raises(ValueError, match=message):
        call(X, Y, "triton")
    with pytest.raises(ValueError, match="for 'tpu': use implementation=None or 'xla'"):
        lowered_for("tpu", "triton")


def test_without_jax_triton(monkeypatch):
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: None)
    lowering._warn_once.cache_clear()
    with pytest.raises(ImportError, match=r"needs jax-triton: install it .* moe_jax\[cuda13\]"):
        lowered_for("cuda", "triton")
    with pytest.warns(UserWarning, match="halves runs in XLA.*needs jax-triton"):
        assert "sine" not in lowered_for("cuda")
    lowered_for("cuda")  # warnings are errors here: it does not come twice


def gpus(*capabilities: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(compute_capability=c) for c in capabilities]


@pytest.mark.parametrize("capabilities", [("7.5",), ("9.0", "7.5")])
def test_old_gpus_run_in_xla(monkeypatch, capabilities):
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus(*capabilities))
    lowering._warn_once.cache_clear()
    with pytest.raises(ValueError, match="capability 8.0 or later, this process has 7.5: use"):
        lowered_for("cuda", "triton")
    assert "sine" not in lowered_for("cuda", "xla")
    with pytest.warns(UserWarning, match="halves runs in XLA.*8.0 or later, this process has 7.5"):
        assert "sine" not in lowered_for("cuda")
    assert "sine" not in lowered_for("cuda")  # warnings are errors here: it does not come twice


def test_new_gpus_get_their_own_function(monkeypatch):
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: name)
    for capability in ("8.0", "12.0"):
        monkeypatch.setattr(jax, "local_devices", lambda c=capability, **_: gpus(c))
        assert "sine" in lowered_for("cuda") and "sine" in lowered_for("cuda", "triton")


def test_importing_the_library_imports_no_triton():
    code = "import moe_jax, moe_jax.kernels.grouped_matmul, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_implementations_are_refused():
    np.testing.assert_allclose(call(X, Y, "xla")["sum"], EXPECTED["sum"], rtol=1e-6)
    with pytest.raises(ValueError, match="must be 'xla', 'triton' or None, got 'tritn'"):
        call(X, Y, "tritn")


def test_capability_is_that_of_all_gpus(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus("9.0", "9.0"))
    assert lowering.cuda_capability() == 90
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus("9.0", "10.0"))
    with pytest.raises(ValueError, match="one compute capability"):
        lowering.cuda_capability()


@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.uint8])
def test_what_has_no_gradient(dtype):
    assert lowering.no_gradient(jnp.zeros(3, dtype)).dtype == jax.dtypes.float0
    assert lowering.no_gradient(jnp.ones(3)).tolist() == [0, 0, 0]
