"""What Triton makes of the matmuls of tiled weights, at the sizes of gpt-oss."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from triton_tools import CAPABILITIES, MISSING, Compiled, compiled

import moe_jax
from moe_jax import Tagged
from moe_jax.kernels.dispatch import launch as dispatch
from moe_jax.kernels.expert_mlp import launch as layer
from moe_jax.kernels.tiled_matmul import configs, launch

SIZE = 2880
TYPES = {"int32": "i32", "float32": "fp32", "bfloat16": "bf16"}
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a program may have."""


def shape(dtype, **axes: int) -> Tagged:
    return Tagged(jax.ShapeDtypeStruct(tuple(axes.values()), dtype), tuple(axes))


def large_weight(out: int, size: int) -> moe_jax.TiledMXFP4:
    """The shapes of a weight with 32 experts."""
    tiles = {"expert": 32, "tile_out": -(-out // 16), "tile_in": -(-size // 64)}
    return moe_jax.TiledMXFP4(
        words=shape(jnp.int32, **tiles, lane=32, word=4),
        scales=shape(jnp.int32, **tiles, group=8),
        offset=shape(jnp.int32, expert=32),
        factor=shape(jnp.float32, expert=32, out=out),
        in_size=size,
    )


def compile_calls(monkeypatch, capability, regimes, index, function, *arguments):
    """What the kernels of a function compile to, under the plan of that index, by name."""
    found: dict[str, Compiled] = {}

    def call(kernel, *inputs, out_type, grid, num_warps, max_registers, aliases=None, **constants):
        del grid
        values = dict(zip(kernel.arg_names, [*inputs, *jax.tree.leaves(out_type)], strict=False))
        kinds = {
            name: "i32" if isinstance(value, int) else f"*{TYPES[str(value.dtype)]}"
            for name, value in values.items()
        }
        code = compiled(
            kernel,
            kinds,
            constants,
            capability,
            num_warps=num_warps,
            num_stages=1,
            maxnreg=max_registers,
        )
        name = kernel.fn.__name__
        print(name, f"{code.registers} registers, {code.spills} spilled, {code.shared} shared")
        assert code.registers * num_warps * 32 <= 65536
        found[name] = code
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out_type)

    def other_call(kernel, *_, out_type, **options):
        del kernel, options
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out_type)

    plan = dataclasses.replace(regimes[index], rows=math.inf, pairs=math.inf)
    monkeypatch.setattr(launch, "_call", call)
    monkeypatch.setattr(dispatch, "_call", other_call)
    monkeypatch.setattr(launch, "_regimes", lambda _: (plan,))
    jax.eval_shape(lambda *a: function(*a), *arguments)  # a function of its own: traces are kept
    return found


def tallest(regime: configs.Regime) -> configs.Regime:
    """With the last two heights only, which take the most registers."""
    plan = regime.plan
    parts = {
        name: dataclasses.replace(config, heights=config.heights[-2:])
        for name, config in (("gate_up", plan.gate_up), ("down", plan.down))
    }
    return dataclasses.replace(regime, plan=dataclasses.replace(plan, **parts))


HOPPER = tuple(map(tallest, configs.HOPPER))
TABLES = [
    # without two whose heights are below the last one's
    *((90, HOPPER, i) for i in range(len(HOPPER)) if i not in (6, 7)),
    *((c, configs.PORTABLE, i) for c in CAPABILITIES for i in range(len(configs.PORTABLE))),
]


@pytest.mark.parametrize(
    ("capability", "regimes", "index"),
    TABLES,
    ids=lambda v: str(v) if isinstance(v, int) else "hopper" if v is HOPPER else "portable",
)
@pytest.mark.compiles
def test_every_configuration_fits_the_gpu(monkeypatch, capability, regimes, index):
    pytest.importorskip("triton", reason=MISSING)
    experts = moe_jax.GptOssMLP(
        large_weight(2 * SIZE, SIZE),
        shape(jnp.float32, expert=32, out=2 * SIZE),
        large_weight(SIZE, SIZE),
        shape(jnp.float32, expert=32, out=SIZE),
    )
    tokens = 3 if regimes[index].rows < math.inf else 2048  # of many, sums are kept in bfloat16
    x = jax.ShapeDtypeStruct((tokens, SIZE), jnp.bfloat16)
    ids, weights = (jax.ShapeDtypeStruct((tokens, 4), t) for t in (jnp.int32, jnp.float32))
    found = compile_calls(
        monkeypatch, capability, regimes, index, layer.layer, experts, x, ids, weights
    )
    plan = regimes[index].plan
    one, two = ["layer_kernel"], ["gate_up_kernel", "down_kernel"]
    assert list(found) == (one if plan.is_one_kernel else two)
    chosen = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    instructions = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "dot": chosen}
    for code in found.values():
        assert not code.spills and code.shared <= SHARED[capability]
        assert instructions[plan.gate_up.instruction] in code.ptx


@pytest.mark.compiles
def test_grouped_matmul_fits_the_gpu(monkeypatch):
    pytest.importorskip("triton", reason=MISSING)
    rows, sizes = jax.ShapeDtypeStruct((40, SIZE), jnp.bfloat16), jnp.zeros(32, jnp.int32)
    weight = large_weight(2 * SIZE, SIZE)
    found = compile_calls(
        monkeypatch, 90, configs.HOPPER, 2, launch.multiply_rows, rows, weight, sizes
    )
    assert not found["rows_kernel"].spills


def rows_kernel(monkeypatch, index: int, size: int) -> str:
    """What the grouped matmul of so many inputs becomes before it is machine code."""
    pytest.importorskip("triton", reason=MISSING)
    rows, sizes = jax.ShapeDtypeStruct((40, size), jnp.bfloat16), jnp.zeros(32, jnp.int32)
    weight = large_weight(128, size)
    found = compile_calls(
        monkeypatch, 90, configs.HOPPER, index, launch.multiply_rows, rows, weight, sizes
    )
    return found["rows_kernel"].ttgir


NARROW, WIDE = 2, len(configs.HOPPER) - 1


@pytest.mark.parametrize(
    ("index", "size", "words"),
    [(NARROW, 64, 4), (NARROW, 2880, 4), (WIDE, 64, 2), (WIDE, 192, 2)],
)
@pytest.mark.compiles
def test_words_keep_their_order(monkeypatch, index, size, words):
    """The assembly that decodes a lane's words knows which scale belongs to which of them."""
    ttgir = rows_kernel(monkeypatch, index, size)
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    used = set(re.findall(r"tt\.elementwise_inline_asm .*?: tensor<\w+, (#\w+)>", ttgir))
    assert used
    for name in used:
        assert f"sizePerThread = [1, {2 * words}], " in layouts[name], layouts[name]


@pytest.mark.parametrize("index", [NARROW, WIDE])
@pytest.mark.compiles
def test_no_copy_outlives_its_loop(monkeypatch, index):
    operations = re.findall(
        r"ttg\.async_wait \{num = 0|ttg\.async_copy|tt\.store",
        rows_kernel(monkeypatch, index, 4096),
    )
    assert "tt.store" in operations
    for store in (i for i, name in enumerate(operations) if name == "tt.store"):
        waited = [name for name in operations[:store] if name != "tt.store"]
        assert waited[-1] == "ttg.async_wait {num = 0"


@pytest.mark.compiles
def test_a_product_runs_while_the_next_weights_are_decoded(monkeypatch):
    """Each is waited for when the next has started; only behind a loop for all of them."""
    ttgir = rows_kernel(monkeypatch, WIDE, 4096)
    heights = configs.HOPPER[WIDE].plan.gate_up.heights
    loops = re.findall(r"scf\.for .*?warp_group_dot .*?scf\.yield", ttgir, re.DOTALL)
    assert len(loops) == len(heights)
    for loop, parts in zip(loops, heights, strict=True):
        pending = [int(n) for n in re.findall(r"warp_group_dot_wait .*?pendings = (\d+)", loop)]
        # two halves of each tile of a step
        assert len(pending) == loop.count("warp_group_dot ") // len(parts) >= 2
        assert set(pending) == {len(parts)}
    everywhere = re.findall(r"warp_group_dot_wait .*?pendings = (\d+)", ttgir)
    assert everywhere.count("0") == len(heights)
