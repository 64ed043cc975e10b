"""The numbers of YaRN, which stretches a model's context.

Reference: https://arxiv.org/abs/2309.00071
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from gpt_oss import fields


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Stretching of rotary positions beyond the length a model was first trained with.

    Attributes:
        factor: by how much the context is stretched, at least 1.
        original_max_position_embeddings: the context, in tokens, before stretching.
        beta_fast: rotations within the original context from which a frequency stays as it is.
        beta_slow: rotations up to which a frequency is divided by `factor` in full.
        truncate: whether the ends of the ramp between the two are rounded to whole dimensions.
        attention_factor: what cosine and sine are multiplied with; None for
            0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    @property
    def cosine_factor(self) -> float:
        """The factor on cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    @classmethod
    def from_dict(cls, scaling: Mapping[str, Any], key: str) -> Self:
        """Reads the object that config.json holds under `key`. Raises ConfigError."""
        for name in ("mscale", "mscale_all_dim"):
            if scaling.get(name) is not None:
                raise fields.error(
                    f"{key}.{name}", "no such key: gpt-oss does not use it", scaling[name]
                )
        attention_factor = scaling.get("attention_factor")
        fast, slow = (
            fields.number(scaling, name, default)
            for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
        )
        if fast <= slow:
            raise fields.error(f"{key}.beta_fast", f"more than beta_slow, {slow}", fast)
        return cls(
            factor=fields.number(scaling, "factor", minimum=1.0),
            original_max_position_embeddings=fields.integer(
                scaling, "original_max_position_embeddings"
            ),
            beta_fast=fast,
            beta_slow=slow,
            truncate=fields.boolean(scaling, "truncate", True),
            attention_factor=None
            if attention_factor is None
            else fields.number(scaling, "attention_factor"),
        )
