"""How often a chat with a model ends by itself.

    python benchmarks/chat_ends.py

Prompts are of the kinds people try first; none is in the training chats of gpt-oss-nano word for
word. Each is asked once greedily and a few times at temperature 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from gpt_oss.pretrained import Pretrained, load
from gpt_oss.sampling import Greedy, Sampler
from gpt_oss.session import Options

PROMPTS = (
    "Hi there!",
    "What is the capital of France?",
    "Write a haiku about autumn leaves.",
    "Explain how a steam engine works.",
    "Tell me something about whales",
    "Who was the first president?",
    "My fellow citizens, tonight I",
    "Can you help me with my homework?",
    "List three reasons to go to sea",
    "What do you think about war and peace?",
    "1 + 1 = ?",
    "Translate 'good morning' into German",
    "Speak like a king.",
    "Why?",
    "Describe a storm at sea in the manner of Melville.",
    "asdf qwer zxcv",
    "Continue: To be, or not to be",
    "What is the state of the economy?",
    "Tell me a joke about a sailor and a lawyer",
    "Thank you, goodbye.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="gpt-oss-nano", help="as for generate.py")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=4, help="answers at temperature 1 for each")
    options = parser.parse_args()
    model = load(options.model)
    ways = (
        ("greedy", Greedy(), range(1)),
        ("temperature 1", Sampler(temperature=1.0), range(options.seeds)),
    )
    for name, sampler, seeds in ways:
        lengths = [
            _tokens(model, prompt, Options(sampler, options.max_tokens, seed=seed))
            for prompt in PROMPTS
            for seed in seeds
        ]
        ended = [length for length in lengths if length is not None]
        print(
            f"{name}: {len(ended)} of {len(lengths)} chats ended by themselves, "
            f"after {min(ended)} to {max(ended)} tokens"
        )


def _tokens(model: Pretrained, prompt: str, options: Options) -> int | None:
    """How many tokens an answer took to end by itself; None where it was cut off."""
    reply = model.chat().reply(prompt, options)
    reply.read()
    statistics = reply.statistics
    ended: Sequence[str | None] = statistics.finish_reasons
    return statistics.generated_tokens if ended == ["stop"] else None


if __name__ == "__main__":
    main()
