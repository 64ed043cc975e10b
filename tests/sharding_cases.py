"""Routings whose results are known, and how tests run them on a mesh."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from core_oracle import TinyExperts, combine, f32

import moe_jax
from moe_jax import Sharding, tag
from moe_jax.sharding.communication import capacity

TOKENS, EXPERTS, CHOSEN, HIDDEN = 301, 8, 2, 5
COMMUNICATIONS = ["psum", "all_to_all"]
ALGORITHMS = ["per_token", "dense", "grouped"]
TOLERANCE = {"rtol": 5e-5, "atol": 5e-5}


@dataclasses.dataclass(frozen=True)
class Case:
    """A routing ids and weights [tokens, k] of rows x [tokens, d], and what comes of it."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    expected: np.ndarray


def _routings(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = TOKENS, CHOSEN
    even = rng.integers(0, EXPERTS, shape)
    return {
        "even": even,
        "the_first_device_gets_all": np.zeros(shape, np.int64),
        "the_last_device_gets_all": np.full(shape, EXPERTS - 1),
        "some_experts_get_none": rng.choice([1, 6], shape),
        "ids_of_no_expert": np.where(rng.random(shape) < 0.5, rng.choice([-1, 8, 99], shape), even),
        "no_pairs_at_all": np.full(shape, EXPERTS),
    }


@functools.cache
def experts() -> TinyExperts:
    return TinyExperts.random(np.random.default_rng(7), EXPERTS, HIDDEN, 7)


@functools.cache
def cases() -> dict[str, Case]:
    rng = np.random.default_rng(11)
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.normal(size=(TOKENS, CHOSEN)).astype(np.float32)

    def case(ids: np.ndarray, x: np.ndarray = x) -> Case:
        known = np.where(ids < EXPERTS, ids, -1)
        return Case(x, ids, weights, combine(x, known, weights, experts()))

    found = {name: case(ids) for name, ids in _routings(rng).items()}
    bad = x.copy()
    bad[[0, 17, 300]] = np.nan
    found["rows_of_nan"] = case(found["even"].ids, bad)
    return found


def on_mesh(here: Sharding, algorithm: str = "auto") -> Any:
    placed = here.place(experts().ours())
    function = jax.jit(
        lambda placed, x, ids, weights: moe_jax.fused_experts(
            x, ids, weights, placed, algorithm=algorithm, sharding=here
        ),
        compiler_options={"xla_backend_optimization_level": 0},  # compiling is what takes time
    )
    return functools.partial(function, placed)


def call(function: Any, case: Case) -> np.ndarray:
    pairs = "s", "top_expert"
    ids = tag(jnp.asarray(case.ids, jnp.int32), *pairs)
    return np.asarray(function(f32(case.x, "s", "d"), ids, f32(case.weights, *pairs)).array)


def rounds(ids: np.ndarray, sizes: tuple[int, int, int]) -> int:
    """How many rounds of the exchange a routing [tokens, k] needs on a mesh."""
    owners, devices = sizes[1] * sizes[2], math.prod(sizes)
    each = -(-len(ids) // devices)
    owner = np.where((ids >= 0) & (ids < EXPERTS), ids // (EXPERTS // owners), -1)
    longest = max(
        int((owner[first : first + each] == d).any(1).sum())
        for first in range(0, len(ids), each)
        for d in range(owners)
    )
    return -(-longest // capacity(each, owners, ids.shape[1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BareAffine:
    """An expert that users bring: bare leaves [expert, d]."""

    scale: jax.Array
    shift: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale[None] + self.shift[None]
