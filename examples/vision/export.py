"""Writes a vision MoE to ONNX and runs it in onnxruntime:  python examples/vision/export.py

Three files are written: `custom.onnx`, where each MoE layer is a node `trt.plugins::CustomMoE` for
a TensorRT plugin and the file carries the operator's definition for other runtimes;
`custom_half.onnx`, the same with float16 experts; `dense.onnx`, of standard operators only. Each is
run on random images and compared with Flax, and its MoE layers are read back into a fresh model.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # as a script its folder is on the path, where its modules would pass for top-level ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
from flax import nnx
from onnx import FunctionProto, ModelProto

from moe_jax.formats.modules import load_layers, moe_layers
from moe_jax.formats.onnx.common import AddLayer
from moe_jax.formats.onnx.custom import add_custom, custom_moe_function, import_custom
from moe_jax.formats.onnx.dense import add_dense, import_dense
from moe_jax.formats.onnx.graph import save
from vision.graph import to_onnx
from vision.model import VisionConfig, VisionMoE

MODES: Mapping[str, tuple[AddLayer, Sequence[FunctionProto], Any]] = {
    "custom": (add_custom, (custom_moe_function(),), import_custom),
    "custom_half": (
        functools.partial(add_custom, expert_dtype="float16"),
        (custom_moe_function(),),
        import_custom,
    ),
    "dense": (add_dense, (), import_dense),
}
"""How MoE layers are written, what the file carries besides, and how they are read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the files; a temporary one if absent")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    arguments = parser.parse_args(argv)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        export(arguments.out, arguments.seed)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), arguments.seed)
    return 0


def export(folder: Path, seed: int = 0) -> dict[str, float]:
    """Writes the files, prints a line about each, and returns the largest error of each."""
    config = VisionConfig()
    model = VisionMoE(config, nnx.Rngs(seed))
    shape = (4, config.image_size, config.image_size, config.channels)
    images = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    expected = np.asarray(nnx.jit(lambda model, images: model(images))(model, images))
    layers = moe_layers(model)
    print(f"MoE layers: {', '.join(layers)}; logits {list(expected.shape)}")
    errors = {}
    for name, (add_moe, functions, read) in MODES.items():
        path = folder / f"{name}.onnx"
        save(to_onnx(model, add_moe, functions), path)
        errors[name] = float(abs(run(path, images) - expected).max())
        layers = read(path)
        same = _is_same(config, model, layers)
        print(
            f"{path.name:<18}{path.stat().st_size:>8} bytes   error {errors[name]:.1e}   "
            f"{len(layers)} layers read back{', bit for bit' if same else ', rounded'}"
        )
    return errors


def run(path: Path, images: np.ndarray) -> np.ndarray:
    """The logits that onnxruntime computes. Raises ImportError where it is not installed."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return np.asarray(session.run(["logits"], {"images": images})[0])


def _is_same(config: VisionConfig, model: VisionMoE, layers: Mapping[str, Any]) -> bool:
    """Puts layers into a model of other weights, where their dtypes allow it, and compares."""
    if any(leaf.dtype != np.float32 for m in layers.values() for leaf in jax.tree.leaves(m)):
        return False
    other = VisionMoE(config, nnx.Rngs(1))
    load_layers(other, layers)
    pairs = zip(moe_layers(model).values(), moe_layers(other).values(), strict=True)
    return all(
        bool((a == b).all())
        for one, two in pairs
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
