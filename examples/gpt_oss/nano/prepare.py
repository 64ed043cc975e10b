"""Writes everything that training gpt-oss-nano needs:  python -m gpt_oss.nano.prepare --out DIR

Run it from `examples/`. Files written to DIR (ids are those of DIR/tokenizer.json):

    train.npy, heldout.npy   uint16 [tokens]: every document as <|startoftext|> text <|endoftext|>
    heldout.txt              the held-out documents' bytes, concatenated: what bits per byte count
    chats.npz                ids uint16, mask and segment uint8, each [rows, 512] (see `chats.pack`)
    tokenizer.json, tokenizer_config.json, special_tokens_map.json
    meta.json                sizes, names of the held-out documents, SHA-256 of every file
    archives/                the packages as fetched
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gpt_oss.nano import chats, corpus, vocabulary
from gpt_oss.nano.chat_maker import make_chats

# The words around every chat are worth whole tokens, though they are rare in the texts themselves.
SCAFFOLD_REPEATS = 2000


def encode_documents(tokenizer: Tokenizer, documents: Sequence[corpus.Document]) -> np.ndarray:
    """uint16 [tokens]: the documents one after the other, each between its two delimiters."""
    start = vocabulary.token_id(tokenizer, vocabulary.START_OF_TEXT)
    end = vocabulary.token_id(tokenizer, vocabulary.END_OF_TEXT)
    ids: list[int] = []
    for document in documents:
        ids += [start, *vocabulary.encode_text(tokenizer, document.text), end]
    return np.array(ids, np.uint16)


def prepare(
    train: Sequence[corpus.Document],
    heldout: Sequence[corpus.Document],
    out: Path,
    num_chats: int = 8000,
    seed: int = 0,
    vocabulary_size: int = vocabulary.VOCABULARY_SIZE,
) -> dict[str, Any]:
    """Writes the files listed above (less the archives) to `out`; returns what meta.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    scaffold = [text for text in chats.scaffold() for _ in range(SCAFFOLD_REPEATS)]
    tokenizer = vocabulary.train_tokenizer([d.text for d in train] + scaffold, vocabulary_size)
    vocabulary.write_tokenizer(tokenizer, out)
    train_ids = encode_documents(tokenizer, train)
    heldout_ids = encode_documents(tokenizer, heldout)
    np.save(out / "train.npy", train_ids)
    np.save(out / "heldout.npy", heldout_ids)
    (out / "heldout.txt").write_bytes("".join(d.text for d in heldout).encode())

    made = make_chats(train, tokenizer, num_chats, seed)
    rows = chats.pack([chats.encode(chat, tokenizer) for chat in made], tokenizer)
    np.savez_compressed(
        out / "chats.npz", ids=rows["ids"], mask=rows["mask"], segment=rows["segment"]
    )

    files = sorted(p for p in out.iterdir() if p.is_file() and p.name != "meta.json")
    meta = {
        "vocabulary_size": tokenizer.get_vocab_size(),
        "control_tokens": {
            name: i for i, name in vocabulary.control_tokens(vocabulary_size).items()
        },
        "train": describe(train, train_ids),
        "heldout": describe(heldout, heldout_ids) | {"names": [d.name for d in heldout]},
        "max_shared_8_word_runs": max(corpus.shared_shingles(train, heldout).values()),
        "chats": {
            "seed": seed,
            "chats": len(made),
            "rows": int(rows["ids"].shape[0]),
            "row_tokens": chats.CONTEXT,
            "tokens": int((rows["segment"] > 0).sum()),
            "target_tokens": int(rows["mask"].sum()),
            "kinds": dict(sorted(Counter(chat.kind for chat in made).items())),
        },
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def describe(documents: Sequence[corpus.Document], ids: np.ndarray) -> dict[str, Any]:
    """Sizes of one side of the split: documents, bytes (in all and by source) and tokens."""
    by_source = Counter[str]()
    for document in documents:
        by_source[document.source] += len(document.text.encode())
    return {
        "documents": len(documents),
        "bytes": by_source.total(),
        "bytes_by_source": dict(by_source),
        "tokens": int(ids.size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--chats", type=int, default=8000, help="number of chats to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the chats")
    args = parser.parse_args()
    archives = args.out / "archives"
    corpus.fetch(archives)
    train, heldout = corpus.split(corpus.load(archives))
    meta = prepare(train, heldout, args.out, args.chats, args.seed)
    print(json.dumps({k: v for k, v in meta.items() if k != "control_tokens"}, indent=2))


if __name__ == "__main__":
    main()
