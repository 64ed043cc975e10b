"""Operations whose backend is decided at lowering, by the platform they are lowered for.

Which device a function will run on is not known while it is traced: the same jaxpr may be lowered
for several. So an operation with a kernel for CUDA is a primitive, whose shapes are those of its
definition in XLA, and which becomes the kernel, or the definition, when it is lowered.

The primitive has no derivative: wrap calls in `jax.custom_vjp`.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.extend as jex
import numpy as np
from jax.interpreters import batching, mlir

_LEAST_CAPABILITY = 80
"""Of GPUs that have bfloat16 and asynchronous copies."""

_INSTALL = "install it with the extra moe_jax[cuda13] or moe_jax[cuda12]"


def per_platform(
    name: str,
    default: Callable[..., Any],
    cuda: Callable[..., Any],
    like: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Makes an operation that is `cuda` where it is lowered for CUDA, and `default` elsewhere.

    Args:
        name: what jaxprs call the operation.
        default: (*arrays, **static) -> a pytree of arrays. Defines shapes and dtypes, too.
        cuda: the same function for NVIDIA GPUs. It is called only while lowering for CUDA, with
            jax-triton installed, and so may import what only such a machine has.
        like: where `default` is long, another function of the same arguments, quick to trace, whose
            results have the same shapes and dtypes.

    Returns:
        A function (*arrays, implementation=None, **static). Static arguments are hashable.
        `implementation` is None, "xla" for `default` everywhere, or "triton" where `default` must
        not take the place of `cuda`. Under `jax.vmap` it works on one element after the other.

    Raises:
        ValueError: `implementation` is none of these; on lowering, it is "triton" for another
            platform than CUDA, or for GPUs older than compute capability 8.0.
        ImportError: on lowering `implementation="triton"` for CUDA without jax-triton.
    """
    primitive = jex.core.Primitive(f"moe_jax_{name}")
    primitive.multiple_results = True
    shaped = like or default

    def operation(*arrays: Any, implementation: str | None = None, **static: Any) -> Any:
        check_implementation(implementation)
        shapes = jax.eval_shape(functools.partial(shaped, **static), *arrays)
        results = primitive.bind(*arrays, implementation=implementation, **static)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    def flat(function: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
        return lambda *arrays, **static: jax.tree.leaves(function(*arrays, **static))

    def evaluate(*avals: Any, implementation: str | None, **static: Any) -> list[Any]:
        del implementation
        shapes = jax.make_jaxpr(functools.partial(shaped, **static))(*avals)
        return list(shapes.out_avals)

    @functools.cache
    def compiled(**params: Any) -> Callable[..., list[jax.Array]]:
        return jax.jit(functools.partial(primitive.bind, **params))

    def batched(arrays: Any, axes: Any, **params: Any) -> tuple[Any, Any]:
        return _one_after_the_other(functools.partial(primitive.bind, **params), arrays, axes)

    lower_default = mlir.lower_fun(flat(default), multiple_results=True)
    lower_cuda = mlir.lower_fun(flat(cuda), multiple_results=True)

    def on_cuda(context: Any, *values: Any, implementation: str | None, **static: Any) -> Any:
        kernel = (
            implementation != "xla"
            and _has_jax_triton(name, implementation)
            and _has_new_gpus(name, implementation)
        )
        return (lower_cuda if kernel else lower_default)(context, *values, **static)

    def elsewhere(context: Any, *values: Any, implementation: str | None, **static: Any) -> Any:
        if implementation == "triton":
            raise ValueError(
                f"{name} with implementation='triton' needs an NVIDIA GPU, but is lowered for "
                f"{' and '.join(map(repr, context.module_context.platforms))}: "
                "use implementation=None or 'xla'"
            )
        return lower_default(context, *values, **static)

    primitive.def_abstract_eval(evaluate)
    primitive.def_impl(lambda *arrays, **params: compiled(**params)(*arrays))
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, elsewhere)
    mlir.register_lowering(primitive, on_cuda, platform="cuda")
    return operation


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is one there is."""
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"implementation must be 'xla', 'triton' or None, got {implementation!r}")


def vary_together(*operands: Any) -> tuple[Any, ...]:
    """The operands, each a pytree, as values that vary over the same manual axes of `shard_map`.

    A loop wants what it carries to vary as what it adds, and `jax.custom_vjp` wants gradients to
    vary as its operands. Where an operand did not vary, its gradient becomes the sum over devices.
    """
    leaves, treedef = jax.tree.flatten(operands)
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in leaves]
    axes = frozenset().union(*varying)
    if not axes:
        return operands
    return jax.tree.unflatten(
        treedef,
        [
            jax.lax.pcast(leaf, tuple(sorted(axes - own)), to="varying") if axes - own else leaf
            for leaf, own in zip(leaves, varying, strict=True)
        ],
    )


def no_gradient(array: jax.Array) -> Any:
    """The cotangent of an array that has no gradient, be it of integers or of floats."""
    if jax.numpy.issubdtype(array.dtype, jax.numpy.inexact):
        return jax.numpy.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def has_kernels(devices: Iterable[Any]) -> bool:
    """Whether operations become kernels there: on NVIDIA GPUs, with jax-triton installed."""
    if importlib.util.find_spec("jax_triton") is None:
        return False
    try:
        gpus = jax.devices("cuda")
    except RuntimeError:  # JAX has no such backend
        return False
    return set(devices) <= set(gpus)


def cuda_capability() -> int:
    """The compute capability of this process's GPUs, 90 for 9.0.

    Call it only while lowering for CUDA.

    Raises:
        ValueError: the process has no GPU, or GPUs of different capabilities.
    """
    try:
        found = _capabilities()
    except RuntimeError:  # JAX has no such backend
        found = []
    if not found:
        raise ValueError(
            "kernels are lowered for the GPUs of the process, which has none: lower where they "
            "are, or use implementation='xla'"
        )
    if len(found) > 1:
        raise ValueError(
            f"kernels are lowered for GPUs of one compute capability, this process has {found}: "
            "hide some with CUDA_VISIBLE_DEVICES, or use implementation='xla'"
        )
    return found[0]


def _capabilities() -> list[int]:
    """The compute capabilities of this process's GPUs, ascending, 90 for 9.0."""
    found = {device.compute_capability for device in jax.local_devices(backend="cuda")}
    return sorted(10 * int(major) + int(minor) for major, minor in (c.split(".") for c in found))


def _has_new_gpus(name: str, implementation: str | None) -> bool:
    """Whether the kernel runs on this process's GPUs. Raises ValueError where it must and cannot.

    A process without GPUs says so when a kernel asks for their capability.
    """
    try:
        oldest = min(_capabilities(), default=_LEAST_CAPABILITY)
    except RuntimeError:  # JAX has no such backend
        return True
    if oldest >= _LEAST_CAPABILITY:
        return True
    needed = f"needs GPUs of compute capability 8.0 or later, this process has {oldest / 10}"
    if implementation == "triton":
        raise ValueError(
            f"{name} with implementation='triton' {needed}: use implementation=None or 'xla'"
        )
    _warn_once(f"{name} runs in XLA, slower than its kernel, which {needed}")
    return False


def _has_jax_triton(name: str, implementation: str | None) -> bool:
    """Whether the kernel can be lowered for CUDA. Raises ImportError where it must and cannot."""
    if importlib.util.find_spec("jax_triton") is not None:
        return True
    if implementation == "triton":
        raise ImportError(f"{name} with implementation='triton' needs jax-triton: {_INSTALL}")
    _warn_once(f"{name} runs in XLA, slower than its kernel, which needs jax-triton: {_INSTALL}")
    return False


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def _one_after_the_other(
    function: Callable[..., list[jax.Array]], arrays: Any, axes: Any
) -> tuple[list[jax.Array], list[int]]:
    """The batching rule: a loop, with operands that are not batched left as they are."""
    moved = [
        array if axis is None else jax.numpy.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    is_batched = [axis is not None for axis in axes]

    def one(own: list[jax.Array]) -> list[jax.Array]:
        rest = iter(own)
        return function(*(next(rest) if b else a for a, b in zip(moved, is_batched, strict=True)))

    results = jax.lax.map(one, [a for a, b in zip(moved, is_batched, strict=True) if b])
    return results, [0] * len(results)
