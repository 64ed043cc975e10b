"""An image classifier of window attention and mixture-of-experts blocks.

The plan is that of the Swin transformer: patches become tokens, tokens attend to those of their
window, and every second block moves the windows by half their width so that neighbours meet. The
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
        patches: patches along a side of the image.
        patch_size: height and width of a patch in pixels.
        channels: numbers in a pixel.
        window_size: height and width of a window in patches; divides `patches`.
        hidden_size: numbers in a token.
        num_heads: attention heads; divides `hidden_size`.
        num_blocks: blocks.
        num_experts: experts in a block.
        experts_per_token: experts that a token is sent to.
        intermediate_size: hidden units of an expert.
        num_classes: what an image can be.
    """

    patches: int = 8
    patch_size: int = 2
    channels: int = 3
    window_size: int = 4
    hidden_size: int = 24
    num_heads: int = 2
    num_blocks: int = 2
    num_experts: int = 5
    experts_per_token: int = 2
    intermediate_size: int = 40
    num_classes: int = 10

    def __post_init__(self) -> None:
        if self.patches % self.window_size or self.hidden_size % self.num_heads:
            raise ValueError(
                f"window_size must divide patches, and num_heads hidden_size, got {self}"
            )

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return self.patches * self.patch_size


def windows(patches: int, window_size: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows of an image of patches x patches, moved by `shift` along both sides.

    Returns:
        The tokens of each window, int [windows, n], and float32 [windows, n, n] to add to their
        scores: -1e9 between tokens that meet only because the image was wrapped around.
    """
    count = patches // window_size

    def cut(grid: np.ndarray) -> np.ndarray:
        parts = np.roll(grid, (-shift, -shift), (0, 1))
        parts = parts.reshape(count, window_size, count, window_size).swapaxes(1, 2)
        return parts.reshape(count * count, window_size * window_size)

    wrapped = np.arange(patches) < shift
    sides = cut(2 * wrapped[:, None] + wrapped[None, :])
    mask = np.where(sides[:, :, None] == sides[:, None, :], 0, -1e9).astype(np.float32)
    return cut(np.arange(patches * patches).reshape(patches, patches)), mask


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
    """Attention among the tokens of a window, [b, s, d] -> [b, s, d]."""

    def __init__(self, config: VisionConfig, shift: int, rngs: nnx.Rngs) -> None:
        self.config, self.shift = config, shift
        self.qkv = nnx.Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.output = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """See the function `windows`."""
        return windows(self.config.patches, self.config.window_size, self.shift)

    def __call__(self, x: jax.Array) -> jax.Array:
        order, mask = self.windows()
        batch, tokens, size = x.shape
        heads = self.config.num_heads
        parts = self.qkv(x)[:, order].reshape(batch, *order.shape, 3, heads, size // heads)
        q, k, v = parts.transpose(3, 0, 1, 4, 2, 5)
        scores = q @ k.swapaxes(-1, -2) * (size // heads) ** -0.5 + mask[None, :, None]
        mixed = (jax.nn.softmax(scores, axis=-1) @ v).swapaxes(2, 3)
        return self.output(mixed.reshape(batch, tokens, size)[:, np.argsort(order, axis=None)])


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
        self.config = config
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
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

    def normal(axes: tuple[str, ...], *shape: int) -> Tagged:
        return Tagged(jax.random.normal(rngs.params(), shape) * shape[-1] ** -0.5, axes)

    return MoE(
        MLP(
            up=normal(("expert", "out", "in"), experts, inner, hidden),
            down=normal(("expert", "out", "in"), experts, hidden, inner),
            up_bias=Tagged(jnp.zeros((experts, inner)), ("expert", "out")),
            down_bias=Tagged(jnp.zeros((experts, hidden)), ("expert", "out")),
            activation=Activation("gelu"),
        ),
        normal(("expert", "d"), experts, hidden),
        experts_per_token=config.experts_per_token,
    )
