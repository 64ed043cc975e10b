"""An image classifier of window attention and mixture-of-experts blocks.

The plan is that of the Swin transformer: patches become tokens, tokens attend to those of their
window, and every other block moves the windows by half their width so that neighbours meet. The
feed-forward of each block is a `moe_jax.MoE` that drops no tokens.

Source: Swin Transformer, https://arxiv.org/abs/2103.14030
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import MLP, Activation, MoE, Tagged


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The sizes of a model.

    Attributes:
        image_size: height and width of an image in pixels.
        channels: numbers in a pixel.
        patch_size: height and width of a patch in pixels.
        window_size: height and width of a window in patches.
        hidden_size: numbers in a token.
        num_heads: attention heads.
        num_blocks: blocks; every second one moves its windows.
        num_experts: experts in a block.
        experts_per_token: experts that a token is sent to.
        intermediate_size: hidden units of an expert.
        num_classes: what an image can be.
    """

    image_size: int = 16
    channels: int = 3
    patch_size: int = 2
    window_size: int = 4
    hidden_size: int = 24
    num_heads: int = 2
    num_blocks: int = 2
    num_experts: int = 5
    experts_per_token: int = 2
    intermediate_size: int = 40
    num_classes: int = 10

    def __post_init__(self) -> None:
        for whole, part in (
            ("image_size", "patch_size"),
            ("patches", "window_size"),
            ("hidden_size", "num_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part}={getattr(self, part)} must divide {whole}={getattr(self, whole)}"
                )

    @property
    def patches(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class Windows:
    """Which tokens attend to each other.

    Attributes:
        order: int [windows, n], the tokens of each window.
        inverse: int [tokens], where each token stands in `order`.
        mask: float32 [windows, n, n], -1e9 between tokens that are neighbours only because the
            image was wrapped around.
        offsets: int [n, n], a number for each difference between two places of a window.
    """

    order: np.ndarray
    inverse: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, patches: int, window_size: int, shift: int) -> "Windows":
        """The windows of an image of patches x patches, moved by `shift` along both sides."""

        def cut(grid: np.ndarray) -> np.ndarray:
            count = patches // window_size
            parts = np.roll(grid, (-shift, -shift), (0, 1)).reshape(
                count, window_size, count, window_size
            )
            return parts.swapaxes(1, 2).reshape(count * count, window_size * window_size)

        order = cut(np.arange(patches * patches).reshape(patches, patches))
        wrapped = np.arange(patches) < shift
        sides = cut(2 * wrapped[:, None] + wrapped[None, :])
        mask = np.where(sides[:, :, None] == sides[:, None, :], 0, -1e9).astype(np.float32)
        row, column = np.divmod(np.arange(window_size**2), window_size)
        width = 2 * window_size - 1
        rows, columns = (p[:, None] - p[None, :] + window_size - 1 for p in (row, column))
        return cls(order, np.argsort(order.reshape(-1)), mask, rows * width + columns)


class PatchEmbedding(nnx.Module):
    """Images [b, h, w, c] -> tokens [b, s, d], one for each patch, row by row."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        pixels = config.patch_size**2 * config.channels
        self.projection = nnx.Linear(pixels, config.hidden_size, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        n, p, c = self.config.patches, self.config.patch_size, self.config.channels
        patches = images.reshape(-1, n, p, n, p, c).transpose(0, 1, 3, 2, 4, 5)
        return self.projection(patches.reshape(-1, n * n, p * p * c))


class WindowAttention(nnx.Module):
    """Attention among the tokens of a window, with a bias for each relative place."""

    def __init__(self, config: VisionConfig, shift: int, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.shift = shift
        self.patches, self.window_size = config.patches, config.window_size
        self.qkv = nnx.Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.output = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        places = (2 * config.window_size - 1) ** 2
        table = jax.random.normal(rngs.params(), (config.num_heads, places))
        self.relative_bias = nnx.Param(0.02 * table)

    @property
    def windows(self) -> Windows:
        """The windows, which hold no parameters."""
        return Windows.of(self.patches, self.window_size, self.shift)

    def biases(self) -> jax.Array:
        """What is added to the scores, [windows, heads, n, n]."""
        windows = self.windows
        return self.relative_bias[...][None, :, windows.offsets] + windows.mask[:, None]

    def __call__(self, x: jax.Array) -> jax.Array:
        windows = self.windows
        b, s, d = x.shape
        count, n = windows.order.shape
        grouped = self.qkv(x)[:, windows.order.reshape(-1)]
        parts = grouped.reshape(b, count, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = parts.transpose(3, 0, 1, 4, 2, 5)
        scores = q @ k.swapaxes(-1, -2) * (d // self.num_heads) ** -0.5 + self.biases()[None]
        mixed = jax.nn.softmax(scores, axis=-1) @ v
        tokens = mixed.swapaxes(2, 3).reshape(b, s, d)
        return self.output(tokens[:, windows.inverse])


class Block(nnx.Module):
    """Window attention and a mixture of experts, each behind a norm and around a shortcut."""

    def __init__(self, config: VisionConfig, shift: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(config.hidden_size, rngs=rngs)
        self.attention = WindowAttention(config, shift, rngs)
        self.norm2 = nnx.LayerNorm(config.hidden_size, rngs=rngs)
        self.mlp = make_moe(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionMoE(nnx.Module):
    """Images [b, h, w, c] -> logits [b, class]."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        self.embedding = PatchEmbedding(config, rngs)
        shifts = (0, config.window_size // 2)
        self.blocks = nnx.List(
            [Block(config, shifts[i % 2], rngs) for i in range(config.num_blocks)]
        )
        self.norm = nnx.LayerNorm(config.hidden_size, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embedding(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def make_moe(config: VisionConfig, rngs: nnx.Rngs) -> MoE:
    """A dropless layer of MLPs with gelu."""
    hidden, intermediate = config.hidden_size, config.intermediate_size

    def normal(*axes: tuple[str, int]) -> Tagged:
        names, shape = zip(*axes, strict=True)
        array = jax.random.normal(rngs.params(), shape) * shape[-1] ** -0.5
        return Tagged(array, names)

    def zeros(size: int) -> Tagged:
        return Tagged(jnp.zeros((config.num_experts, size)), ("expert", "out"))

    expert = ("expert", config.num_experts)
    return MoE(
        MLP(
            up=normal(expert, ("out", intermediate), ("in", hidden)),
            down=normal(expert, ("out", hidden), ("in", intermediate)),
            up_bias=zeros(intermediate),
            down_bias=zeros(hidden),
            activation=Activation("gelu"),
        ),
        normal(expert, ("d", hidden)),
        experts_per_token=config.experts_per_token,
    )
