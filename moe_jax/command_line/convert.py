"""A file of one format made of another's, and checked before it has its name.

Files are written into a folder of their own beside the target, run, and moved to their names only
when every layer agrees with what it was made of.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.command_line.options import (
    ReadOptions,
    UsageError,
    WriteOptions,
    format_of_target,
)
from moe_jax.command_line.progress import Progress
from moe_jax.command_line.sources import Source, open_source
from moe_jax.command_line.targets import dequantized, run_layer, target_of
from moe_jax.experts.layers import GatedMLP, GptOssMLP
from moe_jax.layer import MoE
from moe_jax.tagged import is_tagged
from moe_jax.variables import value

TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "float16": 1e-2}
"""The largest error that passes, by the dtype that the target computes in."""

_TOKENS = (2, 16)


class CheckError(Exception):
    """What was written does not compute what it was made of; nothing is left of it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `convert` is asked for.

    Attributes:
        source: the file or folder to read.
        target: the file to write.
        read: what the source does not say.
        write: how the target is written.
        format: the format to write; None where the suffix says it.
        layers: the names of the layers to take; all where empty.
        dequantize: the dtype that packed weights are decoded to; None keeps them packed.
        tolerance: the largest error; by default that of `TOLERANCES`.
        seed: of the random tokens.
        force: whether files that are there may be replaced.
        progress: whether to show a bar; by default on a terminal.
    """

    source: Path
    target: Path
    read: ReadOptions = ReadOptions()
    write: WriteOptions = WriteOptions()
    format: str | None = None
    layers: Sequence[str] = ()
    dequantize: str | None = None
    tolerance: float | None = None
    seed: int = 0
    force: bool = False
    progress: bool | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        format: the format that was written.
        errors: the error of each layer: the largest difference, relative to the largest number
            that the source makes.
        tolerance: what they were held against.
        runtime: what ran the target.
        files: what was written, with its size.
    """

    format: str
    errors: Mapping[str, float]
    tolerance: float
    runtime: str
    files: Mapping[Path, int]


def convert(request: Request) -> Report:
    """Does what is asked for.

    Raises:
        UsageError, FormatError, CheckpointError: it cannot be done; the message says why.
        CheckError: the error of a layer is above the tolerance.
        FileExistsError: there is such a file already.
    """
    name = format_of_target(request.target, request.format)
    _check_free([request.target], request.force)
    if not request.target.parent.is_dir():
        raise UsageError(f"{request.target.parent} is no folder")
    source = open_source(request.source, request.read)
    names = _chosen(source, request.layers)
    bar = Progress(2 * len(names) + 2, request.progress)
    try:
        return _converted(request, name, source, names, bar)
    finally:
        bar.close()


def _converted(
    request: Request, name: str, source: Source, names: Sequence[str], bar: Progress
) -> Report:
    originals = {layer: source.read(layer) for layer in bar.over(names, "reading")}
    layers = originals
    if request.dequantize is not None:
        layers = {layer: dequantized(one, request.dequantize) for layer, one in layers.items()}
    target = target_of(name, layers, request.write)
    rng = np.random.default_rng(request.seed)
    dtype = request.write.dtype or "float32"
    inputs = {layer: random_inputs(rng, one, dtype) for layer, one in layers.items()}
    folder = request.target.parent
    with tempfile.TemporaryDirectory(prefix=f".{request.target.name}.", dir=folder) as temporary:
        draft = Path(temporary) / request.target.name
        bar.step("writing")
        target.write(draft, layers, request.write)
        written = sorted(Path(temporary).iterdir(), key=lambda path: path == draft)
        _check_free([folder / path.name for path in written], request.force)
        bar.step("running what was written")
        outputs, runtime = _run(target.run, draft, layers, inputs, request.write)
        dtype = _loosest(layers, request.write) if request.tolerance is None else dtype
        tolerance = TOLERANCES[dtype] if request.tolerance is None else request.tolerance
        errors = {}
        for layer in bar.over(names, "comparing"):
            expected = run_layer(originals[layer], inputs[layer])
            errors[layer] = relative_error(outputs[layer], expected)
        _check_errors(request.target, errors, tolerance, runtime)
        files = {folder / path.name: path.stat().st_size for path in written}
        for path in written:
            os.replace(path, folder / path.name)
    return Report(name, errors, tolerance, runtime, files)


def random_inputs(rng: np.random.Generator, layer: Any, dtype: str) -> tuple[np.ndarray, ...]:
    """Tokens, numbers of `dtype` in float32; ids and scores too for experts without a router."""
    if isinstance(layer, MoE):
        weight = value(layer.router_weight)
        x = _normal(rng, weight.size("d"), dtype)
        return (abs(x) if layer.config.router.score == "linear" else x,)
    assert isinstance(layer, GptOssMLP | GatedMLP)  # what OpenVINO's files hold
    down = layer.down
    count = min(2, down.size("expert"))
    ids = np.stack([rng.permutation(down.size("expert"))[:count] for _ in range(np.prod(_TOKENS))])
    scores = rng.random((*_TOKENS, count), np.float32)
    return _normal(rng, down.size("out"), dtype), ids.reshape(*_TOKENS, count), scores


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference relative to the largest number; inf where only one is finite."""
    finite = np.isfinite(expected)
    if found.shape != expected.shape or (np.isfinite(found) != finite).any() or not finite.any():
        return float("inf")
    difference = abs(found[finite].astype(np.float64) - expected[finite]).max()
    return float(difference / (abs(expected[finite]).max() or 1.0))


def _normal(rng: np.random.Generator, size: int, dtype: str) -> np.ndarray:
    x = rng.normal(size=(*_TOKENS, size))
    return x.astype(dtype).astype(np.float32)


def _run(run: Any, *arguments: Any) -> Any:
    """Runs what was written; whatever a runtime raises means that it does not run."""
    try:
        return run(*arguments)
    except ImportError:
        raise
    except Exception as error:
        raise CheckError(f"what was written cannot be run: {error}") from error


def _loosest(layers: Mapping[str, Any], options: WriteOptions) -> str:
    """The dtype that the target computes in: as asked for, or else that of the experts."""
    if options.dtype is not None:
        return options.dtype
    experts = [one.experts if isinstance(one, MoE) else one for one in layers.values()]
    leaves = _leaves(experts)
    return "float16" if any(str(leaf.dtype) == "float16" for leaf in leaves) else "float32"


def _leaves(experts: Sequence[Any]) -> list[Any]:
    import jax

    trees = [one.tree() if hasattr(one, "tree") else one for one in experts]
    return jax.tree.leaves(trees, is_leaf=is_tagged)


def _chosen(source: Source, wanted: Sequence[str]) -> list[str]:
    unknown = [name for name in wanted if name not in source.names]
    if unknown:
        raise UsageError(f"no layer {unknown[0]!r}, there are {', '.join(source.names)}")
    return [name for name in source.names if not wanted or name in wanted]


def _check_free(paths: Sequence[Path], force: bool) -> None:
    there = [path for path in paths if os.path.lexists(path)]
    if any(path.is_dir() for path in there):
        raise UsageError(f"{there[0]} is a folder")
    if there and not force:
        raise FileExistsError(f"{there[0]} is there already: --force replaces it")


def _check_errors(
    target: Path, errors: Mapping[str, float], tolerance: float, runtime: str
) -> None:
    worst = max(errors, key=lambda layer: errors[layer])
    if not errors[worst] <= tolerance:
        raise CheckError(
            f"{target} is not written: layer {worst!r} has an error of {errors[worst]:.1e} by "
            f"{runtime}, above the tolerance of {tolerance:.1e} (--tolerance)"
        )
