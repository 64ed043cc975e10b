"""What a model needs on many GPUs, by arithmetic:  python benchmarks/scaling.py

Prints the tables of docs/scaling.md. Nothing here is measured but the rates it begins with; what
comes out are floors, which no run can be faster than at those rates.
"""

import argparse
import dataclasses
import math

from moe_jax.sharding.communication import capacity, choose_communication

MXFP4 = 4.25 / 8
"""Bytes a weight: four bits, and a scale byte for each block of 32."""

BFLOAT16, FLOAT32 = 2, 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """A mixture-of-experts model.

    Attributes:
        layers: blocks with experts.
        hidden, intermediate: sizes of the experts.
        experts, chosen: experts of a layer, and how many a token is sent to.
        attention: weights of a layer's attention.
        heads: key/value heads, over which attention and its cache can be split.
        kept: numbers that a token leaves in a layer's cache.
        vocabulary: tokens; the embedding and the head have one row each.
    """

    layers: int
    hidden: int
    intermediate: int
    experts: int
    chosen: int
    attention: int
    heads: int
    kept: int
    vocabulary: int

    @property
    def expert_bytes(self) -> float:
        """One expert's."""
        return 3 * self.hidden * self.intermediate * MXFP4

    @property
    def bytes(self) -> float:
        """The model's."""
        experts = self.layers * self.experts * self.expert_bytes
        rest = self.layers * self.attention + 2 * self.vocabulary * self.hidden
        return experts + rest * BFLOAT16


SHAPES = {
    "120b": Shape(36, 2880, 2880, 128, 4, 26_542_080, 8, 1024, 201_088),
    # a trillion parameters in the manner of public models of that size, with grouped queries
    "1T": Shape(60, 7168, 2048, 384, 8, 132_120_576, 8, 2048, 163_840),
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one GPU does; the defaults were measured on H200s connected by NVLink, up to four.

    Attributes:
        memory: bytes/s read.
        link: bytes/s sent to other GPUs.
        sum_start: seconds for a sum over GPUs of what is small.
        swap_start: seconds for an all-to-all of what is small.
        capacity: bytes of memory.
    """

    memory: float = 4.3e12
    link: float = 260e9
    sum_start: float = 20e-6
    swap_start: float = 140e-6
    capacity: float = 141e9


def parts(shape: Shape, num_devices: int) -> int:
    """Over how many devices experts are split: the largest divisor of both numbers."""
    return max(n for n in range(1, num_devices + 1) if not (num_devices % n or shape.experts % n))


def distinct(experts: int, chosen: int, tokens: float) -> float:
    """How many experts so many tokens name, if they choose evenly."""
    return experts * (1 - (1 - chosen / experts) ** tokens)


def talking(shape: Shape, split: int, expert: int, tokens: int, rates: Rates) -> tuple[str, float]:
    """How rows reach the experts of `split` devices, and the seconds a layer spends on it.

    To be summed, rows are first gathered over the `expert` devices that split the batch; sums are
    of float32. After an exchange they are gathered by the devices that split attention, which all
    want them. A gather is taken to start as fast as a sum.
    """
    if split == 1:
        return "none", 0.0
    way = choose_communication(tokens, split, shape.chosen)
    row_seconds = shape.hidden * BFLOAT16 / rates.link

    def gathered(devices: int, rows: float) -> float:
        start = rates.sum_start if devices > 1 else 0.0
        return start + (devices - 1) / devices * rows * row_seconds

    if way == "psum":
        wide = shape.hidden * FLOAT32 / rates.link
        summed = rates.sum_start + 2 * (split - 1) / split * tokens * wide
        return way, gathered(expert, tokens) + summed
    room = capacity(-(-tokens // split), split, shape.chosen)
    swapped = 2 * (rates.swap_start + (split - 1) * room * row_seconds)
    return way, swapped + gathered(split // expert, tokens / expert)


def row(shape: Shape, num_devices: int, batch: int, context: int, rates: Rates) -> list[str]:
    """One row of the table: a mesh, and floors of a decoding step with `batch` sequences in all."""
    split = parts(shape, num_devices)
    copies, model = num_devices // split, math.gcd(split, shape.heads)
    tokens = batch // copies
    experts = shape.layers * shape.experts * shape.expert_bytes / split
    attention = shape.layers * shape.attention * BFLOAT16 / model
    table = shape.vocabulary * shape.hidden * BFLOAT16 / split
    rows = -(-tokens // (split // model))
    cache = shape.layers * rows * context * shape.kept * BFLOAT16 / model
    held = experts + attention + 2 * table + cache
    share = distinct(shape.experts, shape.chosen, tokens) / shape.experts
    reading = (experts * share + attention + table + cache) / rates.memory
    way, seconds = talking(shape, split, split // model, tokens, rates)
    heads = rates.sum_start + 2 * (model - 1) / model * rows * shape.hidden * (
        BFLOAT16 / rates.link
    )
    talk = shape.layers * (seconds + (heads if model > 1 else 0.0))
    fits = "" if held < rates.capacity else " (too much)"
    return [
        f"{num_devices}",
        f"data={copies}, expert={split // model}, model={model}",
        f"{batch:,}",
        f"{held / 1e9:.1f} GB{fits}",
        f"{reading * 1e3:.2f} ms",
        f"{talk * 1e3:.2f} ms ({way})",
        f"{batch / (reading + talk):,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=8192, help="tokens a sequence")
    arguments = parser.parse_args()
    head = [
        "GPUs",
        "mesh",
        "sequences",
        "a GPU holds",
        "reading",
        "communication",
        "tokens/s at most",
    ]
    for name, shape in SHAPES.items():
        print(f"\n{name}: {shape.bytes / 1e9:.0f} GB, context {arguments.context:,}\n")
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for num_devices in (8, 72, 576):
            for batch in (num_devices, 32 * num_devices):
                print(
                    f"| {' | '.join(row(shape, num_devices, batch, arguments.context, Rates()))} |"
                )


if __name__ == "__main__":
    main()
