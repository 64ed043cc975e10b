"""Writes `goldens_mxfp4.npz`: what transformers makes of every MXFP4 code under every scale.

Run by hand; tests only read the result. The stored file was made with Python 3.11, torch 2.13.0
(CPU), transformers 5.23.0:

    python3.11 -m venv goldens && goldens/bin/pip install torch==2.13.0 transformers==5.23.0
    goldens/bin/python tests/quantization/make_goldens_mxfp4.py

Keys: `bfloat16` and `float32`, the bits [32, 256] of a weight [in, out] whose row `out` has the
scale byte `out` and the codes 0 to 15, each in both halves of a byte; `versions`.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def main() -> None:
    """Writes the file next to this script."""
    blocks = torch.arange(16, dtype=torch.uint8).mul(17).expand(1, 256, 1, 16)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(1, 256, 1)
    arrays = {}
    for dtype, bits in ((torch.bfloat16, torch.uint16), (torch.float32, torch.uint32)):
        weight = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert weight.shape == (1, 32, 256)
        name = str(dtype).removeprefix("torch.")
        arrays[name] = weight[0].contiguous().view(bits).numpy()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    path = Path(__file__).with_name("goldens_mxfp4.npz")
    np.savez_compressed(path, versions=versions, **arrays)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
