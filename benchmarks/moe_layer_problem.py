"""The problem that every contender of `moe_layer.py` solves: shapes, numbers, and the floor.

NumPy only, and everything follows from seeds, so that processes with different frameworks make the
same weights, activations and logits without passing them around. The numbers of floats are exact
in bfloat16.
"""

import dataclasses

import numpy as np

BLOCK = 32
"""Elements of MXFP4 that share a scale."""

ROUTINGS = ("uniform", "zipf")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one gpt-oss MoE layer.

    Attributes:
        hidden_size: width of the rows; a multiple of 32.
        intermediate_size: width between the two matmuls; a multiple of 32.
        num_experts: experts of the layer.
        experts_per_token: experts that a token is sent to.
    """

    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_experts: int = 32
    experts_per_token: int = 4

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) < BLOCK or getattr(self, name) % BLOCK:
                raise ValueError(f"{name} must be a multiple of {BLOCK}, got {getattr(self, name)}")
        if not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be from 1 to {self.num_experts}, "
                f"got {self.experts_per_token}"
            )

    @property
    def gate_up(self) -> tuple[int, int]:
        """Outputs and inputs of an expert's first matmul."""
        return 2 * self.intermediate_size, self.hidden_size

    @property
    def down(self) -> tuple[int, int]:
        """Outputs and inputs of an expert's second matmul."""
        return self.hidden_size, self.intermediate_size

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's blocks and scales: half a byte an element and one a block."""
        elements = sum(outputs * inputs for outputs, inputs in (self.gate_up, self.down))
        return elements // 2 + elements // BLOCK

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of the two matmuls for one token."""
        elements = sum(outputs * inputs for outputs, inputs in (self.gate_up, self.down))
        return 2 * self.experts_per_token * elements


def layer_bytes(shape: Shape, tokens: int, distinct_experts: float) -> float:
    """The bytes one layer must move at least.

    The weights of the experts that are chosen, bfloat16 rows in and out, and the bfloat16 rows
    between the two matmuls written and read. Biases and logits are left out.
    """
    rows = 2 * tokens * shape.hidden_size
    between = 2 * tokens * shape.experts_per_token * shape.intermediate_size
    return distinct_experts * shape.expert_bytes + 2 * rows + 2 * between


def floor_us(
    shape: Shape, tokens: int, distinct_experts: float, *, terabytes: float, teraflops: float
) -> float:
    """The least microseconds of one layer: its bytes or its operations, whichever takes longer.

    Args:
        shape: the layer.
        tokens: rows.
        distinct_experts: how many experts are chosen by a token or more.
        terabytes: what the memory reaches, in 10^12 bytes a second.
        teraflops: what a bfloat16 matmul reaches, in 10^12 operations a second.
    """
    moving = layer_bytes(shape, tokens, distinct_experts) / terabytes
    multiplying = tokens * shape.flops_per_token / teraflops
    return max(moving, multiplying) / 1e6


@dataclasses.dataclass(frozen=True)
class Packed:
    """MXFP4 as the checkpoints of gpt-oss store it.

    Attributes:
        blocks: uint8 [expert, out, in / 32, 16], two codes a byte, the low four bits first.
        scales: uint8 [expert, out, in / 32], E8M0.
    """

    blocks: np.ndarray
    scales: np.ndarray


@dataclasses.dataclass(frozen=True)
class Weights:
    """One layer's weights; biases are float32 [expert, out]."""

    gate_up: Packed
    gate_up_bias: np.ndarray
    down: Packed
    down_bias: np.ndarray


def weights(shape: Shape, index: int) -> Weights:
    """Weight set number `index`: random codes, scales that keep the rows' size from growing."""

    def bias(part: int, outputs: int) -> np.ndarray:
        rng = np.random.default_rng([index, part])
        return _to_bfloat16(0.1 * rng.standard_normal((shape.num_experts, outputs), np.float32))

    return Weights(
        gate_up=_packed(shape.num_experts, *shape.gate_up, seed=[index, 0]),
        gate_up_bias=bias(1, shape.gate_up[0]),
        down=_packed(shape.num_experts, *shape.down, seed=[index, 2]),
        down_bias=bias(3, shape.down[0]),
    )


def _packed(num_experts: int, outputs: int, inputs: int, seed: list[int]) -> Packed:
    # a random code times a scale of a half, one or two has a root mean square of about 3.8
    exponent = 127 - round(float(np.log2(3.8 * inputs**0.5)))
    blocks = _random_bytes([*seed, 0], (num_experts, outputs, inputs // BLOCK, BLOCK // 2))
    scales = _random_bytes([*seed, 1], (num_experts, outputs, inputs // BLOCK))
    return Packed(blocks, scales % np.uint8(3) + np.uint8(exponent - 1))


def _random_bytes(seed: list[int], shape: tuple[int, ...]) -> np.ndarray:
    # whole words are drawn ten times as fast as bytes
    count = int(np.prod(shape))
    largest = np.iinfo(np.uint64).max
    rng = np.random.default_rng(seed)
    words = rng.integers(0, largest, -(-count // 8), np.uint64, endpoint=True)
    return words.view(np.uint8)[:count].reshape(shape)


def rows(shape: Shape, tokens: int) -> np.ndarray:
    """Activations [tokens, hidden_size], float32 holding bfloat16 values of variance 1."""
    rng = np.random.default_rng([tokens, 4])
    return _to_bfloat16(rng.standard_normal((tokens, shape.hidden_size), np.float32))


def logits(shape: Shape, tokens: int, index: int, routing: str) -> np.ndarray:
    """Router logits [tokens, num_experts] for weight set `index`, without ties that matter.

    `uniform`: every expert is as likely as any other. `zipf`: expert number r in an order that
    differs from set to set is taken about 1 / r as often as the first.

    Returns:
        float32 holding bfloat16 values. A token's chosen experts are the same however ties are
        broken.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}")
    rng = np.random.default_rng([tokens, index, 5])
    offset = np.zeros(shape.num_experts, np.float32)
    if routing == "zipf":
        # with Gumbel noise, the largest k are k draws without replacement (Gumbel top-k)
        offset = -np.log(1.0 + rng.permutation(shape.num_experts)).astype(np.float32)

    def draw(count: int) -> np.ndarray:
        noise = rng.gumbel(size=(count, shape.num_experts)).astype(np.float32)
        return _to_bfloat16(noise + offset)

    result = draw(tokens)
    while (tied := _tied(result, shape.experts_per_token)).any():
        result[tied] = draw(int(tied.sum()))
    return result


def _tied(result: np.ndarray, experts_per_token: int) -> np.ndarray:
    """Which tokens have chosen logits that are equal to another one."""
    ordered = -np.sort(-result, axis=-1)[:, : experts_per_token + 1]
    return (ordered[:, 1:] == ordered[:, :-1]).any(-1)


def route(result: np.ndarray, experts_per_token: int) -> tuple[np.ndarray, np.ndarray]:
    """The chosen experts [tokens, experts_per_token] and their weights, float64."""
    ids = np.argsort(-result, axis=-1, kind="stable")[:, :experts_per_token]
    chosen = np.take_along_axis(result.astype(np.float64), ids, axis=-1)
    exponentials = np.exp(chosen - chosen.max(-1, keepdims=True))
    return ids, exponentials / exponentials.sum(-1, keepdims=True)


def count_distinct(shape: Shape, tokens: int, turns: int, routing: str) -> float:
    """How many experts are chosen, on average over the turns."""
    chosen = [
        route(logits(shape, tokens, i, routing), shape.experts_per_token)[0] for i in range(turns)
    ]
    return float(np.mean([len(np.unique(ids)) for ids in chosen]))


def sets_in_use(tokens: int, sets: int) -> int:
    """How many weight sets take turns: all, or two where one call lasts long anyway."""
    return sets if tokens < 2048 else min(sets, 2)


def rotations(tokens: int) -> int:
    """How often the sets are gone through in one call, so that it outlasts its launch."""
    return 4 if tokens <= 4 else 2 if tokens <= 16 else 1


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even; finite values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
