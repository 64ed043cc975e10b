"""Triton kernels without a GPU: what they compile to, and their arithmetic in the interpreter.

`compiled` makes the machine code that a GPU would get, and reports what it occupies there.
`run_interpreted` runs a file of tests in a process of its own, whose kernels Triton interprets in
NumPy: whether it does is decided when a kernel is decorated, so one process cannot do both.
"""

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

MISSING = "needs triton and jax-triton, which the dev group installs on Linux x86-64"
CAPABILITIES = (80, 90, 100)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a kernel compiles to.

    Attributes:
        registers: registers a thread.
        spills: bytes a thread stores to local memory for want of registers.
        shared: bytes of shared memory a program.
        ptx: the assembly.
        cubin: the machine code, for `sass`.
    """

    registers: int
    spills: int
    shared: int
    ttgir: str
    ptx: str
    cubin: bytes

    def sass(self) -> str:
        """The machine code as text."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run(
                [_tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True
            ).stdout


def compiled(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> Compiled:
    """Compiles `kernel` for sm_`capability`.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function.
        arguments: Triton's types by name, such as `*bf16` or `i32`; pointers are taken to be
            aligned to 16 bytes, as jax-triton takes them.
        constants: values of the constexpr parameters by name.
        capability: 80, 90 or 100.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        options: further options of Triton's backend, such as `maxnreg`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    if isinstance(kernel, GluonJITFunction):
        source = GluonASTSource(kernel, signature, dict(constants), aligned)
    else:
        source = ASTSource(kernel, signature, dict(constants), aligned)
    log = io.StringIO()
    with contextlib.ExitStack() as scope:
        scope.enter_context(triton.knobs.nvidia.scope())
        scope.enter_context(triton.knobs.compilation.scope())
        scope.enter_context(triton.knobs.cache.scope())
        scope.enter_context(contextlib.redirect_stdout(log))
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        triton.knobs.compilation.disable_line_info = True  # as `kernel_call` does
        triton.knobs.cache.dir = scope.enter_context(tempfile.TemporaryDirectory())
        result = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": num_warps,
                "num_stages": num_stages,
                "enable_fp_fusion": True,
                **options,
            },
        )
    usage = log.getvalue()
    return Compiled(
        registers=_number(r"Used (\d+) registers", usage),
        spills=_number(r"(\d+) bytes spill stores", usage),
        shared=result.metadata.shared,
        ttgir=result.asm["ttgir"],
        ptx=result.asm["ptx"],
        cubin=result.asm["cubin"],
    )


class HostTensor:
    """A NumPy array as Triton's interpreter wants its arguments; kernels write to it in place."""

    def __init__(self, array: np.ndarray | None):
        self.array = array

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    @property
    def _array(self) -> np.ndarray:
        assert self.array is not None
        return self.array

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def untyped_storage(self) -> "HostTensor":
        return self

    def cpu(self) -> "HostTensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "HostTensor":
        return HostTensor(None)

    def set_(self, storage: "HostTensor", *_: Any) -> None:
        self.array = storage.array

    def copy_(self, other: "HostTensor") -> None:
        assert other.array is self.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self._array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self._array.itemsize for s in self._array.strides)


def interpret(kernel: Any, grid: tuple[int, ...], *arrays: np.ndarray, **constants: Any) -> None:
    """Runs a kernel on contiguous NumPy arrays; only where `run_interpreted` runs it.

    The interpreter holds bfloat16 as bare integers: it converts them, but neither `tl.dot` nor
    other arithmetic on them means anything. Use float32.
    """
    assert all(array.flags.c_contiguous for array in arrays)
    kernel[grid](*map(HostTensor, arrays), **constants)


def interpreted_call(
    kernel: Any, *arguments: Any, out_type: Any, grid: tuple[int, ...], **options: Any
) -> Any:
    """In the place of what launches a kernel; only where `run_interpreted` runs it.

    Results start as 77, so that a test sees elements that no program writes.
    """
    constants = {
        name: value
        for name, value in options.items()
        if name not in ("num_warps", "num_stages", "max_registers")
    }
    inputs = [HostTensor(np.array(a, order="C")) if np.ndim(a) else a for a in arguments]
    outputs = jax.tree.map(lambda t: np.full(t.shape, 77, t.dtype), out_type)
    kernel[grid](*inputs, *map(HostTensor, jax.tree.leaves(outputs)), **constants)
    return outputs


def run_interpreted(name: str) -> None:
    """Runs tests/kernels/NAME under pytest with Triton's interpreter; NAME is not test_*.py."""
    path = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        cwd=path.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{name}, interpreted:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}")


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"ptxas said nothing like {pattern!r}: {text!r}"
    return int(found.group(1))


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
