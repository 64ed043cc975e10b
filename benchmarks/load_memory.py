"""Loads a checkpoint and compares the process's peak memory with the checkpoint's size.

    python benchmarks/load_memory.py FOLDER [--dtype float32]

Works on released checkpoints and on those of `sparse_checkpoint.py`.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt_oss.loader import load_model  # noqa: E402
from moe_jax.checkpoint import Checkpoint  # noqa: E402

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", help="dtype of the weights that are not in MXFP4")
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    size = Checkpoint.open(arguments.folder).nbytes
    jax.device_put(0.0).block_until_ready()
    before = peak_bytes()
    start = time.perf_counter()
    model = load_model(arguments.folder, dtype=arguments.dtype, progress=arguments.progress)
    jax.block_until_ready(jax.tree.leaves(model))
    seconds = time.perf_counter() - start
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    print(f"checkpoint          {size / 1e9:9.3f} GB")
    print(f"held by the model   {held / 1e9:9.3f} GB")
    print(f"peak before loading {before / 1e9:9.3f} GB")
    print(
        f"peak                {peak_bytes() / 1e9:9.3f} GB, {peak_bytes() / size:.3f} of the size"
    )
    print(f"seconds             {seconds:9.2f}, {size / seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
