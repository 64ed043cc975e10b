"""Calls Gluon and Triton kernels from JAX, in the manner of `jax_triton.triton_call`.

jax-triton 0.4 takes Gluon kernels, but has the passes of plain Triton run over them. Those look for
layouts of their own and put waits where they see none, so that a kernel that says where its values
lie, and when it waits, is no longer what was written. Here a kernel goes through the stages that
Triton has for its language. What launches it is what launches jax-triton's kernels; that hashes
and compares a kernel's whole text whenever it runs, so the text holds no source lines, and no
intermediate form.

This module imports Triton where it is called: only a lowering for CUDA does.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax

from moe_jax.kernels.lowering import cuda_capability

_TYPES = {"int32": "i32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_ALIGNMENT = 16
"""Bytes that arrays are aligned to; XLA aligns them to more."""


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        name: of its entry point.
        ptx: the assembly.
        shared_bytes: shared memory of a program.
        num_warps: warps of a program.
        capability: the compute capability it is for.
    """

    name: str
    ptx: str
    shared_bytes: int
    num_warps: int
    capability: int


@dataclasses.dataclass(frozen=True)
class Options:
    """How a kernel is compiled.

    Attributes:
        num_warps: warps a program.
        num_stages: how deep Triton pipelines a loop.
        max_registers: registers a thread, at most; None for the compiler's choice.
    """

    num_warps: int
    num_stages: int = 3
    max_registers: int | None = None


def kernel_call(
    *arguments: jax.Array | int,
    kernel: Any,
    out_type: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int = 3,
    max_registers: int | None = None,
    aliases: dict[int, int] | None = None,
    **constants: Any,
) -> Any:
    """Calls a kernel. Only while lowering for CUDA, for GPUs of one capability.

    Args:
        arguments: arrays and 32-bit integers for the kernel's first parameters, in order.
        kernel: a `gluon.jit` or `triton.jit` function; its next parameters are the results.
        out_type: a pytree of `jax.ShapeDtypeStruct`, the results.
        grid: programs, up to three sizes.
        num_warps: warps a program.
        num_stages: how deep Triton pipelines a loop; Gluon kernels say so themselves.
        max_registers: registers a thread, at most.
        aliases: which of the arrays, by number, become which of the results.
        constants: values of the kernel's constexpr parameters.

    Returns:
        A pytree of arrays like `out_type`. What the kernel does not write is not defined.

    Raises:
        TypeError: the kernel has other parameters; an array's dtype is none of i32, f32, f16, bf16.
    """
    results, treedef = jax.tree.flatten(out_type)
    operands = (*arguments, *results)
    kinds = tuple(_kind(operand) for operand in operands)
    named = tuple(sorted(constants.items()))
    options = Options(num_warps, num_stages, max_registers)
    code = compile_kernel(kernel, kinds, named, options, cuda_capability())
    call = _launch(code, grid, tuple(x if isinstance(x, int) else None for x in operands))
    arrays = [x for x in arguments if not isinstance(x, int)]
    function = jax.ffi.ffi_call(_target(), results, input_output_aliases=aliases)
    return jax.tree.unflatten(treedef, function(*arrays, opaque=call))


@functools.cache
def compile_kernel(
    kernel: Any,
    kinds: tuple[str, ...],
    constants: tuple[tuple[str, Any], ...],
    options: Options,
    capability: int,
) -> Code:
    """Compiles a kernel; needs no GPU.

    Args:
        kernel: a `gluon.jit` or `triton.jit` function.
        kinds: Triton's types of the parameters that are not constants, in order, such as `*bf16`.
        constants: names and values of the parameters that are.
        options: how.
        capability: the compute capability to compile for.

    Raises:
        TypeError: the kernel has other parameters.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", capability, 32)
    backend: Any = make_backend(target)
    parsed = backend.parse_options(
        {
            "num_warps": options.num_warps,
            "num_stages": options.num_stages,
            "enable_fp_fusion": True,
            "maxnreg": options.max_registers,
        }
    )
    source = kernel_source(kernel, kinds, dict(constants))
    stages: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        backend.add_stages(stages, parsed, source.language)
        code = source.make_ir(
            target,
            parsed,
            backend.get_codegen_implementation(parsed),
            backend.get_module_map(),
            _context(backend),
        )
        for name, stage in stages.items():
            code = stage(code, metadata)
            if name == "ptx":
                break
    if metadata.get("global_scratch_size"):
        raise TypeError(f"{kernel.__name__} needs global scratch memory, which it does not get")
    return Code(metadata["name"], code, metadata["shared"], options.num_warps, capability)


def kernel_source(kernel: Any, kinds: tuple[str, ...], constants: dict[str, Any]) -> Any:
    """What Triton compiles: a kernel, the types of its parameters, and its constants."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    names = [name for name in kernel.arg_names if name not in constexprs]
    if constexprs != set(constants) or len(names) != len(kinds):
        raise TypeError(
            f"{kernel.__name__} takes {len(names)} arguments {names} and the constants "
            f"{sorted(constexprs)}, got {len(kinds)} arguments and {sorted(constants)}"
        )
    types = dict(zip(names, kinds, strict=True))
    aligned = {
        (i,): [["tt.divisibility", _ALIGNMENT]]
        for i, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*")
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return language(kernel, signature, constants, aligned)


@functools.lru_cache
def _launch(code: Code, grid: tuple[int, ...], scalars: tuple[int | None, ...]) -> bytes:
    """The call as jaxlib's launcher reads it; None stands for an array."""
    from jaxlib import gpu_triton

    binary = gpu_triton.TritonKernel(
        code.name, code.num_warps, 1, code.shared_bytes, code.ptx, "", code.capability
    )
    parameters = [
        gpu_triton.create_array_parameter(0, _ALIGNMENT)
        if scalar is None
        else gpu_triton.create_scalar_parameter(scalar, "i32")
        for scalar in scalars
    ]
    sizes = (*grid, 1, 1)[:3]
    call = gpu_triton.TritonKernelCall(binary, *sizes, parameters)
    return zlib.compress(call.to_proto(code.name, b""))


def _kind(operand: Any) -> str:
    if isinstance(operand, int):
        return "i32"
    if operand.dtype.name not in _TYPES:
        raise TypeError(f"kernels take arrays of {', '.join(_TYPES)}, got {operand.dtype}")
    return "*" + _TYPES[operand.dtype.name]


def _context(backend: Any) -> Any:
    from triton._C.libtriton import ir

    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    return context


def _target() -> str:
    import jax_triton

    return jax_triton.CUSTOM_CALL_TARGET_NAME
