"""Writes a vision MoE to ONNX and runs it in onnxruntime:  python examples/vision/export.py

Three files are written: `custom.onnx`, where each MoE layer is a node `trt.plugins::CustomMoE` for
a TensorRT plugin and the file carries the operator's definition for other runtimes;
`custom_half.onnx`, the same with float16 experts; `dense.onnx`, of standard operators only. Each is
run on random images and compared with Flax, and its MoE layers are read back.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    # as a script its folder is on the path, where its modules would pass for top-level ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from onnx import FunctionProto

from moe_jax.formats.onnx import custom, dense
from moe_jax.formats.onnx.common import AddLayer
from moe_jax.formats.onnx.graph import save
from vision.graph import to_onnx
from vision.model import VisionConfig, VisionMoE

add_custom_half = functools.partial(custom.add_custom, expert_dtype="float16")

MODES: Mapping[str, tuple[AddLayer, Sequence[FunctionProto]]] = {
    "custom": (custom.add_custom, (custom.custom_moe_function(),)),
    "custom_half": (add_custom_half, (custom.custom_moe_function(),)),
    "dense": (dense.add_dense, ()),
}
"""How MoE layers are written, and what definitions the file carries."""

READERS = {"custom": custom.read, "custom_half": custom.read, "dense": dense.read}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Writes a vision MoE to ONNX and runs it.")
    parser.add_argument("--out", type=Path, help="folder for the files; a temporary one if absent")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = VisionMoE(VisionConfig(), nnx.Rngs(arguments.seed))
        export(model, folder, arguments.seed)
    return 0


def export(model: VisionMoE, folder: Path, seed: int) -> dict[str, float]:
    """Writes the files, prints a line about each, and returns the largest error of each."""
    config = model.config
    shape = (4, config.image_size, config.image_size, config.channels)
    images = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    expected = np.asarray(forward(model, images))
    print(f"{shape[0]} images, logits up to {abs(expected).max():.2f}")
    errors = {}
    for name, (add_moe, functions) in MODES.items():
        path = folder / f"{name}.onnx"
        save(to_onnx(model, add_moe, functions), path)
        errors[name] = float(abs(run(path, images) - expected).max())
        print(
            f"{path.name:<17} {path.stat().st_size:>7} bytes, largest error {errors[name]:.1e}, "
            f"MoE layers: {', '.join(READERS[name](path))}"
        )
    return errors


@nnx.jit
def forward(model: VisionMoE, images: np.ndarray) -> jax.Array:
    """The logits that Flax computes."""
    return model(jnp.asarray(images))


def run(path: Path, images: np.ndarray) -> np.ndarray:
    """The logits that onnxruntime computes. Raises ImportError where it is not installed."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return np.asarray(session.run(["logits"], {"images": images})[0])


if __name__ == "__main__":
    sys.exit(main())
