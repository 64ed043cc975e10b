"""Loading a gpt-oss checkpoint: everything is checked first, then each tensor is read once.

Experts in MXFP4 stay as they lie on disk, two arrays of bytes. A few tensors are read at a time,
the largest first, and each is on its devices before its reader begins another: on the CPU, where
the array read becomes the device's own, loading takes no more memory than the weights. With a
mesh, every device reads only its own slices. On NVIDIA GPUs experts in MXFP4 are then laid out as
the kernels read them, one weight at a time, which takes the memory of one weight more.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt_oss.config import GptOssConfig
from gpt_oss.layout import ParameterSpec, parameter_specs
from moe_jax import MoEConfig
from moe_jax.checkpoint import Checkpoint, CheckpointError, TensorEntry
from moe_jax.experts.prepare import prepare_experts, prepare_for_devices
from moe_jax.quantization.mxfp4 import BLOCK_SIZE, BlockScaled
from moe_jax.quantization.packed import Packed, leaf_rules
from moe_jax.rules import check_divisible
from moe_jax.sharding import Sharding
from moe_jax.tagged import Tagged, tag

if TYPE_CHECKING:
    from gpt_oss.model import GptOss

type Index = tuple[slice, ...]
type Place = Callable[["TensorSource"], jax.Array]
type Weight = Tagged | Packed

_FLOATS = ("BF16", "F16", "F32")
_EXPONENT_BITS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_MAX_SCALE = 252  # beyond it the largest code, 6, passes the largest float32; 255 is NaN
_PREPARE = {None: prepare_for_devices, True: prepare_experts, False: lambda weight: weight}
_READERS = 4
_CHUNK = 1 << 20  # elements looked at together: their temporaries stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """An array of the model and the checkpoint's tensor that it is read from.

    Attributes:
        name: the tensor's name in the checkpoint.
        axes: axis tags of the array.
        shape: the array's shape.
        dtype: the array's dtype.
        transposed: whether the tensor has the last two axes the other way round.
        is_whole: whether every device needs all of it.
        read: reads the slices of the array that an index asks for.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool
    is_whole: bool
    read: Callable[[Index], np.ndarray]


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Sharding | None = None,
    progress: bool | None = None,
    prepare: bool | None = None,
    **moe_options: Any,
) -> "GptOss":
    """Loads a model from a folder in the layout of openai/gpt-oss-20b.

    Experts' weights may be in MXFP4 (`..._blocks` and `..._scales`) or floats in the layout of the
    transformers library, {expert, in, out}, which are transposed. Tensors the model does not know
    are errors, because they mean that the configuration is not the checkpoint's.

    Args:
        folder: has config.json and model.safetensors, or the shards and their index.
        dtype: what to compute in, and of all weights that are not in MXFP4: float32 or bfloat16.
            None computes in bfloat16 and keeps the dtypes of the file.
        sharding: the devices to spread the model over, and the rules; None puts it on the default
            device.
        progress: whether to show a progress bar on stderr; None shows it on a terminal only.
        prepare: whether experts in MXFP4 are laid out for the kernels of NVIDIA GPUs, see
            `moe_jax.prepare_experts`; None does so where the weights are on such devices.
        moe_options: `algorithm`, `tokens_per_expert_ratio`, `overflow` of `moe_jax.MoE`.

    Raises:
        ConfigError: config.json is missing or has a value that is not supported.
        CheckpointError: files are missing or damaged; or tensors are missing, unknown, or have
            the wrong dtype or shape, all of them in one message; or a value is NaN or infinite.
        ValueError: a mesh axis does not divide the axis that is spread over it.
    """
    from gpt_oss.model import GptOss

    config = GptOssConfig.from_folder(Path(folder))
    MoEConfig(config.experts_per_token, **moe_options)  # refuses before anything is read
    place = place_whole if sharding is None else place_sharded(sharding)
    shown = sys.stderr.isatty() if progress is None else progress
    checkpoint, laid_out = Checkpoint.open(folder), _PREPARE[prepare]
    parameters = read_parameters(
        checkpoint, config, dtype=dtype, place=place, progress=shown, prepare=laid_out
    )
    return GptOss(
        config,
        parameters.__getitem__,
        dtype=dtype or jnp.bfloat16,
        sharding=sharding,
        **moe_options,
    )


def read_parameters(
    checkpoint: Checkpoint,
    config: GptOssConfig,
    *,
    dtype: Any = None,
    place: Place | None = None,
    progress: bool = False,
    prepare: Callable[[Weight], Weight] = _PREPARE[False],
) -> dict[str, Weight]:
    """Reads every parameter of the model, by its name in `layout.parameter_specs`.

    Args:
        checkpoint: where from.
        config: the model's shape, which the checkpoint must have.
        dtype: float dtype of all weights that are not in MXFP4; None keeps the file's.
        place: makes a device array of a `TensorSource`; the default is `place_whole`.
        progress: whether to show a progress bar on stderr.
        prepare: what becomes of each parameter; the default keeps it as it is.

    Raises:
        CheckpointError: as `load_model`.
        TypeError: `dtype` is not a float dtype.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a float dtype, got {dtype}: MXFP4 bytes are kept anyway")
    specs = parameter_specs(config)
    _validate(checkpoint, specs)
    sources = {
        source.name: source
        for spec in specs.values()
        for source in _sources(checkpoint, spec, dtype)
    }
    arrays = _place_all(checkpoint, sources, place or place_whole, progress)
    return {name: prepare(_assemble(spec, arrays)) for name, spec in specs.items()}


def place_whole(source: TensorSource) -> jax.Array:
    """Puts a whole array on the default device."""
    return jax.device_put(source.read((slice(None),) * len(source.shape)))


def place_sharded(sharding: Sharding) -> Place:
    """Spreads arrays over a mesh; each device's slices are read, and nothing else.

    Blocks and scales of MXFP4 follow the rule of the axis "in" that they are cut from. Slices that
    several devices of this process hold are read once.
    """
    rules = leaf_rules(sharding.rules)
    mesh = sharding.mesh

    def place(source: TensorSource) -> jax.Array:
        own = {} if source.is_whole else rules
        for axis, size in zip(source.axes, source.shape, strict=True):
            check_divisible(source.name, axis, size, mesh, own)
        where = NamedSharding(mesh, PartitionSpec(*(own.get(axis) for axis in source.axes)))
        slices: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def read(index: Index | None) -> np.ndarray:
            index = index or ()  # an array without axes
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, source.shape, strict=True))
            if bounds not in slices:
                slices[bounds] = source.read(index)
            return slices[bounds]

        return jax.make_array_from_callback(source.shape, where, read, dtype=source.dtype)

    return place


def _place_all(
    checkpoint: Checkpoint, sources: dict[str, TensorSource], place: Place, progress: bool
) -> dict[str, jax.Array]:
    """Reads and places all arrays, the largest first, several at a time."""
    entries = sorted(checkpoint.tensors.values(), key=lambda entry: (-entry.nbytes, entry.name))

    def read(entry: TensorEntry) -> tuple[TensorEntry, jax.Array]:
        # Waiting for the device here bounds how many copies the host holds by the readers.
        return entry, place(sources[entry.name]).block_until_ready()

    with ThreadPoolExecutor(_READERS) as pool, _progress_bar(checkpoint, progress) as advance:
        arrays: dict[str, jax.Array] = {}
        for entry, array in pool.map(read, entries):
            arrays[entry.name] = array
            advance(entry.nbytes)
    return arrays


@contextlib.contextmanager
def _progress_bar(checkpoint: Checkpoint, shown: bool) -> Iterator[Callable[[int], object]]:
    """Gives a function to be called with the bytes of each tensor done."""
    if not shown:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=checkpoint.nbytes, desc="Loading", unit="B", unit_scale=True) as bar:
        yield bar.update


def _assemble(spec: ParameterSpec, arrays: dict[str, jax.Array]) -> Weight:
    """A parameter, made of arrays that are taken out of `arrays`."""
    if spec.name in arrays:
        return tag(arrays.pop(spec.name), *spec.axes)
    expert, out, _ = spec.axes
    return BlockScaled(
        tag(arrays.pop(spec.name + "_blocks"), expert, out, "block", "byte"),
        tag(arrays.pop(spec.name + "_scales"), expert, out, "block"),
    )


def _sources(checkpoint: Checkpoint, spec: ParameterSpec, dtype: Any) -> Iterator[TensorSource]:
    """What a parameter is read from: one tensor, or blocks and scales."""
    if spec.name not in checkpoint.tensors:
        axes = (*spec.axes[:-1], "block", "byte")
        for name, shape in _packed_shapes(spec).items():
            packed = dataclasses.replace(spec, name=name, axes=axes[: len(shape)], shape=shape)
            yield _source(checkpoint, packed, np.dtype(np.uint8))
        return
    kept = checkpoint.tensors[spec.name].dtype
    target = kept if dtype is None else np.dtype(dtype)
    yield _source(checkpoint, spec, target, transposed=spec.is_expert_weight)


def _source(
    checkpoint: Checkpoint, spec: ParameterSpec, dtype: np.dtype, transposed: bool = False
) -> TensorSource:
    def read(index: Index) -> np.ndarray:
        index = _swap_last_two(index) if transposed else index
        array = checkpoint.read(spec.name, index)
        _check_values(checkpoint, spec.name, index, array)
        array = array.astype(dtype, copy=False)
        return np.ascontiguousarray(array.swapaxes(-1, -2)) if transposed else array

    return TensorSource(spec.name, spec.axes, spec.shape, dtype, transposed, spec.is_whole, read)


def _swap_last_two[T](values: tuple[T, ...]) -> tuple[T, ...]:
    return (*values[:-2], values[-1], values[-2])


def _packed_shapes(spec: ParameterSpec) -> dict[str, tuple[int, ...]]:
    *lead, columns = spec.shape
    scales = (*lead, columns // BLOCK_SIZE)
    return {spec.name + "_blocks": (*scales, BLOCK_SIZE // 2), spec.name + "_scales": scales}


def _validate(checkpoint: Checkpoint, specs: dict[str, ParameterSpec]) -> None:
    """Raises one CheckpointError that lists every tensor which is not as the model needs it."""
    faults: list[str] = []
    known: set[str] = set()
    for spec in specs.values():
        expected = _expected_tensors(checkpoint, spec, faults)
        for name, (shape, dtypes) in expected.items():
            known.add(name)
            fault = _fault(checkpoint, name, shape, dtypes)
            if fault:
                faults.append(fault)
    for name, entry in checkpoint.tensors.items():
        if name not in known:
            faults.append(f"{entry.path.name}, {name}: expected no such tensor, got one")
    if faults:
        raise CheckpointError(
            f"{checkpoint.folder} does not hold the model that config.json describes:\n  "
            + "\n  ".join(faults)
        )


def _expected_tensors(
    checkpoint: Checkpoint, spec: ParameterSpec, faults: list[str]
) -> dict[str, tuple[tuple[int, ...], Sequence[str]]]:
    """Shape and accepted dtypes of each tensor that should be there for a parameter."""
    packed = _packed_shapes(spec) if spec.is_expert_weight else {}
    if not any(name in checkpoint.tensors for name in packed):
        transposed = spec.is_expert_weight
        shape = _swap_last_two(spec.shape) if transposed else spec.shape
        return {spec.name: (shape, _FLOATS)}
    expected: dict[str, tuple[tuple[int, ...], Sequence[str]]] = {
        name: (shape, ("U8",)) for name, shape in packed.items()
    }
    if spec.name in checkpoint.tensors:
        faults.append(f"{spec.name}: expected floats or MXFP4, got both")
        expected[spec.name] = (_swap_last_two(spec.shape), _FLOATS)
    return expected


def _fault(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtypes: Sequence[str]
) -> str | None:
    wanted = f"{' or '.join(dtypes)} {list(shape)}"
    entry = checkpoint.tensors.get(name)
    if entry is None:
        packed = (
            " (or MXFP4, as _blocks and _scales)" if len(shape) == 3 and dtypes == _FLOATS else ""
        )
        return f"{name}: expected {wanted}{packed}, got nothing"
    if entry.shape != shape or entry.dtype_name not in dtypes:
        got = f"{entry.dtype_name} {list(entry.shape)}"
        return f"{entry.path.name}, {name}: expected {wanted}, got {got}"
    return None


def _check_values(checkpoint: Checkpoint, name: str, index: Index, array: np.ndarray) -> None:
    """Raises CheckpointError at the first NaN or infinity, or scale that leads to one."""
    entry = checkpoint.tensors[name]
    if name.endswith("_blocks") or not array.size:
        return
    if entry.dtype_name == "U8":
        mask, limit, kind = 0xFF, _MAX_SCALE + 1, f"a scale byte above {_MAX_SCALE}"
        bits = array.reshape(-1)
    else:
        mask = limit = _EXPONENT_BITS[entry.dtype_name]
        kind, bits = "NaN or infinity", array.reshape(-1).view(f"u{array.itemsize}")
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK] & bits.dtype.type(mask)
        if chunk.max() >= limit:
            found = np.unravel_index(start + int(np.argmax(chunk >= limit)), array.shape)
            firsts = [s.indices(n)[0] for s, n in zip(index, entry.shape, strict=True)]
            place = [int(i) + first for i, first in zip(found, firsts, strict=True)]
            raise CheckpointError(f"{entry.path}, {name}: {kind} at {place}")
