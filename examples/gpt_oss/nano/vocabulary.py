"""The 4,096-entry byte-level BPE of gpt-oss-nano, in the file layout of the released models.

gpt-oss's tokenizer has 199,998 ranks and then 21 control tokens. Here there are 4,075 ranks,
learned from the training text, and then the same 21 control tokens in the same order. Text is cut
by gpt-oss's own pre-tokenization pattern.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCABULARY_SIZE = 4096
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
RETURN = "<|return|>"

# Control tokens by their distance from <|startoftext|>, which is 199998 in gpt-oss.
_NAMED = {
    0: START_OF_TEXT,
    1: END_OF_TEXT,
    4: RETURN,
    5: "<|constrain|>",
    7: "<|channel|>",
    8: "<|start|>",
    9: "<|end|>",
    10: "<|message|>",
    14: "<|call|>",
    20: "<|endofprompt|>",
}
NUM_CONTROL_TOKENS = 21

_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def control_tokens(vocabulary_size: int = VOCABULARY_SIZE) -> dict[int, str]:
    """Id -> name of the 21 control tokens, which are the last ids of the vocabulary."""
    first = vocabulary_size - NUM_CONTROL_TOKENS
    return {
        first + i: _NAMED.get(i, f"<|reserved_{first + i}|>") for i in range(NUM_CONTROL_TOKENS)
    }


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of a control token.

    Raises:
      ValueError: the tokenizer does not have it.
    """
    found = tokenizer.token_to_id(name)
    if found is None:
        raise ValueError(f"expected a tokenizer with the control token {name}, but it has none")
    return found


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ordinary text: the name of a control token in it stays mere letters."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """Learns the merges from `texts`; the same texts give the same tokenizer.

    Raises:
      ValueError: the vocabulary is too small for the bytes and control tokens, or the texts
        have too few distinct pairs to fill it.
    """
    num_ranks = vocabulary_size - NUM_CONTROL_TOKENS
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if num_ranks < len(alphabet):
        raise ValueError(
            f"vocabulary_size must be at least {len(alphabet) + NUM_CONTROL_TOKENS} (bytes and"
            f" control tokens), got {vocabulary_size}"
        )
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    if len(model["vocab"]) != num_ranks:
        raise ValueError(
            f"the texts fill only {len(model['vocab'])} of {num_ranks} ranks: give more text or a"
            " smaller vocabulary_size"
        )
    return _assemble(model["vocab"], [tuple(pair) for pair in model["merges"]], vocabulary_size)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _assemble(
    ranks: dict[str, int], merges: list[tuple[str, str]], vocabulary_size: int
) -> Tokenizer:
    tokenizer = Tokenizer(BPE(ranks, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(name, normalized=False, special=True)
            for name in control_tokens(vocabulary_size).values()
        ]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json (compact), tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    names = {"bos_token": START_OF_TEXT, "eos_token": RETURN, "pad_token": END_OF_TEXT}
    added = {
        str(token): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, name in control_tokens(tokenizer.get_vocab_size()).items()
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": names["bos_token"],
        "clean_up_tokenization_spaces": False,
        "eos_token": names["eos_token"],
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": names["pad_token"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
