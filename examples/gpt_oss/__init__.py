"""gpt-oss on moe_jax: model, checkpoint loading, chat format and generation.

    import gpt_oss

    model = gpt_oss.load("gpt-oss-nano")            # or a folder, or a Hugging Face id
    model.generate("Tell me about the sea.")        # -> str, the answer in the chat format
    model.complete("It was a dark and")             # -> str, what follows the text
    model.logits(model.tokenizer.encode("It was"))  # -> float32 [tokens, vocabulary]

    session = model.chat(developer="Answer briefly.")
    for piece in session.reply("Hello", gpt_oss.Options(max_tokens=100)):
        if piece.is_answer:                         # not the reasoning, see gpt_oss.reader
            print(piece.text, end="")

Importing the package imports nothing else: each name is imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_oss.errors import UserError as UserError
    from gpt_oss.pretrained import Pretrained as Pretrained
    from gpt_oss.pretrained import load as load
    from gpt_oss.sampling import Greedy as Greedy
    from gpt_oss.sampling import Sampler as Sampler
    from gpt_oss.session import Options as Options

_HOMES = {
    "Greedy": "gpt_oss.sampling",
    "Options": "gpt_oss.session",
    "Pretrained": "gpt_oss.pretrained",
    "Sampler": "gpt_oss.sampling",
    "UserError": "gpt_oss.errors",
    "load": "gpt_oss.pretrained",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
