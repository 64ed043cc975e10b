"""How the kernels divide tokens: pure functions of sizes, that need no Triton."""

import dataclasses

_ONE_PROGRAM = 4096  # tokens x experts up to which one program routes all
_TILE = 2048  # tokens x experts of a tile where there are several programs
_COUNTS = 16384  # chunks x experts that `place_pairs` reads at once
_MOST_CHUNKS = 256
_LARGEST_COUNT = 65535  # pairs of a tile, all of which may name one expert


@dataclasses.dataclass(frozen=True)
class SortBlocks:
    """How tokens are divided among programs.

    Attributes:
        tokens: tokens a tile, a power of two.
        experts: the number of experts, rounded up to a power of two.
        pairs: experts per token, rounded up to a power of two.
        tiles: tiles a chunk; a program does one chunk.
        chunks: chunks of all tokens. One chunk of one tile takes a single launch.
        num_warps: warps a program.
    """

    tokens: int
    experts: int
    pairs: int
    tiles: int
    chunks: int
    num_warps: int


def sort_blocks(num_tokens: int, num_experts: int, experts_per_token: int) -> SortBlocks:
    """The division of `num_tokens` (at least one) for routing or sorting."""
    experts = power_of_two(num_experts)
    tokens = power_of_two(num_tokens)
    tiles = chunks = 1
    most = max(1, power_of_two(_LARGEST_COUNT // experts_per_token + 1) // 2)
    if tokens > most or tokens * experts > max(_ONE_PROGRAM, experts):
        tokens = max(1, min(tokens, most, _TILE // experts))
        tiles = power_of_two(-(-num_tokens // (tokens * _MOST_CHUNKS)))
        chunks = -(-num_tokens // (tokens * tiles))
    return SortBlocks(
        tokens=tokens,
        experts=experts,
        pairs=power_of_two(experts_per_token),
        tiles=tiles,
        chunks=chunks,
        num_warps=max(1, min(8, tokens * experts // 128)),
    )


@dataclasses.dataclass(frozen=True)
class PlaceBlocks:
    """How `place_pairs` reads: pairs and chunks a step, and warps a program."""

    pairs: int
    chunks: int
    num_warps: int


def place_blocks(blocks: SortBlocks, experts_per_token: int) -> PlaceBlocks:
    """The steps of `place_pairs` for pairs that were ranked in `blocks`."""
    pairs = power_of_two(blocks.tokens * blocks.tiles * experts_per_token)
    chunks = min(power_of_two(blocks.chunks), max(1, _COUNTS // blocks.experts))
    num_warps = max(4, min(8, chunks * blocks.experts // 512))
    return PlaceBlocks(pairs=min(pairs, 1024), chunks=chunks, num_warps=num_warps)


@dataclasses.dataclass(frozen=True)
class CombineBlocks:
    """How `combine_pairs` reads: columns and warps a program."""

    columns: int
    num_warps: int


def combine_blocks(size: int, itemsize: int) -> CombineBlocks:
    """Columns so that a thread reads 16 bytes of a row."""
    lanes = 16 // itemsize
    columns = max(32, min(128 * lanes, power_of_two(size)))
    return CombineBlocks(columns=columns, num_warps=max(1, min(4, columns // (32 * lanes))))


def count_bits(largest: int) -> int:
    """Bits for counts up to `largest`: 8 or 16.

    Raises:
        ValueError: `largest` is above 65535.
    """
    if largest > _LARGEST_COUNT:
        raise ValueError(
            f"counts are kept in 16 bits, up to {_LARGEST_COUNT}, got {largest}: name fewer "
            "experts per token"
        )
    return 8 if largest < 256 else 16


def power_of_two(number: int) -> int:
    """The least power of two that is no less than `number`."""
    return 1 << max(0, number - 1).bit_length()
