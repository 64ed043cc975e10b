"""What `import moe_jax` costs and brings along; each import runs in a fresh interpreter."""

import subprocess
import sys

import pytest

UNWANTED = (
    *("triton", "jax_triton", "tokenizers", "optax", "huggingface_hub", "torch", "tqdm"),
    *("onnx", "onnxruntime", "openvino", "scipy"),
)


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def imported(statement: str) -> set[str]:
    listing = run(f"import sys; {statement}; print(*(m for m in {UNWANTED} if m in sys.modules))")
    return set(listing.split())


def test_importing_brings_along_nothing_that_flax_does_not():
    brought = imported("import moe_jax")
    assert "triton" not in brought and "tokenizers" not in brought
    assert brought <= imported("import jax, flax.nnx")


def test_importing_starts_no_backend():
    code = (
        "import moe_jax; from jax._src import xla_bridge as b; print(b.backends_are_initialized())"
    )
    assert run(code) == "False"


def seconds(statement: str) -> float:
    clock = "import time; start = time.perf_counter()"
    return float(run(f"{clock}; {statement}; print(time.perf_counter() - start)"))


def test_import_time():
    """Less than 1.5 times that of JAX and Flax; the best of pairs run one after the other."""
    ratios = []
    while len(ratios) < 5 and min(ratios, default=2.0) >= 1.5:
        base = seconds("import jax, flax")
        ratios.append(seconds("import moe_jax") / base)
    assert min(ratios) < 1.5, ratios


STATEMENTS = [
    "import moe_jax.mixture_of_experts",
    "import moe_jax; import moe_jax.mixture_of_experts",
    "from moe_jax.mixture_of_experts import fused_experts; import moe_jax",
    "import moe_jax.layer",
]


@pytest.fixture(scope="module")
def entries():
    """What the entry is after each statement, as text; of one process, which forgets moe_jax."""
    code = f"""
import sys, jax, flax.nnx
for statement in {STATEMENTS}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "moe_jax"]:
        del sys.modules[name]
    names = {{}}
    exec(statement, names)
    print(names["moe_jax"].mixture_of_experts)
"""
    return dict(zip(STATEMENTS, run(code).splitlines(), strict=True))


@pytest.mark.parametrize("statement", STATEMENTS)
def test_the_module_of_the_entry_can_be_imported_and_the_attribute_is_the_function(
    entries, statement
):
    assert entries[statement].startswith("<function mixture_of_experts")


def test_every_public_name_is_there():
    import moe_jax

    names = ("mixture_of_experts", "fused_experts", "MoE", "tag", "route", "BlockScaled")
    packed = ("PackedNVFP4", "PackedIntegers", "quantize_nvfp4", "quantize_integers")
    quantized = ("QuantizedGatedMLP", "StaticFP8", "DynamicNVFP4")
    for name in (*names, *packed, *quantized):
        assert callable(getattr(moe_jax, name))
